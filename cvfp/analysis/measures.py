"""From finished runs to the measurements of the claims' parts: one number each, with an interval.

Where runs differ by seed alone, the interval is over seeds, and over held-out conversations where
the number is made of their nats; where a claim is about configurations, it is over configurations,
each the mean of its sizes and seeds. A part that the runs cannot measure is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from cvfp.analysis import comparison, intervals, prediction, rules, scaling, stopping
from cvfp.analysis.claims import CLAIMS, OTHER, SETTINGS, Measurement
from cvfp.analysis.intervals import Estimate
from cvfp.analysis.scaling import WINDOW, Array, Weights, by_conversation, over_runs
from cvfp.config import PRESETS, Experiment
from cvfp.gap import AS_LEFT, Gap
from cvfp.result import Result, Results

# What the sentences of claims.toml ask of the runs: conversations (C10), tokens of the largest size
# over those of the smallest (C19), tokens of a timed stream and what counts as equal there (C3).
C10_SIZE, C19_RATIO, C3_TOKENS, C3_ERROR = 500, 8, 10_000, 1e-4
# What runs must have as their preset has it, to be counted in its setting.
CORPUS = ("dataset", "tokenizer", "vocab_size", "embedding", "embedding_dim")
Runs = Sequence[Result]
Measured = list[Measurement]
FIELDS = list(prediction.CONFIGURATION)
SHAPE = [name for name in FIELDS if name != "dist_reg_weight"]
VARIED = {"C11": "dist_reg_weight", "C13": "num_input_tokens", "C14": "context_dim"}
# Interval ends -> numbers of which the estimate is in the middle.
SCALES: dict[str, Any] = dict(plain=np.asarray, relative=np.log1p, correlation=np.arctanh)


class Source:
    """Which notebook (its file name, without the ending) measured, with which parameters (those
    left at None are left out), on what, in which setting of the ledger; `one` is any of its runs,
    all of the same corpus, tokeniser and device."""

    def __init__(self, notebook: str, one: Result, preset: str = "mini", **parameters: Any) -> None:
        self.notebook, exp = notebook, one.experiment
        given = {"preset": preset, **parameters}
        self.parameters = {name: x for name, x in given.items() if x is not None}
        self.setting = "ultrachat" if "ultrachat" in exp.dataset.lower() else OTHER
        if preset in SETTINGS and preset in PRESETS:
            usual = Experiment.preset(preset)
            if all(getattr(exp, name) == getattr(usual, name) for name in CORPUS):
                self.setting = preset
        where = f"table {exp.embedding}, {one.device_name}, {one.precision}"
        self.ran_on = f"{exp.dataset}, {exp.tokenizer} ({one.vocab_size:,}), {where}"

    def measured(
        self, name: str, n: int, words: str, estimate: Estimate, p: float | None = None
    ) -> Measurement:
        """The measurement of a part such as "C1.ppl"; p by Student's t where there are degrees of
        freedom."""
        id, part = name.split(".")
        of, interval, freedom = CLAIMS[id].parts[part], estimate[:3], estimate[3]
        if freedom is not None and interval[1] is not None:
            ends = [*interval, *(end for end in of.region if math.isfinite(end))]
            value, low, high, *edges = SCALES[of.scale](np.array(ends, dtype=float))
            error = (high - low) / 2 / intervals.student(freedom)
            far = min(abs(value - edge) for edge in edges)
            # Without scatter it is surely not on the edge, or just there.
            p = 2 * float(stats.t.sf(far / error, freedom)) if error > 0 else float(far == 0)
        by = self.notebook, self.parameters, self.ran_on
        return Measurement(id, part, self.setting, n, *interval, p, words, *by)

    def over(self, name: str, values: Sequence[float], n: int, words: str) -> Measurement:
        """Mean and interval of independent values."""
        return self.measured(name, n, words, (*intervals.mean(values), len(values) - 1))

    def law(self, id: str, results: Runs, of: str = "") -> Measured:
        """α, change per doubling, and lack of fit of a ladder."""
        alpha, words = over_runs(results), _sizes(results)
        n, doubling = alpha.seeds, intervals.relative(alpha, math.log(2))
        found = [
            self.measured(f"{id}.alpha{of}", n, words, alpha.estimate),
            self.measured(f"{id}.per_doubling{of}", n, words, doubling.estimate),
        ]
        if (lack := scaling.lack_of_fit(*scaling.points(results))) is not None:
            f, *freedom = lack
            chance = stats.f(*freedom)
            high, low = (f / float(end) for end in chance.interval(intervals.LEVEL))
            p = 2 * float(min(chance.sf(f), chance.cdf(f)))
            words = f"F({freedom[0]}, {freedom[1]}), {words}"
            found.append(self.measured(f"{id}.form{of}", n, words, (f, low, high, None), p))
        return found


def contexts(gaps: Sequence[Gap], timed: Sequence[pd.DataFrame], source: Source) -> Measured:
    """C2 and C3, from one `Gap` and one table of `gap.times` a seed."""
    n, words = len(gaps), f"{gaps[0].tokens:,} training tokens"
    both = [(one.agreement.loc[AS_LEFT], one.positions.cosine_mean) for one in gaps]
    figures = pd.DataFrame([pd.concat(one) for one in both])
    found = [source.over(f"C2.{x}", figures[x].tolist(), n, words) for x in CLAIMS["C2"].parts]
    rows = [frame[frame.sequential.notna() & (frame.tokens >= C3_TOKENS)] for frame in timed]
    if rows and all(len(frame) for frame in rows):
        last = pd.DataFrame([frame.iloc[-1] for frame in rows])
        worst = last.difference.max()
        words = f"{last.tokens.iloc[0]:,.0f} tokens, blocks right to {worst:.0e} (relative)"
        # Fast methods that are wrong do not count.
        for part in CLAIMS["C3"].parts if worst <= C3_ERROR else ():
            ratios = (last.sequential / last[part]).tolist()
            found.append(source.over(f"C3.{part}", ratios, len(ratios), words))
    return found


def ladder(results: Runs, patient: Runs, hasty: Runs, source: Source) -> Measured:
    """C6, C7, C15 and C19 from a ladder of sizes, C10 from runs of one size, one a seed, with
    patience 3 and 1."""
    sizes = sorted({one.experiment.samples for one in results})
    found = source.law("C6", results) if len(sizes) > 1 else []
    if len(sizes) >= 5:
        law, same = over_runs(results, _forecast), over_runs(results, _no_change)
        signs = math.copysign(1, law.value), math.copysign(1, same.value)
        both = over_runs(results, lambda x: signs[0] * _forecast(x) - signs[1] * _no_change(x))
        change, windows = over_runs(results, _windows), f"windows of {WINDOW} of {len(sizes)} sizes"
        words = f"{sizes[-1]} conversations, from {len(sizes) - 1} smaller sizes"
        without = f'{words}; "no change" is {math.expm1(same.value):+.1%} off'
        found += [
            source.measured("C7.error", law.seeds, words, intervals.relative(law).estimate),
            source.measured("C7.no_change", law.seeds, without, both.estimate),
            source.measured("C15.change", law.seeds, windows, change.estimate),
        ]
    if patient and all(one.experiment.samples >= C10_SIZE for one in patient):
        words = f"{patient[0].experiment.samples} conversations"
        pair, gains = intervals.paired(patient, hasty), _pairs(patient, hasty, "val_acc")
        found += [
            source.measured("C10.ppl", pair.seeds, words, pair.estimate),
            source.over("C10.accuracy", [100 * (a - b) for a, b in gains], len(gains), words),
        ]
    large, small = (comparison.at(results, sizes[place]) for place in (-1, 0))
    first, last = small[0].train_tokens, large[0].train_tokens
    if last >= C19_RATIO * first:
        changes = [100 * (a - b) for a, b in _pairs(large, small, "val_er")]
        words = f"{first:,} to {last:,} tokens"
        found.append(source.over("C19.change", changes, len(changes), words))
    return found


def _forecast(logs: Array) -> Array:
    """Weights of the largest size's log PPL as the law of the others has it, less what it is."""
    known, last = logs[:, :-1], logs[:, -1:]
    law = 1 / known.shape[1] + (last - known.mean(axis=1, keepdims=True)) * scaling.slope(known)
    return np.hstack([law, -np.ones_like(last)])


