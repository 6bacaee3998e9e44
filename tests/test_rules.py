"""Note 004's rules: their thresholds, and the score of rules that are right, wrong and random."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from synthetic import configurations, made

from cvfp import Result, Results
from cvfp.analysis import rules

ER_RULE, STALLS, NO_FALL = rules.ABORTS


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


@pytest.mark.parametrize(
    ("measured", "rule", "said"),
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
def test_borders_of_the_rules(measured: dict[str, Any], rule: str, said: str) -> None:
    names = dict(zip(("er", "iterations", "gap"), rules.CRITERIA, strict=True))
    call = rules.calls(made(**measured))[names[rule]]
    assert {1: "good", 0: "medium", -1: "poor"}[call] == said


def test_calls_of_a_run() -> None:
    fine = rules.calls(made(val_er=0.81, train_er=0.82, phase1_history=history()))
    assert list(fine.values()) == [1, 1, 1, 0, 0, 0, 0]
    rows = history(val_er=0.65)
    poor = rules.calls(made(val_er=0.6, phase1_iterations=40, phase1_history=rows))
    assert list(poor.values()) == [-1, -1, -1, -1, 0, 0, -1]
    with pytest.raises(ValueError, match=r"^val_er: got 77"):
        rules.calls(made(val_er=77.0))


@pytest.mark.parametrize(
    ("measured", "lights", "overall"),
    [
        (dict(val_er=0.81, train_er=0.82, phase1_iterations=20), "🟢🟢🟢", "🟢 good"),
        (dict(val_er=0.81, train_er=0.84, phase1_iterations=28), "🟢🟡🟡", "🟡 medium"),
        (dict(val_er=0.81, train_er=0.87, phase1_iterations=28), "🟢🟡🔴", "🔴 review"),
        (dict(val_er=0.70, train_er=0.71, phase1_iterations=20), "🔴🟢🟢", "🔴 review"),
    ],
)
def test_the_checklist_is_as_good_as_its_worst_criterion(
    measured: dict[str, Any], lights: str, overall: str
) -> None:
    said = rules.judge(made(**measured))
    assert list(said) == [*rules.CRITERIA, "overall", "early abort"]
    assert "".join(said[name][0] for name in rules.CRITERIA) == lights
    assert said["overall"] == overall
    assert said["early abort"] == ""


def test_the_checklist_says_why_the_run_would_have_been_given_up() -> None:
    said = rules.judge(made(val_er=0.81, train_er=0.82, phase1_history=history(val_er=0.65)))
    assert said["early abort"] == "effective rank 65.0% under 70%"
    assert said["overall"] == "🟢 good"  # it went on, and ended well


def ranked(
    perplexities: Sequence[float], ranks: Sequence[float], *, seeds: int = 1, **measured: Any
) -> Results:
    """Configurations at one size, each with its rank and perplexity; seeds are copies."""
    return Results(
        made(dict(context_dim=64 + number, seed=seed), val_ppl=ppl, val_er=rank / 100, **measured)
        for number, (ppl, rank) in enumerate(zip(perplexities, ranks, strict=True))
        for seed in range(seeds)
    )


def row(results: Sequence[Result], rule: str = "validation ER") -> pd.Series:
    return rules.score(results).set_index("rule").loc[rule]


UP = [90.0, 92.0, 94.0, 96.0, 104.0, 106.0, 108.0, 110.0]
DOWN = [85.0, 84.0, 83.0, 82.0, 74.0, 73.0, 72.0, 71.0]


def test_a_perfect_rule() -> None:
    found = row(ranked(UP, DOWN))
    assert (found.called, found.right, found.hit_rate) == (8, 8, 1)
    assert found.base_rate == 0.5
    assert found.excess == 0.5
    assert found.low > 0
    # Of the 70 ways to place four calls of each kind, two are as far from a half.
    assert found.p == pytest.approx(2 / 70, abs=0.015)
    assert found.remark == ""


def test_a_reversed_rule() -> None:
    found = row(ranked(UP, DOWN[::-1]))
    assert (found.right, found.hit_rate, found.excess) == (0, 0, -0.5)
    assert found.high < 0
    assert found.p == pytest.approx(2 / 70, abs=0.015)


def test_a_random_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "PERMUTATIONS", 50)
    generator = np.random.default_rng(6)
    hits = small = undefined = 0
    excess = []
    for _ in range(200):
        found = row(configurations(generator, 8, own=0.05, noise=0.01, sizes=[50_000]))
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
    results = ranked([80, 90, 100, 110, 120, 130], [85, 70, 81, 77, 84, 60])
    results += ranked([50, 60, 70, 80], [85, 70, 77, 77], train_tokens=99_000)
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
    uneven = row(ranked([80, 80, 80, 100, 120], [85, 85, 85, 84, 77]))
    assert uneven.remark == "calls only good; 3 at the median of the size"
    assert (uneven.called, uneven.hit_rate, uneven.base_rate) == (1, 0, 0)


def test_runs_are_compared_within_their_own_size() -> None:
    # Every run of the larger size has a lower perplexity than any of the smaller.
    results = ranked(UP, DOWN) + ranked([p / 2 for p in UP], DOWN, train_tokens=99_000)
    assert row(results).hit_rate == 1


def test_seeds_are_no_new_evidence() -> None:
    ranks = [85.0, 84.0, 73.0, 82.0, 74.0, 83.0, 72.0, 71.0]
    once, thrice = row(ranked(UP, ranks)), row(ranked(UP, ranks, seeds=3))
    assert thrice.called == 3 * once.called
    for name in ("hit_rate", "base_rate", "low", "high", "p"):
        assert thrice[name] == pytest.approx(once[name])
    assert 0.1 < once.p < 1
    assert once.low < 0 < once.high


def test_interval_is_the_jackknife_over_configurations() -> None:
    ranks = [85.0, 84.0, 73.0, 82.0, 74.0, 83.0, 72.0, 71.0]
    results = ranked(UP, ranks)
    whole = row(results)
    left = [row([r for r in results if r is not out]).excess for out in results]
    half = stats.t.ppf(0.975, 7) * np.sqrt(7 / 8 * np.sum((np.array(left) - whole.excess) ** 2))
    assert (whole.low, whole.high) == pytest.approx((whole.excess - half, whole.excess + half))


def test_the_run_at_the_median_is_neither() -> None:
    found = row(ranked([90, 95, 100, 105, 110], [85, 84, 83, 70, 71]))
    assert (found.called, found.right, found.hit_rate) == (4, 4, 1)
    assert found.remark == "1 at the median of the size"


def test_rules_that_say_little() -> None:
    medium = row(ranked(UP, [77] * 8))
    assert (medium.called, medium.right) == (0, 0)
    assert medium[["hit_rate", "base_rate", "excess", "low", "high", "p"]].isna().all()
    assert medium.remark == "calls no run good or poor"
    good = row(ranked(UP, [85] * 8))
    assert (good.called, good.hit_rate, good.excess, good.p) == (8, 0.5, 0, 1)
    assert np.isnan(good.low)
    assert good.remark == "calls every run good: tells nothing apart"
    some = row(ranked(UP, [70] * 2 + [77] * 6))
    assert (some.called, some.hit_rate, some.base_rate) == (2, 0, 0.5)
    assert some.remark == "calls only poor"
    # One configuration makes all the calls: without it there is nothing to estimate.
    one = row(ranked(UP, [85] + [77] * 7))
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
        results = ranked(UP, [77] * 8)
        for number, result in enumerate(results):
            # The last three would be given up, and the first: it turned out well.
            given_up = number in (0, 5, 6, 7)
            result.phase1_history = history(**(change if given_up else {}))
        results[3].phase1_history = history(12)
        table = rules.score(results).set_index("rule")
        for name in (rule, rules.ANY_ABORT):
            assert (table.called[name], table.right[name]) == (4, 3)
            assert table.hit_rate[name] == 0.75
            assert table.base_rate[name] == 0.5
            assert table.remark[name] == "calls only poor"
        for name in ways.keys() - {rule}:
            assert table.called[name] == 0
            assert table.remark[name] == "calls no run good or poor"


def test_all_rules_have_their_row() -> None:
    results = ranked(UP, DOWN)
    for number, result in enumerate(results):
        result.phase1_iterations = (24, 33)[number % 2]
        result.train_er = result.val_er + (0.06, 0.01)[number // 4]
    table = rules.score(results)
    assert table.columns.tolist() == [
        *("rule", "called", "right", "hit_rate", "base_rate", "excess", "low", "high", "p"),
        "remark",
    ]
    assert table.rule.tolist() == [
        *("validation ER", "iterations", "train − validation ER gap"),
        *(ER_RULE, STALLS, NO_FALL, "any abort rule"),
    ]
    assert table.hit_rate[:3].tolist() == [1, 0.5, 0]
    assert rules.score(results).equals(table), "the same each time"


def test_runs_given_up_are_counted_and_left_out() -> None:
    gone = [made(dict(context_dim=99), val_ppl=None, aborted="loss 1 -> 2", val_er=0.5)] * 2
    before, after = row(ranked(UP, DOWN)), row([*ranked(UP, DOWN), *gone])
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
        rules.score(results)
