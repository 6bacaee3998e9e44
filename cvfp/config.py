"""What a run is: one frozen dataclass, its presets, and checks that name the parameter."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import operator
import tomllib
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch

from cvfp import ops, registry
from cvfp.errors import ParameterError as ParameterError

Stage = Literal["data", "context", "phase1", "phase2", "run"]

# What a number may be: the words of an error, and the comparison.
LIMITS: dict[str, tuple[str, Any]] = {
    "low": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "high": ("at most", operator.le),
}
TYPES = {int: "an integer", float: "a number", bool: "True or False", str: "text"}
# The most that numbers may be, far over anything real; others: 10^9, and 10^30 with a fraction.
MOST = dict.fromkeys(("context_dim", "embedding_dim", "window_tokens"), 10**5)
MOST |= dict(vocab_size=10**7, num_layers=1000, num_input_tokens=1000, seed=2**63 - 1)


class UpTo(int):
    """A size that nobody set, the same in keys and JSON: what the corpus has, at most this."""


def toml(name: str) -> dict[str, Any]:
    """One of the package's own .toml files, such as "analysis/claims"."""
    return tomllib.loads((Path(__file__).parent / f"{name}.toml").read_text(encoding="utf-8"))


def _field(stage: Stage, default: Any, later: bool = False, **limits: float) -> Any:
    """`later`: came after runs were stored; at its default it is no part of keys."""
    metadata = dict(stage=stage, later=later, limits=limits)
    return dataclasses.field(default=default, metadata=metadata)


