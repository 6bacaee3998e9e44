"""Every figure, one function each; all return the Figure."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from scipy.stats import gmean

from cvfp import baselines, tuning
from cvfp.analysis import comparison as compare
from cvfp.analysis import stopping
from cvfp.analysis.intervals import Paired
from cvfp.analysis.scaling import EXTRAPOLATION, PowerLaw
from cvfp.config import toml
from cvfp.gap import AS_LEFT, CAUSES, Gap
from cvfp.result import Result

_READ = toml("analysis/plots")
BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = _READ["palette"].values()
MID = "#797979"  # on white and on #111111: 4.4 to 1
FAR = 0.45  # change of perplexity beyond which a kind is named at the edge and not drawn
Change = tuple[float, float | None, float | None]  # and its interval
BESIDE: Mapping[str, Any] = dict(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


def _looks(of: str) -> dict[str, tuple[str, str]]:
    """Colour and marker of each of a table of plots.toml."""
    return {name: (_READ["palette"][color], marker) for name, (color, marker) in _READ[of].items()}


BASELINE_LOOKS, _FAMILIES, _SHOWN = map(_looks, ("baselines", "families", "kinds"))
_CYCLE = (BLUE, SKY, GREEN, ORANGE, PINK, RED, GREY)
_MARKERS = "osDv^<>PX*hp"


def _looking(names: Iterable[str]) -> Iterable[tuple[str, str, str]]:
    """Each name, with a colour and a marker."""
    return zip(names, itertools.cycle(_CYCLE), itertools.cycle(_MARKERS), strict=False)


def _figure(
    name: str, size: tuple[float, float] | None = None, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """An empty figure as plots.toml has it, or of that size and with so many panels, all alike."""
    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.9)
    look, panels = _READ[name], _READ[name]["panels"]
    columns = len(panels) if columns is None else columns
    form: dict[str, Any] = dict(figsize=size or look["size"], layout="constrained", dpi=90)
    if threading.current_thread() is threading.main_thread():
        figure = plt.figure(**form)
        plt.close(figure)  # shown once, as the cell's value
    else:
        figure = Figure(**form)  # pyplot shows its own in whatever cell runs now
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for one, panel in zip(axes, itertools.cycle(panels), strict=False):
        one.set(**panel)
    return figure, axes


def readable(figure: Figure) -> Figure:
    """The same figure without a background, its black and grey read on white and on dark pages."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        axes.spines[:].set_color(MID)
        axes.tick_params(which="both", colors=MID, grid_color=MID, grid_alpha=0.3)
        if legend := axes.get_legend():
            legend.get_frame().set_alpha(0)
    for one in figure.findobj(lambda one: hasattr(one, "get_color")):
        text_or_line: Any = one
        if np.ptp(np.array(to_rgb(text_or_line.get_color()))) < 0.05:
            text_or_line.set_color(MID)
    return figure


def _points(axes: Axes, x: Any, y: Any, color: str, marker: str = "o", **style: Any) -> None:
    axes.plot(x, y, color=color, marker=marker, linestyle="", **style)


def _annotate(
    axes: Axes, text: str, at: tuple[Any, Any], offset: tuple[float, float], color: str = "black"
) -> None:
    axes.annotate(text, at, xytext=offset, textcoords="offset points", color=color, fontsize=8)


def _against_tokens(axes: Axes) -> None:
    """Perplexity against training tokens, both logarithmic."""
    axes.set(xscale="log", yscale="log", xlabel="training tokens", ylabel="validation perplexity")
    axes.xaxis.set_major_formatter(ticker.EngFormatter())
    _plain_log(axes.yaxis)


