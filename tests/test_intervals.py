"""Paired differences: their estimate, and how often their intervals hold the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from conftest import tiny_experiment
from scipy import stats
from synthetic import made, scored

import cvfp
from cvfp import Result
from cvfp.analysis.intervals import Paired, crossed, paired

TRUTH = 0.03  # nats per token by which the first set of runs is worse


def result(seed: int, tokens: np.ndarray, nats: np.ndarray) -> Result:
    return made({"seed": seed}, **scored(tokens, nats))


def both(difference: np.ndarray, tokens: np.ndarray) -> tuple[list[Result], list[Result]]:
    """Runs of seeds 0, 1, … that differ by `difference` [seeds, conversations], nats per token."""
    generator = np.random.default_rng(11)
    first, second = [], []
    for seed, row in enumerate(difference):
        common = generator.uniform(3, 6, len(tokens))  # hard and easy conversations
        first.append(result(seed, tokens, tokens * (common + row)))
        second.append(result(seed, tokens, tokens * common))
    return first, second


def perplexity(runs: Sequence[Result]) -> float:
    """Of all runs together: every seed counts alike."""
    each = [
        sum(row["nats"] for row in run.val_conversations)
        / sum(row["tokens"] for row in run.val_conversations)
        for run in runs
    ]
    return math.exp(sum(each) / len(each))


def effects(
    generator: np.random.Generator, shape: tuple[int, int], spread: tuple[float, float, float]
) -> np.ndarray:
    """TRUTH, and what seeds, conversations and the two together add to it by chance."""
    by_seed, by_conversation, together = spread
    seeds, conversations = shape
    return (
        TRUTH
        + generator.normal(0, by_seed, (seeds, 1))
        + generator.normal(0, by_conversation, (1, conversations))
        + generator.normal(0, together, shape)
    )


def lengths(generator: np.random.Generator, conversations: int) -> np.ndarray:
    """Tokens of conversations, the longest several times as many as the shortest."""
    return generator.integers(60, 400, conversations).astype(float)


def interval(pair: Paired) -> tuple[float, float]:
    assert pair.low is not None
    assert pair.high is not None
    return pair.low, pair.high


# The estimate


def test_change_of_one_seed_is_the_ratio_of_perplexities() -> None:
    generator = np.random.default_rng(0)
    tokens = lengths(generator, 20)
    first, second = both(effects(generator, (1, 20), (0, 0.1, 0.1)), tokens)
    pair = paired(first, second)
    assert pair.change == pytest.approx(perplexity(first) / perplexity(second) - 1, abs=1e-12)
    assert pair.by_seed == (pair.change,)
    assert (pair.seeds, pair.conversations) == (1, 20)


def test_change_of_several_seeds_is_the_ratio_of_their_mean_perplexities() -> None:
    generator = np.random.default_rng(1)
    tokens = lengths(generator, 12)
    first, second = both(effects(generator, (4, 12), (0.1, 0.1, 0.1)), tokens)
    pair = paired(first, second)
    assert pair.change == pytest.approx(perplexity(first) / perplexity(second) - 1, abs=1e-12)
    alone = [perplexity([a]) / perplexity([b]) - 1 for a, b in zip(first, second, strict=True)]
    assert pair.by_seed == pytest.approx(alone, abs=1e-12)
    assert (pair.seeds, pair.conversations) == (4, 12)


def test_change_of_real_runs_is_that_of_their_val_ppl() -> None:
    small = tiny_experiment(samples=2, phase2_epochs=1, phase2_batch_size=256)
    runs = cvfp.sweep(small, training_contexts=["parallel", "exact"], seed=[0, 1])
    pair = paired(runs[:2], runs[2:])
    ratios = [
        a.val_ppl / b.val_ppl
        for a, b in zip(runs[:2], runs[2:], strict=True)
        if a.val_ppl is not None and b.val_ppl is not None
    ]
    assert pair.by_seed == pytest.approx([ratio - 1 for ratio in ratios], abs=1e-9)
    assert pair.change == pytest.approx(math.sqrt(ratios[0] * ratios[1]) - 1, abs=1e-9)
    low, high = interval(pair)
    assert low < pair.change < high
    assert (pair.seeds, pair.conversations) == (2, small.validation_samples)


def test_a_long_conversation_counts_by_its_tokens() -> None:
    tokens = np.array([100.0, 900.0])
    first, second = both(np.array([[0.1, 0.2], [0.1, 0.2]]), tokens)
    assert paired(first, second).change == pytest.approx(math.expm1(0.1 * 0.1 + 0.9 * 0.2))
    # Also in the interval: here the short one differs from the rest by just as much.
    tokens = np.array([10.0, *[500.0] * 9])
    odd_short, odd_long = np.full((2, 10), 0.1), np.full((2, 10), 0.1)
    odd_short[:, 0], odd_long[:, 1] = 0.4, 0.4
    narrow, wide = (paired(*both(odd, tokens)).half_width for odd in (odd_short, odd_long))
    assert narrow is not None
    assert wide is not None
    assert narrow < wide / 10


def test_swapping_turns_the_difference_round() -> None:
    generator = np.random.default_rng(2)
    tokens = lengths(generator, 15)
    first, second = both(effects(generator, (3, 15), (0.05, 0.2, 0.1)), tokens)
    pair, swapped = paired(first, second), paired(second, first)

    def turned(x: float) -> float:
        return 1 / (1 + x) - 1

    (low, high), (swapped_low, swapped_high) = interval(pair), interval(swapped)
    assert swapped.change == pytest.approx(turned(pair.change), abs=1e-12)
    assert swapped_low == pytest.approx(turned(high), abs=1e-12)
    assert swapped_high == pytest.approx(turned(low), abs=1e-12)
    assert swapped.by_seed == pytest.approx([turned(x) for x in pair.by_seed], abs=1e-12)
    assert swapped.seed_share == pytest.approx(pair.seed_share)


def test_runs_are_paired_by_seed_in_whatever_order() -> None:
    generator = np.random.default_rng(3)
    tokens = lengths(generator, 10)
    first, second = both(effects(generator, (3, 10), (0.2, 0.1, 0)), tokens)
    pair = paired(first, second)
    assert paired(first, second[::-1]) == pair
    turned = paired(first[::-1], second)
    assert turned.by_seed == pair.by_seed[::-1]
    assert turned.change == pytest.approx(pair.change)


def test_equal_runs_differ_by_nothing() -> None:
    tokens = np.array([50.0, 70.0, 20.0])
    first, _ = both(np.full((2, 3), 0.1), tokens)
    pair = paired(first, first)
    assert (pair.change, pair.low, pair.high, pair.half_width) == (0, 0, 0, 0)
    assert pair.by_seed == (0, 0)
    assert pair.seed_share is None


# The interval


def test_interval_of_seeds_alone_is_students() -> None:
    by_seed = np.array([0.02, 0.05, -0.01, 0.03])
    pair = paired(*both(np.tile(by_seed[:, None], 9), np.arange(10.0, 19)))
    wanted = stats.ttest_1samp(by_seed, 0).confidence_interval(0.95)
    assert interval(pair) == pytest.approx((math.expm1(wanted.low), math.expm1(wanted.high)))
    assert pair.change == pytest.approx(math.expm1(by_seed.mean()))
    assert pair.seed_share == pytest.approx(1)


def test_interval_of_conversations_alone_is_students() -> None:
    generator = np.random.default_rng(4)
    by_conversation = generator.normal(TRUTH, 0.1, 13)
    pair = paired(*both(np.tile(by_conversation, (3, 1)), np.full(13, 80.0)))
    wanted = stats.ttest_1samp(by_conversation, 0).confidence_interval(0.95)
    assert interval(pair) == pytest.approx((math.expm1(wanted.low), math.expm1(wanted.high)))
    assert pair.seed_share == pytest.approx(0, abs=1e-12)


def test_variances_of_seeds_and_conversations_add_up() -> None:
    # Effects of mean zero, so that each part's variance is its own.
    by_seed, by_conversation = np.array([-0.03, 0.0, 0.03]), np.array([-0.2, 0.1, 0.3, -0.2])
    pair = paired(*both(by_seed[:, None] + by_conversation, np.full(4, 60.0)))
    parts = by_seed.var(ddof=1) / 3, by_conversation.var(ddof=1) / 4
    total = sum(parts)
    freedom = total**2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 3)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(total)
    assert interval(pair) == pytest.approx((math.expm1(-half), math.expm1(half)))
    assert pair.seed_share == pytest.approx(parts[0] / total)
    assert pair.half_width == pytest.approx(math.sinh(half))


def test_interval_with_unequal_conversations_is_that_of_a_ratio() -> None:
    generator = np.random.default_rng(5)
    tokens, by_conversation = lengths(generator, 30), generator.normal(TRUTH, 0.1, 30)
    pair = paired(*both(np.tile(by_conversation, (2, 1)), tokens))
    ratio = (tokens * by_conversation).sum() / tokens.sum()
    # The textbook's: residuals about the ratio, over the mean length.
    residuals = tokens * by_conversation - ratio * tokens
    error = math.sqrt((residuals**2).sum() / 29 / 30) / tokens.mean()
    half = stats.t.ppf(0.975, 29) * error
    assert interval(pair) == pytest.approx((math.expm1(ratio - half), math.expm1(ratio + half)))


@pytest.mark.parametrize(("seeds", "conversations"), [(1, 20), (3, 1), (1, 1)])
def test_one_seed_or_one_conversation_has_no_interval(seeds: int, conversations: int) -> None:
    generator = np.random.default_rng(7)
    difference = effects(generator, (seeds, conversations), (0.1, 0.1, 0.1))
    pair = paired(*both(difference, lengths(generator, conversations)))
    assert math.isfinite(pair.change)
    assert (pair.low, pair.high, pair.half_width, pair.seed_share) == (None, None, None, None)
    assert len(pair.by_seed) == pair.seeds == seeds


@pytest.mark.parametrize("shape", [(3, 20), (5, 50)], ids=str)
@pytest.mark.parametrize(
    "spread",
    [
        pytest.param((0.05, 0.02, 0.02), id="seeds"),
        pytest.param((0.002, 0.2, 0.02), id="conversations"),
        pytest.param((0.03, 0.15, 0.05), id="both"),
        pytest.param((0.0, 0.0, 0.2), id="together only"),
    ],
)
def test_interval_holds_the_truth_as_often_as_it_says(
    shape: tuple[int, int], spread: tuple[float, float, float]
) -> None:
    generator = np.random.default_rng(8)
    hits, trials = 0, 4000
    for _ in range(trials):
        tokens = lengths(generator, shape[1])
        found = crossed(effects(generator, shape, spread) * tokens, tokens)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= TRUTH <= found.high
    # 95 % promised, somewhat less where few seeds dominate (Satterthwaite's degrees of freedom are
    # estimated), and more where chance that seeds and conversations share is counted twice.
    assert 0.92 * trials <= hits <= trials


@pytest.mark.parametrize(
    ("spread", "least", "most"),
    [((0.05, 0.02, 0.0), 0.9, 1.0), ((0.002, 0.2, 0.0), 0.0, 0.05), ((0.0, 0.0, 0.2), 0.1, 0.9)],
    ids=["seeds", "conversations", "together only"],
)
def test_share_of_the_seeds_tells_what_dominates(
    spread: tuple[float, float, float], least: float, most: float
) -> None:
    generator = np.random.default_rng(9)
    runs = both(effects(generator, (5, 50), spread), lengths(generator, 50))
    share = paired(*runs).seed_share
    assert share is not None
    assert least <= share <= most


# Errors

TOKENS = np.array([30.0, 40.0, 50.0])


def run(seed: int, tokens: np.ndarray = TOKENS) -> Result:
    return result(seed, tokens, 4 * tokens)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([0, 1], [0, 2]),
        ([0, 1], [0]),
        ([0], [0, 1]),
        ([0, 0], [0]),
        ([0, 0, 1], [0, 1, 1]),
        ([], []),
        ([], [0]),
    ],
    ids=str,
)
def test_seeds_that_cannot_be_paired_are_named(first: list[int], second: list[int]) -> None:
    with pytest.raises(ValueError, match="accepted: the same seeds, each once") as caught:
        paired([run(seed) for seed in first], [run(seed) for seed in second])
    assert f"got seeds {first} and {second}" in str(caught.value)


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("tokens", [[30, 41, 50], [40, 30, 50], [30, 40], [30, 40, 50, 60], []])
def test_other_conversations_are_refused_wherever_they_are(
    place: tuple[int, int], tokens: list[int]
) -> None:
    sets = [[run(0), run(1)], [run(0), run(1)]]
    which, seed = place
    sets[which][seed] = run(seed, np.array(tokens, dtype=float))
    with pytest.raises(ValueError, match="different held-out conversations"):
        paired(sets[0], sets[1])


def test_runs_given_up_are_no_pair_of_others() -> None:
    nothing = np.array([])
    for sets in (([run(0, nothing)], [run(0)]), ([run(0)], [run(0, nothing)])):
        with pytest.raises(ValueError, match="different held-out conversations"):
            paired(*sets)


def test_repeated_seeds_of_the_second_are_refused() -> None:
    with pytest.raises(ValueError, match="each once"):
        paired([run(0), run(1)], [run(0), run(1), run(1)])


def test_runs_without_a_perplexity_are_refused() -> None:
    given_up = [run(0, np.array([])), run(1, np.array([]))]
    with pytest.raises(ValueError, match="first, second"):
        paired(given_up, given_up)
