"""From Phase 1's measures to Phase 2's perplexity: correlations and formulas (note 004).

Runs are not independent: those of one configuration are alike at every size and seed. Errors and
intervals therefore count configurations, each left out whole, and not runs. `frame` is
`Results.frame()` throughout: one corpus, one tokeniser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from cvfp.analysis import intervals, scaling
from cvfp.config import ParameterError

CONFIGURATION = (
    "num_layers",
    "context_dim",
    "num_input_tokens",
    "dist_reg_weight",
    "token_input_all_layers",
)

# What `matrix` correlates: column and name on the page.
LABELS: Mapping[str, str] = {
    "log_ppl": "log PPL",
    "log_tokens": "log tokens",
    "val_er": "val ER",
    "train_er": "train ER",
    "er_gap": "train − val ER",
    "phase1_iterations": "iterations",
    "converged": "converged",
    "val_acc": "accuracy",
    "num_layers": "layers L",
    "context_dim": "context size D",
    "num_input_tokens": "input tokens n",
    "dist_reg_weight": "diversity weight w",
}

RULE = "500 − 4·ER"
TOKENS_AND_ER = "tokens and ER, refitted"
TOKENS_ONLY = "tokens only"
MEAN = "mean of the others"
# Each form of log PPL (natural logarithm; er in percent): fixed coefficients, and the columns
# whose coefficients are fitted. Note 004 prints α as a range: both its ends are here.
FORMS: Mapping[str, tuple[Mapping[str, float], tuple[str, ...]]] = {
    RULE: ({"log_rule": 1.0}, ()),
    "published coefficients, α −0.46": ({"log_tokens": -0.46, "er": -0.02}, ("one",)),
    "published coefficients, α −0.55": ({"log_tokens": -0.55, "er": -0.02}, ("one",)),
    TOKENS_AND_ER: ({}, ("log_tokens", "er", "one")),
    TOKENS_ONLY: ({}, ("log_tokens", "one")),
    MEAN: ({}, ("one",)),
}

_FIGURES = (
    *("alpha", "beta", "gamma", "beta_low", "beta_high"),
    *("error", "left_out_error", "left_out_worst", "r2"),
)


@dataclass(frozen=True)
class Correlation:
    """Pearson's r of n points; two-sided p, 1 for two points, which always lie on a line; the 95 %
    interval by Fisher's z, None with fewer than 4 points."""

    r: float
    p: float
    low: float | None
    high: float | None
    n: int


