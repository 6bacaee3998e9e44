"""Reads finished runs; trains nothing."""

from cvfp.analysis import plots, published, scaling, tables

__all__ = ["plots", "published", "scaling", "tables"]
