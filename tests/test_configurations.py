"""What a matrix of configurations measures: main effects, correlations and rules."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from synthetic import (
    LENGTHS,
    LEVELS,
    claims_of,
    figures,
    judged,
    made,
    matrix,
    parts,
    slope,
    student,
)

from cvfp import Result, Results
from cvfp.analysis import intervals, measures, prediction, rules
from cvfp.analysis.claims import Measurement

SOURCE = measures.Source("05_phase1_to_phase2", made())


def found_in(results: Results) -> dict[str, Measurement]:
    return parts(measures.configurations(results, SOURCE))


# Main effects


def factorial(effect: Callable[..., float], **levels: Sequence[Any]) -> pd.DataFrame:
    """Every combination of the levels, in a column y what `effect` makes of it."""
    names = dict.fromkeys(prediction.CONFIGURATION, (1,)) | dict(levels)
    rows = [dict(zip(names, one, strict=True)) for one in itertools.product(*names.values())]
    return pd.DataFrame([{**row, "y": effect(**{n: row[n] for n in levels})} for row in rows])


def differences(table: pd.DataFrame, field: str, low: float, high: float) -> list[float]:
    """One minus the other, of all that is otherwise equal."""
    others = [name for name in LEVELS if name != field]
    ours, theirs = (table[table[field] == level].set_index(others).y for level in (high, low))
    return [float(value) for value in (ours - theirs).dropna()]


def effect(table: pd.DataFrame, field: str) -> list[float]:
    return measures.contrast(table.set_index(measures.FIELDS), field).y.tolist()


@pytest.mark.parametrize("field", ["dist_reg_weight", "num_input_tokens"])
def test_contrast_is_paired(field: str) -> None:
    generator = np.random.default_rng(0)
    table = factorial(lambda **_: float(generator.normal()), **LEVELS)
    low, high = LEVELS[field]
    found = effect(table.sample(frac=1, random_state=0), field)
    assert sorted(found) == pytest.approx(sorted(differences(table, field, low, high)))
    assert len(found) == 6


def test_contrast_is_of_the_largest_value_against_the_least() -> None:
    table = factorial(lambda context_dim, **_: (context_dim == 128) * 100 + context_dim, **LEVELS)
    assert effect(table, "context_dim") == [192.0] * 4


def test_contrast_needs_pairs() -> None:
    table = factorial(lambda **_: 1.0, **LEVELS)
    together = table[(table.dist_reg_weight == 0.9) == (table.num_input_tokens == 2)]
    assert effect(together, "dist_reg_weight") == []
    # Which does not touch the third.
    third = together.assign(y=together.context_dim / 64 + 5 * together.num_input_tokens)
    assert effect(third, "context_dim") == [3.0, 3.0]
    assert effect(table, "num_layers") == []
    assert effect(table[:0], "context_dim") == []
    # What has no partner is left out.
    assert len(effect(table[1:], "dist_reg_weight")) == 5


# A matrix: C5, C11 to C14, C16 to C18


def averages(results: Results, value: Callable[[Result], float]) -> list[float]:
    """The mean of each configuration's runs, in the order of `matrix`."""
    each = [value(one) for one in results]
    return [statistics.fmean(each[start : start + 6]) for start in range(0, len(each), 6)]


def shaped(each: Sequence[float]) -> list[float]:
    """The two weights of every shape, averaged: the weight is the first of LEVELS."""
    half = len(each) // 2
    return [(low + high) / 2 for low, high in zip(each[:half], each[half:], strict=True)]


def log_ppl(one: Result) -> float:
    return math.log(cast(float, one.val_ppl))


def table_of(results: Results, value: Callable[[Result], float]) -> pd.DataFrame:
    table = factorial(lambda **_: 0.0, **LEVELS).sort_values(list(LEVELS))
    return table.assign(y=averages(results, value))