_data, _context, _phase1, _phase2, _run = (partial(_field, stage) for stage in get_args(Stage))


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that determines a run. Frozen; the defaults are the preset `mini`.

    fields.toml says what each field is, `Experiment.describe()` is the table of all. NumPy numbers
    and paths are converted to plain numbers and text. Raises `ParameterError`: a field is unknown,
    ill-typed, out of range or contradicts another."""

    dataset: str = _data("chitchat")
    dataset_config: str | None = _data(None)
    column: str | None = _data(None)
    corpus_format: str | None = _data(None, later=True)
    train_split: str = _data("train")
    validation_split: str | None = _data(None)
    samples: int = _data(UpTo(200), low=1)
    unlabelled_samples: int = _data(0, low=0, later=True)
    validation: Literal["held_out", "tail"] = _data("held_out")
    validation_samples: int = _data(UpTo(20), low=1)
    selection: Literal["validation", "development"] = _data("validation", later=True)
    development_samples: int = _data(UpTo(200), low=1, later=True)
    fitting_samples: int = _data(UpTo(500), low=1)
    tokenizer: str = _data("bpe")
    vocab_size: int | None = _data(UpTo(4096), low=257)
    embedding: str = _data("bigram")
    embedding_dim: int | None = _data(UpTo(128), low=1)

    block: str = _context("published", later=True)
    leak_tokens: float = _context(16.0, above=0.25, high=1e6, later=True)
    num_layers: int = _context(3, low=1)
    context_dim: int = _context(128, low=2)
    num_input_tokens: int = _context(1, low=1)
    token_input_all_layers: bool = _context(True)
    context_std: float = _context(0.1, above=0, later=True)
    input_std: float = _context(0.1, low=0, later=True)

    objective: str = _phase1("published", later=True)
    objective_lags: str = _phase1("0,1", later=True)
    phase1_step: Literal["sweep", "group"] = _phase1("sweep", later=True)
    phase1_decay: Literal["none", "linear"] = _phase1("none", later=True)
    phase1_fresh: bool = _phase1(False, later=True)
    phase1_stop: Literal["converged", "never"] = _phase1("converged", later=True)
    dist_reg_weight: float = _phase1(0.8, low=0, high=1)
    phase1_learning_rate: float = _phase1(0.002, above=0)
    phase1_max_iterations: int = _phase1(40, low=2)
    phase1_min_iterations: int = _phase1(UpTo(5), low=2)
    phase1_noise: float = _phase1(0.1, low=0, high=100)
    phase1_gradient_clip: float = _phase1(1.0, above=0)
    convergence_threshold: float = _phase1(0.03, above=0)
    convergence_rate: float = _phase1(0.99, above=0, high=1)
    phase1_abort: bool = _phase1(False)
    loss_group: int = _phase1(8000, low=2)

    model: Literal["cvfp", "lstm", "transformer"] = _phase2("cvfp")
    contexts: str = _phase2("trained")
    token_block_std: float = _phase2(0.1, low=0, later=True)
    window_tokens: int = _phase2(16, low=1)
    dropout: float = _phase2(0.0, low=0, high=0.9, later=True)
    weight_decay: float = _phase2(0.0, low=0, high=10, later=True)
    unroll: int = _phase2(32, low=1)
    weight_tying: bool = _phase2(True)
    freeze_embedding: bool = _phase2(True)
    training_contexts: Literal["parallel", "exact"] = _phase2("parallel")
    phase2_learning_rate: float = _phase2(0.003, above=0)
    phase2_epochs: int = _phase2(10, low=1)
    phase2_patience: int = _phase2(2, low=1)
    phase2_batch_size: int = _phase2(1024, low=1)
    phase2_shuffle: bool = _phase2(True)

    seed: int = _run(42, low=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = _run("auto")
    precision: Literal["auto", "float32", "bfloat16"] = _run("auto")
    ops: Literal["auto", "plain"] = _run("auto", later=True)

    def __new__(cls, **given: Any) -> Experiment:
        # The generated __init__ would name an unknown field, but not the known ones.
        if unknown := [name for name in given if name not in HINTS]:
            raise ParameterError(unknown[0], "an unknown field", nearest(unknown[0], HINTS))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _typed(field.name, plain(getattr(self, field.name)), HINTS[field.name])
            object.__setattr__(self, field.name, value)
            _in_range(field.name, value, field.metadata["limits"])
        for name in ("dataset", "train_split", "tokenizer", "embedding"):
            if not getattr(self, name).strip():
                raise ParameterError(name, getattr(self, name), "a name or path that is not empty")
        for size, (part, fitted) in FITTED.items():
            name = getattr(self, part)
            if name not in fitted and size in self.left_alone:
                object.__setattr__(self, size, None)
            if name in fitted and getattr(self, size) is None:
                raise ParameterError(size, None, f"an integer for {part} {name!r}")
        least, most = self.phase1_min_iterations, self.phase1_max_iterations
        if least > most and not isinstance(least, UpTo):
            words = f"at most {most}, phase1_max_iterations"
            raise ParameterError("phase1_min_iterations", least, words)
        if self.model != "cvfp" and self.contexts != "trained":
            raise ParameterError("contexts", self.contexts, f"'trained' for model {self.model!r}")
        if self.model == "transformer" and (n := self.num_input_tokens) > 1:
            raise ParameterError("num_input_tokens", n, "1 for model 'transformer'")
        _ = self.lags
        for kind in registry.PARTS:
            if (name := getattr(self, kind)) is not None:
                registry.resolve(kind, name)

    @classmethod
    def preset(cls, name: str = "mini", **overrides: Any) -> Experiment:
        """The named preset with `overrides`; values spelt as text ("500", "true") are parsed.

        An override of None means the preset's own value, so that a notebook's parameter can be
        left open; fields that may be None take the text "none"."""
        if name not in PRESETS:
            raise ParameterError("preset", name, " or ".join(map(repr, PRESETS)))
        parsed = {k: parse(v, HINTS.get(k)) for k, v in overrides.items() if v is not None}
        return cls(**{**PRESETS[name], **parsed})

    def replace(self, **changes: Any) -> Experiment:
        """A copy with `changes`, checked like a new Experiment."""
        return dataclasses.replace(self, **changes)

    @property
    def lags(self) -> dict[int, float]:
        """Tokens back that `objective_lags` asks for, and their weights."""
        pairs = [[*lag.split(":", 1), "1"][:2] for lag in self.objective_lags.split(",")]
        with suppress(ValueError):
            lags = {int(lag): float(weight) for lag, weight in pairs}
            fits = min(lags) >= 0 < min(lags.values()) and sum(lags.values()) < math.inf
            if len(lags) == len(pairs) and fits:
                return lags
        accepted = "different ones, as 0,1,2, or with weights above 0, as 0:1,1:0.5"
        raise ParameterError("objective_lags", self.objective_lags, accepted)

    @property
    def left_alone(self) -> frozenset[str]:
        """Names of the sizes that nobody set, and that may still become less."""
        return frozenset(f.name for f in fields(self) if isinstance(getattr(self, f.name), UpTo))

    def settled(self, sizes: Mapping[str, int]) -> Experiment:
        """A copy with what the sizes left alone became (`Data.sizes`), where it is less."""
        less = {name for name, size in sizes.items() if 0 < size < (getattr(self, name) or 0)}
        return self.replace(**{name: sizes[name] for name in less & self.left_alone})

    def resolved(self) -> Experiment:
        """A copy with "auto" device and precision replaced by what this machine offers; raises
        `ParameterError`: the device asked for is not there."""
        device = resolve_device(self.device)
        return self.replace(device=device, precision=resolve_precision(self.precision, device))

    def to_dict(self, *stages: Stage) -> dict[str, Any]:
        """Fields as a dict; only those of `stages` where any are named."""
        chosen = (f.name for f in fields(self) if not stages or f.metadata["stage"] in stages)
        return {name: getattr(self, name) for name in chosen}

    def key_fields(self, *stages: Stage) -> dict[str, Any]:
        """The fields of `stages` that a key is made of: of the later ones only what is not at its
        default, so that the keys of stored runs stay."""
        later = {f.name: f.default for f in fields(self) if f.metadata["later"]}
        return {k: v for k, v in self.to_dict(*stages).items() if k not in later or v != later[k]}

    @staticmethod
    def describe() -> list[dict[str, Any]]:
        """One row per field: name, type, the two presets' values, description."""
        published, words = Experiment.preset("published").to_dict(), toml("fields")
        values = [(f.name, str(f.type), f.default, published[f.name]) for f in fields(Experiment)]
        names = ("field", "type", "mini", "published", "description")
        return [dict(zip(names, (*row, words[row[0]]), strict=True)) for row in values]


