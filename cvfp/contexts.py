"""The recurrence c_t = f(c_{t-1}, e_t) evaluated with fixed weights, and exactly.

`sequential` is the oracle: a loop over tokens. `blocks` cuts the stream into blocks and runs them
side by side, each token by token, until what each hands to the next no longer changes
(docs/method.md, *Exact contexts*). Of a block it takes `block(c, e)[-1]` and `context_dim`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cvfp import ops
from cvfp.inputs import TokenInputs
from cvfp.metrics import relative_errors
from cvfp.model import Block

WARM_UP = 32
SHORTEST_BLOCK = 64
# An error of a block's start may grow inside before it shrinks: up to 36 times, over hundreds of
# random blocks that contract in the end.
ENLARGED = 50.0


@dataclass
class Contexts:
    """Contexts of a stream and how far they can be trusted."""

    values: Tensor  # [T, D]
    residuals: list[dict[str, float]]  # per sweep: a start's largest change, absolute and relative
    sweeps: int  # 1 for `sequential`, which has no residual
    steps: int  # applications of the block one after the other, each to many tokens at once
    converged: bool  # the last sweep moved no start by more than `tol`, and all values are finite
    # On any context's error, relative to its norm, rounding aside; infinite where nothing is known.
    error_bound: float


@torch.no_grad()
def evaluate(
    block: Block,
    inputs: Tensor | TokenInputs,
    *,
    method: Literal["sequential", "blocks"] = "blocks",
    tol: float = 1e-5,
    initial: Tensor | None = None,
    max_sweeps: int | None = None,
    block_length: int | None = None,
) -> Contexts:
    """Contexts [T, D] from `initial` [D] (zeros): no gradients, no autocast, no TF32.

    Args:
        inputs: e_t [T, n·E], or TokenInputs, in the type of the block's weights.
        tol: largest change of a block's start that counts as none, in units of a context's norm.
        max_sweeps: None: as many as always suffice, since every sweep makes at least one more block
            final. A trained ContextBlock takes two or three, an untrained one up to ten.
        block_length: tokens in a block; None: chosen from T and the device.

    Raises:
        ValueError: an unknown method, no tokens, a shape, type or number that does not fit, or
            inputs that require gradients.
    """
    stream = Stream(block, inputs)
    start = stream.zeros(1) if initial is None else initial[None].to(stream.like)
    if start.shape != (1, block.context_dim):
        shape, fits = tuple(start.shape[1:]), (block.context_dim,)
        raise ValueError(f"initial: got shape {shape}; accepted: {fits}")
    if initial is not None and initial.requires_grad:
        raise ValueError("initial: got a tensor that requires gradients; accepted: one without")
    if not 0 <= tol < math.inf:
        raise ValueError(f"tol: got {tol}; accepted: 0 or more")
    for name, number in (("max_sweeps", max_sweeps), ("block_length", block_length)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: got {number}; accepted: None, or at least 1")
    with ops.full_precision(stream.like.device):
        if method == "sequential":
            values = stream.zeros(len(inputs))
            first = torch.zeros(1, dtype=torch.long, device=values.device)
            for t, context in enumerate(stream.steps(start, first, len(inputs))):
                values[t] = context[0]
            return _contexts(values, [], len(values), True, 0.0)
        if method == "blocks":
            return _blocks(stream, start, tol, max_sweeps, block_length)
    raise ValueError(f"method: got {method!r}; accepted: 'sequential' or 'blocks'")


class Stream:
    """A block over a stream's inputs, checked to fit each other."""

    def __init__(self, block: Block, inputs: Tensor | TokenInputs) -> None:
        self.block, self.inputs, self.length = block, inputs, len(inputs)
        self.like = inputs.table if isinstance(inputs, TokenInputs) else inputs
        if self.length == 0:
            raise ValueError("inputs: got no tokens; accepted: at least one")
        if self.like.requires_grad:
            raise ValueError("inputs: got a tensor that requires gradients; accepted: one without")
        for weight in block.parameters():
            if weight.dtype != self.like.dtype or weight.dtype.itemsize < 4:
                got = f"inputs: got {self.like.dtype} for weights of {weight.dtype}"
                raise ValueError(f"{got}; accepted: both float32 or both float64")

    def zeros(self, rows: int) -> Tensor:
        return self.like.new_zeros(rows, self.block.context_dim)

    def step(self, context: Tensor, positions: Tensor) -> Tensor:
        """c [B, D] and the positions [B] of the tokens that follow -> the new contexts [B, D]."""
        whole = self.inputs
        e = whole[positions] if isinstance(whole, Tensor) else whole.dense(positions)
        return self.block(context, e)[-1]

    def steps(self, context: Tensor, first: Tensor, count: int) -> Iterator[Tensor]:
        """The contexts [B, D] after each of `count` tokens from the positions `first` [B] on, each
        for use before the next; past the end of the stream its last token comes again."""
        step = ops.recorded(self.step, count)
        for k in range(count):
            context = step(context, (first + k).clamp(max=self.length - 1))
            yield context


