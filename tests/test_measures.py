"""Each claim's measurement, against figures computed here from runs whose truth is planted."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_experiment
from scipy import stats
from synthetic import (
    LENGTHS,
    SIZES,
    claims_of,
    curve,
    figures,
    judged,
    ladder,
    losses,
    made,
    parts,
    slope,
    student,
)

import cvfp
from cvfp import Result
from cvfp.analysis import intervals, measures, prediction, readings, scaling, stopping, tables
from cvfp.analysis.claims import CLAIMS
from cvfp.config import PRESETS
from cvfp.gap import AS_LEFT, Gap

SOURCE = measures.Source("03_scaling", made(), samples=500, seeds=[0, 1, 2], n_jobs=None)


def test_source_says_what_ran_and_keeps_what_was_set() -> None:
    found = SOURCE.over("C19.change", [1.0, 2.0, 4.0], 3, "words")
    assert figures(found) == pytest.approx(student([1, 2, 4]))
    assert (found.key, found.n) == (("C19", "change", "mini"), 3)
    assert (found.by, found.words) == ("03_scaling", "words")
    assert found.parameters == {"preset": "mini", "samples": 500, "seeds": [0, 1, 2]}
    assert found.ran_on == "chitchat, bpe (4,096), table bigram, a CPU, float32"


@pytest.mark.parametrize(
    ("preset", "fields", "expected"),
    [
        ("mini", {}, "mini"),
        ("mini", {"num_layers": 6, "context_dim": 96}, "mini"),
        ("mini", {"dataset": "talks.jsonl"}, "other"),
        ("mini", {"vocab_size": 1000}, "other"),
        ("mini", {"embedding": "random"}, "other"),
        ("published", {}, "other"),  # of mini's fields, that is: not UltraChat
        ("published", {"dataset": "HuggingFaceH4/ultrachat_200k"}, "ultrachat"),
        ("mini", {"dataset": "data/UltraChat.jsonl"}, "ultrachat"),
        ("no_such", {}, "other"),
    ],
)
def test_setting(preset: str, fields: dict[str, Any], expected: str) -> None:
    one = made({"num_layers": 3, "context_dim": 128, **fields})
    assert measures.Source("03_scaling", one, preset=preset).setting == expected


def test_setting_of_the_preset_of_published_size(monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"embedding": "ppmi", "embedding_dim": 768, "num_layers": 6}
    monkeypatch.setitem(PRESETS, "published_size", large)
    found = [
        measures.Source("03_scaling", made(fields), preset="published_size").setting
        for fields in (large, {**large, "samples": 1000}, {**large, "embedding": "bigram"})
    ]
    assert found == ["published_size", "published_size", "other"]


def test_p_is_of_the_nearest_end_of_the_region() -> None:
    values = [1.0, 1.5, 2.5, 0.5]
    spread = stats.sem(values)
    one = SOURCE.over("C19.change", values, 4, "")  # between -2 and 2
    assert one.p == pytest.approx(2 * stats.t.sf((2 - np.mean(values)) / spread, 3))
    other = SOURCE.over("C19.change", [-x for x in values], 4, "")
    assert other.p == pytest.approx(one.p)
    assert SOURCE.over("C19.change", [1.0], 1, "").p is None
    assert SOURCE.over("C19.change", [1.0, 1.0], 2, "").p == 0
    assert SOURCE.over("C9.rise", values, 4, "").p == pytest.approx(
        stats.ttest_1samp(values, 0.2).pvalue
    )
    # A relative change is judged in logarithms, a correlation in Fisher's z.
    ends = math.expm1(-0.3), math.expm1(-0.5), math.expm1(-0.1)
    change = SOURCE.measured("C10.ppl", 3, "", (*ends, 7))
    error = 0.2 / stats.t.ppf(0.975, 7)
    assert change.p == pytest.approx(2 * stats.t.sf((0.3 + math.log(0.99)) / error, 7))
    x, y = np.random.default_rng(0).normal(size=(2, 12))
    both = prediction.correlation(x, y)
    found = SOURCE.measured("C12.r", 3, "", (both.r, both.low, both.high, math.inf))
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(math.atanh(both.r)) * math.sqrt(9)))


@pytest.mark.parametrize("seed", range(5))
def test_p_and_verdict_agree(seed: int) -> None:
    """p is under 0.05 exactly where the interval does not hold the region's end."""
    values = np.random.default_rng(seed).normal(0.6, 1, 5).tolist()
    one = SOURCE.over("C11.er", values, 5, "")
    assert one.p is not None
    assert (one.p < 0.05) == (one.direction != "inconclusive")


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
    columns = ["cosine_mean", "cosine_min", "mse", "relative_error_mean", "relative_error_p95"]
    figures = [cosine, cosine - 0.1, 2 - 2 * cosine, 3 - 3 * cosine, 0.0]
    agreement = pd.DataFrame([figures, [0.5] * 5], [AS_LEFT, "noise"], columns)
    places = [[cosine - x, *[0.0] * 4] for x in (0.01, 0.02, 0.03)]
    positions = pd.DataFrame(places, ["first", "middle", "last"], columns)
    return cast(Gap, SimpleNamespace(agreement=agreement, positions=positions, tokens=12_345))


