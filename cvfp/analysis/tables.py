"""Tables of finished runs, for reading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import pandas as pd
import torch
from numpy.typing import ArrayLike

from cvfp import registry
from cvfp.analysis import comparison as compare
from cvfp.analysis import intervals, prediction, published, scaling, stopping, style
from cvfp.analysis.intervals import Crossed, Paired, paired
from cvfp.analysis.scaling import EXTRAPOLATION, PowerLaw
from cvfp.controls import count_parameters
from cvfp.gap import AS_LEFT, CAUSES, Gap
from cvfp.model import ContextBlock, TokenBlock
from cvfp.result import Result, Results

DESIGNS = {True: "tokens in every layer", False: "equal-decrease"}


def ran_on(results: Sequence[Result], n_jobs: int = 1) -> pd.DataFrame:
    """What the runs ran on: corpus, tokeniser, table, model, device, precision, seeds, jobs."""
    first = results[0]
    one = first.experiment

    def values(of: Callable[[Result], float]) -> str:
        return ", ".join(f"{value:,}" for value in sorted({of(result) for result in results}))

    every = {result.experiment.token_input_all_layers for result in results}
    own = {
        kind: name
        for kind, parts in registry.PARTS.items()
        if (name := getattr(one, kind)) and not registry.is_built_in(parts.get(name))
    }
    contended = ", times taken under contention" if n_jobs > 1 else ""
    facts = {
        "corpus": one.dataset,
        "conversations": f"{values(lambda r: r.experiment.samples)}, fitting {one.fitting_samples}",
        "validation": f"{one.validation}, {first.val_tokens:,} tokens",
        "tokeniser": f"{one.tokenizer}, {first.vocab_size:,} entries",
        "embedding table": f"{one.embedding}, {first.embedding_dim} wide, "
        + ("frozen" if one.freeze_embedding else "trained"),
        "layers": values(lambda result: result.experiment.num_layers),
        "context size D": values(lambda result: result.experiment.context_dim),
        "input tokens n": values(lambda result: result.experiment.num_input_tokens),
        **own,
        "design": ", ".join(DESIGNS[kind] for kind in sorted(every, reverse=True)),
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


def _words(warnings: Iterable[str]) -> str:
    return "; ".join(filter(None, dict.fromkeys(warnings)))


def _warned(table: pd.DataFrame) -> pd.DataFrame:
    """The table; its column of warnings only where there are any."""
    return table if any(table.warnings) else table.drop(columns="warnings")


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
    means = means.mul([100 if str(name).endswith("%") else 1 for name in means])
    if len(frame.seed.unique()) > 1:
        means.insert(2, "PPL s.d.", wide.val_ppl.std())
        means.insert(0, "seeds", wide.seed.nunique())
    means["warnings"] = wide.warnings.agg(_words)
    digits = {"tokens": 0, "bits/byte": 3, "PPL s.d.": 2}
    rounded = means.round({name: digits.get(str(name), 1) for name in means})
    return _warned(rounded.astype({name: int for name in ("tokens", "seeds") if name in rounded}))


def extrapolation(laws: dict[str, PowerLaw], largest: dict[str, float]) -> pd.DataFrame:
    """Perplexity by each law with its 95 % interval, which takes the law's form for granted, and
    how many times its largest run that is (under 1: inside)."""
    rows = {}
    for tokens in EXTRAPOLATION:
        row = {}
        for name, law in laws.items():
            low, high = law.predict_interval(tokens) or (None, None)
            interval = style.interval(low, high, "{:.1f}", "needs three points")
            row[f"{name}: PPL by its law"] = f"{law.predict(tokens):.1f}"
            row[f"{name}: 95 % interval"] = interval
            row[f"{name}: times its largest run"] = f"{tokens / largest[name]:.1f}"
        rows[f"{tokens / 1e6:g} M tokens"] = row
    return style.rows(rows)


def laws(laws: dict[str, PowerLaw]) -> pd.DataFrame:
    """Fits side by side: alpha with its interval, A, R², % per doubling, the range of tokens."""
    columns = {}
    for name, law in laws.items():
        low, high = law.interval() or (None, None)
        columns[name] = {
            "alpha": f"{law.alpha:.4f}",
            "95 % interval": style.interval(low, high, "{:.3f}", "needs three points"),
            "A": f"{law.A:,.0f}",
            "R²": style.number(law.r2, "{:.4f}"),
            "PPL per doubling": f"{law.per_doubling:+.1%}",
            "points": law.points,
            "tokens": style.interval(law.low, law.high, "{:,.0f}"),
        }
    return pd.DataFrame(columns)


def record(results: Sequence[Result]) -> pd.DataFrame:
    """The runs behind a notebook, by their keys in the store."""
    frame = Results(results).frame().set_index("key").astype({"val_ppl": float})
    return _warned(frame[["samples", "seed", "val_ppl", "warnings"]].round(2))


def beside(result: Result, note: pd.Series) -> pd.DataFrame:
    """One run beside a row of note 002's table."""
    rows = {
        "corpus": (result.experiment.dataset, "UltraChat"),
        "training tokens": (f"{result.train_tokens:,}", f"{note.tokens:,.0f}"),
        "Phase 1 iterations": (f"{result.phase1_iterations}", f"{note.phase1_iterations:.0f}"),
        "effective rank, validation": (f"{result.val_er:.1%}", f"{note.val_er:.1f}%"),
        "perplexity (not comparable)": (f"{result.val_ppl:.1f}", f"{note.val_ppl:.1f}"),
        "accuracy (not comparable)": (f"{result.val_acc:.1%}", f"{note.val_acc:.1f}%"),
        **({"warnings": (words, "")} if (words := _words(result.warnings)) else {}),
    }
    return _two(rows, "published, note 002")


