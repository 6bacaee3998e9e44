"""Scaling laws: perplexity against training tokens, with or without a floor.

The intervals of a fit assume independent residuals of log perplexity with equal variance; those of
`over_runs` are over seeds and held-out conversations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from cvfp.analysis import style
from cvfp.analysis.intervals import Crossed, crossed, student
from cvfp.result import Result

Array = NDArray[np.float64]
Weights = Callable[[Array], Array]

FORMS: Mapping[str, str] = style.COLUMNS["laws_of_scaling"]
EXTRAPOLATION = (1e6, 5e6, 1e7)  # training tokens, as in note 002
SIZES_NEEDED = {"power": 2, "ppl": 3, "loss": 3}

# The exponents that a saturating form may take: from almost none to 8-fold per doubling.
EXPONENTS = (1e-3, 3.0)
# Scale of the soft L1 loss: residuals of log PPL over it count by their size, not their square.
ROBUST = 0.1
WINDOW = 4  # sizes in a window of `windows`, as in note 004


@dataclass(frozen=True)
class PowerLaw:
    """PPL = A · tokens^alpha, least squares in log-log (the published form). What needs a residual
    is None for two points, through which every line passes."""

    alpha: float  # slope in log-log; negative where more data helps
    A: float  # perplexity extrapolated to one token
    r2: float | None  # share of the variance of log PPL explained; None also where there is none
    alpha_error: float | None  # standard error
    points: int  # measurements fitted
    low: float  # their least tokens
    high: float  # and most
    residual: float | None  # standard deviation of log PPL about the line
    centre: float  # mean of log tokens
    spread: float  # sum of squared deviations from it

    @property
    def per_doubling(self) -> float:
        """Relative change of perplexity when the tokens double: 2^alpha − 1."""
        return float(2**self.alpha - 1)

    def interval(self) -> tuple[float, float] | None:
        """95 % interval of alpha by Student's t; None for two points (no residual)."""
        # Not a bootstrap: from four points, one holds the true alpha 67 % of the time.
        if self.alpha_error is None:
            return None
        half = student(self.points - 2) * self.alpha_error
        return self.alpha - half, self.alpha + half

    def predict(self, tokens: ArrayLike) -> Any:
        """Perplexity at `tokens`: a float for a number, an array for an array."""
        return self.A * np.asarray(tokens, dtype=np.float64) ** self.alpha

    def predict_interval(self, tokens: ArrayLike) -> tuple[Any, Any] | None:
        """95 % interval of the law's perplexity at `tokens`, each end as of `predict`; None for two
        points (no residual). Beyond the data it is too narrow if the form is wrong."""
        if self.residual is None:
            return None
        logs = np.log(np.asarray(tokens, dtype=np.float64))
        error = self.residual * np.sqrt(1 / self.points + (logs - self.centre) ** 2 / self.spread)
        middle, half = np.log(self.predict(tokens)), student(self.points - 2) * error
        return np.exp(middle - half), np.exp(middle + half)


def fit(tokens: ArrayLike, ppl: ArrayLike) -> PowerLaw:
    """Fit PPL = A · tokens^alpha. Raises ValueError: lists of unequal length, fewer than two
    different token counts, or numbers that are not positive and finite."""
    x, y = _checked(tokens, ppl, SIZES_NEEDED["power"])
    logs, log_ppl = np.log(x), np.log(y)
    line = stats.linregress(logs, log_ppl)
    spread = float(((logs - logs.mean()) ** 2).sum())
    enough, flat = len(x) > 2, np.ptp(log_ppl) == 0
    # Of a flat ladder scipy's r is 0 / 0, and with it the error, which is 0.
    error = 0.0 if flat else float(line.stderr)
    return PowerLaw(
        alpha=float(line.slope),
        A=float(np.exp(line.intercept)),
        r2=float(line.rvalue**2) if enough and not flat else None,
        alpha_error=error if enough else None,
        points=len(x),
        low=float(x.min()),
        high=float(x.max()),
        residual=error * math.sqrt(spread) if enough else None,
        centre=float(logs.mean()),
        spread=spread,
    )


