"""What a run measured: its Result, and tidy frames of many."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvfp import baselines, card, store
from cvfp.build import build
from cvfp.config import Experiment, ParameterError
from cvfp.corpora import load_corpus
from cvfp.end_to_end import Peer
from cvfp.model import CVFP
from cvfp.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import pandas as pd


@dataclass(kw_only=True)
class Result:
    """What a run measured. `column_docs()` gives the meaning and unit of every column.

    What does not apply is None or an empty list, never 0. A run that was given up in Phase 1
    (`aborted` says why) has nothing that comes from Phase 2. One that was stopped is `partial`: it
    has what there was, and is not stored. A control without contexts, or a peer, has none of their
    figures."""

    key: str
    experiment: Experiment
    train_tokens: int
    val_tokens: int
    vocab_size: int
    embedding_dim: int
    parameters: dict[str, int]
    val_ppl: float | None = None
    val_acc: float | None = None
    val_bpb: float | None = None
    dev_ppl: float | None = None
    train_ppl: float | None = None
    train_er: float | None = None
    val_er: float | None = None
    phase1_iterations: int | None = None
    converged: float | None = None
    best_epoch: int | None = None
    aborted: str | None = None
    baselines: dict[str, dict[str, float] | None]
    phase1_history: list[dict[str, float]] = field(default_factory=list)
    phase2_history: list[dict[str, float]] = field(default_factory=list)
    train_spectrum: list[float] = field(default_factory=list)
    val_spectrum: list[float] = field(default_factory=list)
    val_conversations: list[dict[str, float]] = field(default_factory=list)
    val_positions: list[dict[str, float]] = field(default_factory=list)
    val_frequencies: list[dict[str, float]] = field(default_factory=list)
    val_bigrams: list[dict[str, float]] = field(default_factory=list)
    context_sweeps: int | None = None
    context_steps: int | None = None
    context_error: float | None = None
    contraction_rate: float | None = None
    memory_length: int | None = None
    seconds: dict[str, float]
    phase1_from_store: bool = False
    peak_memory_mib: float
    peak_device_memory_mib: float | None
    device: str
    device_name: str
    precision: str
    threads: int
    versions: dict[str, str]
    loses_text: bool = False
    partial: bool = field(default=False, compare=False)
    from_store: bool = field(default=False, compare=False)
    _model: CVFP | Peer | None = field(default=None, repr=False, compare=False)

    @property
    def ranks(self) -> tuple[float, float]:
        """Effective rank of the training and of the validation contexts, fractions of D; raises
        `ParameterError` for a run without contexts."""
        if self.train_er is None or self.val_er is None:
            raise self._without("contexts")
        return self.train_er, self.val_er

    @property
    def phase1_end(self) -> tuple[int, float]:
        """Phase 1's iterations, and the fraction of tokens converged at the last; raises
        `ParameterError` for a run without a Phase 1."""
        if self.phase1_iterations is None or self.converged is None:
            raise self._without("a Phase 1")
        return self.phase1_iterations, self.converged

    @property
    def warnings(self) -> list[str]:
        """Figures that are not what they seem, in words; most often none."""
        size, width, rate = self.vocab_size, self.experiment.context_dim, self.contraction_rate or 0
        rank = width * min(x for x in (self.train_er, self.val_er, 1.0) if x is not None)
        guess = f"perplexity over the vocabulary's {size:,}: worse than a guess"
        collapse = f"collapse: contexts in {rank:.1f} of {width} directions"
        grows = f"recurrence amplifies rounding, {rate:.4g} times a token: contexts without a bound"
        # One or two directions are nothing odd where there are four.
        there = (self.val_ppl or 0) > size, rank < 2.5 < width / 2, not rate < 1, self.partial
        said = zip((guess, collapse, grows, "stopped before its end"), there, strict=True)
        return [one for one, true in said if true]

    def _without(self, what: str) -> ParameterError:
        kind = self.experiment.model, self.experiment.contexts
        return ParameterError("model, contexts", kind, f"a run that has {what}")

    def _repr_html_(self) -> str:
        return card.html(self)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON, without the model."""
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        return {**record, "experiment": self.experiment.to_dict()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Result:
        # Nobody need have said this default, and it may be over the most iterations.
        said = dict(x for x in record["experiment"].items() if x != ("phase1_min_iterations", 5))
        return cls(**{**record, "experiment": Experiment(**said)})

    def model(self) -> CVFP | Peer:
        """The trained model with its tokeniser: this run's, or the stored one. Raises
        FileNotFoundError: the model was too large to be stored (over 50 MB) or was deleted."""
        if self._model is None:
            weights = store.read_model(self.key)
            if weights is None:
                words = f"no model is stored for run {self.key}: models over "
                words += f"{store.MODEL_BYTES // 10**6} MB are not; run(experiment, reuse=False) "
                raise FileNotFoundError(f"{words}returns a result that has it")
            corpus = load_corpus(self.experiment)
            tokenizer = load_tokenizer(self.experiment, corpus.fitting)
            self._model = build(self.experiment, weights["embedding"], tokenizer)
            self._model.load_state_dict(weights)
            self._model.to(self.device)
        self._model.__dict__["save_pretrained"] = self.save_pretrained
        return self._model

    def save_pretrained(self, folder: str | Path) -> Path:
        """`cvfp.save_pretrained` of this run; its `model()` has the same method."""
        from cvfp import pretrained  # which takes seconds to import

        return pretrained.save_pretrained(self, folder)

    def row(self) -> dict[str, Any]:
        """One tidy row: the Experiment's fields and the measured scalars."""
        everything = self.to_dict().items()
        measured = {k: v for k, v in everything if isinstance(v, int | float | str | None)}
        lines = {
            f"{name}_{unit}": None if values is None else values[unit]
            for name, values in self.baselines.items()
            for unit in ("ppl", "bpb")
        }
        seconds = {f"seconds_{stage}": value for stage, value in self.seconds.items()}
        measured["warnings"] = "; ".join(self.warnings)
        return {**self.experiment.to_dict(), **measured, **lines, **seconds}


class Results(list[Result]):
    """Results in the order of their Experiments."""

    def frame(self) -> pd.DataFrame:
        """One row per run; units in `column_docs()`."""
        import pandas as pd

        return pd.DataFrame([result.row() for result in self])


def column_docs() -> dict[str, str]:
    """Meaning and unit of the columns of `Results.frame()` that are measured."""
    words = Path(__file__).with_name("columns.toml").read_text(encoding="utf-8")
    docs: dict[str, str] = tomllib.loads(words)
    for name, called in baselines.NAMES.items():
        docs[f"{name}_ppl"] = f"validation perplexity of: {called}"
        docs[f"{name}_bpb"] = f"validation bits per byte of: {called}"
    for stage in ("data", "table", "phase1", "contexts", "phase2", "baselines"):
        docs[f"seconds_{stage}"] = f"wall-clock seconds of the stage {stage}"
    return docs
