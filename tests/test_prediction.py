"""Correlations, formulas and rules that foretell perplexity from Phase 1."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cvfp import Experiment, Result, Results, phase1
from cvfp.analysis import prediction, published

HISTORY = dict(loss=0.5, converged=0.5)
ER_RULE, STALLS, NO_FALL = prediction.ABORTS


def history(length: int = 25, **at_20: float) -> list[dict[str, float]]:
    """A Phase 1 that gets on: loss falls, tokens converge; `at_20` changes row 20."""
    rows = [
        {"iteration": float(i), "loss": 1 - i / 100, "converged": i / 100}
        for i in range(2, length + 1)
    ]
    for row in rows:
        if row["iteration"] == 20:
            row |= {"val_er": 0.8, **at_20}
    return rows


@functools.cache
def experiment(**given: Any) -> Experiment:
    return Experiment(**{"num_layers": 1, "context_dim": 64, **given})


def made(given: dict[str, Any] | None = None, **measured: Any) -> Result:
    """A Result with nothing in it but what is given, and what cannot do without."""
    blank: dict[str, Any] = {f.name: None for f in fields(Result) if f.init}
    usual = dict(
        experiment=experiment(**(given or {})),
        train_tokens=50_000,
        val_ppl=100.0,
        val_acc=0.2,
        train_er=0.78,
        val_er=0.77,
        phase1_iterations=25,
        converged=0.99,
        baselines={},
        phase1_history=[],
        phase2_history=[],
        seconds={},
    )
    return Result(**{**blank, **usual, **measured})


def runs(
    generator: np.random.Generator,
    configurations: int,
    *,
    beta: float = 0.0,
    own: float = 0.0,
    noise: float = 0.0,
    sizes: Sequence[int] = (50_000, 100_000, 200_000),
    seeds: int = 2,
    ranks: Sequence[float] | None = None,
) -> Results:
    """log PPL = 10 − 0.4·log tokens + beta·ER + each configuration's own strength + noise."""
    ranks = generator.normal(77, 4, configurations) if ranks is None else ranks
    results = Results()
    for number, rank in enumerate(ranks):
        strength = own * generator.normal()
        for size, seed in itertools.product(sizes, range(seeds)):
            er = min(rank + 0.1 * seed, 99)
            log_ppl = 10 - 0.4 * np.log(size) + beta * er + strength + noise * generator.normal()
            results.append(
                made(
                    dict(context_dim=64 + number, seed=seed),
                    train_tokens=size,
                    val_ppl=float(np.exp(log_ppl)),
                    val_er=er / 100,
                    train_er=er / 100,
                    phase1_iterations=20 + number,
                )
            )
    return results


def note_004() -> pd.DataFrame:
    """The eight published configurations as a frame of runs, at their largest sizes."""
    table = published.table("004_summary").merge(
        published.table("004_configs").drop(columns="alpha"), on="config", validate="1:1"
    )
    tokens = published.table("004_window_sizes").set_index("samples").tokens
    most = {500: 1.25 * tokens[400], 800: tokens[800]}
    return table.assign(
        train_tokens=table.samples_high.map(most),
        val_er=table.best_val_er / 100,
        train_er=table.train_er_high / 100,
        val_ppl=table.best_val_ppl,
        phase1_iterations=table.iterations_high,
        dist_reg_weight=np.where(table.version == "v1", 0.8, 0.9),
        token_input_all_layers=True,
    )


# Correlations


def test_note_004_has_no_correlation_of_alpha_and_rank() -> None:
    table = published.table("004_alpha_er")
    found = prediction.correlation(table.alpha, table.val_er)
    assert (round(found.r, 2), round(found.p, 2), found.n) == (0.01, 0.98, 8)
    assert found.low is not None
    assert found.high is not None
    assert found.low < -0.6
    assert found.high > 0.6


def test_note_004_rank_hardly_foretells_perplexity() -> None:
    table = note_004()
    found = prediction.correlation(table.val_er, table.val_ppl)
    assert (round(found.r, 2), round(found.p, 2)) == (-0.38, 0.35)


