"""Tables and readings of finished runs, made from their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from cvfp.analysis.intervals import Paired
from cvfp.analysis.plots import EXTRAPOLATION
from cvfp.analysis.scaling import PowerLaw
from cvfp.experiment import Result
from cvfp.gap import AS_LEFT, CAUSES, Gap
from cvfp.model import ContextBlock, TokenBlock, count_parameters

# The lines that a perplexity has to be read against, the unigram aside (it is far above).
RIVALS = {
    "kneser_ney": "a Kneser–Ney bigram of the same training tokens",
    "table": "the fitted table alone, as the bigram model it was fitted as, with no training token",
    "kneser_ney_both": "a Kneser–Ney bigram of fitting set and training tokens together",
}


def ran_on(results: Sequence[Result], n_jobs: int = 1) -> pd.DataFrame:
    """What the runs ran on: corpus, tokeniser, table, model, device, precision, seeds, jobs."""
    first = results[0]
    one = first.experiment
    seeds = sorted({result.experiment.seed for result in results})
    design = "tokens in every layer" if one.token_input_all_layers else "equal-decrease"
    contended = ", times taken under contention" if n_jobs > 1 else ""
    facts = {
        "corpus": one.dataset,
        "validation": f"{one.validation}, {first.val_tokens:,} tokens",
        "tokeniser": f"{one.tokenizer}, {first.vocab_size:,} entries",
        "embedding table": f"{one.embedding}, {first.embedding_dim} wide, "
        + ("frozen" if one.freeze_embedding else "trained"),
        "model": f"{one.num_layers} layers x {one.context_dim}, "
        f"n = {one.num_input_tokens}, {design}",
        **{f"parameters, {part}": f"{count:,}" for part, count in first.parameters.items()},
        "head": "tied to the table" if one.weight_tying else "own",
        "device": f"{first.device} ({first.device_name}), {first.threads} threads",
        "precision": first.precision,
        "seed": ", ".join(map(str, seeds)),
        "parallel jobs": f"{n_jobs}{contended}",
        "from the store": f"{sum(r.from_store for r in results)} of {len(results)} runs",
        **first.versions,
    }
    return pd.DataFrame({"": facts})


def runs(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per size (mean over seeds; the spread of PPL where there are several)."""
    columns = {
        "train_tokens": "tokens",
        "val_ppl": "PPL",
        "val_acc": "accuracy %",
        "val_bpb": "bits/byte",
        "train_er": "train ER %",
        "val_er": "val ER %",
        "phase1_iterations": "iterations",
        "converged": "converged %",
        "best_epoch": "best epoch",
        "seconds": "seconds",
        "unigram_ppl": "unigram",
        "kneser_ney_ppl": "KN bigram",
        "table_ppl": "table alone",
        "kneser_ney_both_ppl": "KN fit+train",
    }
    stages = [c for c in frame.columns if str(c).startswith("seconds_")]
    wide = frame.assign(seconds=frame[stages].sum(axis=1)).groupby("samples")
    means = wide[list(columns)].mean(numeric_only=True).rename(columns=columns)
    for name in means.columns:
        if str(name).endswith("%"):
            means[name] *= 100
    if len(frame.seed.unique()) > 1:
        means.insert(2, "PPL s.d.", wide.val_ppl.std())
        means.insert(0, "seeds", wide.seed.nunique())
    digits = dict.fromkeys(means.columns, 1) | {
        "tokens": 0,
        "bits/byte": 3,
        "PPL s.d.": 2,
        "seeds": 0,
    }
    rounded = means.round(digits)
    return rounded.astype({name: int for name in ("tokens", "seeds") if name in rounded})


def extrapolation(laws: dict[str, PowerLaw], largest: dict[str, float]) -> pd.DataFrame:
    """Perplexity that each law predicts beyond its data, and how far beyond it is."""
    rows = {}
    for tokens in EXTRAPOLATION:
        row = {}
        for name, law in laws.items():
            row[f"{name}: PPL (extrapolated)"] = round(law.predict(tokens), 1)
            row[f"{name}: times its largest run"] = round(tokens / largest[name], 1)
        rows[f"{tokens / 1e6:g} M tokens"] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def laws(laws: dict[str, PowerLaw], tokens: dict[str, Sequence[float]]) -> pd.DataFrame:
    """Fits side by side: alpha with its interval, A, R², % per doubling, the range of tokens."""
    rows = {}
    for name, law in laws.items():
        interval = law.interval()
        span = "needs three points" if interval is None else "{:.3f} … {:.3f}".format(*interval)
        rows[name] = {
            "alpha": f"{law.alpha:.4f}",
            "95 % interval": span,
            "A": f"{law.A:,.0f}",
            "R²": "–" if law.r2 is None else f"{law.r2:.4f}",
            "PPL per doubling": f"{law.per_doubling:+.1%}",
            "points": law.points,
            "tokens": f"{min(tokens[name]):,.0f} … {max(tokens[name]):,.0f}",
        }
    return pd.DataFrame(rows)


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
    if ppl < measured[best]:
        verdict = "CVFP has the lowest perplexity of these."
    else:
        verdict = (
            f"**A baseline wins**: {RIVALS.get(best, best)} predicts these conversations better "
            "than CVFP does at this size."
        )
    return "\n".join(
        [f"CVFP's validation perplexity is {ppl:.1f}. Beside it:", "", *said, "", verdict]
    )


