"""Experiment -> Result: the one path that every notebook, sweep and test runs through."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cvfp import (
    abort,
    baselines,
    cache,
    checkpoint,
    contexts,
    controls,
    embeddings,
    end_to_end,
    estimate,
    metrics,
    ops,
    phase1,
    phase2,
    progress,
    registry,
    seeds,
    store,
)
from cvfp import data as data_module
from cvfp.build import build
from cvfp.checkpoint import Checkpoint, Follow, Row
from cvfp.config import Experiment, ParameterError
from cvfp.data import Data
from cvfp.end_to_end import Peer
from cvfp.inputs import TokenInputs
from cvfp.model import CVFP, Block
from cvfp.ops import placement
from cvfp.progress import Stage
from cvfp.recurrence import Recurrence, diagnose
from cvfp.result import Result
from cvfp.share import ALONE, Ranks, Shards, started
from cvfp.version import __version__
from cvfp.watch import Background, Watch, device_name

VERSIONS = ("torch", "numpy", "tokenizers")
RATE = "phase1_learning_rate"
SAID = 120  # seconds that training is expected to take, from which on a reader is told
AHEAD = 64  # a rank's warm-up is that part of its range: to be wrong would take twice as long
REFUSED: Any = dict(model=("lstm", "transformer"), contexts=registry.JOINTLY, device=("mps",))
REFUSED |= dict(phase1_step=("group",), phase1_fresh=(True,))  # what several devices cannot share
# Phase 2, if there was one, and the Result's other figures by name.
Trained = tuple[phase2.Phase2 | None, dict[str, Any]]


def run(
    experiment: Experiment, *, reuse: bool = True, watch: Callable[[Row], object] = lambda row: None
) -> Result:
    """Train and evaluate what the Experiment describes, and store the Result; the same Experiment
    returns it at once, and goes on where it was interrupted. Processes that torchrun started share
    one run, each on its device; of theirs only what is finished is stored.

    Args:
        reuse: take a finished run, Phase 1 or checkpoint from the store; False: train again.
        watch: called with each row of both histories (`phase` in it) as it is made or taken from a
            checkpoint; something true stops the run: its Result is `partial`, and not stored.

    Raises:
        ParameterError: a field that does not fit the machine or the data, before any training.
        FloatingPointError: training diverged, or the exact contexts did not converge.
    """
    if not callable(watch):
        raise ParameterError("watch", watch, "a function of a row")
    ranks = started()
    cache.check_home()
    experiment = ranks.agreed(experiment.resolved)
    for name, values in REFUSED.items() if ranks.size > 1 else ():
        if (got := getattr(experiment, name)) in values:
            usual = getattr(Experiment(), name)
            raise ParameterError(name, got, f"{usual!r} on {ranks.size} devices")
    placement.asked_place()  # raises now, not after a table has been fitted
    with ops.using(experiment.ops):
        while True:
            try:
                with ExitStack() as held:
                    result = _run(experiment, reuse, watch, held, ranks)
                break
            except torch.cuda.OutOfMemoryError:
                if ranks.size > 1 or not placement.smaller():
                    raise
            warnings.warn("the GPU's memory ran out; the run takes less at once", stacklevel=2)
    for words in result.warnings:
        warnings.warn(words, RuntimeWarning, stacklevel=2)
    return result


def _run(
    experiment: Experiment, reuse: bool, follow: Follow, held: ExitStack, ranks: Ranks
) -> Result:
    watch = Watch(experiment.device)
    data, table = prepare(experiment, watch)
    experiment = experiment.settled(data.sizes)
    fingerprints = data.fingerprint, table.fingerprint
    key = store.key(experiment, *fingerprints)
    unread = [kind for kind, one in registry.sources(experiment).items() if one is None]
    stored = not unread
    for kind in unread:
        words = f"{kind} {getattr(experiment, kind)!r}: its source, or that of what it names, "
        words += "cannot be read, so this run is neither taken from the store nor stored"
        warnings.warn(words, stacklevel=3)
    if reuse and stored and not ranks.rank:  # others with the same Experiment wait for its result
        held.enter_context(cache.alone(cache.home() / "runs" / key))
    record = ranks.agreed(lambda: store.read_run(key) if reuse and stored else None)
    if record is not None:
        # The fields that are no part of the key (a path, say) are the caller's.
        return Result.from_dict({**record, "experiment": experiment.to_dict(), "from_store": True})

    vocab, dim = table.weight.shape
    # Measures this machine for a moment: only where somebody is told.
    told = progress.mode() != "none"
    expected = estimate.seconds(experiment, vocab, dim, len(data.train)) if told else 0.0
    if expected > SAID * ranks.size:
        progress.tell(f"Training takes about {expected / 60 / ranks.size:,.0f} minutes, or less")
    model = build(experiment, table.weight, data.tokenizer)
    model.load_state_dict(ranks.agreed(model.state_dict))  # each machine may have fitted a table
    model = model.to(experiment.device)
    phase1_key = store.key(experiment, *fingerprints, phase1=True) if stored else None
    with Background(experiment.device) as background:
        keys = key if stored else None, phase1_key
        training = _Training(experiment, data, *keys, watch, follow, reuse, background, held, ranks)
        if isinstance(model, Peer) or experiment.contexts in registry.JOINTLY:
            second, measured = training.unrolled(model)
        else:
            second, measured = training.two_phases(model)
    with watch("baselines"):
        baseline_nats = ranks.agreed(lambda: _baselines(data, table))

    predicted = len(data.validation) - 1
    val_bytes = int(data.validation.text_bytes[1:].sum())
    if second is not None:
        nats = float(second.validation.nats.sum())
        measured |= _of_phase2(second, data) | {"val_bpb": metrics.bits_per_byte(nats, val_bytes)}
        if training.dev_tokens is not None:
            measured["dev_ppl"] = second.history[second.best_epoch - 1]["val_ppl"]

    def units(loss: float) -> dict[str, float]:
        bits = metrics.bits_per_byte(loss * predicted, val_bytes)
        return {"ppl": metrics.perplexity(loss), "bpb": bits}

    versions = {"python": platform.python_version(), "cvfp": __version__}
    versions |= {name: importlib.metadata.version(name) for name in VERSIONS}
    result = Result(
        key=key,
        experiment=experiment,
        train_tokens=len(data.train),
        val_tokens=len(data.validation),
        vocab_size=len(table.weight),
        embedding_dim=table.weight.shape[1],
        parameters=controls.parameter_counts(model, experiment),
        loses_text=data.loses_text,
        baselines={k: None if x is None else units(x) for k, x in baseline_nats.items()},
        **measured,
        seconds=watch.seconds,
        **watch.peaks(),
        device=experiment.device,
        device_name=f"{ranks.size} x " * (ranks.size > 1) + device_name(experiment.device),
        precision=experiment.precision,
        threads=torch.get_num_threads(),
        versions=versions,
        partial=training.partial,
        _model=model,
    )
    if stored and not ranks.rank and not result.partial:
        store.write_model(key, model.state_dict())
        store.write_run(key, result.to_dict())
        cache.delete(checkpoint.path_of(key))
    return result


@dataclass
class _Training:
    """One run's training, whatever the model.

    Attributes:
        key, phase1_key: of the run and of its Phase 1 in the store; None: it is not stored.
        partial: `follow` stopped it.
        dev_tokens: what chooses the epoch; None: `val_tokens`.
    """

    experiment: Experiment
    data: Data
    key: str | None
    phase1_key: str | None
    watch: Watch
    follow: Callable[[Row], object]
    reuse: bool
    background: Background
    held: ExitStack
    ranks: Ranks
    partial: bool = False

    def __post_init__(self) -> None:
        device = self.experiment.device
        self.train_tokens = self.data.train.tokens.to(device)
        self.val_tokens = self.data.validation.tokens.to(device)
        self.unlabelled = self.data.unlabelled.tokens.to(device)
        dev = self.data.development.tokens.to(device)
        self.dev_tokens = dev if len(dev) else None

    def two_phases(self, model: CVFP) -> Trained:
        """CVFP, and the controls that differ from it in the contexts of Phase 2."""
        experiment, kind = self.experiment, self.experiment.contexts
        first = train_contexts = val_contexts = None
        measured: dict[str, Any] = {}
        if kind in ("trained", "shuffled"):
            first, measured = self.first_phase(model)
        if kind in ("trained", "random", "shuffled"):
            parallel = None if experiment.training_contexts == "exact" else first
            train_contexts, val_contexts, figures = self.measure_contexts(model, parallel)
            measured |= figures
        elif kind not in registry.CONTEXTS:
            with self.watch("contexts"):
                train_contexts = self.own_contexts(model, self.train_tokens)
                val_contexts = self.own_contexts(model, self.val_tokens)
                measured |= self.spectra(train_contexts, val_contexts)
        if self.partial or (first is not None and first.aborted is not None):
            return None, measured
        batches = seeds.generator(experiment.seed, "batches")
        with self.second_phase() as loop, self.ranks.gradients(model):
            train = controls.positions(model, train_contexts, self.train_tokens, experiment)
            judge = choosing = controls.positions(model, val_contexts, self.val_tokens, experiment)
            if self.dev_tokens is not None:
                there = self.contexts(model, self.dev_tokens)
                choosing = controls.positions(model, there, self.dev_tokens, experiment)
            part, size = self.ranks.part, experiment.phase2_batch_size
            second = phase2.train(part(train, size), part(choosing), experiment, batches, *loop)
        return self.judged(second, partial(phase2.evaluate, part(judge))), measured

    def judged(
        self, second: phase2.Phase2, judge: Callable[[], phase2.Evaluation]
    ) -> phase2.Phase2:
        """Phase 2 with validation by the model that development has chosen, if it has."""
        return second if self.dev_tokens is None else replace(second, validation=judge())

    def contexts(self, model: CVFP, tokens: Tensor) -> Tensor | None:
        """What the kind of contexts takes for a stream; None: nothing."""
        if self.experiment.contexts in ("zero", "window"):
            return None
        if self.experiment.contexts in registry.CONTEXTS:
            inputs = model.context_inputs(tokens)
            return exact_contexts(model.context_block, inputs, ranks=self.ranks).values
        return self.own_contexts(model, tokens)

    def unrolled(self, model: CVFP | Peer) -> Trained:
        """A peer, or CVFP whose two blocks are trained together, after Phase 1 or not."""
        rate = "phase2_learning_rate"
        measured: dict[str, Any] = {}
        if self.experiment.contexts == "fine_tuned":
            assert isinstance(model, CVFP)
            measured = self.first_phase(model)[1]
            if self.partial or measured["aborted"] is not None:
                return None, measured

        def evaluate(tokens: Tensor) -> phase2.Evaluation:
            if isinstance(model, Peer):
                return model.evaluate(tokens, self.experiment.num_input_tokens)
            exact = exact_contexts(model.context_block, model.context_inputs(tokens), rate)
            return phase2.evaluate(phase2.Positions(model, exact.values, tokens))

        judge = partial(evaluate, self.val_tokens)
        validate = judge if self.dev_tokens is None else partial(evaluate, self.dev_tokens)

        read = model.read if isinstance(model, Peer) else end_to_end.unrolled(model)
        given = self.experiment, seeds.generator(self.experiment.seed, "batches")
        with self.second_phase() as loop:
            second = end_to_end.train(model, read, validate, self.train_tokens, *given, *loop)
        second = self.judged(second, judge)
        if not isinstance(model, Peer):
            measured |= self.measure_contexts(model)[-1]
        return second, measured

    def first_phase(self, model: CVFP) -> tuple[phase1.Phase1, dict[str, Any]]:
        """Phase 1 with the contexts that Phase 2 may read, and its figures."""
        first, stored = self.phase1_of(model)
        names = ("converged", "aborted")
        figures: dict[str, Any] = {name: getattr(first, name) for name in names}
        figures |= dict(phase1_iterations=first.iterations, phase1_history=first.history)
        figures["phase1_from_store"] = stored
        rows: Any = first.contexts[: len(self.train_tokens)]
        if self.ranks.size > 1:
            total = len(self.train_tokens) + len(self.unlabelled)
            own = self.ranks.own(total, self.experiment.loss_group)
            rows = Shards(self.ranks, first.contexts, own, self.train_tokens)
        return replace(first, contexts=rows), figures

    def phase1_of(self, model: CVFP) -> tuple[phase1.Phase1, bool]:
        """Phase 1 from the store, or trained and then stored in the background; and which."""
        experiment, key = self.experiment, None if self.ranks.size > 1 else self.phase1_key
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

        history: list[Row] = []

        def show(row: Row) -> None:
            history.append(row)
            stage.advance(1, {name: row[name] for name in ("iteration", "loss", "converged")})

        def report(row: Row) -> str | None:
            show(row)
            if row["iteration"] == abort.ITERATION:
                judge = self.val_tokens if self.dev_tokens is None else self.dev_tokens
                inputs = model.context_inputs(judge)
                exact = contexts.evaluate(model.context_block, inputs)
                if exact.converged:
                    spectrum = metrics.singular_values(exact.values)
                    row["val_er"] = metrics.effective_rank(spectrum) / experiment.context_dim
            loop.tell(row)
            return abort.reason(history) if experiment.phase1_abort else None

        loop = self.checkpoint(1, key, show)
        total = experiment.phase1_max_iterations - 1
        with self.watch("phase1"), Stage("Phase 1", total, every=10) as stage:
            read = torch.cat([self.train_tokens, self.unlabelled])
            train = model.context_inputs(read)
            noise = seeds.generator(experiment.seed, "phase1", experiment.device)
            rest = self.ranks.draws(loop.rest, noise, train, experiment)
            given = model.context_block, train, experiment, noise, report, rest, self.ranks
            first = phase1.train(*given)
        self.watch.seconds["phase1"] += loop.before
        self.partial = loop.stop
        if key and not loop.partial:
            block = model.context_block.state_dict()
            weights = {name: tensor.to("cpu", copy=True) for name, tensor in block.items()}
            plain = {f.name: getattr(first, f.name) for f in fields(first) if f.name != "contexts"}
            record = {"phase1": plain, "seconds": self.watch.seconds["phase1"]}
            self.background.submit(store.write_phase1, key, weights, first.contexts, record)
            self.background.submit(cache.delete, checkpoint.path_of(key))
            self.background.submit(held.close)
        return first, False

    def measure_contexts(
        self, model: CVFP, parallel: phase1.Phase1 | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Training contexts, Phase 1's `parallel` ones or exact; exact validation contexts; their
        figures."""
        with self.watch("contexts"):
            block, inputs = model.context_block, model.context_inputs(self.val_tokens)
            exact = exact_contexts(block, inputs, ranks=self.ranks)
            found = diagnosed(block, inputs, exact)
            if parallel is not None:
                train = parallel.contexts
            else:
                inputs = model.context_inputs(self.train_tokens)
                train = exact_contexts(block, inputs, ranks=self.ranks, whole=False).values
            error = exact.error_bound if math.isfinite(exact.error_bound) else None
            figures = self.spectra(train, exact.values)
            figures |= dict(context_sweeps=exact.sweeps, context_error=error)
            figures["context_steps"] = exact.steps
            rate, length = found.contraction_rate, found.memory_length
            figures |= dict(contraction_rate=rate, memory_length=length)
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
            ranks = self.ranks if isinstance(values, Shards) else ALONE
            spectrum = metrics.singular_values(values, self.experiment.device, ranks)
            figures[f"{name}_spectrum"] = spectrum.tolist()
            figures[f"{name}_er"] = metrics.effective_rank(spectrum) / self.experiment.context_dim
        return figures

    @contextmanager
    def second_phase(self) -> Iterator[tuple[Any, Any, Any]]:
        """Whom Phase 2's loop tells its rows and its tokens, and the epochs still to do."""
        epoch = len(self.data.train)
        total = self.experiment.phase2_epochs * epoch
        with self.watch("phase2"), Stage("Phase 2", total, unit="tok") as stage:
            loop = self.checkpoint(2, self.key, lambda row: stage.advance(epoch, row))

            def report(row: Row) -> None:
                stage.show(row)
                loop.tell(row)

            with _tf32(self.dev_tokens is not None and self.experiment.precision == "bfloat16"):
                yield report, stage.advance, loop.rest
        self.watch.seconds["phase2"] += loop.before
        self.partial = loop.partial

    def checkpoint(self, phase: int, key: str | None, replay: Follow) -> Checkpoint:
        """Of one phase's loop."""

        def follow(row: Row) -> object:
            row |= self.ranks.agreed(lambda: row)  # what is decided by it is the first one's, too
            return self.ranks.agreed(lambda: bool(self.follow({"phase": float(phase), **row})))

        # Plain Adam has no state before its first step that could be restored in place.
        kept = None if self.experiment.ops == "plain" or self.ranks.size > 1 else key
        return Checkpoint(kept, follow, replay, self.reuse)


