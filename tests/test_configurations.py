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
from synthetic import LEVELS, judged, made, matrix, slope, student

from cvfp import Result, Results
from cvfp.analysis import measures, prediction, rules
from cvfp.analysis.claims import Measurement

SOURCE = measures.Source("05_phase1_to_phase2", made())


def figures(one: Measurement) -> Any:
    return one.value, one.low, one.high


# Main effects


ALONE = " {}, no two of which differ in this alone"


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


@pytest.mark.parametrize("field", ["dist_reg_weight", "num_input_tokens"])
def test_effect_in_a_full_factorial_is_paired(field: str) -> None:
    generator = np.random.default_rng(0)
    table = factorial(lambda **_: float(generator.normal()), **LEVELS)
    low, high = LEVELS[field]
    pairs = differences(table, field, low, high)
    found = measures.effect(table.sample(frac=1, random_state=0), field, "y")
    assert found is not None
    assert found[0] == "6 pairs of {}"
    assert found[1:] == pytest.approx(student(pairs))


def test_effect_is_of_the_largest_value_against_the_least() -> None:
    table = factorial(lambda context_dim, **_: (context_dim == 128) * 100 + context_dim, **LEVELS)
    ends: Any = measures.effect(table, "context_dim", "y")
    assert ends == ("4 pairs of {}", *[pytest.approx(192)] * 3)


def planted(**fields: float) -> float:
    return sum({"a": 1.5, "b": -2.0, "c": 0.7, "d": 4.0}[name] * x for name, x in fields.items())


def test_half_a_fraction_gives_the_planted_effect() -> None:
    names = dict(zip("abcd", prediction.CONFIGURATION, strict=False))
    table = factorial(lambda **_: 0.0, **dict.fromkeys(names.values(), (0, 1)))
    half = table[table[list(names.values())].sum(axis=1) % 2 == 0]
    half = half.assign(
        y=[planted(**{n: row[names[n]] for n in names}) for _, row in half.iterrows()]
    )
    for name, effect in (("a", 1.5), ("b", -2.0), ("c", 0.7), ("d", 4.0)):
        found = measures.effect(half, names[name], "y")
        assert found == (f"8{ALONE}", *[pytest.approx(effect)] * 3)


def test_effect_needs_values_that_vary_apart() -> None:
    table = factorial(lambda **_: 1.0, **LEVELS)
    together = table[(table.dist_reg_weight == 0.9) == (table.num_input_tokens == 2)]
    assert measures.effect(together, "dist_reg_weight", "y") is None
    # Which does not touch the third.
    third = together.assign(y=together.context_dim / 64 + 5 * together.num_input_tokens)
    assert measures.effect(third, "context_dim", "y") == (
        "2 pairs of {}",
        *[pytest.approx(3)] * 3,
    )
    assert measures.effect(table, "num_layers", "y") is None
    assert measures.effect(table[:0], "num_layers", "y") is None
    # One pair: an effect, and nothing to judge it by.
    pair = table[(table.context_dim == 64) & (table.num_input_tokens == 1)]
    found: Any = measures.effect(pair.assign(y=[1.0, 3.0]), "dist_reg_weight", "y")
    assert found == ("1 pair of {}", pytest.approx(2.0), None, None)


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
    found = measures.matrix(results).sort_values(list(LEVELS)).reset_index()
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


