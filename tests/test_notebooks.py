"""The stored notebooks: executed, parameterised, light, and checked by nbval for real."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from benchmarks import blocks
from cvfp import Experiment, ParameterError
from cvfp.analysis import claims, ledger

ROOT = Path(__file__).resolve().parent.parent
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code(book: Path) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(book, as_version=4).cells if c.cell_type == "code"]


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_stored_as_design_says(book: Path) -> None:
    cells = code(book)
    assert sum("parameters" in c.metadata.get("tags", []) for c in cells) == 1
    assert not any("injected-parameters" in c.metadata.get("tags", []) for c in cells)
    assert all(c.execution_count is not None for c in cells)
    outputs = [output for c in cells for output in c.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
    if not book.stem.startswith("08"):  # which shows parts of one's own
        assert not any(re.search(r"^\s*(def|class) ", c.source, re.M) for c in cells)
    assert sum(c.source.startswith("# NBVAL_CHECK_OUTPUT") for c in cells) >= 2
    images = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert images
    assert all(len(image) * 3 / 4 < 100_000 for image in images)


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_opens_on_its_own(book: Path) -> None:
    """Its first cell is everybody's, and says nothing where cvfp is installed."""
    first = code(book)[0]
    assert first.source == blocks.FIRST_CELL.replace("ADDRESS", blocks.address())
    assert first.metadata.tags == ["setup"]
    assert first.outputs == []


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_parameters_are_read_once(book: Path) -> None:
    """Declared literals, then `given`; no later cell reads a parameter as it was written."""
    cells = code(book)
    place = next(i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", []))
    declared = {}
    for statement in ast.parse(cells[place].source).body:
        assert isinstance(statement, ast.Assign)
        (target,) = statement.targets
        assert isinstance(target, ast.Name)
        declared[target.id] = ast.literal_eval(statement.value)
    assert declared["preset"] == "mini"
    assert cells[place + 1].source.startswith("given = cvfp.notebook.given(")
    for cell in cells[place + 1 :]:
        for node in ast.walk(ast.parse(cell.source)):
            assert not (isinstance(node, ast.Name) and node.id in declared), node.id


def first_cells(book: Path, **injected: object) -> dict[str, Any]:
    """The variables after the notebook's first cells, up to the one that reads its parameters."""
    cells = [cell.source for cell in code(book)]
    place = next(i for i, source in enumerate(cells) if source.startswith("given = "))
    words = [f"{name} = {value!r}" for name, value in injected.items()]
    space: dict[str, Any] = {}
    exec("\n".join([*cells[:place], *words, cells[place]]), space)
    return {"experiment": space.get("base"), **space}  # 06 compares others with its base


SMALL = dict(vocab_size=300, fitting_samples=3, validation_samples=2)


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_any_field_is_a_parameter_of_every_notebook(book: Path) -> None:
    experiment = first_cells(book, **SMALL, loss_group="500", phase1_noise=0)["experiment"]
    assert isinstance(experiment, Experiment)
    assert (experiment.loss_group, experiment.phase1_noise) == (500, 0.0)


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
@pytest.mark.parametrize(
    ("name", "value"),
    [("sample", 5), ("phase1_noise", -1), ("phase2_patience", 2.5), ("phase1_abort", True)],
)
def test_first_cell_refuses(book: Path, name: str, value: object) -> None:
    with pytest.raises(ParameterError, match=f"^{name}: got {value}[.;]"):
        first_cells(book, **{**SMALL, name: value})


@pytest.mark.parametrize(
    ("stem", "name", "value", "words"),
    [
        ("01", "temperature", -1, "at least 0"),
        ("01", "max_new_tokens", 0, "at least 1"),
        ("01", "samples", 10**6, "at most"),
        ("01", "contexts", "zero", "06_controls"),
        ("02", "training_contexts", "exact", "both are run"),
        ("02", "n_jobs", 0, "at least 1"),
        ("02", "lengths", "100,2.5", "an integer"),
        ("03", "model", "lstm", "06_controls"),
        ("03", "seed", 3, "seeds, which sets it"),
        ("03", "samples", 10**6, "at most"),
        ("03", "patience_samples", 10**6, "at most"),
        ("03", "patience_epochs", 2.5, "one integer"),
        ("03", "depths", "0,2", "at least 1"),
        ("04", "context_dim", 64, "set by deep and wide"),
        ("04", "overfit_epochs", 0, "at least 1"),
        ("05", "dims", "1,64", "at least 2"),
        ("05", "early_abort", "perhaps", "true or false"),
        ("06", "contexts", "zero", "every kind is run"),
        ("06", "trials", 0, "at least 1"),
        ("06", "num_input_tokens", 2, "1 for model 'transformer'"),
        ("08", "block", "mine", "shows its own"),
    ],
)
def test_first_cell_refuses_of_its_own(stem: str, name: str, value: object, words: str) -> None:
    book = next(book for book in BOOKS if book.stem.startswith(stem))
    with pytest.raises(ParameterError, match=words):
        first_cells(book, **{**SMALL, name: value})


@pytest.mark.parametrize(
    ("stem", "ids"),
    [
        ("02", ["C2", "C3"]),
        ("03", ["C6", "C7", "C10", "C15", "C19"]),
        ("04", ["C1", "C4", "C8", "C9"]),
        ("05", ["C5", "C11", "C12", "C13", "C14", "C16", "C17", "C18"]),
    ],
)
def test_notebooks_print_the_rows_of_their_claims(stem: str, ids: list[str]) -> None:
    book = next(book for book in BOOKS if book.stem.startswith(stem))
    shown = "".join(
        output.data.get("text/markdown", "")
        for cell in code(book)
        for output in cell.outputs
        if "data" in output
    )
    for id in ids:
        assert f"| {id} | {claims.CLAIMS[id].sentence} |" in shown
        assert claims.CLAIMS[id].notebook == book.stem


def test_reports_are_generated() -> None:
    """The ledger's page is what its measurements make, and each has its notebook in reports/."""
    kept = ledger.load(ROOT / "reports" / "claims.json")
    page = (ROOT / "reports" / "claims.md").read_text(encoding="utf-8")
    assert page == ledger.markdown(kept)
    assert len({one.id for one in kept if one.setting == "mini"}) >= 15
    stems = [path.stem for path in (ROOT / "reports").glob("*.ipynb")]
    for one in kept:
        assert any(stem.startswith(one.by) for stem in stems)


def test_nbval_sees_a_corrupted_fact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checked cells of 01 that need no run: as stored they pass, corrupted they fail."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernel's cvfp is this one
    stored = nbformat.read(BOOKS[0], as_version=4)
    imports = next(c for c in stored.cells if "import cvfp" in c.source)
    checked = [c for c in stored.cells if c.source.startswith("# NBVAL_CHECK_OUTPUT")]
    cells = [imports, checked[-1]]
    assert "alpha -0.403" in cells[1].outputs[0].text

    def passes() -> bool:
        small = nbformat.v4.new_notebook(cells=cells, metadata=stored.metadata)
        path = tmp_path / "small.ipynb"
        nbformat.write(small, path)
        command = [sys.executable, "-m", "pytest", "--nbval-lax", str(path), "-c", "/dev/null"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    assert passes()
    cells[1].outputs[0].text = cells[1].outputs[0].text.replace("-0.403", "-0.404")
    assert not passes()
