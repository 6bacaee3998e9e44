"""The transcribed tables: well-formed, complete against the notes, and unchanged."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from cvfp.analysis import published

# The notes are no part of the repository: they are compared where they lie beside the checkout.
NOTES = Path(__file__).resolve().parents[2] / "shared" / "seeds"
FOLDER = Path(published.__file__).parent

# Columns of words. Every other column must hold numbers or truth values.
WORDS = {
    *("architecture", "characteristic", "config", "configs", "design", "expected", "experiment"),
    *("factor", "gpu", "interpretation", "kind", "metric", "pattern", "position", "predictor"),
    *("reason", "relation", "reliability", "remark", "sample_counts", "source", "target"),
    *("tendency", "verdict", "version"),
}

# Rows of each table and the sum of its finite figures, those inside words included and a true
# cell as 1, so that a slip of the pen shows in any clone, with the notes or without.
SUMS: dict[str, tuple[int, float]] = {
    "000_agreement": (4, 9.492056),
    "000_designs": (2, 1990.2),
    "000_positions": (3, 303.0095),
    "000_scaling": (4, 917183.2),
    "001_designs": (2, 138.0),
    "001_er": (4, 919.1),
    "001_importance": (2, 6.993),
    "001_scaling": (4, 917219.0),
    "001_tokens": (4, 4800.9),
    "002_accuracy": (2, 747.1),
    "002_alphas": (2, 39.138),
    "002_designs": (2, 979.4),
    "002_designs_change": (1, 766.0),
    "002_epochs": (14, 42597.5),
    "002_predictions": (7, 16915126.0),
    "002_scaling": (4, 915932.5),
    "002_settings": (1, 1693.2),
    "003_convergence": (4, 1079988.8),
    "003_models": (2, 2369.1),
    "003_overfitting": (4, 10133.12),
    "003_predictions": (4, 545145.9),
    "003_results": (4, 547099.94),
    "003_scaling_law": (2, 63607.328),
    "003_settings": (1, 54.004),
    "004_alpha_er": (8, 9490.092),
    "004_configs": (8, 34241.592),
    "004_context_dim": (3, 3722.2),
    "004_er_ppl": (5, 7205.1),
    "004_er_thresholds": (3, 310.0),
    "004_input_tokens": (2, 527.8),
    "004_iteration_thresholds": (3, 134.0),
    "004_iterations": (3, 4866.0),
    "004_predictability": (3, 4.0),
    "004_summary": (8, 11033.792),
    "004_window_sizes": (5, 1851403.6),
    "004_windows": (2, 4493.764),
}

# The tables of each note in the order printed. Where one printed table became two files, the
# rows of the files follow one another.
PRINTED: dict[str, list[tuple[str, ...]]] = {
    "000": [("000_designs",), ("000_agreement",), ("000_positions",), ("000_scaling",)],
    "001": [
        ("001_scaling",),
        ("001_er",),
        ("001_tokens",),
        ("001_designs",),
        ("001_importance",),
    ],
    "002": [
        ("002_settings",),
        ("002_scaling",),
        ("002_designs", "002_designs_change"),
        ("002_alphas",),
        ("002_accuracy",),
        ("002_predictions",),
    ],
    "003": [
        ("003_settings",),
        ("003_models",),
        ("003_results",),
        ("003_scaling_law",),
        ("003_convergence",),
        ("003_overfitting",),
    ],
    "004": [
        ("004_configs",),
        ("004_summary",),
        ("004_alpha_er",),
        ("004_windows",),
        ("004_window_sizes",),
        ("004_er_ppl",),
        ("004_iterations",),
        ("004_context_dim",),
        ("004_input_tokens",),
        ("004_predictability",),
        ("004_er_thresholds",),
        ("004_iteration_thresholds",),
    ],
}

# Files transcribed from the text between the tables; tests of their own below.
OUTSIDE_TABLES = {"002_epochs", "003_predictions"}

# Printed with a row for each parameter, transcribed as one row with a column for each.
TURNED = {"002_settings", "003_settings"}

# Figures that the printed table of this name does not have: from another table of the note, or
# (change) 0 where the note prints a word.
ADDED = {
    "001_scaling": ["train_er"],
    "002_scaling": ["best_epoch"],
    "004_context_dim": ["change"],
}

# A digit that follows a letter belongs to a name (phase1, L4); a dash that follows a letter,
# a digit or a percent sign joins a range or a name (50-500, 7.8%-9.0%, A-500) and is no minus.
NUMBER = re.compile(
    r"(?P<sign>(?<![A-Za-z0-9%])[-−–])?"
    r"(?<![A-Za-z0-9.])(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)"
)
STARS = re.compile(r"[★☆]{5}")
VERSION = re.compile(r"(?<![A-Za-z0-9_])v(?=\d)")


def numbers(text: str) -> list[float]:
    """Numbers in the order printed, without their units: 56K and 56% are 56, and v2 is 2."""
    plain = VERSION.sub("", text.replace("*", ""))
    rated = STARS.sub(lambda match: str(match.group().count("★")), plain)
    return [
        float(("-" if match["sign"] else "") + match["digits"].replace(",", ""))
        for match in NUMBER.finditer(rated)
    ]


def unique(values: list[float]) -> list[float]:
    """In order, each once: 40 as low and high end and a label's 768 beside context_dim are one."""
    return list(dict.fromkeys(round(value, 9) for value in values))