def phase1(result: Result) -> Figure:
    """Phase 1 as it goes: the tokens' mean squared change, and how many have converged."""
    history = pd.DataFrame(result.phase1_history)
    figure, (left, right) = _figure("phase1")
    threshold = result.experiment.convergence_threshold
    band = history.change_p10, history.change_p90
    left.fill_between(history.iteration, *band, color=SKY, alpha=0.4)
    left.plot(history.iteration, history.change_p50, color=BLUE, marker="o", markersize=4)
    left.axhline(threshold, color=RED, linestyle="--")
    left.set_yscale("log")
    middle = history.iloc[len(history) // 2]
    _annotate(left, "median token", (middle.iteration, middle.change_p50), (8, 6), BLUE)
    start = (history.iteration.iloc[0], threshold)
    _annotate(left, f"converged below {threshold:g}", start, (0, -14), RED)
    right.plot(history.iteration, history.converged, color=BLUE, marker="o", markersize=4)
    right.axhline(result.experiment.convergence_rate, color=RED, linestyle="--")
    right.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    return figure


def spectrum(result: Result) -> Figure:
    """Singular values behind the effective rank, and what they sum to."""
    figure, (axes,) = _figure("spectrum")
    size = result.experiment.context_dim
    train_er, val_er = result.ranks
    train = result.train_spectrum, train_er, BLUE, "-", "training, parallel"
    held_out = result.val_spectrum, val_er, ORANGE, "--", "validation, exact"
    for values, er, color, line, name in (train, held_out):
        shares = np.asarray(values) / np.sum(values)
        label = f"{name}: effective rank {er * size:.0f} of {size} ({er:.1%})"
        axes.plot(np.arange(1, len(shares) + 1), shares, line, color=color, label=label)
    axes.axhline(1 / size, color=GREY, linestyle=":", label=f"all {size} directions equal")
    axes.legend(fontsize=8)
    return figure


def phase2(result: Result) -> Figure:
    """Phase 2's curves, with the baselines that the perplexity is compared with."""
    history = pd.DataFrame(result.phase2_history).set_index("epoch")
    figure, (axes,) = _figure("phase2")
    axes.plot(history.train_ppl, color=SKY, marker="o", label="training (while learning)")
    chooses = "validation" if result.dev_ppl is None else "development"
    axes.plot(history.val_ppl, color=BLUE, marker="o", label=chooses)
    best = history.val_ppl[history.index == result.best_epoch]
    _points(axes, best.index, best, RED, "*", markersize=15, label="best epoch")
    for name, (color, _) in BASELINE_LOOKS.items():
        if values := result.baselines[name]:
            axes.axhline(values["ppl"], color=color, linestyle="--", label=baselines.NAMES[name])
    axes.set(yscale="log", xticks=history.index)
    _plain_log(axes.yaxis)
    axes.legend(**BESIDE)
    return figure


def scaling(
    frame: pd.DataFrame, law: PowerLaw, published: pd.DataFrame, published_law: PowerLaw
) -> Figure:
    """Perplexity against training tokens: measured, fitted, extrapolated, baselines; published
    runs in a panel of their own, since their corpus and tokeniser differ."""
    figure, (left, right) = _figure("scaling")
    _points(left, frame.train_tokens, frame.val_ppl, BLUE, label="CVFP, measured", zorder=3)
    _law(left, law, frame.train_tokens, BLUE)
    for name, (color, marker) in BASELINE_LOOKS.items():
        if frame[f"{name}_ppl"].notna().any():
            means = frame.groupby("train_tokens")[f"{name}_ppl"].mean()
            style: dict[str, Any] = dict(color=color, marker=marker, label=baselines.NAMES[name])
            left.plot(means.index, means, markersize=5, linewidth=1, **style)
    label = "published (note 002)"
    _points(right, published.tokens, published.val_ppl, GREY, label=label, zorder=3)
    _law(right, published_law, published.tokens, GREY)
    for one in (left, right):
        _against_tokens(one)
        one.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=1)
    return figure