def quickstart_reading(result: Result) -> str:
    """What one run showed, in Markdown."""
    one = result.experiment
    rank, size = result.val_er * one.context_dim, one.context_dim
    done = result.converged >= one.convergence_rate
    fate = (
        f"stopped at iteration {result.phase1_iterations} with {result.converged:.1%} of the "
        "tokens converged"
        if done
        else f"did not converge: {result.converged:.1%} after {result.phase1_iterations} iterations"
    )
    if result.val_ppl is None:
        return (
            f"**Phase 1** was given up at iteration {result.phase1_iterations}: {result.aborted}."
        )
    last = result.phase2_history[-1]
    lines = {k: None if v is None else v["ppl"] for k, v in result.baselines.items()}
    return "\n\n".join(
        [
            f"**Phase 1** {fate}. The contexts of held-out text span {rank:.0f} of {size} "
            f"directions by effective rank ({result.val_er:.1%}; training {result.train_er:.1%}).",
            f"**Phase 2** was best at epoch {result.best_epoch} of {last['epoch']:.0f} run: "
            f"accuracy {result.val_acc:.1%}, {result.val_bpb:.3f} bits per byte. The epoch is "
            "chosen on the tokens it is judged on, as in the notes, which flatters it a little.",
            against_baselines(result.val_ppl, lines),
        ]
    )


def scaling_reading(frame: pd.DataFrame, law: PowerLaw) -> str:
    """What a ladder of sizes showed, in Markdown."""
    means = frame.groupby("train_tokens").mean(numeric_only=True)
    first, last = means.iloc[0], means.iloc[-1]
    low, high = means.index[0], means.index[-1]
    interval = law.interval()
    within = (
        "no interval: two points always lie on a line"
        if interval is None
        else f"95 % interval {interval[0]:.3f} to {interval[1]:.3f}, {law.points} points"
    )
    r2 = "" if law.r2 is None else f", R² {law.r2:.3f}"
    lines = {
        name: None if pd.isna(last[f"{name}_ppl"]) else float(last[f"{name}_ppl"])
        for name in ("unigram", *RIVALS)
    }
    falls = law.alpha < 0
    capped = frame[frame.best_epoch == frame.phase2_epochs]
    cap = (
        "Every run was past its best epoch when it stopped."
        if capped.empty
        else "Still improving at the last epoch allowed, so that their perplexity is an upper "
        f"bound: the runs of {', '.join(map(str, sorted(capped.samples.unique())))} conversations "
        "(`-p phase2_epochs` allows more)."
    )
    shares = frame.seed.nunique()
    return "\n\n".join(
        [
            f"**Law.** From {low:,} to {high:,} training tokens perplexity "
            f"{'falls' if falls else 'does not fall'}, {first.val_ppl:.1f} to {last.val_ppl:.1f}: "
            f"α = {law.alpha:.3f} ({within}{r2}), {law.per_doubling:+.1%} per doubling. A high R² "
            "on so few points says that a line fits here, not that it goes on: the extrapolated "
            f"perplexities lie up to {1e7 / high:.0f} times beyond the largest run.",
            f"**Seeds.** {shares} seed{'s' if shares > 1 else ''}: "
            + (
                "the spread between seeds is not measured in this run (`-p seeds 0,1,2` does)."
                if shares == 1
                else "the table's PPL s.d. is the spread between them."
            ),
            f"**Epochs.** {cap}",
            f"**Rank.** Effective rank of held-out contexts {first.val_er:.1%} to "
            f"{last.val_er:.1%} over the ladder; of training contexts {first.train_er:.1%} to "
            f"{last.train_er:.1%}.",
            "**Against models without CVFP**, at the largest size. "
            + against_baselines(float(last.val_ppl), lines),
            "The table is fitted on conversations of its own, so that part of what CVFP predicts "
            "it was given, as with GPT-2's table in the published runs; α and A depend on corpus, "
            "tokeniser and table, and cannot be compared across them.",
        ]
    )


