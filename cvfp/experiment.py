"""Experiment -> Result: the one path that every notebook, sweep and test runs through."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

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
from cvfp.data import Data
from cvfp.end_to_end import Peer
from cvfp.inputs import TokenInputs
from cvfp.model import CVFP, Block
from cvfp.ops import placement
from cvfp.progress import Stage
from cvfp.recurrence import diagnose
from cvfp.result import Result
from cvfp.version import __version__
from cvfp.watch import Background, Watch, device_name

VERSIONS = ("torch", "numpy", "tokenizers")
# Phase 2, if there was one, and the Result's other figures by name.
Trained = tuple[phase2.Phase2 | None, dict[str, Any]]


def run(experiment: Experiment, *, reuse: bool = True) -> Result:
    """Train and evaluate what the Experiment describes, and store the Result; the same Experiment
    returns it at once.

    Args:
        reuse: load a finished run or Phase 1 from the store; False: train again, and store.

    Raises:
        ParameterError: a field that does not fit the machine or the data, before any training.
        FloatingPointError: training diverged, or the exact contexts did not converge.
    """
    cache.check_home()
    experiment = experiment.resolved()
    placement.asked_place()  # raises now, not after a table has been fitted
    with ops.using(experiment.ops), ExitStack() as held:
        return _run(experiment, reuse, held)


def _run(experiment: Experiment, reuse: bool, held: ExitStack) -> Result:
    watch = Watch(experiment.device)
    data, table = prepare(experiment, watch)
    fingerprints = data.fingerprint, table.fingerprint
    key = store.key(experiment, *fingerprints)
    unread = [kind for kind, one in registry.sources(experiment).items() if one is None]
    stored = not unread
    for kind in unread:
        part = f"{kind} {getattr(experiment, kind)!r}"
        warnings.warn(
            f"{part}: its source, or that of what it names, cannot be read, so this run is neither "
            "taken from the store nor stored",
            stacklevel=3,
        )
    if reuse and stored:  # other processes with the same Experiment wait for this one's result
        held.enter_context(cache.alone(cache.home() / "runs" / key))
    record = store.read_run(key) if reuse and stored else None
    if record is not None:
        # The fields that are no part of the key (a path, say) are the caller's.
        result = Result.from_dict({**record, "experiment": experiment.to_dict()})
        result.from_store = True
        return result

    model = build(experiment, table.weight, data.tokenizer).to(experiment.device)
    phase1_key = store.key(experiment, *fingerprints, phase1=True) if stored else None
    with Background(experiment.device) as background:
        training = _Training(experiment, data, phase1_key, watch, reuse, background, held)
        if isinstance(model, Peer) or experiment.contexts == "end_to_end":
            second, measured = training.unrolled(model)
        else:
            second, measured = training.two_phases(model)
    with watch("baselines"):
        baseline_nats = _baselines(data, table)

    predicted = len(data.validation) - 1
    val_bytes = int(data.validation.text_bytes[1:].sum())
    if second is not None:
        nats = float(second.validation.nats.sum())
        measured |= _of_phase2(second, data) | {"val_bpb": metrics.bits_per_byte(nats, val_bytes)}
    result = Result(
        key=key,
        experiment=experiment,
        train_tokens=len(data.train),
        val_tokens=len(data.validation),
        vocab_size=len(table.weight),
        embedding_dim=table.weight.shape[1],
        parameters=controls.parameter_counts(model, experiment),
        loses_text=data.loses_text,
        baselines={
            name: None
            if loss is None
            else {
                "ppl": metrics.perplexity(loss),
                "bpb": metrics.bits_per_byte(loss * predicted, val_bytes),
            }
            for name, loss in baseline_nats.items()
        },
        **measured,
        seconds=watch.seconds,
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


@dataclass
class _Training:
    """One run's training, whatever the model.

    Attributes:
        phase1_key: of its Phase 1 in the store; None: it is not stored.
    """

    experiment: Experiment
    data: Data
    phase1_key: str | None
    watch: Watch
    reuse: bool
    background: Background
    held: ExitStack

    def __post_init__(self) -> None:
        device = self.experiment.device
        self.train_tokens = self.data.train.tokens.to(device)
        self.val_tokens = self.data.validation.tokens.to(device)

    def two_phases(self, model: CVFP) -> Trained:
        """CVFP, and the controls that differ from it in the contexts of Phase 2."""
        experiment, kind = self.experiment, self.experiment.contexts
        first = train_contexts = val_contexts = None
        measured: dict[str, Any] = {}
        if kind in ("trained", "shuffled"):
            first, measured["phase1_from_store"] = self.first_phase(model)
            measured |= dict(
                phase1_iterations=first.iterations,
                converged=first.converged,
                aborted=first.aborted,
                phase1_history=first.history,
            )
        if kind in ("trained", "random", "shuffled"):
            parallel = None if experiment.training_contexts == "exact" else first
            train_contexts, val_contexts, figures = self.measure_contexts(model, parallel)
            measured |= figures
        elif kind not in registry.CONTEXTS:
            with self.watch("contexts"):
                train_contexts = self.own_contexts(model, self.train_tokens)
                val_contexts = self.own_contexts(model, self.val_tokens)
                measured |= self.spectra(train_contexts, val_contexts)
        if first is not None and first.aborted is not None:
            return None, measured
        with self.watch("phase2"), self.phase2_stage() as stage:
            second = phase2.train(
                controls.positions(model, train_contexts, self.train_tokens, experiment),
                controls.positions(model, val_contexts, self.val_tokens, experiment),
                experiment,
                seeds.generator(experiment.seed, "batches"),
                stage.show,
                stage.advance,
            )
        return second, measured

    def unrolled(self, model: CVFP | Peer) -> Trained:
        """A peer, or CVFP whose ContextBlock is trained with the TokenBlock."""
        tokens, rate = self.val_tokens, "phase2_learning_rate"

        def validate() -> phase2.Evaluation:
            if isinstance(model, Peer):
                return model.evaluate(tokens, self.experiment.num_input_tokens)
            exact = exact_contexts(model.context_block, model.context_inputs(tokens), rate)
            return phase2.evaluate(phase2.Positions(model, exact.values, tokens))

        with self.watch("phase2"), self.phase2_stage() as stage:
            second = end_to_end.train(
                model,
                model.read if isinstance(model, Peer) else end_to_end.unrolled(model),
                validate,
                self.train_tokens,
                self.experiment,
                seeds.generator(self.experiment.seed, "batches"),
                stage.show,
                stage.advance,
            )
        return second, {} if isinstance(model, Peer) else self.measure_contexts(model)[-1]

    def first_phase(self, model: CVFP) -> tuple[phase1.Phase1, bool]:
        """Phase 1 from the store, or trained and then stored in the background; and which."""
        experiment, key = self.experiment, self.phase1_key
        held = self.held.enter_context(ExitStack())
        if self.reuse and key:  # and those with the same Phase 1 for that
            held.enter_context(cache.alone(cache.home() / "phase1" / key))
        stored = store.read_phase1(key) if self.reuse and key else None
        if stored is not None:
            held.close()
            weights, mapped, record = stored
            total, width = mapped.shape
            rows = placement.rows(total, width, mapped.dtype, torch.device(experiment.device))
            model.context_block.load_state_dict(weights)
            self.watch.seconds["phase1"] = record["seconds"]
            return phase1.Phase1(rows.copy_(mapped), **record["phase1"]), True

        history: list[dict[str, float]] = []

        def follow(row: dict[str, float]) -> str | None:
            history.append(row)
            stage.advance(1, {name: row[name] for name in ("iteration", "loss", "converged")})
            if row["iteration"] != abort.ITERATION:
                return None
            exact = contexts.evaluate(model.context_block, model.context_inputs(self.val_tokens))
            if exact.converged:
                spectrum = metrics.singular_values(exact.values)
                row["val_er"] = metrics.effective_rank(spectrum) / experiment.context_dim
            return abort.reason(history) if experiment.phase1_abort else None

        total = experiment.phase1_max_iterations - 1
        with self.watch("phase1"), Stage("Phase 1", total, every=10) as stage:
            first = phase1.train(
                model.context_block,
                model.context_inputs(self.train_tokens),
                experiment,
                seeds.generator(experiment.seed, "phase1", experiment.device),
                report=follow,
            )
        if key:
            block = model.context_block.state_dict()
            weights = {name: tensor.to("cpu", copy=True) for name, tensor in block.items()}
            plain = {f.name: getattr(first, f.name) for f in fields(first) if f.name != "contexts"}
            record = {"phase1": plain, "seconds": self.watch.seconds["phase1"]}
            self.background.submit(store.write_phase1, key, weights, first.contexts, record)
            self.background.submit(held.close)
        return first, False

    def measure_contexts(
        self, model: CVFP, parallel: phase1.Phase1 | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Training contexts, Phase 1's `parallel` ones or exact; exact validation contexts; their
        figures."""
        with self.watch("contexts"):
            block, inputs = model.context_block, model.context_inputs(self.val_tokens)
            exact = exact_contexts(block, inputs)
            recurrence = diagnose(block, inputs, exact.values)
            if parallel is not None:
                train = parallel.contexts
            else:
                train = exact_contexts(block, model.context_inputs(self.train_tokens)).values
            figures = self.spectra(train, exact.values) | dict(
                context_sweeps=exact.sweeps,
                context_error=exact.error_bound if math.isfinite(exact.error_bound) else None,
                contraction_rate=recurrence.contraction_rate,
                memory_length=recurrence.memory_length,
            )
        return train, exact.values, figures

    def own_contexts(self, model: CVFP, tokens: Tensor) -> Tensor:
        """The contexts [T, D] of a stream that the own part of that name returns."""
        name, shape = self.experiment.contexts, (len(tokens), self.experiment.context_dim)
        returned = registry.resolve("contexts", name)(model, tokens, self.experiment)
        return registry.check_contexts(name, returned, shape).to(model.embedding)

    def spectra(self, train: Tensor, validation: Tensor) -> dict[str, Any]:
        """Singular values of contexts, and their effective rank as a fraction of D."""
        figures: dict[str, Any] = {}
        for name, values in (("train", train), ("val", validation)):
            spectrum = metrics.singular_values(values, self.experiment.device)
            figures[f"{name}_spectrum"] = spectrum.tolist()
            rank = metrics.effective_rank(spectrum)
            figures[f"{name}_er"] = rank / self.experiment.context_dim
        return figures

    def phase2_stage(self) -> Stage:
        tokens = self.experiment.phase2_epochs * len(self.data.train)
        return Stage("Phase 2", tokens, unit="tok")


