"""The published tables, the readings."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from cvfp.analysis import published, readings, scaling


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
