"""How tables write figures: number formats, missing values, intervals, means."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd

from cvfp.analysis import intervals
from cvfp.config import toml

MISSING = "–"
NO_INTERVAL = "needs two seeds"
COLUMNS = toml("analysis/tables")


class Facts(pd.DataFrame):
    """Facts of runs; on a page two lines that open, the second from "device" on."""

    @pd.option_context("display.max_colwidth", None)
    def _repr_html_(self) -> str:
        place, lines = self.index.get_loc("device"), []
        for part, names in zip((self[""][:place], self[""][place:]), COLUMNS["said"], strict=True):
            said = "; ".join(f"{name} {part[name]}" for name in names if name in part)
            rows = part.to_frame().to_html(header=False)  # what it holds escaped
            lines.append(f"<details><summary>{html.escape(said)}</summary>{rows}</details>")
        return "".join(lines)


def number(value: float | None, form: str, missing: str = MISSING) -> str:
    """A figure by its format; `missing` for None and NaN."""
    return missing if value is None or pd.isna(value) else form.format(value)


def interval(low: float | None, high: float | None, form: str, missing: str = NO_INTERVAL) -> str:
    """Both ends by a format; `missing` where there is neither, "no end" for one alone."""
    ends = [number(end, form, "no end") for end in (low, high)]
    return missing if ends == ["no end"] * 2 else " … ".join(ends)


def mean(values: Iterable[float | None], form: str, scale: float = 1.0) -> str:
    """Mean of the values that are there, `scale` times."""
    return number(scale * pd.Series(list(values), dtype=float).mean(), form)


def mean_interval(values: Iterable[float | None], digits: int, scale: float = 1.0) -> str:
    """Mean of the values that are there, `scale` times, and half its interval: "15.10 ± 0.25"."""
    there = [scale * value for value in values if value is not None]
    if not there:
        return MISSING
    middle, low, high = intervals.mean(there)
    half = "" if low is None or high is None else f" ± {(high - low) / 2:.{digits}f}"
    return f"{middle:.{digits}f}{half}"


def columns(frame: pd.DataFrame, table: str, missing: str = MISSING) -> pd.DataFrame:
    """A frame's figures as words, row by row, as `table` of tables.toml shows them."""
    words = {}
    for name, (*of, form) in COLUMNS[table].items():
        figures = frame[of].astype(float).mul(100 if name.endswith("%") else 1).to_numpy()
        write: Callable[..., str] = number if len(of) == 1 else interval
        words[name] = [write(*row, form, missing) for row in figures]
    return pd.DataFrame(words, index=frame.index)


def filled(table: str, **figures: Any) -> dict[str, Any]:
    """The words of `table` in tables.toml, by their names, with these figures filled in."""

    def fill(words: Any) -> Any:
        if isinstance(words, str):
            return words.format(**figures)
        if isinstance(words, list):
            return [fill(one) for one in words]
        return {name: fill(one) for name, one in words.items()}

    found: dict[str, Any] = fill(COLUMNS[table])
    return found


def rows(by_name: dict[Any, Any], heading: str | list[str] | None = None) -> pd.DataFrame:
    """One row a name, or a tuple of names; `heading` says what the names are."""
    return pd.DataFrame.from_dict(by_name, orient="index").rename_axis(heading)
