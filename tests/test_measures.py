"""Each claim's measurement, against figures computed here from runs whose truth is planted."""

from __future__ import annotations

import math
import statistics
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_experiment
from synthetic import SIZES, curve, judged, ladder, losses, made, slope, student

import cvfp
from cvfp.analysis import intervals, measures, readings, scaling, stopping, tables
from cvfp.analysis.claims import Measurement
from cvfp.config import PRESETS
from cvfp.gap import AS_LEFT, Gap

SOURCE = measures.Source("03_scaling", made(), samples=500, seeds=[0, 1, 2], n_jobs=None)


def figures(one: Measurement) -> Any:
    return one.value, one.low, one.high


def test_source_says_what_ran_and_keeps_what_was_set() -> None:
    found = SOURCE.over([1.0, 2.0, 4.0], 3, "words")
    assert figures(found) == pytest.approx(student([1, 2, 4]))
    assert (found.notebook, found.words, found.seeds) == ("03_scaling", "words", 3)
    assert found.parameters == {"samples": 500, "seeds": [0, 1, 2]}
    assert found.ran_on == "chitchat, bpe (4,096), table bigram, a CPU, float32"


# Curves and points


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        ([3.0, 2.0, 2.1, 2.5, 2.6], math.exp(0.5) - 1),
        ([2.0, 2.2, 2.1], math.exp(0.1) - 1),
        # Not the first minimum: the least.
        ([2.0, 2.5, 1.9, 2.0, 2.2], math.exp(0.3) - 1),
        ([3.0, 2.0, 2.1], None),
        ([3.0, 2.5, 2.0], None),
        ([3.0], None),
    ],
)
def test_rise_is_from_the_best_epoch_to_two_later(
    epochs: list[float], expected: float | None
) -> None:
    found = stopping.rise(curve(epochs))
    assert found is None if expected is None else found == pytest.approx(expected)


def test_points_leave_out_runs_without_a_perplexity() -> None:
    runs = [made(val_ppl=9.0, train_tokens=7), made(val_ppl=None), made(val_ppl=8.0)]
    assert scaling.points(runs) == ([7.0, 200_000.0], [9.0, 8.0])


# Contexts: C2, C3


def gap_of(cosine: float) -> Gap:
    agreement = pd.DataFrame({"cosine_mean": [cosine, 0.5]}, index=[AS_LEFT, "noise"])
    return cast(Gap, SimpleNamespace(agreement=agreement, tokens=12_345))


def timed(*rows: tuple[int, float | None, float, float | None]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["tokens", "sequential", "blocks", "difference"])
    return frame.astype({"sequential": float, "difference": float})


def test_contexts_are_measured_over_seeds() -> None:
    gaps = [gap_of(cosine) for cosine in (0.99, 0.98, 0.995)]
    # The longest stream of which the loop was run too.
    times = [
        timed((1000, 1, 1, 9e-1), (20_000, 30 + seed, 2, seed * 1e-6), (10**6, None, 7, None))
        for seed in (1, 2, 3)
    ]
    found = measures.contexts(gaps, times, SOURCE)
    assert figures(found["C2"]) == pytest.approx(student([0.99, 0.98, 0.995]))
    assert "12,345 training tokens" in found["C2"].words
    assert figures(found["C3"]) == pytest.approx(student([31 / 2, 32 / 2, 33 / 2]))
    assert found["C3"].words.startswith("20,000 tokens")
    assert found["C3"].words.endswith("3e-06")
    alone = measures.contexts(gaps[:1], times[:1], SOURCE)
    assert figures(alone["C2"]) == (0.99, None, None)
    assert figures(alone["C3"]) == (15.5, None, None)


@pytest.mark.parametrize(
    "last", [(9_999, 3.0, 1.0, 0.0), (20_000, None, 1.0, None)], ids=["short", "no loop"]
)
def test_no_speed_without_a_long_loop_of_every_seed(last: tuple[Any, Any, Any, Any]) -> None:
    times = [timed((10_000, 3.0, 1.0, 0.0)), timed(last)]
    assert set(measures.contexts([gap_of(1.0)] * 2, times, SOURCE)) == {"C2"}
    assert set(measures.contexts([gap_of(1.0)], times[:1], SOURCE)) == {"C2", "C3"}