def timed(*rows: tuple[int, float | None, float, float | None]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["tokens", "sequential", "blocks", "difference"])
    frame = frame.assign(shifted=frame.blocks / 4)
    return frame.astype({"sequential": float, "difference": float})


def test_contexts_are_measured_over_seeds() -> None:
    gaps = [gap_of(cosine) for cosine in (0.99, 0.98, 0.995)]
    # The longest stream of which the loop was run too.
    times = [
        timed((1000, 1, 1, 9e-1), (20_000, 30 + seed, 2, seed * 1e-6), (10**6, None, 7, None))
        for seed in (1, 2, 3)
    ]
    found = parts(measures.contexts(gaps, times, SOURCE))
    cosines = np.array([0.99, 0.98, 0.995])
    for name, values in {
        "cosine_mean": cosines,
        "cosine_min": cosines - 0.1,
        "mse": 2 - 2 * cosines,
        "relative_error_mean": 3 - 3 * cosines,
        "first": cosines - 0.01,
        "middle": cosines - 0.02,
        "last": cosines - 0.03,
    }.items():
        assert figures(found.pop(f"C2.{name}")) == pytest.approx(student(values.tolist()))
    assert set(found) == {"C3.shifted", "C3.blocks"}
    assert figures(found["C3.blocks"]) == pytest.approx(student([31 / 2, 32 / 2, 33 / 2]))
    assert figures(found["C3.shifted"]) == pytest.approx(student([62, 64, 66]))
    assert found["C3.blocks"].words == "20,000 tokens, blocks right to 3e-06 (relative)"
    alone = parts(measures.contexts(gaps[:1], times[:1], SOURCE))
    assert alone["C2.mse"].words == "12,345 training tokens"
    assert figures(alone["C2.cosine_mean"]) == (0.99, None, None)
    assert figures(alone["C3.blocks"]) == (15.5, None, None)


@pytest.mark.parametrize(
    "last", [(9_999, 3.0, 1.0, 0.0), (20_000, None, 1.0, None)], ids=["short", "no loop"]
)
def test_no_speed_without_a_long_loop_of_every_seed(last: tuple[Any, Any, Any, Any]) -> None:
    times = [timed((10_000, 3.0, 1.0, 0.0)), timed(last)]
    assert claims_of(measures.contexts([gap_of(1.0)] * 2, times, SOURCE)) == {"C2"}
    assert claims_of(measures.contexts([gap_of(1.0)], times[:1], SOURCE)) == {"C2", "C3"}


def test_what_is_fast_and_wrong_does_not_count() -> None:
    wrong = [timed((10_000, 3.0, 1.0, 2e-4))]
    assert claims_of(measures.contexts([gap_of(0.99)], wrong, SOURCE)) == {"C2"}


# A ladder: C6, C7, C10, C15, C19


def log_ppl(one: Result) -> float:
    return math.log(one.val_ppl or 0)


def summed(runs: list[Result], weights: Any, value: Any = log_ppl) -> list[float]:
    """Of each seed, values weighted over the sizes by what `weights` makes of them."""
    sums = []
    for seed in sorted({one.experiment.seed for one in runs}):
        ordered = sorted(
            (one for one in runs if one.experiment.seed == seed), key=lambda one: one.train_tokens
        )
        logs = [math.log(one.train_tokens) for one in ordered]
        sums.append(weights(logs, [value(one) for one in ordered]))
    return sums