def _two(rows: dict[str, tuple[str, str]], published: str) -> pd.DataFrame:
    return pd.DataFrame.from_dict(rows, orient="index", columns=["measured here", published])


def published_parameter_counts() -> pd.DataFrame:
    """The shapes of note 003 built and counted, in millions, beside what it prints.

    Its ContextBlocks agree with these, and what it says that Phase 2 trains with these TokenBlocks;
    the TokenBlocks that it prints are larger.
    """
    rows = {}
    for note in published.table("003_models").to_dict("records"):
        layers, width = note["num_layers"], note["context_dim"]
        block = ContextBlock(layers, width, 2 * 768, token_input_all_layers=True)
        tokens = TokenBlock(block.widths, 768, 2 * 768)
        rows[f"{layers} x {width}"] = {
            "ContextBlock": round(count_parameters(block) / 1e6, 2),
            "ContextBlock, published": note["context_block_millions"],
            "TokenBlock": round(count_parameters(tokens) / 1e6, 2),
            "trained by Phase 2, published": note["phase2_trained_millions"],
            "TokenBlock, published": note["token_block_millions"],
        }
    return style.rows(rows)


def agreement(gap: Gap, note: pd.DataFrame) -> pd.DataFrame:
    """Parallel against exact contexts, measured beside note 000's table."""
    here, there = gap.agreement.loc[AS_LEFT], note.set_index("metric")["value"]
    errors = here.relative_error_mean, there.relative_error_mean
    rows = {
        "tokens": (f"{gap.tokens:,}", "56,602"),
        "cosine, mean": (f"{here.cosine_mean:.4f}", f"{there.cosine_mean:.4f}"),
        "cosine, least": (f"{here.cosine_min:.4f}", f"{there.cosine_min:.4f}"),
        "mean squared error": (f"{here.mse:.6f}", f"{there.mse:.6f}"),
        "relative error, mean": (f"{errors[0]:.1%}", f"{errors[1]:.1f}%"),
        "relative error, 95th percentile": (f"{here.relative_error_p95:.1%}", style.MISSING),
    }
    return _two(rows, "published, note 000")


def positions(gap: Gap, note: pd.DataFrame) -> pd.DataFrame:
    """First, middle and last 100 tokens, measured beside note 000's table."""
    return style.columns(
        gap.positions.join(note.set_index("position").add_suffix("_note")),
        {
            "MSE": ("mse", "{:.4f}"),
            "MSE, published": ("mse_note", "{:.4f}"),
            "cosine": ("cosine_mean", "{:.4f}"),
            "cosine, published": ("cosine_note", "{:.4f}"),
        },
    )


