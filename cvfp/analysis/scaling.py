"""Scaling laws: perplexity against training tokens, with or without a floor.

The intervals of a fit assume independent residuals of log perplexity with equal variance; those of
`over_runs` are over seeds and held-out conversations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from cvfp.analysis.intervals import crossed, student
from cvfp.result import Result

Array = NDArray[np.float64]
Values = float | Array

FORMS = {
    "power": "power law, PPL = A · tokens^α",
    "ppl": "power law above a floor, PPL = P∞ + A · tokens^−a",
    "loss": "power law of the loss above a floor, ln PPL = E + B · tokens^−β",
}
# Training tokens at which note 002 extrapolates.
EXTRAPOLATION = (1e6, 5e6, 1e7)
SIZES_NEEDED = {"power": 2, "ppl": 3, "loss": 3}

# The exponents that a saturating form may take: from almost none to 8-fold per doubling.
EXPONENTS = (1e-3, 3.0)
# Scale of the soft L1 loss: residuals of log PPL over it count by their size, not their square.
ROBUST = 0.1
# How far from its best value the log of a curve's value is searched for the end of its interval.
WIDEST = 50.0


class _Law(ABC):
    """What all forms share: perplexity as a function of tokens."""

    @abstractmethod
    def _log_ppl(self, tokens: Array) -> Array: ...

    @abstractmethod
    def _log_interval(self, tokens: Array, level: float, new: bool) -> tuple[Array, Array] | None:
        """Ends of the interval of log PPL."""

    @overload
    def predict(self, tokens: float) -> float: ...
    @overload
    def predict(self, tokens: ArrayLike) -> Values: ...
    def predict(self, tokens: ArrayLike) -> Values:
        """Perplexity at `tokens` (a number or an array)."""
        return _values(self._log_ppl(np.asarray(tokens, dtype=np.float64)))

    @overload
    def predict_interval(
        self, tokens: float, level: float = ..., new: bool = ...
    ) -> tuple[float, float] | None: ...
    @overload
    def predict_interval(
        self, tokens: ArrayLike, level: float = ..., new: bool = ...
    ) -> tuple[Values, Values] | None: ...
    def predict_interval(
        self, tokens: ArrayLike, level: float = 0.95, new: bool = False
    ) -> tuple[Values, Values] | None:
        """Confidence interval of the perplexity at `tokens` (a number or an array).

        It assumes the form: beyond the data it is too narrow if the form is wrong.

        Args:
            new: of what one new run would measure, not of the curve.

        Returns:
            Low and high end; None where as many parameters as points leave no residual.
        """
        ends = self._log_interval(np.asarray(tokens, dtype=np.float64), level, new)
        return None if ends is None else (_values(ends[0]), _values(ends[1]))


def _values(logs: Array) -> Values:
    return float(np.exp(logs)) if logs.ndim == 0 else np.exp(logs)


@dataclass(frozen=True)
class PowerLaw(_Law):
    """PPL = A · tokens^alpha, least squares in log-log (the published form).

    Attributes:
        alpha: slope in log-log; negative where more data helps.
        A: perplexity extrapolated to one token.
        r2: share of the variance of log PPL that the line explains; None for two points, through
            which every line passes, and where there is no variance.
        alpha_error: standard error of alpha; None for two points.
        points: number of measurements fitted.
        low, high: least and most tokens fitted.
        residual: standard deviation of log PPL about the line; None for two points.
        centre: mean of log tokens.
        spread: sum of squared deviations of log tokens from it.
    """

    alpha: float
    A: float
    r2: float | None
    alpha_error: float | None
    points: int
    low: float
    high: float
    residual: float | None
    centre: float
    spread: float

    @property
    def per_doubling(self) -> float:
        """Relative change of perplexity when the tokens double: 2^alpha − 1."""
        return float(2**self.alpha - 1)

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Confidence interval of alpha by Student's t; None for two points (no residual).

        A bootstrap is not offered: with the residuals of four points resampled, a 95 % percentile
        interval holds the true alpha only about 67 % of the time.
        """
        if self.alpha_error is None:
            return None
        half = student(level, self.points - 2) * self.alpha_error
        return self.alpha - half, self.alpha + half

    def _log_ppl(self, tokens: Array) -> Array:
        return np.asarray(math.log(self.A) + self.alpha * np.log(tokens))

    def _log_interval(self, tokens: Array, level: float, new: bool) -> tuple[Array, Array] | None:
        if self.residual is None:
            return None
        variance = 1 / self.points + (np.log(tokens) - self.centre) ** 2 / self.spread + new
        half = student(level, self.points - 2) * self.residual * np.sqrt(variance)
        middle = self._log_ppl(tokens)
        return middle - half, middle + half


