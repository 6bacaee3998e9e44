"""The power law, the published tables, the readings."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cvfp.analysis import published, scaling, tables


def test_a_planted_law_is_recovered() -> None:
    tokens = np.array([5e4, 1e5, 2e5, 5e5])
    law = scaling.fit(tokens, 1234.0 * tokens**-0.3)
    assert law.alpha == pytest.approx(-0.3)
    assert pytest.approx(1234) == law.A
    assert law.r2 == pytest.approx(1)
    assert law.per_doubling == pytest.approx(2**-0.3 - 1)
    assert law.predict(1e6) == pytest.approx(1234 * 1e6**-0.3)
    assert np.allclose(law.predict([1e6, 5e6]), 1234 * np.array([1e6, 5e6]) ** -0.3)


@pytest.mark.parametrize(
    ("name", "slope", "r2"), [("002_scaling", -0.4026, 0.9920), ("001_scaling", -0.4591, 0.9927)]
)
def test_recomputed_from_the_published_tables(name: str, slope: float, r2: float) -> None:
    table = published.table(name)
    law = scaling.fit(table.tokens, table.val_ppl)
    assert round(law.alpha, 4) == slope
    assert law.r2 is not None
    assert round(law.r2, 4) == r2


def test_corrections_of_note_002() -> None:
    table = published.table("002_scaling")
    law = scaling.fit(table.tokens, table.val_ppl)
    assert round(law.A, -2) == 66_800
    assert [round(law.predict(t), 1) for t in (1e6, 5e6, 1e7)] == [256.5, 134.2, 101.5]


def test_two_points_give_a_line_and_no_interval() -> None:
    law = scaling.fit([1e5, 2e5], [200, 150])
    assert law.r2 is None
    assert law.interval() is None
    assert law.alpha == pytest.approx(np.log2(150 / 200))


def test_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    tokens = np.array([5e4, 1e5, 2e5, 5e5])
    hits = 0
    for _ in range(400):
        noise = np.exp(generator.normal(0, 0.02, 4))
        interval = scaling.fit(tokens, 1e4 * tokens**-0.3 * noise).interval()
        assert interval is not None
        hits += interval[0] <= -0.3 <= interval[1]
    low, high = stats.binom.ppf([0.001, 0.999], 400, 0.95)
    assert low <= hits <= high


@pytest.mark.parametrize(
    ("tokens", "ppl", "name"),
    [
        ([1e5], [100], "tokens"),
        ([1e5, 1e5], [100, 90], "tokens"),
        ([1e5, 2e5], [100, 0], "ppl"),
        ([1e5, 2e5], [100, float("nan")], "ppl"),
        ([1e5, -2e5], [100, 90], "tokens"),
        ([1e5, 2e5, 3e5], [100, 90], "shapes"),
    ],
)
def test_bad_points_are_named(tokens: list[float], ppl: list[float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        scaling.fit(tokens, ppl)


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
    assert "A baseline wins" in tables.against_baselines(131.0, lines)
    assert "lowest perplexity" in tables.against_baselines(120.0, lines)
    assert "not there" in tables.against_baselines(120.0, {**lines, "table": None})


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
        }
    )
    law = scaling.fit(frame.train_tokens, frame.val_ppl)
    assert "perplexity falls, 150.0 to 130.0" in tables.scaling_reading(frame, law)
    assert "the runs of 200 conversations" in tables.scaling_reading(frame, law)
    longer = tables.scaling_reading(frame.assign(phase2_epochs=11), law)
    assert "past its best epoch" in longer
    worse = frame.assign(val_ppl=frame.val_ppl[::-1].to_numpy())
    law = scaling.fit(worse.train_tokens, worse.val_ppl)
    assert "does not fall" in tables.scaling_reading(worse, law)