def causes(gap: Gap) -> pd.DataFrame:
    """Each cause of the gap alone, against the exact contexts; and the causes' sum."""
    names = {AS_LEFT: AS_LEFT, **CAUSES}
    there = [name for name in names if name in gap.agreement.index]
    frame = gap.agreement.loc[there].rename(index=names)
    frame.loc["the causes, added", "mse"] = gap.added
    return style.columns(
        frame.assign(share=frame.mse / frame.mse[AS_LEFT]),
        {
            "MSE": ("mse", "{:.1e}"),
            "share of the whole MSE": ("share", "{:.1%}"),
            "cosine, mean": ("cosine_mean", "{:.5f}"),
            "relative error": ("relative_error_mean", "{:.2%}"),
        },
        missing="",
    )


def gap_ran_on(gap: Gap) -> pd.DataFrame:
    """What a comparison of contexts ran on."""
    one, exact = gap.experiment, gap.exact
    last = exact.residuals[-1]["relative"] if exact.residuals else 0.0
    facts = {
        "corpus": f"{one.dataset}, {one.samples} conversations, {gap.tokens:,} tokens",
        "tokeniser, table": f"{one.tokenizer}, {one.embedding}",
        "model": f"{one.num_layers} layers x {one.context_dim}, "
        f"n = {one.num_input_tokens}, {DESIGNS[one.token_input_all_layers]}",
        "device, threads": f"{one.device}, {torch.get_num_threads()}",
        "precision of Phase 1": one.precision,
        "seed": str(one.seed),
        "Phase 1 iterations": str(gap.iterations),
        "exact contexts, sweeps": str(exact.sweeps),
        "exact contexts, last residual": f"{last:.1e}",
        "exact contexts, error bound": f"{exact.error_bound:.1e}",
        "contraction rate per token": style.number(gap.recurrence.contraction_rate, "{:.3f}"),
        "memory length": style.number(gap.recurrence.memory_length, "{} tokens"),
    }
    return pd.DataFrame({"": facts})


def times(frame: pd.DataFrame) -> pd.DataFrame:
    """Seconds of the three ways to contexts, and what blocks gain over the loop."""
    table = style.columns(
        frame.assign(gain=frame.sequential / frame.blocks),
        {
            "step by step, s": ("sequential", "{:.3f}"),
            "blocks, s": ("blocks", "{:.3f}"),
            "shifted pass, s": ("shifted", "{:.3f}"),
            "loop / blocks": ("gain", "{:.0f}x"),
            "largest relative difference": ("difference", "{:.0e}"),
        },
    )
    return table.set_index(frame.tokens.map("{:,.0f}".format).rename("tokens"))


def pairs(named: dict[str, Paired]) -> pd.DataFrame:
    """Paired differences of perplexity, one row each."""
    rows = {}
    for name, pair in named.items():
        change, within = _change(pair)
        rows[name] = {
            "change of perplexity": change,
            "95 % interval": within,
            "seeds": pair.seeds,
            "conversations": pair.conversations,
            "each seed": ", ".join(f"{x:+.1%}" for x in pair.by_seed),
        }
    return style.rows(rows)


def _change(pair: Paired | None) -> tuple[str, str]:
    """A paired change of perplexity and its interval."""
    if pair is None:
        return style.MISSING, style.MISSING
    missing = style.NO_INTERVAL if pair.seeds < 2 else style.MISSING
    return f"{pair.change:+.1%}", style.interval(pair.low, pair.high, "{:+.1%}", missing)


def _sizes(results: Sequence[Result]) -> dict[int, list[Result]]:
    sizes = sorted({result.experiment.samples for result in results})
    return {size: compare.at(results, size) for size in sizes}