def _law(axes: Axes, law: PowerLaw, tokens: Sequence[float] | pd.Series, color: str) -> None:
    low, high = float(np.min(tokens)), float(np.max(tokens))
    inside = np.geomspace(low, high, 50)
    r2 = "" if law.r2 is None else f", R² {law.r2:.3f}"
    axes.plot(inside, law.predict(inside), color=color, label=f"fit: tokens^{law.alpha:.3f}{r2}")
    beyond = [t for t in EXTRAPOLATION if t > high]
    if beyond:
        outside = np.geomspace(high, beyond[-1], 50)
        axes.plot(outside, law.predict(outside), color=color, linestyle=":")
        label = "extrapolated, not measured"
        _points(axes, beyond, law.predict(beyond), color, fillstyle="none", label=label)


def _plain_log(axis: Any) -> None:
    """Perplexities as plain numbers on a log axis, also between powers of ten."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def agreement(gap: Gap, published: pd.DataFrame) -> Figure:
    """Parallel against exact contexts: cosine along the stream, with note 000's table of positions,
    and the error by cause."""
    figure, (left, right) = _figure("agreement")
    along = gap.along
    mean, worst = 1 - along.cosine, 1 - along.cosine_min
    left.fill_between(along.position, mean, worst, color=SKY, alpha=0.35)
    left.plot(along.position, mean, color=BLUE, label="measured: mean; band up to the worst")
    places = {"first": 50, "middle": gap.tokens / 2, "last": gap.tokens - 50}
    label = "published: first, middle, last 100"
    _points(left, published.position.map(places), 1 - published.cosine, RED, "D", label=label)
    left.legend(fontsize=8, loc="upper right")
    mse = gap.agreement.mse
    values = {name: mse[key] for key, name in {AS_LEFT: AS_LEFT, **CAUSES}.items() if key in mse}
    bars = right.barh(list(values), list(values.values()), color=[BLUE] + [SKY] * len(CAUSES))
    right.invert_yaxis()
    right.bar_label(bars, fmt=" {:.1e}", fontsize=8)
    right.set_xlim(0, 1.22 * max(values.values()))
    right.xaxis.set_major_locator(ticker.MaxNLocator(4))
    right.grid(axis="y", visible=False)
    return figure


def forgetting(gap: Gap) -> Figure:
    """Error against the window's length, and how sweeps converge."""
    figure, (left, right) = _figure("forgetting")
    windows, memory = gap.windows, gap.recurrence.memory_length
    left.plot(windows.tokens, windows.relative_error_mean, color=BLUE, label="mean over tokens")
    left.plot(windows.tokens, windows.relative_error_max, "--", color=SKY, label="worst token")
    left.axhline(0.01, color=RED, linestyle=":", label="1 %")
    if memory is not None:
        left.axvline(memory, color=RED, linestyle=":")
        top = (memory, left.get_ylim()[1])
        _annotate(left, f"memory length {memory} tokens", top, (5, -14), RED)
    left.set_yscale("log")
    left.legend(fontsize=8)
    zeros, clean, blocks = _READ["forgetting"]["lines"]
    right.plot(windows.tokens, windows.residual, color=ORANGE, label=zeros)
    right.plot(gap.clean.sweep, gap.clean.relative_error_mean, "--", color=BLUE, label=clean)
    changes = [residual["relative"] for residual in gap.exact.residuals]
    right.plot(range(1, len(changes) + 1), changes, color=GREEN, marker="D", label=blocks)
    right.set_ylim(None, 300)  # the legend is above the curves
    right.legend(fontsize=8)
    return figure


def times(frame: pd.DataFrame) -> Figure:
    """Seconds against tokens: step by step, in blocks, and one shifted pass."""
    figure, (axes,) = _figure("times")
    for column, color, marker, label in _READ["times"]["lines"]:
        there = frame.set_index("tokens")[column].dropna()
        axes.plot(there, color=_READ["palette"][color], marker=marker, label=label)
    axes.xaxis.set_major_formatter(ticker.EngFormatter())
    axes.legend(fontsize=8)
    return figure


