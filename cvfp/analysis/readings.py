"""What finished runs showed, in Markdown sentences written from their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import gmean

from cvfp import abort, tuning
from cvfp.analysis import comparison, intervals, prediction, scaling, stopping
from cvfp.analysis.intervals import Paired, paired
from cvfp.analysis.scaling import PowerLaw
from cvfp.baselines import NAMES
from cvfp.config import toml
from cvfp.gap import AS_LEFT, CAUSES, Gap
from cvfp.result import Result, Results

# What a perplexity is compared with; the unigram is far above.
RIVALS = {name: words for name, words in NAMES.items() if name != "unigram"}
_SAID = toml("analysis/readings")
QUESTIONS = _SAID["controls"]["questions"]  # what `controls` compares


def _say(reading: str, piece: str = "text", **figures: Any) -> str:
    """A piece of a reading in readings.toml, with its figures."""
    return str(_SAID[reading][piece].format(**figures))


def against_baselines(ppl: float, lines: dict[str, float | None]) -> str:
    """Sentences (Markdown) that say where `ppl` stands among its baselines' perplexities."""
    said = [_say("baselines", "head", ppl=ppl), ""]
    for name, words in RIVALS.items():
        value, told = lines[name], _say("baselines", "missing")
        if value is not None:
            side = "under" if ppl < value else "**over**"
            told = f"{value:.1f}; CVFP is {abs(ppl / value - 1):.1%} {side} it."
        said.append(f"- {words}: {told}")
    least, best = min((value, name) for name, value in lines.items() if value is not None)
    verdict = _say("baselines", "wins" if ppl >= least else "lowest", best=NAMES[best])
    return "\n".join([*said, "", verdict])


def quickstart(result: Result) -> str:
    """What one run showed, in Markdown."""
    lines = {k: None if v is None else v["ppl"] for k, v in result.baselines.items()}
    (_, rank), (iterations, converged) = result.ranks, result.phase1_end
    if result.val_ppl is None:
        return _say("quickstart", "given_up", run=result, why=result.aborted or "stopped by hand")
    fate = "converged" if converged >= result.experiment.convergence_rate else "not_converged"
    return _say(
        "quickstart",
        run=result,
        fate=_say("quickstart", fate, iterations=iterations, share=converged),
        directions=rank * result.experiment.context_dim,
        epochs=result.phase2_history[-1]["epoch"],
        lost=_say("quickstart", "loses_text") if result.loses_text else "",
        baselines=against_baselines(result.val_ppl, lines),
    )


def ladder(frame: pd.DataFrame, law: PowerLaw) -> str:
    """What a ladder of sizes showed, in Markdown."""
    means = frame.groupby("train_tokens").mean(numeric_only=True)
    last, high = means.iloc[-1], means.index[-1]
    # A baseline that no run has is no column of numbers, and none of the means.
    ppl = {name: last.get(f"{name}_ppl") for name in ("unigram", *RIVALS)}
    lines = {name: None if pd.isna(value) else float(value) for name, value in ppl.items()}
    capped = sorted(set(frame.samples[frame.best_epoch == frame.phase2_epochs]))
    sizes, ends, seeds = ", ".join(map(str, capped)), law.interval(), len(set(frame.seed))
    figures = dict(law=law, first=means.iloc[0], last=last, low=means.index[0], high=high)
    return _say(
        "ladder",
        **figures,
        falls="falls" if law.alpha < 0 else "does not fall",
        within=_say("ladder", "interval" if ends else "no_interval", law=law, ends=ends),
        r2="" if law.r2 is None else f", R² {law.r2:.3f}",
        times=1e7 / high,
        seeds=_say("ladder", "one_seed" if seeds == 1 else "seeds", count=seeds),
        epochs=_say("ladder", "capped" if capped else "past_best", sizes=sizes),
        baselines=against_baselines(float(last.val_ppl), lines),
    )


