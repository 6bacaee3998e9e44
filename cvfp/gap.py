"""Why Phase 1's parallel contexts are not the exact ones: each cause alone (claims C2, C3).

The contexts that Phase 1 leaves differ from those of its final weights, evaluated token by token,
for four reasons: the noise that training adds; the weights, updated since each iteration; the
window, since k sweeps see k tokens only; and, for the first few tokens, the ring in which token 0
reads the last. Each is reproduced alone here, on the same tokens."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cvfp import build, contexts, experiment, metrics, ops, phase1, phase2, registry, seeds
from cvfp.config import Experiment, ParameterError
from cvfp.inputs import TokenInputs
from cvfp.model import CVFP, Block
from cvfp.progress import Stage
from cvfp.recurrence import Recurrence
from cvfp.result import Result

AS_LEFT = "as Phase 1 leaves them"
CAUSES = {
    "noise": "training noise alone",
    "updates": "moving weights alone",
    "last_update": "… of these, the last update alone",
    "window": "window alone",
    "ring": "ring alone",
    "bfloat16": "bfloat16 products alone",
}
POSITIONS = 100  # tokens of the first, middle and last part in the published table
BINS = 60
CUTS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
LAGS = (-1, 0, 1, 2, 3, 4, 6, 8, 12, 16)
RIDGE = 1e-4  # of the contexts' mean variance
CHUNK = 8000  # tokens that go through the ContextBlock at once

Returned = TypeVar("Returned")


@dataclass
class Gap:
    """Parallel against exact contexts of one training stream: tables with these columns."""

    experiment: Experiment
    tokens: int
    iterations: int
    exact: contexts.Contexts
    recurrence: Recurrence
    agreement: pd.DataFrame  # those of `agreement`: rows `AS_LEFT`, and each cause in `CAUSES`
    positions: pd.DataFrame  # the same: rows first, middle, last 100 tokens
    along: pd.DataFrame  # position (centre of a bin, tokens), cosine (mean), cosine_min
    # Noiseless sweeps with the final weights: from Phase 1's last iterate, which is sweep 0; and k
    # from zeros, that is, windows of k tokens (residual: the sweep's largest relative change).
    clean: pd.DataFrame  # sweep, mse, relative_error_mean
    windows: pd.DataFrame  # tokens, relative_error_mean, relative_error_max, residual
    block: Block
    inputs: TokenInputs

    @property
    def added(self) -> float:
        """Mean squared errors of all causes, added (the last update is one of the updates)."""
        return float(self.agreement.mse.drop([AS_LEFT, "last_update"]).sum())


def measure(exp: Experiment, *, sweeps: int = 32) -> Gap:
    """Train Phase 1 of an Experiment and measure each cause of the gap to its exact contexts, in
    windows of up to `sweeps` tokens and as many noiseless sweeps. Raises `ParameterError`: a field
    that does not fit the machine or the data. Raises FloatingPointError: Phase 1 diverged, or the
    exact contexts did not converge."""
    if sweeps < 1:
        raise ParameterError("sweeps", sweeps, "at least 1")
    exp = exp.resolved()
    data, table = experiment.prepare(exp)
    exp = exp.settled(data.sizes)
    model = build.build_cvfp(exp, table.weight, data.tokenizer).to(exp.device)
    block, inputs = model.context_block, model.context_inputs(data.train.tokens.to(exp.device))
    if len(inputs) < 3 * POSITIONS:
        raise ParameterError("samples", exp.samples, f"at least {3 * POSITIONS} training tokens")
    # Weights as each iteration read them: before its update.
    history = [copy.deepcopy(block.state_dict())]
    with Stage("Phase 1", exp.phase1_max_iterations - 1, every=10) as stage:

        def follow(row: dict[str, float]) -> None:
            history.append(copy.deepcopy(block.state_dict()))
            stage.advance(1, {name: row[name] for name in ("iteration", "loss", "converged")})

        generator = seeds.generator(exp.seed, "phase1", exp.device)
        first = phase1.train(block, inputs, exp, generator, follow)
    final = history.pop()
    exact = experiment.exact_contexts(block, inputs)
    right = exact.values
    left = first.contexts.to(right)  # in the precision of the comparison

    def repeated(start: Tensor, weights: Sequence[dict[str, Tensor]], **how: Any) -> Tensor:
        """A sweep with each of the weights in turn."""
        values = start
        for one in weights:
            block.load_state_dict(one)
            values = sweep(block, inputs, values, **how)
        block.load_state_dict(final)
        return values

    fresh = seeds.generator(exp.seed, "gap", exp.device)
    unmoved = [final] * len(history)
    initial = torch.empty_like(right).normal_(0.0, phase1.INITIAL_STD, generator=fresh)
    compared = {
        AS_LEFT: left,
        "noise": repeated(right, unmoved, noise=exp.phase1_noise, generator=fresh),
        "updates": repeated(right, history),
        "window": repeated(initial, unmoved),
        "ring": repeated(right, unmoved, ring=True),
    }
    if exp.precision == "bfloat16":
        compared["bfloat16"] = repeated(right, unmoved, precision=exp.precision)
    rows = {name: agreement(values, right) for name, values in compared.items()}
    del compared
    block.load_state_dict(history[-1])
    rows["last_update"] = agreement(experiment.exact_contexts(block, inputs).values, right)
    block.load_state_dict(final)

    total = len(inputs)
    starts = {"first": 0, "middle": (total - POSITIONS) // 2, "last": total - POSITIONS}
    parts = {name: slice(start, start + POSITIONS) for name, start in starts.items()}
    positions = {name: agreement(left[part], right[part]) for name, part in parts.items()}
    iterates = enumerate(_sweeps(block, inputs, left, sweeps))
    clean = [{"sweep": number, **agreement(one, right)} for number, one in iterates]
    return Gap(
        experiment=exp,
        tokens=total,
        iterations=first.iterations,
        exact=exact,
        recurrence=experiment.diagnosed(block, inputs, exact),
        agreement=pd.DataFrame.from_dict(rows, orient="index"),
        positions=pd.DataFrame.from_dict(positions, orient="index"),
        along=_along(left, right),
        clean=pd.DataFrame(clean)[["sweep", "mse", "relative_error_mean"]],
        windows=_windows(block, inputs, right, sweeps),
        block=block,
        inputs=inputs,
    )


@torch.no_grad()
def sweep(
    block: Block,
    inputs: TokenInputs,
    values: Tensor,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    precision: str = "float32",
    ring: bool = False,
) -> Tensor:
    """All tokens at once, each reading its predecessor's row of `values` [T, D]: one Jacobi sweep.
    `noise` is the standard deviation of what is added to the contexts read, drawn from `generator`;
    with `ring`, token 0 reads the last row, as in Phase 1; else zeros."""
    new = torch.empty_like(values)
    last = values[-1:] if ring else torch.zeros_like(values[:1])
    for start in range(0, len(values), CHUNK):
        piece = slice(start, start + CHUNK)
        read = torch.cat([last, values[piece][:-1]])
        last = values[piece][-1:]
        if noise:
            read += torch.empty_like(read).normal_(0.0, noise, generator=generator)
        with ops.autocast(precision, values.device):
            new[piece] = block(read, inputs.dense(piece))[-1]
    return new


@torch.no_grad()
def memory(result: Result, tokens: Sequence[int]) -> pd.DataFrame:
    """What of its memory a trained model uses: one row a held-out conversation, columns tokens (of
    it), nats, and for each k of `tokens` the nats with contexts that have seen the last k tokens
    before the current one; what lies further back is another conversation's. Raises
    FileNotFoundError: its model is not stored; `ParameterError`: a model without own contexts."""
    model, exp = result.model(), result.experiment
    if not isinstance(model, CVFP) or not model.generates:
        accepted = "'trained', 'random', 'end_to_end' or 'fine_tuned'"
        raise ParameterError("contexts", exp.contexts, accepted)
    stream = experiment.prepare(exp)[0].validation
    ids, block = stream.tokens.to(exp.device), model.context_block
    inputs = model.context_inputs(ids)
    exact = experiment.exact_contexts(block, inputs).values
    conversations = torch.bucketize(torch.arange(1, len(ids)), stream.starts, right=True) - 1

    def scored(contexts: Tensor) -> Tensor:
        nats = phase2.evaluate(phase2.Positions(model, contexts, ids)).nats
        return torch.bincount(conversations, nats, len(stream.starts))

    columns = {"tokens": torch.bincount(conversations), "nats": scored(exact)}
    # As they stand half a stream away: in another conversation.
    cuts = _sweeps(block, inputs, exact.roll(len(exact) // 2, 0), max(tokens, default=0))
    columns |= {f"{seen}": scored(cut) for seen, cut in enumerate(cuts) if seen in tokens}
    return pd.DataFrame(columns)


@torch.no_grad()
def recall(result: Result, lags: Sequence[int]) -> pd.DataFrame:
    """What contexts hold of the tokens read: R² of linear maps from C[t] to the embedding of the
    token `lag` before t (-1: the next), fitted on training's contexts by ridge regression and
    measured on validation's: columns lag, r2 (1 at most; 0: no more than the mean). Raises
    FileNotFoundError: its model is not stored; `ParameterError`: a model without contexts."""
    model, exp = result.model(), result.experiment
    if not isinstance(model, CVFP) or exp.contexts in ("zero", "window", "shuffled"):
        raise ParameterError("contexts", exp.contexts, "a kind that makes contexts")
    data = experiment.prepare(exp)[0]

    def read(stream: Tensor) -> tuple[Tensor, TokenInputs]:
        inputs = model.context_inputs(stream.to(exp.device))
        if exp.contexts in registry.CONTEXTS:
            return experiment.exact_contexts(model.context_block, inputs).values, inputs
        own = registry.resolve("contexts", exp.contexts)
        return own(model, inputs.tokens, exp), inputs

    streams = [read(stream.tokens) for stream in (data.train, data.validation)]
    rows = []
    for lag in lags:
        pairs = []
        for values, inputs in streams:
            first, end = max(lag, 0), len(values) + min(lag, 0)
            target = inputs.table[inputs.tokens[first - lag : end - lag]]
            pairs.append((values[first:end].double(), target.double()))
        (c, y), (c_val, y_val) = pairs
        middle, mean = c.mean(dim=0), y.mean(dim=0)
        gram = (c - middle).T @ (c - middle)
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        fitted = torch.linalg.solve(gram, (c - middle).T @ (y - mean))
        left = (y_val - mean - (c_val - middle) @ fitted).square().sum()
        rows.append({"lag": lag, "r2": float(1 - left / (y_val - mean).square().sum())})
    return pd.DataFrame(rows)


def remembers(result: Result) -> dict[str, Any]:
    """What `memory` and `recall` find, as plain values for JSON, beside what says how the contexts
    forget; without cuts for contexts that no block makes. Raises as these do."""
    names = ("val_ppl", "contraction_rate", "memory_length", "context_steps", "context_sweeps")
    called = zip(("ppl", *names[1:3], "steps", "sweeps"), names, strict=True)
    record = {name: getattr(result, column) for name, column in called}
    record |= dict(size=result.experiment.samples, seed=result.experiment.seed)
    if getattr(result.model(), "generates", False):
        record["cuts"] = memory(result, CUTS).to_dict("list")
    return record | {"recall": recall(result, LAGS).to_dict("list")}


def times(
    block: Block,
    inputs: TokenInputs,
    lengths: Sequence[int],
    *,
    repeats: int = 3,
    longest_sequential: int = 20_000,
) -> pd.DataFrame:
    """Median seconds for contexts of the first T tokens: columns tokens, sequential (null over
    `longest_sequential` tokens), shifted (one sweep), blocks, and the largest relative difference
    between the contexts of blocks and sequential. Raises `ParameterError`: a length that the stream
    does not have."""
    for length in lengths:
        if not 1 <= length <= len(inputs):
            raise ParameterError("lengths", list(lengths), f"lengths of 1 to {len(inputs)} tokens")

    contexts.evaluate(block, inputs.first(min(1000, len(inputs))))  # loads what a first call loads
    rows = []
    for length in lengths:
        piece = inputs.first(length)
        blocks, exact = _timed(partial(contexts.evaluate, block, piece), repeats)
        shifted, _ = _timed(partial(sweep, block, piece, exact.values), repeats)
        row = dict(tokens=length, sequential=None, shifted=shifted, blocks=blocks, difference=None)
        if length <= longest_sequential:
            step_by_step = partial(contexts.evaluate, block, piece, method="sequential")
            row["sequential"], oracle = _timed(step_by_step, 1)
            row["difference"] = metrics.relative_errors(exact.values, oracle.values).max().item()
        rows.append(row)
    return pd.DataFrame(rows).astype({"sequential": float, "difference": float})


def _timed(call: Callable[[], Returned], repeats: int) -> tuple[float, Returned]:
    """Median seconds of `repeats` calls, and what the last one returned."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        returned = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), returned