def lack_of_fit(tokens: ArrayLike, ppl: ArrayLike) -> tuple[float, int, int] | None:
    """F of the power law's lack of fit against pure error, with its degrees of freedom: how far the
    mean log perplexities of the sizes scatter about the line, for how far runs of one size scatter
    about their mean. None under three sizes, or without several different runs at one."""
    logs, values = map(np.log, _checked(tokens, ppl, SIZES_NEEDED["power"]))
    groups = pd.Series(values).groupby(logs)
    means, line = groups.transform("mean"), np.polyval(np.polyfit(logs, values, 1), logs)
    freedom = groups.ngroups - 2, len(values) - groups.ngroups
    lack, pure = (float((rest**2).sum()) for rest in (means - line, values - means))
    if min(freedom) < 1 or pure == 0:
        return None
    return lack / freedom[0] / (pure / freedom[1]), *freedom


def _checked(tokens: ArrayLike, ppl: ArrayLike, sizes: int) -> tuple[Array, Array]:
    x, y = np.asarray(tokens, dtype=np.float64), np.asarray(ppl, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"tokens, ppl: got shapes {x.shape}, {y.shape}; accepted: two equal lists")
    for name, values in (("tokens", x), ("ppl", y)):
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"{name}: got {values.tolist()}; accepted: positive, finite numbers")
    if len(np.unique(x)) < sizes:
        accepted = f"at least {sizes} different token counts"
        raise ValueError(f"tokens: got {x.tolist()}; accepted: {accepted}")
    return x, y


@dataclass(frozen=True)
class Saturating:
    """A power law that comes down to a floor: PPL = floor + scale · tokens^−exponent, or, of form
    "loss", so for ln PPL, in nats."""

    form: str  # "ppl" or "loss"
    floor: float  # the limit for ever more data, of PPL or of ln PPL; not under 0
    scale: float  # height above the floor, extrapolated to one token; not under 0
    exponent: float  # decay of that height with tokens; positive, within `EXPONENTS`
    r2: float | None  # as of `PowerLaw`; None for three points, too: no residual
    at_bound: bool  # floor, scale or exponent sits on its bound: saturation is not identified
    cost: float = field(repr=False)  # half the sum of squared residuals, outlying ones damped
    tokens: Array = field(repr=False, compare=False)  # the measurements fitted
    ppl: Array = field(repr=False, compare=False)

    @property
    def limit(self) -> float:
        """Perplexity in the limit of ever more data."""
        return self.floor if self.form == "ppl" else math.exp(self.floor)

    def predict(self, tokens: ArrayLike) -> Any:
        """Perplexity at `tokens`: a float for a number, an array for an array."""
        x = np.asarray(tokens, dtype=np.float64)
        curve = self.floor + self.scale * x**-self.exponent
        return curve if self.form == "ppl" else np.exp(curve)

    def interval(self) -> tuple[float | None, float | None] | None:
        """95 % interval of the exponent by profile likelihood: every exponent whose best curve is
        not significantly worse by the F test (Bates and Watts, 1988, chapter 6). An end beyond
        `EXPONENTS` is None; so is the whole for three points (no residual)."""
        freedom = len(self.tokens) - 3
        if freedom < 1:
            return None
        threshold = self.cost * (1 + student(freedom) ** 2 / freedom)

        def over(log_exponent: float) -> float:
            return _least(self.form, self.tokens, self.ppl, math.exp(log_exponent))[0] - threshold

        def end(bound: float) -> float | None:
            if over(bound) <= 0:
                return None
            # A perfect fit: the threshold is 0, and rounding is over it.
            if over(best) >= 0:
                return self.exponent
            return math.exp(optimize.brentq(over, best, bound, rtol=1e-6))

        best, (low, high) = math.log(self.exponent), map(math.log, EXPONENTS)
        return end(low), end(high)


