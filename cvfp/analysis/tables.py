"""Tables of finished runs, for reading."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import pandas as pd
import torch
from numpy.typing import ArrayLike

from cvfp import contexts, metrics, phase1, registry, seeds, tuning
from cvfp.analysis import comparison as compare
from cvfp.analysis import intervals, prediction, published, rules, scaling, stopping, style
from cvfp.analysis.intervals import Crossed, Paired, paired
from cvfp.analysis.scaling import EXTRAPOLATION, PowerLaw
from cvfp.controls import count_parameters
from cvfp.gap import AS_LEFT, CAUSES, Gap, sweep
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
        "parallel jobs": f"{n_jobs}{', times taken under contention' if n_jobs > 1 else ''}",
        "from the store": f"{sum(r.from_store for r in results)} of {len(results)} runs",
        **first.versions,
    }
    return pd.DataFrame({"": facts})


def _words(warnings: Iterable[str]) -> str:
    return "; ".join(filter(None, dict.fromkeys(warnings)))


def _warned(table: pd.DataFrame) -> pd.DataFrame:
    """The table; its column of warnings only where there are any."""
    return table if any(table.warnings) else table.drop(columns="warnings")


def _figures(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame as numbers: missing where a cell holds none."""
    return frame.apply(pd.to_numeric, errors="coerce")


