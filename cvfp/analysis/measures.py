"""From finished runs to the measurement of each claim: one number with an interval.

Where runs differ by seed alone, the interval is over seeds (and held-out conversations); where a
claim is about configurations, it is over configurations, each the mean of its sizes and seeds. A
claim that the runs cannot measure is left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from cvfp.analysis import comparison, intervals, prediction, rules, scaling, stopping
from cvfp.analysis.claims import Measurement
from cvfp.gap import AS_LEFT, Gap
from cvfp.result import Result, Results

# What the sentences of claims.toml ask of the runs: conversations (C10), tokens of the largest size
# over those of the smallest (C19), tokens of a timed stream and what counts as equal there (C3).
C10_SIZE, C19_RATIO, C3_TOKENS, C3_ERROR = 500, 8, 10_000, 1e-4


class Source:
    """Which notebook measured, with which parameters, on what.

    Args:
        notebook: its file name, without the ending.
        one: any of its runs, all of the same corpus, tokeniser and device.
        parameters: the notebook's; those left at None are left out.
    """

    def __init__(self, notebook: str, one: Result, **parameters: Any) -> None:
        self.notebook = notebook
        self.parameters = {name: x for name, x in parameters.items() if x is not None}
        exp = one.experiment
        self.ran_on = (
            f"{exp.dataset}, {exp.tokenizer} ({one.vocab_size:,}), table {exp.embedding}, "
            f"{one.device_name}, {one.precision}"
        )

    def measured(
        self, value: float, low: float | None, high: float | None, seeds: int, words: str
    ) -> Measurement:
        by = self.notebook, self.parameters, self.ran_on
        return Measurement(value, low, high, seeds, words, *by)

    def over(self, values: Sequence[float], seeds: int, words: str) -> Measurement:
        """Mean and interval of independent values."""
        return self.measured(*intervals.mean(values), seeds, words)


def contexts(
    gaps: Sequence[Gap], timed: Sequence[pd.DataFrame], source: Source
) -> dict[str, Measurement]:
    """C2 and C3, from one `Gap` and one table of `gap.times` a seed."""
    cosines = [float(one.agreement.cosine_mean[AS_LEFT]) for one in gaps]
    words = f"mean over {gaps[0].tokens:,} training tokens"
    claims = {"C2": source.over(cosines, len(gaps), words)}
    rows = [frame[frame.sequential.notna() & (frame.tokens >= C3_TOKENS)] for frame in timed]
    if rows and all(len(frame) for frame in rows):
        last = [frame.iloc[-1] for frame in rows]
        ratios = [float(row.sequential / row.blocks) for row in last]
        worst = max(float(row.difference) for row in last)
        # A fast method that is wrong does not count.
        if worst <= C3_ERROR:
            tokens = f"{last[0].tokens:,.0f} tokens in blocks"
            words = f"{tokens}; largest relative difference {worst:.0e}"
            claims["C3"] = source.over(ratios, len(ratios), words)
    return claims


def ladder(
    results: Sequence[Result], fixed: Sequence[Result], source: Source
) -> dict[str, Measurement]:
    """C6, C7, C10, C15 and C19, from a ladder of sizes and from runs of all epochs.

    Args:
        fixed: runs of one size, one a seed, that stopped at no epoch but the last.
    """
    seeds = _by_seed(results)
    sizes = sorted({result.experiment.samples for result in results})
    claims = {}
    if len(sizes) > 1:
        claims["C6"] = _alpha(results, source)
    if len(sizes) >= 5:
        each = [scaling.points(runs) for runs in seeds.values()]
        left = [scaling.leave_largest_out(*points).set_index("form") for points in each]
        errors = [float(table.error["power"]) for table in left]
        alphas = [scaling.windows(*points).alpha for points in each]
        changes = [float(alpha.iloc[-1] - alpha.iloc[0]) for alpha in alphas]
        words = f"{sizes[-1]} conversations, from {len(sizes) - 1} smaller sizes"
        claims["C7"] = source.over(errors, len(seeds), words)
        claims["C15"] = source.over(changes, len(seeds), f"windows of 4 of {len(sizes)} sizes")
    if fixed and all(one.experiment.samples >= C10_SIZE for one in fixed):
        curves = [stopping.replay(run, [1, 3]).val_ppl for run in fixed]
        gains = [float(ppl[3] / ppl[1] - 1) for ppl in curves]
        words = f"{fixed[0].experiment.samples} conversations"
        claims["C10"] = source.over(gains, len(gains), words)
    first, last = (next(iter(seeds.values()))[place].train_tokens for place in (0, -1))
    if last >= C19_RATIO * first:
        changes = [100 * (runs[-1].ranks[1] - runs[0].ranks[1]) for runs in seeds.values()]
        claims["C19"] = source.over(changes, len(seeds), f"{first:,} to {last:,} tokens")
    return claims


def designs(
    every: Sequence[Result], decrease: Sequence[Result], source: Source
) -> dict[str, Measurement]:
    """C1 and C4, from ladders of the two designs with the same sizes and seeds."""
    size = max(result.experiment.samples for result in every)
    ours, theirs = comparison.at(every, size), comparison.at(decrease, size)
    pair = intervals.paired(ours, theirs)
    low, high = (None if end is None else 1 + end for end in (pair.low, pair.high))
    words = f"{size} conversations"
    claims = {"C1": source.measured(1 + pair.change, low, high, pair.seeds, words)}
    if len({result.experiment.samples for result in decrease}) > 1:
        claims["C4"] = _alpha(decrease, source)
    return claims


def shapes(
    deep: Sequence[Result], wide: Sequence[Result], overfit: Sequence[Result], source: Source
) -> dict[str, Measurement]:
    """C8 from ladders of two shapes with the same sizes and seeds, C9 from runs at a learning rate
    of 0.002 that stopped at no epoch but the last."""
    claims = {}
    theirs = _by_seed(deep)
    slopes = [
        scaling.fit(*scaling.points(runs)).alpha - scaling.fit(*scaling.points(theirs[seed])).alpha
        for seed, runs in _by_seed(wide).items()
        if len(runs) > 1
    ]
    if slopes:
        claims["C8"] = source.over(slopes, len(slopes), _sizes(wide))
    rises = [[stopping.rise(run) for run in runs] for runs in _by_seed(overfit).values()]
    if rises and not any(None in seed for seed in rises):
        words = f"{overfit[0].experiment.samples} conversations, mean of both shapes"
        means = np.array(rises, dtype=float).mean(axis=1).tolist()
        claims["C9"] = source.over(means, len(means), words)
    return claims


def matrix(results: Results) -> pd.DataFrame:
    """The configurations of a matrix of runs: fields, means over sizes and seeds.

    Returns:
        One row a configuration: the fields of `prediction.CONFIGURATION`; er and er_gap
        (percentage points); over_size (log PPL less its mean over the size's runs); converges (in
        all its runs).
    """
    fields = list(prediction.CONFIGURATION)
    frame = results.frame()
    frame = frame.assign(converges=frame.converged >= frame.convergence_rate)
    # A run that was given up has no perplexity, and did not converge either.
    converges = frame.groupby(fields).converges.all()
    frame = frame[frame.val_ppl.notna()]
    logs = np.log(frame.val_ppl)
    frame = frame.assign(
        er=100 * frame.val_er,
        er_gap=100 * (frame.train_er - frame.val_er).abs(),
        over_size=logs - logs.groupby(frame.samples).transform("mean"),
    )
    means = frame.groupby(fields)[["er", "er_gap", "over_size"]].mean()
    return means.join(converges).reset_index()


def configurations(results: Results, source: Source) -> dict[str, Measurement]:
    """C5, C11-C14 and C16-C18, from a matrix of configurations, all at the same sizes and seeds.

    Two diversity weights of one shape give nearly the same run: as two samples they would narrow
    every interval without new evidence. The samples are therefore shapes (all fields but the
    weight), averaged over their weights; only C11, which is about the weight, is over
    configurations.
    """
    table = matrix(results)
    merged = Results(
        replace(one, experiment=one.experiment.replace(dist_reg_weight=0.0)) for one in results
    )
    frame, shapes = merged.frame(), matrix(merged)
    seeds, count = int(frame.seed.nunique()), f"{len(shapes)} shapes"
    claims: dict[str, Measurement] = {}
    if len(shapes) > 3:
        both = prediction.correlation(shapes.er, shapes.over_size)
        claims["C5"] = source.measured(both.r, both.low, both.high, seeds, count)
        if len(set(frame.samples)) > 1:
            ends = prediction.by_configuration(frame)
            both = prediction.correlation(ends.alpha, ends.val_er)
            claims["C12"] = source.measured(both.r, both.low, both.high, seeds, count)
    for id, field, column, rows, what in (
        ("C11", "dist_reg_weight", "er", table[table.converges], "configurations that converge"),
        ("C13", "num_input_tokens", "over_size", shapes, "shapes"),
        ("C14", "context_dim", "er", shapes[shapes.converges], "shapes that converge"),
    ):
        measured = effect(rows, field, column)
        if measured is None:
            continue
        words, value, low, high = measured
        if column == "over_size":
            value = math.expm1(value)
            low, high = (None if end is None else math.expm1(end) for end in (low, high))
        claims[id] = source.measured(value, low, high, seeds, words.format(what))
    gain = prediction.what_er_adds(frame)
    claims["C16"] = source.measured(gain.gain, gain.low, gain.high, seeds, count)
    claims["C17"] = source.over(shapes.er_gap.tolist(), seeds, count)
    scores = rules.score(merged)
    rule = scores[scores.rule == rules.CRITERIA[0]].to_dict("records")[0]
    if rule["called"]:
        low, high = (None if pd.isna(rule[end]) else float(rule[end]) for end in ("low", "high"))
        if low == high:  # right or wrong every time: the jackknife's variance is 0
            low = high = None
        words = f"{rule['called']} calls, {count}"
        claims["C18"] = source.measured(float(rule["excess"]), low, high, seeds, words)
    return claims


def effect(
    table: pd.DataFrame, field: str, column: str
) -> tuple[str, float, float | None, float | None] | None:
    """Main effect of a field: its largest value against its least, the other fields equal.

    Paired over the configurations that exist with both values and are otherwise equal (Student's t
    over the pairs). A fractional design may have no such pair: then least squares on the field and
    on every other field that varies, as categories; interactions count as residuals.

    Returns:
        What it is over, in words with {} for what is paired; effect, low, high (None without a
        degree of freedom left). None where the rows do not determine the effect.
    """
    levels = sorted(table[field].unique())
    if len(levels) < 2:
        return None
    rows = table[table[field].isin([levels[0], levels[-1]])]
    others = [name for name in prediction.CONFIGURATION if name != field]
    wide = rows.pivot_table(column, others, field).dropna()
    if len(wide):
        values = (wide[levels[-1]] - wide[levels[0]]).tolist()
        pairs = "1 pair" if len(wide) == 1 else f"{len(wide)} pairs"
        return f"{pairs} of {{}}", *intervals.mean(values)
    dummies = pd.get_dummies(rows[others].astype(str), drop_first=True, dtype=float)
    chosen = (rows[field] == levels[-1]).to_numpy(float)
    design = np.column_stack([chosen, np.ones(len(rows)), dummies.to_numpy()])
    # The others may be confounded with one another, as long as the field is not with them.
    rank = int(np.linalg.matrix_rank(design))
    if np.linalg.matrix_rank(design[:, 1:]) == rank:
        return None
    measured = rows[column].to_numpy(float)
    inverse = np.linalg.pinv(design, rcond=1e-10)
    solved = inverse @ measured
    change, freedom = float(solved[0]), len(rows) - rank
    words = f"{len(rows)} {{}}, no two of which differ in this alone"
    if freedom == 0:
        return words, change, None, None
    variance = float(((measured - design @ solved) ** 2).sum()) / freedom
    error = math.sqrt(variance) * float(np.linalg.norm(inverse[0]))
    half = intervals.student(freedom) * error
    return words, change, change - half, change + half


def _alpha(results: Sequence[Result], source: Source) -> Measurement:
    law = scaling.over_runs(results)
    return source.measured(law.value, law.low, law.high, law.seeds, _sizes(results))


def _sizes(results: Sequence[Result]) -> str:
    sizes = sorted({result.experiment.samples for result in results})
    return f"{len(sizes)} sizes, {sizes[0]} to {sizes[-1]}"


def _by_seed(results: Sequence[Result]) -> dict[int, list[Result]]:
    """Runs of each seed, by growing training tokens."""
    ordered = sorted(results, key=lambda one: (one.experiment.seed, one.train_tokens))
    by_seed = itertools.groupby(ordered, lambda one: one.experiment.seed)
    return {seed: list(runs) for seed, runs in by_seed}