def test_correlations_are_over_shapes() -> None:
    results = matrix()
    found = measures.configurations(results, SOURCE)
    ranks = shaped(averages(results, lambda one: one.val_er))
    both = stats.pearsonr(ranks, shaped(averages(results, log_ppl)))
    ends = both.confidence_interval(0.95)
    assert figures(found["C5"]) == pytest.approx((both.statistic, ends.low, ends.high))
    alphas, last = [], []
    for start in range(0, len(results) // 2, 6):
        other = start + len(results) // 2
        runs = results[start : start + 6] + results[other : other + 6]
        alphas.append(slope([log_ppl(one) for one in runs], [one.train_tokens for one in runs]))
        last.append(statistics.fmean(one.ranks[1] for one in runs if one.experiment.samples == 200))
    both = stats.pearsonr(alphas, last)
    ends = both.confidence_interval(0.95)
    assert figures(found["C12"]) == pytest.approx((both.statistic, ends.low, ends.high))
    assert all(one.seeds == 3 for one in found.values())
    alone = Results(one for one in results if one.experiment.samples == 50)
    assert "C12" not in measures.configurations(alone, SOURCE)
    # Three configurations give no interval of a correlation.
    few = Results(one for one in results if one.experiment.dist_reg_weight == 0.8)
    few = Results(one for one in few if one.experiment.num_input_tokens == 1)
    assert not {"C5", "C12"} & set(measures.configurations(few, SOURCE))


def test_effects_are_those_of_the_matrix() -> None:
    results = matrix()
    found = measures.configurations(results, SOURCE)
    ranks = table_of(results, lambda one: 100 * one.val_er)
    assert figures(found["C11"]) == pytest.approx(
        student(differences(ranks, "dist_reg_weight", 0.8, 0.9))
    )
    # The ends of the widths.
    wide = differences(ranks, "context_dim", 64, 256)
    assert figures(found["C14"]) == pytest.approx(student(shaped(wide)))
    # A relative change of perplexity, not a difference of logarithms.
    tokens = differences(table_of(results, log_ppl), "num_input_tokens", 1, 2)
    logs = student(shaped(tokens))
    assert figures(found["C13"]) == pytest.approx([math.exp(x) - 1 for x in logs])
    assert [found[id].words for id in ("C11", "C13", "C14")] == [
        "6 pairs of configurations that converge",
        "3 pairs of shapes",
        "2 pairs of shapes that converge",
    ]


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
    found = measures.configurations(results, SOURCE)
    assert figures(found["C11"]) == (pytest.approx(2),) * 3
    # With it the shape is out, whatever its other weight: one pair is left.
    assert figures(found["C14"]) == (pytest.approx(-3), None, None)
    assert found["C11"].words == "5 pairs of configurations that converge"
    assert found["C14"].words == "1 pair of shapes that converge"
    assert found["C13"].words == "3 pairs of shapes"


def test_effects_of_fields_that_do_not_vary_are_left_out() -> None:
    results = Results(one for one in matrix() if one.experiment.num_input_tokens == 1)
    found = measures.configurations(results, SOURCE)
    assert "C13" not in found
    assert {"C11", "C14"} <= set(found)


def test_a_fraction_without_scatter_to_judge_by_gives_no_interval() -> None:
    corners = {(0.8, 64, 1), (0.9, 64, 2), (0.8, 256, 2), (0.9, 256, 1)}
    results = Results(
        one
        for one in matrix()
        if tuple(getattr(one.experiment, name) for name in LEVELS) in corners
    )
    found = measures.configurations(results, SOURCE)
    assert found["C11"].value is not None
    assert (found["C11"].low, found["C11"].high) == (None, None)
    # Over the weights there are pairs: two, of each weight once.
    assert [found[id].words for id in ("C13", "C14")] == [
        "2 pairs of shapes",
        "2 pairs of shapes that converge",
    ]


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
    found = measures.configurations(results, SOURCE)["C17"]
    each = [2 * factor for factor, _ in itertools.product((1, 2, 4), (1, 1))]
    assert figures(found) == pytest.approx(student(each))


def test_what_rank_adds_is_the_gain_of_the_forms() -> None:
    results = matrix()
    # Both weights of a shape are left out together.
    gain = prediction.what_er_adds(results.frame().assign(dist_reg_weight=0))
    apart = prediction.what_er_adds(results.frame())
    assert (gain.configurations, apart.configurations) == (6, 12)
    found = measures.configurations(results, SOURCE)["C16"]
    assert figures(found) == (gain.gain, gain.low, gain.high)


def ruled(ranks: Sequence[float]) -> Results:
    """Configurations at one size, better by their order, each with its rank."""
    return Results(
        judged(4 + number / 100, {"context_dim": 64 + number}, val_er=rank / 100)
        for number, rank in enumerate(ranks)
    )


def test_rule_is_judged_by_its_calls() -> None:
    # Good: two of three are right; poor: two of three. A call is right half the time by chance.
    results = ruled([85, 70, 84, 77, 83, 72, 78, 71])
    found = measures.configurations(results, SOURCE)["C18"]
    assert found.value == pytest.approx(4 / 6 - 1 / 2)
    assert found.words == "6 calls, 8 shapes"
    rule = rules.score(results).set_index("rule").loc["validation ER"]
    assert (found.low, found.high) == (rule.low, rule.high)


def test_rule_that_calls_all_alike_has_no_interval() -> None:
    results = ruled([85, 84, 83, 86, 88, 82])
    assert figures(measures.configurations(results, SOURCE)["C18"]) == (0.0, None, None)


def test_rule_that_calls_nothing_is_left_out() -> None:
    assert "C18" not in measures.configurations(ruled([75.5, 76, 77, 78, 79, 79.5]), SOURCE)