def change(pair: Paired) -> str:
    """A paired difference in words: "+1.2 % (95 % interval −0.3 to +2.7 %, 3 seeds, …)"."""
    count = f"{pair.seeds} seed{'s' if pair.seeds > 1 else ''}, {pair.conversations} conversations"
    if pair.low is None or pair.high is None:
        return f"{pair.change:+.1%} ({count}; an interval needs two of each)"
    return f"{pair.change:+.1%} (95 % interval {pair.low:+.1%} to {pair.high:+.1%}, {count})"


def own_parts(groups: comparison.Groups) -> str:
    """What each own part changes against the published one, at the largest size, in Markdown."""
    size = comparison.sizes(groups)[-1]
    pairs = comparison.against(groups, size)
    lines = [_say("own_parts", "head", size=size), ""]
    for kind, pair in pairs.items():
        side = _side(pair, "Better", "Worse") if any(pair.by_seed) else _say("own_parts", "same")
        lines.append(f"- **{kind}**: {change(pair)}. {side}")
    return "\n".join(lines)


def parallel(gap: Gap, times: pd.DataFrame, pair: Paired) -> str:
    """What the comparison of parallel and exact contexts showed, in Markdown."""
    whole, mse, forgets = gap.agreement.loc[AS_LEFT], gap.agreement.mse, gap.recurrence
    known = {n: mse[n] for n in ("noise", "updates", "window", "ring", "bfloat16") if n in mse}
    first = max(known, key=lambda name: known[name])
    both = times[times.sequential.notna()]
    at = times.iloc[-1] if both.empty else both.iloc[-1]
    kind = "remembers" if forgets.memory_length is None else "forgets"
    kind = "short" if forgets.contraction_rate is None else kind
    at_start = gap.along.cosine_min.iloc[0] <= whole.cosine_min + 1e-9
    gain = None if both.empty else at.sequential / at.blocks
    return _say(
        "parallel",
        gap=gap,
        whole=whole,
        least=_say("parallel", "first" if at_start else "elsewhere"),
        cause=CAUSES[first].removesuffix(" alone"),
        share=known[first] / whole.mse,
        window=gap.iterations - 1,
        window_share=known["window"] / whole.mse,
        added=gap.added / whole.mse,
        clean=gap.clean.relative_error_mean.iloc[min(10, len(gap.clean) - 1)],
        forgetting=_say("parallel", kind, forgets=forgets, length=len(forgets.distances)),
        against_loop=_say("parallel", "no_loop" if both.empty else "loop", at=at, gain=gain),
        passes=at.blocks / at.shifted,
        change=change(pair),
        verdict=_side(pair, "Training on the parallel ones is *better*", "It is worse"),
    )


def shapes(
    every: Sequence[Result],
    decrease: Sequence[Result],
    deep: PowerLaw,
    wide: PowerLaw,
    curves: dict[str, Sequence[Result]],
) -> str:
    """What the designs (`every`, `decrease`: their ladders), the shapes (by their laws) and the
    epochs (`curves`: runs of all epochs, by what they are called) showed, in Markdown."""
    size = max(result.experiment.samples for result in every)
    ours, theirs = (comparison.at(runs, size) for runs in (every, decrease))
    pair = paired(ours, theirs)
    epochs = []
    for name, runs in curves.items():
        rises = [x for x in map(stopping.rise, runs) if x is not None]
        piece = "rise" if len(rises) == len(runs) else "not_reached"
        epochs.append(_say("shapes", piece, name=name, rise=sum(rises) / len(runs)))
    figures: dict[str, Any] = dict(size=size, deep=deep, wide=wide, change=change(pair))
    return _say(
        "shapes",
        **figures,
        ranks=[sum(one.ranks[1] for one in runs) / len(runs) for runs in (ours, theirs)],
        verdict=_side(pair, "Tokens in every layer are better", "Equal-decrease is better"),
        steeper="wide" if wide.alpha < deep.alpha else "deep",
        crossover=scaling.crossover(deep, wide).words(),
        epochs=", ".join(epochs),
    )


