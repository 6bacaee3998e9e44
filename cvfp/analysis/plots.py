"""Every figure, one function each; all return the Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from cvfp.analysis.scaling import PowerLaw
from cvfp.experiment import Result

# Okabe & Ito's palette: told apart with any colour vision.
BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#666666",
)
BASELINE_STYLE: Mapping[str, Mapping[str, Any]] = {
    "kneser_ney": dict(color=ORANGE, marker="s", label="Kneser–Ney bigram, training tokens"),
    "table": dict(color=GREEN, marker="D", label="fitted table alone"),
    "kneser_ney_both": dict(color=PINK, marker="^", label="Kneser–Ney, fitting + training"),
}
EXTRAPOLATION = (1e6, 5e6, 1e7)


def _style() -> None:
    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.9)


def _figure(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    _style()
    figure, axes = plt.subplots(
        1, columns, figsize=(width, height), squeeze=False, layout="constrained", dpi=90
    )
    plt.close(figure)  # shown once, as the cell's value
    return figure, list(axes[0])


def phase1(result: Result) -> Figure:
    """Phase 1 as it goes: the tokens' mean squared change, and how many have converged."""
    history = pd.DataFrame(result.phase1_history)
    figure, (left, right) = _figure(2, 9, 3.4)
    threshold = result.experiment.convergence_threshold
    left.fill_between(
        history.iteration, history.change_p10, history.change_p90, color=SKY, alpha=0.4
    )
    left.plot(history.iteration, history.change_p50, color=BLUE, marker="o", markersize=4)
    left.axhline(threshold, color=RED, linestyle="--")
    middle = history.iteration.iloc[len(history) // 2]
    left.annotate(
        "median token",
        (middle, history.change_p50.iloc[len(history) // 2]),
        xytext=(8, 6),
        textcoords="offset points",
        color=BLUE,
    )
    left.annotate(
        f"converged below {threshold:g}",
        (history.iteration.iloc[0], threshold),
        xytext=(0, -14),
        textcoords="offset points",
        color=RED,
    )
    left.set(
        yscale="log",
        xlabel="iteration",
        ylabel="mean squared change of a context",
        title="Change per iteration (band: 10–90 % of tokens)",
    )
    right.plot(history.iteration, history.converged, color=BLUE, marker="o", markersize=4)
    right.axhline(result.experiment.convergence_rate, color=RED, linestyle="--")
    right.set(
        ylim=(-0.02, 1.04), xlabel="iteration", ylabel="tokens converged", title="Converged tokens"
    )
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def spectrum(result: Result) -> Figure:
    """Singular values behind the effective rank, and what they sum to."""
    figure, (axes,) = _figure(1, 6, 3.6)
    size = result.experiment.context_dim
    for values, er, color, name in (
        (result.train_spectrum, result.train_er, BLUE, "training, parallel"),
        (result.val_spectrum, result.val_er, ORANGE, "validation, exact"),
    ):
        shares = np.asarray(values) / np.sum(values)
        label = f"{name}: effective rank {er * size:.0f} of {size} ({er:.1%})"
        line = "-" if color == BLUE else "--"
        axes.plot(np.arange(1, len(shares) + 1), shares, line, color=color, label=label)
    axes.axhline(1 / size, color=GREY, linestyle=":", label=f"all {size} directions equal")
    axes.set(
        yscale="log",
        xlabel="singular value, largest first",
        ylabel="share of the sum",
        title="Spectrum of the contexts",
    )
    axes.legend(fontsize=8)
    return figure


def phase2(result: Result) -> Figure:
    """Phase 2's curves, with the baselines that the perplexity has to be read against."""
    history = pd.DataFrame(result.phase2_history)
    figure, (axes,) = _figure(1, 7, 3.8)
    axes.plot(
        history.epoch, history.train_ppl, color=SKY, marker="o", label="training (while learning)"
    )
    axes.plot(history.epoch, history.val_ppl, color=BLUE, marker="o", label="validation")
    best = history[history.epoch == result.best_epoch].iloc[0]
    axes.plot(
        best.epoch,
        best.val_ppl,
        marker="*",
        markersize=15,
        color=RED,
        linestyle="",
        label="best epoch",
    )
    for name, style in BASELINE_STYLE.items():
        values = result.baselines[name]
        if values is not None:
            axes.axhline(values["ppl"], color=style["color"], linestyle="--", label=style["label"])
    axes.set(yscale="log", xlabel="epoch", ylabel="perplexity", title="Phase 2")
    axes.set_xticks(history.epoch)
    _plain_log(axes.yaxis)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def scaling(
    frame: pd.DataFrame,
    law: PowerLaw,
    published: pd.DataFrame | None = None,
    published_law: PowerLaw | None = None,
) -> Figure:
    """Perplexity against training tokens: measured, fitted, extrapolated, baselines; published
    runs in a panel of their own, since their corpus and tokeniser differ."""
    panels = 1 if published is None else 2
    figure, axes = _figure(panels, 5.2 * panels, 4.6)
    left = axes[0]
    left.plot(
        frame.train_tokens,
        frame.val_ppl,
        color=BLUE,
        marker="o",
        linestyle="",
        label="CVFP, measured",
        zorder=3,
    )
    _law(left, law, frame.train_tokens, BLUE)
    for name, style in BASELINE_STYLE.items():
        column = frame.get(f"{name}_ppl")
        if column is not None and column.notna().any():
            means = column.groupby(frame.train_tokens).mean()
            left.plot(means.index, means, markersize=5, linewidth=1, **style)
    left.set_title("Measured here")
    if published is not None and published_law is not None:
        right = axes[1]
        right.plot(
            published.tokens,
            published.val_ppl,
            color=GREY,
            marker="o",
            linestyle="",
            label="published (note 002)",
            zorder=3,
        )
        _law(right, published_law, published.tokens, GREY)
        right.set_title("Published: other corpus and tokeniser")
    for one in axes:
        one.set(
            xscale="log", yscale="log", xlabel="training tokens", ylabel="validation perplexity"
        )
        one.xaxis.set_major_formatter(FuncFormatter(_tokens))
        _plain_log(one.yaxis)
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
        axes.plot(
            beyond,
            law.predict(beyond),
            color=color,
            marker="o",
            fillstyle="none",
            linestyle="",
            label="extrapolated, not measured",
        )


def _tokens(value: float, _: int) -> str:
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k"


def _plain_log(axis: Any) -> None:
    """Perplexities as plain numbers on a log axis, also between powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
