"""What finished runs showed, in Markdown sentences written from their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from numpy.typing import ArrayLike

from cvfp.analysis import comparison, intervals, prediction, scaling, stopping
from cvfp.analysis.intervals import Paired, paired
from cvfp.analysis.scaling import PowerLaw
from cvfp.gap import AS_LEFT, CAUSES, Gap
from cvfp.result import Result, Results

# The baselines that a perplexity is compared with, but for the unigram (it is far above).
RIVALS = {
    "kneser_ney": "a Kneser–Ney bigram of the same training tokens",
    "table": "the fitted table alone, as the bigram model it was fitted as, with no training token",
    "kneser_ney_both": "a Kneser–Ney bigram of fitting set and training tokens together",
    "trigram": "a Kneser–Ney trigram of the same training tokens",
    "trigram_both": "a Kneser–Ney trigram of fitting set and training tokens together",
}


def against_baselines(ppl: float, lines: dict[str, float | None]) -> str:
    """Sentences (Markdown) that say where `ppl` stands among its baselines' perplexities."""
    said = []
    for name, words in RIVALS.items():
        value = lines[name]
        if value is None:
            said.append(f"- {words}: not there with this tokeniser and table.")
            continue
        side = "under" if ppl < value else "**over**"
        said.append(f"- {words}: {value:.1f}; CVFP is {abs(ppl / value - 1):.1%} {side} it.")
    measured = {name: value for name, value in lines.items() if value is not None}
    best = min(measured, key=lambda name: measured[name])
    verdict = "CVFP has the lowest perplexity of these."
    if ppl >= measured[best]:
        verdict = (
            f"**A baseline wins**: {RIVALS.get(best, best)} predicts these conversations better "
            "than CVFP does at this size."
        )
    head = f"CVFP's validation perplexity is {ppl:.1f}. Beside it:"
    return "\n".join([head, "", *said, "", verdict])


def quickstart(result: Result) -> str:
    """What one run showed, in Markdown."""
    one = result.experiment
    (_, val_er), (iterations, converged) = result.ranks, result.phase1_end
    fate = f"did not converge: {converged:.1%} after {iterations} iterations"
    if converged >= one.convergence_rate:
        fate = f"stopped at iteration {iterations} with {converged:.1%} of the tokens converged"
    if result.val_ppl is None:
        end = f"at iteration {result.phase1_iterations}: {result.aborted or 'stopped by hand'}."
        return f"**Phase 1** was given up {end}"
    last = result.phase2_history[-1]
    lines = {k: None if v is None else v["ppl"] for k, v in result.baselines.items()}
    lost = " (of text that the tokeniser does not give back whole)" if result.loses_text else ""
    return "\n\n".join(
        [
            f"**Phase 1** {fate}. The contexts of held-out text span "
            f"{val_er * one.context_dim:.0f} of {one.context_dim} "
            f"directions by effective rank ({result.val_er:.1%}; training {result.train_er:.1%}).",
            f"**Phase 2** was best at epoch {result.best_epoch} of {last['epoch']:.0f} run: "
            f"accuracy {result.val_acc:.1%}, {result.val_bpb:.3f} bits per byte{lost}. The epoch "
            "is chosen on the tokens it is scored on, as in the notes, which flatters it a little.",
            against_baselines(result.val_ppl, lines),
        ]
    )


