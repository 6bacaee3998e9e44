"""From Phase 1's measures to Phase 2's perplexity: correlations and formulas (note 004).

Runs are not independent: those of one configuration are alike at every size and seed. Errors and
intervals therefore count configurations, each left out whole, and not runs. `frame` is
`Results.frame()` throughout: one corpus, one tokeniser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from cvfp.analysis import intervals, scaling, style
from cvfp.config import ParameterError

CONFIGURATION = tuple[str, ...](style.COLUMNS["configuration"])
LABELS: Mapping[str, str] = style.COLUMNS["matrix"]  # of what `matrix` correlates, by column

RULE = "500 − 4·ER"
TOKENS_AND_ER = "tokens and ER, refitted"
TOKENS_ONLY = "tokens only"
MEAN = "mean of the others"
FORMS: Mapping[str, Mapping[str, Any]] = style.COLUMNS["formulas"]


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
    """Pearson's correlation with its interval. Both take the points as independent: give one point
    a configuration. Raises ValueError: lists of unequal length, of fewer than two numbers, constant
    or not finite."""
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


def matrix(frame: pd.DataFrame, ranks: bool = False, within: str = "") -> pd.DataFrame:
    """Pearson's r (`ranks`: Spearman's) of every two columns of `LABELS` that vary, over the runs
    that have a perplexity; `within` "configuration" or "train_tokens": of what those that share it
    differ by. Runs of one configuration are alike, so that no p belongs to these figures. Raises
    ValueError: a column that is not there, or under 3 runs."""
    runs = _runs(frame)
    if len(runs) < 3:
        raise ParameterError("frame", f"{len(runs)} runs with a perplexity", "3 or more")
    chosen = runs[list(LABELS)].astype(float)
    if within:
        chosen -= chosen.groupby(runs[within]).transform("mean")
    chosen = chosen.round(12)  # a constant is not quite its mean
    varying = chosen.loc[:, chosen.max() > chosen.min()]
    return varying.corr("spearman" if ranks else "pearson").rename(index=LABELS, columns=LABELS)


def by_configuration(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration: its scaling exponent, and its figures at the largest size.

    Indexed by a label such as "1 x 64, n 1, w 0.8", over the runs with a perplexity. Columns: those
    of `CONFIGURATION`; alpha and alpha_error (`scaling.fit`; missing for one size, the error also
    for two runs); val_er and val_ppl at the largest size; phase1_iterations over all (means).
    Raises ValueError: a column that is not there, or no run with a perplexity."""
    runs = _runs(frame)
    rows: dict[str, dict[str, Any]] = {}
    for label, group in runs.groupby("configuration", sort=False):
        several = np.ptp(group.train_tokens) > 0
        law = scaling.fit(group.train_tokens, group.val_ppl) if several else None
        last = group[group.train_tokens == group.train_tokens.max()]
        row = {name: group[name].iloc[0] for name in CONFIGURATION}
        row |= {name: law and getattr(law, name) for name in ("alpha", "alpha_error")}
        row |= last[["val_er", "val_ppl"]].mean().to_dict()
        rows[str(label)] = row | {"phase1_iterations": group.phase1_iterations.mean()}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("configuration")
    return table.sort_values(list(CONFIGURATION)).astype({"alpha": float, "alpha_error": float})


def predictors(frame: pd.DataFrame) -> pd.DataFrame:
    """How well each formula predicts perplexity, above all of a configuration it has not seen.

    All of `FORMS` are log PPL = α·log tokens + β·ER + γ (natural logarithms, ER of the exact
    validation contexts in percent, one γ for all) but "training PPL", by its logarithm, and
    note 004's rule for PPL itself. A column that is the same in every run is not fitted.

    Indexed by predictor: fitted (how many parameters), alpha, beta (log PPL per point of ER); error
    (mean |predicted / measured PPL − 1| on the runs fitted); left_out_error, left_out_worst (where
    the run's configuration was left out: mean, worst run). In the means every configuration counts
    the same. Missing: the runs left do not determine it. Raises ValueError: a column that is not
    there, or under three configurations."""
    runs = _runs(frame, configurations=3)
    rows = {}
    for name, form in FORMS.items():
        columns = _varying(runs, form["fitted"])
        row: dict[str, float | None] = {"fitted": len(columns)}
        if (found := _fit(runs, name, columns)) is not None:
            row |= {"alpha": found.get("log_tokens"), "beta": found.get("er")}
            row["error"] = _by_configuration(runs, _errors(runs, found)).mean()
        if (left := _left_out(runs, name, columns)) is not None:
            row["left_out_error"] = _by_configuration(runs, left).mean()
            row["left_out_worst"] = left.max()
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("predictor").astype(float)


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
    """The errors of "tokens only" and "tokens and ER" on configurations left out, compared: paired
    over configurations, Student's t. (Any two of the fits share most of their runs, so that the
    differences are not quite independent.) Raises ValueError: as `predictors`, or the runs left do
    not determine one of the two fits."""
    runs = _runs(frame, configurations=3)
    errors = []
    for name in (TOKENS_ONLY, TOKENS_AND_ER):
        left = _left_out(runs, name, _varying(runs, FORMS[name]["fitted"]))
        if left is None:
            got = f"runs that do not determine {name!r} without one of the configurations"
            accepted = "sizes and effective ranks that vary apart from one another"
            raise ParameterError("frame", got, accepted)
        errors.append(_by_configuration(runs, left))
    gain, low, high = intervals.mean((errors[0] - errors[1]).tolist())
    return Gain(float(errors[0].mean()), float(errors[1].mean()), gain, low, high, len(errors[0]))


