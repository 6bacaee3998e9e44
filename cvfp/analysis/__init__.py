"""Reads finished runs; trains nothing."""

from cvfp.analysis import intervals, plots, published, scaling, tables

__all__ = ["intervals", "plots", "published", "scaling", "tables"]
