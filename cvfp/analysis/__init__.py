"""Reads finished runs; trains nothing."""

from cvfp.analysis import (
    comparison,
    intervals,
    plots,
    prediction,
    published,
    readings,
    rules,
    scaling,
    stopping,
    tables,
)

__all__ = [
    "comparison",
    "intervals",
    "plots",
    "prediction",
    "published",
    "readings",
    "rules",
    "scaling",
    "stopping",
    "tables",
]