def test_correlation_is_scipy_s() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 9))
    found, expected = prediction.correlation(x, y, level=0.9), stats.pearsonr(x, y)
    interval = expected.confidence_interval(0.9)
    assert (found.r, found.p) == pytest.approx((expected.statistic, expected.pvalue))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize(("n", "there"), [(2, False), (3, False), (4, True)])
def test_few_points_have_no_interval(n: int, there: bool) -> None:
    found = prediction.correlation([1.0, 2.0, 4.0, 3.0][:n], [1.0, 3.0, 4.0, 5.0][:n])
    assert (found.low is not None) == (found.high is not None) == there
    assert found.p == (1 if n == 2 else pytest.approx(found.p))


def test_points_on_a_line() -> None:
    found = prediction.correlation([1, 2, 3, 4, 5], [2, 4, 6, 8, 10])
    assert (found.r, found.low, found.high) == pytest.approx((1, 1, 1))
    assert found.p < 1e-6


@pytest.mark.parametrize(("columns", "n"), [(0, 8), (0, 20), (2, 10)])
def test_fisher_interval_covers_as_often_as_it_says(columns: int, n: int) -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(600):
        x, other = generator.normal(size=(2, n))
        y = 0.6 * x + 0.8 * other
        given = generator.normal(size=(n, columns))
        both = given.sum(axis=1)
        found = prediction.partial_correlation(x + 3 * both, y - 5 * both, given)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.6 <= found.high
    low, high = stats.binom.ppf([0.001, 0.999], 600, 0.95)
    assert low <= hits <= high


def test_partial_correlation_has_the_p_of_the_regression() -> None:
    generator = np.random.default_rng(2)
    given = generator.normal(size=(12, 2))
    x = generator.normal(size=12) + given[:, 0]
    y = 0.5 * x + given @ [1, -2] + generator.normal(size=12)
    found = prediction.partial_correlation(x, y, given)
    # The t of x's coefficient with `given` beside it.
    design = np.column_stack([np.ones(12), given, x])
    solved, squares, *_ = np.linalg.lstsq(design, y)
    error = np.sqrt(squares[0] / 8 * np.linalg.inv(design.T @ design)[3, 3])
    t = solved[3] / error
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), 8))
    assert found.r == pytest.approx(t / np.sqrt(t**2 + 8))
    assert found.n == 12
    twice = prediction.partial_correlation(x, y, np.column_stack([given, given[:, 0] + 1]))
    assert twice.p == pytest.approx(found.p), "a column that says nothing new costs nothing"