def saturating(tokens: ArrayLike, ppl: ArrayLike, form: str) -> Saturating:
    """Fit a power law with a floor, of "ppl" or "loss" (see `FORMS`): robust least squares of log
    PPL from many starts. Raises ValueError: as `fit`, but three token counts; perplexities under 1
    for form "loss", or another form."""
    if form not in ("ppl", "loss"):
        raise ValueError(f'form: got {form!r}; accepted: "ppl" or "loss"')
    x, y = _checked(tokens, ppl, SIZES_NEEDED[form])
    if form == "loss" and y.min() < 1:
        raise ValueError(f"ppl: got {y.tolist()}; accepted: perplexities, which are 1 or more")
    cost, (floor, height, exponent) = _least(form, x, y)
    # The solver comes as near a bound as rounding allows, and stays inside.
    least = y.min() if form == "ppl" else math.log(y.min())
    inside = EXPONENTS[0] * 1.001 < exponent < EXPONENTS[1] * 0.999
    at_bound = min(floor, height) < 1e-5 * least or not inside
    curve = floor + height * (x / x.max()) ** -exponent
    residuals = np.log(y) - (np.log(curve) if form == "ppl" else curve)
    total = float(((np.log(y) - np.log(y).mean()) ** 2).sum())
    r2 = 1 - float((residuals**2).sum()) / total if len(x) > 3 and total else None
    fitted = float(floor), float(height * x.max() ** exponent), float(exponent)
    return Saturating(form, *fitted, r2, bool(at_bound), cost, x, y)


def _least(
    form: str, tokens: Array, ppl: Array, exponent: float | None = None
) -> tuple[float, Array]:
    """The least cost, and the parameters fitted: a floor, the height above it at the largest size
    and, unless it is fixed, the exponent."""
    ratio, log_ppl = tokens / tokens.max(), np.log(ppl)
    values = ppl if form == "ppl" else log_ppl
    free = 3 if exponent is None else 2
    starts = [
        np.array([floor, np.median((values - floor) * ratio**slope), slope])[:free]
        for slope in (np.geomspace(0.02, 2, 4) if exponent is None else [exponent])
        for floor in (0, 0.5 * values.min(), 0.9 * values.min())
    ]
    bounds = [0, 0, EXPONENTS[0]][:free], [np.inf, np.inf, EXPONENTS[1]][:free]

    def residuals(p: Array) -> Array:
        floor, height, power = p if exponent is None else (*p, exponent)
        curve = floor + height * ratio**-power
        return np.asarray(np.log(curve) if form == "ppl" else curve) - log_ppl

    how: dict[str, Any] = dict(x_scale="jac", loss="soft_l1", f_scale=ROBUST)
    fits = [optimize.least_squares(residuals, start, "3-point", bounds, **how) for start in starts]
    best = min(fits, key=lambda one: one.cost)
    return float(best.cost), best.x


def forms(tokens: ArrayLike, ppl: ArrayLike) -> dict[str, PowerLaw | Saturating]:
    """The forms of `FORMS` that the number of sizes allows, fitted; raises ValueError as `fit`."""
    floors = ("ppl", "loss") if len(np.unique(np.asarray(tokens))) > 2 else ()
    return {"power": fit(tokens, ppl), **{form: saturating(tokens, ppl, form) for form in floors}}