def correlation(x: ArrayLike, y: ArrayLike) -> Correlation:
    """Pearson's correlation with its interval.

    p and interval take the points as independent: give one point a configuration.

    Raises:
        ValueError: lists of unequal length, of fewer than two numbers, constant or not finite.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise ParameterError("x, y", (a.shape, b.shape), "two lists of the same length, 2 or more")
    for name, values in (("x", a), ("y", b)):
        if not np.isfinite(values).all() or np.ptp(values) == 0:
            raise ParameterError(name, values.tolist(), "finite numbers that are not all alike")
    pearson = stats.pearsonr(a, b)
    low = high = None
    if len(a) > 3:
        low, high = map(float, pearson.confidence_interval(intervals.LEVEL))
    return Correlation(float(pearson.statistic), float(pearson.pvalue), low, high, len(a))


def matrix(frame: pd.DataFrame) -> pd.DataFrame:
    """Pearson's r of every two columns of `LABELS` over the runs that have a perplexity.

    Returns:
        Symmetric, labelled for reading; without the columns that are the same in every run. Runs
        of one configuration are alike, so that no p belongs to these figures.

    Raises:
        ValueError: a column that is not there, or fewer than 3 runs.
    """
    runs = _runs(frame)
    if len(runs) < 3:
        raise ParameterError("frame", f"{len(runs)} runs with a perplexity", "3 or more")
    chosen = runs[list(LABELS)].astype(float)
    varying = chosen.loc[:, chosen.max() > chosen.min()]
    return varying.corr().rename(index=LABELS, columns=LABELS)


def by_configuration(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration: its scaling exponent, and its figures at the largest size.

    Returns:
        Indexed by a label such as "1 x 64, n 1, w 0.8", over the runs with a perplexity. Columns:
        those of `CONFIGURATION`; sizes, runs (how many); alpha and alpha_error (`scaling.fit`;
        missing for one size, the error also for two runs); at the largest size val_er, val_ppl
        (means) and best_ppl (least); phase1_iterations (mean over all).

    Raises:
        ValueError: a column that is not there, or no run with a perplexity.
    """
    runs = _runs(frame)
    rows: dict[str, dict[str, Any]] = {}
    for label, group in runs.groupby("configuration", sort=False):
        sizes = group.train_tokens.nunique()
        law = scaling.fit(group.train_tokens, group.val_ppl) if sizes > 1 else None
        last = group[group.train_tokens == group.train_tokens.max()]
        rows[str(label)] = {
            **{name: group[name].iloc[0] for name in CONFIGURATION},
            "sizes": sizes,
            "runs": len(group),
            "alpha": None if law is None else law.alpha,
            "alpha_error": None if law is None else law.alpha_error,
            "val_er": last.val_er.mean(),
            "val_ppl": last.val_ppl.mean(),
            "best_ppl": last.val_ppl.min(),
            "phase1_iterations": group.phase1_iterations.mean(),
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("configuration")
    return table.sort_values(list(CONFIGURATION)).astype({"alpha": float, "alpha_error": float})


def predictors(frame: pd.DataFrame) -> pd.DataFrame:
    """How well each formula predicts perplexity, above all of a configuration it has not seen.

    All of `FORMS` are log PPL = α·log tokens + β·ER + γ (natural logarithms: note 004 does not say
    which; ER of the exact validation contexts in percent; one γ for all) but "500 − 4·ER", note
    004's rule for PPL itself. A column that is the same in every run is left out of the fit.

    Returns:
        Indexed by predictor. fitted (how many parameters), alpha, beta (log PPL per point of ER),
        gamma; beta_low, beta_high (95 %, a jackknife over configurations: the usual clustered error
        is too small with so few); error (mean |predicted / measured PPL − 1| on the runs fitted);
        left_out_error, left_out_worst (where the run's configuration was left out: mean, worst
        run); r2 (of log PPL; under 0: worse than the mean). In the means every configuration counts
        the same. Missing: the runs left do not determine it.

    Raises:
        ValueError: a column that is not there, or under three configurations.
    """
    runs = _runs(frame, configurations=3)
    rows = {name: _row(runs, *form) for name, form in FORMS.items()}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("predictor")
    return table.astype(dict.fromkeys(_FIGURES, float))


@dataclass(frozen=True)
class Gain:
    """Mean relative errors of PPL of a configuration left out; gain: what effective rank takes off
    the error, with its 95 % interval."""

    tokens_only: float
    tokens_and_er: float
    gain: float
    low: float | None
    high: float | None
    configurations: int


def what_er_adds(frame: pd.DataFrame) -> Gain:
    """The errors of "tokens only" and "tokens and ER" on configurations left out, compared.

    Paired over configurations, Student's t. (Any two of the fits share most of their runs, so that
    the differences are not quite independent.)

    Raises:
        ValueError: as `predictors`, or the runs left do not determine one of the two fits.
    """
    runs = _runs(frame, configurations=3)
    errors = []
    for name in (TOKENS_ONLY, TOKENS_AND_ER):
        fixed, fitted = FORMS[name]
        left = _left_out(runs, fixed, _varying(runs, fitted))
        if left is None:
            got = f"runs that do not determine {name!r} without one of the configurations"
            accepted = "sizes and effective ranks that vary apart from one another"
            raise ParameterError("frame", got, accepted)
        errors.append(_by_configuration(runs, left[0]))
    gain, low, high = intervals.mean((errors[0] - errors[1]).tolist())
    return Gain(float(errors[0].mean()), float(errors[1].mean()), gain, low, high, len(errors[0]))


def _row(
    runs: pd.DataFrame, fixed: Mapping[str, float], fitted: Sequence[str]
) -> dict[str, float | None]:
    columns = _varying(runs, fitted)
    row: dict[str, float | None] = {"fitted": len(columns), **dict.fromkeys(_FIGURES)}
    coefficients = _fit(runs, fixed, columns)
    if coefficients is None:
        return row
    names = {"alpha": "log_tokens", "beta": "er", "gamma": "one"}
    row |= {name: coefficients.get(column) for name, column in names.items()}
    inside = _predicted(runs, coefficients)
    row["error"] = _by_configuration(runs, _errors(runs, inside)).mean()
    spread = ((runs.log_ppl - runs.log_ppl.mean()) ** 2).sum()
    if spread > 0:
        row["r2"] = 1 - ((runs.log_ppl - inside) ** 2).sum() / spread
    left = _left_out(runs, fixed, columns)
    if left is not None:
        errors, fits = left
        row["left_out_error"] = _by_configuration(runs, errors).mean()
        row["left_out_worst"] = errors.max()
        if "er" in columns:
            without = [one["er"] for one in fits]
            row["beta_low"], row["beta_high"] = intervals.jackknife(coefficients["er"], without)
    return row


def _varying(runs: pd.DataFrame, fitted: Sequence[str]) -> list[str]:
    return [name for name in fitted if name == "one" or runs[name].max() > runs[name].min()]


def _fit(
    runs: pd.DataFrame, fixed: Mapping[str, float], columns: list[str]
) -> dict[str, float] | None:
    """All coefficients of a form, those of `columns` by least squares; None: not determined."""
    if not columns:
        return dict(fixed)
    rest = runs.log_ppl - _predicted(runs, fixed)
    solved, _, rank, _ = np.linalg.lstsq(runs[columns].to_numpy(), rest.to_numpy(), rcond=1e-10)
    if rank < len(columns):
        return None
    return {**fixed, **dict(zip(columns, solved.tolist(), strict=True))}


def _left_out(
    runs: pd.DataFrame, fixed: Mapping[str, float], columns: list[str]
) -> tuple[pd.Series, list[dict[str, float]]] | None:
    """Error of each run as predicted from the other configurations, and the fits behind it; None:
    one of them is not determined."""
    errors, fits = [], []
    for _, rows in runs.groupby("configuration"):
        coefficients = _fit(runs.drop(rows.index), fixed, columns)
        if coefficients is None:
            return None
        errors.append(_errors(rows, _predicted(rows, coefficients)))
        fits.append(coefficients)
    return pd.concat(errors).sort_index(), fits


def _predicted(runs: pd.DataFrame, coefficients: Mapping[str, float]) -> pd.Series:
    return sum((value * runs[name] for name, value in coefficients.items()), 0.0 * runs.one)


def _errors(runs: pd.DataFrame, predicted: pd.Series) -> pd.Series:
    """|predicted / measured PPL − 1| of each run."""
    return ((predicted - runs.log_ppl).map(math.exp) - 1).abs()


def _by_configuration(runs: pd.DataFrame, errors: pd.Series) -> pd.Series:
    """The mean error of each configuration."""
    return errors.groupby(runs.configuration).mean()


def _runs(frame: pd.DataFrame, configurations: int = 1) -> pd.DataFrame:
    """The runs that have a perplexity, with the columns that the formulas take."""
    needed = ("train_tokens", "val_ppl", "val_er", "train_er", "phase1_iterations")
    missing = [name for name in (*CONFIGURATION, *needed) if name not in frame]
    if missing:
        raise ParameterError("frame", f"no columns {missing}", "Results.frame()")
    runs = frame[frame.val_ppl.notna()].reset_index(drop=True)
    if runs.empty:
        raise ParameterError("frame", "no run with a perplexity", "one or more")
    runs = runs.astype(dict.fromkeys(("train_tokens", "val_ppl", "val_er", "train_er"), float))
    labels = [label(row) for row in runs[list(CONFIGURATION)].to_dict("records")]
    if len(set(labels)) < configurations:
        got = f"{len(set(labels))} configurations with a perplexity"
        raise ParameterError("frame", got, f"{configurations} or more")
    rank = 100 * runs.val_er
    return runs.assign(
        configuration=labels,
        log_ppl=np.log(runs.val_ppl),
        log_tokens=np.log(runs.train_tokens),
        er=rank,
        er_gap=runs.train_er - runs.val_er,
        one=1.0,
        log_rule=np.log(500 - 4 * rank),
    )


def label(fields: Mapping[Any, Any]) -> str:
    """The configuration in words: `1 x 64, n 1, w 0.8`."""
    design = "" if fields["token_input_all_layers"] else ", equal-decrease"
    return (
        f"{fields['num_layers']} x {fields['context_dim']}, n {fields['num_input_tokens']}, "
        f"w {fields['dist_reg_weight']:g}{design}"
    )
