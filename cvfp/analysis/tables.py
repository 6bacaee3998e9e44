"""Tables of finished runs, for reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from numpy.typing import ArrayLike

from cvfp.analysis import comparison as compare
from cvfp.analysis import intervals, prediction, scaling, stopping
from cvfp.analysis.intervals import Paired, paired
from cvfp.analysis.plots import EXTRAPOLATION
from cvfp.analysis.scaling import AlphaOverRuns, PowerLaw
from cvfp.experiment import Result
from cvfp.gap import AS_LEFT, CAUSES, Gap
from cvfp.model import ContextBlock, TokenBlock, count_parameters


def ran_on(results: Sequence[Result], n_jobs: int = 1) -> pd.DataFrame:
    """What the runs ran on: corpus, tokeniser, table, model, device, precision, seeds, jobs."""
    first = results[0]
    one = first.experiment

    def values(of: Callable[[Result], float]) -> str:
        return ", ".join(f"{value:,}" for value in sorted({of(result) for result in results}))

    every = {result.experiment.token_input_all_layers for result in results}
    designs = {True: "tokens in every layer", False: "equal-decrease"}
    contended = ", times taken under contention" if n_jobs > 1 else ""
    facts = {
        "corpus": one.dataset,
        "validation": f"{one.validation}, {first.val_tokens:,} tokens",
        "tokeniser": f"{one.tokenizer}, {first.vocab_size:,} entries",
        "embedding table": f"{one.embedding}, {first.embedding_dim} wide, "
        + ("frozen" if one.freeze_embedding else "trained"),
        "layers": values(lambda result: result.experiment.num_layers),
        "context size D": values(lambda result: result.experiment.context_dim),
        "input tokens n": values(lambda result: result.experiment.num_input_tokens),
        "design": ", ".join(designs[kind] for kind in sorted(every, reverse=True)),
        **{
            f"parameters, {part}": values(lambda result: result.parameters[part])  # noqa: B023
            for part in first.parameters
        },
        "head": "tied to the table" if one.weight_tying else "own",
        "device": f"{first.device} ({first.device_name}), {first.threads} threads",
        "precision": first.precision,
        "seed": values(lambda result: result.experiment.seed),
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
        "trigram_ppl": "KN trigram",
        "kneser_ney_both_ppl": "KN fit+train",
        "trigram_both_ppl": "KN trigram fit+train",
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
    """Perplexity by each law, and how many times its largest run that is (under 1: inside)."""
    rows = {}
    for tokens in EXTRAPOLATION:
        row = {}
        for name, law in laws.items():
            row[f"{name}: PPL by its law"] = round(law.predict(tokens), 1)
            row[f"{name}: times its largest run"] = round(tokens / largest[name], 1)
        rows[f"{tokens / 1e6:g} M tokens"] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def laws(laws: dict[str, PowerLaw]) -> pd.DataFrame:
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
            "tokens": f"{law.low:,.0f} … {law.high:,.0f}",
        }
    return pd.DataFrame(rows)


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
    frame.loc["the causes, added"] = [gap.added, None, None]
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


def _sizes(results: Sequence[Result]) -> dict[int, list[Result]]:
    sizes = sorted({result.experiment.samples for result in results})
    return {size: [r for r in results if r.experiment.samples == size] for size in sizes}


def _mean(values: Sequence[float | None], form: str, scale: float = 1.0) -> str:
    known = [value for value in values if value is not None]
    return "–" if not known else form.format(scale * sum(known) / len(known))


def contrast(
    first: Sequence[Result], second: Sequence[Result], first_name: str, second_name: str
) -> pd.DataFrame:
    """Two kinds of run at every size: perplexity, accuracy, rank; the paired difference."""
    rows = {}
    other = _sizes(second)
    for size, runs in _sizes(first).items():
        theirs = other[size]
        pair = paired(runs, theirs)
        row = {"tokens": f"{runs[0].train_tokens:,}"}
        for name, kind in ((first_name, runs), (second_name, theirs)):
            row[f"PPL, {name}"] = _mean([r.val_ppl for r in kind], "{:.1f}")
            row[f"ER %, {name}"] = _mean([r.val_er for r in kind], "{:.1f}", 100)
        row["change of PPL"] = f"{pair.change:+.1%}"
        row["95 % interval"] = _bounds(pair.low, pair.high, "{:+.1%}")
        rows[size] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("conversations")


def _bounds(low: float | None, high: float | None, form: str) -> str:
    if low is None or high is None:
        return "needs two seeds"
    return f"{form.format(low)} … {form.format(high)}"


def shapes(kinds: dict[str, Sequence[Result]]) -> pd.DataFrame:
    """Parameters, cost and outcome of each shape at each size (means over seeds)."""
    rows = []
    for name, results in kinds.items():
        for size, runs in _sizes(results).items():
            first = runs[0]
            rows.append(
                {
                    "shape": name,
                    "conversations": size,
                    "ContextBlock": f"{first.parameters['context_block']:,}",
                    "TokenBlock": f"{first.parameters['token_block']:,}",
                    "PPL": _mean([r.val_ppl for r in runs], "{:.1f}"),
                    "accuracy %": _mean([r.val_acc for r in runs], "{:.1f}", 100),
                    "ER %": _mean([r.val_er for r in runs], "{:.1f}", 100),
                    "iterations": _mean([r.phase1_iterations for r in runs], "{:.0f}"),
                    "converged %": _mean([r.converged for r in runs], "{:.1f}", 100),
                    "memory, tokens": _mean([r.memory_length for r in runs], "{:.0f}"),
                    "best epoch": _mean([r.best_epoch for r in runs], "{:.1f}"),
                    "Phase 1, s": _mean([r.seconds["phase1"] for r in runs], "{:.1f}"),
                    "Phase 2, s": _mean([r.seconds.get("phase2") for r in runs], "{:.1f}"),
                }
            )
    return pd.DataFrame(rows).set_index(["shape", "conversations"])


def alpha(found: AlphaOverRuns) -> pd.DataFrame:
    """An exponent over runs, with its interval over seeds and held-out conversations."""
    return pd.DataFrame(
        {
            "α": [f"{found.alpha:.4f}"],
            "95 % interval": [_bounds(found.low, found.high, "{:.4f}")],
            "seeds": [found.seeds],
            "conversations": [found.conversations],
            "each seed": [", ".join(f"{one:.4f}" for one in found.by_seed)],
        },
        index=["measured"],
    )


def overfitting(curves: dict[str, Sequence[Result]], note: pd.DataFrame) -> pd.DataFrame:
    """Best epoch, and how much worse two epochs later and the last are (means over seeds); note
    003's figures beside."""
    rows = {}
    for name, runs in curves.items():
        best = [min(r.phase2_history, key=lambda row: row["val_loss"]) for r in runs]
        ends = [r.phase2_history[-1]["val_ppl"] for r in runs]
        rows[name] = {
            "best epoch": _mean([row["epoch"] for row in best], "{:.1f}"),
            "PPL there": _mean([row["val_ppl"] for row in best], "{:.1f}"),
            "two epochs later": _mean([stopping.rise(r) for r in runs], "{:+.1%}"),
            "last epoch": _mean(
                [end / row["val_ppl"] - 1 for end, row in zip(ends, best, strict=True)], "{:+.1%}"
            ),
        }
    for row in note.to_dict("records"):
        rise = row["epoch4_val_ppl"] / row["epoch2_val_ppl"] - 1
        rows[f"published, {row['experiment']} at {row['samples']}, lr 0.002"] = {
            "best epoch": f"{row['best_epoch']}",
            "PPL there": f"{row['epoch2_val_ppl']:.1f}",
            "two epochs later": f"{rise:+.1%}",
            "last epoch": f"{rise:+.1%}",
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def patience(results: Sequence[Result], patiences: Sequence[int]) -> pd.DataFrame:
    """What each patience would have kept of the same runs: means over seeds, and the change of
    perplexity against the first patience with its interval.

    Args:
        results: runs of one size, one a seed, that stopped at no epoch but the last.
    """
    replays = [stopping.replay(result, patiences) for result in results]
    rows = {}
    for name in replays[0].index:
        kept = [one.loc[name] for one in replays]
        changes = [
            row.val_ppl / one.val_ppl[patiences[0]] - 1
            for row, one in zip(kept, replays, strict=True)
        ]
        middle, low, high = intervals.mean(changes)
        rows[name] = {
            "epochs run": _mean([row.stopped for row in kept], "{:.1f}"),
            "epoch kept": _mean([row.best_epoch for row in kept], "{:.1f}"),
            "PPL": _mean([row.val_ppl for row in kept], "{:.1f}"),
            "accuracy %": _mean([row.val_acc for row in kept], "{:.2f}", 100),
            f"change of PPL against {patiences[0]}": "–"
            if name == patiences[0]
            else f"{middle:+.1%}",
            "95 % interval": "–" if name == patiences[0] else _bounds(low, high, "{:+.1%}"),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("patience")


def forms(tokens: ArrayLike, ppl: ArrayLike) -> pd.DataFrame:
    """Every form of law: exponent with interval, floor, R², and the error in predicting the largest
    size from the smaller ones."""
    fits = scaling.forms(tokens, ppl)
    missed = scaling.leave_largest_out(tokens, ppl).set_index("form")
    rows = {}
    for form, words in scaling.FORMS.items():
        error = missed.error[form]
        left = missed.reason[form] if pd.isna(error) else f"{error:+.1%}"
        name, formula = words.split(", ")
        if form not in fits:
            needed = f"needs {scaling.SIZES_NEEDED[form]} sizes"
            rows[name] = {"formula": formula, "95 % interval": needed}
            continue
        law = fits[form]
        ends: tuple[float | None, float | None] | None
        if isinstance(law, PowerLaw):
            exponent, ends, floor, remark = law.alpha, law.interval(), "–", ""
        else:
            exponent, floor = -law.exponent, f"{law.limit:.1f}"
            within = law.interval()
            # The page has the exponent negative: the ends change places.
            ends = None if within is None else (_negative(within[1]), _negative(within[0]))
            remark = "floor not identified" if law.at_bound else ""
        rows[name] = {
            "formula": formula,
            "exponent": f"{exponent:.3f}",
            "95 % interval": "no point to spare"
            if ends is None
            else " … ".join("no end" if end is None else f"{end:.3f}" for end in ends),
            "floor, PPL": floor,
            "R²": "–" if law.r2 is None else f"{law.r2:.4f}",
            "error at the largest size, left out": left,
            "remark": remark,
        }
    return pd.DataFrame.from_dict(rows, orient="index").fillna("–")


def windows(tokens: ArrayLike, ppl: ArrayLike, note: pd.DataFrame, size: int = 4) -> pd.DataFrame:
    """α over windows of sizes, measured and of note 004's version v3."""
    rows = []
    for name, table in (
        ("measured here", scaling.windows(tokens, ppl, size)),
        ("published, note 004", scaling.windows(note.tokens, note.val_ppl, size)),
    ):
        for row in table.to_dict("records"):
            rows.append(
                {
                    "": name,
                    "tokens": f"{row['tokens_low']:,.0f} … {row['tokens_high']:,.0f}",
                    "α": f"{row['alpha']:.3f}",
                    "95 % interval": f"{row['alpha_low']:.3f} … {row['alpha_high']:.3f}",
                }
            )
    return pd.DataFrame(rows).set_index("")


def configurations(frame: pd.DataFrame) -> pd.DataFrame:
    """`prediction.by_configuration` for reading, with how far Phase 1 came."""
    table = prediction.by_configuration(frame)
    fields = list(prediction.CONFIGURATION)
    ended = frame.groupby(fields)[["converged", "train_er", "memory_length"]].mean()
    shown = table.join(ended, on=fields)
    return pd.DataFrame(
        {
            "α": shown.alpha.map(_missing_as("{:.3f}")),
            "its error": shown.alpha_error.map(_missing_as("{:.3f}")),
            "val ER %": (100 * shown.val_er).map("{:.1f}".format),
            "train ER %": (100 * shown.train_er).map("{:.1f}".format),
            "PPL": shown.val_ppl.map("{:.1f}".format),
            "iterations": shown.phase1_iterations.map("{:.0f}".format),
            "converged %": (100 * shown.converged).map("{:.1f}".format),
            "memory, tokens": shown.memory_length.map(_missing_as("{:.0f}")),
        }
    )


def predictors(frame: pd.DataFrame) -> pd.DataFrame:
    """`prediction.predictors` for reading: the errors in percent."""
    table = prediction.predictors(frame)
    share = _missing_as("{:.1%}")
    return pd.DataFrame(
        {
            "fitted": table.fitted.astype(int),
            "α": table.alpha.map(_missing_as("{:.3f}")),
            "β, per point of ER": table.beta.map(_missing_as("{:+.4f}")),
            "error, runs fitted": table.error.map(share),
            "error, configuration left out": table.left_out_error.map(share),
            "worst run": table.left_out_worst.map(share),
        }
    )


def scores(table: pd.DataFrame) -> pd.DataFrame:
    """`prediction.score` for reading."""
    share, signed = _missing_as("{:.0%}"), _missing_as("{:+.0%}")
    return pd.DataFrame(
        {
            "calls": table.called,
            "right": table.hit_rate.map(share).to_numpy(),
            "by chance": table.base_rate.map(share).to_numpy(),
            "excess": table.excess.map(signed).to_numpy(),
            "95 % interval": [
                "–" if pd.isna(low) else f"{low:+.0%} … {high:+.0%}"
                for low, high in zip(table.low, table.high, strict=True)
            ],
            "p": table.p.map(_missing_as("{:.3f}")).to_numpy(),
            "remark": table.remark,
        }
    ).set_index(table.rule)


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def comparison(groups: Mapping[str, Sequence[Result]]) -> pd.DataFrame:
    """Every kind of run at every size: perplexity, accuracy and bits per byte with intervals over
    seeds, the paired change of perplexity against CVFP, parameters and seconds."""
    rows = []
    for size in compare.sizes(groups):
        changes = compare.against(groups, size)
        for kind, results in groups.items():
            runs = compare.at(results, size)
            change = changes.get(kind)
            rows.append(
                {
                    "conversations": size,
                    "kind": kind,
                    "PPL": _spread([r.val_ppl for r in runs], 1),
                    "change against CVFP": "–" if change is None else f"{change.change:+.1%}",
                    "95 % interval": "–"
                    if change is None
                    else _bounds(change.low, change.high, "{:+.1%}"),
                    "accuracy %": _spread([r.val_acc for r in runs], 2, 100),
                    "bits/byte": _spread([r.val_bpb for r in runs], 3),
                    "trained parameters": f"{compare.trained_parameters(runs[0]):,}",
                    "best epoch": _mean([r.best_epoch for r in runs], "{:.1f}"),
                    "training, s": _mean([compare.training_seconds(r) for r in runs], "{:.1f}"),
                }
            )
    return pd.DataFrame(rows).set_index(["conversations", "kind"])


def counted(results: Sequence[Result]) -> pd.DataFrame:
    """Perplexity of the models that only count, at every size (bits per byte beside it)."""
    rows = {}
    for size, runs in _sizes(results).items():
        lines = runs[0].baselines
        rows[size] = {
            name: "–" if (line := lines[key]) is None else "{ppl:.1f} ({bpb:.3f})".format(**line)
            for key, name in compare.COUNTED.items()
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("conversations")


def grid(tuned: Mapping[str, Sequence[Result]]) -> pd.DataFrame:
    """Perplexity of each kind at each learning rate tried; the best is marked."""
    rows = {}
    for kind, runs in tuned.items():
        best = compare.best_rate(runs)
        rows[kind] = {
            f"{one.experiment.phase2_learning_rate:g}": "–"
            if one.val_ppl is None
            else f"{one.val_ppl:.1f}"
            + (" ←" if one.experiment.phase2_learning_rate == best else "")
            for one in runs
        }
        rates = [one.experiment.phase2_learning_rate for one in runs]
        rows[kind]["remark"] = "best at the end of the grid" if best in _ends(rates) else ""
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("learning rate")


def _ends(rates: Sequence[float]) -> tuple[float, float]:
    return min(rates), max(rates)


def _spread(values: Sequence[float | None], digits: int, scale: float = 1.0) -> str:
    known = [scale * value for value in values if value is not None]
    if not known:
        return "–"
    middle, low, high = intervals.mean(known)
    half = "" if low is None or high is None else f" ± {(high - low) / 2:.{digits}f}"
    return f"{middle:.{digits}f}{half}"


def _missing_as(form: str) -> Callable[[float], str]:
    return lambda value: "–" if pd.isna(value) else form.format(value)
