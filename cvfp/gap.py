"""Why Phase 1's parallel contexts are not the exact ones: each cause alone (claims C2, C3).

The contexts that Phase 1 leaves differ from those of its final weights, evaluated token by token,
for three reasons: the noise that training adds, the weights that have moved on since each
iteration, and the window, since k sweeps can see k tokens only; and, for the first few tokens, the
ring in which token 0 reads the last. Each is brought about alone here, on the same tokens, and
measured against the exact contexts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor

from cvfp import build, contexts, experiment, metrics, ops, phase1, seeds
from cvfp.config import Experiment, ParameterError
from cvfp.inputs import TokenInputs
from cvfp.model import Block
from cvfp.progress import Stage
from cvfp.recurrence import Recurrence, diagnose

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
CHUNK = 8000

Made = TypeVar("Made")


@dataclass
class Gap:
    """Parallel against exact contexts of one training stream.

    Attributes:
        agreement: one row per comparison with the exact contexts: `AS_LEFT`, and each cause in
            `CAUSES`; columns of `agreement`.
        positions: rows first, middle, last 100 tokens; columns of `agreement`.
        along: mean cosine by position: columns position (centre of a bin, tokens), cosine,
            cosine_min.
        clean: clean sweeps with the final weights, going on from Phase 1's last iterate: columns
            sweep (0: the iterate itself), mse, relative_error_mean.
        windows: k clean sweeps from zeros, that is, windows of k tokens: columns tokens,
            relative_error_mean, relative_error_max, residual (the sweep's largest relative change).
    """

    experiment: Experiment
    tokens: int
    iterations: int
    exact: contexts.Contexts
    recurrence: Recurrence
    agreement: pd.DataFrame
    positions: pd.DataFrame
    along: pd.DataFrame
    clean: pd.DataFrame
    windows: pd.DataFrame
    block: Block
    inputs: TokenInputs

    @property
    def added(self) -> float:
        """Mean squared errors of all causes, added (the last update is one of the updates)."""
        apart = [name for name in CAUSES if name in self.agreement.index and name != "last_update"]
        return float(self.agreement.mse[apart].sum())


def measure(exp: Experiment, *, sweeps: int = 32) -> Gap:
    """Train Phase 1 of an Experiment and take the gap to its exact contexts apart.

    Args:
        sweeps: longest window, and most clean sweeps.

    Raises:
        ParameterError: a field that does not fit the machine or the data.
        FloatingPointError: Phase 1 diverged, or the exact contexts did not converge.
    """
    if sweeps < 1:
        raise ParameterError("sweeps", sweeps, "at least 1")
    exp = exp.resolved()
    data, table = experiment.prepare(exp)
    model = build.build_cvfp(exp, table.weight, data.tokenizer).to(exp.device)
    block, inputs = model.context_block, model.context_inputs(data.train.tokens.to(exp.device))
    if len(inputs) < 3 * POSITIONS:
        raise ParameterError("samples", exp.samples, f"at least {3 * POSITIONS} training tokens")
    # Weights as each iteration read them: before its update.
    history = [_weights(block)]
    with Stage("Phase 1", exp.phase1_max_iterations - 1, every=10) as stage:

        def follow(row: dict[str, float]) -> None:
            history.append(_weights(block))
            stage.advance(1, {name: row[name] for name in ("iteration", "loss", "converged")})

        first = phase1.train(
            block, inputs, exp, seeds.generator(exp.seed, "phase1", exp.device), follow
        )
    final = history.pop()
    exact = experiment.exact_contexts(block, inputs)
    right = exact.values
    left = first.contexts.to(right)  # in the precision of the comparison

    zeros = torch.zeros_like(right[0])

    def again(start: Tensor, weights: Sequence[dict[str, Tensor]], **how: Any) -> Tensor:
        made = start
        for one in weights:
            block.load_state_dict(one)
            made = sweep(block, inputs, made, **{"before": zeros, **how})
        block.load_state_dict(final)
        return made

    fresh = seeds.generator(exp.seed, "gap", exp.device)
    unmoved = [final] * len(history)
    initial = torch.empty_like(right).normal_(0.0, phase1.INITIAL_STD, generator=fresh)
    made = {
        AS_LEFT: left,
        "noise": again(right, unmoved, noise=exp.phase1_noise, generator=fresh),
        "updates": again(right, history),
        "window": again(initial, unmoved),
        "ring": again(right, unmoved, before=None),
    }
    if exp.precision == "bfloat16":
        made["bfloat16"] = again(right, unmoved, precision=exp.precision)
    rows = {name: agreement(values, right) for name, values in made.items()}
    del made
    block.load_state_dict(history[-1])
    rows["last_update"] = agreement(experiment.exact_contexts(block, inputs).values, right)
    block.load_state_dict(final)

    total = len(inputs)
    middle = (total - POSITIONS) // 2
    parts = {
        "first": slice(0, POSITIONS),
        "middle": slice(middle, middle + POSITIONS),
        "last": slice(total - POSITIONS, total),
    }
    return Gap(
        experiment=exp,
        tokens=total,
        iterations=first.iterations,
        exact=exact,
        recurrence=diagnose(block, inputs, right),
        agreement=pd.DataFrame.from_dict(rows, orient="index"),
        positions=pd.DataFrame.from_dict(
            {n: agreement(left[p], right[p]) for n, p in parts.items()},
            orient="index",
        ),
        along=_along(left, right),
        clean=_clean(block, inputs, left, right, sweeps),
        windows=_windows(block, inputs, right, sweeps),
        block=block,
        inputs=inputs,
    )


@torch.no_grad()
def sweep(
    block: Block,
    inputs: TokenInputs,
    made: Tensor,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    precision: str = "float32",
    before: Tensor | None = None,
) -> Tensor:
    """All tokens at once, each reading its predecessor's row of `made` [T, D]: one Jacobi sweep.

    Args:
        noise: standard deviation of what is added to the contexts read, drawn from `generator`.
        before: [D], what token 0 reads; None: the last row, as in Phase 1 (a ring).
    """
    new = torch.empty_like(made)
    carry = made[-1:] if before is None else before[None]
    for start in range(0, len(made), CHUNK):
        piece = slice(start, start + CHUNK)
        read = torch.cat([carry, made[piece][:-1]])
        carry = made[piece][-1:]
        if noise:
            read += torch.empty_like(read).normal_(0.0, noise, generator=generator)
        with ops.autocast(precision, made.device):
            new[piece] = block(read, inputs.dense(piece))[-1]
    return new


def times(
    block: Block,
    inputs: TokenInputs,
    lengths: Sequence[int],
    *,
    repeats: int = 3,
    longest_sequential: int = 20_000,
) -> pd.DataFrame:
    """Seconds for contexts of the first T tokens (medians): columns tokens, sequential (null over
    `longest_sequential` tokens), shifted (all layers from given contexts), blocks, and the largest
    difference of blocks from sequential, relative.

    Raises:
        ParameterError: a length that the stream does not have.
    """
    for length in lengths:
        if not 1 <= length <= len(inputs):
            raise ParameterError("lengths", list(lengths), f"lengths of 1 to {len(inputs)} tokens")

    contexts.evaluate(block, inputs.first(min(1000, len(inputs))))  # loads what a first call loads
    rows = []
    for length in lengths:
        piece = inputs.first(length)
        blocks, made = _timed(partial(contexts.evaluate, block, piece), repeats)
        zeros = torch.zeros_like(made.values[0])
        shifted, _ = _timed(partial(sweep, block, piece, made.values, before=zeros), repeats)
        row = dict(tokens=length, sequential=None, shifted=shifted, blocks=blocks, difference=None)
        if length <= longest_sequential:
            step_by_step = partial(contexts.evaluate, block, piece, method="sequential")
            row["sequential"], oracle = _timed(step_by_step, 1)
            row["difference"] = metrics.relative_errors(made.values, oracle.values).max().item()
        rows.append(row)
    return pd.DataFrame(rows).astype({"sequential": float, "difference": float})


def _timed(call: Callable[[], Made], repeats: int) -> tuple[float, Made]:
    """Median seconds of `repeats` calls, and what the last one made."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        made = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), made


def _weights(block: Block) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in block.state_dict().items()}