def _no_change(logs: Array) -> Array:
    """Weights of the log PPL of the size before the largest, less that of the largest."""
    return np.broadcast_to([*[0.0] * (logs.shape[1] - 2), 1, -1], logs.shape)


def _windows(logs: Array) -> Array:
    """Weights of the last window's α, less the first's."""
    weights = np.zeros_like(logs)
    weights[:, -WINDOW:] = scaling.slope(logs[:, -WINDOW:])
    weights[:, :WINDOW] -= scaling.slope(logs[:, :WINDOW])
    return weights


def designs(every: Runs, decrease: Runs, source: Source) -> Measured:
    """C1 and C4, from ladders of the two designs with the same sizes and seeds."""
    sizes = sorted({one.experiment.samples for one in every})
    both = [(comparison.at(every, size), comparison.at(decrease, size)) for size in sizes]
    changes = [intervals.paired(*pair) for pair in both]
    words, n = f"{sizes[-1]} conversations", changes[-1].seeds
    rest = [f"{a.change:+.1%} at {size}" for a, size in zip(changes, sizes[:-1], strict=False)]
    found = [source.measured("C1.ppl", n, ", ".join([words, *rest]), changes[-1].estimate)]
    for part, field in (("accuracy", "val_acc"), ("er", "val_er")):
        ratios = [ours / theirs - 1 for ours, theirs in _pairs(*both[-1], field)]
        found.append(source.over(f"C1.{part}", ratios, n, words))
    return found + (source.law("C4", decrease) if len(sizes) > 1 else [])