def interval(runs: list[Result], weights: Any) -> tuple[float, float | None, float | None]:
    """Mean over seeds and held-out conversations: each conversation is put in the place of all."""

    def nats(place: int) -> Any:
        return lambda one: one.val_conversations[place]["nats"]

    columns = [summed(runs, weights, nats(place)) for place in range(len(LENGTHS))]
    mean = intervals.crossed(np.array(columns).T, LENGTHS)
    return mean.value, mean.low, mean.high


def alpha(x: list[float], y: list[float]) -> float:
    return float(np.polyfit(x, y, 1)[0])


def forecast(x: list[float], y: list[float]) -> float:
    return float(np.polyval(np.polyfit(x[:-1], y[:-1], 1), x[-1]) - y[-1])


def test_ladder_measures_its_law() -> None:
    table = losses(3)
    runs = ladder(table)
    found = parts(measures.ladder(runs, [], [], SOURCE))
    names = {"C6.alpha", "C6.per_doubling", "C6.form", "C7.error", "C7.no_change"}
    assert set(found) == {*names, "C15.change", "C19.change"}
    assert figures(found["C6.alpha"]) == pytest.approx(interval(runs, alpha))
    assert found["C6.alpha"].estimate == pytest.approx(np.mean([slope(line) for line in table]))
    ends = [2**end - 1 for end in figures(found["C6.alpha"])]
    assert figures(found["C6.per_doubling"]) == pytest.approx(ends)
    error = figures(found["C7.error"])
    assert error == pytest.approx([math.expm1(x or 0) for x in interval(runs, forecast)])
    windows = interval(runs, lambda x, y: alpha(x[-4:], y[-4:]) - alpha(x[:4], y[:4]))
    assert figures(found["C15.change"]) == pytest.approx(windows)
    assert "800 conversations, from 4 smaller sizes" in found["C7.error"].words
    assert all(one.n == 3 for one in found.values())


@pytest.mark.parametrize("last", [-0.4, 0.3], ids=["under the law", "over it"])
def test_forecast_against_no_change(last: float) -> None:
    """Distances, whichever side the law's forecast errs on."""
    table = losses(4)
    table[:, -1] += last
    runs = ladder(table)
    found = parts(measures.ladder(runs, [], [], SOURCE))["C7.no_change"]
    off = np.mean(summed(runs, forecast))
    same = np.mean([line[-2] - line[-1] for line in table])
    assert found.estimate == pytest.approx(abs(off) - abs(same))
    assert f'"no change" is {math.expm1(same):+.1%} off' in found.words
    # Where the law errs by much, it is worse than to say that nothing changes.
    bent = losses(4)
    bent[:, -1] = bent[:, -2]
    assert (
        parts(measures.ladder(ladder(bent), [], [], SOURCE))["C7.no_change"].direction
        == "contradicts"
    )


def test_lack_of_fit_rejects_a_bent_curve() -> None:
    line = 8 - 0.3 * np.log(1000.0 * np.array(SIZES))
    noise = np.random.default_rng(0).normal(0, 0.01, (5, len(SIZES)))
    straight, bent = line + noise, line + noise + 0.1 * np.linspace(-1, 1, len(SIZES)) ** 2
    found = [parts(measures.ladder(ladder(x), [], [], SOURCE))["C6.form"] for x in (straight, bent)]
    assert [one.direction for one in found] == ["inconclusive", "contradicts"]
    # By analysis of variance: sizes' means about the line, runs about the means.
    x = np.log(1000.0 * np.array(SIZES))
    means = bent.mean(axis=0)
    rest = means - np.polyval(np.polyfit(x, means, 1), x)
    pure = ((bent - means) ** 2).sum() / 20
    f = 5 * (rest**2).sum() / 3 / pure
    assert found[1].estimate == pytest.approx(f)
    assert found[1].low == pytest.approx(f / stats.f.ppf(0.975, 3, 20))
    assert found[1].high == pytest.approx(f / stats.f.ppf(0.025, 3, 20))
    assert found[1].p == pytest.approx(2 * stats.f.sf(f, 3, 20))
    assert found[1].words == "F(3, 20), 5 sizes, 50 to 800"


