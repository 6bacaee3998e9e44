"""From Phase 1's measures to Phase 2's perplexity: correlations, formulas and rules (note 004).

Runs are not independent: those of one configuration share its strengths at every size and seed.
Errors and intervals therefore count configurations, each left out whole, and not runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from cvfp import phase1
from cvfp.analysis import intervals, published, scaling
from cvfp.config import ParameterError
from cvfp.experiment import Result

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
# Each form of log PPL (natural logarithm; er in percent): the coefficients that are given, and the
# columns whose coefficients are fitted. Note 004 prints α as a range: both its ends stand here.
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
_RATES = ("hit_rate", "base_rate", "excess", "low", "high", "p")

# Note 004's checklist, points of effective rank; the other thresholds are in its tables.
GAP_GOOD, GAP_POOR = 2.0, 5.0
LEVEL = 0.95
PERMUTATIONS = 2000

Verdict = Literal["good", "medium", "poor"]
CALLS: Mapping[Verdict, int] = {"good": 1, "medium": 0, "poor": -1}
# The abort rules, and how `phase1.abort_reason` begins to name each.
ABORTS: Mapping[str, str] = {
    f"ER < {100 * phase1.ABORT_RANK:.0f} % at iteration {phase1.ABORT_ITERATION}": "effective rank",
    "convergence stalls": "converged tokens",
    "loss does not fall": "loss",
}
ANY_ABORT = "any abort rule"
JUDGED = ("validation ER", "iterations", "train − validation ER gap")
_RULES = (*JUDGED, *ABORTS, ANY_ABORT)


@dataclass(frozen=True)
class Correlation:
    """Pearson's correlation of two lists.

    Attributes:
        r: between -1 and 1.
        p: two-sided, of so large an r where there is none; 1 where no degree of freedom is left
            (two points always lie on a line).
        low, high: the interval by Fisher's z; None with fewer than 4 points (columns taken out
            count as points lost).
        n: points.
    """

    r: float
    p: float
    low: float | None
    high: float | None
    n: int


def correlation(x: ArrayLike, y: ArrayLike, level: float = LEVEL) -> Correlation:
    """Pearson's correlation with its interval.

    p and interval take the points as independent: give one point a configuration.

    Args:
        x, y: two equal lists of two or more finite numbers, neither constant.
        level: of the interval.

    Raises:
        ValueError: lists unequal, too short, constant or not finite; level not between 0 and 1.
    """
    return _correlation(*_pair(x, y), 0, level)


def partial_correlation(
    x: ArrayLike, y: ArrayLike, given: ArrayLike, level: float = LEVEL
) -> Correlation:
    """Correlation of what is left of x and y once `given` has explained what it can of both.

    Least squares with an intercept takes `given` out of each; every column of it that says
    something of its own costs one degree of freedom.

    Args:
        x, y: [n], as for `correlation`.
        given: [n] or [n, columns], finite.
        level: of the interval.

    Raises:
        ValueError: as `correlation`, or n too small for the columns, or nothing left of x or y.
    """
    a, b = _pair(x, y)
    columns = np.asarray(given, dtype=np.float64)
    columns = columns[:, None] if columns.ndim == 1 else columns
    if columns.ndim != 2 or len(columns) != len(a) or not np.isfinite(columns).all():
        raise ParameterError("given", columns.tolist(), f"{len(a)} rows of finite numbers")
    design = np.column_stack([np.ones(len(a)), columns])

    def rest(values: NDArray[np.float64]) -> NDArray[np.float64]:
        left = values - design @ np.linalg.lstsq(design, values)[0]
        # Rounding is not a residual.
        return np.where(np.abs(left) < 1e-12 * np.abs(values).max(), 0.0, left)

    return _correlation(rest(a), rest(b), int(np.linalg.matrix_rank(design)) - 1, level)


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ParameterError("x, y", (a.shape, b.shape), "two lists of the same length")
    for name, values in (("x", a), ("y", b)):
        if not np.isfinite(values).all():
            raise ParameterError(name, values.tolist(), "finite numbers")
    return a, b


def _correlation(
    x: NDArray[np.float64], y: NDArray[np.float64], taken: int, level: float
) -> Correlation:
    points = len(x) - taken
    if points < 2:
        raise ParameterError("x, y", f"{len(x)} points", f"{2 + taken} or more")
    if not 0 < level < 1:
        raise ParameterError("level", level, "a number between 0 and 1")
    for name, values in (("x", x), ("y", y)):
        if np.ptp(values) == 0:
            raise ParameterError(name, values.tolist(), "numbers that are not all alike")
    r = float(stats.pearsonr(x, y).statistic)
    low = high = None
    if points > 3:
        half = float(stats.norm.ppf((1 + level) / 2)) / math.sqrt(points - 3)
        with np.errstate(divide="ignore"):
            centre = float(np.arctanh(r))
        low, high = math.tanh(centre - half), math.tanh(centre + half)
    # Without correlation r is distributed as this: Student's t with points - 2 degrees of freedom.
    chance = stats.beta(points / 2 - 1, points / 2 - 1, loc=-1, scale=2)
    p = min(1.0, 2 * float(chance.sf(abs(r)))) if points > 2 else 1.0
    return Correlation(r, p, low, high, len(x))


def matrix(frame: pd.DataFrame, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Pearson's r of every two columns over the runs that have a perplexity.

    Args:
        frame: `Results.frame()`.
        columns: which of `LABELS`, or other columns of numbers; None: all of `LABELS`. Those that
            are the same in every run are left out.

    Returns:
        Symmetric, labelled for reading; `attrs["dropped"]` is the number of runs without a
        perplexity. Runs of one configuration are alike, so that no p belongs to these figures.

    Raises:
        ValueError: a column that is not there, no numbers, or fewer than 3 runs.
    """
    runs = _runs(frame)
    names = list(LABELS if columns is None else columns)
    unknown = [name for name in names if name not in runs]
    if unknown:
        raise ParameterError("columns", unknown, f"columns of the frame, {', '.join(LABELS)}")
    if len(runs) < 3:
        raise ParameterError("frame", f"{len(runs)} runs with a perplexity", "3 or more")
    chosen = runs[names].astype(float)
    varying = chosen.loc[:, chosen.max() > chosen.min()]
    made = varying.corr().rename(index=LABELS, columns=LABELS)
    made.attrs["dropped"] = runs.attrs["dropped"]
    return made


