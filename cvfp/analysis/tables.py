"""Tables of finished runs, for reading."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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


def ran_on(results: Sequence[Result], n_jobs: int = 1) -> style.Facts:
    """What the runs ran on: corpus, tokeniser, table, model, device, precision, seeds, jobs."""
    first, one = results[0], results[0].experiment

    def values(every: Iterable[int]) -> str:
        return ", ".join(f"{value:,}" for value in sorted(set(every)))

    fields = ("samples", "num_layers", "context_dim", "num_input_tokens", "seed")
    varied = {name: values(getattr(r.experiment, name) for r in results) for name in fields}
    every = {result.experiment.token_input_all_layers for result in results}
    jobs = f"{n_jobs}{', times taken under contention' if n_jobs > 1 else ''}"
    stored = f"{sum(r.from_store for r in results)} of {len(results)}"
    trained = "frozen" if one.freeze_embedding else "trained"
    head = "tied to the table" if one.weight_tying else "own"
    figures = dict(trained=trained, head=head, jobs=jobs, stored=stored)
    said = style.filled("ran_on", run=first, one=one, **figures, **varied)
    own = {
        kind: name
        for kind, parts in registry.PARTS.items()
        if (name := getattr(one, kind)) and not registry.is_built_in(parts.get(name))
    }
    own["design"] = ", ".join(DESIGNS[kind] for kind in sorted(every, reverse=True))
    for part in first.parameters:
        own[f"parameters, {part}"] = values(result.parameters[part] for result in results)
    return style.Facts({"": said["model"] | own | said["machine"] | first.versions})


def _words(warnings: Iterable[str]) -> str:
    return "; ".join(filter(None, dict.fromkeys(warnings)))


def _warned(table: pd.DataFrame) -> pd.DataFrame:
    """The table; its column of warnings only where there are any."""
    return table if any(table.warnings) else table.drop(columns="warnings")


def _figures(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame as numbers: missing where a cell holds none."""
    return frame.apply(pd.to_numeric, errors="coerce")


def runs(frame: pd.DataFrame) -> pd.DataFrame:
    """One column per size (mean over seeds; the spread of PPL where there are several)."""
    seconds = frame.filter(regex="^seconds_").sum(axis=1)
    by_size = _figures(frame.assign(seconds=seconds)).groupby("samples")
    table = style.columns(by_size.mean(), "runs")
    if len(set(frame.seed)) > 1:
        table.insert(2, "PPL s.d.", [style.number(x, "{:.2f}") for x in by_size.val_ppl.std()])
        table.insert(0, "seeds", by_size.seed.nunique())
    table = _warned(table.assign(warnings=frame.groupby("samples").warnings.agg(_words)))
    return table.T.rename_axis(columns="conversations")


def extrapolation(laws: dict[str, PowerLaw], largest: dict[str, float]) -> pd.DataFrame:
    """Perplexity by each law with its 95 % interval, which takes the law's form for granted, and
    how many times its largest run that is (under 1: inside)."""
    rows: dict[str, dict[str, str]] = {}
    for tokens in EXTRAPOLATION:
        row = rows.setdefault(f"{tokens / 1e6:g} M tokens", {})
        for name, law in laws.items():
            low, high = law.predict_interval(tokens) or (None, None)
            interval = style.interval(low, high, "{:.1f}", "needs three points")
            row[f"{name}: PPL by its law"] = f"{law.predict(tokens):.1f}"
            row[f"{name}: 95 % interval"] = interval
            row[f"{name}: times its largest run"] = f"{tokens / largest[name]:.1f}"
    return style.rows(rows)


def laws(laws: dict[str, PowerLaw]) -> pd.DataFrame:
    """Fits side by side: alpha with its interval, A, R², % per doubling, the range of tokens."""
    columns = {}
    for name, law in laws.items():
        low, high = law.interval() or (None, None)
        within = style.interval(low, high, "{:.3f}", "needs three points")
        r2 = style.number(law.r2, "{:.4f}")
        columns[name] = style.filled("laws", law=law, interval=within, r2=r2)
        columns[name]["points"] = law.points
    return pd.DataFrame(columns)


def record(results: Sequence[Result]) -> pd.DataFrame:
    """The runs behind a notebook, by their keys in the store."""
    frame = Results(results).frame().set_index("key").astype({"val_ppl": float})
    return _warned(frame[["samples", "seed", "val_ppl", "warnings"]].round(2))


def beside(result: Result, note: pd.Series) -> pd.DataFrame:
    """One run beside a row of note 002's table."""
    rows = style.filled("beside", run=result, note=note)
    if words := _words(result.warnings):
        rows["warnings"] = [words, ""]
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
        counted = [round(count_parameters(one) / 1e6, 2) for one in (block, tokens)]
        built = dict(zip(("ContextBlock", "TokenBlock"), counted, strict=True))
        names = style.COLUMNS["parameter_counts"]
        rows[f"{layers} x {width}"] = {name: (built | note)[of] for name, of in names.items()}
    return style.rows(rows)


def agreement(gap: Gap, note: pd.DataFrame) -> pd.DataFrame:
    """Parallel against exact contexts, measured beside note 000's table."""
    here, there = gap.agreement.loc[AS_LEFT], note.set_index("metric")["value"]
    rows = style.filled("agreement", gap=gap, here=here, there=there)
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


