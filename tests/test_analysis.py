"""The published tables, the readings."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic import made

import cvfp
from cvfp.analysis import published, readings, scaling, style, tables


def test_published_tables_say_where_they_are_from() -> None:
    for name in published.tables():
        assert not published.table(name).isna().any().any()
        note = re.match(r"\d{3}", name)
        assert note is not None
        path = Path(published.__file__).with_name(f"{name}.csv")
        assert path.read_text(encoding="utf-8").startswith(f"# Note {note.group()}")
    with pytest.raises(KeyError, match="accepted: one of"):
        published.table("999")


def test_reading_says_so_when_a_baseline_wins() -> None:
    lines = {"unigram": 700.0, "kneser_ney": 170.0, "table": 128.0, "kneser_ney_both": 124.0}
    lines |= {"trigram": 160.0, "trigram_both": 122.0}
    assert "A baseline wins" in readings.against_baselines(131.0, lines)
    assert "lowest perplexity" in readings.against_baselines(120.0, lines)
    assert "not there" in readings.against_baselines(120.0, {**lines, "table": None})


def test_reading_follows_the_numbers() -> None:
    frame = pd.DataFrame(
        {
            "samples": [50, 100, 200],
            "seed": 0,
            "train_tokens": [5e4, 1e5, 2e5],
            "val_ppl": [150.0, 140.0, 130.0],
            "train_er": 0.8,
            "val_er": 0.79,
            "best_epoch": [3, 4, 10],
            "phase2_epochs": 10,
            "unigram_ppl": 700.0,
            "kneser_ney_ppl": 170.0,
            "table_ppl": 128.0,
            "kneser_ney_both_ppl": 124.0,
            "trigram_ppl": 160.0,
            "trigram_both_ppl": 122.0,
        }
    )
    law = scaling.fit(frame.train_tokens, frame.val_ppl)
    assert "perplexity falls, 150.0 to 130.0" in readings.ladder(frame, law)
    assert "the runs of 200 conversations" in readings.ladder(frame, law)
    longer = readings.ladder(frame.assign(phase2_epochs=11), law)
    assert "past its best epoch" in longer
    worse = frame.assign(val_ppl=frame.val_ppl[::-1].to_numpy())
    law = scaling.fit(worse.train_tokens, worse.val_ppl)
    assert "does not fall" in readings.ladder(worse, law)


# Tables that fit


def test_the_lines_to_beat_stand_under_the_perplexity() -> None:
    runs = [made({"samples": size, "seed": seed}) for size in (50, 2000) for seed in (0, 1)]
    used = [column for *columns, _ in style.COLUMNS["runs"].values() for column in columns]
    frame = cvfp.Results(runs).frame()
    shown = tables.runs(frame.assign(**{name: 1.0 for name in used if name not in frame}))
    assert list(shown) == [50, 2000]  # a size a column: few, whatever is measured
    rows = list(shown.index)
    assert rows[: rows.index("accuracy %")] == [
        *("seeds", "tokens", "PPL", "PPL s.d."),
        *("KN trigram fit+train", "KN fit+train", "table alone", "KN trigram", "KN bigram"),
        "unigram",
    ]


def test_what_runs_ran_on_folds_into_two_lines() -> None:
    """Two summaries that say what was run and on what, over tables that have all of it, escaped."""
    evil = "<script>alert(1)</script>" + "x" * 60
    rest: dict[str, Any] = dict(
        val_tokens=5, embedding_dim=8, parameters={"head": 0}, versions={"torch": "2"}
    )
    rest |= dict(from_store=False, threads=1, device="cpu")
    facts = tables.ran_on([made({"dataset": evil, "samples": 50}, **rest)])
    assert facts.loc["seed", ""] == "42"
    shown = facts._repr_html_()
    assert "<script" not in shown
    root = ET.fromstring(f"<div>{shown}</div>")
    lines = list(root)
    assert [line.tag for line in lines] == ["details"] * 2
    said = ["".join(line[0].itertext()) for line in lines]
    assert said[0].startswith(f"corpus {evil}; conversations 50, fitting")
    assert said[1].startswith("device ")
    opened = {
        row.findtext("th"): row.findtext("td") for line in lines for row in line[1].iter("tr")
    }
    assert opened == dict(facts[""].astype(str))