def leave_largest_out(tokens: ArrayLike, ppl: ArrayLike, below: float = math.inf) -> pd.DataFrame:
    """Each form fitted without the largest size, and what it then predicts there; `below`: fitted
    to sizes of fewer tokens alone, with no change from the largest of them as one more form.

    One row per form of `FORMS`: form; predicted; actual (mean perplexity of that size's runs);
    error (relative: predicted / actual − 1); doublings (of tokens, from the largest size fitted);
    reason: why predicted and error are NaN where too few sizes remain, elsewhere None."""
    x, y = _checked(tokens, ppl, 2)
    largest = x.max()
    rest, actual = x < min(largest, below), y[x == largest].mean()
    sizes = len(np.unique(x[rest]))
    laws = forms(x[rest], y[rest]) if sizes > 1 else {}
    names = list(SIZES_NEEDED)
    predicted = [laws[name].predict(largest) if name in laws else math.nan for name in names]
    needs = [f"needs {needed} sizes, {sizes} remain" for needed in SIZES_NEEDED.values()]
    reasons = [None if name in laws else why for name, why in zip(names, needs, strict=True)]
    last = x[rest].max(initial=0)
    if last and below < math.inf:
        names, reasons = [*names, "no change"], [*reasons, None]
        predicted.append(y[x == last].mean())
    frame = pd.DataFrame({"form": names, "predicted": predicted, "actual": actual})
    return frame.assign(
        error=frame.predicted / actual - 1,
        doublings=np.log2(largest / last) if last else math.nan,
        # As objects: among words, pandas makes NaN of None.
        reason=pd.Series(reasons, dtype=object),
    )


def windows(tokens: ArrayLike, ppl: ArrayLike) -> pd.DataFrame:
    """Alpha over a window of four sizes that slides along the ladder (note 004, trend 0.5): one row
    per window, with all runs of its sizes: window (from 1), tokens_low, tokens_high, alpha,
    alpha_low, alpha_high (95 % interval). No row where there are fewer sizes than four."""
    x, y = _checked(tokens, ppl, 2)
    counts = np.unique(x)
    rows = []
    for number, (low, high) in enumerate(zip(counts, counts[WINDOW - 1 :], strict=False), start=1):
        within = (x >= low) & (x <= high)
        law = fit(x[within], y[within])
        rows.append((number, low, high, law.alpha, *(law.interval() or ())))
    names = ["window", "tokens_low", "tokens_high", "alpha", "alpha_low", "alpha_high"]
    return pd.DataFrame(rows, columns=names)


@dataclass(frozen=True)
class Crossover:
    """Where two power laws predict the same perplexity, and the ends of the 95 % interval (None: it
    has no end there, or is none)."""

    tokens: float | None  # None: the fits are parallel
    low: float | None
    high: float | None
    inside: bool  # within the tokens that both fits cover
    has_interval: bool  # False where a fit has two points only

    def words(self) -> str:
        """As "154,500 tokens (95 % interval 120,000 … 199,000)" """
        if self.tokens is None:
            return "the fits are parallel"
        without = "without ends: the slopes cannot be told apart"
        low, high = (None if e is None else float(f"{e:.4g}") for e in (self.low, self.high))
        interval = f"95 % interval {style.interval(low, high, '{:,.0f}', without)}"
        interval = interval if self.has_interval else "no interval from two points"
        where = f"{float(f'{self.tokens:.4g}'):,.0f} tokens"
        return f"{where} ({interval})" if self.inside else f"outside the data ({where}; {interval})"


def crossover(first: PowerLaw, second: PowerLaw) -> Crossover:
    """Where two power laws cross, with an interval by Fieller's theorem on log tokens (1954, J. R.
    Statist. Soc. B 16, 175): all tokens at which the fits do not differ significantly, by the
    variance pooled from both and Student's t."""
    slope = first.alpha - second.alpha
    height = math.log(first.A) - math.log(second.A)
    known = first.residual is not None and second.residual is not None
    # As a number of tokens, e^700 is as good as never.
    if math.isclose(first.alpha, second.alpha, rel_tol=1e-9) or abs(height / slope) > 700:
        return Crossover(None, None, None, False, known)
    middle = -height / slope
    tokens = math.exp(middle)
    low = high = None
    if first.residual is not None and second.residual is not None:
        laws = (first, second)
        freedom = first.points + second.points - 4
        squares = first.residual**2 * (first.points - 2) + second.residual**2 * (second.points - 2)
        scatter = student(freedom) ** 2 * squares / freedom
        # About `middle`, the difference is slope · z and its variance a parabola in z: ends where
        # (slope · z)² = scatter · (flat + 2 · tilt · z + bend · z²).
        flat = sum(1 / law.points + (middle - law.centre) ** 2 / law.spread for law in laws)
        tilt = sum((middle - law.centre) / law.spread for law in laws)
        bend = sum(1 / law.spread for law in laws)
        leading = slope**2 - scatter * bend
        if leading > 0:
            root = math.sqrt((scatter * tilt) ** 2 + leading * scatter * flat)
            ends = [middle + (scatter * tilt + way * root) / leading for way in (-1, 1)]
            low, high = (math.exp(end) if 0 <= end < 700 else None for end in ends)
    inside = max(first.low, second.low) <= tokens <= min(first.high, second.high)
    return Crossover(tokens, low, high, inside, known)