def nearest(
    first: Sequence[Result], second: Sequence[Result], tokens: float, better: str, worse: str
) -> str:
    """The first runs against the second at the size nearest to so many training tokens."""
    size = min(first, key=lambda one: abs(one.train_tokens / tokens - 1)).experiment.samples
    ours, theirs = (comparison.at(runs, size) for runs in (first, second))
    pair = paired(ours, theirs)
    return f"at {ours[0].train_tokens:,} tokens {change(pair)}. {_side(pair, better, worse)}"


def _side(pair: Paired, better: str, worse: str) -> str:
    lies = intervals.side(pair.low, pair.high)
    piece = "one_seed" if lies is None else ("neither", "worse", "better")[lies]
    return _say("sides", piece, better=better, worse=worse)


def forms(tokens: ArrayLike, ppl: ArrayLike) -> str:
    """Which form of law predicts the largest size best from the others, in Markdown."""
    left = scaling.leave_largest_out(tokens, ppl)
    known, missing = left[left.error.notna()], left.form[left.error.isna()]
    if known.empty:
        return _say("forms", "none")
    best = known.iloc[int(known.error.abs().to_numpy().argmin())]
    return _say(
        "forms",
        best=best,
        errors=", ".join(f"{row.error:+.1%} ({row.form})" for row in known.itertuples()),
        closest=scaling.FORMS[str(best.form)].split(",")[0],
        rest="" if missing.empty else _say("forms", "missing", names=", ".join(missing)),
    )


def patience(results: Sequence[Result], first: int, second: int) -> str:
    """Whether a longer patience finds a better epoch, in Markdown; runs as `stopping.replay`."""
    replays = [stopping.replay(result, [first, second]) for result in results]
    changes = [one.val_ppl[second] / one.val_ppl[first] - 1 for one in replays]
    middle, low, high = intervals.mean(changes)
    piece, ppl = "one_seed" if low is None else "interval", replays[0].val_ppl
    figures: dict[str, Any] = dict(first=first, second=second, middle=middle, runs=len(changes))
    return _say(
        "patience",
        **figures,
        within=_say("patience", piece, low=low, high=high, seeds=len(changes)),
        gained=sum(value < 0 for value in changes),
        last=ppl["none, last kept"] / ppl["none, best kept"] - 1,
    )


def predictions(results: Results, scores: pd.DataFrame) -> str:
    """How well Phase 1's measures predict Phase 2's perplexity, in Markdown; `scores` is
    `rules.score` of the same runs."""
    frame = results.frame()
    gain, table = prediction.what_er_adds(frame), prediction.by_configuration(frame)
    rule = prediction.predictors(frame).loc[prediction.RULE]
    verdicts = {1: "helps, beyond chance", -1: "hurts, beyond chance"}
    adds = verdicts.get(intervals.side(gain.low, gain.high) or 0, "cannot be told from nothing")
    within = "" if gain.low is None else _say("predictions", "interval", gain=gain)
    figures = dict(gain=gain, within=within, adds=adds, rule=rule.error)
    said = [_say("predictions", "rank", **figures)]
    if table.alpha.notna().all() and len(table) > 3:
        both = prediction.correlation(table.alpha, table.val_er)
        said.append(_say("predictions", "alpha", both=both))
    known = scores[scores.hit_rate.notna()]
    good, poor = known.rule[known.low > 0], known.rule[known.high < 0]
    rest = len(known) - len(good) - len(poor)
    words = [f"{len(known)} of {len(scores)} rules call any run good or poor"]
    words += [f"better than chance: {', '.join(good)}"] if len(good) else []
    words += [f"**worse than chance**: {', '.join(poor)}"] if len(poor) else []
    words += [f"not told from chance: {rest}"] if rest else []
    said.append(f"**Rules (C18).** {'; '.join(words)}.")
    return "\n\n".join(said)