@contextmanager
def _tf32(wanted: bool) -> Iterator[None]:
    """Development scored by products in TF32 where there are any: enough to choose an epoch by, and
    three times as fast; training's are in bfloat16 then, what judges is scored later."""
    above: Any = torch.backends
    products: Any = torch.backends.cuda.matmul
    before = getattr(products, "fp32_precision", None)  # a torch before 2.9 has another setting
    if not wanted or before is None:
        yield
        return
    products.fp32_precision = "tf32"
    try:
        yield
    finally:  # what reads the same as the setting above it may be inherited, and goes on to be
        products.fp32_precision = "none" if before == above.fp32_precision else before


def with_model(result: Result) -> Result:
    """The Result with its model in memory: the stored one, or trained again."""
    try:
        result.model()
    except FileNotFoundError:
        return run(result.experiment, reuse=False)
    return result


def prepare(experiment: Experiment, watch: Watch | None = None) -> tuple[Data, embeddings.Table]:
    """Token streams and embedding table of an Experiment, computed or from the cache.

    Raises:
        ParameterError: a field that does not fit the data; nothing of the data is refused later.
    """
    watch = watch or Watch(experiment.device)
    estimate.check(experiment, experiment.vocab_size, experiment.embedding_dim, 1)
    with watch("data"):
        data = data_module.load(experiment)
    width = experiment.settled(data.sizes).embedding_dim
    estimate.check(experiment, data.vocab_size, width, len(data.train))
    with watch("table"), Stage("Table", embeddings.FIT_STEPS, every=10) as stage:
        table = embeddings.load(experiment, data, lambda row: stage.advance(1, row))
    return data, table


