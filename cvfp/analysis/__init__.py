"""Reads finished runs; trains nothing."""

from cvfp.analysis import (
    intervals,
    plots,
    prediction,
    published,
    readings,
    scaling,
    stopping,
    tables,
)

__all__ = [
    "intervals",
    "plots",
    "prediction",
    "published",
    "readings",
    "scaling",
    "stopping",
    "tables",
]