def _contexts(
    values: Tensor, residuals: list[dict[str, float]], steps: int, converged: bool, bound: float
) -> Contexts:
    # NaN is the least and the greatest; without the copies that isfinite makes.
    good = converged and bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())
    sweeps = max(1, len(residuals))
    return Contexts(values, residuals, sweeps, steps, good, bound if good else math.inf)


def _blocks(
    stream: Stream, start: Tensor, tol: float, max_sweeps: int | None, block_length: int | None
) -> Contexts:
    total, device = stream.length, stream.like.device
    length = block_length or max(SHORTEST_BLOCK, math.ceil(total / ops.side_by_side(device)))
    length = min(length, total)
    count = math.ceil(total / length)
    blocks = stream.zeros(count * length).view(count, length, -1)  # the last may end before that
    first = torch.arange(count, device=device) * length
    starts = torch.cat([start, stream.zeros(count - 1)])
    residuals: list[dict[str, float]] = []
    steps = 0
    if count > 1 and length > WARM_UP:
        for context in stream.steps(stream.zeros(count - 1), first[1:] - WARM_UP, WARM_UP):
            end = context  # of each block but the last, from zeros
        steps = WARM_UP
        residuals.append(_change(end, starts[1:]))
        starts[1:] = end

    active, moved = torch.arange(count, device=device), None
    # Of each block when it was last repeated: the factor by which a change of its start came out.
    passed, converged = blocks.new_zeros(count), False
    while not converged and (max_sweeps is None or len(residuals) < max_sweeps):
        before = blocks[active, -1]
        steps += length
        for k, context in enumerate(stream.steps(starts[active], first[active], length)):
            blocks[active, k] = context
        if moved is not None:
            passed[active] = torch.linalg.vector_norm(blocks[active, -1] - before, dim=1) / moved
        # Each block's last state is the next block's start. What a block ran from (`starts`) is
        # compared, or the small changes of a block that is not repeated would add up unseen.
        handed = torch.cat([start, blocks[:-1, -1]])
        residuals.append(_change(handed, starts))
        jumps = relative_errors(starts, handed)
        # Not `<= tol` of the largest: a NaN must count as moved.
        active = torch.nonzero(~((jumps <= tol) & torch.isfinite(handed).all(dim=1)))[:, 0]
        moved = torch.linalg.vector_norm(handed - starts, dim=1)[active]
        starts[active] = handed[active]
        converged = len(active) == 0
        if len(residuals) > count + 1:
            break  # every start was final, and yet one moved: not finite
    bound = off = 0.0
    if converged:
        for jump, factor in torch.stack([jumps, passed], dim=1).tolist():
            off += jump
            bound = max(bound, ENLARGED * off)
            off *= factor
    return _contexts(blocks.view(-1, starts.shape[1])[:total], residuals, steps, converged, bound)


def _change(handed: Tensor, starts: Tensor) -> dict[str, float]:
    """The largest change of a row."""
    largest = torch.linalg.vector_norm(handed - starts, dim=1).max()
    both = torch.stack([largest, relative_errors(starts, handed).max()])
    return dict(zip(("absolute", "relative"), both.tolist(), strict=True))