def record(results: Sequence[Result]) -> pd.DataFrame:
    """The runs behind a notebook, by their keys in the store."""
    rows = [
        {
            "key": result.key,
            "samples": result.experiment.samples,
            "seed": result.experiment.seed,
            "val_ppl": None if result.val_ppl is None else round(result.val_ppl, 2),
        }
        for result in results
    ]
    return pd.DataFrame(rows).set_index("key")


def beside(result: Result, note: pd.Series) -> pd.DataFrame:
    """One run beside a row of note 002's table."""
    return pd.DataFrame(
        {
            "measured here": {
                "corpus": result.experiment.dataset,
                "training tokens": f"{result.train_tokens:,}",
                "Phase 1 iterations": str(result.phase1_iterations),
                "effective rank, validation": f"{result.val_er:.1%}",
                "perplexity (not comparable)": f"{result.val_ppl:.1f}",
                "accuracy (not comparable)": f"{result.val_acc:.1%}",
            },
            "published, note 002": {
                "corpus": "UltraChat",
                "training tokens": f"{note.tokens:,.0f}",
                "Phase 1 iterations": f"{note.phase1_iterations:.0f}",
                "effective rank, validation": f"{note.val_er:.1f}%",
                "perplexity (not comparable)": f"{note.val_ppl:.1f}",
                "accuracy (not comparable)": f"{note.val_acc:.1f}%",
            },
        }
    )