def by_seed(frame: pd.DataFrame, field: str, labels: Mapping[str, str]) -> Figure:
    """Perplexity of each seed under two or more values of a field, joined by seed."""
    figure, (axes,) = _figure("by_seed")
    for seed, rows in frame.groupby("seed"):
        ppl = rows.set_index(field).val_ppl[list(labels)].tolist()
        axes.plot(ppl, color=GREY, marker="o", linewidth=1)
        _annotate(axes, f"{seed}", (len(ppl) - 1, ppl[-1]), (8, -3))
    axes.set_xticks(range(len(labels)), list(labels.values()))
    axes.set_xlim(-0.4, len(labels) - 0.6)
    return figure


def early_stopping(results: Sequence[Result], patiences: Sequence[int]) -> Figure:
    """Validation perplexity by epoch, one panel a size, and where each patience stops."""
    count = len(results)
    figure, axes = _figure("early_stopping", (max(4.2, 3.6 * count), 3.6), count)
    for one, result in zip(axes, results, strict=True):
        history = pd.DataFrame(result.phase2_history)
        one.plot(history.epoch, history.val_ppl, color=BLUE, marker="o", markersize=4)
        table = stopping.replay(result, patiences)
        looks = (RED, ORANGE, GREEN, PINK), "sDov", (10, 14, 18, 22)
        for patience, color, marker, size in zip(patiences, *looks, strict=False):
            at = table.best_epoch[patience], table.val_ppl[patience]
            # Hollow, one around the other: they may choose the same epoch.
            hollow: dict[str, Any] = dict(markersize=size, markeredgewidth=2, fillstyle="none")
            _points(one, *at, color, marker, label=f"chosen with patience {patience}", **hollow)
        one.set_title(f"{result.experiment.samples} conversations, seed {result.experiment.seed}")
        one.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        one.legend(fontsize=8, markerscale=0.6)
    return figure


def forms(frame: pd.DataFrame, fits: Mapping[str, Any]) -> Figure:
    """Perplexity against tokens with every form of law, drawn on to ten times the data."""
    figure, (axes,) = _figure("forms")
    _points(axes, frame.train_tokens, frame.val_ppl, GREY, label="measured")
    high = float(frame.train_tokens.max())
    along = np.geomspace(frame.train_tokens.min(), 10 * high, 100)
    looks = (BLUE, RED, GREEN), ("-", "--", "-.")
    for (name, law), color, line in zip(fits.items(), *looks, strict=False):
        axes.plot(along, law.predict(along), color=color, linestyle=line, label=name)
    axes.axvspan(high, 10 * high, color=GREY, alpha=0.12)
    _against_tokens(axes)
    _annotate(axes, "beyond the data", (high, axes.get_ylim()[0]), (6, 6))
    axes.legend(fontsize=8)
    return figure


def ladders(frame: pd.DataFrame, names: Mapping[str, Mapping[str, Any]], rank: bool) -> Figure:
    """Several kinds of run against training tokens: perplexity, and with `rank` the effective rank
    of held-out contexts beside it; `names` has for every kind the fields that pick its rows."""
    figure, axes = _figure("ladders", (10 if rank else 6, 4), 2 if rank else 1)
    looks = (BLUE, RED, GREEN, ORANGE), "osD^"
    for (name, fields), color, marker in zip(names.items(), *looks, strict=False):
        rows = frame[np.logical_and.reduce([frame[k] == v for k, v in fields.items()])]
        means = rows.groupby("samples")[["train_tokens", "val_ppl", "val_er"]].mean()
        for one, column, scale in zip(axes, ("val_ppl", "val_er"), (1, 100), strict=False):
            one.plot(means.train_tokens, scale * means[column], color=color, label=name)
            _points(one, rows.train_tokens, scale * rows[column], color, marker)
    _against_tokens(axes[0])
    for one in axes:
        # The sizes themselves: a ladder may hold no power of ten.
        one.set_xticks(sorted(frame.groupby("samples").train_tokens.first()), minor=False)
        one.set_xticks([], minor=True)
        one.xaxis.set_major_formatter(ticker.EngFormatter(places=1))
        one.legend(fontsize=8)
    return figure


