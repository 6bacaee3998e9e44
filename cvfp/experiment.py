"""Experiment -> Result: the one path that every notebook, sweep and test runs through."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from cvfp import baselines, cache, contexts, embeddings, metrics, phase1, phase2, seeds, store
from cvfp import data as data_module
from cvfp.config import Experiment, cpu_capabilities
from cvfp.data import Data, Stream
from cvfp.model import CVFP, ContextBlock, TokenInputs, initialise
from cvfp.progress import Stage

MEBIBYTE = 2**20
VERSIONS = ("cvfp", "torch", "numpy", "tokenizers")


@dataclass
class Result:
    """What a run measured. `column_docs()` gives the meaning and unit of every column.

    Fields that do not apply are None: never 0 for missing. A run that Phase 1 gave up (`aborted`
    says why) has no Phase 2: no perplexity, and nothing in the lists that come from it.
    """

    key: str
    experiment: Experiment
    train_tokens: int
    val_tokens: int
    vocab_size: int
    embedding_dim: int
    parameters: dict[str, int]
    val_ppl: float | None
    val_acc: float | None
    val_bpb: float | None
    train_ppl: float | None
    train_er: float
    val_er: float
    phase1_iterations: int
    converged: float
    best_epoch: int | None
    aborted: str | None
    baselines: dict[str, dict[str, float] | None]
    phase1_history: list[dict[str, float]]
    phase2_history: list[dict[str, float]]
    train_spectrum: list[float]
    val_spectrum: list[float]
    val_conversations: list[dict[str, float]]
    context_sweeps: int
    context_error: float | None
    contraction_rate: float | None
    memory_length: int | None
    seconds: dict[str, float]
    phase1_from_store: bool
    peak_memory_mib: float
    peak_device_memory_mib: float | None
    device: str
    device_name: str
    precision: str
    threads: int
    versions: dict[str, str]
    from_store: bool = field(default=False, compare=False)
    _model: CVFP | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON, without the model."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("_model", "from_store"):
            del record[name]
        return {**record, "experiment": self.experiment.to_dict()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Result:
        return cls(**{**record, "experiment": Experiment(**record["experiment"])})

    def model(self) -> CVFP:
        """The trained model with its tokeniser: this run's, or the one kept in the store.

        Raises:
            FileNotFoundError: the model was too large to keep (over 50 MB) or has been deleted.
        """
        if self._model is None:
            weights = store.read_model(self.key)
            if weights is None:
                raise FileNotFoundError(
                    f"no model is kept for run {self.key}: models over "
                    f"{store.MODEL_BYTES // 10**6} MB are not; run(experiment, reuse=False) "
                    "returns a result that has it"
                )
            corpus = data_module.load_corpus(self.experiment)
            tokenizer = data_module.load_tokenizer(self.experiment, corpus.fitting)
            self._model = build(self.experiment, weights["embedding"], tokenizer)
            self._model.load_state_dict(weights)
            self._model.to(self.device)
        return self._model

    def row(self) -> dict[str, Any]:
        """One tidy row: the Experiment's fields and the measured scalars."""
        measured = {
            name: value
            for name, value in self.to_dict().items()
            if isinstance(value, (int, float, str)) or value is None
        }
        lines = {
            f"{name}_{unit}": None if values is None else values[unit]
            for name, values in self.baselines.items()
            for unit in ("ppl", "bpb")
        }
        seconds = {f"seconds_{stage}": value for stage, value in self.seconds.items()}
        return {**self.experiment.to_dict(), **measured, **lines, **seconds}


class Results(list[Result]):
    """Results in the order of their Experiments."""

    def frame(self) -> pd.DataFrame:
        """One row per run; units in `column_docs()`."""
        return pd.DataFrame([result.row() for result in self])


def column_docs() -> dict[str, str]:
    """Meaning and unit of the columns of `Results.frame()` that are measured."""
    docs = {
        "key": "content key of the run in the store",
        "train_tokens": "tokens in the training stream",
        "val_tokens": "tokens in the validation stream",
        "val_ppl": "validation perplexity, exp(mean nats per token), at the best epoch, float32",
        "val_acc": "validation top-1 accuracy, fraction",
        "val_bpb": "validation bits per byte of UTF-8 text",
        "train_ppl": "perplexity of the training batches during the best epoch (weights moving)",
        "train_er": "effective rank of the training contexts that Phase 2 reads, fraction of D",
        "val_er": "effective rank of the exact validation contexts, fraction of D",
        "phase1_iterations": "Phase 1 iterations, the initial contexts counted as number 1",
        "converged": "fraction of training tokens converged at the last iteration",
        "aborted": "why Phase 1 gave the run up (phase1_abort); null: it did not",
        "best_epoch": "Phase 2 epoch with the lowest validation loss, from 1",
        "context_sweeps": "sweeps of the exact evaluation of the validation contexts",
        "context_error": "bound on the error of any of them, relative to its norm, before rounding",
        "contraction_rate": "factor per token by which nearby trajectories of contexts approach",
        "memory_length": "tokens after which a context restarted from zeros is within 1 %; "
        "null if not within 256",
        "peak_memory_mib": "largest resident memory of the process during the run, MiB",
        "peak_device_memory_mib": "largest memory allocated on the GPU, MiB; null without one",
        "threads": "CPU threads",
    }
    for name, words in baselines.NAMES.items():
        docs[f"{name}_ppl"] = f"validation perplexity of: {words}"
        docs[f"{name}_bpb"] = f"validation bits per byte of: {words}"
    for stage in ("data", "table", "phase1", "contexts", "phase2", "baselines"):
        docs[f"seconds_{stage}"] = f"wall-clock seconds of the stage {stage}"
    return docs