# A ladder: C6, C7, C10, C15, C19


def test_ladder_measures_its_law() -> None:
    table = losses(3)
    found = measures.ladder(ladder(table), [], SOURCE)
    assert set(found) == {"C6", "C7", "C15", "C19"}
    over = scaling.over_runs(ladder(table))
    assert found["C6"].value == pytest.approx(np.mean([slope(line) for line in table]))
    assert (found["C6"].low, found["C6"].high) == (over.low, over.high)
    errors, changes = [], []
    for line in table:
        known = np.polyfit(np.log(SIZES[:-1]), line[:-1], 1)
        errors.append(math.exp(np.polyval(known, np.log(SIZES[-1])) - line[-1]) - 1)
        changes.append(slope(line[1:], SIZES[1:]) - slope(line[:4], SIZES[:4]))
    assert figures(found["C7"]) == pytest.approx(student(errors))
    assert figures(found["C15"]) == pytest.approx(student(changes))
    assert "800 conversations, from 4 smaller sizes" in found["C7"].words
    assert all(one.seeds == 3 for one in found.values())


def test_few_sizes_say_nothing_of_windows_and_extrapolation() -> None:
    table = losses(3, sizes=4)
    assert set(measures.ladder(ladder(table, SIZES[:4]), [], SOURCE)) == {"C6", "C19"}
    assert measures.ladder(ladder(table[:, :1], SIZES[:1]), [], SOURCE) == {}


def test_one_seed_gives_no_interval() -> None:
    runs = curve([3.0, 2.0, 2.1, 2.2, 2.3], samples=500)
    found = measures.ladder(ladder(losses(1)), [runs], SOURCE)
    assert set(found) == {"C6", "C7", "C10", "C15", "C19"}
    for one in found.values():
        assert (one.low, one.high, one.seeds) == (None, None, 1)


@pytest.mark.parametrize(("ratio", "there"), [(7.9, False), (8.0, True), (10.0, True)])
def test_rank_over_sizes_takes_eight_times_the_tokens(ratio: float, there: bool) -> None:
    ranks = [(0.70, 0.71), (0.72, 0.70), (0.71, 0.74)]
    runs = [
        judged(5 - size, dict(seed=seed, samples=50 + size), val_er=pair[size], train_tokens=tokens)
        for size, tokens in ((1, int(10_000 * ratio)), (0, 10_000))
        for seed, pair in enumerate(ranks)
    ]
    found = measures.ladder(runs, [], SOURCE)
    assert ("C19" in found) == there
    if there:
        assert figures(found["C19"]) == pytest.approx(student([1.0, -2.0, 3.0]))


@pytest.mark.parametrize(("samples", "there"), [(499, False), (500, True)])
def test_patience_is_judged_from_500_conversations_on(samples: int, there: bool) -> None:
    # Patience 1 keeps epoch 2, patience 3 epoch 4 (or the same, of the second).
    curves = ([3.0, 2.0, 2.1, 1.9, 2.2], [3.0, 2.5, 2.6, 2.7, 2.8], [3.0, 2.0, 2.1, 1.8, 1.9])
    runs = [curve(line, samples=samples, seed=seed) for seed, line in enumerate(curves)]
    found = measures.ladder(ladder(losses(2, 4), SIZES[:4]), runs, SOURCE)
    assert ("C10" in found) == there
    if there:
        expected = student([math.exp(-0.1) - 1, 0.0, math.exp(-0.2) - 1])
        assert figures(found["C10"]) == pytest.approx(expected)
        assert found["C10"].seeds == 3