def fit(tokens: ArrayLike, ppl: ArrayLike) -> PowerLaw:
    """Fit PPL = A · tokens^alpha.

    Args:
        tokens, ppl: as many of the one as of the other, positive and finite.

    Raises:
        ValueError: fewer than two different token counts, or numbers that have no logarithm.
    """
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


def _checked(tokens: ArrayLike, ppl: ArrayLike, sizes: int) -> tuple[Array, Array]:
    x, y = np.asarray(tokens, dtype=np.float64), np.asarray(ppl, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"tokens, ppl: got shapes {x.shape}, {y.shape}; accepted: two equal lists")
    for name, values in (("tokens", x), ("ppl", y)):
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"{name}: got {values.tolist()}; accepted: positive, finite numbers")
    if len(np.unique(x)) < sizes:
        raise ValueError(
            f"tokens: got {x.tolist()}; accepted: at least {sizes} different token counts"
        )
    return x, y


@dataclass(frozen=True)
class Saturating(_Law):
    """A power law that comes down to a floor: of perplexity, or of its logarithm.

    Form "ppl": PPL = floor + scale · tokens^−exponent. Form "loss": ln PPL = floor + scale ·
    tokens^−exponent, in nats.

    Attributes:
        form: "ppl" or "loss".
        floor: the limit for ever more data, of PPL or of ln PPL; not under 0.
        scale: height above the floor, extrapolated to one token; not under 0.
        exponent: decay of that height with tokens; positive, within `EXPONENTS`.
        r2: share of the variance of log PPL that the curve explains; None for three points, which
            leave three parameters no residual, and where there is no variance.
        points: number of measurements fitted.
        low, high: least and most tokens fitted.
        at_bound: floor, scale or exponent sits on its bound: saturation is not identified.
        cost: half the sum of squared residuals of log PPL, outlying ones damped.
        fitted: tokens and perplexities fitted.
    """

    form: str
    floor: float
    scale: float
    exponent: float
    r2: float | None
    points: int
    low: float
    high: float
    at_bound: bool
    cost: float = field(repr=False)
    fitted: tuple[tuple[float, ...], tuple[float, ...]] = field(repr=False)

    @property
    def limit(self) -> float:
        """Perplexity in the limit of ever more data."""
        return self.floor if self.form == "ppl" else math.exp(self.floor)

    def interval(self, level: float = 0.95) -> tuple[float | None, float | None] | None:
        """Confidence interval of the exponent by profile likelihood: every exponent whose best
        curve is not significantly worse by the F test (Bates and Watts, 1988, chapter 6).

        An end beyond `EXPONENTS` is None; so is the whole for three points (no residual).
        """
        threshold = self._threshold(level)
        if threshold is None:
            return None
        tokens, values, weights = self._linear()

        def profile(log_exponent: float) -> float:
            exponent = math.exp(log_exponent)
            columns = np.column_stack([weights, weights * (tokens / self.high) ** -exponent])
            start, _ = optimize.nnls(columns, weights * values)

            def place(p: Array) -> tuple[Array, Array]:
                return np.append(p, exponent), np.eye(3)[:, :2]

            bounds = (np.zeros(2), np.full(2, np.inf))
            return _least(self.form, self.fitted, self.high, [start], bounds, place)[0]

        low, high = (
            _end(profile, math.log(self.exponent), step, math.log(bound), threshold)
            for step, bound in zip((-0.1, 0.1), EXPONENTS, strict=True)
        )
        return None if low is None else math.exp(low), None if high is None else math.exp(high)

    def _log_ppl(self, tokens: Array) -> Array:
        curve = np.asarray(self.floor + self.scale * tokens**-self.exponent)
        return np.log(curve) if self.form == "ppl" else curve

    def _log_interval(self, tokens: Array, level: float, new: bool) -> tuple[Array, Array] | None:
        threshold = self._threshold(level)
        if threshold is None:
            return None
        ends = np.array([self._ends(float(one), threshold) for one in tokens.flat])
        low, high = np.moveaxis(ends.reshape(*tokens.shape, 2), -1, 0)
        if new:
            # The scatter of the run itself, by the same quantile, beside that of the curve.
            middle, own = self._log_ppl(tokens), 2 * (threshold - self.cost)
            low = middle - np.sqrt((middle - low) ** 2 + own)
            high = middle + np.sqrt((high - middle) ** 2 + own)
        return low, high

    def _ends(self, tokens: float, threshold: float) -> tuple[float, float]:
        """Interval of the curve's log PPL at `tokens`: a profile over its value there."""
        best = self.floor + self.scale * tokens**-self.exponent
        fitted, values, weights = self._linear()
        exponents = np.geomspace(*EXPONENTS, 40)
        # [exponents, points]: what a height of one at `tokens` adds elsewhere
        added = (fitted / tokens) ** -exponents[:, None] - 1
        # Free: the logarithm of the share of the value that is height, not floor, and the exponent.
        # Far beyond the data that share is minute and yet tells curves apart.
        bounds = (np.array([-100, EXPONENTS[0]]), np.array([0, EXPONENTS[1]]))

        def profile(log_value: float) -> float:
            value = math.exp(log_value)
            # There are local minima: start from the best of a grid, where the height is linear.
            heights = (weights**2 * added * (values - value)).sum(1)
            heights /= (weights**2 * added**2).sum(1)
            shares = np.clip(heights / value, math.exp(-99), 1)
            rest = weights * (value + value * shares[:, None] * added - values)
            closest = int((rest**2).sum(1).argmin())
            start = np.array([math.log(shares[closest]), exponents[closest]])

            def place(p: Array) -> tuple[Array, Array]:
                above = value * math.exp(p[0])
                theta = np.array([-value * math.expm1(p[0]), above, p[1]])
                return theta, np.array([[-above, 0], [above, 0], [0, 1]])

            return _least(self.form, self.fitted, tokens, [start], bounds, place)[0]

        step = math.sqrt(2 * (threshold - self.cost)) + 1e-9
        if self.form == "loss":
            step /= best
        middle = math.log(best)
        ends = []
        for way in (-1, 1):
            limit = middle + way * WIDEST
            end = _end(profile, middle, way * step, limit, threshold)
            ends.append(limit if end is None else end)
        return (ends[0], ends[1]) if self.form == "ppl" else (math.exp(ends[0]), math.exp(ends[1]))

    def _linear(self) -> tuple[Array, Array, Array]:
        """Tokens, what the curve is of there, and weights by which its residuals are those of log
        PPL, to first order."""
        tokens, ppl = (np.array(values) for values in self.fitted)
        of_ppl = self.form == "ppl"
        return (tokens, ppl, 1 / ppl) if of_ppl else (tokens, np.log(ppl), np.ones_like(ppl))

    def _threshold(self, level: float) -> float | None:
        """Largest cost of a curve that is not significantly worse than the best."""
        freedom = self.points - 3
        if freedom < 1:
            return None
        return self.cost * (1 + student(level, freedom) ** 2 / freedom)