def overfitting(results: Sequence[Result], names: Sequence[str]) -> Figure:
    """Training and validation perplexity by epoch, one line a run."""
    figure, (axes,) = _figure("overfitting")
    colors = (BLUE, RED, GREEN, ORANGE, PINK, SKY)
    for result, name, color in zip(results, names, colors, strict=False):
        history = pd.DataFrame(result.phase2_history)
        axes.plot(history.epoch, history.val_ppl, color=color, marker="o", label=name)
        axes.plot(history.epoch, history.train_ppl, color=color, linestyle=":")
    axes.plot([], [], color=GREY, linestyle=":", label="training (while learning)")
    _plain_log(axes.yaxis)
    axes.legend(**BESIDE)
    return figure


def curves(frame: pd.DataFrame, x: str, y: str, log: bool = False) -> Figure:
    """Column y against column x, one curve for each name in the column `run`."""
    runs, frame = frame.run.nunique(), frame.assign(run=frame.run.str.replace("$", r"\$"))
    figure, (axes,) = _figure("curves", (7.5, 3.2 + 0.2 * runs))
    look: dict[str, Any] = dict(hue="run", palette=sns.color_palette("colorblind", runs))
    sns.lineplot(frame, x=x, y=y, ax=axes, marker="o", markersize=4, estimator=None, **look)
    axes.set(yscale="log" if log else "linear", title=f"{y} by {x}")
    under: dict[str, Any] = dict(bbox_to_anchor=(0, -0.2), prop={"family": "monospace"})
    axes.legend(**{**BESIDE, **under})
    return figure


def correlations(matrix: pd.DataFrame) -> Figure:
    """A correlation matrix as a heat map, its lower half."""
    figure, (axes,) = _figure("correlations")
    axes.grid(visible=False)
    cells: dict[str, Any] = dict(annot=True, fmt=".2f", annot_kws={"fontsize": 7}, square=True)
    cells |= dict(mask=np.triu(np.ones(matrix.shape), 1), cbar_kws={"label": "Pearson's r"})
    sns.heatmap(matrix.round(2) + 0.0, ax=axes, vmin=-1, vmax=1, cmap="RdBu_r", **cells)  # no −0
    axes.set(xlabel="", ylabel="")
    plt.setp(axes.get_xticklabels(), rotation=45, ha="right")
    return figure


def alpha_rank(measured: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """α against effective rank, one point a configuration: measured, and published."""
    figure, (left, right) = _figure("alpha_rank")
    rank, errors = 100 * measured.val_er, measured.alpha_error
    left.errorbar(rank, measured.alpha, yerr=errors, color=BLUE, ecolor=SKY, fmt="o")
    _points(right, published.val_er, published.alpha, RED, "D")
    return figure


def comparison(groups: compare.Groups) -> Figure:
    """Perplexity of every kind of run against the reference's at every size, with paired intervals,
    and of the models that only count; ordered as at the largest size."""
    sizes, reference = compare.sizes(groups), compare.reference(groups)
    ppl: dict[int, float] = {}
    changes: dict[int, dict[str, Change]] = {}
    for size in sizes:
        pairs = compare.against(groups, size).items()
        changes[size] = {kind: (one.change, one.low, one.high) for kind, one in pairs}
        runs = compare.at(groups[reference], size)
        ppl[size] = _ppl(runs)
        for name, line in compare.counted(runs[0]).items():
            changes[size][name] = line["ppl"] / ppl[size] - 1, None, None
    # The best are to be seen, however far under CVFP.
    drawn = [one[0] for kinds in changes.values() for one in kinds.values()]
    nearest, farthest = min(drawn) - 0.03, min(FAR, max(drawn)) + 0.05
    last = {kind: one[0] for size in sizes for kind, one in changes[size].items()}
    order = sorted(last, key=last.__getitem__)
    size_of = 4 + 2.5 * len(sizes), 1.2 + 0.31 * len(order)
    figure, axes = _figure("comparison", size_of, len(sizes))
    figure.set_dpi(min(figure.dpi, 2400 / len(order)))  # under 100 kB
    for panel, (one, size) in enumerate(zip(axes, sizes, strict=True)):
        one.axvline(0, color=RED, linewidth=1.5)
        for place, kind in enumerate(order):
            if kind not in changes[size]:
                continue
            change, low, high = changes[size][kind]
            # What is far worse is not what the figure is about.
            if change > FAR:
                one.annotate(f"{change:+.0%} →", (FAR, place), ha="right", va="center", fontsize=8)
                continue
            if low is not None and high is not None:
                one.plot([low, high], [place] * 2, color="#BBBBBB", linewidth=4)
            _points(one, change, place, *_FAMILIES[compare.family(kind)])
        one.set_yticks(range(len(order)), order if panel == 0 else [""] * len(order))
        one.set(xlim=(nearest, farthest), ylim=(len(order) - 0.5, -0.5))
        one.set_title(f"{size} conversations (that is {ppl[size]:.0f})")
        one.set_xlabel(f"perplexity against\n{reference}")
        one.xaxis.set_major_locator(ticker.MaxNLocator(5))
        one.xaxis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=" %"))
    for family, look in _FAMILIES.items():
        _points(axes[0], [], [], *look, label=family)
    axes[0].plot([], [], color=RED, label=reference)
    axes[0].plot([], [], color="#BBBBBB", linewidth=4, label="95 % interval")
    figure.legend(fontsize=8, loc="outside lower center", ncols=min(4, 1 + len(sizes)))
    return figure


