"""Scaling laws: perplexity against training tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


@dataclass(frozen=True)
class PowerLaw:
    """PPL = A · tokens^alpha, least squares in log-log (the published form).

    Attributes:
        alpha: slope in log-log; negative where more data helps.
        A: perplexity extrapolated to one token.
        r2: share of the variance of log PPL that the line explains; None for two points, through
            which every line passes.
        alpha_error: standard error of alpha; None for two points.
        points: number of measurements fitted.
    """

    alpha: float
    A: float
    r2: float | None
    alpha_error: float | None
    points: int

    @property
    def per_doubling(self) -> float:
        """Relative change of perplexity when the tokens double: 2^alpha − 1."""
        return float(2**self.alpha - 1)

    @overload
    def predict(self, tokens: float) -> float: ...
    @overload
    def predict(self, tokens: ArrayLike) -> float | NDArray[np.float64]: ...
    def predict(self, tokens: ArrayLike) -> float | NDArray[np.float64]:
        """Perplexity at `tokens` (a number or an array)."""
        predicted = self.A * np.asarray(tokens, dtype=np.float64) ** self.alpha
        return float(predicted) if predicted.ndim == 0 else predicted

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Confidence interval of alpha by Student's t; None for two points (no residual)."""
        if self.alpha_error is None:
            return None
        half = float(stats.t.ppf((1 + level) / 2, self.points - 2)) * self.alpha_error
        return self.alpha - half, self.alpha + half


def fit(tokens: ArrayLike, ppl: ArrayLike) -> PowerLaw:
    """Fit PPL = A · tokens^alpha.

    Args:
        tokens, ppl: as many of the one as of the other, positive and finite.

    Raises:
        ValueError: fewer than two different token counts, or numbers that have no logarithm.
    """
    x, y = np.asarray(tokens, dtype=np.float64), np.asarray(ppl, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"tokens, ppl: got shapes {x.shape}, {y.shape}; accepted: two equal lists")
    for name, values in (("tokens", x), ("ppl", y)):
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"{name}: got {values.tolist()}; accepted: positive, finite numbers")
    if len(np.unique(x)) < 2:
        raise ValueError(f"tokens: got {x.tolist()}; accepted: at least two different counts")
    line = stats.linregress(np.log(x), np.log(y))
    enough = len(x) > 2
    return PowerLaw(
        alpha=float(line.slope),
        A=float(np.exp(line.intercept)),
        r2=float(line.rvalue**2) if enough else None,
        alpha_error=float(line.stderr) if enough else None,
        points=len(x),
    )