def build(experiment: Experiment, table: Tensor, tokenizer: data_module.Tokenizer) -> CVFP:
    """The untrained model of an Experiment over `table` [V, E], on the CPU."""
    model = CVFP(
        table,
        num_layers=experiment.num_layers,
        context_dim=experiment.context_dim,
        num_input_tokens=experiment.num_input_tokens,
        token_input_all_layers=experiment.token_input_all_layers,
        weight_tying=experiment.weight_tying,
        freeze_embedding=experiment.freeze_embedding,
        tokenizer=tokenizer,
    )
    initialise(model.context_block, seeds.generator(experiment.seed, "context_block"))
    initialise(model.token_block, seeds.generator(experiment.seed, "token_block"))
    return model


def run(experiment: Experiment, *, reuse: bool = True) -> Result:
    """Both phases of an Experiment, measured and stored; the same Experiment returns at once.

    Args:
        reuse: take a finished run or Phase 1 from the store; False measures anew, and stores.

    Raises:
        ParameterError: a field that does not fit the machine or the data, before any training.
        FloatingPointError: training diverged, or the exact contexts did not converge.
    """
    experiment = experiment.resolved()
    watch = Watch(experiment.device)
    data, table = prepare(experiment, watch)
    fingerprints = data.fingerprint, cache.digest(table.weight)
    key = store.key(experiment, *fingerprints)
    record = store.read_run(key) if reuse else None
    if record is not None:
        # The fields that made no number (a path, say) are the caller's.
        result = Result.from_dict({**record, "experiment": experiment.to_dict()})
        result.from_store = True
        return result

    device = experiment.device
    model = build(experiment, table.weight, data.tokenizer).to(device)
    train_tokens = data.train.tokens.to(device)
    val_tokens = data.validation.tokens.to(device)
    phase1_key = store.key(experiment, *fingerprints, phase1=True)
    first, from_store = _phase1(
        experiment, model, train_tokens, val_tokens, phase1_key, watch, reuse
    )

    with watch("contexts"):
        block = model.context_block
        val_inputs = model.context_inputs(val_tokens)
        validation = exact_contexts(block, val_inputs)
        recurrence = contexts.diagnose(block, val_inputs, validation.values)
        train_contexts = first.contexts
        if experiment.training_contexts == "exact":
            train_contexts = exact_contexts(block, model.context_inputs(train_tokens)).values
        train_spectrum = metrics.singular_values(train_contexts)
        val_spectrum = metrics.singular_values(validation.values)

    second = None
    if first.aborted is None:
        batches = experiment.phase2_epochs * len(train_tokens)
        with watch("phase2"), Stage("Phase 2", batches, unit="tok") as stage:
            second = phase2.train(
                model,
                train_contexts,
                train_tokens,
                validation.values,
                val_tokens,
                experiment,
                seeds.generator(experiment.seed, "batches"),
                report=lambda row: stage.advance(0, row),
                tick=stage.advance,
            )
    with watch("baselines"):
        lines = baselines.evaluate(data, table.bigram)

    predicted = len(data.validation) - 1
    val_bytes = data.tokenizer.count_bytes(data.validation.tokens[1:])
    result = Result(
        key=key,
        experiment=experiment,
        train_tokens=len(data.train),
        val_tokens=len(data.validation),
        vocab_size=len(table.weight),
        embedding_dim=table.weight.shape[1],
        parameters=model.parameter_counts(),
        val_ppl=None if second is None else metrics.perplexity(second.validation.loss),
        val_acc=None if second is None else second.validation.accuracy,
        val_bpb=None
        if second is None
        else metrics.bits_per_byte(float(second.validation.nats.sum()), val_bytes),
        train_ppl=None if second is None else metrics.perplexity(second.train_loss),
        train_er=metrics.effective_rank(train_spectrum) / experiment.context_dim,
        val_er=metrics.effective_rank(val_spectrum) / experiment.context_dim,
        phase1_iterations=first.iterations,
        converged=first.converged,
        best_epoch=None if second is None else second.best_epoch,
        aborted=first.aborted,
        baselines={
            name: None
            if loss is None
            else {
                "ppl": metrics.perplexity(loss),
                "bpb": metrics.bits_per_byte(loss * predicted, val_bytes),
            }
            for name, loss in lines.items()
        },
        phase1_history=first.history,
        phase2_history=[] if second is None else second.history,
        train_spectrum=train_spectrum.tolist(),
        val_spectrum=val_spectrum.tolist(),
        val_conversations=[]
        if second is None
        else _by_conversation(data.validation, second.validation),
        context_sweeps=validation.sweeps,
        context_error=validation.error_bound if math.isfinite(validation.error_bound) else None,
        contraction_rate=recurrence.contraction_rate,
        memory_length=recurrence.memory_length,
        seconds=watch.seconds,
        phase1_from_store=from_store,
        **watch.peaks(),
        device=device,
        device_name=_device_name(device),
        precision=experiment.precision,
        threads=torch.get_num_threads(),
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in VERSIONS},
        },
        _model=model,
    )
    store.write_model(key, model.state_dict())
    store.write_run(key, result.to_dict())
    return result