def saturating(tokens: ArrayLike, ppl: ArrayLike, form: str) -> Saturating:
    """Fit a power law with a floor: robust least squares of log PPL from many starts.

    Args:
        tokens, ppl: as many of the one as of the other, positive and finite.
        form: "ppl" or "loss": what has the floor (see `FORMS`).

    Raises:
        ValueError: fewer than three different token counts, numbers that have no logarithm,
            perplexities under 1 for form "loss", or another form.
    """
    if form not in ("ppl", "loss"):
        raise ValueError(f'form: got {form!r}; accepted: "ppl" or "loss"')
    x, y = _checked(tokens, ppl, SIZES_NEEDED[form])
    if form == "loss" and y.min() < 1:
        raise ValueError(f"ppl: got {y.tolist()}; accepted: perplexities, which are 1 or more")
    most = float(x.max())
    values = y if form == "ppl" else np.log(y)
    least = float(values.min())
    starts = []
    for exponent in np.geomspace(0.02, 2, 4):
        for floor in (0, 0.5 * least, 0.9 * least):
            height = np.median((values - floor) * (x / most) ** exponent)
            starts.append(np.array([floor, height, exponent]))
    bounds = (np.array([0, 0, EXPONENTS[0]]), np.array([np.inf, np.inf, EXPONENTS[1]]))
    fitted = (tuple(x.tolist()), tuple(y.tolist()))
    cost, (floor, height, exponent) = _least(
        form, fitted, most, starts, bounds, lambda p: (p, np.eye(3))
    )
    # The solver comes as near a bound as rounding allows, and stays inside.
    at_bound = min(floor, height) < 1e-5 * least or not (
        EXPONENTS[0] * 1.001 < exponent < EXPONENTS[1] * 0.999
    )
    law = Saturating(
        form=form,
        floor=float(floor),
        scale=float(height * most**exponent),
        exponent=float(exponent),
        r2=None,
        points=len(x),
        low=float(x.min()),
        high=most,
        at_bound=bool(at_bound),
        cost=cost,
        fitted=fitted,
    )
    total = float(((np.log(y) - np.log(y).mean()) ** 2).sum())
    return replace(law, r2=1 - _squares(law, x, y) / total if len(x) > 3 and total else None)