def contrast(
    first: Sequence[Result], second: Sequence[Result], first_name: str, second_name: str
) -> pd.DataFrame:
    """Two kinds of run at every size: perplexity, accuracy, rank; the paired difference."""
    rows = {}
    for size, runs in _sizes(first).items():
        others = compare.at(second, size)
        row = {"tokens": f"{runs[0].train_tokens:,}"}
        for name, kind in ((first_name, runs), (second_name, others)):
            row[f"PPL, {name}"] = style.mean([r.val_ppl for r in kind], "{:.1f}")
            row[f"ER %, {name}"] = style.mean([r.val_er for r in kind], "{:.1f}", 100)
        row["change of PPL"], row["95 % interval"] = _change(paired(runs, others))
        rows[size] = {**row, "warnings": _words(w for r in (*runs, *others) for w in r.warnings)}
    return _warned(style.rows(rows, "conversations"))


def shapes(kinds: dict[str, Sequence[Result]]) -> pd.DataFrame:
    """Parameters, cost and outcome of each shape at each size (means over seeds)."""
    rows = {}
    for name, results in kinds.items():
        for size, runs in _sizes(results).items():
            counts = runs[0].parameters
            rows[name, size] = {
                "ContextBlock": f"{counts['context_block']:,}",
                "TokenBlock": f"{counts['token_block']:,}",
                "PPL": style.mean([r.val_ppl for r in runs], "{:.1f}"),
                "accuracy %": style.mean([r.val_acc for r in runs], "{:.1f}", 100),
                "ER %": style.mean([r.val_er for r in runs], "{:.1f}", 100),
                "iterations": style.mean([r.phase1_iterations for r in runs], "{:.0f}"),
                "converged %": style.mean([r.converged for r in runs], "{:.1f}", 100),
                "memory, tokens": style.mean([r.memory_length for r in runs], "{:.0f}"),
                "best epoch": style.mean([r.best_epoch for r in runs], "{:.1f}"),
                "Phase 1, s": style.mean([r.seconds["phase1"] for r in runs], "{:.1f}"),
                "Phase 2, s": style.mean([r.seconds.get("phase2") for r in runs], "{:.1f}"),
                "warnings": _words(w for r in runs for w in r.warnings),
            }
    return _warned(style.rows(rows, ["shape", "conversations"]))


def alpha(law: Crossed) -> pd.DataFrame:
    """An exponent over runs, with its interval over seeds and held-out conversations."""
    missing = style.NO_INTERVAL if law.seeds < 2 else style.MISSING
    row = {
        "α": f"{law.value:.4f}",
        "95 % interval": style.interval(law.low, law.high, "{:.4f}", missing),
        "seeds": law.seeds,
        "conversations": law.conversations or style.MISSING,
        "each seed": ", ".join(f"{one:.4f}" for one in law.by_seed),
    }
    return style.rows({"measured": row})


def overfitting(curves: dict[str, Sequence[Result]], note: pd.DataFrame) -> pd.DataFrame:
    """Best epoch, and how much worse two epochs later and the last are (means over seeds); note
    003's figures beside."""
    rows = {}
    for name, runs in curves.items():
        best = [stopping.best(r) for r in runs]
        last = [r.phase2_history[-1]["val_ppl"] for r in runs]
        over = [end / row["val_ppl"] - 1 for end, row in zip(last, best, strict=True)]
        rows[name] = {
            "best epoch": style.mean([row["epoch"] for row in best], "{:.1f}"),
            "PPL there": style.mean([row["val_ppl"] for row in best], "{:.1f}"),
            "two epochs later": style.mean([stopping.rise(r) for r in runs], "{:+.1%}"),
            "last epoch": style.mean(over, "{:+.1%}"),
            "warnings": _words(w for r in runs for w in r.warnings),
        }
    for row in note.to_dict("records"):
        rise = f"{row['epoch4_val_ppl'] / row['epoch2_val_ppl'] - 1:+.1%}"
        rows[f"published, {row['experiment']} at {row['samples']}, lr 0.002"] = {
            "best epoch": f"{row['best_epoch']}",
            "PPL there": f"{row['epoch2_val_ppl']:.1f}",
            "two epochs later": rise,
            "last epoch": rise,
            "warnings": "",
        }
    return _warned(style.rows(rows))