def note_text(note: str) -> str:
    if not NOTES.is_dir():
        pytest.skip(f"no research notes at {NOTES}: nothing to compare with")
    (path,) = NOTES.glob(f"{note}_*.txt")
    return path.read_text(encoding="utf-8")


def printed_tables(text: str) -> list[list[str]]:
    """Body rows of every Markdown table."""
    found: list[list[str]] = []
    before = ""
    for line in text.splitlines():
        if re.fullmatch(r"\|[-| :]+\|", line):
            assert before.startswith("|")
            found.append([])
        elif line.startswith("|") and before.startswith("|"):
            found[-1].append(line)
        before = line
    return found


def transcribed_rows(name: str) -> Iterator[list[float]]:
    """Numbers of each row in the order of its columns, those inside words included."""
    table = published.table(name)
    for row in table.drop(columns=ADDED.get(name, [])).itertuples(index=False):
        values: list[float] = []
        for cell in row:
            if isinstance(cell, str):
                values += numbers(cell)
            elif not isinstance(cell, bool | np.bool_) and math.isfinite(cell):
                values.append(float(cell))
        yield unique(values)


def sum_of_figures(table: pd.DataFrame) -> float:
    columns = table.select_dtypes(["number", "bool"]).astype(float).to_numpy().ravel()
    words = table.select_dtypes(exclude=["number", "bool"]).to_numpy().ravel()
    inside = map(float, re.findall(r"\d+(?:\.\d+)?", " ".join(words)))
    return round(math.fsum([*columns[np.isfinite(columns)], *inside]), 6)


@pytest.mark.parametrize("name", sorted(SUMS))
def test_is_well_formed(name: str) -> None:
    table = published.table(name)
    assert len(table)
    comment, header, *rows = (FOLDER / f"{name}.csv").read_text(encoding="utf-8").splitlines()
    assert re.match(rf"# Note {name[:3]} \(2025-11-\d\d\), .*\".+\".*: .+", comment)
    assert header.split(",") == list(table.columns)
    assert len(rows) == len(table)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", column) for column in table.columns)
    for column in table.columns:
        kind = table[column].dtype
        assert (is_numeric_dtype(kind) or is_bool_dtype(kind)) == (column not in WORDS), column


def test_ranges_run_upwards() -> None:
    for name in published.tables():
        table = published.table(name)
        for low in table.columns[table.columns.str.endswith("_low")]:
            assert (table[low] <= table[low.removesuffix("_low") + "_high"]).all(), (name, low)


