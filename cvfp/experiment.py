"""Experiment -> Result: the one path that every notebook, sweep and test runs through."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cvfp import (
    baselines,
    cache,
    contexts,
    controls,
    embeddings,
    end_to_end,
    memory,
    metrics,
    phase1,
    phase2,
    seeds,
    store,
)
from cvfp import data as data_module
from cvfp.config import Experiment, ParameterError, cpu_capabilities
from cvfp.data import Data, Stream
from cvfp.end_to_end import Peer
from cvfp.model import CVFP, ContextBlock, TokenInputs, count_parameters, initialise
from cvfp.progress import Stage

if TYPE_CHECKING:
    import pandas as pd

MEBIBYTE = 2**20
VERSIONS = ("cvfp", "torch", "numpy", "tokenizers")


@dataclass
class Result:
    """What a run measured. `column_docs()` gives the meaning and unit of every column.

    Fields that do not apply are None: never 0 for missing. A run that Phase 1 gave up (`aborted`
    says why) has no Phase 2: no perplexity, and nothing in the lists that come from it. A control
    without contexts, or a peer, has none of their figures.
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
    train_er: float | None
    val_er: float | None
    phase1_iterations: int | None
    converged: float | None
    best_epoch: int | None
    aborted: str | None
    baselines: dict[str, dict[str, float] | None]
    phase1_history: list[dict[str, float]]
    phase2_history: list[dict[str, float]]
    train_spectrum: list[float]
    val_spectrum: list[float]
    val_conversations: list[dict[str, float]]
    val_positions: list[dict[str, float]]
    val_frequencies: list[dict[str, float]]
    context_sweeps: int | None
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
    _model: CVFP | Peer | None = field(default=None, repr=False, compare=False)

    @property
    def ranks(self) -> tuple[float, float]:
        """Effective rank of the training and of the validation contexts, fractions of D.

        Raises:
            ParameterError: a run without contexts.
        """
        if self.train_er is None or self.val_er is None:
            kind = (self.experiment.model, self.experiment.contexts)
            raise ParameterError("model, contexts", kind, "a run that has contexts")
        return self.train_er, self.val_er

    @property
    def phase1_end(self) -> tuple[int, float]:
        """Phase 1's iterations, and the fraction of tokens converged at the last.

        Raises:
            ParameterError: a run without a Phase 1.
        """
        if self.phase1_iterations is None or self.converged is None:
            kind = (self.experiment.model, self.experiment.contexts)
            raise ParameterError("model, contexts", kind, "a run that has a Phase 1")
        return self.phase1_iterations, self.converged

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON, without the model."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("_model", "from_store"):
            del record[name]
        return {**record, "experiment": self.experiment.to_dict()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Result:
        return cls(**{**record, "experiment": Experiment(**record["experiment"])})

    def model(self) -> CVFP | Peer:
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
        import pandas as pd

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


def build(experiment: Experiment, table: Tensor, tokenizer: data_module.Tokenizer) -> CVFP | Peer:
    """The untrained model of an Experiment over `table` [V, E].

    Raises:
        ParameterError: a peer that cannot be matched to CVFP's size.
    """
    if experiment.model != "cvfp":
        size = cvfp_size(experiment, table.shape[1])
        seed = seeds.generator(experiment.seed, "peer").initial_seed()
        return end_to_end.peer(experiment, table, size, seed)
    # Its largest parts, table and head, are made where they are used.
    return build_cvfp(experiment, table.to(experiment.device), tokenizer)


def build_cvfp(
    experiment: Experiment, table: Tensor, tokenizer: data_module.Tokenizer | None = None
) -> CVFP:
    """The untrained CVFP of an Experiment over `table` [V, E], on the table's device."""
    with table.device:
        model = _blank(experiment, table, tokenizer)
    initialise(model.context_block, seeds.generator(experiment.seed, "context_block"))
    initialise(model.token_block, seeds.generator(experiment.seed, "token_block"))
    if experiment.contexts == "window":
        controls.level_window(model, experiment.context_dim)
    return model


def cvfp_size(experiment: Experiment, embedding_dim: int) -> int:
    """Parameters of the Experiment's ContextBlock and TokenBlock: what a peer is matched to."""
    with torch.device("meta"):
        model = _blank(experiment, torch.empty(1, embedding_dim))
    return count_parameters(model.context_block) + count_parameters(model.token_block)


def _blank(
    experiment: Experiment, table: Tensor, tokenizer: data_module.Tokenizer | None = None
) -> CVFP:
    """A CVFP whose blocks are not initialised yet."""
    model = CVFP(
        table,
        num_layers=experiment.num_layers,
        context_dim=experiment.context_dim,
        num_input_tokens=experiment.num_input_tokens,
        token_input_all_layers=experiment.token_input_all_layers,
        weight_tying=experiment.weight_tying,
        freeze_embedding=experiment.freeze_embedding,
        tokenizer=tokenizer,
        context_widths=controls.context_widths(experiment, table.shape[1]),
        generates=experiment.contexts in ("trained", "random", "end_to_end"),
    )
    if experiment.contexts == "end_to_end":
        model.context_table = None  # no Phase 1 that the table would have to stay as it was for
    return model


@dataclass
class Learned:
    """What training leaves, whatever the model."""

    second: phase2.Phase2 | None
    parameters: dict[str, int]
    first: phase1.Phase1 | None = None
    from_store: bool = False
    train_spectrum: Tensor | None = None
    validation: contexts.Contexts | None = None
    recurrence: contexts.Recurrence | None = None

    def rank(self, spectrum: Tensor | None, width: int) -> float | None:
        return None if spectrum is None else metrics.effective_rank(spectrum) / width

    @property
    def val_spectrum(self) -> Tensor | None:
        return None if self.validation is None else metrics.singular_values(self.validation.values)


def run(experiment: Experiment, *, reuse: bool = True) -> Result:
    """An Experiment, both phases of it where it has two, measured and stored; the same Experiment
    returns at once.

    Args:
        reuse: take a finished run or Phase 1 from the store; False measures anew, and stores.

    Raises:
        ParameterError: a field that does not fit the machine or the data, before any training.
        FloatingPointError: training diverged, or the exact contexts did not converge.
    """
    experiment = experiment.resolved()
    memory.asked_place()  # raises now, not after a table has been fitted
    watch = Watch(experiment.device)
    data, table = prepare(experiment, watch)
    fingerprints = data.fingerprint, table.fingerprint
    key = store.key(experiment, *fingerprints)
    record = store.read_run(key) if reuse else None
    if record is not None:
        # The fields that made no number (a path, say) are the caller's.
        result = Result.from_dict({**record, "experiment": experiment.to_dict()})
        result.from_store = True
        return result

    model = build(experiment, table.weight, data.tokenizer).to(experiment.device)
    if isinstance(model, Peer):
        learned = _peer(experiment, model, data, watch)
    elif experiment.contexts == "end_to_end":
        learned = _end_to_end(experiment, model, data, watch)
    else:
        phase1_key = store.key(experiment, *fingerprints, phase1=True)
        with Background(experiment.device) as background:
            learned = _two_phases(experiment, model, data, phase1_key, watch, reuse, background)
    with watch("baselines"):
        lines = _baselines(data, table)

    first, second, recurrence = learned.first, learned.second, learned.recurrence
    validation, width = learned.validation, experiment.context_dim
    train_spectrum, val_spectrum = learned.train_spectrum, learned.val_spectrum
    predicted = len(data.validation) - 1
    val_bytes = data.tokenizer.count_bytes(data.validation.tokens[1:])
    judged = None if second is None else second.validation
    result = Result(
        key=key,
        experiment=experiment,
        train_tokens=len(data.train),
        val_tokens=len(data.validation),
        vocab_size=len(table.weight),
        embedding_dim=table.weight.shape[1],
        parameters=learned.parameters,
        val_ppl=None if judged is None else metrics.perplexity(judged.loss),
        val_acc=None if judged is None else judged.accuracy,
        val_bpb=None
        if judged is None
        else metrics.bits_per_byte(float(judged.nats.sum()), val_bytes),
        train_ppl=None if second is None else metrics.perplexity(second.train_loss),
        train_er=learned.rank(train_spectrum, width),
        val_er=learned.rank(val_spectrum, width),
        phase1_iterations=None if first is None else first.iterations,
        converged=None if first is None else first.converged,
        best_epoch=None if second is None else second.best_epoch,
        aborted=None if first is None else first.aborted,
        baselines={
            name: None
            if loss is None
            else {
                "ppl": metrics.perplexity(loss),
                "bpb": metrics.bits_per_byte(loss * predicted, val_bytes),
            }
            for name, loss in lines.items()
        },
        phase1_history=[] if first is None else first.history,
        phase2_history=[] if second is None else second.history,
        train_spectrum=[] if train_spectrum is None else train_spectrum.tolist(),
        val_spectrum=[] if val_spectrum is None else val_spectrum.tolist(),
        val_conversations=[] if judged is None else _by_conversation(data.validation, judged),
        val_positions=[] if judged is None else _by_position(data.validation, judged),
        val_frequencies=[] if judged is None else _by_frequency(data, judged),
        context_sweeps=None if validation is None else validation.sweeps,
        context_error=None
        if validation is None or not math.isfinite(validation.error_bound)
        else validation.error_bound,
        contraction_rate=None if recurrence is None else recurrence.contraction_rate,
        memory_length=None if recurrence is None else recurrence.memory_length,
        seconds=watch.seconds,
        phase1_from_store=learned.from_store,
        **watch.peaks(),
        device=experiment.device,
        device_name=_device_name(experiment.device),
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


def _two_phases(
    experiment: Experiment,
    model: CVFP,
    data: Data,
    key: str,
    watch: Watch,
    reuse: bool,
    background: Background,
) -> Learned:
    """CVFP as it is, and the controls that differ from it in what Phase 2 reads.

    Args:
        key: of its Phase 1 in the store.
    """
    device, kind = experiment.device, experiment.contexts
    train_tokens, val_tokens = data.train.tokens.to(device), data.validation.tokens.to(device)
    learned = Learned(None, controls.parameter_counts(model, experiment))
    if kind in ("trained", "shuffled"):
        learned.first, learned.from_store = _phase1(
            experiment, model, train_tokens, val_tokens, key, watch, reuse, background
        )
        if learned.first.aborted is not None:
            kind = "trained"  # what there is of it is measured
    train_contexts = val_contexts = None
    if kind in ("trained", "random", "shuffled"):
        with watch("contexts"):
            block = model.context_block
            val_inputs = model.context_inputs(val_tokens)
            learned.validation = exact_contexts(block, val_inputs)
            val_contexts = learned.validation.values
            learned.recurrence = contexts.diagnose(block, val_inputs, val_contexts)
            if learned.first is None or experiment.training_contexts == "exact":
                train_contexts = exact_contexts(block, model.context_inputs(train_tokens)).values
            else:
                train_contexts = learned.first.contexts
            learned.train_spectrum = metrics.singular_values(train_contexts, device)
    if learned.first is not None and learned.first.aborted is not None:
        return learned
    with _phase2_stage(experiment, data, watch) as (report, tick):
        learned.second = phase2.train(
            controls.positions(
                model, train_contexts, train_tokens, experiment, experiment.precision
            ),
            controls.positions(model, val_contexts, val_tokens, experiment),
            experiment,
            seeds.generator(experiment.seed, "batches"),
            report,
            tick,
        )
    return learned


def _end_to_end(experiment: Experiment, model: CVFP, data: Data, watch: Watch) -> Learned:
    train_tokens = data.train.tokens.to(experiment.device)
    val_tokens = data.validation.tokens.to(experiment.device)
    with _phase2_stage(experiment, data, watch) as (report, tick):
        second = end_to_end.train(
            model,
            end_to_end.Unrolled(model),
            lambda: end_to_end.judge(model, val_tokens),
            train_tokens,
            experiment,
            seeds.generator(experiment.seed, "batches"),
            report,
            tick,
        )
    with watch("contexts"):
        block, inputs = model.context_block, model.context_inputs(val_tokens)
        validation = exact_contexts(block, inputs)
        train_contexts = exact_contexts(block, model.context_inputs(train_tokens)).values
        return Learned(
            second,
            model.parameter_counts(),
            train_spectrum=metrics.singular_values(train_contexts),
            validation=validation,
            recurrence=contexts.diagnose(block, inputs, validation.values),
        )


def _peer(experiment: Experiment, model: Peer, data: Data, watch: Watch) -> Learned:
    tokens = data.validation.tokens.to(experiment.device)
    with _phase2_stage(experiment, data, watch) as (report, tick):
        second = end_to_end.train(
            model,
            model.read,
            lambda: model.judge(tokens, experiment.num_input_tokens),
            data.train.tokens.to(experiment.device),
            experiment,
            seeds.generator(experiment.seed, "batches"),
            report,
            tick,
        )
    return Learned(second, model.parameter_counts())


@contextlib.contextmanager
def _phase2_stage(
    experiment: Experiment, data: Data, watch: Watch
) -> Iterator[tuple[Callable[[dict[str, float]], None], Callable[[int], None]]]:
    batches = experiment.phase2_epochs * len(data.train)
    with watch("phase2"), Stage("Phase 2", batches, unit="tok") as stage:
        yield lambda row: stage.advance(0, row), stage.advance


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


def _baselines(data: Data, table: embeddings.Table) -> dict[str, float | None]:
    """What `baselines.evaluate` gives; kept with the data and the table, for all runs on them."""
    model = table.bigram
    weights = [] if model is None else [model.table, model.weight, model.bias]
    code = cache.code_fingerprint("baselines", "embeddings")
    key = cache.digest(data.fingerprint, *weights, code)
    kept = store.read_baselines(key)
    if kept is None:
        kept = baselines.evaluate(data, model)
        store.write_baselines(key, kept)
    return kept


def _phase1(
    experiment: Experiment,
    model: CVFP,
    tokens: Tensor,
    val_tokens: Tensor,
    key: str,
    watch: Watch,
    reuse: bool,
    background: Background,
) -> tuple[phase1.Phase1, bool]:
    """Phase 1 trained into `model` and being stored in the background, or taken from the store;
    and whether it was."""
    kept = store.read_phase1(key) if reuse else None
    if kept is not None:
        weights, mapped, record = kept
        total, width = mapped.shape
        rows = memory.rows(total, width, mapped.dtype, torch.device(experiment.device))
        made = phase1.Phase1(rows.copy_(mapped), **record["phase1"])
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
    record = {f.name: getattr(made, f.name) for f in fields(made) if f.name != "contexts"}
    record = {"phase1": record, "seconds": watch.seconds["phase1"]}
    block = model.context_block.state_dict()
    weights = {name: tensor.to("cpu", copy=True) for name, tensor in block.items()}
    background.submit(store.write_phase1, key, weights, made.contexts, record)
    return made, False


def _by_conversation(stream: Stream, evaluation: phase2.Evaluation) -> list[dict[str, float]]:
    """Predicted tokens, their nats and how many were right, for each conversation."""
    return _sums(_conversation(stream), len(stream.starts), evaluation)


def _by_position(stream: Stream, evaluation: phase2.Evaluation) -> list[dict[str, float]]:
    """The same by the predicted token's place in its conversation: 0-3, 4-7, 8-15, …"""
    places = torch.arange(1, len(stream)) - stream.starts[_conversation(stream)]
    edges = [0, *(2**power for power in range(2, int(places.max()).bit_length()))]
    return _binned(places, edges, evaluation)


def _by_frequency(data: Data, evaluation: phase2.Evaluation) -> list[dict[str, float]]:
    """The same by how often the predicted token is in the training stream: 0, 1-9, 10-99, …"""
    counts = torch.bincount(data.train.tokens, minlength=data.vocab_size)
    seen = counts[data.validation.tokens[1:]]
    edges = [0, *(10**power for power in range(len(str(int(seen.max())))))]
    return _binned(seen, edges, evaluation)


def _conversation(stream: Stream) -> Tensor:
    """Of which conversation tokens 1 … T-1 are."""
    return torch.bucketize(torch.arange(1, len(stream)), stream.starts, right=True) - 1


def _binned(
    values: Tensor, edges: list[int], evaluation: phase2.Evaluation
) -> list[dict[str, float]]:
    which = torch.bucketize(values, torch.tensor(edges), right=True) - 1
    rows = _sums(which, len(edges), evaluation)
    return [
        {"low": float(low), **row} for low, row in zip(edges, rows, strict=True) if row["tokens"]
    ]


def _sums(which: Tensor, count: int, evaluation: phase2.Evaluation) -> list[dict[str, float]]:
    zeros = torch.zeros(count, dtype=torch.float64)
    sums = [
        zeros.index_add(0, which, values.double())
        for values in (torch.ones_like(evaluation.nats), evaluation.nats, evaluation.correct)
    ]
    return [
        {"tokens": float(t), "nats": float(n), "correct": float(c)}
        for t, n, c in zip(*sums, strict=True)
    ]


class Background:
    """Work that goes on beside training on a GPU; leaving the block waits for it and raises its
    errors. On a CPU it is done at once: a second thread that computes there halves the speed of the
    first, for OpenMP then puts waiting threads to sleep."""

    def __init__(self, device: str) -> None:
        self.beside = device == "cuda"

    def __enter__(self) -> Background:
        self.pool = ThreadPoolExecutor(1)
        self.work: list[Future[None]] = []
        return self

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        if self.beside:
            self.work.append(self.pool.submit(work, *arguments))
        else:
            work(*arguments)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.pool.shutdown()  # an error of training does not lose Phase 1
        if kind is None:
            for one in self.work:
                one.result()


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