def _least(
    form: str,
    fitted: tuple[tuple[float, ...], tuple[float, ...]],
    reference: float,
    starts: Sequence[Array],
    bounds: tuple[Array, Array],
    place: Callable[[Array], tuple[Array, Array]],
) -> tuple[float, Array]:
    """Least cost over p within `bounds`, and that p. `place` gives the curve: its floor, its height
    above that at `reference` tokens and its exponent, and their derivatives by p."""
    ratio, log_ppl = np.array(fitted[0]) / reference, np.log(fitted[1])

    def residuals(p: Array) -> Array:
        floor, height, exponent = place(p)[0]
        curve = floor + height * ratio**-exponent
        return np.asarray(np.log(curve) if form == "ppl" else curve) - log_ppl

    def jacobian(p: Array) -> Array:
        (floor, height, exponent), by_p = place(p)
        power = ratio**-exponent
        by = np.column_stack([np.ones_like(power), power, -height * power * np.log(ratio)])
        if form == "ppl":
            by /= (floor + height * power)[:, None]
        return np.asarray(by @ by_p)

    fits = [
        optimize.least_squares(
            residuals, start, jacobian, bounds, x_scale="jac", loss="soft_l1", f_scale=ROBUST
        )
        for start in starts
    ]
    best = min(fits, key=lambda one: one.cost)
    return float(best.cost), best.x


def _end(
    profile: Callable[[float], float], best: float, step: float, limit: float, threshold: float
) -> float | None:
    """Where a profile of least costs passes the threshold, going from `best` by growing steps;
    None if it does not before `limit`."""
    inside = best
    while True:
        outside = inside + step if abs(inside + step - best) < abs(limit - best) else limit
        if profile(outside) > threshold:
            break
        if outside == limit:
            return None
        inside, step = outside, 2 * step
    # A perfect fit: the threshold is 0, and rounding is over it.
    if profile(inside) >= threshold:
        return inside
    return float(
        optimize.brentq(lambda x: profile(x) - threshold, inside, outside, xtol=1e-6, rtol=1e-6)
    )


def forms(tokens: ArrayLike, ppl: ArrayLike) -> dict[str, PowerLaw | Saturating]:
    """The forms of `FORMS` that the number of different sizes allows, fitted.

    Raises:
        ValueError: as `fit`.
    """
    fits: dict[str, PowerLaw | Saturating] = {"power": fit(tokens, ppl)}
    sizes = len(np.unique(np.asarray(tokens)))
    for form in ("ppl", "loss"):
        if sizes >= SIZES_NEEDED[form]:
            fits[form] = saturating(tokens, ppl, form)
    return fits