def shapes(deep: Runs, wide: Runs, overfit: Runs, source: Source) -> Measured:
    """C8 from ladders of two shapes with the same sizes and seeds, C9 from runs at a learning rate
    of 0.002 that stopped at no epoch but the last."""
    found: Measured = []
    if len({one.experiment.samples for one in wide}) > 1:
        (ours, tokens), (theirs, _) = (by_conversation(x, scaling.slope) for x in (wide, deep))
        change, n, words = intervals.crossed(ours - theirs, tokens), len(ours), _sizes(wide)
        at = scaling.crossover(*(scaling.fit(*scaling.points(runs)) for runs in (deep, wide)))
        found = [
            source.measured("C8.difference", n, words, change.estimate),
            *source.law("C8", deep, "_deep"),
            *source.law("C8", wide, "_wide"),
            source.measured("C8.crossover", n, words, (at.tokens, at.low, at.high, None)),
        ]
    seeds = [one.experiment.seed for one in overfit]
    rises = pd.Series([stopping.rise(run) for run in overfit], seeds, dtype=float)
    if len(rises) and rises.notna().all():
        words = f"{overfit[0].experiment.samples} conversations, mean of both shapes"
        means = rises.groupby(level=0).mean().tolist()
        found.append(source.over("C9.rise", means, len(means), words))
    return found


def matrix(results: Results) -> pd.DataFrame:
    """The configurations of a matrix of runs, indexed by their fields: means over sizes and seeds
    of er and er_gap (percentage points), over_size (log PPL less its mean over the size's runs) and
    rule_error (relative, of 500 − 4·ER as PPL), and whether all runs converge."""
    frame = results.frame()
    # A run that was given up has no perplexity, and did not converge either.
    converged = (frame.converged >= frame.convergence_rate).rename("converges")
    converges = converged.groupby([frame[name] for name in FIELDS]).all()
    frame = frame[frame.val_ppl.notna()]
    logs = np.log(frame.val_ppl)
    columns = {
        "er": 100 * frame.val_er,
        "er_gap": 100 * (frame.train_er - frame.val_er).abs(),
        "over_size": logs - logs.groupby(frame.samples).transform("mean"),
        "rule_error": ((500 - 400 * frame.val_er) / frame.val_ppl - 1).abs(),
    }
    return frame.assign(**columns).groupby(FIELDS)[list(columns)].mean().join(converges)


