"""Experiment -> Result: the one path that every notebook, sweep and test runs through."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cvfp import (
    abort,
    baselines,
    cache,
    contexts,
    controls,
    embeddings,
    end_to_end,
    metrics,
    ops,
    phase1,
    phase2,
    registry,
    seeds,
    store,
)
from cvfp import data as data_module
from cvfp.build import build
from cvfp.config import Experiment
from cvfp.data import Data, Stream
from cvfp.end_to_end import Peer
from cvfp.inputs import TokenInputs
from cvfp.model import CVFP, Block
from cvfp.ops import placement
from cvfp.progress import Stage
from cvfp.recurrence import Recurrence, diagnose
from cvfp.result import Result
from cvfp.version import __version__
from cvfp.watch import Background, Watch, device_name

VERSIONS = ("torch", "numpy", "tokenizers")


@dataclass
class Learned:
    """What training leaves, whatever the model."""

    second: phase2.Phase2 | None
    parameters: dict[str, int]
    first: phase1.Phase1 | None = None
    from_store: bool = False
    train_spectrum: Tensor | None = None
    val_spectrum: Tensor | None = None
    validation: contexts.Contexts | None = None
    recurrence: Recurrence | None = None

    def rank(self, spectrum: Tensor | None, width: int) -> float | None:
        return None if spectrum is None else metrics.effective_rank(spectrum) / width


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
    placement.asked_place()  # raises now, not after a table has been fitted
    with ops.using(experiment.ops):
        return _run(experiment, reuse)


def _run(experiment: Experiment, reuse: bool) -> Result:
    watch = Watch(experiment.device)
    data, table = prepare(experiment, watch)
    fingerprints = data.fingerprint, table.fingerprint
    key = store.key(experiment, *fingerprints)
    untold = [kind for kind, one in registry.sources(experiment).items() if one is None]
    stored = not untold
    for kind in untold:
        part = f"{kind} {getattr(experiment, kind)!r}"
        warnings.warn(
            f"{part}: its source, or that of what it names, cannot be read, so this run is neither "
            "taken from the store nor stored",
            stacklevel=3,
        )
    record = store.read_run(key) if reuse and stored else None
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
        phase1_key = store.key(experiment, *fingerprints, phase1=True) if stored else None
        with Background(experiment.device) as background:
            learned = _two_phases(experiment, model, data, phase1_key, watch, reuse, background)
    with watch("baselines"):
        lines = _baselines(data, table)

    first, second, recurrence = learned.first, learned.second, learned.recurrence
    validation, width = learned.validation, experiment.context_dim
    train_spectrum, val_spectrum = learned.train_spectrum, learned.val_spectrum
    predicted = len(data.validation) - 1
    val_bytes = int(data.validation.text_bytes[1:].sum())
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
        loses_text=data.loses_text,
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
        device_name=device_name(experiment.device),
        precision=experiment.precision,
        threads=torch.get_num_threads(),
        versions={
            "python": platform.python_version(),
            "cvfp": __version__,
            **{name: importlib.metadata.version(name) for name in VERSIONS},
        },
        _model=model,
    )
    if stored:
        store.write_model(key, model.state_dict())
        store.write_run(key, result.to_dict())
    return result


def _two_phases(
    experiment: Experiment,
    model: CVFP,
    data: Data,
    key: str | None,
    watch: Watch,
    reuse: bool,
    background: Background,
) -> Learned:
    """CVFP as it is, and the controls that differ from it in what Phase 2 reads.

    Args:
        key: of its Phase 1 in the store; None: it is not stored.
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
            learned.val_spectrum = metrics.singular_values(val_contexts)
            learned.recurrence = diagnose(block, val_inputs, val_contexts)
            if learned.first is None or experiment.training_contexts == "exact":
                train_contexts = exact_contexts(block, model.context_inputs(train_tokens)).values
            else:
                train_contexts = learned.first.contexts
            learned.train_spectrum = metrics.singular_values(train_contexts, device)
    if kind not in registry.CONTEXTS:
        with watch("contexts"):
            train_contexts = _own_contexts(model, train_tokens, experiment)
            val_contexts = _own_contexts(model, val_tokens, experiment)
            learned.train_spectrum = metrics.singular_values(train_contexts, device)
            learned.val_spectrum = metrics.singular_values(val_contexts, device)
    if learned.first is not None and learned.first.aborted is not None:
        return learned
    with _phase2_stage(experiment, data, watch) as (report, tick):
        learned.second = phase2.train(
            controls.positions(model, train_contexts, train_tokens, experiment),
            controls.positions(model, val_contexts, val_tokens, experiment),
            experiment,
            seeds.generator(experiment.seed, "batches"),
            report,
            tick,
        )
    return learned


def _own_contexts(model: CVFP, tokens: Tensor, experiment: Experiment) -> Tensor:
    """What the own part of that name makes of a stream: [T, D]."""
    made = registry.resolve("contexts", experiment.contexts)(model, tokens, experiment)
    shape = len(tokens), experiment.context_dim
    return registry.check_contexts(experiment.contexts, made, shape).to(model.embedding)


def _end_to_end(experiment: Experiment, model: CVFP, data: Data, watch: Watch) -> Learned:
    train_tokens = data.train.tokens.to(experiment.device)
    val_tokens = data.validation.tokens.to(experiment.device)
    with _phase2_stage(experiment, data, watch) as (report, tick):
        second = end_to_end.train(
            model,
            end_to_end.Unrolled(model),
            lambda: end_to_end.evaluate(model, val_tokens),
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
            controls.parameter_counts(model, experiment),
            train_spectrum=metrics.singular_values(train_contexts),
            val_spectrum=metrics.singular_values(validation.values),
            validation=validation,
            recurrence=diagnose(block, inputs, validation.values),
        )


def _peer(experiment: Experiment, model: Peer, data: Data, watch: Watch) -> Learned:
    tokens = data.validation.tokens.to(experiment.device)
    with _phase2_stage(experiment, data, watch) as (report, tick):
        second = end_to_end.train(
            model,
            model.read,
            lambda: model.evaluate(tokens, experiment.num_input_tokens),
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


def exact_contexts(block: Block, inputs: TokenInputs) -> contexts.Contexts:
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
    key: str | None,
    watch: Watch,
    reuse: bool,
    background: Background,
) -> tuple[phase1.Phase1, bool]:
    """Phase 1 trained into `model` and being stored in the background, or taken from the store;
    and whether it was."""
    kept = store.read_phase1(key) if reuse and key else None
    if kept is not None:
        weights, mapped, record = kept
        total, width = mapped.shape
        rows = placement.rows(total, width, mapped.dtype, torch.device(experiment.device))
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

    history: list[dict[str, float]] = []

    def follow(row: dict[str, float]) -> str | None:
        history.append(row)
        stage.advance(1, {name: row[name] for name in ("iteration", "loss", "converged")})
        if row["iteration"] != abort.ITERATION:
            return None
        row |= rank()
        return abort.reason(history) if experiment.phase1_abort else None

    total = experiment.phase1_max_iterations - 1
    with watch("phase1"), Stage("Phase 1", total, every=10) as stage:
        made = phase1.train(
            model.context_block,
            model.context_inputs(tokens),
            experiment,
            seeds.generator(experiment.seed, "phase1", experiment.device),
            report=follow,
        )
    record = {f.name: getattr(made, f.name) for f in fields(made) if f.name != "contexts"}
    record = {"phase1": record, "seconds": watch.seconds["phase1"]}
    block = model.context_block.state_dict()
    weights = {name: tensor.to("cpu", copy=True) for name, tensor in block.items()}
    if key:
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