def leave_largest_out(tokens: ArrayLike, ppl: ArrayLike) -> pd.DataFrame:
    """Each form fitted without the largest size, and what it then predicts there.

    Returns:
        One row per form of `FORMS`: form; predicted; actual (mean perplexity of that size's runs);
        error (relative: predicted / actual − 1); doublings (of tokens, from the largest size that
        is fitted); reason. Where too few sizes remain, predicted and error are NaN and reason says
        so; elsewhere reason is None.

    Raises:
        ValueError: as `fit`.
    """
    x, y = _checked(tokens, ppl, 2)
    rest = x < x.max()
    sizes = len(np.unique(x[rest]))
    laws = forms(x[rest], y[rest]) if sizes > 1 else {}
    actual = float(y[~rest].mean())
    rows: list[dict[str, object]] = []
    for form, needed in SIZES_NEEDED.items():
        predicted = laws[form].predict(float(x.max())) if form in laws else math.nan
        rows.append(
            {
                "form": form,
                "predicted": predicted,
                "actual": actual,
                "error": predicted / actual - 1,
                "doublings": float(np.log2(x.max() / x[rest].max())),
                "reason": None if form in laws else f"needs {needed} sizes, {sizes} remain",
            }
        )
    frame = pd.DataFrame(rows)
    # As objects: among words, pandas makes NaN of None.
    return frame.assign(reason=pd.Series([row["reason"] for row in rows], dtype=object))


def windows(tokens: ArrayLike, ppl: ArrayLike, size: int = 4) -> pd.DataFrame:
    """Alpha over a window that slides along the different sizes (note 004, trend 0.5).

    Args:
        size: different sizes in a window; all runs of a size are in it.

    Returns:
        One row per window, none where there are fewer sizes than that: window (from 1),
        tokens_low, tokens_high, alpha, alpha_low, alpha_high (95 % interval; NaN for two points).

    Raises:
        ValueError: a size under two, or points as `fit` refuses.
    """
    if size < 2:
        raise ValueError(f"size: got {size}; accepted: two sizes or more")
    x, y = _checked(tokens, ppl, 2)
    counts = np.unique(x)
    rows = []
    for start in range(len(counts) - size + 1):
        low, high = counts[start], counts[start + size - 1]
        within = (x >= low) & (x <= high)
        law = fit(x[within], y[within])
        rows.append((start + 1, low, high, law.alpha, *(law.interval() or (math.nan, math.nan))))
    names = ["window", "tokens_low", "tokens_high", "alpha", "alpha_low", "alpha_high"]
    return pd.DataFrame(rows, columns=names)


@dataclass(frozen=True)
class Crossover:
    """Where two power laws predict the same perplexity.

    Attributes:
        tokens: training tokens there; None where the fits are parallel.
        low, high: ends of its interval; None where it has no end (both: the slopes cannot be told
            apart), under one token, and without an interval.
        inside: whether it lies within the tokens that both fits cover.
        level: of the interval; None without one, since a fit has two points only.
    """

    tokens: float | None
    low: float | None
    high: float | None
    inside: bool
    level: float | None

    def words(self) -> str:
        """As "154,500 tokens (95 % interval 120,000 … 199,000)" """
        if self.tokens is None:
            return "the fits are parallel"
        if self.level is None:
            interval = "no interval from two points"
        else:
            ends = " … ".join("no end" if e is None else _count(e) for e in (self.low, self.high))
            if self.low is None and self.high is None:
                ends = "without ends: the slopes cannot be told apart"
            interval = f"{100 * self.level:.3g} % interval {ends}"
        where = f"{_count(self.tokens)} tokens"
        return f"{where} ({interval})" if self.inside else f"outside the data ({where}; {interval})"


def _count(tokens: float) -> str:
    return f"{float(f'{tokens:.4g}'):,.0f}"


def crossover(first: PowerLaw, second: PowerLaw, level: float = 0.95) -> Crossover:
    """Where two power laws cross, with an interval by Fieller's theorem on log tokens.

    The interval holds all tokens at which the fits do not differ significantly, by the variance
    pooled from both and Student's t (Fieller, 1954, J. R. Statist. Soc. B 16, 175).

    Raises:
        ValueError: a level that is not between 0 and 1.
    """
    slope = first.alpha - second.alpha
    height = math.log(first.A) - math.log(second.A)
    freedom = first.points + second.points - 4
    quantile = student(level, max(freedom, 1))
    known = None if first.residual is None or second.residual is None else level
    # As a number of tokens, e^700 is as good as never.
    if math.isclose(first.alpha, second.alpha, rel_tol=1e-9) or abs(height / slope) > 700:
        return Crossover(None, None, None, False, known)
    middle = -height / slope
    tokens = math.exp(middle)
    low = high = None
    if first.residual is not None and second.residual is not None:
        laws = (first, second)
        squares = first.residual**2 * (first.points - 2) + second.residual**2 * (second.points - 2)
        scatter = quantile**2 * squares / freedom
        # About `middle`, the difference is slope · z and its variance a parabola in z: ends where
        # (slope · z)² = scatter · (flat + 2 · tilt · z + bend · z²).
        flat = sum(1 / law.points + (middle - law.centre) ** 2 / law.spread for law in laws)
        tilt = sum((middle - law.centre) / law.spread for law in laws)
        bend = sum(1 / law.spread for law in laws)
        leading = slope**2 - scatter * bend
        if leading > 0:
            root = math.sqrt((scatter * tilt) ** 2 + leading * scatter * flat)
            low, high = (
                _possible(middle + (scatter * tilt + way * root) / leading) for way in (-1, 1)
            )
    inside = max(first.low, second.low) <= tokens <= min(first.high, second.high)
    return Crossover(tokens, low, high, inside, known)


