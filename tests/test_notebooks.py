"""The stored notebooks: executed, parameterised, light, and checked by nbval for real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from cvfp.analysis import claims

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
    assert not any(re.search(r"^\s*(def|class) ", c.source, re.M) for c in cells)
    assert sum(c.source.startswith("# NBVAL_CHECK_OUTPUT") for c in cells) >= 2
    images = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert images
    assert all(len(image) * 3 / 4 < 100_000 for image in images)


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
    kept = claims.load(ROOT / "reports" / "claims.json")
    page = (ROOT / "reports" / "claims.md").read_text(encoding="utf-8")
    assert page == claims.markdown(kept)
    assert (
        sum(claims.verdict(claims.CLAIMS[id], one) != "not run" for id, one in kept.items()) >= 15
    )
    stems = [path.stem for path in (ROOT / "reports").glob("*.ipynb")]
    for one in kept.values():
        assert any(stem.startswith(one.notebook) for stem in stems)


def test_nbval_sees_a_corrupted_fact(tmp_path: Path) -> None:
    """The checked cells of 01 that need no run: as stored they pass, corrupted they fail."""
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