def by_configuration(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration: its scaling exponent, and where it ends.

    Runs without a perplexity are left out (`attrs["dropped"]` counts them). What the fields of
    `CONFIGURATION` do not tell apart is taken together.

    Args:
        frame: `Results.frame()`.

    Returns:
        Indexed by a label such as "1 x 64, n 1, w 0.8". Columns: those of `CONFIGURATION`; sizes,
        runs (how many); alpha and alpha_error (`scaling.fit` over sizes and seeds; missing for one
        size, the error also for two runs); at the largest size val_er (mean over its runs,
        fraction of D), val_ppl (mean) and best_ppl (least); phase1_iterations (mean over all).

    Raises:
        ValueError: a column that is not there, numbers out of range, or no run with a perplexity.
    """
    runs = _runs(frame)
    rows: dict[str, dict[str, Any]] = {}
    for label, group in runs.groupby("configuration", sort=False):
        sizes = len(group.train_tokens.unique())
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
    table = table.sort_values(list(CONFIGURATION))
    table = table.astype({"alpha": float, "alpha_error": float})
    table.attrs["dropped"] = runs.attrs["dropped"]
    return table


def predictors(frame: pd.DataFrame) -> pd.DataFrame:
    """How well each formula foretells perplexity, above all of a configuration it has not seen.

    All are of the form log PPL = α·log tokens + β·ER + γ (natural logarithms, ER of the exact
    validation contexts in percent) but the first:

    - "500 − 4·ER": note 004's rule for PPL itself, nothing fitted.
    - "published coefficients": note 004's β −0.02 and either end of its range for α; γ, which it
      leaves open, is fitted, one for all (a γ a configuration could foretell no new one). The note
      does not say which logarithm; natural is assumed.
    - "tokens and ER, refitted" and "tokens only": least squares over the runs.
    - "mean of the others": γ alone, the geometric mean of PPL: the floor.

    A column that is the same in every run is left out of the fit, so that at a single size "tokens
    only" is the mean. The interval of β is a jackknife that leaves out whole configurations
    (Student's t, one degree of freedom less than configurations): the usual clustered standard
    error is too small with so few clusters, the jackknife errs on the wide side.

    Args:
        frame: `Results.frame()`: one corpus, one tokeniser; three configurations or more.

    Returns:
        Indexed by predictor. Columns: fitted (how many parameters), alpha, beta (log PPL per
        point of ER), gamma; beta_low, beta_high (95 %, where β is fitted); error (mean
        |predicted / measured PPL − 1| on the runs fitted); left_out_error, left_out_worst (the
        same where the run's configuration was left out of the fit, mean, and the worst run); r2
        (of log PPL, on the runs fitted; under 0: worse than the mean). In the means every
        configuration counts the same. Missing: the runs left do not determine it.
        `attrs["dropped"]`: runs without a perplexity.

    Raises:
        ValueError: a column that is not there, numbers out of range, or too few configurations.
    """
    runs = _several(frame)
    rows = {name: _row(runs, *form) for name, form in FORMS.items()}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("predictor")
    table = table.astype(dict.fromkeys(_FIGURES, float))
    table.attrs["dropped"] = runs.attrs["dropped"]
    return table


@dataclass(frozen=True)
class Gain:
    """What effective rank adds to the number of training tokens.

    Attributes:
        tokens_only, tokens_and_er: mean relative error of PPL of a configuration left out.
        gain: the first minus the second; above 0: effective rank helps.
        low, high: 95 % interval of the gain.
        configurations: how many there are.
    """

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

    Args:
        frame: as for `predictors`.

    Raises:
        ValueError: as `predictors`, or the runs do not determine one of the two fits once a
            configuration is left out.
    """
    runs = _several(frame)
    errors = []
    for name in (TOKENS_ONLY, TOKENS_AND_ER):
        given, fitted = FORMS[name]
        left = _left_out(runs, given, _varying(runs, fitted))
        if left is None:
            raise ParameterError(
                "frame",
                f"runs that do not determine {name!r} without one of the configurations",
                "sizes and effective ranks that vary apart from one another",
            )
        errors.append(_by_configuration(runs, left[0]))
    gain, low, high = intervals.mean((errors[0] - errors[1]).tolist(), LEVEL)
    return Gain(float(errors[0].mean()), float(errors[1].mean()), gain, low, high, len(errors[0]))


@dataclass(frozen=True)
class Judgement:
    """What note 004's rules say of a run when its Phase 1 has ended.

    Attributes:
        er: of the effective rank of the validation contexts: good over 80 % of D, poor under 75 %.
        iterations: of Phase 1's count: good up to 25, poor over 30. A run that was cut off is
            judged by the count it reached.
        gap: of training minus validation effective rank: good up to 2 points, poor from 5 on.
        abort: why Phase 1 should have been given up (`phase1.abort_reason`); None: go on.
    """

    er: Verdict
    iterations: Verdict
    gap: Verdict
    abort: str | None

    def words(self) -> str:
        """The same in a sentence."""
        end = "no reason to give up" if self.abort is None else f"give up: {self.abort}"
        return f"effective rank {self.er}, iterations {self.iterations}, gap {self.gap}; {end}"


def judge(result: Result) -> Judgement:
    """Apply note 004's rules; the thresholds are those of its tables and checklist.

    Raises:
        ValueError: an effective rank that is no fraction of D, or a run without a Phase 1.
    """
    for name, value in zip(("train_er", "val_er"), result.ranks, strict=True):
        if not 0 < value <= 1:
            raise ParameterError(name, value, "a fraction of D, above 0, up to 1")
    rank_good, rank_poor, quick, slow = _thresholds()
    # Rounded, for 0.85 - 0.80 is a little under 5 points.
    train_er, val_er = result.ranks
    rank = round(100 * val_er, 6)
    gap = round(100 * (train_er - val_er), 6)
    count, _ = result.phase1_end
    return Judgement(
        er=_verdict(rank > rank_good, rank < rank_poor),
        iterations=_verdict(count <= quick, count > slow),
        gap=_verdict(gap <= GAP_GOOD, gap >= GAP_POOR),
        abort=phase1.abort_reason(result.phase1_history),
    )


def score(results: Sequence[Result]) -> pd.DataFrame:
    """Note 004's rules put to the test: do they tell better runs from worse?

    A run is better or worse by its perplexity, against the median of the runs with as many
    training tokens; one at the median is neither and does not count, nor does a run that was given
    up, which has no perplexity. A rule is right about a run that it calls good and that is better,
    or that it calls poor and that is worse; "medium" is no call. An abort rule makes one call,
    poor: it is right where the run that it would have given up turned out worse. Not to give up
    is no call (but the remark says how many better runs it would have cost).

    Args:
        results: one corpus, one tokeniser; runs that went on whatever the abort rules said.

    Returns:
        One row a rule. called (runs with an outcome that it calls good or poor), right, hit_rate
        (right / called), base_rate (hit rate expected if, within each size, as many calls of each
        kind fell on the runs at random), excess (hit_rate − base_rate), low, high (its 95 %
        interval: a jackknife that leaves out whole configurations, Student's t), p (two-sided:
        configurations, each with all its runs, change places within the sizes, 2,000 times),
        remark. Missing: undefined. Where a rule is right or wrong every time the interval may
        have no width: then p says how much chance is in it.

    Raises:
        ValueError: no two runs of one size whose perplexities differ, or as `judge`.
    """
    runs = pd.DataFrame(
        [
            {
                "configuration": _label(result.experiment.to_dict()),
                "tokens": result.train_tokens,
                "ppl": result.val_ppl,
                "judged": any(
                    row["iteration"] == phase1.ABORT_ITERATION for row in result.phase1_history
                ),
                **_calls(result),
            }
            for result in results
            if result.aborted is None and result.val_ppl is not None
        ],
        columns=["configuration", "tokens", "ppl", "judged", *_RULES],
    ).astype({"ppl": float})
    outcomes = _outcomes(runs)
    if not outcomes.any():
        raise ParameterError(
            "results",
            f"{len(runs)} runs with a perplexity",
            "two or more with the same training tokens and different perplexities",
        )
    without = [
        _outcomes(runs.assign(ppl=runs.ppl.where(runs.configuration != label)))
        for label in runs.configuration.unique()
    ]
    aside = [
        (len(results) - len(runs), "given up, no perplexity"),
        (int((outcomes == 0).sum()), "at the median of the size"),
    ]
    common = [f"{number} {words}" for number, words in aside if number]
    rows = [
        {
            "rule": rule,
            **_scored(runs, rule, outcomes, without),
            "remark": "; ".join([*_remarks(runs, rule, outcomes), *common]),
        }
        for rule in _RULES
    ]
    return pd.DataFrame(rows).astype(dict.fromkeys(_RATES, float))


def _outcomes(runs: pd.DataFrame) -> NDArray[np.float64]:
    """1 where a run is better than the median of its size, -1 where worse, 0 where neither."""
    median = runs.groupby("tokens").ppl.transform("median")
    return np.nan_to_num(np.sign((median - runs.ppl).to_numpy(float)))


def _calls(result: Result) -> dict[str, int]:
    """Each rule's call: 1 good, -1 poor, 0 none."""
    said = judge(result)
    reasons = (said.abort or "").split("; ")
    verdicts = (said.er, said.iterations, said.gap)
    return {
        **{rule: CALLS[verdict] for rule, verdict in zip(JUDGED, verdicts, strict=True)},
        **{
            rule: -int(any(reason.startswith(start) for reason in reasons))
            for rule, start in ABORTS.items()
        },
        ANY_ABORT: -int(said.abort is not None),
    }


def _scored(
    runs: pd.DataFrame,
    rule: str,
    outcomes: NDArray[np.float64],
    without: Sequence[NDArray[np.float64]],
) -> dict[str, Any]:
    calls, sizes = runs[rule].to_numpy(), pd.factorize(runs.tokens)[0]

    def rates(outcomes: NDArray[np.float64]) -> tuple[float, float] | None:
        """Hit rate and that of chance; None where the rule calls nothing."""
        called = calls * outcomes != 0
        if not called.any():
            return None
        # A call falls by chance on a better run as often as its size has better runs.
        counted = np.bincount(sizes, outcomes != 0)
        better = (np.bincount(sizes, outcomes > 0) / np.maximum(1, counted))[sizes]
        chance = np.where(calls > 0, better, 1 - better)
        return float((calls == outcomes)[called].mean()), float(chance[called].mean())

    found = rates(outcomes)
    if found is None:
        return {"called": 0, "right": 0, **dict.fromkeys(_RATES)}
    hit, base = found
    low = high = None
    if len(set(calls[outcomes != 0])) > 1:
        # The medians too are taken anew: they move with the configurations that are there.
        left = [rates(one) for one in without]
        low, high = _jackknife(hit - base, [None if r is None else r[0] - r[1] for r in left])
    return {
        "called": int((calls * outcomes != 0).sum()),
        "right": int((calls * outcomes > 0).sum()),
        "hit_rate": hit,
        "base_rate": base,
        "excess": hit - base,
        "low": low,
        "high": high,
        "p": _permuted(runs, rule, outcomes, hit, base),
    }


def _permuted(
    runs: pd.DataFrame, rule: str, outcomes: NDArray[np.float64], hit: float, base: float
) -> float:
    """How often chance lies as far from the base rate as the rule does."""
    number = runs.groupby(["configuration", "tokens"]).cumcount()
    places = runs.groupby(["tokens", number]).ngroup()
    labels, names = pd.factorize(runs.configuration)
    calls, results = np.zeros((2, len(names), len(runs)))
    calls[labels, places], results[labels, places] = runs[rule], outcomes
    # [configurations, configurations]: calls of the one on outcomes of the other, right minus
    # wrong, and how many.
    margins, counts = calls @ results.T, np.abs(calls) @ np.abs(results).T
    one = np.arange(len(names))
    other = np.random.default_rng(0).permuted(np.tile(one, (PERMUTATIONS, 1)), axis=1)
    margin, count = margins[one, other].sum(axis=1), counts[one, other].sum(axis=1)
    rates = (1 + margin[count > 0] / count[count > 0]) / 2
    far = np.abs(rates - base) >= abs(hit - base) - 1e-9
    return float((1 + far.sum()) / (1 + len(rates)))


def _remarks(runs: pd.DataFrame, rule: str, outcomes: NDArray[np.float64]) -> list[str]:
    runs, outcomes = runs[outcomes != 0], outcomes[outcomes != 0]
    said = []
    kinds = set(runs[rule])
    calls = [name for name, number in CALLS.items() if number and number in kinds]
    if not calls:
        said.append("calls no run good or poor")
    elif len(kinds) == 1:
        said.append(f"calls every run {calls[0]}: tells nothing apart")
    elif len(calls) == 1:
        said.append(f"calls only {calls[0]}")
    if rule in (*ABORTS, ANY_ABORT):
        better = runs[outcomes > 0]
        said.append(
            f"{int(runs.judged.sum())} of {len(runs)} runs reached iteration "
            f"{phase1.ABORT_ITERATION}; gives up {int((better[rule] < 0).sum())} of "
            f"{len(better)} better runs"
        )
    return said


def _jackknife(value: float, without: Sequence[float | None]) -> tuple[float | None, float | None]:
    """95 % interval of an estimate from those made without one cluster each; None with fewer than
    two clusters, or where one of them cannot be left out."""
    left = [one for one in without if one is not None]
    count = len(without)
    if count < 2 or len(left) < count:
        return None, None
    variance = (count - 1) / count * sum((one - value) ** 2 for one in left)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * math.sqrt(variance)
    return value - half, value + half


def _row(
    runs: pd.DataFrame, given: Mapping[str, float], fitted: Sequence[str]
) -> dict[str, float | None]:
    columns = _varying(runs, fitted)
    row: dict[str, float | None] = {"fitted": len(columns), **dict.fromkeys(_FIGURES)}
    found = _fit(runs, given, columns)
    if found is None:
        return row
    names = {"alpha": "log_tokens", "beta": "er", "gamma": "one"}
    row |= {name: found.get(column) for name, column in names.items()}
    inside = _predicted(runs, found)
    row["error"] = float(_by_configuration(runs, inside).mean())
    spread = float(((runs.log_ppl - runs.log_ppl.mean()) ** 2).sum())
    if spread > 0:
        row["r2"] = 1 - float(((runs.log_ppl - inside) ** 2).sum()) / spread
    left = _left_out(runs, given, columns)
    if left is not None:
        outside, fits = left
        row["left_out_error"] = float(_by_configuration(runs, outside).mean())
        row["left_out_worst"] = float(_errors(runs, outside).max())
        if "er" in columns:
            row["beta_low"], row["beta_high"] = _jackknife(found["er"], [f["er"] for f in fits])
    return row


def _varying(runs: pd.DataFrame, fitted: Sequence[str]) -> list[str]:
    return [name for name in fitted if name == "one" or runs[name].max() > runs[name].min()]


def _fit(
    runs: pd.DataFrame, given: Mapping[str, float], columns: list[str]
) -> dict[str, float] | None:
    """All coefficients of a form, those of `columns` by least squares; None: not determined."""
    if not columns:
        return dict(given)
    rest = runs.log_ppl - _predicted(runs, given)
    solved, _, rank, _ = np.linalg.lstsq(runs[columns].to_numpy(), rest.to_numpy(), rcond=1e-10)
    if rank < len(columns):
        return None
    return {**given, **dict(zip(columns, map(float, solved), strict=True))}


def _left_out(
    runs: pd.DataFrame, given: Mapping[str, float], columns: list[str]
) -> tuple[pd.Series, list[dict[str, float]]] | None:
    """Log PPL of each run as predicted from the other configurations, and the fits behind it; None:
    one of them is not determined."""
    parts, fits = [], []
    for _, rows in runs.groupby("configuration"):
        found = _fit(runs.drop(rows.index), given, columns)
        if found is None:
            return None
        parts.append(_predicted(rows, found))
        fits.append(found)
    return pd.concat(parts).sort_index(), fits


def _predicted(runs: pd.DataFrame, coefficients: Mapping[str, float]) -> pd.Series:
    total = pd.Series(0.0, index=runs.index)
    for name, value in coefficients.items():
        total = total + value * runs[name]
    return total


def _errors(runs: pd.DataFrame, predicted: pd.Series) -> pd.Series:
    """|predicted / measured PPL − 1| of each run."""
    return ((predicted - runs.log_ppl).map(math.exp) - 1).abs()


def _by_configuration(runs: pd.DataFrame, predicted: pd.Series) -> pd.Series:
    """The mean error of each configuration."""
    return _errors(runs, predicted).groupby(runs.configuration).mean()


def _several(frame: pd.DataFrame) -> pd.DataFrame:
    runs = _runs(frame)
    count = runs.configuration.nunique()
    if count < 3:
        raise ParameterError("frame", f"{count} configurations with a perplexity", "3 or more")
    return runs


def _runs(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs that have a perplexity, with the columns that the formulas take."""
    needed = ("train_tokens", "val_ppl", "val_er", "train_er", "phase1_iterations")
    missing = [name for name in (*CONFIGURATION, *needed) if name not in frame]
    if missing:
        raise ParameterError("frame", f"no columns {missing}", "Results.frame()")
    runs = frame[frame.val_ppl.notna()].reset_index(drop=True)
    if runs.empty:
        raise ParameterError("frame", "no run with a perplexity", "one or more")
    runs = runs.astype(dict.fromkeys(("train_tokens", "val_ppl", "val_er", "train_er"), float))
    for name in ("val_ppl", "train_tokens"):
        if not (np.isfinite(runs[name]) & (runs[name] > 0)).all():
            raise ParameterError(name, runs[name].tolist(), "positive, finite numbers")
    for name in ("val_er", "train_er"):
        if not runs[name].between(0, 1, inclusive="right").all():
            raise ParameterError(name, runs[name].tolist(), "fractions of D, above 0, up to 1")
    rank = 100 * runs.val_er
    runs = runs.assign(
        configuration=[_label(row) for row in runs[list(CONFIGURATION)].to_dict("records")],
        log_ppl=np.log(runs.val_ppl),
        log_tokens=np.log(runs.train_tokens),
        er=rank,
        er_gap=runs.train_er - runs.val_er,
        one=1.0,
        log_rule=np.log(500 - 4 * rank),
    )
    runs.attrs["dropped"] = len(frame) - len(runs)
    return runs


def _label(fields: Mapping[Any, Any]) -> str:
    """The configuration in words: `1 x 64, n 1, w 0.8`."""
    design = "" if fields["token_input_all_layers"] else ", equal-decrease"
    return (
        f"{fields['num_layers']} x {fields['context_dim']}, n {fields['num_input_tokens']}, "
        f"w {fields['dist_reg_weight']:g}{design}"
    )


@functools.cache
def _thresholds() -> tuple[float, float, float, float]:
    """Effective rank (percent) above which a run is good, under which poor; iterations up to which
    it is good, over which poor."""
    rank = published.table("004_er_thresholds").set_index("verdict")
    count = published.table("004_iteration_thresholds").set_index("verdict")
    return (
        float(rank.val_er_low["good"]),
        float(rank.val_er_high["needs review"]),
        float(count.iterations_high["optimal"]),
        float(count.iterations_high["ordinary"]),
    )


def _verdict(good: bool, poor: bool) -> Verdict:
    return "good" if good else "poor" if poor else "medium"