def _possible(log_tokens: float) -> float | None:
    return math.exp(log_tokens) if 0 <= log_tokens < 700 else None


def _squares(law: PowerLaw | Saturating, tokens: Array, ppl: Array) -> float:
    return float(((np.log(ppl) - np.log(law.predict(tokens))) ** 2).sum())


def points(results: Sequence[Result]) -> tuple[list[float], list[float]]:
    """Training tokens and perplexity of every run that has one: what `scaling.fit` takes."""
    there = [(float(r.train_tokens), r.val_ppl) for r in results if r.val_ppl is not None]
    return [tokens for tokens, _ in there], [ppl for _, ppl in there]


@dataclass(frozen=True)
class AlphaOverRuns:
    """The exponent of a ladder of runs, with an interval over seeds and conversations.

    Attributes:
        alpha: mean over seeds of each seed's slope of log PPL in log tokens.
        low, high: its interval, for other seeds and other held-out conversations; None with fewer
            than two of either.
        seeds, conversations: how many there are of each.
        by_seed: the alpha of each seed.
    """

    alpha: float
    low: float | None
    high: float | None
    seeds: int
    conversations: int
    by_seed: tuple[float, ...]


def over_runs(results: Sequence[Result], level: float = 0.95) -> AlphaOverRuns:
    """The exponent of runs at several sizes, every size with the same seeds.

    Each seed's alpha is linear in its log perplexities, hence in the nats of each held-out
    conversation, so that `intervals.crossed` applies. That a power law may be the wrong form is no
    part of the interval.

    Args:
        results: one run per size (`samples`) and seed, all scored on the same conversations.

    Raises:
        ValueError: sizes and seeds are no full grid of at least two sizes, or the conversations
            are none or differ.
    """
    student(level, 1)  # refuses a bad level before anything else
    grid = {(one.experiment.samples, one.experiment.seed): one for one in results}
    sizes = sorted({size for size, _ in grid})
    seeds = sorted({seed for _, seed in grid})
    if len(sizes) < 2 or not len(results) == len(grid) == len(sizes) * len(seeds):
        got = sorted((one.experiment.samples, one.experiment.seed) for one in results)
        raise ValueError(
            f"results: got runs of (samples, seed) {got}; accepted: each of two sizes or more with "
            "each seed, once"
        )
    tokens = [one["tokens"] for one in results[0].val_conversations]
    for one in results:
        if not tokens or [each["tokens"] for each in one.val_conversations] != tokens:
            raise ValueError(
                f"results: got run {one.key} with {len(one.val_conversations)} held-out "
                f"conversations beside one with {len(tokens)}; accepted: the same ones in all"
            )
    # [seeds, sizes] and [seeds, sizes, conversations]
    logs = np.log([[grid[size, seed].train_tokens for size in sizes] for seed in seeds])
    nats = np.array(
        [
            [[one["nats"] for one in grid[size, seed].val_conversations] for size in sizes]
            for seed in seeds
        ]
    )
    weights = logs - logs.mean(axis=1, keepdims=True)
    weights /= (weights**2).sum(axis=1, keepdims=True)
    slopes = (weights[:, :, None] * nats).sum(axis=1)
    alpha, low, high, _ = crossed(slopes, np.array(tokens), level)
    return AlphaOverRuns(
        alpha=alpha,
        low=low,
        high=high,
        seeds=len(seeds),
        conversations=len(tokens),
        by_seed=tuple(float(one) for one in slopes.sum(axis=1) / sum(tokens)),
    )