def prepare(experiment: Experiment, watch: Watch | None = None) -> tuple[Data, embeddings.Table]:
    """Token streams and embedding table of an Experiment, made or from the cache.

    Raises:
        ParameterError: a field that does not fit the data; whatever can be wrong shows here.
    """
    watch = watch or Watch(experiment.device)
    with watch("data"):
        data = data_module.load(experiment)
    with watch("table"), Stage("Table", embeddings.FIT_STEPS, every=10) as stage:
        table = embeddings.load(experiment, data, lambda row: stage.advance(1, row))
    return data, table


def exact_contexts(block: ContextBlock, inputs: TokenInputs) -> contexts.Contexts:
    """The contexts of a stream from a zero state, exact to float32.

    Raises:
        FloatingPointError: they did not converge.
    """
    made = contexts.evaluate(block, inputs)
    if not made.converged:
        last = made.residuals[-1]["relative"]
        raise FloatingPointError(
            f"the exact contexts did not converge in {made.sweeps} sweeps (relative residual "
            f"{last:.2g}); a ContextBlock that contracts would be accepted: check "
            "phase1_learning_rate, num_layers and token_input_all_layers"
        )
    return made


def _phase1(
    experiment: Experiment,
    model: CVFP,
    tokens: Tensor,
    val_tokens: Tensor,
    key: str,
    watch: Watch,
    reuse: bool,
) -> tuple[phase1.Phase1, bool]:
    """Phase 1 trained into `model`, or taken from the store; and whether it was."""
    kept = store.read_phase1(key) if reuse else None
    if kept is not None:
        weights, record = kept
        made = phase1.Phase1(weights.pop("contexts").to(experiment.device), **record["phase1"])
        model.context_block.load_state_dict(weights)
        watch.seconds["phase1"] = record["seconds"]
        return made, True

    def rank() -> dict[str, float]:
        block = model.context_block
        exact = contexts.evaluate(block, model.context_inputs(val_tokens))
        if not exact.converged:
            return {}
        spectrum = metrics.singular_values(exact.values)
        return {"val_er": metrics.effective_rank(spectrum) / experiment.context_dim}

    total = experiment.phase1_max_iterations - 1
    with watch("phase1"), Stage("Phase 1", total, every=10) as stage:
        made = phase1.train(
            model.context_block,
            model.context_inputs(tokens),
            experiment,
            seeds.generator(experiment.seed, "phase1", experiment.device),
            report=lambda row: stage.advance(
                1, {name: row[name] for name in ("iteration", "loss", "converged")}
            ),
            probe=rank,
        )
    record = asdict(made)
    del record["contexts"]
    tensors = {**model.context_block.state_dict(), "contexts": made.contexts}
    store.write_phase1(key, tensors, {"phase1": record, "seconds": watch.seconds["phase1"]})
    return made, False


def _by_conversation(stream: Stream, evaluation: phase2.Evaluation) -> list[dict[str, float]]:
    """Predicted tokens, their nats and how many were right, for each conversation."""
    # Prediction i is of token i + 1.
    which = torch.bucketize(torch.arange(1, len(stream)), stream.starts, right=True) - 1
    zeros = torch.zeros(len(stream.starts), dtype=torch.float64)
    sums = [
        zeros.index_add(0, which, values.double())
        for values in (torch.ones_like(evaluation.nats), evaluation.nats, evaluation.correct)
    ]
    return [
        {"tokens": float(t), "nats": float(n), "correct": float(c)}
        for t, n, c in zip(*sums, strict=True)
    ]


class Watch:
    """Seconds per stage and peak memory of a run."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        # Linux: start the high-water mark of resident memory anew.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds[stage] = time.perf_counter() - start

    def peaks(self) -> dict[str, Any]:
        device = torch.cuda.max_memory_allocated() / MEBIBYTE if self.device == "cuda" else None
        return {"peak_memory_mib": _peak_resident_mib(), "peak_device_memory_mib": device}


def _peak_resident_mib() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MEBIBYTE if sys.platform == "darwin" else 1024)


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return str(cpu_capabilities().get("cpu_name") or platform.machine())