def configurations(results: Results, source: Source) -> Measured:
    """C5, C11-C14 and C16-C18, from a matrix of configurations, all at the same sizes and seeds.

    Two diversity weights of one shape give nearly the same run: as two samples they would narrow
    every interval without new evidence. The samples are therefore shapes, averaged over weights;
    only those of C11, which is about the weight, are not."""
    alike = [one.experiment.replace(dist_reg_weight=0.0) for one in results]
    merged = Results(replace(one, experiment=x) for one, x in zip(results, alike, strict=True))
    frame, shapes, single = merged.frame(), matrix(merged), matrix(results)
    n, count = int(frame.seed.nunique()), f"{len(shapes)} shapes"
    several = len(set(frame.samples)) > 1
    found: Measured = []
    if len(shapes) > 3:
        pairs = {"C5.r": (shapes.er, shapes.over_size)}
        if several:
            laws = prediction.by_configuration(frame)
            pairs["C12.r"] = laws.alpha, laws.val_er
        for name, pair in pairs.items():
            both = prediction.correlation(*pair)
            ends = both.r, both.low, both.high, math.inf
            found.append(source.measured(name, n, count, ends))
    # Effective rank, and α beside it, are judged where Phase 1 converges.
    for id, rows in (("C11", single), ("C13", shapes), ("C14", shapes)):
        er = contrast(rows.loc[rows.converges, ["er"]], VARIED[id]).er.tolist()
        if er:
            found.append(source.over(f"{id}.er", er, n, f"{len(er)} pairs that converge"))
    slopes = nats(results, scaling.slope) if several else single[:0]
    settled, slopes = slopes[single.converges[slopes.index]], slopes.groupby(SHAPE).mean()
    means = nats(results, lambda x: np.full_like(x, 1 / x.shape[1])).groupby(SHAPE).mean()
    for name, table in (("C11.alpha", settled), ("C13.alpha", slopes), ("C13.ppl", means)):
        changes = contrast(table, VARIED[name[:3]])
        if len(changes):
            mean = intervals.crossed(changes.to_numpy(), changes.columns.to_numpy())
            mean = intervals.relative(mean) if table is means else mean
            found.append(source.measured(name, n, f"{len(changes)} pairs", mean.estimate))
    gain = prediction.what_er_adds(frame)
    added = gain.gain, gain.low, gain.high, gain.configurations - 1
    found += [
        source.measured("C16.gain", n, count, added),
        source.over("C16.rule", shapes.rule_error.tolist(), n, count),
        source.over("C17.gap", shapes.er_gap.tolist(), n, count),
    ]
    # C18's parts are the rules, in their order.
    named = [*rules.CRITERIA, *rules.ABORTS, rules.ANY_ABORT]
    scores = rules.score(merged).set_index("rule").loc[named].assign(part=[*CLAIMS["C18"].parts])
    for row in scores[scores.called > 0].to_dict("records"):
        # No width: right or wrong every time, where the jackknife's variance is 0.
        low, high = (row["low"], row["high"]) if row["low"] < row["high"] else (None, None)
        share = row["excess"], low, high, len(shapes) - 1
        words = f"{row['called']} calls, {count}"
        found.append(source.measured(f"C18.{row['part']}", n, words, share))
    return found


def nats(results: Runs, weights: Weights) -> pd.DataFrame:
    """Nats of the held-out conversations, weighted over sizes as in `scaling.over_runs`, mean over
    seeds: a row a configuration whose runs all have a perplexity, indexed as in `matrix`; columns
    named by the conversations' tokens."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for one in results:
        groups.setdefault(tuple(getattr(one.experiment, name) for name in FIELDS), []).append(one)
    there = {key: x for key, x in groups.items() if all(one.val_ppl is not None for one in x)}
    both = [by_conversation(runs, weights) for runs in there.values()]
    index = pd.MultiIndex.from_tuples(there, names=FIELDS)
    return pd.DataFrame([values.mean(axis=0) for values, _ in both], index, both[0][1])


def contrast(table: pd.DataFrame, field: str) -> pd.DataFrame:
    """Rows at the field's largest value less those at its least that are otherwise equal; none
    where it does not vary, or no two differ in it alone (as in a fractional design)."""
    values = table.index.get_level_values(field)
    if values.nunique() < 2:
        return table[:0]
    high, low = (table.xs(end, level=field) for end in (values.max(), values.min()))
    return pd.DataFrame(high - low).dropna()


def _pairs(ours: Runs, theirs: Runs, field: str) -> list[Any]:
    """A measured figure of both runs of each seed."""
    there = {one.experiment.seed: getattr(one, field) for one in theirs}
    return [(getattr(one, field), there[one.experiment.seed]) for one in ours]


def _sizes(results: Runs) -> str:
    sizes = sorted({result.experiment.samples for result in results})
    return f"{len(sizes)} sizes, {sizes[0]} to {sizes[-1]}"