def patience(results: Sequence[Result], patiences: Sequence[int]) -> pd.DataFrame:
    """Which epoch each patience would have chosen in the same runs: means over seeds, and the
    change of perplexity against the first patience with its interval.

    Args:
        results: runs of one size, one a seed, that stopped at no epoch but the last.
    """
    replays = [stopping.replay(result, patiences) for result in results]
    first = patiences[0]
    rows = {}
    for name in replays[0].index:
        chosen = [one.loc[name] for one in replays]
        changes = [one.val_ppl[name] / one.val_ppl[first] - 1 for one in replays]
        change, low, high = intervals.mean(changes)
        against = (f"{change:+.1%}", style.interval(low, high, "{:+.1%}"))
        if name == first:
            against = style.MISSING, style.MISSING
        rows[name] = {
            "epochs run": style.mean([row.stopped for row in chosen], "{:.1f}"),
            "epoch chosen": style.mean([row.best_epoch for row in chosen], "{:.1f}"),
            "PPL": style.mean([row.val_ppl for row in chosen], "{:.1f}"),
            "accuracy %": style.mean([row.val_acc for row in chosen], "{:.2f}", 100),
            f"change of PPL against {first}": against[0],
            "95 % interval": against[1],
            "warnings": _words(w for r in results for w in r.warnings),
        }
    return _warned(style.rows(rows, "patience"))


def forms(tokens: ArrayLike, ppl: ArrayLike) -> pd.DataFrame:
    """Every form of law: exponent with interval, floor, R², and the error in predicting the largest
    size from the smaller ones."""
    fits = scaling.forms(tokens, ppl)
    missed = scaling.leave_largest_out(tokens, ppl).set_index("form")
    rows = {}
    for form, words in scaling.FORMS.items():
        name, formula = words.split(", ")
        if form not in fits:
            needed = f"needs {scaling.SIZES_NEEDED[form]} sizes"
            rows[name] = {"formula": formula, "95 % interval": needed}
            continue
        law = fits[form]
        interval = law.interval()
        low, high = interval or (None, None)
        if isinstance(law, PowerLaw):
            exponent, limit, remark = law.alpha, style.MISSING, ""
        else:
            # Negative on the page, as α is: the ends change places.
            exponent, limit = -law.exponent, f"{law.limit:.1f}"
            high, low = (None if end is None else -end for end in (low, high))
            remark = "floor not identified" if law.at_bound else ""
        missing = "no end … no end" if interval else "no point to spare"
        error = style.number(missed.error[form], "{:+.1%}", missed.reason[form])
        rows[name] = {
            "formula": formula,
            "exponent": f"{exponent:.3f}",
            "95 % interval": style.interval(low, high, "{:.3f}", missing),
            "floor, PPL": limit,
            "R²": style.number(law.r2, "{:.4f}"),
            "error at the largest size, left out": error,
            "remark": remark,
        }
    return style.rows(rows).fillna(style.MISSING)


def windows(tokens: ArrayLike, ppl: ArrayLike, note: pd.DataFrame) -> pd.DataFrame:
    """α over windows of sizes, measured and of note 004's version v3."""
    both = {
        "measured here": scaling.windows(tokens, ppl),
        "published, note 004": scaling.windows(note.tokens, note.val_ppl),
    }
    table = pd.concat(both, names=[""]).droplevel(1)
    rows = {
        "tokens": map("{:,.0f} … {:,.0f}".format, table.tokens_low, table.tokens_high),
        "α": table.alpha.map("{:.3f}".format),
        "95 % interval": map("{:.3f} … {:.3f}".format, table.alpha_low, table.alpha_high),
    }
    return pd.DataFrame(rows, index=table.index)


def configurations(frame: pd.DataFrame) -> pd.DataFrame:
    """`prediction.by_configuration` for reading, with how far Phase 1 came."""
    fields = list(prediction.CONFIGURATION)
    ended = frame.groupby(fields)[["converged", "train_er", "memory_length"]].mean()
    ended["warnings"] = frame.groupby(fields).warnings.agg(_words)
    table = prediction.by_configuration(frame).join(ended, on=fields)
    words = style.columns(
        table,
        {
            "α": ("alpha", "{:.3f}"),
            "its error": ("alpha_error", "{:.3f}"),
            "val ER %": ("val_er", "{:.1f}"),
            "train ER %": ("train_er", "{:.1f}"),
            "PPL": ("val_ppl", "{:.1f}"),
            "iterations": ("phase1_iterations", "{:.0f}"),
            "converged %": ("converged", "{:.1f}"),
            "memory, tokens": ("memory_length", "{:.0f}"),
        },
    )
    return _warned(words.assign(warnings=table.warnings))