def published_parameter_counts() -> pd.DataFrame:
    """The shapes of note 003 built and counted, in millions, beside the printed counts."""
    rows = {}
    for layers, width, context, token in ((6, 768, 10.63, 7.68), (3, 1536, 14.17, 5.91)):
        block = ContextBlock(layers, width, 2 * 768, token_input_all_layers=True)
        tokens = TokenBlock(block.widths, 768, 2 * 768)
        rows[f"{layers} x {width}"] = {
            "ContextBlock": round(count_parameters(block) / 1e6, 2),
            "ContextBlock, published": context,
            "TokenBlock": round(count_parameters(tokens) / 1e6, 2),
            "TokenBlock, published": token,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def agreement(gap: Gap, note: pd.DataFrame) -> pd.DataFrame:
    """Parallel against exact contexts, measured beside note 000's table."""
    measured, published = gap.agreement.loc[AS_LEFT], note.set_index("metric")["value"]
    return pd.DataFrame(
        {
            "measured here": {
                "tokens": f"{gap.tokens:,}",
                "cosine, mean": f"{measured.cosine_mean:.4f}",
                "cosine, least": f"{measured.cosine_min:.4f}",
                "mean squared error": f"{measured.mse:.6f}",
                "relative error, mean": f"{measured.relative_error_mean:.1%}",
                "relative error, 95th percentile": f"{measured.relative_error_p95:.1%}",
            },
            "published, note 000": {
                "tokens": "56,602",
                "cosine, mean": f"{published.cosine_mean:.4f}",
                "cosine, least": f"{published.cosine_min:.4f}",
                "mean squared error": f"{published.mse:.6f}",
                "relative error, mean": f"{published.relative_error_mean:.1f}%",
                "relative error, 95th percentile": "–",
            },
        }
    )


def positions(gap: Gap, note: pd.DataFrame) -> pd.DataFrame:
    """First, middle and last 100 tokens, measured beside note 000's table."""
    published = note.set_index("position")
    return pd.DataFrame(
        {
            "MSE": gap.positions.mse.map("{:.4f}".format),
            "MSE, published": published.mse.map("{:.4f}".format),
            "cosine": gap.positions.cosine_mean.map("{:.4f}".format),
            "cosine, published": published.cosine.map("{:.4f}".format),
        }
    )


def causes(gap: Gap) -> pd.DataFrame:
    """Each cause of the gap alone, against the exact contexts; and the causes' sum."""
    rows = {AS_LEFT: gap.agreement.loc[AS_LEFT]}
    rows |= {CAUSES[n]: gap.agreement.loc[n] for n in CAUSES if n in gap.agreement.index}
    frame = pd.DataFrame(rows).T[["mse", "cosine_mean", "relative_error_mean"]]
    frame.loc["the causes, added"] = [_added(gap), None, None]
    whole = frame.mse[AS_LEFT]
    return pd.DataFrame(
        {
            "MSE": frame.mse.map("{:.1e}".format),
            "share of the whole MSE": (frame.mse / whole).map("{:.1%}".format),
            "cosine, mean": frame.cosine_mean.map(lambda x: "" if pd.isna(x) else f"{x:.5f}"),
            "relative error": frame.relative_error_mean.map(
                lambda x: "" if pd.isna(x) else f"{x:.2%}"
            ),
        }
    )


def _added(gap: Gap) -> float:
    # The last update is one of the updates.
    apart = [n for n in CAUSES if n in gap.agreement.index and n != "last_update"]
    return float(gap.agreement.mse[apart].sum())


def change(pair: Paired) -> str:
    """A paired difference in words: "+1.2 % (95 % interval −0.3 to +2.7 %, 3 seeds, …)"."""
    count = f"{pair.seeds} seed{'s' if pair.seeds > 1 else ''}, {pair.conversations} conversations"
    if pair.low is None or pair.high is None:
        return f"{pair.change:+.1%} ({count}; an interval needs two of each)"
    return f"{pair.change:+.1%} (95 % interval {pair.low:+.1%} to {pair.high:+.1%}, {count})"


def parallel_reading(gap: Gap, times: pd.DataFrame, pair: Paired) -> str:
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
    if pair.low is None or pair.high is None:
        verdict = "no interval with these runs: the difference is not judged."
    elif pair.low > 0:
        verdict = "training on the parallel contexts is worse, beyond chance."
    elif pair.high < 0:
        verdict = "training on the parallel contexts is *better*, beyond chance."
    else:
        verdict = "no difference can be told from chance with these runs."
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
            f"{_added(gap) / whole.mse:.0%} of the whole, so they act nearly apart from one "
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


def gap_ran_on(gap: Gap) -> pd.DataFrame:
    """What a comparison of contexts ran on."""
    one = gap.experiment
    design = "tokens in every layer" if one.token_input_all_layers else "equal-decrease"
    last = gap.exact.residuals[-1]["relative"] if gap.exact.residuals else 0.0
    facts = {
        "corpus": f"{one.dataset}, {one.samples} conversations, {gap.tokens:,} tokens",
        "tokeniser, table": f"{one.tokenizer}, {one.embedding}",
        "model": f"{one.num_layers} layers x {one.context_dim}, "
        f"n = {one.num_input_tokens}, {design}",
        "device, threads": f"{one.device}, {torch.get_num_threads()}",
        "precision of Phase 1": one.precision,
        "seed": str(one.seed),
        "Phase 1 iterations": str(gap.iterations),
        "exact contexts, sweeps": str(gap.exact.sweeps),
        "exact contexts, last residual": f"{last:.1e}",
        "exact contexts, error bound": f"{gap.exact.error_bound:.1e}",
        "contraction rate per token": _missing(gap.recurrence.contraction_rate, "{:.3f}"),
        "memory length": _missing(gap.recurrence.memory_length, "{} tokens"),
    }
    return pd.DataFrame({"": facts})


def _missing(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def times(frame: pd.DataFrame) -> pd.DataFrame:
    """Seconds of the three ways to contexts, and what blocks gain over the loop."""
    return pd.DataFrame(
        {
            "step by step, s": frame.sequential.map(lambda x: "–" if pd.isna(x) else f"{x:.3f}"),
            "blocks, s": frame.blocks.map("{:.3f}".format),
            "shifted pass, s": frame.shifted.map("{:.3f}".format),
            "loop / blocks": (frame.sequential / frame.blocks).map(
                lambda x: "–" if pd.isna(x) else f"{x:.0f}x"
            ),
            "largest relative difference": frame.difference.map(
                lambda x: "–" if pd.isna(x) else f"{x:.0e}"
            ),
        }
    ).set_index(frame.tokens.map("{:,.0f}".format).rename("tokens"))


def pairs(named: dict[str, Paired]) -> pd.DataFrame:
    """Paired differences of perplexity, one row each."""
    rows = {}
    for name, pair in named.items():
        bounds = (
            "needs two seeds"
            if pair.low is None or pair.high is None
            else f"{pair.low:+.1%} … {pair.high:+.1%}"
        )
        rows[name] = {
            "change of perplexity": f"{pair.change:+.1%}",
            "95 % interval": bounds,
            "seeds": pair.seeds,
            "conversations": pair.conversations,
            "each seed": ", ".join(f"{x:+.1%}" for x in pair.by_seed),
        }
    return pd.DataFrame.from_dict(rows, orient="index")
