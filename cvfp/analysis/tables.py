"""Tables and readings of finished runs, made from their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from cvfp.analysis.plots import EXTRAPOLATION
from cvfp.analysis.scaling import PowerLaw
from cvfp.experiment import Result
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
            "val_ppl": round(result.val_ppl, 2),
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
