"""How tables write figures: number formats, missing values, intervals, means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from cvfp.analysis import intervals

MISSING = "–"
NO_INTERVAL = "needs two seeds"


def number(value: float | None, form: str, missing: str = MISSING) -> str:
    """A figure by its format; `missing` for None and NaN."""
    return missing if value is None or pd.isna(value) else form.format(value)


def interval(low: float | None, high: float | None, form: str, missing: str = NO_INTERVAL) -> str:
    """Both ends by a format; `missing` where there is neither, "no end" for one alone."""
    ends = [number(end, form, "no end") for end in (low, high)]
    return missing if ends == ["no end"] * 2 else " … ".join(ends)


def mean(values: Iterable[float | None], form: str, scale: float = 1.0) -> str:
    """Mean of the values that are there, `scale` times."""
    there = [value for value in values if value is not None]
    return number(scale * sum(there) / len(there) if there else None, form)


def mean_interval(values: Iterable[float | None], digits: int, scale: float = 1.0) -> str:
    """Mean of the values that are there, `scale` times, and half its interval: "15.10 ± 0.25"."""
    there = [scale * value for value in values if value is not None]
    if not there:
        return MISSING
    middle, low, high = intervals.mean(there)
    half = "" if low is None or high is None else f" ± {(high - low) / 2:.{digits}f}"
    return f"{middle:.{digits}f}{half}"


def columns(
    frame: pd.DataFrame, shown: Mapping[str, tuple[str, str]], missing: str = MISSING
) -> pd.DataFrame:
    """A frame's figures as words, row by row.

    Args:
        shown: for every name on the page the frame's column and the format of its figures. Where
            the name ends in "%" the column holds fractions.
    """
    words = {}
    for name, (column, form) in shown.items():
        figures = frame[column].astype(float) * (100 if name.endswith("%") else 1)
        words[name] = [number(figure, form, missing) for figure in figures]
    return pd.DataFrame(words, index=frame.index)


def rows(by_name: dict[Any, Any], heading: str | list[str] | None = None) -> pd.DataFrame:
    """One row a name, or a tuple of names; `heading` says what the names are."""
    return pd.DataFrame.from_dict(by_name, orient="index").rename_axis(heading)