def gap_ran_on(gap: Gap) -> style.Facts:
    """What a comparison of contexts ran on."""
    one, residuals = gap.experiment, gap.exact.residuals
    last = residuals[-1]["relative"] if residuals else 0.0
    rate = style.number(gap.recurrence.contraction_rate, "{:.3f}")
    memory = style.number(gap.recurrence.memory_length, "{} tokens")
    figures = dict(last=last, rate=rate, memory=memory, threads=torch.get_num_threads())
    design = DESIGNS[one.token_input_all_layers]
    facts = style.filled("gap_ran_on", gap=gap, one=one, design=design, **figures)
    return style.Facts({"": facts})


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
        figures = dict(term=term, by_mean=by_mean, off=abs(by_mean / term - 1), mean=mean / width)
        rank = metrics.effective_rank(metrics.singular_values(c)) / width
        square = float(c.square().sum()) / size / width
        rows[name] = style.filled("diversity", rank=rank, square=square, **figures)
    return style.rows(rows, "contexts")


def times(frame: pd.DataFrame) -> pd.DataFrame:
    """Seconds of the three ways to contexts, and what blocks gain over the loop."""
    table = style.columns(frame.assign(gain=frame.sequential / frame.blocks), "times")
    return table.set_index(frame.tokens.map("{:,.0f}".format).rename("tokens"))


def _over(found: Crossed, name: str, form: str) -> dict[str, Any]:
    """A figure over runs, with its interval over seeds and held-out conversations."""
    missing = style.NO_INTERVAL if found.seeds < 2 else style.MISSING
    return {
        name: form.format(found.value),
        "95 % interval": style.interval(found.low, found.high, form, missing),
        "seeds": found.seeds,
        "conversations": found.conversations or style.MISSING,
        "each seed": ", ".join(map(form.format, found.by_seed)),
    }


def pairs(named: dict[str, Paired]) -> pd.DataFrame:
    """Paired differences of perplexity, one row each."""
    rows = {name: _over(one, "change of perplexity", "{:+.1%}") for name, one in named.items()}
    return style.rows(rows)


def _change(pair: Paired | None) -> tuple[str, str]:
    """A paired change of perplexity and its interval."""
    if pair is None:
        return style.MISSING, style.MISSING
    change, within, *_ = _over(pair, "change", "{:+.1%}").values()
    return change, within


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
    return style.rows({"measured": _over(law, "α", "{:.4f}")})


def overfitting(curves: dict[str, Sequence[Result]], note: pd.DataFrame) -> pd.DataFrame:
    """Best epoch, and how much worse two epochs later and the last are (means over seeds); note
    003's figures beside."""
    means = {}
    for name, runs in curves.items():
        each = pd.DataFrame([stopping.best(r) for r in runs])
        last = [r.phase2_history[-1]["val_ppl"] for r in runs]
        rises = pd.Series(map(stopping.rise, runs), dtype=float)
        means[name] = each.assign(rise=rises, over=last / each.val_ppl - 1).mean()
    table = style.columns(pd.DataFrame(means).T, "overfitting")
    table["warnings"] = [_words(w for r in runs for w in r.warnings) for runs in curves.values()]
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
        law, interval = fits[form], fits[form].interval()
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
        ends = style.interval(low, high, "{:.3f}", missing)
        figures = dict(formula=formula, exponent=exponent, interval=ends, limit=limit)
        figures |= dict(r2=style.number(law.r2, "{:.4f}"), error=error, remark=remark)
        rows[name] = style.filled("forms", **figures)
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
    seeds, the paired change of perplexity against the reference, parameters and seconds."""
    rows, first = {}, compare.reference(groups)
    against = "CVFP" if first == tuning.CVFP else f"the {first}"
    for size in compare.sizes(groups):
        changes = compare.against(groups, size)
        for kind, runs in compare.of_size(groups, size).items():
            change, within = _change(changes.get(kind))
            rows[size, kind] = {
                "PPL": style.mean_interval([r.val_ppl for r in runs], 1),
                f"change against {against}": change,
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
        there = compare.counted(runs[0])
        words = {name: "{ppl:.1f} ({bpb:.3f})".format(**line) for name, line in there.items()}
        rows[size] = dict.fromkeys(compare.COUNTED.values(), style.MISSING) | words
    return style.rows(rows, "conversations")


def regimes(groups: compare.Groups, samples: int) -> pd.DataFrame:
    """Perplexity of every objective in both regimes, by Phase 2's training contexts: mean over
    seeds, and how many there are."""
    cells: dict[str, dict[str, str]] = {}
    for kind, runs in compare.of_size(groups, samples).items():
        objective, *column = kind.split(" · ")
        if column:
            mean = style.mean([run.val_ppl for run in runs], "{:.1f}")
            cells.setdefault(objective, {})[", ".join(column)] = f"{mean} ({len(runs)})"
    return style.rows(cells, "objective")


def memories(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What each kind's contexts hold and what its predictions use of it: records of
    `gap.remembers`."""
    rows = {}
    for kind in dict.fromkeys(one["kind"] for one in records):
        runs = [one for one in records if one["kind"] == kind]
        r2 = compare.recall(runs, kind)
        cuts = [pd.DataFrame(one["cuts"]) for one in runs if "cuts" in one]
        cut = compare.memory(cuts) if cuts else pd.DataFrame({"k": [], "change": []})
        used, rate = cut.k[cut.change >= compare.USED], runs[0].get("contraction_rate")
        row = {"PPL": style.mean_interval([one["ppl"] for one in runs], 1), "runs": len(runs)}
        row |= {f"R², {lag} back": f"{r2[lag]:.2f}" for lag in (0, 1, 4, 8)}
        row["contraction a token"] = style.number(rate, "{:.2f}")
        row["forgets after"] = style.number(runs[0].get("memory_length"), "{:.0f}")
        row["steps of exact evaluation"] = style.number(runs[0].get("steps"), "{:,.0f}")
        row["used, tokens"] = f"{used.max():.0f}" if len(used) else "–" if cut.empty else "under 1"
        rows[kind] = row
    return style.rows(rows, "kind")


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