def test_partial_correlation_sees_through_a_common_cause() -> None:
    generator = np.random.default_rng(3)
    cause, one, other = generator.normal(size=(3, 200))
    x, y = 5 * cause + one, 5 * cause + other
    assert prediction.correlation(x, y).r > 0.9
    assert abs(prediction.partial_correlation(x, y, cause).r) < 0.2


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: prediction.correlation([1], [2]), "x, y"),
        (lambda: prediction.correlation([1, 2, 3], [2, 3]), "x, y"),
        (lambda: prediction.correlation([1, 1, 1], [2, 3, 4]), "x"),
        (lambda: prediction.correlation([1, 2, 3], [2, 2, 2]), "y"),
        (lambda: prediction.correlation([1, 2, np.nan], [2, 3, 4]), "x"),
        (lambda: prediction.correlation([1, 2, 3], [2, 3, np.inf]), "y"),
        (lambda: prediction.correlation([1, 2, 3], [2, 3, 5], level=95), "level"),
        (lambda: prediction.partial_correlation([1, 2, 4], [2, 3, 9], [1, 2]), "given"),
        (lambda: prediction.partial_correlation([1, 2, 4], [2, 3, 9], [1, 2, np.nan]), "given"),
        (lambda: prediction.partial_correlation([1, 2], [2, 3], [1, 3]), "x, y"),
        (lambda: prediction.partial_correlation([1, 2, 3], [2, 3, 9], [2, 4, 6]), "x"),
    ],
)
def test_lists_that_do_not_correlate_are_named(call: Callable[[], Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .*accepted: "):
        call()


# The runs as tables


def test_matrix() -> None:
    results = runs(np.random.default_rng(0), 5, beta=-0.02, noise=0.02)
    results.append(made(val_ppl=None, aborted="loss 1 -> 2"))
    frame = results.frame()
    found = prediction.matrix(frame)
    assert found.attrs["dropped"] == 1
    kept = frame[frame.val_ppl.notna()]
    expected = np.corrcoef(np.log(kept.val_ppl), np.log(kept.train_tokens))[0, 1]
    assert found.loc["log PPL", "log tokens"] == pytest.approx(expected)
    assert list(found.columns) == list(found.index)
    constant = {"converged", "accuracy", "layers L", "input tokens n", "diversity weight w"}
    assert not constant & set(found.columns)
    assert not found.isna().any().any()
    few = prediction.matrix(frame, ["log_ppl", "val_er"])
    assert list(few.columns) == ["log PPL", "val ER"]
    gap = frame.assign(train_er=frame.val_er + frame.seed / 100)
    assert prediction.matrix(gap, ["er_gap", "seed"]).iloc[0, 1] == pytest.approx(1)


def test_by_configuration() -> None:
    results = runs(np.random.default_rng(0), 2, ranks=[80, 70], seeds=2)
    results += [
        made(dict(token_input_all_layers=False, dist_reg_weight=0.9), val_ppl=p) for p in (90, 80)
    ]
    results.append(made(val_ppl=None, aborted="loss 1 -> 2"))
    table = prediction.by_configuration(results.frame())
    assert table.attrs["dropped"] == 1
    assert list(table.index) == [
        "1 x 64, n 1, w 0.8",
        "1 x 64, n 1, w 0.9, equal-decrease",
        "1 x 65, n 1, w 0.8",
    ]
    assert list(table.columns[:5]) == list(prediction.CONFIGURATION)
    first, single, last = table.itertuples()
    assert (first.sizes, first.runs, single.sizes, single.runs) == (3, 6, 1, 2)
    assert (first.alpha, last.alpha) == pytest.approx((-0.4, -0.4))
    assert first.alpha_error == pytest.approx(0, abs=1e-6)
    assert np.isnan(single.alpha)
    assert np.isnan(single.alpha_error)
    assert first.val_er == pytest.approx(0.8005)
    assert first.val_ppl == pytest.approx(np.exp(10) * 200_000**-0.4)
    assert (single.val_ppl, single.best_ppl) == (85, 80)
    assert last.phase1_iterations == 21


@pytest.mark.parametrize("ask", [prediction.by_configuration, prediction.predictors])
def test_figures_out_of_range_are_named(ask: Callable[[pd.DataFrame], Any]) -> None:
    frame = runs(np.random.default_rng(0), 4).frame()
    for column, value in (("val_er", 77.0), ("train_er", 0.0), ("val_ppl", -1.0)):
        with pytest.raises(ValueError, match=f"^{column}: got .*accepted: "):
            ask(frame.assign(**{column: value}))
    with pytest.raises(ValueError, match=r"^frame: got .*val_er.*accepted: Results.frame"):
        ask(frame.drop(columns="val_er"))
    with pytest.raises(ValueError, match=r"^frame: got .*no run with a perplexity"):
        ask(frame.assign(val_ppl=None))


def test_matrix_names_what_it_cannot_correlate() -> None:
    frame = runs(np.random.default_rng(0), 2).frame()
    with pytest.raises(ValueError, match=r"^columns: got \['no'\]"):
        prediction.matrix(frame, ["log_ppl", "no"])
    with pytest.raises(ValueError, match=r"^frame: got '2 runs"):
        prediction.matrix(frame[:2])


# Formulas


def test_the_published_rule_on_the_published_runs() -> None:
    table = prediction.predictors(note_004())
    rule = table.loc[prediction.RULE]
    assert rule.fitted == 0
    assert np.isnan(rule.alpha)
    assert rule.left_out_worst == pytest.approx(0.20, abs=0.01)
    summary = published.table("004_summary")
    errors = (500 - 4 * summary.best_val_er) / summary.best_val_ppl - 1
    assert rule.error == pytest.approx(errors.abs().mean())
    assert rule.left_out_error == rule.error
    # The others' mean is the better predictor.
    assert table.left_out_error[prediction.MEAN] < rule.left_out_error
    assert rule.r2 < 0


def test_planted_coefficients_are_recovered() -> None:
    frame = runs(np.random.default_rng(0), 6, beta=-0.02).frame()
    table = prediction.predictors(frame)
    found = table.loc[prediction.TOKENS_AND_ER]
    assert found[["alpha", "beta", "gamma"]].tolist() == pytest.approx([-0.4, -0.02, 10])
    assert found[["error", "left_out_error", "left_out_worst"]].tolist() == pytest.approx([0] * 3)
    assert found.r2 == pytest.approx(1)
    assert found.beta_low == pytest.approx(-0.02)
    assert table.fitted.tolist() == [0, 1, 1, 3, 2, 1]
    given = table.loc["published coefficients, α −0.46"]
    assert given[["alpha", "beta"]].tolist() == [-0.46, -0.02]
    # γ makes the mean of log PPL right.
    expected = np.log(frame.val_ppl) + 0.46 * np.log(frame.train_tokens) + 2 * frame.val_er
    assert given.gamma == pytest.approx(expected.mean())
    assert given.error > found.error
    assert table.r2[prediction.MEAN] == pytest.approx(0)
    assert table.gamma[prediction.MEAN] == pytest.approx(np.log(frame.val_ppl).mean())


def test_errors_are_those_of_configurations_left_out_whole() -> None:
    results = runs(np.random.default_rng(1), 5, beta=-0.02, own=0.05, noise=0.02, seeds=1)
    # One configuration with more runs, at which the formula is worse.
    results += [made(dict(context_dim=64, seed=s), val_ppl=300.0) for s in (5, 6, 7, 8)]
    frame = results.frame()
    y = np.log(frame.val_ppl.to_numpy(float))
    design = np.column_stack([np.log(frame.train_tokens), 100 * frame.val_er, np.ones(len(frame))])
    errors, betas = {}, []
    for width in frame.context_dim.unique():
        out = (frame.context_dim == width).to_numpy()
        solved = np.linalg.lstsq(design[~out], y[~out])[0]
        errors[width] = np.abs(np.exp(design[out] @ solved - y[out]) - 1)
        betas.append(solved[1])
    found = prediction.predictors(frame).loc[prediction.TOKENS_AND_ER]
    assert found.left_out_error == pytest.approx(np.mean([e.mean() for e in errors.values()]))
    assert found.left_out_worst == pytest.approx(max(e.max() for e in errors.values()))
    solved = np.linalg.lstsq(design, y)[0]
    inside = np.exp(design @ solved - y) - 1
    each = [np.abs(inside[frame.context_dim == width]).mean() for width in errors]
    assert found.error == pytest.approx(np.mean(each))
    half = stats.t.ppf(0.975, 4) * np.sqrt(4 / 5 * np.sum((np.array(betas) - solved[1]) ** 2))
    assert found.beta_low == pytest.approx(solved[1] - half)
    assert found.beta_high == pytest.approx(solved[1] + half)


def test_interval_of_beta_covers_though_runs_are_alike() -> None:
    generator = np.random.default_rng(4)
    hits = 0
    for _ in range(40):
        frame = runs(generator, 6, beta=-0.02, own=0.05, noise=0.02, sizes=(50, 100)).frame()
        row = prediction.predictors(frame).loc[prediction.TOKENS_AND_ER]
        hits += row.beta_low <= -0.02 <= row.beta_high
    low, high = stats.binom.ppf([0.001, 0.999], 40, 0.95)
    assert low <= hits <= high


def test_what_rank_adds_where_it_matters_and_where_not() -> None:
    generator = np.random.default_rng(5)
    matters = prediction.what_er_adds(runs(generator, 10, beta=-0.03, noise=0.01).frame())
    assert matters.low is not None
    assert matters.low > 0
    assert matters.gain == pytest.approx(matters.tokens_only - matters.tokens_and_er)
    assert matters.tokens_only > 3 * matters.tokens_and_er
    assert matters.configurations == 10
    hits = 0
    for _ in range(10):
        nothing = prediction.what_er_adds(runs(generator, 10, own=0.05, noise=0.01).frame())
        assert nothing.low is not None
        hits += nothing.low <= 0
    assert hits >= 9


def test_at_one_size_tokens_say_nothing() -> None:
    frame = runs(np.random.default_rng(0), 4, beta=-0.02, sizes=[50_000]).frame()
    table = prediction.predictors(frame)
    only, mean = table.loc[prediction.TOKENS_ONLY], table.loc[prediction.MEAN]
    assert np.isnan(only.alpha)
    assert only.fitted == 1
    assert only.left_out_error == mean.left_out_error
    assert table.beta[prediction.TOKENS_AND_ER] == pytest.approx(-0.02)


def test_runs_that_do_not_determine_a_formula() -> None:
    results = runs(np.random.default_rng(0), 3, sizes=[50_000], seeds=1)
    # One configuration alone has a second size: without it there is no slope.
    results.append(made(dict(context_dim=64), train_tokens=100_000, val_ppl=80.0))
    frame = results.frame()
    only = prediction.predictors(frame).loc[prediction.TOKENS_ONLY]
    assert np.isfinite(only.error)
    assert np.isnan(only.left_out_error)
    assert np.isnan(only.left_out_worst)
    with pytest.raises(ValueError, match=r"^frame: got .*tokens only"):
        prediction.what_er_adds(frame)
    with pytest.raises(ValueError, match=r"^frame: got '2 configurations"):
        prediction.predictors(frame[frame.context_dim < 66])


def test_runs_without_perplexity_change_nothing() -> None:
    results = runs(np.random.default_rng(0), 4, beta=-0.02, noise=0.1)
    before = prediction.predictors(results.frame())
    results.insert(0, made(val_ppl=None, aborted="loss 1 -> 2"))
    after = prediction.predictors(results.frame())
    pd.testing.assert_frame_equal(before, after)
    assert (before.attrs["dropped"], after.attrs["dropped"]) == (0, 1)


# Rules


@pytest.mark.parametrize(
    ("measured", "rule", "verdict"),
    [
        (dict(val_er=0.8001), "er", "good"),
        (dict(val_er=0.80), "er", "medium"),
        (dict(val_er=0.75), "er", "medium"),
        (dict(val_er=0.7499), "er", "poor"),
        (dict(phase1_iterations=5), "iterations", "good"),
        (dict(phase1_iterations=25), "iterations", "good"),
        (dict(phase1_iterations=26), "iterations", "medium"),
        (dict(phase1_iterations=30), "iterations", "medium"),
        (dict(phase1_iterations=31), "iterations", "poor"),
        (dict(val_er=0.80, train_er=0.82), "gap", "good"),
        (dict(val_er=0.75, train_er=0.7701), "gap", "medium"),
        (dict(val_er=0.80, train_er=0.8499), "gap", "medium"),
        (dict(val_er=0.80, train_er=0.85), "gap", "poor"),
        (dict(val_er=0.75, train_er=0.70), "gap", "good"),
    ],
)
def test_borders_of_the_rules(measured: dict[str, Any], rule: str, verdict: str) -> None:
    assert getattr(prediction.judge(made(**measured)), rule) == verdict


def test_judgement_in_words() -> None:
    fine = prediction.judge(made(val_er=0.81, train_er=0.82, phase1_history=history()))
    assert fine.abort is None
    assert fine.words() == ("effective rank good, iterations good, gap good; no reason to give up")
    rows = history(val_er=0.65)
    poor = prediction.judge(made(val_er=0.6, phase1_iterations=40, phase1_history=rows))
    assert poor.abort == phase1.abort_reason(rows)
    assert "poor" in poor.words()
    assert "give up: effective rank 65.0% under 70%" in poor.words()
    with pytest.raises(ValueError, match=r"^val_er: got 77"):
        prediction.judge(made(val_er=77.0))


def judged(
    perplexities: Sequence[float], ranks: Sequence[float], *, seeds: int = 1, **measured: Any
) -> Results:
    """Configurations at one size, each with its rank and perplexity; seeds are copies."""
    return Results(
        made(dict(context_dim=64 + number, seed=seed), val_ppl=ppl, val_er=rank / 100, **measured)
        for number, (ppl, rank) in enumerate(zip(perplexities, ranks, strict=True))
        for seed in range(seeds)
    )


def row(results: Sequence[Result], rule: str = "validation ER") -> pd.Series:
    return prediction.score(results).set_index("rule").loc[rule]


UP = [90.0, 92.0, 94.0, 96.0, 104.0, 106.0, 108.0, 110.0]
DOWN = [85.0, 84.0, 83.0, 82.0, 74.0, 73.0, 72.0, 71.0]


def test_a_perfect_rule() -> None:
    found = row(judged(UP, DOWN))
    assert (found.called, found.right, found.hit_rate) == (8, 8, 1)
    assert found.base_rate == 0.5
    assert found.excess == 0.5
    assert found.low > 0
    # Of the 70 ways to place four calls of each kind, two are as far from a half.
    assert found.p == pytest.approx(2 / 70, abs=0.015)
    assert found.remark == ""


def test_a_reversed_rule() -> None:
    found = row(judged(UP, DOWN[::-1]))
    assert (found.right, found.hit_rate, found.excess) == (0, 0, -0.5)
    assert found.high < 0
    assert found.p == pytest.approx(2 / 70, abs=0.015)


def test_a_random_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "PERMUTATIONS", 50)
    generator = np.random.default_rng(6)
    hits = small = undefined = 0
    excess = []
    for _ in range(200):
        found = row(runs(generator, 8, own=0.05, noise=0.01, sizes=[50_000]))
        if np.isnan(found.low):
            undefined += 1
            continue
        hits += found.low <= 0 <= found.high
        small += found.p <= 0.05
        excess.append(found.excess)
    assert undefined < 20
    assert hits / len(excess) > 0.88
    assert small / len(excess) < 0.1
    assert abs(np.mean(excess)) < 0.05


def test_base_rate_is_that_of_every_placement() -> None:
    results = judged([80, 90, 100, 110, 120, 130], [85, 70, 81, 77, 84, 60])
    results += judged([50, 60, 70, 80], [85, 70, 77, 77], train_tokens=99_000)
    found = row(results)
    # Size by size, the calls fall on the runs in every order.
    first = [1, -1, 1, 0, 1, -1], [1, 1, 1, -1, -1, -1]
    second = [1, -1, 0, 0], [1, 1, -1, -1]
    right = sum(
        np.mean([sum(c * o > 0 for c, o in zip(p, outcomes, strict=True)) for p in orders])
        for orders, outcomes in ((list(itertools.permutations(c)), o) for c, o in (first, second))
    )
    assert found.called == 7
    assert found.right == 2 + 1 + 1
    assert found.base_rate == pytest.approx(right / 7)
    # The base rate is not a half where good and poor are not called alike and better and worse
    # are not alike many.
    uneven = row(judged([80, 80, 80, 100, 120], [85, 85, 85, 84, 77]))
    assert uneven.remark == "calls only good; 3 at the median of the size"
    assert (uneven.called, uneven.hit_rate, uneven.base_rate) == (1, 0, 0)


def test_runs_are_judged_among_their_own_size() -> None:
    # Every run of the larger size has a lower perplexity than any of the smaller.
    results = judged(UP, DOWN) + judged([p / 2 for p in UP], DOWN, train_tokens=99_000)
    assert row(results).hit_rate == 1


def test_seeds_are_no_new_evidence() -> None:
    ranks = [85.0, 84.0, 73.0, 82.0, 74.0, 83.0, 72.0, 71.0]
    once, thrice = row(judged(UP, ranks)), row(judged(UP, ranks, seeds=3))
    assert thrice.called == 3 * once.called
    for name in ("hit_rate", "base_rate", "low", "high", "p"):
        assert thrice[name] == pytest.approx(once[name])
    assert 0.1 < once.p < 1
    assert once.low < 0 < once.high


def test_interval_is_the_jackknife_over_configurations() -> None:
    ranks = [85.0, 84.0, 73.0, 82.0, 74.0, 83.0, 72.0, 71.0]
    results = judged(UP, ranks)
    whole = row(results)
    left = [row([r for r in results if r is not out]).excess for out in results]
    half = stats.t.ppf(0.975, 7) * np.sqrt(7 / 8 * np.sum((np.array(left) - whole.excess) ** 2))
    assert (whole.low, whole.high) == pytest.approx((whole.excess - half, whole.excess + half))


def test_the_run_at_the_median_is_neither() -> None:
    found = row(judged([90, 95, 100, 105, 110], [85, 84, 83, 70, 71]))
    assert (found.called, found.right, found.hit_rate) == (4, 4, 1)
    assert found.remark == "1 at the median of the size"


def test_rules_that_say_little() -> None:
    medium = row(judged(UP, [77] * 8))
    assert (medium.called, medium.right) == (0, 0)
    assert medium[["hit_rate", "base_rate", "excess", "low", "high", "p"]].isna().all()
    assert medium.remark == "calls no run good or poor"
    good = row(judged(UP, [85] * 8))
    assert (good.called, good.hit_rate, good.excess, good.p) == (8, 0.5, 0, 1)
    assert np.isnan(good.low)
    assert good.remark == "calls every run good: tells nothing apart"
    some = row(judged(UP, [70] * 2 + [77] * 6))
    assert (some.called, some.hit_rate, some.base_rate) == (2, 0, 0.5)
    assert some.remark == "calls only poor"
    # One configuration makes all the calls: without it there is nothing to estimate.
    one = row(judged(UP, [85] + [77] * 7))
    assert one.hit_rate == 1
    assert np.isnan(one.low)


def test_abort_rules_apart() -> None:
    ways = {
        ER_RULE: dict(val_er=0.69),
        STALLS: dict(converged=0.15),
        NO_FALL: dict(loss=1.0),
    }
    assert (ER_RULE, STALLS, NO_FALL) == (
        "ER < 70 % at iteration 20",
        "convergence stalls",
        "loss does not fall",
    )
    for rule, change in ways.items():
        results = judged(UP, [77] * 8)
        for number, result in enumerate(results):
            # The last three would be given up, and the first: it turned out well.
            given_up = number in (0, 5, 6, 7)
            result.phase1_history = history(**(change if given_up else {}))
        results[3].phase1_history = history(12)
        table = prediction.score(results).set_index("rule")
        for name in (rule, prediction.ANY_ABORT):
            assert (table.called[name], table.right[name]) == (4, 3)
            assert table.hit_rate[name] == 0.75
            assert table.base_rate[name] == 0.5
            assert table.remark[name] == (
                "calls only poor; 7 of 8 runs reached iteration 20; gives up 1 of 4 better runs"
            )
        for name in ways.keys() - {rule}:
            assert table.called[name] == 0
            assert table.remark[name].startswith("calls no run good or poor; 7 of 8")


def test_all_rules_have_their_row() -> None:
    results = judged(UP, DOWN)
    for number, result in enumerate(results):
        result.phase1_iterations = (24, 33)[number % 2]
        result.train_er = result.val_er + (0.06, 0.01)[number // 4]
    table = prediction.score(results)
    assert table.columns.tolist() == [
        *("rule", "called", "right", "hit_rate", "base_rate", "excess", "low", "high", "p"),
        "remark",
    ]
    assert table.rule.tolist() == [
        *("validation ER", "iterations", "train − validation ER gap"),
        *(ER_RULE, STALLS, NO_FALL, "any abort rule"),
    ]
    assert table.hit_rate[:3].tolist() == [1, 0.5, 0]
    assert prediction.score(results).equals(table), "the same each time"


def test_runs_given_up_are_counted_and_left_out() -> None:
    gone = [made(dict(context_dim=99), val_ppl=None, aborted="loss 1 -> 2", val_er=0.5)] * 2
    before, after = row(judged(UP, DOWN)), row([*judged(UP, DOWN), *gone])
    assert after.remark == "2 given up, no perplexity"
    pd.testing.assert_series_equal(before.drop("remark"), after.drop("remark"))


@pytest.mark.parametrize(
    "results",
    [
        [],
        [made()],
        [made(), made()],
        [made(val_ppl=None, aborted="loss 1 -> 2")] * 3,
        [made(), made(train_tokens=1, val_ppl=50.0)],
    ],
)
def test_nothing_to_score_is_named(results: Sequence[Result]) -> None:
    with pytest.raises(ValueError, match=r"^results: got .*accepted: two or more"):
        prediction.score(results)