def runs(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per size (mean over seeds; the spread of PPL where there are several)."""
    seconds = frame.filter(regex="^seconds_").sum(axis=1)
    by_size = _figures(frame.assign(seconds=seconds)).groupby("samples")
    table = style.columns(by_size.mean(), "runs")
    if len(set(frame.seed)) > 1:
        table.insert(2, "PPL s.d.", [style.number(x, "{:.2f}") for x in by_size.val_ppl.std()])
        table.insert(0, "seeds", by_size.seed.nunique())
    return _warned(table.assign(warnings=frame.groupby("samples").warnings.agg(_words)))


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
    return pd.DataFrame(rows, index=["measured here", "published, note 002"]).T


def published_parameter_counts() -> pd.DataFrame:
    """The shapes of note 003 built and counted, in millions, beside what it prints: its
    ContextBlocks agree, and what it says that Phase 2 trains agrees with these TokenBlocks; those
    it prints are larger."""
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
    return pd.DataFrame(rows, index=["measured here", "published, note 000"]).T


def positions(gap: Gap, note: pd.DataFrame) -> pd.DataFrame:
    """First, middle and last 100 tokens, measured beside note 000's table."""
    frame = gap.positions.join(note.set_index("position").add_suffix("_note"))
    return style.columns(frame, "positions")


def causes(gap: Gap) -> pd.DataFrame:
    """Each cause of the gap alone, against the exact contexts; and the causes' sum."""
    names = {AS_LEFT: AS_LEFT, **CAUSES}
    there = [name for name in names if name in gap.agreement.index]
    frame = gap.agreement.loc[there].rename(index=names)
    frame.loc["the causes, added", "mse"] = gap.added
    shares = frame.assign(share=frame.mse / frame.mse[AS_LEFT])
    return style.columns(shares, "causes", missing="")


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


def diversity(gap: Gap) -> pd.DataFrame:
    """What the published diversity term says of contexts beside what they are, in float64 over the
    first loss group: before and after Phase 1; without gain, shift and ε of the LayerNorm that
    makes them (not of an own block); of rank 1 and of full rank."""
    exp, width = gap.experiment, gap.block.context_dim
    piece = gap.inputs.first(min(exp.loss_group, gap.tokens))
    piece.table, size = piece.table.double(), len(piece)
    trained, fresh = (copy.deepcopy(gap.block).double() for _ in range(2))
    fresh.initialise(seeds.generator(exp.seed, "context_block"))
    draws = seeds.generator(exp.seed, "gap", exp.device)
    normal = piece.table.new_empty(size, width).normal_(generator=draws)
    first, exact = phase1.INITIAL_STD * normal, contexts.evaluate(trained, piece).values
    sets = {
        "first iterate": sweep(fresh, piece, first, noise=exp.phase1_noise, generator=draws),
        "exact, untrained": contexts.evaluate(fresh, piece).values,
        "exact, trained": exact,
    }
    if isinstance(trained, ContextBlock):
        trained.norms[-1].reset_parameters()
        trained.norms[-1].eps = 0.0
        sets["… without gain, shift, ε"] = sweep(trained, piece, exact)
    normed = torch.nn.functional.layer_norm(normal, (width,), eps=0.0)
    signs = torch.arange(size).to(normal)[:, None] % 2 * 2 - 1
    sets |= {"+u and −u in turn": signs * normed[:1], "random directions": normed}
    rows = {}
    for name, c in sets.items():
        mean = float(c.mean(dim=0).square().sum())
        term = float(torch.linalg.vector_norm(c - c.mean(dim=0))) / size
        by_mean = ((width - mean) / size) ** 0.5
        rows[name] = {
            "effective rank": f"{metrics.effective_rank(metrics.singular_values(c)) / width:.1%}",
            "‖c‖² / D": f"{float(c.square().sum()) / size / width:.6f}",
            "‖mean‖² / D": f"{mean / width:.4f}",
            "diversity term": f"{term:.5f}",
            "from the mean alone": f"{by_mean:.5f}",
            "off by": f"{abs(by_mean / term - 1):.0e}",
        }
    return style.rows(rows, "contexts")


def times(frame: pd.DataFrame) -> pd.DataFrame:
    """Seconds of the three ways to contexts, and what blocks gain over the loop."""
    table = style.columns(frame.assign(gain=frame.sequential / frame.blocks), "times")
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
    frame = pd.DataFrame(
        {"shape": name, "seconds_phase2": None, **one.parameters, **one.row()}
        for name, results in kinds.items()
        for runs in _sizes(results).values()
        for one in runs
    )
    by = [frame["shape"], frame.samples.rename("conversations")]
    table = style.columns(_figures(frame).groupby(by, sort=False).mean(), "shapes")
    return _warned(table.assign(warnings=frame.warnings.groupby(by, sort=False).agg(_words)))


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
    table = style.rows(rows)
    for one in note.to_dict("records"):
        rise = f"{one['epoch4_val_ppl'] / one['epoch2_val_ppl'] - 1:+.1%}"
        figures = [f"{one['best_epoch']}", f"{one['epoch2_val_ppl']:.1f}", rise, rise, ""]
        table.loc[f"published, {one['experiment']} at {one['samples']}, lr 0.002"] = figures
    return _warned(table)


def patience(results: Sequence[Result], patiences: Sequence[int]) -> pd.DataFrame:
    """Which epoch each patience would have chosen in the same runs: means over seeds, and the
    change of perplexity against the first patience with its interval. The runs are of one size, one
    a seed, and stopped at no epoch but the last."""
    replays = [stopping.replay(result, patiences) for result in results]
    first, ppl = patiences[0], pd.DataFrame([one.val_ppl for one in replays])
    means = pd.concat(replays).groupby("patience", sort=False).mean()
    table = style.columns(means, "patience")
    changes = [intervals.mean(list(ppl[name] / ppl[first] - 1)) for name in ppl]
    against = [(f"{one:+.1%}", style.interval(a, b, "{:+.1%}")) for one, a, b in changes]
    against[0] = style.MISSING, style.MISSING
    table[f"change of PPL against {first}"], table["95 % interval"] = zip(*against, strict=True)
    return _warned(table.assign(warnings=_words(w for r in results for w in r.warnings)))


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


def windows(frame: pd.DataFrame, note: pd.DataFrame) -> pd.DataFrame:
    """α over windows of sizes, ER (mean) and PPL in each: measured by depth, and note 004's v3."""
    v3 = note.assign(train_tokens=note.tokens, val_er=note.val_er / 100)
    kinds = {f"measured, {layers} L": runs for layers, runs in frame.groupby("num_layers")}
    rows = []
    for name, runs in (kinds | {"published, note 004": v3}).items():
        for one in scaling.windows(runs.train_tokens, runs.val_ppl).to_dict("records"):
            within = runs[runs.train_tokens.between(one["tokens_low"], one["tokens_high"])]
            ends = {"ppl_high": within.val_ppl.max(), "ppl_low": within.val_ppl.min()}
            rows.append(one | ends | {"": name, "val_er": within.val_er.mean()})
    return style.columns(pd.DataFrame(rows).set_index(""), "windows")


def judged(results: Sequence[Result]) -> pd.DataFrame:
    """`rules.judge` for each configuration, over its sizes and seeds."""
    rows = [{"": prediction.label(r.experiment.to_dict()), **rules.judge(r)} for r in results]
    return pd.DataFrame(rows).groupby("", sort=False).agg(_words)


def configurations(frame: pd.DataFrame) -> pd.DataFrame:
    """`prediction.by_configuration` for reading, with how far Phase 1 came."""
    fields = list(prediction.CONFIGURATION)
    ended = frame.groupby(fields)[["converged", "train_er", "memory_length"]].mean()
    ended["warnings"] = frame.groupby(fields).warnings.agg(_words)
    table = prediction.by_configuration(frame).join(ended, on=fields)
    return _warned(style.columns(table, "configurations").assign(warnings=table.warnings))


def predictors(frame: pd.DataFrame) -> pd.DataFrame:
    """`prediction.predictors` for reading: the errors in percent."""
    table = prediction.predictors(frame)
    words = style.columns(table, "predictors")
    words.insert(0, "fitted", table.fitted.astype(int))
    return words


def scores(table: pd.DataFrame) -> pd.DataFrame:
    """`rules.score` for reading."""
    words = style.columns(table, "scores")
    words.insert(0, "calls", table.called)
    return words.assign(remark=table.remark).set_index(table.rule)


def comparison(groups: compare.Groups) -> pd.DataFrame:
    """Every kind of run at every size: perplexity, accuracy and bits per byte with intervals over
    seeds, the paired change of perplexity against CVFP, parameters and seconds."""
    rows = {}
    for size in compare.sizes(groups):
        changes = compare.against(groups, size)
        for kind, runs in compare.of_size(groups, size).items():
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
        rows[size] = {
            name: "{ppl:.1f} ({bpb:.3f})".format(**line) if line else style.MISSING
            for key, name in compare.COUNTED.items()
            for line in [runs[0].baselines[key]]
        }
    return style.rows(rows, "conversations")


def choices(choices: tuning.Choices, sizes: Sequence[int]) -> pd.DataFrame:
    """What each kind of run chose on the development conversations, from how many trials."""
    rows = {}
    for kind, by_size in choices.items():
        for size in (one for one in map(str, sizes) if one in by_size):
            row = by_size[size]
            chosen = [f"{name} {value:g}" for name, value in row["choice"].items()]
            rows[int(size), kind] = {
                "trials": len(row["trials"]),
                "PPL, development": f"{row['dev_ppl']:.1f}",
                "choice": ", ".join(chosen),
                "remark": "" if row["inside"] else "a neighbour was not tried, or there is none",
            }
    return style.rows(rows, ["conversations", "kind"])
