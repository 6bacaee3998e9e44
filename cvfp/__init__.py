"""CVFP: context vectors learned as fixed points, then next-token prediction on them."""

from cvfp import analysis
from cvfp.config import Experiment, ParameterError
from cvfp.experiment import Result, Results, run
from cvfp.sweep import sweep

__version__ = "0.1.0"

__all__ = ["Experiment", "ParameterError", "Result", "Results", "analysis", "run", "sweep"]
