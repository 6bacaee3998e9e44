"""Every figure, one function each; all return the Figure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import gmean

from cvfp.analysis import comparison as compare
from cvfp.analysis import stopping
from cvfp.analysis.intervals import Paired
from cvfp.analysis.scaling import EXTRAPOLATION, PowerLaw
from cvfp.gap import AS_LEFT, CAUSES, Gap
from cvfp.result import Result

# Okabe & Ito's palette: told apart with any colour vision.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, RED, GREY = "#56B4E9", "#D55E00", "#666666"
BASELINE_STYLE: Mapping[str, Mapping[str, Any]] = {
    "kneser_ney": dict(color=ORANGE, marker="s", label="Kneser–Ney bigram, training tokens"),
    "table": dict(color=GREEN, marker="D", label="fitted table alone"),
    "kneser_ney_both": dict(color=PINK, marker="^", label="… fitting + training"),
    "trigram_both": dict(color=RED, marker="v", label="Kneser–Ney trigram, fitting + training"),
}
# Change of perplexity beyond which a kind of run is named at the edge and not drawn.
FAR = 0.6
Change = tuple[float, float | None, float | None]  # and its interval
BESIDE: Mapping[str, Any] = dict(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


def _figure(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.9)
    figure, axes = plt.subplots(
        1, columns, figsize=(width, height), squeeze=False, layout="constrained", dpi=90
    )
    plt.close(figure)  # shown once, as the cell's value
    return figure, list(axes[0])


def _points(axes: Axes, x: Any, y: Any, color: str, marker: str = "o", **style: Any) -> None:
    axes.plot(x, y, color=color, marker=marker, linestyle="", **style)


def _annotate(
    axes: Axes, text: str, at: tuple[Any, Any], offset: tuple[float, float], color: str = "black"
) -> None:
    axes.annotate(text, at, xytext=offset, textcoords="offset points", color=color, fontsize=8)


def _against_tokens(axes: Axes) -> None:
    """Perplexity against training tokens, both logarithmic."""
    axes.set(xscale="log", yscale="log", xlabel="training tokens", ylabel="validation perplexity")
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(_tokens))
    _plain_log(axes.yaxis)


def phase1(result: Result) -> Figure:
    """Phase 1 as it goes: the tokens' mean squared change, and how many have converged."""
    history = pd.DataFrame(result.phase1_history)
    figure, (left, right) = _figure(2, 9, 3.4)
    threshold = result.experiment.convergence_threshold
    band = history.change_p10, history.change_p90
    left.fill_between(history.iteration, *band, color=SKY, alpha=0.4)
    left.plot(history.iteration, history.change_p50, color=BLUE, marker="o", markersize=4)
    left.axhline(threshold, color=RED, linestyle="--")
    middle = history.iloc[len(history) // 2]
    _annotate(left, "median token", (middle.iteration, middle.change_p50), (8, 6), BLUE)
    start = (history.iteration.iloc[0], threshold)
    _annotate(left, f"converged below {threshold:g}", start, (0, -14), RED)
    left.set(yscale="log", xlabel="iteration", ylabel="mean squared change of a context")
    left.set_title("Change per iteration (band: 10–90 % of tokens)")
    right.plot(history.iteration, history.converged, color=BLUE, marker="o", markersize=4)
    right.axhline(result.experiment.convergence_rate, color=RED, linestyle="--")
    right.set(ylim=(-0.02, 1.04), xlabel="iteration", ylabel="tokens converged")
    right.set_title("Converged tokens")
    right.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    return figure


def spectrum(result: Result) -> Figure:
    """Singular values behind the effective rank, and what they sum to."""
    figure, (axes,) = _figure(1, 6, 3.6)
    size = result.experiment.context_dim
    train_er, val_er = result.ranks
    for values, er, color, name in (
        (result.train_spectrum, train_er, BLUE, "training, parallel"),
        (result.val_spectrum, val_er, ORANGE, "validation, exact"),
    ):
        shares = np.asarray(values) / np.sum(values)
        label = f"{name}: effective rank {er * size:.0f} of {size} ({er:.1%})"
        line = "-" if color == BLUE else "--"
        axes.plot(np.arange(1, len(shares) + 1), shares, line, color=color, label=label)
    axes.axhline(1 / size, color=GREY, linestyle=":", label=f"all {size} directions equal")
    axes.set(yscale="log", xlabel="singular value, largest first", ylabel="share of the sum")
    axes.set_title("Spectrum of the contexts")
    axes.legend(fontsize=8)
    return figure


def phase2(result: Result) -> Figure:
    """Phase 2's curves, with the baselines that the perplexity is compared with."""
    history = pd.DataFrame(result.phase2_history)
    figure, (axes,) = _figure(1, 7, 3.8)
    label = "training (while learning)"
    axes.plot(history.epoch, history.train_ppl, color=SKY, marker="o", label=label)
    axes.plot(history.epoch, history.val_ppl, color=BLUE, marker="o", label="validation")
    best = history[history.epoch == result.best_epoch].iloc[0]
    _points(axes, best.epoch, best.val_ppl, RED, "*", markersize=15, label="best epoch")
    for name, style in BASELINE_STYLE.items():
        values = result.baselines[name]
        if values is not None:
            axes.axhline(values["ppl"], color=style["color"], linestyle="--", label=style["label"])
    axes.set(yscale="log", xlabel="epoch", ylabel="perplexity", title="Phase 2")
    axes.set_xticks(history.epoch)
    _plain_log(axes.yaxis)
    axes.legend(**BESIDE)
    return figure


def scaling(
    frame: pd.DataFrame, law: PowerLaw, published: pd.DataFrame, published_law: PowerLaw
) -> Figure:
    """Perplexity against training tokens: measured, fitted, extrapolated, baselines; published
    runs in a panel of their own, since their corpus and tokeniser differ."""
    figure, (left, right) = _figure(2, 10.4, 4.6)
    _points(left, frame.train_tokens, frame.val_ppl, BLUE, label="CVFP, measured", zorder=3)
    _law(left, law, frame.train_tokens, BLUE)
    for name, style in BASELINE_STYLE.items():
        column = frame.get(f"{name}_ppl")
        if column is not None and column.notna().any():
            means = column.groupby(frame.train_tokens).mean()
            left.plot(means.index, means, markersize=5, linewidth=1, **style)
    left.set_title("Measured here")
    label = "published (note 002)"
    _points(right, published.tokens, published.val_ppl, GREY, label=label, zorder=3)
    _law(right, published_law, published.tokens, GREY)
    right.set_title("Published: other corpus and tokeniser")
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


def _tokens(value: float, _: int) -> str:
    return f"{value / 1e6:.3g} M" if value >= 1e6 else f"{value / 1e3:.3g} k"


def _plain_log(axis: Any) -> None:
    """Perplexities as plain numbers on a log axis, also between powers of ten."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def agreement(gap: Gap, published: pd.DataFrame) -> Figure:
    """Parallel against exact contexts: cosine along the stream, with note 000's table of positions,
    and the error by cause."""
    figure, (left, right) = _figure(2, 10.5, 4.2)
    along = gap.along
    mean, worst = 1 - along.cosine, 1 - along.cosine_min
    left.fill_between(along.position, mean, worst, color=SKY, alpha=0.35)
    left.plot(along.position, mean, color=BLUE, label="measured: mean; band up to the worst")
    places = {"first": 50, "middle": gap.tokens / 2, "last": gap.tokens - 50}
    label = "published: first, middle, last 100"
    _points(left, published.position.map(places), 1 - published.cosine, RED, "D", label=label)
    left.set(xscale="log", yscale="log", title="Distance along the stream")
    left.set(xlabel="position in the stream (token)", ylabel="1 − cosine with the exact context")
    left.legend(fontsize=8, loc="upper right")
    rows = gap.agreement
    causes = [name for name in CAUSES if name in rows.index]
    names = [AS_LEFT, *(CAUSES[name] for name in causes)]
    values = [rows.mse[AS_LEFT], *(rows.mse[name] for name in causes)]
    right.barh(names, values, color=[BLUE] + [SKY] * len(causes))
    right.invert_yaxis()
    labels = [f" {value:.1e}" for value in values]
    right.bar_label(right.containers[0], labels, fontsize=8)  # type: ignore[arg-type]
    right.set(xlabel="mean squared error against the exact contexts")
    right.set(title="Where the difference comes from", xlim=(0, max(values) * 1.22))
    right.xaxis.set_major_locator(ticker.MaxNLocator(4))
    right.grid(axis="y", visible=False)
    return figure


def forgetting(gap: Gap) -> Figure:
    """Error against the window's length, and how sweeps converge."""
    figure, (left, right) = _figure(2, 10.5, 4.2)
    windows, memory = gap.windows, gap.recurrence.memory_length
    left.plot(windows.tokens, windows.relative_error_mean, color=BLUE, label="mean over tokens")
    left.plot(windows.tokens, windows.relative_error_max, "--", color=SKY, label="worst token")
    left.axhline(0.01, color=RED, linestyle=":", label="1 %")
    if memory is not None:
        left.axvline(memory, color=RED, linestyle=":")
        top = (memory, left.get_ylim()[1])
        _annotate(left, f"memory length {memory} tokens", top, (5, -14), RED)
    left.set(xlabel="window: tokens since the context was zero", ylabel="relative error")
    left.set(yscale="log", title="What a window of k tokens misses")
    left.legend(fontsize=8)
    label = "sweeps from zeros: largest change of a sweep"
    right.plot(windows.tokens, windows.residual, color=ORANGE, label=label)
    label = "clean sweeps from Phase 1's contexts: mean error"
    right.plot(gap.clean.sweep, gap.clean.relative_error_mean, "--", color=BLUE, label=label)
    blocks = [residual["relative"] for residual in gap.exact.residuals]
    label = "blocks: largest change of a start"
    right.plot(range(1, len(blocks) + 1), blocks, color=GREEN, marker="D", label=label)
    right.set(xlabel="sweep", ylabel="relative residual or error", title="Convergence")
    right.set(yscale="log", ylim=(None, 300))  # the legend is above the curves
    right.legend(fontsize=8)
    return figure


def times(frame: pd.DataFrame) -> Figure:
    """Seconds against tokens: step by step, in blocks, and one shifted pass."""
    figure, (axes,) = _figure(1, 6.5, 4)
    for column, color, marker, label in (
        ("sequential", RED, "s", "step by step (exact)"),
        ("blocks", BLUE, "o", "blocks (exact)"),
        ("shifted", GREEN, "^", "one shifted pass over previous contexts (published)"),
    ):
        rows = frame[frame[column].notna()]
        axes.plot(rows.tokens, rows[column], color=color, marker=marker, label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds", title="Time")
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(_tokens))
    axes.legend(fontsize=8)
    return figure


def by_seed(frame: pd.DataFrame, field: str, labels: Mapping[str, str]) -> Figure:
    """Perplexity of each seed under two or more values of a field, joined by seed."""
    figure, (axes,) = _figure(1, 5.5, 3.8)
    places = {value: place for place, value in enumerate(labels)}
    for seed, rows in frame.groupby("seed"):
        rows = rows.set_index(field).loc[list(labels)]
        style: dict[str, Any] = dict(color=GREY, marker="o", linewidth=1)
        axes.plot(rows.index.map(places), rows.val_ppl, label=f"seed {seed}", **style)
        _annotate(axes, f"{seed}", (len(labels) - 1, rows.val_ppl.iloc[-1]), (8, -3))
    axes.set_xticks(list(places.values()), list(labels.values()))
    axes.set(xlim=(-0.4, len(labels) - 0.6), ylabel="validation perplexity")
    axes.set_title("One line a seed (its number at the right)")
    return figure


def early_stopping(results: Sequence[Result], patiences: Sequence[int]) -> Figure:
    """Validation perplexity by epoch, one panel a size, and where each patience stops."""
    figure, axes = _figure(len(results), max(4.2, 3.6 * len(results)), 3.6)
    for one, result in zip(axes, results, strict=True):
        history = pd.DataFrame(result.phase2_history)
        one.plot(history.epoch, history.val_ppl, color=BLUE, marker="o", markersize=4)
        table = stopping.replay(result, patiences)
        looks = (RED, ORANGE, GREEN, PINK), "sDov", (10, 14, 18, 22)
        for patience, color, marker, size in zip(patiences, *looks, strict=False):
            row = table.loc[patience]
            # Hollow, one around the other: they may choose the same epoch.
            hollow: dict[str, Any] = dict(markersize=size, markeredgewidth=2, fillstyle="none")
            label = f"chosen with patience {patience}"
            _points(one, row.best_epoch, row.val_ppl, color, marker, label=label, **hollow)
        one.set(xlabel="epoch", ylabel="validation perplexity")
        one.set_title(f"{result.experiment.samples} conversations, seed {result.experiment.seed}")
        one.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        one.legend(fontsize=8, markerscale=0.6)
    return figure


def forms(frame: pd.DataFrame, fits: Mapping[str, Any]) -> Figure:
    """Perplexity against tokens with every form of law, drawn on to ten times the data."""
    figure, (axes,) = _figure(1, 6.8, 4.2)
    _points(axes, frame.train_tokens, frame.val_ppl, GREY, label="measured")
    low, high = float(frame.train_tokens.min()), float(frame.train_tokens.max())
    along = np.geomspace(low, 10 * high, 100)
    looks = (BLUE, RED, GREEN), ("-", "--", "-.")
    for (name, law), color, line in zip(fits.items(), *looks, strict=False):
        axes.plot(along, law.predict(along), color=color, linestyle=line, label=name)
    axes.axvspan(high, 10 * high, color=GREY, alpha=0.12)
    _against_tokens(axes)
    _annotate(axes, "beyond the data", (high, axes.get_ylim()[0]), (6, 6))
    axes.legend(fontsize=8)
    return figure


def ladders(frame: pd.DataFrame, names: Mapping[str, Mapping[str, Any]], rank: bool) -> Figure:
    """Several kinds of run against training tokens: perplexity, and effective rank beside it.

    Args:
        names: for every kind the fields that pick its rows, by the name to show.
        rank: draw the effective rank of held-out contexts in a second panel.
    """
    figure, axes = _figure(2 if rank else 1, 10 if rank else 6, 4)
    looks = (BLUE, RED, GREEN, ORANGE), "osD^"
    for (name, fields), color, marker in zip(names.items(), *looks, strict=False):
        rows = frame[np.logical_and.reduce([frame[k] == v for k, v in fields.items()])]
        means = rows.groupby("samples")[["train_tokens", "val_ppl", "val_er"]].mean()
        for one, column, scale in zip(axes, ("val_ppl", "val_er"), (1, 100), strict=False):
            one.plot(means.train_tokens, scale * means[column], color=color, label=name)
            _points(one, rows.train_tokens, scale * rows[column], color, marker)
    _against_tokens(axes[0])
    axes[0].set_title("Perplexity")
    if rank:
        axes[1].set(xscale="log", ylabel="effective rank, % of D", title="Effective rank")
    for one in axes:
        one.set(xlabel="training tokens")
        # The sizes themselves: a ladder may hold no power of ten.
        one.set_xticks(sorted(frame.groupby("samples").train_tokens.first()), minor=False)
        one.set_xticks([], minor=True)
        one.xaxis.set_major_formatter(ticker.FuncFormatter(_tokens))
        one.legend(fontsize=8)
    return figure


def overfitting(results: Sequence[Result], names: Sequence[str]) -> Figure:
    """Training and validation perplexity by epoch, one line a run."""
    figure, (axes,) = _figure(1, 7.5, 4)
    colors = (BLUE, RED, GREEN, ORANGE, PINK, SKY)
    for result, name, color in zip(results, names, colors, strict=False):
        history = pd.DataFrame(result.phase2_history)
        axes.plot(history.epoch, history.val_ppl, color=color, marker="o", label=name)
        axes.plot(history.epoch, history.train_ppl, color=color, linestyle=":")
    axes.plot([], [], color=GREY, linestyle=":", label="training (while learning)")
    axes.set(yscale="log", xlabel="epoch", ylabel="perplexity", title="Phase 2 by learning rate")
    _plain_log(axes.yaxis)
    axes.legend(**BESIDE)
    return figure


def correlations(matrix: pd.DataFrame) -> Figure:
    """A correlation matrix as a heat map."""
    figure, (axes,) = _figure(1, 6.8, 5.5)
    values = matrix.round(2) + 0.0  # no −0.00
    cells: dict[str, Any] = dict(annot=True, fmt=".2f", annot_kws={"fontsize": 7}, square=True)
    bar = {"label": "Pearson's r"}
    sns.heatmap(values, ax=axes, vmin=-1, vmax=1, cmap="RdBu_r", cbar_kws=bar, **cells)
    axes.set(xlabel="", ylabel="", title="Correlations over the runs")
    plt.setp(axes.get_xticklabels(), rotation=45, ha="right")
    return figure


def alpha_rank(measured: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """α against effective rank, one point a configuration: measured, and published."""
    figure, (left, right) = _figure(2, 10, 4)
    rank, errors = 100 * measured.val_er, measured.alpha_error
    left.errorbar(rank, measured.alpha, yerr=errors, color=BLUE, ecolor=SKY, fmt="o")
    left.set_title("Measured here (bars: standard error)")
    _points(right, published.val_er, published.alpha, RED, "D")
    right.set_title("Published (note 004)")
    for one in (left, right):
        one.set(xlabel="effective rank of held-out contexts, % of D", ylabel="α")
    return figure


def comparison(groups: compare.Groups) -> Figure:
    """Perplexity of every kind of run against CVFP's at every size, with paired intervals, and of
    the models that only count; ordered as at the largest size."""
    sizes = compare.sizes(groups)
    changes = {size: _changes(groups, size) for size in sizes}
    # The best are to be seen, however far under CVFP.
    nearest = min(-0.4, *(one[0] - 0.05 for kinds in changes.values() for one in kinds.values()))
    order = sorted(changes[sizes[-1]], key=lambda kind: changes[sizes[-1]][kind][0])
    looks = dict.fromkeys(compare.COUNTED.values(), (ORANGE, "D"))
    figure, axes = _figure(len(sizes), 2.6 + 2.9 * len(sizes), 1.2 + 0.31 * len(order))
    for panel, (one, size) in enumerate(zip(axes, sizes, strict=True)):
        one.axvline(0, color=RED, linewidth=1.5)
        for place, kind in enumerate(order):
            change, low, high = changes[size][kind]
            # What is far worse is not what the figure is about.
            if change > FAR:
                one.annotate(f"{change:+.0%} →", (FAR, place), ha="right", va="center", fontsize=8)
                continue
            if low is not None and high is not None:
                one.plot([low, high], [place] * 2, color=SKY, linewidth=3)
            _points(one, change, place, *looks.get(kind, (BLUE, "o")))
        one.set_yticks(range(len(order)), order if panel == 0 else [""] * len(order))
        ppl = _ppl(compare.at(groups[compare.CVFP], size))
        one.set(xlim=(nearest, FAR + 0.02), ylim=(len(order) - 0.5, -0.5))
        one.set(xlabel="perplexity against CVFP", title=f"{size} conversations (CVFP {ppl:.0f})")
        one.set_xticks([-0.25, 0, 0.25, 0.5])
        one.xaxis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=" %"))
    _points(axes[0], [], [], BLUE, label="trained, 95 % interval")
    _points(axes[0], [], [], ORANGE, "D", label="counted, no seeds")
    axes[0].plot([], [], color=RED, label="CVFP")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    return figure