def cost(groups: compare.Groups) -> Figure:
    """Perplexity of every kind of run against the seconds that its training took, at every size;
    the lines are the least that counting reaches there."""
    sizes, markers = compare.sizes(groups), {kind: x for kind, _, x in _looking(groups)}
    figure, axes = _figure("cost", (1.5 + 3.4 * len(sizes), 4), len(sizes))
    for one, size in zip(axes, sizes, strict=True):
        there = compare.of_size(groups, size)
        for kind, runs in there.items():
            seconds = float(np.mean([compare.training_seconds(run) for run in runs]))
            color, _ = _FAMILIES[compare.family(kind)]
            _points(one, seconds, _ppl(runs), color, markers[kind], label=kind)
        counts = there[compare.reference(groups)][0].baselines.values()
        lines = [line["ppl"] for line in counts if line]
        one.axhline(min(lines), color=GREY, linestyle=":", label="best that only counts")
        one.set_title(f"{size} conversations")
        _plain_log(one.xaxis)
    axes[0].set_ylabel("validation perplexity")
    named = {k: v for one in axes for v, k in zip(*one.get_legend_handles_labels(), strict=True)}
    axes[-1].legend(named.values(), named.keys(), **BESIDE)
    return figure


def pairs(named: Mapping[str, Paired], reference: str) -> Figure:
    """Paired changes of perplexity with their intervals, and each seed's."""
    figure, (axes,) = _figure("pairs", (6.5, 1.4 + 0.4 * len(named)))
    axes.axvline(0, color=RED, linewidth=1.5)
    for place, pair in enumerate(named.values()):
        if pair.low is not None and pair.high is not None:
            axes.plot([pair.low, pair.high], [place] * 2, color=SKY, linewidth=4)
        _points(axes, pair.by_seed, [place] * len(pair.by_seed), GREY, "|", markersize=12)
        _points(axes, pair.change, place, BLUE)
    axes.set_yticks(range(len(named)), list(named))
    axes.set(xlabel=f"perplexity against {reference}", ylim=(len(named) - 0.5, -0.5))
    axes.margins(x=0.1)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6))
    axes.xaxis.set_major_formatter(ticker.PercentFormatter(1.0, 1, " %"))
    return figure


def _ppl(runs: Sequence[Result]) -> float:
    """Geometric mean over seeds, as `intervals.paired` compares them."""
    return float(gmean([one.val_ppl for one in runs if one.val_ppl]))