def test_a_ladder_on_tails_is_measured_without_interval() -> None:
    """Trained with the preset `published`'s fields, but for corpus, tokeniser, table and sizes."""
    published = {**PRESETS["published"], "embedding": "random"}
    names = ("validation", "embedding", "weight_tying", "phase2_patience", "phase2_shuffle")
    fields = {name: published[name] for name in names}
    assert fields["validation"] == "tail"
    runs = cvfp.sweep(tiny_experiment(**fields, phase2_epochs=1), samples=[2, 6], seed=[0, 1])
    law = scaling.over_runs(runs)
    assert law.value == pytest.approx(np.mean(law.by_seed))
    for seed, alpha in enumerate(law.by_seed):
        of_seed = [run for run in runs if run.experiment.seed == seed]
        assert alpha == pytest.approx(scaling.fit(*scaling.points(of_seed)).alpha)
    assert (law.low, law.high, law.seeds) == (None, None, 2)
    found = measures.ladder(runs, [], SOURCE)["C6"]
    assert figures(found) == (law.value, None, None)
    assert tables.alpha(law)["95 % interval"]["measured"] == "–"
    # No run has the baseline of a fitted table.
    frame = runs.frame()
    assert frame.table_ppl.isna().all()
    assert len(tables.runs(frame)) == 2
    text = readings.ladder(frame, scaling.fit(frame.train_tokens, frame.val_ppl))
    assert "with no training token: not there with this tokeniser and table" in text


# Designs and shapes: C1, C4, C8, C9


def test_designs_are_compared_at_the_largest_size() -> None:
    every, decrease = losses(3), losses(3, start=1) + 0.1
    ours, theirs = ladder(every), ladder(decrease, token_input_all_layers=False)
    found = measures.designs(ours, theirs, SOURCE)
    ratio = math.exp((every[:, -1] - decrease[:, -1]).mean())
    assert found["C1"].value == pytest.approx(ratio)
    # The largest size comes first.
    pair = intervals.paired(ours[:3], theirs[:3])
    assert pair.low is not None
    assert pair.high is not None
    assert (found["C1"].low, found["C1"].high) == pytest.approx((1 + pair.low, 1 + pair.high))
    assert "800 conversations" in found["C1"].words
    assert found["C4"].value == pytest.approx(np.mean([slope(line) for line in decrease]))
    over = scaling.over_runs(theirs)
    assert (found["C4"].low, found["C4"].high) == (over.low, over.high)


def test_designs_at_one_size_have_no_law_and_one_seed_no_interval() -> None:
    ours, theirs = ladder([[4.0]], (500,)), ladder([[4.3]], (500,))
    found = measures.designs(ours, theirs, SOURCE)
    assert set(found) == {"C1"}
    assert figures(found["C1"]) == (pytest.approx(math.exp(-0.3)), None, None)


def test_shapes_differ_in_slope_seed_by_seed() -> None:
    deep, wide = losses(3), losses(3, start=1)
    # Of either shape, in another order of seeds.
    found = measures.shapes(ladder(deep), ladder(wide)[::-1], [], SOURCE)
    differences = [slope(w) - slope(d) for d, w in zip(deep, wide, strict=True)]
    assert set(found) == {"C8"}
    assert figures(found["C8"]) == pytest.approx(student(differences))
    assert measures.shapes(ladder([[4.0]], (50,)), ladder([[5.0]], (50,)), [], SOURCE) == {}


def test_overfitting_is_measured_where_every_run_passed_its_best_epoch() -> None:
    deep, wide = ladder([[4.0]], (50,)), ladder([[5.0]], (50,))
    rises = {0: (0.1, 0.3), 1: (0.2, 0.6), 2: (0.3, 0.2)}  # of two shapes
    runs = [
        curve([3.0, 2.0, 2.05, 2.0 + rise], seed=seed, context_dim=64 + place)
        for seed, both in rises.items()
        for place, rise in enumerate(both)
    ]
    found = measures.shapes(deep, wide, runs, SOURCE)
    means = [statistics.fmean(math.expm1(rise) for rise in both) for both in rises.values()]
    assert figures(found["C9"]) == pytest.approx(student(means))
    assert found["C9"].seeds == 3
    still = curve([3.0, 2.5, 2.0, 2.1], seed=1, context_dim=64)
    assert measures.shapes(deep, wide, [*runs[:2], still, *runs[3:]], SOURCE) == {}