def ladder(frame: pd.DataFrame, law: PowerLaw) -> str:
    """What a ladder of sizes showed, in Markdown."""
    means = frame.groupby("train_tokens").mean(numeric_only=True)
    first, last = means.iloc[0], means.iloc[-1]
    low, high = means.index[0], means.index[-1]
    interval = law.interval()
    within = "no interval: two points always lie on a line"
    if interval is not None:
        within = f"95 % interval {interval[0]:.3f} to {interval[1]:.3f}, {law.points} points"
    r2 = "" if law.r2 is None else f", R² {law.r2:.3f}"
    # A baseline that no run has is no column of numbers, and none of the means.
    ppl = {name: last.get(f"{name}_ppl") for name in ("unigram", *RIVALS)}
    lines = {name: None if pd.isna(value) else float(value) for name, value in ppl.items()}
    capped = frame[frame.best_epoch == frame.phase2_epochs]
    cap = (
        "Every run was past its best epoch when it stopped."
        if capped.empty
        else "Still improving at the last epoch allowed, so that their perplexity is an upper "
        f"bound: the runs of {', '.join(map(str, sorted(capped.samples.unique())))} conversations "
        "(`-p phase2_epochs` allows more)."
    )
    seeds = frame.seed.nunique()
    return "\n\n".join(
        [
            f"**Law.** From {low:,} to {high:,} training tokens perplexity "
            f"{'falls' if law.alpha < 0 else 'does not fall'}, "
            f"{first.val_ppl:.1f} to {last.val_ppl:.1f}: "
            f"α = {law.alpha:.3f} ({within}{r2}), {law.per_doubling:+.1%} per doubling. A high R² "
            "on so few points says that a line fits here, not that it goes on: the extrapolated "
            f"perplexities lie up to {1e7 / high:.0f} times beyond the largest run.",
            f"**Seeds.** {seeds} seed{'s' if seeds > 1 else ''}: "
            + (
                "the spread between seeds is not measured in this run (`-p seeds 0,1,2` does)."
                if seeds == 1
                else "the table's PPL s.d. is the spread between them."
            ),
            f"**Epochs.** {cap}",
            f"**Rank.** Effective rank of held-out contexts {first.val_er:.1%} to "
            f"{last.val_er:.1%} over the ladder; of training contexts {first.train_er:.1%} to "
            f"{last.train_er:.1%}.",
            "**Against models without CVFP**, at the largest size. "
            + against_baselines(float(last.val_ppl), lines),
            "The table is fitted on conversations of its own, so that part of what CVFP predicts "
            "comes from them, as from GPT-2's table in the published runs; α and A depend on "
            "corpus, tokeniser and table, and cannot be compared across them.",
        ]
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
    lines = [
        f"- **{kind}**: {change(pair)}. "
        + ("The same figures." if not any(pair.by_seed) else _side(pair, *SIDES))
        for kind, pair in pairs.items()
    ]
    return "\n".join([f"Perplexity against the published parts, {size} conversations:", "", *lines])


SIDES = ("Better, beyond chance", "Worse, beyond chance")


def parallel(gap: Gap, times: pd.DataFrame, pair: Paired) -> str:
    """What the comparison of parallel and exact contexts showed, in Markdown."""
    whole, mse = gap.agreement.loc[AS_LEFT], gap.agreement.mse
    known = {n: mse[n] for n in ("noise", "updates", "window", "ring", "bfloat16") if n in mse}
    first = max(known, key=lambda name: known[name])
    forgets = gap.recurrence
    both = times[times.sequential.notna()]
    longest = times.iloc[-1] if both.empty else both.iloc[-1]
    against_loop = (
        "the loop was not run. "
        if both.empty
        else f"at {longest.tokens:,.0f} tokens they are {longest.sequential / longest.blocks:.0f} "
        f"times as fast as the loop and differ from it by at most {longest.difference:.1e}, "
        "relative. "
    )
    if forgets.contraction_rate is None:
        forgetting = "The stream is too short to say how the recurrence forgets."
    elif forgets.memory_length is None:
        forgetting = (
            f"After {len(forgets.distances)} tokens a context still depends on where it started; "
            f"nearby trajectories change their distance {forgets.contraction_rate:.2f} times "
            "per token."
        )
    else:
        forgetting = (
            f"Nearby trajectories approach {forgets.contraction_rate:.2f} times per token, and a "
            f"context restarted from zeros is within 1 % after **{forgets.memory_length} tokens**: "
            "whatever was said before that has left the context. This is why sweeps converge, "
            "why blocks can be computed side by side, and how far the model can look back."
        )
    verdict = {
        None: "no interval with these runs: the difference is not judged.",
        1: "training on the parallel contexts is worse, beyond chance.",
        -1: "training on the parallel contexts is *better*, beyond chance.",
        0: "no difference can be told from chance with these runs.",
    }[intervals.side(pair.low, pair.high)]
    return "\n\n".join(
        [
            f"**Agreement (claim C2).** Mean cosine {whole.cosine_mean:.4f}, relative error "
            f"{whole.relative_error_mean:.1%}: close, and not equal. The least cosine, "
            f"{whole.cosine_min:.3f}, "
            + (
                "is that of the first tokens, where the ring lets token 0 read the last one."
                if gap.along.cosine_min.iloc[0] <= whole.cosine_min + 1e-9
                else "is not at the start of the stream."
            ),
            f"**Causes.** The largest is {CAUSES[first].removesuffix(' alone')}, "
            f"{known[first] / whole.mse:.0%} of the squared error; the window of "
            f"{gap.iterations - 1} sweeps that the comparison is usually blamed on is "
            f"{known['window'] / whole.mse:.1%}. Added, the causes make "
            f"{gap.added / whole.mse:.0%} of the whole, so they act nearly apart from one "
            "another. Clean sweeps with the final weights remove all of it: ten leave a relative "
            f"error of {gap.clean.relative_error_mean.iloc[min(10, len(gap.clean) - 1)]:.2%}.",
            f"**Memory.** {forgetting}",
            f"**Exact, in parallel (claim C3).** Blocks took {gap.exact.sweeps} sweeps for "
            f"{gap.tokens:,} tokens, with an error bound of {gap.exact.error_bound:.1e}; "
            + against_loop
            + "Exactness costs about as much as "
            f"{longest.blocks / longest.shifted:.1f} shifted passes, so there is no reason to "
            "settle for an approximation.",
            f"**Perplexity.** Phase 2 trained on parallel instead of exact contexts: "
            f"{change(pair)} in perplexity on held-out text, whose contexts are exact in both: "
            f"{verdict}",
        ]
    )


def shapes(
    every: Sequence[Result],
    decrease: Sequence[Result],
    deep: PowerLaw,
    wide: PowerLaw,
    curves: dict[str, Sequence[Result]],
) -> str:
    """What the designs, the shapes and the epochs showed, in Markdown.

    Args:
        every, decrease: ladders of the two designs.
        deep, wide: laws of the two shapes.
        curves: runs of all epochs, by what they are called.
    """
    size = max(result.experiment.samples for result in every)
    ours, theirs = (comparison.at(runs, size) for runs in (every, decrease))
    pair = paired(ours, theirs)
    ranks = [sum(one.ranks[1] for one in runs) / len(runs) for runs in (ours, theirs)]
    steeper = "wide" if wide.alpha < deep.alpha else "deep"
    epochs = []
    for name, runs in curves.items():
        rises = [x for x in map(stopping.rise, runs) if x is not None]
        if len(rises) == len(runs):
            epochs.append(f"{sum(rises) / len(rises):+.1%} ({name})")
        else:
            epochs.append(f"not reached ({name}: its best epoch is among the last two)")
    return "\n\n".join(
        [
            f"**Designs (C1).** At {size} conversations tokens in every layer change perplexity by "
            f"{change(pair)} against the equal-decrease design; effective rank {ranks[0]:.1%} "
            f"against {ranks[1]:.1%}. "
            + _side(pair, "Tokens in every layer are better", "Equal-decrease is better"),
            f"**Shapes (C8).** α = {deep.alpha:.3f} (deep) and {wide.alpha:.3f} (wide): the "
            f"{steeper} shape gains more from data here. Crossover: "
            f"{scaling.crossover(deep, wide).words()}. Slopes from a few sizes of one corpus "
            "describe that corpus.",
            "**Epochs (C9).** Perplexity two epochs past its best one: "
            f"{', '.join(epochs)}. Published: +57 to +181 %, at 0.002.",
        ]
    )


def _side(pair: Paired, better: str, worse: str) -> str:
    return {
        None: "One seed: no interval.",
        -1: f"{better}, beyond chance.",
        1: f"{worse}, beyond chance.",
        0: "No difference can be told from chance.",
    }[intervals.side(pair.low, pair.high)]


def forms(tokens: ArrayLike, ppl: ArrayLike) -> str:
    """Which form of law predicts the largest size best from the others, in Markdown."""
    left = scaling.leave_largest_out(tokens, ppl)
    known = left[left.error.notna()]
    if known.empty:
        return "**Forms.** Too few sizes to leave the largest out."
    best = known.iloc[int(known.error.abs().to_numpy().argmin())]
    listed = ", ".join(f"{row.error:+.1%} ({row.form})" for row in known.itertuples())
    missing = left[left.error.isna()]
    rest = "" if missing.empty else f" Too few sizes for: {', '.join(missing.form)}."
    return (
        f"**Forms.** Fitted without the largest size, {best.doublings:.1f} doublings beyond the "
        f"next, the forms miss its perplexity by {listed}; closest is "
        f"{scaling.FORMS[str(best.form)].split(',')[0]}.{rest} One size left out ranks forms "
        "weakly; the error itself says how far an extrapolation can be trusted."
    )


def patience(results: Sequence[Result], first: int, second: int) -> str:
    """Whether a longer patience finds a better epoch, in Markdown; runs as `stopping.replay`."""
    replays = [stopping.replay(result, [first, second]) for result in results]
    changes = [one.val_ppl[second] / one.val_ppl[first] - 1 for one in replays]
    middle, low, high = intervals.mean(changes)
    gained = sum(value < 0 for value in changes)
    within = "one seed, no interval"
    if low is not None:
        within = f"95 % interval {low:+.1%} to {high:+.1%}, {len(changes)} seeds"
    over = stopping.replay(results[0], [first]).val_ppl
    return (
        f"**Patience (C10).** Patience {second} instead of {first} changes the perplexity by "
        f"{middle:+.1%} ({within}); it found a better epoch in {gained} of {len(changes)} runs. "
        f"Without a choice of epoch, the last one is "
        f"{over['none, last kept'] / over['none, best kept'] - 1:+.1%} over the best (first seed)."
    )


def predictions(results: Results, scores: pd.DataFrame) -> str:
    """How well Phase 1's measures predict Phase 2's perplexity, in Markdown.

    Args:
        scores: `rules.score` of the same runs.
    """
    frame = results.frame()
    gain, table = prediction.what_er_adds(frame), prediction.by_configuration(frame)
    rule = prediction.predictors(frame).loc[prediction.RULE]
    verdicts = {1: "helps, beyond chance", -1: "hurts, beyond chance"}
    side = intervals.side(gain.low, gain.high)
    adds = verdicts.get(side or 0, "cannot be told from nothing")
    within = "" if gain.low is None else f" (95 % interval {gain.low:+.1%} to {gain.high:+.1%})"
    said = [
        f"**ER as a predictor (C16).** Perplexity of a configuration left out is missed by "
        f"{gain.tokens_only:.1%} from the number of tokens alone, by {gain.tokens_and_er:.1%} with "
        f"effective rank added: a gain of {gain.gain:+.1%}{within}, over {gain.configurations} "
        f"configurations; what ER adds {adds}. The published 500 − 4·ER, meant for another "
        f"corpus, misses by {rule.error:.0%}."
    ]
    if table.alpha.notna().all() and len(table) > 3:
        both = prediction.correlation(table.alpha, table.val_er)
        said.append(
            f"**α and ER (C12).** r = {both.r:+.2f} (95 % interval {both.low:+.2f} to "
            f"{both.high:+.2f}, {both.n} configurations; published table: r = 0.01)."
        )
    last = frame[frame.samples == frame.samples.max()]
    settled = last.converged >= last.convergence_rate
    if settled.any() and not settled.all():
        said.append(
            f"**Convergence.** At {last.samples.max()} conversations the {settled.sum()} runs "
            f"whose Phase 1 converged have a mean perplexity of {last.val_ppl[settled].mean():.1f},"
            f" the {(~settled).sum()} whose never did {last.val_ppl[~settled].mean():.1f}. (They "
            "also differ in the choices that decide over convergence.)"
        )
    known = scores[scores.hit_rate.notna()]
    good, poor = known.rule[known.low > 0], known.rule[known.high < 0]
    rest = len(known) - len(good) - len(poor)
    words = [f"{len(known)} of {len(scores)} rules call any run good or poor"]
    words += [f"better than chance: {', '.join(good)}"] if len(good) else []
    words += [f"**worse than chance**: {', '.join(poor)}"] if len(poor) else []
    words += [f"not told from chance: {rest}"] if rest else []
    said.append(f"**Rules (C18).** {'; '.join(words)}.")
    return "\n\n".join(said)


def controls(groups: comparison.Groups) -> str:
    """What each part of CVFP adds, and what is better than CVFP, in Markdown.

    Args:
        groups: runs by the kinds of `comparison.KINDS`, all at the same sizes and seeds.
    """
    size = comparison.sizes(groups)[-1]
    pairs = comparison.against(groups, size)

    def versus(first: str, second: str) -> Paired:
        return paired(comparison.at(groups[first], size), comparison.at(groups[second], size))

    def told(pair: Paired, better: str, worse: str) -> str:
        return f"{change(pair)}. {_side(pair, better, worse)}"

    trained = versus(comparison.CVFP, comparison.RANDOM)
    context = versus(comparison.CVFP, comparison.ZERO)
    untrained = versus(comparison.RANDOM, comparison.ZERO)
    more = trained.needed(0.01)
    half = (
        "No interval with these runs."
        if trained.half_width is None or more is None
        else f"The interval's half-width is {trained.half_width:.1%}; 1 % would take about "
        f"{more[0]} seeds and {more[1]} conversations."
    )
    sides = {kind: intervals.side(pair.low, pair.high) for kind, pair in pairs.items()}
    better = [kind for kind, side in sides.items() if side == -1]
    level = [kind for kind, side in sides.items() if not side]
    runs = comparison.at(groups[comparison.CVFP], size)
    ppl = sum(one.val_ppl or 0.0 for one in runs) / len(runs)
    counted = [
        f"{name} ({line['ppl']:.1f})"
        for key, name in comparison.COUNTED.items()
        if (line := runs[0].baselines[key]) is not None and line["ppl"] < ppl
    ]
    return "\n\n".join(
        [
            f"At {size} conversations, {runs[0].train_tokens:,} tokens:",
            "**Phase 1's training** (trained against random, frozen ContextBlock) changes "
            "perplexity by " + told(trained, "It helps", "**It hurts**") + f" {half}",
            "**Context** (CVFP against zero contexts) changes it by "
            + told(context, "Context helps", "**It hurts: the model is better without**")
            + f" Contexts of the random block (against none): {change(untrained)}.",
            "**The table**, against the fitted and frozen one: training it on "
            + change(pairs[comparison.TRAINED_TABLE])
            + "; a random one that Phase 2 trains "
            + change(pairs[comparison.LEARNT_TABLE])
            + "; a random one that stays as it is "
            + change(pairs[comparison.RANDOM_TABLE])
            + ".",
            f"**Better than CVFP, beyond chance**: {', '.join(better) or 'none'}; not told from "
            f"it: {', '.join(level) or 'none'}. Of the models that only count, lower than CVFP's "
            f"{ppl:.1f}: {', '.join(counted) or 'none'}.",
        ]
    )