def where_context_helps(groups: compare.Groups, samples: int) -> Figure:
    """Nats per token against no contexts, with as few tokens as there are runs of, by place in the
    conversation, by how often the predicted token was seen, and how often after the one before."""
    there = compare.of_size(groups, samples)
    none = next(one for one in map(tuning.ZERO.format, (1, 2, 3, 4)) if one in there)
    kinds = {kind: runs for kind, runs in there.items() if kind in _SHOWN or kind == none}
    every = [run for runs in kinds.values() for run in runs]  # of an earlier version without some
    panels = [one for one in _READ["bins"] if all(getattr(run, one["column"]) for run in every)]
    size = 2 + 4 * len(panels), 3.5
    figure, axes = _figure("where_context_helps", size, len(panels))
    figure.set_dpi(66)  # many lines: under 100 kB
    for one, panel in zip(axes, panels, strict=True):
        frame = compare.by_bin(kinds, samples, panel["column"], none)
        bins = sorted(frame.low.unique())
        for kind, rows in frame.groupby("kind", sort=False):
            color, marker = _SHOWN[str(kind)]
            places = rows.low.map(bins.index)
            one.plot(places, rows.nats, color=color, marker=marker, markersize=5, label=kind)
        one.axhline(0, color=GREY, linestyle=":")
        names = itertools.starmap(_bin, itertools.zip_longest(bins, bins[1:]))
        one.set_xticks(range(len(bins)), list(names), rotation=35, ha="right")
        one.set(**panel["labels"], ylabel=f"nats against {none}")
    axes[-1].legend(**BESIDE)
    return figure


def memory(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """What a cut of the contexts to their last k tokens costs, for each kind of run."""
    figure, (axes,) = _figure("memory")
    for kind, color, marker in _looking(tables):
        table = tables[kind]
        if table.low.notna().all():
            ends = table.low.astype(float), table.high.astype(float)
            axes.fill_between(table.k, *ends, color=color, alpha=0.2, linewidth=0)
        axes.plot(table.k, table.change, color=color, marker=marker, label=kind)
    axes.axhline(compare.USED, color=GREY, linestyle=":", label=f"{compare.USED:.1%}")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_yscale("symlog", linthresh=0.001)
    axes.set_xticks([0, 1, 2, 4, 8, 16, 32], ["0", "1", "2", "4", "8", "16", "32"])
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, 1, " %"))
    axes.legend(**BESIDE)
    return figure


def recall(records: Sequence[Mapping[str, Any]]) -> Figure:
    """R² of linear maps from contexts to the tokens read, by how far back those are: the records of
    `gap.remembers`, a line for each kind, mean over its runs."""
    figure, (axes,) = _figure("recall")
    kinds = list(dict.fromkeys(one["kind"] for one in records))
    for kind, color, marker in _looking(kinds):
        r2 = compare.recall(records, kind)[lambda r2: r2.index >= 0]
        axes.plot(r2, color=color, marker=marker, markersize=5, label=kind)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks([0, 1, 2, 4, 8, 16], ["0", "1", "2", "4", "8", "16"])
    axes.legend(**BESIDE)
    return figure


def _bin(low: float, after: float | None) -> str:
    if after is None:
        return f"{low:g}+"
    return f"{low:g}" if after - 1 <= low else f"{low:g}–{after - 1:g}"


def rule_scores(scores: pd.DataFrame) -> Figure:
    """How often each rule was right, beside how often chance would have been."""
    rows = scores[scores.hit_rate.notna()]
    figure, (axes,) = _figure("rule_scores", (8, 0.8 + 0.5 * max(1, len(rows))))
    places = np.arange(len(rows))
    axes.barh(places, rows.hit_rate.astype(float), color=SKY, height=0.55, label="rule")
    bar: dict[str, Any] = dict(markersize=18, markeredgewidth=3)
    _points(axes, rows.base_rate.astype(float), places, RED, "|", label="chance", **bar)
    axes.set_yticks(places, rows.rule)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    axes.grid(axis="y", visible=False)
    axes.legend(**BESIDE)
    return figure
