"""CVFP: context vectors learned as fixed points, then next-token prediction on them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cvfp import notebook as notebook
from cvfp.config import Experiment as Experiment
from cvfp.config import ParameterError as ParameterError
from cvfp.experiment import run as run
from cvfp.generation import generate as generate
from cvfp.registry import block as block
from cvfp.registry import context_source as context_source
from cvfp.registry import corpus_format as corpus_format
from cvfp.registry import objective as objective
from cvfp.result import Result as Result
from cvfp.result import Results as Results
from cvfp.sweep import sweep as sweep
from cvfp.version import __version__ as __version__

if TYPE_CHECKING:
    from cvfp import analysis as analysis


def __getattr__(name: str) -> Any:
    # Pandas, SciPy and the plotting libraries take longer to import than a run takes to start.
    if name == "analysis":
        return importlib.import_module("cvfp.analysis")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