def points(results: Sequence[Result]) -> tuple[list[float], list[float]]:
    """Training tokens and perplexity of every run that has one: what `scaling.fit` takes."""
    there = [(float(r.train_tokens), r.val_ppl) for r in results if r.val_ppl is not None]
    return [tokens for tokens, _ in there], [ppl for _, ppl in there]


def slope(logs: Array) -> Array:
    """Weights of the values at these log tokens [seeds, sizes] in their slope, by least squares."""
    weights = logs - logs.mean(axis=1, keepdims=True)
    return np.asarray(weights / (weights**2).sum(axis=1, keepdims=True))


def over_runs(results: Sequence[Result], weights: Weights = slope) -> Crossed:
    """The exponent of runs at several sizes, each with the same seeds, or another sum of their
    log perplexities, by `weights` of the log tokens (both [seeds, sizes]).

    It is linear in the nats of each held-out conversation, so that `intervals.crossed` applies;
    that a power law may be the wrong form is no part of the interval. None with validation "tail":
    each size has its own conversations. Raises ValueError: no full grid of two sizes or more and
    seeds, no conversations or different ones, or a run without a perplexity."""
    total = crossed(*by_conversation(results, weights, fewest=2))
    tail = results[0].experiment.validation == "tail"
    return replace(total, conversations=0) if tail else total


def by_conversation(
    results: Sequence[Result], weights: Weights, fewest: int = 1
) -> tuple[Array, Array]:
    """What `over_runs` takes the mean of, from `fewest` sizes on: such sums of nats [seeds,
    conversations], and tokens [conversations]; the tail of a stream counts as one conversation."""
    grid = {(one.experiment.samples, one.experiment.seed): one for one in results}
    sizes = sorted({size for size, _ in grid})
    seeds = sorted({seed for _, seed in grid})
    if len(sizes) < fewest or not len(results) == len(grid) == len(sizes) * len(seeds):
        got = sorted((one.experiment.samples, one.experiment.seed) for one in results)
        accepted = "each of two sizes or more with each seed, once"
        raise ValueError(f"results: got runs of (samples, seed) {got}; accepted: {accepted}")
    rows = {place: _scored(one) for place, one in grid.items()}
    tokens = [row["tokens"] for row in _scored(results[0])]
    for place, one in grid.items():
        if not tokens or [row["tokens"] for row in rows[place]] != tokens:
            raise ValueError(
                f"results: got run {one.key} with {len(rows[place])} held-out "
                f"conversations beside one with {len(tokens)}; accepted: the same ones in all"
            )
    # [seeds, sizes] and [seeds, sizes, conversations]
    logs = np.log([[grid[size, seed].train_tokens for size in sizes] for seed in seeds])
    nats = [[[row["nats"] for row in rows[size, seed]] for size in sizes] for seed in seeds]
    return (weights(logs)[:, :, None] * np.array(nats)).sum(axis=1), np.array(tokens)


def _scored(one: Result) -> list[dict[str, float]]:
    """A run's held-out conversations; the tail of its stream counts as one."""
    if one.experiment.validation == "held_out" or one.val_ppl is None:
        return one.val_conversations
    return [{"tokens": 1.0, "nats": math.log(one.val_ppl)}]