def test_lack_of_fit_needs_three_sizes_and_two_seeds() -> None:
    assert scaling.lack_of_fit([1, 1, 2, 2], [4, 5, 3, 3.5]) is None
    assert scaling.lack_of_fit([1, 2, 3], [4, 5, 3]) is None
    assert scaling.lack_of_fit([1, 2, 3, 3], [4, 5, 3, 3]) is None
    found = scaling.lack_of_fit([1, 2, 3, 3], [4, 5, 3, 3.5])
    assert found is not None
    assert found[1:] == (1, 1)


def test_few_sizes_say_nothing_of_windows_and_extrapolation() -> None:
    table = losses(3, sizes=4)
    assert claims_of(measures.ladder(ladder(table, SIZES[:4]), [], [], SOURCE)) == {"C6", "C19"}
    assert measures.ladder(ladder(table[:, :1], SIZES[:1]), [], [], SOURCE) == []


def patient(size: int, seeds: int = 3) -> tuple[list[Result], list[Result]]:
    """Runs with patience 3 and 1."""
    gains = np.array([0.05, 0.02, 0.04])[:seeds, None]
    both = [
        ladder(4 - sign * gains, (size,), phase2_patience=patience)
        for patience, sign in ((3, 1), (1, 0))
    ]
    for number, one in enumerate([*both[0], *both[1]]):
        one.val_acc = 0.2 + number / 100
    return both[0], both[1]


def test_one_seed_gives_no_interval() -> None:
    found = measures.ladder(ladder(losses(1)), *patient(500, 1), SOURCE)
    assert claims_of(found) == {"C6", "C7", "C10", "C15", "C19"}
    assert "C6.form" not in parts(found)
    for one in found:
        assert (one.low, one.high, one.p, one.n) == (None, None, None, 1)


@pytest.mark.parametrize(("ratio", "there"), [(7.9, False), (8.0, True), (10.0, True)])
def test_rank_over_sizes_takes_eight_times_the_tokens(ratio: float, there: bool) -> None:
    ranks = [(0.70, 0.71), (0.72, 0.70), (0.71, 0.74)]
    runs = [
        judged(5 - size, dict(seed=seed, samples=50 + size), val_er=pair[size], train_tokens=tokens)
        for size, tokens in ((1, int(10_000 * ratio)), (0, 10_000))
        for seed, pair in enumerate(ranks)
    ]
    found = parts(measures.ladder(runs, [], [], SOURCE))
    assert ("C19.change" in found) == there
    if there:
        assert figures(found["C19.change"]) == pytest.approx(student([1.0, -2.0, 3.0]))


@pytest.mark.parametrize(("samples", "there"), [(499, False), (500, True)])
def test_patience_is_judged_from_500_conversations_on(samples: int, there: bool) -> None:
    long, short = patient(samples)
    runs = ladder(losses(2, 4), SIZES[:4])
    # In whatever order.
    found = parts(measures.ladder(runs, long, short[::-1], SOURCE))
    assert ("C10.ppl" in found) == ("C10.accuracy" in found) == there
    if there:
        pair = intervals.paired(long, short)
        assert figures(found["C10.ppl"]) == (pair.change, pair.low, pair.high)
        assert pair.change == pytest.approx(math.expm1(-np.mean([0.05, 0.02, 0.04])))
        assert found["C10.accuracy"].estimate == pytest.approx(-3)
        assert found["C10.ppl"].n == 3


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
    found = parts(measures.ladder(runs, [], [], SOURCE))["C6.alpha"]
    assert figures(found) == (law.value, None, None)
    assert tables.alpha(law)["95 % interval"]["measured"] == "–"
    # No run has the baseline of a fitted table.
    frame = runs.frame()
    assert frame.table_ppl.isna().all()
    assert list(tables.runs(frame)) == [2, 6]
    text = readings.ladder(frame, scaling.fit(frame.train_tokens, frame.val_ppl))
    assert "(no training tokens): not there with this tokeniser and table" in text


# Designs and shapes: C1, C4, C8, C9


def accurate(runs: list[Result], value: float, rank: float) -> list[Result]:
    for one in runs:
        one.val_acc, one.val_er = value + one.experiment.seed / 100, rank
    return runs