def early_abort(results: Results) -> str:
    """What note 004's abort rules would have saved, and given up, in Markdown. A Phase 1's seconds
    are shared among its iterations."""
    frame = results.frame()
    over = frame.val_ppl / frame.groupby("train_tokens").val_ppl.transform("median") - 1
    gone = [i for i, one in enumerate(results) if abort.reason(one.phase1_history)]
    reach = (frame.phase1_iterations >= abort.ITERATION).sum()
    figures: dict[str, Any] = dict(runs=len(frame), iteration=abort.ITERATION, reach=reach)
    said = _say("early_abort", gone=len(gone), **figures)
    if not gone:
        return said
    rest = 1 - (abort.ITERATION - 1) / (frame.phase1_iterations - 1)
    saved = rest * frame.seconds_phase1 + frame.seconds_contexts + frame.seconds_phase2
    ppl, over = frame.val_ppl[gone].agg(["min", "max"]), over[gone]
    figures = dict(ppl=ppl, over=over.mean(), better=(over < 0).sum(), saved=saved[gone].sum())
    seconds = frame.filter(regex="^seconds_").sum().sum()
    return said + _say("early_abort", "saved", seconds=seconds, **figures)


def _chosen(runs: Mapping[str, Sequence[Result]]) -> tuple[dict[str, float], str]:
    """Perplexity of each kind on development text (not on what judges, where there is another), and
    the best kind of tokens alone."""
    ppl = {kind: gmean([x.dev_ppl or x.val_ppl for x in there]) for kind, there in runs.items()}
    return ppl, comparison.best(ppl, "tokens alone", but=(tuning.SHUFFLED,))


def _beside(words: str, ours: Sequence[Result], theirs: Sequence[Result]) -> list[str]:
    """The first runs against the second, of the seeds that both have; nothing without any."""
    if not {x.experiment.seed for x in ours} & {x.experiment.seed for x in theirs}:
        return []
    pair = comparison.shared(ours, theirs)
    return [f"- {words}: {change(pair)}. {_side(pair, 'Better', 'Worse')}"]


def discovery(groups: comparison.Groups) -> str:
    """What an objective without a target, and slower forgetting, are worth, in Markdown, size by
    size: pairs of kinds that share seeds. The best without contexts is so on development text."""
    said = []
    for size in comparison.sizes(groups):
        runs = comparison.of_size(groups, size)
        _, tokens = _chosen(runs)
        lines = [f"**{size} conversations**", ""]
        for words, *names in _SAID["discovery"]["questions"]:
            kinds = [tokens if name == "TOKENS" else name for name in names]
            lines += _beside(words.format(tokens=tokens), *(runs.get(kind, []) for kind in kinds))
        said.append("\n".join(lines))
    return "\n\n".join(said)


def controls(groups: comparison.Groups) -> str:
    """What each part of CVFP adds, and what is better than CVFP, in Markdown, size by size: runs by
    the kinds of `tuning.KINDS`, all at the same sizes and seeds."""
    said = []
    for size in comparison.sizes(groups):
        runs = comparison.of_size(groups, size)
        ppl = {kind: gmean([one.val_ppl or 1.0 for one in there]) for kind, there in runs.items()}
        chose, tokens = _chosen(runs)
        ours = comparison.best(chose, "contexts of Phase 1")
        asked = [(words, *(getattr(tuning, name) for name in pair)) for words, *pair in QUESTIONS]
        asked.append((f"the best contexts of Phase 1 ({ours}) over {tokens}", ours, tokens))
        asked.append((f"an untrained block over {tokens}", tuning.RANDOM_SCALED, tokens))
        lines = [f"**{size} conversations** ({runs[ours][0].train_tokens:,} tokens)", ""]
        for words, first, second in asked:
            lines += _beside(words, runs.get(first, []), runs.get(second, []))
        counts = comparison.counted(runs[ours][0])
        least, counted = min((line["ppl"], name) for name, line in counts.items())
        ahead = ", ".join(kind for kind in ppl if ppl[kind] < least) or "none"
        lines.append(_say("controls", "counts", least=counted, ppl=least, ahead=ahead))
        said.append("\n".join(lines))
    every = [one for runs in groups.values() for one in runs]
    ended = [one for one in every if one.best_epoch == one.experiment.phase2_epochs]
    piece, past = "some_ended" if ended else "none_ended", len(every) - len(ended)
    return "\n\n".join([*said, _say("controls", piece, past=past, count=len(every))])