def predictors(frame: pd.DataFrame) -> pd.DataFrame:
    """`prediction.predictors` for reading: the errors in percent."""
    table = prediction.predictors(frame)
    words = style.columns(
        table,
        {
            "α": ("alpha", "{:.3f}"),
            "β, per point of ER": ("beta", "{:+.4f}"),
            "error, runs fitted": ("error", "{:.1%}"),
            "error, configuration left out": ("left_out_error", "{:.1%}"),
            "worst run": ("left_out_worst", "{:.1%}"),
        },
    )
    words.insert(0, "fitted", table.fitted.astype(int))
    return words


def scores(table: pd.DataFrame) -> pd.DataFrame:
    """`rules.score` for reading."""
    words = style.columns(
        table,
        {
            "right": ("hit_rate", "{:.0%}"),
            "by chance": ("base_rate", "{:.0%}"),
            "excess": ("excess", "{:+.0%}"),
            "p": ("p", "{:.3f}"),
        },
    )
    words.insert(0, "calls", table.called)
    ends = zip(table.low, table.high, strict=True)
    spans = [style.interval(low, high, "{:+.0%}", style.MISSING) for low, high in ends]
    words.insert(4, "95 % interval", spans)
    return words.assign(remark=table.remark).set_index(table.rule)


def comparison(groups: compare.Groups) -> pd.DataFrame:
    """Every kind of run at every size: perplexity, accuracy and bits per byte with intervals over
    seeds, the paired change of perplexity against CVFP, parameters and seconds."""
    rows = {}
    for size in compare.sizes(groups):
        changes = compare.against(groups, size)
        for kind, results in groups.items():
            runs = compare.at(results, size)
            change, within = _change(changes.get(kind))
            rows[size, kind] = {
                "PPL": style.mean_interval([r.val_ppl for r in runs], 1),
                "change against CVFP": change,
                "95 % interval": within,
                "accuracy %": style.mean_interval([r.val_acc for r in runs], 2, 100),
                "bits/byte": style.mean_interval([r.val_bpb for r in runs], 3),
                "trained parameters": f"{compare.trained_parameters(runs[0]):,}",
                "best epoch": style.mean([r.best_epoch for r in runs], "{:.1f}"),
                "training, s": style.mean(map(compare.training_seconds, runs), "{:.1f}"),
                "warnings": _words(w for r in runs for w in r.warnings),
            }
    return _warned(style.rows(rows, ["conversations", "kind"]))


def counted(results: Sequence[Result]) -> pd.DataFrame:
    """Perplexity of the models that only count, at every size (bits per byte beside it)."""
    rows = {}
    for size, runs in _sizes(results).items():
        lines = runs[0].baselines
        rows[size] = {
            name: style.MISSING
            if (line := lines[key]) is None
            else "{ppl:.1f} ({bpb:.3f})".format(**line)
            for key, name in compare.COUNTED.items()
        }
    return style.rows(rows, "conversations")


def grid(tuned: Mapping[str, Sequence[Result]]) -> pd.DataFrame:
    """Perplexity of each kind at each learning rate tried; the best is marked."""
    rows = {}
    for kind, runs in tuned.items():
        best = compare.best_rate(runs)
        rates = [one.experiment.phase2_learning_rate for one in runs]
        rows[kind] = {
            f"{rate:g}": style.number(one.val_ppl, "{:.1f} ←" if rate == best else "{:.1f}")
            for rate, one in zip(rates, runs, strict=True)
        }
        ends = (min(rates), max(rates))
        rows[kind]["remark"] = "best at the end of the grid" if best in ends else ""
        rows[kind]["warnings"] = _words(w for r in runs for w in r.warnings)
    return _warned(style.rows(rows, "learning rate"))