def test_matrix_of_configurations() -> None:
    results = matrix()
    found = measures.matrix(results).reset_index().sort_values(list(LEVELS)).reset_index()
    assert found[list(LEVELS)].to_numpy().tolist() == [
        list(map(float, values)) for values in itertools.product(*LEVELS.values())
    ]
    assert found.er.tolist() == pytest.approx(averages(results, lambda one: 100 * one.val_er))
    # Training ER is 3 points under in a third of the runs, and 1 point over in the others.
    assert found.er_gap.tolist() == pytest.approx([5 / 3] * 12)
    means = {
        size: statistics.fmean(log_ppl(one) for one in results if one.experiment.samples == size)
        for size in (50, 200)
    }
    over = averages(results, lambda one: log_ppl(one) - means[one.experiment.samples])
    assert found.over_size.tolist() == pytest.approx(over)
    assert found.converges.all()
    off = averages(results, lambda one: abs((500 - 400 * one.ranks[1]) / (one.val_ppl or 0) - 1))
    assert found.rule_error.tolist() == pytest.approx(off)


def test_correlations_are_over_shapes() -> None:
    results = matrix()
    found = found_in(results)
    ranks = shaped(averages(results, lambda one: one.val_er))
    both = stats.pearsonr(ranks, shaped(averages(results, log_ppl)))
    ends = both.confidence_interval(0.95)
    assert figures(found["C5.r"]) == pytest.approx((both.statistic, ends.low, ends.high))
    alphas, last = [], []
    for start in range(0, len(results) // 2, 6):
        other = start + len(results) // 2
        runs = results[start : start + 6] + results[other : other + 6]
        alphas.append(slope([log_ppl(one) for one in runs], [one.train_tokens for one in runs]))
        last.append(statistics.fmean(one.ranks[1] for one in runs if one.experiment.samples == 200))
    both = stats.pearsonr(alphas, last)
    ends = both.confidence_interval(0.95)
    assert figures(found["C12.r"]) == pytest.approx((both.statistic, ends.low, ends.high))
    assert all(one.n == 3 for one in found.values())
    alone = Results(one for one in results if one.experiment.samples == 50)
    assert not {"C12.r", "C11.alpha", "C13.alpha"} & set(found_in(alone))
    assert "C13.ppl" in found_in(alone)
    # Three configurations give no interval of a correlation.
    few = Results(one for one in results if one.experiment.dist_reg_weight == 0.8)
    few = Results(one for one in few if one.experiment.num_input_tokens == 1)
    assert not {"C5", "C12"} & claims_of(measures.configurations(few, SOURCE))


def by_pair(results: Results, field: str, weights: Sequence[float]) -> list[list[float]]:
    """Of every pair and conversation: nats at the field's larger level less those at its smaller,
    weighted over the two sizes, mean over seeds; diversity weights averaged, or apart."""
    columns = []
    for place in range(len(LENGTHS)):
        nats = {
            size: table_of(
                results,
                lambda one, size=size, place=place: (
                    one.val_conversations[place]["nats"]  # type: ignore[misc]
                    * (one.experiment.samples == size)
                    * 2
                ),  # of the six runs of a configuration half are of the size
            )
            for size in (50, 200)
        }
        both = nats[50].assign(y=weights[0] * nats[50].y + weights[1] * nats[200].y)
        pairs = differences(both, field, *LEVELS[field])
        columns.append(pairs if field == "dist_reg_weight" else shaped(pairs))
    return np.array(columns).T.tolist()


def test_effects_are_those_of_the_matrix() -> None:
    results = matrix()
    found = found_in(results)
    ranks = table_of(results, lambda one: 100 * one.val_er)
    assert figures(found["C11.er"]) == pytest.approx(
        student(differences(ranks, "dist_reg_weight", 0.8, 0.9))
    )
    assert figures(found["C13.er"]) == pytest.approx(
        student(shaped(differences(ranks, "num_input_tokens", 1, 2)))
    )
    # The ends of the widths.
    wide = differences(ranks, "context_dim", 64, 256)
    assert figures(found["C14.er"]) == pytest.approx(student(shaped(wide)))
    names = ("C11.er", "C13.ppl", "C14.er")
    assert [found[name].words for name in names] == [
        "6 pairs that converge",
        "3 pairs",
        "2 pairs that converge",
    ]


def test_nats_are_crossed_over_pairs_and_conversations() -> None:
    results = matrix()
    found = found_in(results)
    means, slopes = (0.5, 0.5), (-1 / math.log(4), 1 / math.log(4))
    # A relative change of perplexity, not a difference of logarithms.
    logs = intervals.crossed(np.array(by_pair(results, "num_input_tokens", means)), LENGTHS)
    ends = logs.value, cast(float, logs.low), cast(float, logs.high)
    assert figures(found["C13.ppl"]) == pytest.approx([math.expm1(x) for x in ends])
    ppl = differences(table_of(results, log_ppl), "num_input_tokens", 1, 2)
    assert logs.value == pytest.approx(statistics.fmean(ppl))
    for name, field in (("C13.alpha", "num_input_tokens"), ("C11.alpha", "dist_reg_weight")):
        one = intervals.crossed(np.array(by_pair(results, field, slopes)), LENGTHS)
        assert figures(found[name]) == pytest.approx((one.value, one.low, one.high))


@pytest.mark.parametrize(
    "unfinished",
    [{"converged": 0.98}, {"converged": 0.5, "val_ppl": None}],
    ids=["slow", "given up"],
)
def test_rank_is_judged_where_every_run_converged(unfinished: dict[str, Any]) -> None:
    """One run of one configuration does not converge: all of it is out for C11 and C14."""
    one = {"dist_reg_weight": 0.9, "context_dim": 256, "num_input_tokens": 2}

    def change(row: dict[str, Any]) -> dict[str, Any]:
        rank = 0.7 + 0.02 * (row["dist_reg_weight"] == 0.9) - 0.03 * (row["context_dim"] == 256)
        there = one.items() <= row.items()
        last = there and row["samples"] == 200 and row["seed"] == 2
        return {"val_er": 0.9 if there else rank, **(unfinished if last else {})}

    results = matrix(change)
    found = found_in(results)
    assert figures(found["C11.er"]) == (pytest.approx(2),) * 3
    # With it the shape is out, whatever its other weight: one pair is left.
    assert figures(found["C14.er"]) == (pytest.approx(-3), None, None)
    assert found["C11.er"].words == "5 pairs that converge"
    assert found["C11.alpha"].words == "5 pairs"
    assert found["C14.er"].words == "1 pairs that converge"
    assert found["C13.er"].words == "2 pairs that converge"
    assert found["C13.ppl"].words == "3 pairs"


def test_effects_of_fields_that_do_not_vary_are_left_out() -> None:
    results = Results(one for one in matrix() if one.experiment.num_input_tokens == 1)
    found = claims_of(measures.configurations(results, SOURCE))
    assert "C13" not in found
    assert {"C11", "C14"} <= found


def test_a_fraction_has_pairs_of_shapes_alone() -> None:
    corners = {(0.8, 64, 1), (0.9, 64, 2), (0.8, 256, 2), (0.9, 256, 1)}
    results = Results(
        one
        for one in matrix()
        if tuple(getattr(one.experiment, name) for name in LEVELS) in corners
    )
    found = found_in(results)
    assert not {"C11.er", "C11.alpha"} & set(found)
    # Over the weights there are pairs: two, of each weight once.
    assert [found[id].words for id in ("C13.ppl", "C14.er")] == ["2 pairs", "2 pairs that converge"]


def test_ranks_lie_apart_by_their_mean_distance() -> None:
    """Over and under do not cancel; the interval is over shapes."""
    gaps = iter([0.01, -0.02, 0.03, -0.04, 0.01, -0.01] * 12)
    results = matrix(
        lambda row: {"val_er": 0.7, "train_er": 0.7 + next(gaps) * row["context_dim"] / 64}
    )
    # ER has to vary for all else.
    for number, one in enumerate(results):
        one.val_er += number / 1000
        one.train_er += number / 1000
    found = found_in(results)["C17.gap"]
    each = [2 * factor for factor, _ in itertools.product((1, 2, 4), (1, 1))]
    assert figures(found) == pytest.approx(student(each))


def test_what_rank_adds_is_the_gain_of_the_forms() -> None:
    results = matrix()
    # Both weights of a shape are left out together.
    gain = prediction.what_er_adds(results.frame().assign(dist_reg_weight=0))
    apart = prediction.what_er_adds(results.frame())
    assert (gain.configurations, apart.configurations) == (6, 12)
    found = found_in(results)
    assert figures(found["C16.gain"]) == (gain.gain, gain.low, gain.high)


def test_printed_rule_is_measured_as_printed() -> None:
    results = matrix()
    off = averages(results, lambda one: abs((500 - 400 * one.ranks[1]) / (one.val_ppl or 0) - 1))
    assert figures(found_in(results)["C16.rule"]) == pytest.approx(student(shaped(off)))


def ruled(ranks: Sequence[float]) -> Results:
    """Configurations at one size, better by their order, each with its rank."""
    return Results(
        judged(4 + number / 100, {"context_dim": 64 + number}, val_er=rank / 100)
        for number, rank in enumerate(ranks)
    )


def test_rule_is_judged_by_its_calls() -> None:
    # Good: two of three are right; poor: two of three. A call is right half the time by chance.
    results = ruled([85, 70, 84, 77, 83, 72, 78, 71])
    found = found_in(results)["C18.validation_er"]
    assert found.estimate == pytest.approx(4 / 6 - 1 / 2)
    assert found.words == "6 calls, 8 shapes"
    rule = rules.score(results).set_index("rule").loc["validation ER"]
    assert (found.low, found.high) == (rule.low, rule.high)
    # Student's t with a degree of freedom less than configurations.
    error = (rule.high - rule.low) / 2 / stats.t.ppf(0.975, 7)
    assert found.p == pytest.approx(2 * stats.t.sf((4 / 6 - 1 / 2) / error, 7))


def test_every_rule_is_a_part() -> None:
    """Each row of the scores that calls anything, by the part that names it."""
    words = {
        "validation_er": "validation ER",
        "iterations": "iterations",
        "er_gap": "train − validation ER gap",
        "abort_er": "ER < 70 % at iteration 20",
        "abort_stalls": "convergence stalls",
        "abort_loss": "loss does not fall",
        "any_abort": "any abort rule",
    }
    history = [dict(iteration=k, converged=0.5, loss=1.0, effective_rank=0.6) for k in range(1, 31)]
    results = ruled([85, 70, 84, 77, 83, 72, 78, 71])
    for number, one in enumerate(results):
        one.phase1_iterations = 20 + 3 * number
        one.phase1_history = history if number % 3 else []
    scores = rules.score(results).set_index("rule")
    found = {part.removeprefix("C18."): one for part, one in found_in(results).items()}
    for part, rule in words.items():
        there = scores.called[rule] > 0
        assert (part in found) == there
        if there:
            assert found[part].estimate == scores.excess[rule]
            assert found[part].words == f"{scores.called[rule]} calls, 8 shapes"
    assert {"iterations", "er_gap", "any_abort"} <= set(found)


def test_rule_that_calls_all_alike_has_no_interval() -> None:
    results = ruled([85, 84, 83, 86, 88, 82])
    assert figures(found_in(results)["C18.validation_er"]) == (0.0, None, None)


def test_rule_that_calls_nothing_is_left_out() -> None:
    assert "C18.validation_er" not in found_in(ruled([75.5, 76, 77, 78, 79, 79.5]))