HINTS = get_type_hints(Experiment)
TABLES = ("bigram", "ppmi", "random")
# Sizes that are None where another field names what is pretrained; what needs a number.
FITTED = {"vocab_size": ("tokenizer", ("bpe",)), "embedding_dim": ("embedding", TABLES)}


def _presets() -> dict[str, dict[str, Any]]:
    """What presets.toml has."""
    tables = toml("presets")

    def preset(table: dict[str, Any]) -> dict[str, Any]:
        made = {k: v for name in table.get("of", ()) for k, v in preset(tables[name]).items()}
        own = {name: value for name, value in table.items() if name != "of"}
        return made | {
            name: UpTo(value.removeprefix("up to ")) if str(value).startswith("up to ") else value
            for name, value in own.items()
        }

    return {name: preset(one) for name, one in tables.items() if not name.startswith("_")}


PRESETS = _presets()


def resolve_device(device: str) -> str:
    """'auto' -> the best there is; a device that is not there raises `ParameterError`."""
    accelerators = {"cuda": torch.cuda, "mps": torch.backends.mps}
    there = [*(name for name, one in accelerators.items() if one.is_available()), "cpu"]
    if device == "auto":
        return there[0]
    if device not in there:
        accepted = " or ".join(map(repr, ["auto", *there]))
        raise ParameterError("device", device, f"{accepted} (what this machine has)")
    return device


def resolve_precision(precision: str, device: str) -> str:
    """'auto' -> 'bfloat16' where matrix products are faster in it here, else 'float32'."""
    if precision != "auto":
        return precision
    return "bfloat16" if ops.bfloat16_gain(device) >= ops.WORTH else "float32"


def nearest(name: str, known: Collection[str]) -> str:
    """What is accepted in place of an unknown name, in words: the nearest one first, then all."""
    every = f"one of {', '.join(known)}"
    close = difflib.get_close_matches(name, known, 1)
    return f"{close[0]} (or {every})" if close else every


def plain(value: Any) -> Any:
    """A NumPy scalar as a plain number, a path as text; anything else unchanged."""
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def parse(value: Any, hint: Any) -> Any:
    """Text that spells a value of the field's type -> that value; anything else as in `plain`."""
    value = plain(value)
    if not isinstance(value, str):
        return value
    text = value.strip()
    types = _types(hint)
    if type(None) in types and text.lower() == "none":
        return None
    if bool in types and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if int in types or float in types:
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return ast.literal_eval(text)
    return value


def _types(hint: Any) -> tuple[Any, ...]:
    """int | None -> (int, NoneType), int -> (int,), and the values of a Literal."""
    return get_args(hint) or (hint,)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` if it is of the field's type (an int will do for a float), else ParameterError."""
    accepted = _types(hint)
    if get_origin(hint) is Literal:
        if isinstance(value, str) and value in accepted:
            return value
        raise ParameterError(name, value, " or ".join(map(repr, accepted)))
    if type(value) in accepted or (int in accepted and isinstance(value, UpTo)):
        return value
    if float in accepted and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ParameterError(name, value, "a number that fits a float") from None
    raise ParameterError(name, value, " or ".join(TYPES.get(one, "None") for one in accepted))


def _in_range(name: str, value: Any, limits: Mapping[str, float]) -> None:
    if type(value) not in (int, float, UpTo):
        return
    most = MOST.get(name, 1e30 if type(value) is float else 10**9)
    limits = {**limits, "high": limits.get("high", most)}
    # NaN fails every comparison.
    fits = all(LIMITS[limit][1](value, bound) for limit, bound in limits.items())
    if not fits or not -math.inf < value < math.inf:
        words = " and ".join(f"{LIMITS[limit][0]} {bound}" for limit, bound in limits.items())
        raise ParameterError(name, value, f"a finite number {words}")
