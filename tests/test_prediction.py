"""Correlations and formulas that predict perplexity from Phase 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from synthetic import configurations, made

from cvfp import Results
from cvfp.analysis import prediction, published


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
        train_ppl=table.train_ppl_low,
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
    found, expected = prediction.correlation(x, y), stats.pearsonr(x, y)
    interval = expected.confidence_interval(0.95)
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


@pytest.mark.parametrize("n", [8, 20])
def test_fisher_interval_covers_as_often_as_it_says(n: int) -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(600):
        x, other = generator.normal(size=(2, n))
        found = prediction.correlation(x, 0.6 * x + 0.8 * other)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.6 <= found.high
    low, high = stats.binom.ppf([0.001, 0.999], 600, 0.95)
    assert low <= hits <= high


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: prediction.correlation([1], [2]), "x, y"),
        (lambda: prediction.correlation([1, 2, 3], [2, 3]), "x, y"),
        (lambda: prediction.correlation([1, 1, 1], [2, 3, 4]), "x"),
        (lambda: prediction.correlation([1, 2, 3], [2, 2, 2]), "y"),
        (lambda: prediction.correlation([1, 2, np.nan], [2, 3, 4]), "x"),
        (lambda: prediction.correlation([1, 2, 3], [2, 3, np.inf]), "y"),
    ],
)
def test_lists_that_do_not_correlate_are_named(call: Callable[[], Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .*accepted: "):
        call()


# The runs as tables


def test_matrix() -> None:
    results = configurations(np.random.default_rng(0), 5, beta=-0.02, noise=0.02)
    results.append(made(val_ppl=None, aborted="loss 1 -> 2"))
    frame = results.frame()
    found = prediction.matrix(frame)
    kept = frame[frame.val_ppl.notna()]
    expected = np.corrcoef(np.log(kept.val_ppl), np.log(kept.train_tokens))[0, 1]
    assert found.loc["log PPL", "log tokens"] == pytest.approx(expected)
    assert list(found.columns) == list(found.index)
    constant = {"converged", "accuracy", "layers L", "input tokens n", "diversity weight w"}
    assert not constant & set(found.columns)
    assert not found.isna().any().any()
    varied = frame.assign(train_er=frame.val_er + frame.seed / 100, val_acc=frame.seed / 100)
    gap = prediction.matrix(varied)
    assert gap.loc["train − val ER", "accuracy"] == pytest.approx(1)


def test_matrix_of_ranks_asks_for_the_order_alone() -> None:
    results = configurations(np.random.default_rng(0), 6, beta=-0.02, sizes=[50_000], noise=0.02)
    frame = results.frame().astype({"val_ppl": float})
    frame["train_er"] = 0.9 - frame.val_ppl.rank() ** 3 / 1e5  # falls with PPL, far from a line
    straight = prediction.matrix(frame).loc["log PPL", "train ER"]
    ordered = prediction.matrix(frame, ranks=True).loc["log PPL", "train ER"]
    assert ordered == pytest.approx(-1)
    assert straight > -0.98
    expected = stats.spearmanr(frame.val_ppl, frame.val_er).statistic
    found = prediction.matrix(frame, ranks=True).loc["log PPL", "val ER"]
    assert found == pytest.approx(expected)


def test_matrix_within_configurations_is_free_of_what_they_differ_by() -> None:
    """Over all runs a higher rank goes with a higher perplexity; within each configuration with a
    lower one."""
    results = [
        made(dict(context_dim=64 + number, seed=seed), val_ppl=float(np.exp(log_ppl)), val_er=er)
        for number in range(5)
        for seed in range(3)
        for er, log_ppl in [(0.7 + 0.03 * number + 0.001 * seed, 4 + 0.2 * number - 0.01 * seed)]
    ]
    frame = Results(results).frame()
    assert prediction.matrix(frame).loc["log PPL", "val ER"] > 0.95
    found = prediction.matrix(frame, within="configuration")
    assert found.loc["log PPL", "val ER"] == pytest.approx(-1)
    # The same in all runs of a configuration: nothing is left to correlate.
    assert not {"context size D", "log tokens", "iterations"} & set(found.columns)


def test_matrix_within_takes_off_each_configurations_mean() -> None:
    frame = configurations(np.random.default_rng(1), 4, beta=-0.02, noise=0.2).frame()
    rows = frame.assign(log_ppl=np.log(frame.val_ppl))[["context_dim", "log_ppl", "val_er"]]
    means = rows.groupby("context_dim")[["log_ppl", "val_er"]].transform("mean")
    left = rows[["log_ppl", "val_er"]] - means
    found = prediction.matrix(frame, within="configuration").loc["log PPL", "val ER"]
    assert found == pytest.approx(np.corrcoef(left.log_ppl, left.val_er)[0, 1])


def test_matrix_within_sizes_is_free_of_the_tokens() -> None:
    frame = configurations(np.random.default_rng(0), 6, beta=-0.02, seeds=1).frame()
    assert prediction.matrix(frame).loc["log PPL", "log tokens"] < -0.7
    found = prediction.matrix(frame, within="train_tokens")
    assert "log tokens" not in found
    assert found.loc["log PPL", "val ER"] == pytest.approx(-1)
    assert found.loc["log PPL", "log train PPL"] == pytest.approx(1)


def test_by_configuration() -> None:
    results = configurations(np.random.default_rng(0), 2, ranks=[80, 70], seeds=2)
    results += [
        made(dict(token_input_all_layers=False, dist_reg_weight=0.9), val_ppl=p) for p in (90, 80)
    ]
    results.append(made(val_ppl=None, aborted="loss 1 -> 2"))
    table = prediction.by_configuration(results.frame())
    assert list(table.index) == [
        "1 x 64, n 1, w 0.8",
        "1 x 64, n 1, w 0.9, equal-decrease",
        "1 x 65, n 1, w 0.8",
    ]
    assert list(table.columns[:5]) == list(prediction.CONFIGURATION)
    first, single, last = table.itertuples()
    assert (first.alpha, last.alpha) == pytest.approx((-0.4, -0.4))
    assert first.alpha_error == pytest.approx(0, abs=1e-6)
    assert np.isnan(single.alpha)
    assert np.isnan(single.alpha_error)
    assert first.val_er == pytest.approx(0.8005)
    assert first.val_ppl == pytest.approx(np.exp(10) * 200_000**-0.4)
    assert single.val_ppl == 85
    assert last.phase1_iterations == 21


@pytest.mark.parametrize("ask", [prediction.by_configuration, prediction.predictors])
def test_figures_out_of_range_are_named(ask: Callable[[pd.DataFrame], Any]) -> None:
    frame = configurations(np.random.default_rng(0), 4).frame()
    with pytest.raises(ValueError, match=r"^frame: got .*val_er.*accepted: Results.frame"):
        ask(frame.drop(columns="val_er"))
    with pytest.raises(ValueError, match=r"^frame: got .*no run with a perplexity"):
        ask(frame.assign(val_ppl=None))


def test_matrix_names_what_it_cannot_correlate() -> None:
    frame = configurations(np.random.default_rng(0), 2).frame()
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


def test_planted_coefficients_are_recovered() -> None:
    frame = configurations(np.random.default_rng(0), 6, beta=-0.02).frame()
    table = prediction.predictors(frame)
    found = table.loc[prediction.TOKENS_AND_ER]
    assert found[["alpha", "beta"]].tolist() == pytest.approx([-0.4, -0.02])
    assert found[["error", "left_out_error", "left_out_worst"]].tolist() == pytest.approx([0] * 3)
    assert table.fitted.tolist() == [0, 1, 1, 3, 2, 2, 1]
    given = table.loc["published coefficients, α −0.46"]
    assert given[["alpha", "beta"]].tolist() == [-0.46, -0.02]
    # γ makes the mean of log PPL right.
    expected = np.log(frame.val_ppl) + 0.46 * np.log(frame.train_tokens) + 2 * frame.val_er
    off = np.expm1(expected.mean() - expected).abs()
    assert given.error == pytest.approx(off.groupby(frame.context_dim).mean().mean())
    assert given.error > found.error


def test_training_perplexity_is_a_predictor_of_its_own() -> None:
    frame = configurations(np.random.default_rng(0), 6, own=0.2, noise=0.05).frame()
    found = prediction.predictors(frame).loc["training PPL"]
    assert found[["fitted", "left_out_error"]].tolist() == pytest.approx([2, 0])
    assert np.isnan(found.alpha)
    # Where it says nothing it is as good as the mean of the others, and no better.
    table = prediction.predictors(frame.assign(train_ppl=80.0))
    assert table.left_out_error["training PPL"] == table.left_out_error[prediction.MEAN]


def test_errors_are_those_of_configurations_left_out_whole() -> None:
    results = configurations(np.random.default_rng(1), 5, beta=-0.02, own=0.05, noise=0.02, seeds=1)
    # One configuration with more runs, at which the formula is worse.
    results += [made(dict(context_dim=64, seed=s), val_ppl=300.0) for s in (5, 6, 7, 8)]
    frame = results.frame()
    y = np.log(frame.val_ppl.to_numpy(float))
    design = np.column_stack([np.log(frame.train_tokens), 100 * frame.val_er, np.ones(len(frame))])
    errors = {}
    for width in frame.context_dim.unique():
        out = (frame.context_dim == width).to_numpy()
        solved = np.linalg.lstsq(design[~out], y[~out])[0]
        errors[width] = np.abs(np.exp(design[out] @ solved - y[out]) - 1)
    found = prediction.predictors(frame).loc[prediction.TOKENS_AND_ER]
    assert found.left_out_error == pytest.approx(np.mean([e.mean() for e in errors.values()]))
    assert found.left_out_worst == pytest.approx(max(e.max() for e in errors.values()))
    solved = np.linalg.lstsq(design, y)[0]
    inside = np.exp(design @ solved - y) - 1
    each = [np.abs(inside[frame.context_dim == width]).mean() for width in errors]
    assert found.error == pytest.approx(np.mean(each))


def test_what_rank_adds_where_it_matters_and_where_not() -> None:
    generator = np.random.default_rng(5)
    matters = prediction.what_er_adds(configurations(generator, 10, beta=-0.03, noise=0.01).frame())
    assert matters.low is not None
    assert matters.low > 0
    assert matters.gain == pytest.approx(matters.tokens_only - matters.tokens_and_er)
    assert matters.tokens_only > 3 * matters.tokens_and_er
    assert matters.configurations == 10
    hits = 0
    for _ in range(10):
        nothing = prediction.what_er_adds(
            configurations(generator, 10, own=0.05, noise=0.01).frame()
        )
        assert nothing.low is not None
        hits += nothing.low <= 0
    assert hits >= 9


def test_at_one_size_tokens_say_nothing() -> None:
    frame = configurations(np.random.default_rng(0), 4, beta=-0.02, sizes=[50_000]).frame()
    table = prediction.predictors(frame)
    only, mean = table.loc[prediction.TOKENS_ONLY], table.loc[prediction.MEAN]
    assert np.isnan(only.alpha)
    assert only.fitted == 1
    assert only.left_out_error == mean.left_out_error
    assert table.beta[prediction.TOKENS_AND_ER] == pytest.approx(-0.02)


def test_runs_that_do_not_determine_a_formula() -> None:
    results = configurations(np.random.default_rng(0), 3, sizes=[50_000], seeds=1)
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
    results = configurations(np.random.default_rng(0), 4, beta=-0.02, noise=0.1)
    before = prediction.predictors(results.frame())
    results.insert(0, made(val_ppl=None, aborted="loss 1 -> 2"))
    after = prediction.predictors(results.frame())
    pd.testing.assert_frame_equal(before, after)
