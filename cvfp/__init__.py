"""CVFP: context vectors learned as fixed points, then next-token prediction on them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cvfp import notebook
from cvfp.config import Experiment, ParameterError
from cvfp.experiment import run
from cvfp.generation import generate
from cvfp.registry import block, context_source, corpus_format, objective
from cvfp.result import Result, Results
from cvfp.sweep import sweep
from cvfp.version import __version__ as __version__

if TYPE_CHECKING:
    from cvfp import analysis

__all__ = [
    "Experiment",
    "ParameterError",
    "Result",
    "Results",
    "analysis",
    "block",
    "context_source",
    "corpus_format",
    "generate",
    "notebook",
    "objective",
    "run",
    "sweep",
]


def __getattr__(name: str) -> Any:
    # Pandas, SciPy and the plotting libraries take longer to import than a run takes to start.
    if name == "analysis":
        return importlib.import_module("cvfp.analysis")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
