"""Note 004's rules of thumb for a Phase 1, and how often they are right about the perplexity."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cvfp import abort as abort_rules
from cvfp.analysis import intervals, prediction, published
from cvfp.config import ParameterError
from cvfp.result import Result

# Note 004's checklist, points of effective rank; the other thresholds are in its tables.
GAP_GOOD, GAP_POOR = 2.0, 5.0
CRITERIA = ("validation ER", "iterations", "train − validation ER gap")
# The abort rules, and how `abort_rules.reason` begins to name each.
ABORTS: Mapping[str, str] = {
    f"ER < {100 * abort_rules.RANK:.0f} % at iteration {abort_rules.ITERATION}": "effective rank",
    "convergence stalls": "converged tokens",
    "loss does not fall": "loss",
}
ANY_ABORT = "any abort rule"
PERMUTATIONS = 2000

_RULES = (*CRITERIA, *ABORTS, ANY_ABORT)
_RATES = ("hit_rate", "base_rate", "excess", "low", "high", "p")


def calls(result: Result) -> dict[str, int]:
    """What each rule says of a run when its Phase 1 has ended: 1 good, -1 poor, 0 neither.

    Validation ER is good over 80 % of D, poor under 75 %; iterations are good up to 25, poor over
    30 (for a run that was cut off, the count it reached); the gap of training minus validation ER
    is good up to 2 points, poor from 5 on. An abort rule says poor or nothing. Raises ValueError:
    an effective rank that is no fraction of D, or a run without a Phase 1."""
    for name, value in zip(("train_er", "val_er"), result.ranks, strict=True):
        if not 0 < value <= 1:
            raise ParameterError(name, value, "a fraction of D, above 0, up to 1")
    rank_good, rank_poor, quick, slow = _thresholds()
    # Rounded, for 0.85 - 0.80 is a little under 5 points.
    train_er, val_er = result.ranks
    rank = round(100 * val_er, 6)
    gap = round(100 * (train_er - val_er), 6)
    count, _ = result.phase1_end
    by_criterion = (
        int(rank > rank_good) - int(rank < rank_poor),
        int(count <= quick) - int(count > slow),
        int(gap <= GAP_GOOD) - int(gap >= GAP_POOR),
    )
    reasons = (abort_rules.reason(result.phase1_history) or "").split("; ")
    said = dict(zip(CRITERIA, by_criterion, strict=True))
    said |= {rule: -any(one.startswith(start) for one in reasons) for rule, start in ABORTS.items()}
    return said | {ANY_ABORT: -any(reasons)}


def judge(result: Result) -> dict[str, str]:
    """Note 004's checklist for a run when its Phase 1 has ended: each criterion's verdict, by the
    note's lights; overall, which is the worst; and why the note would have given the run up before
    its end ("": it would not). Raises as `calls` does."""
    said = {name: call for name, call in calls(result).items() if name in CRITERIA}
    said["overall"] = min(said.values())
    words = {name: ("🟡 medium", "🟢 good", "🔴 review")[call] for name, call in said.items()}
    return {**words, "early abort": abort_rules.reason(result.phase1_history) or ""}


@functools.cache
def _thresholds() -> tuple[float, ...]:
    # Percent above which a rank is good, under which poor; iterations up to which, over which.
    rank = published.table("004_er_thresholds").set_index("verdict")
    count = published.table("004_iteration_thresholds").set_index("verdict").iterations_high
    ends = rank.val_er_low["good"], rank.val_er_high["needs review"]
    return tuple(map(float, (*ends, count["optimal"], count["ordinary"])))


def score(results: Sequence[Result]) -> pd.DataFrame:
    """Score note 004's rules: do they tell better runs from worse?

    A run is better or worse by its perplexity, against the median of the runs with as many
    training tokens; one at the median does not count, nor does one that was given up. A rule is
    right about a run that it calls good and that is better, or poor and worse; "medium" is no call.
    An abort rule only calls poor. The runs are of one corpus and tokeniser, and went on whatever
    the abort rules said.

    One row a rule: called, right (runs); hit_rate (right / called); base_rate (expected if as many
    calls of each kind fell on the runs of each size at random); excess (hit_rate − base_rate); low,
    high (its 95 % interval: a jackknife over configurations, of no width where a rule is always
    right or wrong); p (permutation test: configurations change places within the sizes, 2,000
    times); remark. Missing: undefined. Raises ValueError: no two runs of one size whose
    perplexities differ, or as `calls`."""
    columns = ["configuration", "tokens", "ppl", *_RULES]
    there = [one for one in results if one.aborted is None and one.val_ppl is not None]
    names = [prediction.label(one.experiment.to_dict()) for one in there]
    figures = [(one.train_tokens, one.val_ppl, *calls(one).values()) for one in there]
    rows = [(name, *row) for name, row in zip(names, figures, strict=True)]
    runs = pd.DataFrame(rows, columns=columns).astype({"ppl": float})
    outcomes = _outcomes(runs)
    if not outcomes.any():
        accepted = "two or more with the same training tokens and different perplexities"
        raise ParameterError("results", f"{len(runs)} runs with a perplexity", accepted)
    # Medians are those of the configurations left.
    without = [
        _outcomes(runs.assign(ppl=runs.ppl.where(runs.configuration != label)))
        for label in runs.configuration.unique()
    ]
    given_up, median = len(results) - len(runs), int((outcomes == 0).sum())
    common = [f"{given_up} given up, no perplexity"] if given_up else []
    common += [f"{median} at the median of the size"] if median else []
    scores = []
    for rule in _RULES:
        remark = "; ".join([*_remarks(runs, rule, outcomes), *common])
        scores.append({"rule": rule, **_scored(runs, rule, outcomes, without), "remark": remark})
    return pd.DataFrame(scores).astype(dict.fromkeys(_RATES, float))


def _outcomes(runs: pd.DataFrame) -> NDArray[np.float64]:
    """1 where a run is better than the median of its size, -1 where worse, 0 where neither."""
    median = runs.groupby("tokens").ppl.transform("median")
    return np.nan_to_num(np.sign((median - runs.ppl).to_numpy(float)))


def _scored(
    runs: pd.DataFrame,
    rule: str,
    outcomes: NDArray[np.float64],
    without: Sequence[NDArray[np.float64]],
) -> dict[str, Any]:
    calls, sizes = runs[rule].to_numpy(), pd.factorize(runs.tokens)[0]

    def rates(outcomes: NDArray[np.float64]) -> tuple[float, float] | None:
        """Hit rate and that of chance; None where the rule calls nothing."""
        called = calls * outcomes != 0
        if not called.any():
            return None
        # A call falls by chance on a better run as often as its size has better runs.
        counted = np.bincount(sizes, outcomes != 0)
        better = (np.bincount(sizes, outcomes > 0) / np.maximum(1, counted))[sizes]
        chance = np.where(calls > 0, better, 1 - better)
        return float((calls == outcomes)[called].mean()), float(chance[called].mean())

    observed = rates(outcomes)
    if observed is None:
        return {"called": 0, "right": 0, **dict.fromkeys(_RATES)}
    hit, base = observed
    low = high = None
    if len(set(calls[outcomes != 0])) > 1:
        excesses = [None if r is None else r[0] - r[1] for r in map(rates, without)]
        low, high = intervals.jackknife(hit - base, excesses)
    figures = hit, base, hit - base, low, high, _permuted(runs, rule, outcomes, hit, base)
    called, right = int((calls * outcomes != 0).sum()), int((calls * outcomes > 0).sum())
    return {"called": called, "right": right, **dict(zip(_RATES, figures, strict=True))}


def _permuted(
    runs: pd.DataFrame, rule: str, outcomes: NDArray[np.float64], hit: float, base: float
) -> float:
    """p of a permutation test: how often chance is as far from the base rate as the rule."""
    number = runs.groupby(["configuration", "tokens"]).cumcount()
    places = runs.groupby(["tokens", number]).ngroup()
    labels, names = pd.factorize(runs.configuration)
    calls, results = np.zeros((2, len(names), len(runs)))
    calls[labels, places], results[labels, places] = runs[rule], outcomes
    # [configurations, configurations]: calls of the one on outcomes of the other, right minus
    # wrong, and how many.
    margins, counts = calls @ results.T, np.abs(calls) @ np.abs(results).T
    one = np.arange(len(names))
    other = np.random.default_rng(0).permuted(np.tile(one, (PERMUTATIONS, 1)), axis=1)
    margin, count = margins[one, other].sum(axis=1), counts[one, other].sum(axis=1)
    rates = (1 + margin[count > 0] / count[count > 0]) / 2
    far = np.abs(rates - base) >= abs(hit - base) - 1e-9
    return float((1 + far.sum()) / (1 + len(rates)))


def _remarks(runs: pd.DataFrame, rule: str, outcomes: NDArray[np.float64]) -> list[str]:
    kinds = set(runs[rule][outcomes != 0])
    names = [name for name, call in (("good", 1), ("poor", -1)) if call in kinds]
    if not names:
        return ["calls no run good or poor"]
    if len(kinds) == 1:
        return [f"calls every run {names[0]}: tells nothing apart"]
    return [f"calls only {names[0]}"] if len(names) == 1 else []
