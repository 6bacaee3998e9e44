"""Differences between runs that share seeds and held-out conversations, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from cvfp.result import Result

LEVEL = 0.95  # of every interval
# Value, low and high end, degrees of freedom of the interval's Student's t.
Estimate = tuple[float | None, float | None, float | None, float | None]


@dataclass(frozen=True)
class Crossed:
    """A mean over seeds and held-out conversations, and its 95 % interval for others of both: None,
    with all that belongs to it, where there are fewer than two of either."""

    value: float
    low: float | None
    high: float | None
    seeds: int  # how many
    conversations: int
    by_seed: tuple[float, ...]  # the value of each seed
    seed_share: float | None  # the seeds' share of the variance
    freedom: float | None = None  # degrees of freedom of the interval's Student's t

    @property
    def estimate(self) -> Estimate:
        return self.value, self.low, self.high, self.freedom


class Paired(Crossed):
    """How much the perplexity of one set of runs differs from another's: relative, exp of the mean
    difference of nats per token, minus 1. Under 0: the first is better."""

    @property
    def change(self) -> float:
        """The value."""
        return self.value

    @property
    def half_width(self) -> float | None:
        """Half the interval, in units of relative change; None without one."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def needed(self, half_width: float) -> tuple[int, int] | None:
        """About how many seeds and conversations an interval of that half-width takes, both raised
        alike; None without an interval."""
        if self.half_width is None:
            return None
        times = (self.half_width / half_width) ** 2
        return math.ceil(self.seeds * times), math.ceil(self.conversations * times)


def student(freedom: float) -> float:
    """Half the width of Student's 95 % interval, in standard errors."""
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def paired(first: Sequence[Result], second: Sequence[Result]) -> Paired:
    """Compare runs seed by seed and conversation by conversation.

    Both vary by chance: another seed trains another model, other conversations score it
    differently. The mean over both has the variance of the seeds' means plus that of the
    conversations' (each contains a share of their interaction, which is thus counted twice: the
    interval errs on the wide side). Student's t, degrees of freedom by Satterthwaite. Raises
    ValueError: other seeds or conversations in the one than in the other, a seed twice, or none."""
    ours = {result.experiment.seed: result for result in first}
    theirs = {result.experiment.seed: result for result in second}
    if not ours or ours.keys() != theirs.keys() or not len(ours) == len(first) == len(second):
        one, other = ([r.experiment.seed for r in runs] for runs in (first, second))
        got = f"seeds {one} and {other}"
        raise ValueError(f"first, second: got {got}; accepted: the same seeds, each once")
    pairs = [(ours[seed].val_conversations, theirs[seed].val_conversations) for seed in ours]
    tokens = np.array([one["tokens"] for one in pairs[0][0]])
    if any([one["tokens"] for one in run] != tokens.tolist() for runs in pairs for run in runs):
        raise ValueError("first, second: scored on different held-out conversations")
    if len(tokens) == 0:
        raise ValueError("first, second: got runs without a Phase 2; accepted: runs with one")
    # [seeds, conversations]: difference in nats
    nats = np.array([[a["nats"] - b["nats"] for a, b in zip(*runs, strict=True)] for runs in pairs])
    return relative(crossed(nats, tokens))


def relative(mean: Crossed, times: float = 1.0) -> Paired:
    """The relative change that a mean of nats, so many times, is."""
    low, high = (None if e is None else math.expm1(times * e) for e in (mean.low, mean.high))
    by_seed = tuple(math.expm1(times * one) for one in mean.by_seed)
    rest = mean.seeds, mean.conversations, by_seed, mean.seed_share, mean.freedom
    return Paired(math.expm1(times * mean.value), low, high, *rest)


def crossed(nats: np.ndarray, tokens: np.ndarray) -> Crossed:
    """Mean nats per token over seeds and conversations; its interval is explained in `paired`.
    `nats` [seeds, conversations] may be any sum over runs that is linear in their nats."""
    seeds, conversations = nats.shape
    by_seed = nats.sum(axis=1) / tokens.sum()
    mean = float(by_seed.mean())
    low = high = share = freedom = None
    if seeds > 1 and conversations > 1:
        over_seeds = float(by_seed.var(ddof=1)) / seeds
        # A ratio estimator: conversations count by their tokens.
        rest = nats.mean(axis=0) - mean * tokens
        more = conversations - 1
        over_conversations = float((rest**2).sum() / tokens.sum() ** 2 * conversations / more)
        variance, freedom = over_seeds + over_conversations, 1.0
        if variance > 0:
            share = over_seeds / variance
            freedom = 1 / (share**2 / (seeds - 1) + (1 - share) ** 2 / more)
        half = student(freedom) * math.sqrt(variance)
        low, high = mean - half, mean + half
    return Crossed(mean, low, high, seeds, conversations, tuple(by_seed.tolist()), share, freedom)


def side(low: float | None, high: float | None) -> int | None:
    """Where an interval lies: 1 above 0, -1 under it, 0 around it; None without an interval."""
    if low is None or high is None:
        return None
    return int(low > 0) - int(high < 0)


def mean(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of independent values (one a seed, say) with Student's t interval; None for one value.
    Raises ValueError: no values, or one that is not finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"values: got {list(values)}; accepted: finite numbers, at least one")
    centre = float(array.mean())
    if array.size == 1:
        return centre, None, None
    half = student(array.size - 1) * float(stats.sem(array))
    return centre, centre - half, centre + half


def jackknife(value: float, without: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Interval of an estimate from the estimates that leave out one cluster each: Student's t, one
    degree of freedom less than clusters. None with fewer than two, or where an estimate without one
    of them does not exist (None in `without`)."""
    left = [one for one in without if one is not None]
    count = len(without)
    if count < 2 or len(left) < count:
        return None, None
    variance = (count - 1) / count * sum((one - value) ** 2 for one in left)
    half = student(count - 1) * math.sqrt(variance)
    return value - half, value + half
