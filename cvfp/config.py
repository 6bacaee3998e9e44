"""What a run is: one frozen dataclass, its presets, and checks that name the parameter."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from cvfp import ops, registry
from cvfp.errors import ParameterError as ParameterError

Stage = Literal["data", "context", "phase1", "phase2", "run"]


def _field(
    default: Any,
    stage: Stage,
    description: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    later: bool = False,
) -> Any:
    """Args: later: the field came after runs were stored; at its default it is no part of keys."""
    metadata = dict(
        stage=stage,
        description=description,
        low=low,
        high=high,
        above=above,
        below=below,
        later=later,
    )
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that determines a run. Frozen; the defaults are the preset ``mini``.

    `Experiment.describe()` is the table of all fields with their meaning and range.

    Raises:
        ParameterError: a field is unknown, ill-typed, out of range or contradicts another.
    """

    dataset: str = _field(
        "chitchat",
        "data",
        "'chitchat' (embedded), a Hugging Face dataset id, a local .jsonl, .json, .csv, .tsv, .txt "
        "or .parquet file, gzipped or not, or a local folder of such files",
    )
    dataset_config: str | None = _field(
        None, "data", "configuration (subset) of a hub dataset; None: its only or default one"
    )
    column: str | None = _field(
        None, "data", "column that holds the conversation; None: 'messages', 'text' and others"
    )
    corpus_format: str | None = _field(
        None,
        "data",
        "own reading of a row: a registered name or 'module:function'; None: by column",
        later=True,
    )
    train_split: str = _field("train", "data", "split the training samples come from (hub data)")
    validation_split: str | None = _field(
        None, "data", "split the held-out samples come from; None: the first of train_split"
    )
    samples: int = _field(
        200, "data", "training conversations (nested: larger holds smaller)", low=1
    )
    validation: Literal["held_out", "tail"] = _field(
        "held_out",
        "data",
        "'held_out': fixed conversations no training size contains; "
        "'tail': the last 10 % of the training stream, cut off from training",
    )
    validation_samples: int = _field(20, "data", "held-out conversations", low=1)
    fitting_samples: int = _field(
        500, "data", "conversations that a fitted tokeniser or table is fitted on", low=1
    )
    tokenizer: str = _field(
        "bpe", "data", "'bpe' (fitted), or the hub id or local folder of a pretrained tokeniser"
    )
    vocab_size: int | None = _field(
        4096, "data", "vocabulary of 'bpe'; None: that of the pretrained tokeniser", low=257
    )
    embedding: str = _field(
        "bigram",
        "data",
        "'bigram', 'ppmi' (fitted), 'random', or the hub id or local folder of a pretrained model",
    )
    embedding_dim: int | None = _field(
        128, "data", "E, columns of the table; None: those of the pretrained table", low=1
    )

    block: str = _field(
        "published",
        "context",
        "the ContextBlock: 'published', another registered name, or 'module:class'",
        later=True,
    )
    num_layers: int = _field(3, "context", "L, layers of ContextBlock and of TokenBlock", low=1)
    context_dim: int = _field(128, "context", "D, size of the context vector", low=2)
    num_input_tokens: int = _field(1, "context", "n, tokens the model sees at a position", low=1)
    token_input_all_layers: bool = _field(
        True, "context", "every ContextBlock layer sees the tokens; False: equal-decrease design"
    )

    context_std: float = _field(
        0.1, "context", "initial deviation of the ContextBlock's weights on c", above=0, later=True
    )
    input_std: float = _field(
        0.1, "context", "initial deviation of the ContextBlock's weights on e", low=0, later=True
    )

    objective: str = _field(
        "published",
        "phase1",
        "what Phase 1 minimises: 'published', 'settle' (its first term alone), another registered "
        "name, or 'module:function'",
        later=True,
    )
    dist_reg_weight: float = _field(
        0.8, "phase1", "w, weight of the diversity term in the Phase 1 loss", low=0, high=1
    )
    phase1_learning_rate: float = _field(0.002, "phase1", "Adam, Phase 1", above=0)
    phase1_max_iterations: int = _field(
        40, "phase1", "most iterations, counting the initial contexts as number 1", low=2
    )
    phase1_min_iterations: int = _field(
        5, "phase1", "convergence does not stop Phase 1 before this iteration", low=2
    )
    phase1_noise: float = _field(
        0.1, "phase1", "standard deviation of the noise on the contexts read", low=0
    )
    phase1_gradient_clip: float = _field(1.0, "phase1", "largest gradient norm", above=0)
    convergence_threshold: float = _field(
        0.03, "phase1", "mean squared change under which a token has converged", above=0
    )
    convergence_rate: float = _field(
        0.99, "phase1", "fraction of converged tokens at which Phase 1 stops", above=0, high=1
    )
    phase1_abort: bool = _field(
        False,
        "phase1",
        "stop the run at Phase 1's iteration 20 where note 004's rules say so; no Phase 2 then",
    )
    loss_group: int = _field(
        8000, "phase1", "consecutive tokens over which the diversity term is taken", low=2
    )

    model: Literal["cvfp", "lstm", "transformer"] = _field(
        "cvfp",
        "phase2",
        "'cvfp', or a peer trained end to end with as many parameters as it: an LSTM, a small "
        "GPT-2-style transformer",
    )
    contexts: str = _field(
        "trained",
        "phase2",
        "what Phase 2 reads: contexts of the 'trained' ContextBlock, of the 'random' one as "
        "initialised, 'zero'es, trained ones 'shuffled' between positions, a plain 'window' of "
        "tokens; 'end_to_end': the ContextBlock learns with the TokenBlock, no Phase 1; or own "
        "contexts: a registered name or 'module:function', no Phase 1",
    )
    token_block_std: float = _field(
        0.1, "phase2", "initial deviation of the TokenBlock's weights", low=0, later=True
    )
    window_tokens: int = _field(16, "phase2", "tokens before the current one in a 'window'", low=1)
    unroll: int = _field(
        32, "phase2", "tokens that gradients of 'end_to_end' and of the peers flow back", low=1
    )
    weight_tying: bool = _field(True, "phase2", "head tied to the table; False: its own Linear")
    freeze_embedding: bool = _field(True, "phase2", "table (and a tied head) not trained")
    training_contexts: Literal["parallel", "exact"] = _field(
        "parallel", "phase2", "Phase 1's last iterate (as published), or the exact recurrence"
    )
    phase2_learning_rate: float = _field(0.003, "phase2", "Adam, Phase 2", above=0)
    phase2_epochs: int = _field(10, "phase2", "most epochs", low=1)
    phase2_patience: int = _field(2, "phase2", "epochs without improvement before stopping", low=1)
    phase2_batch_size: int = _field(1024, "phase2", "tokens in a batch", low=1)
    phase2_shuffle: bool = _field(True, "phase2", "shuffle the tokens; False: stream order")

    seed: int = _field(42, "run", "moves initialisation, noise and batches; not the data", low=0)
    device: str = _field("auto", "run", "'auto', 'cpu', 'cuda' or 'mps'")
    precision: Literal["auto", "float32", "bfloat16"] = _field(
        "auto", "run", "'auto': bfloat16 where its products are faster here, else float32"
    )
    ops: Literal["auto", "plain"] = _field(
        "auto", "run", "'auto': the fastest form of each formula; 'plain': as it reads", later=True
    )

    def __new__(cls, **given: Any) -> Experiment:
        # The generated __init__ would name an unknown field, but not the known ones.
        _known(given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        hints = _hints()
        for field in fields(self):
            value = _typed(field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
            _in_range(field.name, value, field.metadata)
        for name in ("dataset", "train_split", "tokenizer", "embedding"):
            if not getattr(self, name).strip():
                raise ParameterError(name, getattr(self, name), "a name or path that is not empty")
        if self.tokenizer == "bpe" and self.vocab_size is None:
            raise ParameterError("vocab_size", None, "an integer for the fitted tokeniser 'bpe'")
        if self.embedding in ("bigram", "ppmi", "random") and self.embedding_dim is None:
            raise ParameterError(
                "embedding_dim", None, f"an integer for the table {self.embedding!r}"
            )
        if self.model != "cvfp" and self.contexts != "trained":
            raise ParameterError("contexts", self.contexts, f"'trained' for model {self.model!r}")
        if self.model == "transformer" and self.num_input_tokens > 1:
            raise ParameterError(
                "num_input_tokens", self.num_input_tokens, "1 for model 'transformer'"
            )
        if self.device not in ("auto", "cpu", "cuda", "mps"):
            raise ParameterError("device", self.device, "'auto', 'cpu', 'cuda' or 'mps'")
        for kind in registry.PARTS:
            if (name := getattr(self, kind)) is not None:
                registry.resolve(kind, name)

    @classmethod
    def preset(cls, name: str = "mini", **overrides: Any) -> Experiment:
        """The named preset with `overrides`; values spelt as text ("500", "true") are parsed.

        An override of None means the preset's own value, so that a notebook's parameter can be
        left open; fields that may be None take the text "none".
        """
        if name not in PRESETS:
            raise ParameterError("preset", name, " or ".join(map(repr, PRESETS)))
        _known(overrides)
        hints = _hints()
        given = {k: parse(v, hints[k]) for k, v in overrides.items() if v is not None}
        return cls(**{**PRESETS[name], **given})

    def replace(self, **changes: Any) -> Experiment:
        """A copy with `changes`, checked like a new Experiment."""
        _known(changes)
        return dataclasses.replace(self, **changes)

    def resolved(self) -> Experiment:
        """A copy with "auto" device and precision replaced by what this machine offers.

        Raises:
            ParameterError: the device asked for is not there.
        """
        device = resolve_device(self.device)
        return self.replace(device=device, precision=resolve_precision(self.precision, device))

    def to_dict(self, *stages: Stage) -> dict[str, Any]:
        """Fields as a dict; only those of `stages` where any are named."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if not stages or f.metadata["stage"] in stages
        }

    def key_fields(self, *stages: Stage) -> dict[str, Any]:
        """What a key holds of the fields of `stages`: a field that came later only where it is not
        at its default, so that it does not make stored runs anew."""
        later = {f.name: f.default for f in fields(self) if f.metadata["later"]}
        chosen = self.to_dict(*stages)
        return {k: v for k, v in chosen.items() if k not in later or v != later[k]}

    @staticmethod
    def describe() -> list[dict[str, Any]]:
        """One row per field: name, type, mini's and published's value, range, description."""
        published = PRESETS["published"]
        return [
            {
                "field": f.name,
                "type": str(f.type),
                "mini": f.default,
                "published": published.get(f.name, f.default),
                "description": f.metadata["description"],
            }
            for f in fields(Experiment)
        ]


PRESETS: dict[str, dict[str, Any]] = {
    "mini": {},
    # Notes 000 and 002: UltraChat, GPT-2 tokens and embeddings (docs/method.md, *Settings*).
    "published": dict(
        dataset="HuggingFaceH4/ultrachat_200k",
        train_split="train_sft",
        validation_split="test_sft",
        samples=500,
        validation="tail",
        validation_samples=50,
        tokenizer="gpt2",
        vocab_size=None,
        embedding="gpt2",
        embedding_dim=None,
        num_layers=6,
        context_dim=768,
        weight_tying=False,
        phase2_learning_rate=0.001,
        phase2_patience=1,
        phase2_batch_size=4096,
        phase2_shuffle=False,
    ),
}


def resolve_device(device: str) -> str:
    """'auto' -> the best there is; a device that is not there raises `ParameterError`."""
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    if device == "auto":
        return there[0]
    if device not in there:
        found = " or ".join(map(repr, ["auto", *there]))
        raise ParameterError("device", device, f"{found} (what this machine has)")
    return device


def resolve_precision(precision: str, device: str) -> str:
    """'auto' -> 'bfloat16' where this machine takes products in it faster, else 'float32'."""
    if precision != "auto":
        return precision
    return "bfloat16" if ops.bfloat16_gain(device) >= ops.WORTH else "float32"


def _known(names: Iterable[str]) -> None:
    known = [f.name for f in fields(Experiment)]
    for name in names:
        if name not in known:
            raise ParameterError(name, "an unknown field", nearest(name, known))


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say is accepted in place of an unknown name: the nearest one first, then all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"{close[0]} (or one of {', '.join(known)})" if close else "one of " + ", ".join(known)


def _hints() -> dict[str, Any]:
    return typing.get_type_hints(Experiment)


def _parts(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type: int | None -> (int, NoneType)."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def parse(value: Any, hint: Any) -> Any:
    """Text that spells a value of the field's type -> that value; anything else unchanged."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    parts = _parts(hint)
    if type(None) in parts and text.lower() == "none":
        return None
    if bool in parts and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if int in parts or float in parts:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return value
    return value


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` if it is of the field's type (an int will do for a float), else ParameterError."""
    parts = _parts(hint)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ParameterError(name, value, " or ".join(map(repr, choices)))
        return value
    if float in parts and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ParameterError(name, value, "a number that fits a float") from None
    if any(type(value) is part for part in parts):
        return value
    names = {int: "an integer", float: "a number", bool: "True or False", str: "text"}
    accepted = " or ".join(names.get(part, "None") for part in parts)
    raise ParameterError(name, value, accepted)


def _in_range(name: str, value: Any, limits: typing.Mapping[str, Any]) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    low, high, above, below = (limits[k] for k in ("low", "high", "above", "below"))
    words = [
        f"at least {low}" if low is not None else "",
        f"above {above}" if above is not None else "",
        f"at most {high}" if high is not None else "",
        f"below {below}" if below is not None else "",
    ]
    fits = (
        (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
        and value not in (float("inf"), float("-inf"))
    )
    # NaN fails every comparison; with no limit at all it is stopped by value != value.
    if not fits or value != value:
        raise ParameterError(name, value, "a finite number " + " and ".join(filter(None, words)))