def pairs(named: Mapping[str, Paired], reference: str) -> Figure:
    """Paired changes of perplexity with their intervals, and each seed's."""
    figure, (axes,) = _figure(1, 6.5, 1.4 + 0.4 * len(named))
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


def _changes(groups: compare.Groups, size: int) -> dict[str, Change]:
    """Change of perplexity against CVFP's, with its interval; none for what only counts."""
    pairs = compare.against(groups, size).items()
    changes: dict[str, Change] = {kind: (one.change, one.low, one.high) for kind, one in pairs}
    runs = compare.at(groups[compare.CVFP], size)
    for key, name in compare.COUNTED.items():
        line = runs[0].baselines[key]
        if line is not None:
            changes[name] = line["ppl"] / _ppl(runs) - 1, None, None
    return changes


def _ppl(runs: Sequence[Result]) -> float:
    """Geometric mean over seeds, as `intervals.paired` compares them."""
    return float(gmean([one.val_ppl for one in runs if one.val_ppl]))


def where_context_helps(groups: compare.Groups, samples: int) -> Figure:
    """Nats per token against zero contexts, by place in the conversation and by how often the
    predicted token was seen."""
    figure, axes = _figure(2, 10, 3.5)
    figure.set_dpi(80)  # many lines: under 100 kB
    kinds = {kind: runs for kind, runs in groups.items() if kind in _SHOWN or kind == compare.ZERO}
    for one, column, title, xlabel in (
        (axes[0], "val_positions", "By place in the conversation", "token of the conversation"),
        (axes[1], "val_frequencies", "By frequency", "times seen in training"),
    ):
        frame = compare.by_bin(kinds, samples, column, compare.ZERO)
        bins = sorted(frame.low.unique())
        for kind, rows in frame.groupby("kind", sort=False):
            color, marker = _SHOWN[str(kind)]
            places = rows.low.map(bins.index)
            one.plot(places, rows.nats, color=color, marker=marker, markersize=5, label=kind)
        one.axhline(0, color=GREY, linestyle=":")
        names = itertools.starmap(_bin, itertools.zip_longest(bins, bins[1:]))
        one.set_xticks(range(len(bins)), list(names), rotation=35, ha="right")
        one.set(title=title, xlabel=xlabel, ylabel="nats against zero contexts")
    axes[1].legend(**BESIDE)
    return figure


