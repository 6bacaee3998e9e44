"""CVFP: context vectors learned as fixed points, then next-token prediction on them."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cvfp import notebook as notebook
from cvfp.config import Experiment as Experiment
from cvfp.config import ParameterError as ParameterError
from cvfp.experiment import run as run
from cvfp.generation import generate as generate
from cvfp.packs import results as results
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
    from cvfp.pretrained import load as load
    from cvfp.pretrained import save_pretrained as save_pretrained

# Modules of transformers, in each the table of names that CVFP's class belongs to.
AUTO = "transformers.models.auto."
TABLES = {f"{AUTO}configuration_auto": ("CONFIG_MAPPING_NAMES", "CVFPConfig")}
TABLES[f"{AUTO}modeling_auto"] = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "CVFPForCausalLM"


def __getattr__(name: str) -> Any:
    # Pandas, SciPy and the plotting libraries take longer to import than a run takes to start.
    if name == "analysis":
        return importlib.import_module("cvfp.analysis")
    if name in ("CVFPConfig", "CVFPForCausalLM", "load", "save_pretrained"):
        return getattr(importlib.import_module("cvfp.pretrained"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Auto(SourceFileLoader):
    """Loads a module of transformers and adds CVFP to its table, where names are, and classes are
    imported when somebody asks for them: that takes seconds."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in TABLES else None
        if spec is not None:
            spec.loader = cls(name, str(spec.origin))
        return spec

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        table, name = TABLES[module.__name__]
        getattr(module, table)["cvfp"] = name
        getattr(module, "MODEL_NAMES_MAPPING", {})["cvfp"] = "CVFP"  # before transformers 5


sys.modules["transformers.models.cvfp"] = sys.modules[__name__]  # where it looks for them
sys.meta_path.insert(0, _Auto)
if TABLES.keys() & sys.modules.keys():  # too late for names
    importlib.import_module("cvfp.pretrained")