def prepare(experiment: Experiment, watch: Watch | None = None) -> tuple[Data, embeddings.Table]:
    """Token streams and embedding table of an Experiment, computed or from the cache.

    Raises:
        ParameterError: a field that does not fit the data; nothing of the data is refused later.
    """
    watch = watch or Watch(experiment.device)
    with watch("data"):
        data = data_module.load(experiment)
    with watch("table"), Stage("Table", embeddings.FIT_STEPS, every=10) as stage:
        table = embeddings.load(experiment, data, lambda row: stage.advance(1, row))
    return data, table


def exact_contexts(
    block: Block, inputs: TokenInputs, rate: str = "phase1_learning_rate"
) -> contexts.Contexts:
    """The contexts of a stream from a zero state, exact to float32.

    Args:
        rate: the learning rate to name in an error.

    Raises:
        FloatingPointError: they did not converge.
    """
    exact = contexts.evaluate(block, inputs)
    if not exact.converged:
        last = exact.residuals[-1]["relative"]
        raise FloatingPointError(
            f"the exact contexts did not converge in {exact.sweeps} sweeps (relative residual "
            f"{last:.2g}); a ContextBlock that contracts would be accepted: check {rate}, "
            "num_layers and token_input_all_layers"
        )
    return exact


def _baselines(data: Data, table: embeddings.Table) -> dict[str, float | None]:
    """What `baselines.evaluate` returns, stored for all runs on the same data and table."""
    model = table.bigram
    weights = [] if model is None else [model.table, model.weight, model.bias]
    code = cache.code_fingerprint("baselines", "embeddings")
    key = cache.digest(data.fingerprint, *weights, code)

    def measure() -> str:
        return json.dumps(baselines.evaluate(data, model), allow_nan=False)

    return json.loads(cache.text("baselines", f"{key}.json", measure))


