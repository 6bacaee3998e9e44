"""The notes' tables, transcribed: one CSV a table, named after the note it is from.

Perplexity is per token of GPT-2's BPE; accuracy and effective rank are in percent, as printed.
A printed range is two columns, `_low` and `_high`; its open end is infinite. The comment line that
each file begins with names the note's section, the units and what to beware of."""

from __future__ import annotations

from importlib.resources import files

import pandas as pd


def tables() -> list[str]:
    """Names of the tables that are there."""
    names = (entry.name for entry in files(__name__).iterdir())
    return sorted(name.removesuffix(".csv") for name in names if name.endswith(".csv"))


def table(name: str) -> pd.DataFrame:
    """One published table; raises KeyError: no table of that name."""
    if name not in tables():
        raise KeyError(f"name: got {name!r}; accepted: one of {', '.join(tables())}")
    with files(__name__).joinpath(f"{name}.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, comment="#")