def _varying(runs: pd.DataFrame, fitted: Sequence[str]) -> list[str]:
    return [name for name in fitted if name == "one" or runs[name].max() > runs[name].min()]


def _fit(runs: pd.DataFrame, form: str, columns: list[str]) -> dict[str, float] | None:
    """All coefficients of a form, those of `columns` by least squares; None: not determined."""
    fixed = FORMS[form]["fixed"]
    if not columns:
        return dict(fixed)
    rest = runs.log_ppl - _predicted(runs, fixed)
    solved, _, rank, _ = np.linalg.lstsq(runs[columns].to_numpy(), rest.to_numpy(), rcond=1e-10)
    found = dict(zip(columns, solved.tolist(), strict=True))
    return fixed | found if rank == len(columns) else None


def _left_out(runs: pd.DataFrame, form: str, columns: list[str]) -> pd.Series | None:
    """Error of each run as predicted from the other configurations; None: not determined by the
    rest without one of them."""
    errors = []
    for _, rows in runs.groupby("configuration"):
        coefficients = _fit(runs.drop(rows.index), form, columns)
        if coefficients is None:
            return None
        errors.append(_errors(rows, coefficients))
    return pd.concat(errors).sort_index()


def _predicted(runs: pd.DataFrame, coefficients: Mapping[str, float]) -> pd.Series:
    return sum((value * runs[name] for name, value in coefficients.items()), 0.0 * runs.one)


def _errors(runs: pd.DataFrame, coefficients: Mapping[str, float]) -> pd.Series:
    """|predicted / measured PPL − 1| of each run."""
    return (_predicted(runs, coefficients) - runs.log_ppl).map(np.expm1).abs()


def _by_configuration(runs: pd.DataFrame, errors: pd.Series) -> pd.Series:
    """The mean error of each configuration."""
    return errors.groupby(runs.configuration).mean()


def _runs(frame: pd.DataFrame, configurations: int = 1) -> pd.DataFrame:
    """The runs that have a perplexity, with the columns that the formulas take."""
    needed = ("train_tokens", "val_ppl", "train_ppl", "val_er", "train_er", "phase1_iterations")
    missing = [name for name in (*CONFIGURATION, *needed) if name not in frame]
    if missing:
        raise ParameterError("frame", f"no columns {missing}", "Results.frame()")
    runs = frame[frame.val_ppl.notna()].reset_index(drop=True)
    if runs.empty:
        raise ParameterError("frame", "no run with a perplexity", "one or more")
    runs = runs.astype(dict.fromkeys(needed[:-1], float))
    labels = [label(row) for row in runs[list(CONFIGURATION)].to_dict("records")]
    if len(set(labels)) < configurations:
        got = f"{len(set(labels))} configurations with a perplexity"
        raise ParameterError("frame", got, f"{configurations} or more")
    rank = 100 * runs.val_er
    return runs.assign(
        configuration=labels,
        log_ppl=np.log(runs.val_ppl),
        log_tokens=np.log(runs.train_tokens),
        log_train_ppl=np.log(runs.train_ppl),
        er=rank,
        er_gap=runs.train_er - runs.val_er,
        one=1.0,
        log_rule=np.log(500 - 4 * rank),
    )


def label(fields: Mapping[Any, Any]) -> str:
    """The configuration in words: `1 x 64, n 1, w 0.8`."""
    design = "" if fields["token_input_all_layers"] else ", equal-decrease"
    words = "{num_layers} x {context_dim}, n {num_input_tokens}, w {dist_reg_weight:g}"
    return words.format_map(fields) + design