def _along(made: Tensor, right: Tensor) -> pd.DataFrame:
    """Cosine in bins of position, of equal width on a log axis from 1 on."""
    made, right = made.double(), right.double()
    cosine = torch.nn.functional.cosine_similarity(made, right, dim=1).cpu()
    edges = torch.logspace(0, math.log10(len(made) + 1), BINS + 1, dtype=torch.float64)
    edges = edges.round(decimals=6).long().unique() - 1
    rows = []
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        piece = cosine[low:high]
        rows.append(
            {
                "position": (low + 1 + high) / 2,
                "cosine": float(piece.mean()),
                "cosine_min": float(piece.min()),
            }
        )
    return pd.DataFrame(rows)


def _clean(
    block: Block, inputs: TokenInputs, made: Tensor, right: Tensor, sweeps: int
) -> pd.DataFrame:
    rows = []
    for number in range(sweeps + 1):
        near = agreement(made, right)
        rows.append(
            {
                "sweep": number,
                "mse": near["mse"],
                "relative_error_mean": near["relative_error_mean"],
            }
        )
        made = sweep(block, inputs, made, before=torch.zeros_like(made[0]))
    return pd.DataFrame(rows)


def _windows(block: Block, inputs: TokenInputs, right: Tensor, sweeps: int) -> pd.DataFrame:
    rows = []
    made = torch.zeros_like(right)
    for number in range(1, sweeps + 1):
        before, made = made, sweep(block, inputs, made, before=torch.zeros_like(made[0]))
        error = metrics.relative_errors(made, right)
        rows.append(
            {
                "tokens": number,
                "relative_error_mean": float(error.mean()),
                "relative_error_max": float(error.max()),
                "residual": float(metrics.relative_errors(before, made).max()),
            }
        )
    return pd.DataFrame(rows)


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