def _along(left: Tensor, right: Tensor) -> pd.DataFrame:
    """Cosine in bins of position, of equal width on a log axis from 1 on."""
    cosine = torch.nn.functional.cosine_similarity(left.double(), right.double(), dim=1)
    frame = pd.DataFrame({"position": np.arange(1, len(left) + 1), "cosine": cosine.cpu()})
    edges = np.geomspace(1, len(left) + 1, BINS + 1).round(6).astype(int)
    bins = frame.groupby(np.searchsorted(np.unique(edges), frame.position, side="right"))
    means = bins.mean().assign(cosine_min=bins.cosine.min())
    return means.reset_index(drop=True)


def _sweeps(block: Block, inputs: TokenInputs, values: Tensor, count: int) -> Iterator[Tensor]:
    """`values`, and what each of `count` noiseless sweeps makes of them."""
    yield values
    for _ in range(count):
        values = sweep(block, inputs, values)
        yield values


def _windows(block: Block, inputs: TokenInputs, right: Tensor, sweeps: int) -> pd.DataFrame:
    rows = []
    iterates = pairwise(_sweeps(block, inputs, torch.zeros_like(right), sweeps))
    for number, (before, after) in enumerate(iterates, start=1):
        error = metrics.relative_errors(after, right)
        residual = metrics.relative_errors(before, after)
        rows.append((number, float(error.mean()), float(error.max()), float(residual.max())))
    names = ["tokens", "relative_error_mean", "relative_error_max", "residual"]
    return pd.DataFrame(rows, columns=names)


def agreement(contexts: Tensor, reference: Tensor) -> dict[str, float]:
    """How near [T, D] contexts are to a reference: cosine mean and min, MSE, and relative error
    ‖Δ‖/‖reference‖ per token, mean and 95th percentile."""
    contexts, reference = contexts.double(), reference.double()
    cosine = torch.nn.functional.cosine_similarity(contexts, reference, dim=1)
    relative = metrics.relative_errors(contexts, reference)
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "mse": float((contexts - reference).square().mean()),
        "relative_error_mean": float(relative.mean()),
        "relative_error_p95": float(torch.quantile(relative, 0.95)),
    }