def test_designs_are_compared_at_the_largest_size() -> None:
    every, decrease = losses(3), losses(3, start=1) + 0.1
    ours = accurate(ladder(every), 0.2, 0.75)
    theirs = accurate(ladder(decrease, token_input_all_layers=False), 0.1, 0.25)
    found = parts(measures.designs(ours, theirs, SOURCE))
    laws = {"C4.alpha", "C4.per_doubling", "C4.form"}
    assert set(found) == {"C1.ppl", "C1.accuracy", "C1.er", *laws}
    change = math.expm1((every[:, -1] - decrease[:, -1]).mean())
    assert found["C1.ppl"].estimate == pytest.approx(change)
    # The largest size comes first.
    pair = intervals.paired(ours[:3], theirs[:3])
    assert figures(found["C1.ppl"]) == (pair.change, pair.low, pair.high)
    # The other sizes stand in the words.
    small = math.expm1((every[:, 0] - decrease[:, 0]).mean())
    assert found["C1.ppl"].words.startswith(f"800 conversations, {small:+.1%} at 50, ")
    ratios = [0.2 / 0.1 - 1, 0.21 / 0.11 - 1, 0.22 / 0.12 - 1]
    assert figures(found["C1.accuracy"]) == pytest.approx(student(ratios))
    assert figures(found["C1.er"]) == pytest.approx((2, 2, 2))
    assert figures(found["C4.alpha"]) == pytest.approx(interval(theirs, alpha))


def test_designs_at_one_size_have_no_law_and_one_seed_no_interval() -> None:
    ours, theirs = accurate(ladder([[4.0]], (500,)), 0.2, 0.7), ladder([[4.3]], (500,))
    found = measures.designs(ours, accurate(theirs, 0.1, 0.7), SOURCE)
    assert claims_of(found) == {"C1"}
    assert figures(parts(found)["C1.ppl"]) == (pytest.approx(math.expm1(-0.3)), None, None)


def test_shapes_differ_in_slope_seed_by_seed() -> None:
    deep, wide = ladder(losses(3)), ladder(losses(3, start=1))
    # Of either shape, in another order of seeds.
    found = parts(measures.shapes(deep, wide[::-1], [], SOURCE))
    assert set(found) == {f"C8.{part}" for part in CLAIMS["C8"].parts}
    # By hand: a run's conversations less those of the other shape.
    pairs = {(one.experiment.samples, one.experiment.seed): one for one in deep}
    less = [
        replace(
            one,
            val_conversations=[
                {"tokens": a["tokens"], "nats": a["nats"] - b["nats"]}
                for a, b in zip(one.val_conversations, other.val_conversations, strict=True)
            ],
        )
        for one in wide
        if (other := pairs[one.experiment.samples, one.experiment.seed])
    ]
    assert figures(found["C8.difference"]) == pytest.approx(interval(less, alpha))
    for name, runs in (("deep", deep), ("wide", wide)):
        assert figures(found[f"C8.alpha_{name}"]) == pytest.approx(interval(runs, alpha))
        lack = scaling.lack_of_fit(*scaling.points(runs))
        assert lack is not None
        assert found[f"C8.form_{name}"].estimate == pytest.approx(lack[0])
    laws = [scaling.fit(*scaling.points(runs)) for runs in (deep, wide)]
    at = scaling.crossover(*laws)
    assert figures(found["C8.crossover"]) == (pytest.approx(at.tokens), at.low, at.high)
    assert measures.shapes(ladder([[4.0]], (50,)), ladder([[5.0]], (50,)), [], SOURCE) == []


def test_overfitting_is_measured_where_every_run_passed_its_best_epoch() -> None:
    deep, wide = ladder([[4.0]], (50,)), ladder([[5.0]], (50,))
    rises = {0: (0.1, 0.3), 1: (0.2, 0.6), 2: (0.3, 0.2)}  # of two shapes
    runs = [
        curve([3.0, 2.0, 2.05, 2.0 + rise], seed=seed, context_dim=64 + place)
        for seed, both in rises.items()
        for place, rise in enumerate(both)
    ]
    (found,) = measures.shapes(deep, wide, runs, SOURCE)
    means = [statistics.fmean(math.expm1(rise) for rise in both) for both in rises.values()]
    assert figures(found) == pytest.approx(student(means))
    assert (found.key, found.n) == (("C9", "rise", "mini"), 3)
    still = curve([3.0, 2.5, 2.0, 2.1], seed=1, context_dim=64)
    assert measures.shapes(deep, wide, [*runs[:2], still, *runs[3:]], SOURCE) == []