def test_labels_say_what_their_columns_say() -> None:
    table = published.table("004_configs")
    assert table.config.tolist() == [
        f"{row.num_layers}L_{row.context_dim}d_{row.num_input_tokens}tok ({row.version})"
        for row in table.itertuples()
    ]
    for name in ("004_summary", "004_alpha_er"):
        other = published.table(name)
        assert other[["config", "alpha"]].equals(table[["config", "alpha"]])


def test_no_figure_has_changed() -> None:
    loaded = {name: published.table(name) for name in published.tables()}
    assert {name: (len(table), sum_of_figures(table)) for name, table in loaded.items()} == SUMS


def test_every_file_is_accounted_for() -> None:
    names = set(chain.from_iterable(chain.from_iterable(PRINTED.values())))
    assert names | OUTSIDE_TABLES == set(published.tables())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("| **True** | 56,602 | 76.3% | 0.5min |", [56602, 76.3, 0.5]),
        ("| 1L_768d_2tok (v3) | 50-500 | **-0.546** |", [1, 768, 2, 3, 50, 500, -0.546]),
        ("| A-500 | 63K-473K | 7.8%–9.0% | 55~66 |", [500, 63, 473, 7.8, 9, 55, 66]),
        ("| 100% (86,925/86,925) | 10.63M | +782% | −39% |", [100, 86925, 86925, 10.63, 782, -39]),
        ("| phase1_learning_rate | L4 | ★★★★☆ | W1, W2 | 30+ | R²=0.993 |", [4, 30, 0.993]),
    ],
)
def test_numbers_are_read_as_printed(text: str, expected: list[float]) -> None:
    assert numbers(text) == expected


@pytest.mark.parametrize("note", sorted(PRINTED))
def test_every_printed_row_is_transcribed(note: str) -> None:
    found = printed_tables(note_text(note))
    assert len(found) == len(PRINTED[note])
    for printed, names in zip(found, PRINTED[note], strict=True):
        expected = [unique(numbers(row)) for row in printed]
        if TURNED.issuperset(names):
            expected = [unique(list(chain.from_iterable(expected)))]
        if "change" in ADDED.get(names[0], []):
            # The added column is checked apart from the row whose word it stands for.
            change = [row[-1] for row in expected[1:]]
            assert published.table(names[0]).change.tolist() == [0, *change]
            expected = [expected[0], *(row[:-1] for row in expected[1:])]
        assert list(chain.from_iterable(map(transcribed_rows, names))) == expected, names


def test_added_columns_are_the_notes_own() -> None:
    """The scaling tables repeat a column of another table or listing of their notes."""
    runs, ranks = published.table("001_scaling"), published.table("001_er")
    assert runs.train_er.tolist() == ranks.train_er.tolist()
    epochs = published.table("002_epochs")
    best = epochs[epochs.best].epoch.tolist()
    assert published.table("002_scaling").best_epoch.tolist() == best


def test_every_printed_epoch_is_transcribed() -> None:
    expected = []
    samples = 0
    for line in note_text("002").splitlines():
        if heading := re.fullmatch(r"### (\d+)サンプル", line):
            samples = int(heading.group(1))
        elif line.startswith("Epoch "):
            expected.append(([samples, *numbers(line)], "★Best" in line))
    table = published.table("002_epochs")
    rows = table.drop(columns="best").astype(float).to_numpy().tolist()
    assert list(zip(rows, table.best.tolist(), strict=True)) == expected


def test_every_printed_prediction_is_transcribed() -> None:
    expected = []
    experiment = ""
    for line in note_text("003").splitlines():
        if heading := re.match(r"\*\*実験([AB]) ", line):
            experiment = heading.group(1)
        elif line.startswith("- tokens="):
            expected.append([experiment, *numbers(line)])
    assert published.table("003_predictions").to_numpy().tolist() == expected