def _of_phase2(second: phase2.Phase2, data: Data) -> dict[str, Any]:
    """The Result's figures of Phase 2. Each list of sums has predicted tokens, their nats and how
    many were right: by conversation; by the predicted token's place in its conversation (0-3, 4-7,
    8-15, …); by how often it is in the training stream (0, 1-9, 10-99, …)."""
    evaluation, stream = second.validation, data.validation
    # Of which conversation tokens 1 … T-1 are.
    tokens = torch.arange(1, len(stream))
    conversations = torch.bucketize(tokens, stream.starts, right=True) - 1
    places = tokens - stream.starts[conversations]
    counts = torch.bincount(data.train.tokens, minlength=data.vocab_size)[stream.tokens[1:]]
    place_edges = [0, *(2**power for power in range(2, int(places.max()).bit_length()))]
    count_edges = [0, *(10**power for power in range(len(str(int(counts.max())))))]
    return dict(
        val_ppl=metrics.perplexity(evaluation.loss),
        val_acc=evaluation.accuracy,
        train_ppl=metrics.perplexity(second.train_loss),
        best_epoch=second.best_epoch,
        phase2_history=second.history,
        val_conversations=_sums(conversations, len(stream.starts), evaluation),
        val_positions=_binned(places, place_edges, evaluation),
        val_frequencies=_binned(counts, count_edges, evaluation),
    )


def _binned(
    values: Tensor, edges: list[int], evaluation: phase2.Evaluation
) -> list[dict[str, float]]:
    which = torch.bucketize(values, torch.tensor(edges), right=True) - 1
    rows = _sums(which, len(edges), evaluation)
    return [
        {"low": float(low), **row} for low, row in zip(edges, rows, strict=True) if row["tokens"]
    ]


def _sums(which: Tensor, count: int, evaluation: phase2.Evaluation) -> list[dict[str, float]]:
    ones = torch.ones_like(evaluation.nats)
    columns = {"tokens": ones, "nats": evaluation.nats, "correct": evaluation.correct.double()}
    sums = [torch.bincount(which, values, count).tolist() for values in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*sums, strict=True)]