@torch.no_grad()
def joint(ranks: Ranks, block: Block, inputs: TokenInputs, whole: bool = True) -> contexts.Contexts:
    """`contexts.evaluate`, with a rank for a block once more: each evaluates its range from where a
    warm-up ends, and again if it is handed another start. Not `whole`: its own, as `Shards`.
    The bound takes a start's error to last. Where blocks are short already each does all."""
    few = len(inputs) <= contexts.SHORTEST_BLOCK * ops.side_by_side(inputs.table.device)
    if ranks.size == 1 or (whole and few):
        return contexts.evaluate(block, inputs)
    own, start = ranks.own(len(inputs), 1), inputs.table.new_zeros(1, block.context_dim)
    if own.start:
        ahead = min(own.start, max(contexts.WARM_UP, len(own) // AHEAD))
        start = contexts.evaluate(block, inputs.first(ahead, own.start - ahead)).values[-1:]
    residuals: list[dict[str, float]] = []
    settled = False
    while not settled and len(residuals) <= ranks.size:
        made = contexts.evaluate(block, inputs.first(len(own), own.start), initial=start[0])
        handed = ranks.every(made.values[-1:])[ranks.rank - 1] * bool(own.start)
        told = [metrics.relative_errors(start, handed)[0], start.new_tensor(made.error_bound)]
        jumps, bounds = ranks.every(torch.stack(told)).T.tolist()
        residuals.append({"relative": max(jumps)})
        settled = all(jump <= 1e-5 for jump in jumps)  # as in `contexts.evaluate`; NaN is not
        start = handed
    bound = max(bounds) + contexts.ENLARGED * sum(jumps) if settled else math.inf
    rows: Any = made.values
    rows = ranks.whole(rows, own, len(inputs)) if whole else Shards(ranks, rows, own, inputs.tokens)
    steps = len(residuals) * made.sweeps, len(residuals) * made.steps
    return contexts.Contexts(rows, residuals, *steps, bound < math.inf, bound)


def exact_contexts(
    block: Block, inputs: TokenInputs, rate: str = RATE, ranks: Ranks = ALONE, whole: bool = True
) -> contexts.Contexts:
    """The contexts of a stream from a zero state, exact to float32.

    Args:
        rate: the learning rate to name in an error.
        ranks: that share the stream; not `whole`: each has its own values, as `Shards`.

    Raises:
        FloatingPointError: they did not converge.
    """
    exact = joint(ranks, block, inputs, whole)
    if not exact.converged:
        last = exact.residuals[-1]["relative"]
        raise FloatingPointError(
            f"the exact contexts did not converge in {exact.sweeps} sweeps (relative residual "
            f"{last:.2g}); a ContextBlock that contracts would be accepted: check {rate}, "
            "num_layers and token_input_all_layers"
        )
    return exact


def diagnosed(block: Block, inputs: TokenInputs, exact: contexts.Contexts) -> Recurrence:
    """How the recurrence forgets. Where it does not, `exact` has no bound: rounding grows."""
    found = diagnose(block, inputs, exact.values)
    if not (found.contraction_rate or 0.0) < 1:  # NaN is no better
        exact.converged, exact.error_bound = False, math.inf
    return found


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
    8-15, …); by how often it is in the training stream (0, 1-9, 10-99, …); by how often it follows
    the one before it there."""
    evaluation, stream = second.validation, data.validation
    # Of which conversation tokens 1 … T-1 are.
    tokens = torch.arange(1, len(stream))
    conversations = torch.bucketize(tokens, stream.starts, right=True) - 1
    places = tokens - stream.starts[conversations]
    counts = torch.bincount(data.train.tokens, minlength=data.vocab_size)[stream.tokens[1:]]
    pairs, seen = (
        one.tokens[:-1] * data.vocab_size + one.tokens[1:] for one in (stream, data.train)
    )
    known, often = seen.unique(return_counts=True)
    at = torch.searchsorted(known, pairs).clamp(max=len(known) - 1)
    bigrams = torch.where(known[at] == pairs, often[at], 0)
    pair_edges = [0, 1, *(10**power for power in range(1, len(str(int(bigrams.max())))))]
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
        val_bigrams=_binned(bigrams, pair_edges, evaluation),
    )


def _binned(
    values: Tensor, edges: list[int], evaluation: phase2.Evaluation
) -> list[dict[str, float]]:
    which = torch.bucketize(values, torch.tensor(edges), right=True) - 1
    rows = zip(edges, _sums(which, len(edges), evaluation), strict=True)
    return [{"low": float(low), **row} for low, row in rows if row["tokens"]]


def _sums(which: Tensor, count: int, evaluation: phase2.Evaluation) -> list[dict[str, float]]:
    ones = torch.ones_like(evaluation.nats)
    columns = {"tokens": ones, "nats": evaluation.nats, "correct": evaluation.correct.double()}
    sums = [torch.bincount(which, values, count).tolist() for values in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*sums, strict=True)]