_SHOWN = {
    compare.CVFP: (BLUE, "o"),
    compare.RANDOM: (SKY, "s"),
    compare.WINDOW: (GREEN, "D"),
    compare.JOINT: (ORANGE, "^"),
    compare.LSTM: (PINK, "v"),
    compare.TRANSFORMER: (RED, "X"),
}


def _bin(low: float, after: float | None) -> str:
    if after is None:
        return f"{low:g}+"
    return f"{low:g}" if after - 1 <= low else f"{low:g}–{after - 1:g}"


def rule_scores(scores: pd.DataFrame) -> Figure:
    """How often each rule was right, beside how often chance would have been."""
    rows = scores[scores.hit_rate.notna()]
    figure, (axes,) = _figure(1, 8, 0.8 + 0.5 * max(1, len(rows)))
    places = np.arange(len(rows))
    axes.barh(places, rows.hit_rate.astype(float), color=SKY, height=0.55, label="rule")
    bar: dict[str, Any] = dict(markersize=18, markeredgewidth=3)
    _points(axes, rows.base_rate.astype(float), places, RED, "|", label="chance", **bar)
    axes.set_yticks(places, rows.rule)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="right, of the runs it calls")
    axes.xaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    axes.grid(axis="y", visible=False)
    axes.legend(**BESIDE)
    return figure
