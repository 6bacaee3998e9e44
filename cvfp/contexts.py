"""The recurrence c_t = f(c_{t-1}, e_t) evaluated with fixed weights, and exactly (SPEC §7).

`sequential` is the oracle: a loop over tokens. `jacobi` iterates all tokens at once: after k
sweeps a context has seen k tokens. `blocks` cuts the stream into blocks and runs them side by side,
each token by token. Its first sweep runs only the end of every block, from zeros, and hands the
state it reaches to the next block as its start; the second runs all blocks whole; any further one
repeats the blocks whose start has changed, until none has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cvfp.model import ContextBlock, TokenInputs, full_precision

Method = Literal["sequential", "jacobi", "blocks"]

WARM_UP = 32
SHORTEST_BLOCK = 64
# Blocks side by side that fill the hardware without spilling its caches, measured at 3 x 128 on
# two cores and 6 x 768 on an H200.
SIDE_BY_SIDE = {"cpu": 512, "cuda": 4096, "mps": 4096}
# Memory for the tokens' shares, as a part of the values': a slice of steps (or a table) at once.
SHARE_MEMORY = 1 / 16
SHARE_FLOOR = 2**18  # numbers
# An error of a block's start may grow inside before it shrinks: up to 36 times, over hundreds of
# random blocks that contract in the end.
ENLARGED = 50.0
# What `diagnose` looks at: contexts restarted, tokens they may take to forget, tokens that the
# contraction is averaged over, and tokens before those in which the difference turns its own way.
RESTARTS = 1024
HORIZON = 256
RATE_STEPS = 64
BURN_IN = 16
LOOK = 8
MEMORY_TOLERANCE = 0.01


@dataclass
class Contexts:
    """Contexts of a stream and how far they can be trusted.

    Attributes:
        values: [T, D].
        residuals: per sweep, the largest change it found: {"absolute": …, "relative": …} of the
            block starts (`blocks`) or of all contexts (`jacobi`), relative to their norm.
        sweeps: how many there were; 1 for `sequential`, which has no residual.
        converged: the last sweep changed nothing by more than `tol`, and all values are finite.
        error_bound: bound on any context's error, relative to its norm, rounding aside; infinite
            where the sweeps did not converge, or cannot tell.

    In blocks, every start is off what its predecessor hands it by a known residual. Such errors are
    carried on to the next start times the factor that was seen when the block was last repeated
    (one that never was had forgotten its zeros in the first sweep), added up along the stream, and
    multiplied by 50, since an error may grow inside a block before it shrinks. These factors were
    seen and are not proved. Of Jacobi sweeps the last residual is r and q times the one before: the
    bound is 2r/(1-q).
    """

    values: Tensor
    residuals: list[dict[str, float]]
    sweeps: int
    converged: bool
    error_bound: float


@dataclass
class Recurrence:
    """How a recurrence forgets.

    Attributes:
        contraction_rate: geometric mean, per token, by which two nearby trajectories approach; its
            logarithm is the largest Lyapunov exponent. Over 1: they part. None: too few tokens.
        memory_length: the smallest number of tokens after which a context restarted from zeros is
            within 1 % (relative, mean over restarts). None: not within `distances`.
        distances: that relative distance after 1, 2, … tokens, mean over restarts.
    """

    contraction_rate: float | None
    memory_length: int | None
    distances: list[float]


@torch.no_grad()
def evaluate(
    block: ContextBlock,
    inputs: Tensor | TokenInputs,
    *,
    method: Method = "blocks",
    tol: float = 1e-5,
    initial: Tensor | None = None,
    max_sweeps: int | None = None,
    block_length: int | None = None,
) -> Contexts:
    """Contexts [T, D] from `initial` [D] (zeros), in the precision of the block's weights.

    There are no gradients: the values are constants, and asking for gradients raises. Apply
    `block` itself for those. Products are taken in full precision whatever autocast or TF32
    settings say. Memory beyond inputs and values: under a quarter of the values, for long streams.

    Args:
        inputs: e_t as [T, n·E], or TokenInputs.
        tol: largest relative change of a start (`blocks`) or context (`jacobi`) that counts as
            none. In units of a context's norm.
        max_sweeps: None: as many as always suffice, since every sweep makes at least one more
            block (`blocks`) or token (`jacobi`) final. A block that contracts takes two or three.
        block_length: tokens in a block; None: chosen from T and the device.

    Raises:
        ValueError: an unknown method, no tokens, a shape, type or number that does not fit, or
            inputs that require gradients.
    """
    source = _source(block, inputs)
    start = source.zeros(1)[0] if initial is None else initial.to(source.like)
    if start.shape != (block.context_dim,):
        raise ValueError(
            f"initial: got shape {tuple(start.shape)}; accepted: ({block.context_dim},)"
        )
    if initial is not None and initial.requires_grad:
        raise ValueError("initial: got a tensor that requires gradients; accepted: one without")
    if not 0 <= tol < math.inf:
        raise ValueError(f"tol: got {tol}; accepted: 0 or more")
    for name, number in (("max_sweeps", max_sweeps), ("block_length", block_length)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: got {number}; accepted: None, or at least 1")
    with full_precision(source.like.device):
        if method == "sequential":
            return _sequential(source, start)
        if method == "jacobi":
            return _jacobi(source, start, tol, max_sweeps)
        if method == "blocks":
            return _blocks(source, start, tol, max_sweeps, block_length)
    raise ValueError(f"method: got {method!r}; accepted: 'sequential', 'jacobi' or 'blocks'")


@torch.no_grad()
def diagnose(block: ContextBlock, inputs: Tensor | TokenInputs, values: Tensor) -> Recurrence:
    """How fast the recurrence forgets where it started (SPEC §5), from exact contexts.

    At up to 1,024 places, spread over the stream, a context is restarted from zeros and followed
    until it is within 1 % of the exact one; and one that differs by a little is followed, its
    difference pulled back to the same small size after every token.

    Args:
        inputs: e_t as [T, n·E], or TokenInputs.
        values: [T, D], exact contexts, from `evaluate`.

    Raises:
        ValueError: as many values as inputs are needed, or an input that `evaluate` refuses.
    """
    source = _source(block, inputs)
    if len(values) != source.length:
        raise ValueError(f"values: got {len(values)} contexts; accepted: {source.length}")
    with full_precision(source.like.device):
        return _diagnose(source, values)


def _source(block: ContextBlock, inputs: Tensor | TokenInputs) -> _Source:
    table = inputs.table if isinstance(inputs, TokenInputs) else inputs
    weight = block.token_weight()
    if len(inputs) == 0:
        raise ValueError("inputs: got no tokens; accepted: at least one")
    slots = inputs.rows.shape[1] if isinstance(inputs, TokenInputs) else 1
    if table.ndim != 2 or slots * table.shape[1] != block.input_dim:
        width = slots * table.shape[-1]
        raise ValueError(f"inputs: got {width} columns; accepted: {block.input_dim}")
    if table.requires_grad:
        raise ValueError("inputs: got a tensor that requires gradients; accepted: one without")
    if weight.dtype not in (torch.float32, torch.float64) or table.dtype != weight.dtype:
        raise ValueError(
            f"inputs: got {table.dtype} for weights of {weight.dtype}; accepted: both float32 or "
            "both float64"
        )
    return _Source(block, inputs)


class _Source:
    """The token shares of a stream's positions: gathered from a table's product, or computed."""

    def __init__(self, block: ContextBlock, inputs: Tensor | TokenInputs) -> None:
        self.block = block
        self.layers = block.layers()
        self.inputs = inputs
        self.length = len(inputs)
        table = inputs.table if isinstance(inputs, TokenInputs) else inputs
        self.like = table
        self.weight, self.bias = block.token_weight(), block.token_bias()
        memory = self.length * block.context_dim * SHARE_MEMORY
        share = len(self.weight)
        # Where it fits, the product of the whole table is taken once and a share is a lookup.
        self.products: list[Tensor] | None = None
        if isinstance(inputs, TokenInputs):
            slots = inputs.rows.shape[1]
            if slots * table.shape[0] * share <= memory:
                self.products = [
                    torch.nn.functional.linear(table, part)
                    for part in self.weight.split(table.shape[1], dim=1)
                ]
                self.products[0] += self.bias
                memory = 0
        # Otherwise shares are computed for a slice of steps at once: this many positions.
        self.slice = int(max(memory, SHARE_FLOOR) / share)

    def zeros(self, rows: int) -> Tensor:
        return self.like.new_zeros(rows, self.block.context_dim)

    def share(self, positions: Tensor | slice) -> Tensor:
        if isinstance(self.inputs, Tensor):
            dense = self.inputs[positions]
        elif self.products is None:
            dense = self.inputs.dense(positions)
        else:
            rows = self.inputs.rows[positions]
            total = self.products[0].index_select(0, rows[:, 0])
            for slot in range(1, rows.shape[1]):
                total += self.products[slot].index_select(0, rows[:, slot])
            return total
        return torch.nn.functional.linear(dense, self.weight, self.bias)

    def step(self, context: Tensor, share: Tensor) -> Tensor:
        return self.block.step(context, share, self.layers)[-1]

    def steps(self, positions: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For `count` steps from `positions` [B]: the positions [B] and shares [B, Σ] of each;
        those past the end of the stream read its last token."""
        at_once = max(1, self.slice // len(positions))
        for first in range(0, count, at_once):
            offsets = torch.arange(first, min(first + at_once, count), device=positions.device)
            at = (positions + offsets[:, None]).clamp(max=self.length - 1)  # [steps, B]
            shares = self.share(at.flatten()).view(*at.shape, -1)
            yield from zip(at.unbind(), shares.unbind(), strict=True)
            del at, shares  # or two slices would be there at once


def _sequential(source: _Source, start: Tensor) -> Contexts:
    values = source.zeros(source.length)
    context = start[None]
    chunk = max(1, min(1024, source.slice))
    for first in range(0, source.length, chunk):
        made = []
        for share in source.share(slice(first, first + chunk)).split(1):
            context = source.step(context, share)
            made.append(context)
        torch.cat(made, out=values[first : first + chunk])
    finite = _finite(values)
    return Contexts(values, [], 1, finite, 0.0 if finite else math.inf)


def _jacobi(source: _Source, start: Tensor, tol: float, max_sweeps: int | None) -> Contexts:
    values = source.zeros(source.length)
    residuals: list[dict[str, float]] = []
    converged = False
    chunk = max(1, source.slice // 3)
    for _ in range(source.length + 1 if max_sweeps is None else max_sweeps):
        largest = values.new_zeros(2)
        carry = start[None]
        for first in range(0, source.length, chunk):
            old = values[first : first + chunk]
            read, carry = torch.cat([carry, old[:-1]]), old[-1:].clone()
            new = source.step(read, source.share(slice(first, first + chunk)))
            largest = torch.maximum(largest, _change(new, old))
            old.copy_(new)
        residuals.append(_named(largest))
        converged = residuals[-1]["relative"] <= tol
        if converged:
            break
    finite = _finite(values)
    bound = math.inf
    if converged and finite:
        last, before = (residuals[i]["relative"] for i in (-1, max(-2, -len(residuals))))
        bound = 0.0 if last == 0 else 2 * last / (1 - last / before) if last < before else math.inf
    return Contexts(values, residuals, len(residuals), converged and finite, bound)


def _blocks(
    source: _Source,
    start: Tensor,
    tol: float,
    max_sweeps: int | None,
    block_length: int | None,
) -> Contexts:
    total = source.length
    length = block_length or _block_length(total, source.like.device.type)
    count = math.ceil(total / length)
    values = source.zeros(total)
    positions = torch.arange(count, device=values.device) * length
    residuals: list[dict[str, float]] = []
    converged = False
    # Of each block when it was last repeated: the factor by which a change of its start came out.
    passed = values.new_zeros(count)
    starts = source.zeros(count)
    starts[0] = start
    warm_up = min(WARM_UP, length)
    if count > 1 and warm_up < length:
        context = source.zeros(count - 1)
        for _, share in source.steps(positions[1:] - warm_up, warm_up):
            context = source.step(context, share)
        residuals.append(_named(_change(context, starts[1:])))
        starts[1:] = context
    active = torch.arange(count, device=values.device)
    changed: Tensor | None = None  # how far the starts of the active blocks have moved
    while max_sweeps is None or len(residuals) < max_sweeps:
        context = starts[active]
        last = int(active[-1]) == count - 1
        tail = total - (count - 1) * length  # tokens in the last block
        for offset, (at, share) in enumerate(source.steps(positions[active], length)):
            if last and offset >= tail:
                share, at = share[:-1], at[:-1]
                if offset == tail:
                    context = context[:-1]
                if len(at) == 0:
                    break
            context = source.step(context, share)
            if changed is not None and offset == length - 1:
                moved = torch.linalg.vector_norm(context - values[at], dim=1)
                passed[active[: len(at)]] = moved / changed[: len(at)]
            values.index_copy_(0, at, context)
        # Each block's last state is the next block's start. What a block ran from (`starts`) is
        # compared, or the small changes of a block that is not repeated would add up unseen.
        handed = torch.cat([start[None], values[positions[1:] - 1]])
        residuals.append(_named(_change(handed, starts)))
        # Not `<= tol` of the largest: a NaN must count as moved.
        still = (_relative(handed, starts) <= tol) & torch.isfinite(handed).all(dim=1)
        active = torch.nonzero(~still)[:, 0]
        changed = torch.linalg.vector_norm(handed - starts, dim=1)[active]
        starts[active] = handed[active]
        if len(active) == 0:
            converged = True
            break
        if len(residuals) > count + 1:  # every start was final, and yet one moved: not finite
            break
    finite = _finite(values)
    bound = math.inf
    if converged and finite:
        bound = off = 0.0
        jumps = _relative(handed, starts)
        for jump, passes in torch.stack([jumps, passed], 1).tolist():
            off += jump
            bound = max(bound, ENLARGED * off)
            off *= passes
    return Contexts(values, residuals, len(residuals), converged and finite, bound)


def _block_length(total: int, device: str) -> int:
    """Long enough for few hand-overs, short enough for many blocks side by side."""
    if total <= SHORTEST_BLOCK + WARM_UP:
        return total
    return max(SHORTEST_BLOCK, math.ceil(total / SIDE_BY_SIDE[device]))


def _diagnose(source: _Source, values: Tensor) -> Recurrence:
    total = source.length
    if total == 1:
        return Recurrence(None, None, [])
    spread = torch.linspace(1, total - 1, min(RESTARTS, total - 1), dtype=torch.float64)
    restarts = spread.round().long().unique().to(values.device)
    # Sorted: those that have not run past the end come first.
    ends = (total - restarts).flip(0)
    inside = (
        len(restarts) - torch.searchsorted(ends, torch.arange(HORIZON).to(ends), right=True)
    ).tolist()

    distances: list[float] = []
    memory: int | None = None
    pending: list[Tensor] = []
    context = source.zeros(len(restarts))
    for k, (at, share) in enumerate(source.steps(restarts, HORIZON)):
        if inside[k] == 0:
            break
        context = source.step(context[: inside[k]], share[: inside[k]])
        pending.append(_relative(context, values[at[: inside[k]]]).mean())
        if len(pending) == LOOK or k + 1 == HORIZON or inside[k + 1] == 0:
            distances += torch.stack(pending).tolist()
            pending = []
            memory = next((i for i, d in enumerate(distances, 1) if d < MEMORY_TOLERANCE), None)
            if memory is not None:
                break

    logs: list[Tensor] = []
    epsilon = torch.finfo(values.dtype).eps
    radius = math.sqrt(epsilon)  # as far from rounding as from where the recurrence bends
    exact = values[restarts - 1]
    context = exact * (1 - radius)
    for k, (at, share) in enumerate(source.steps(restarts, BURN_IN + RATE_STEPS)):
        if inside[k] == 0:
            break
        before = torch.linalg.vector_norm(context - exact, dim=1)[: inside[k]]
        context = source.step(context[: inside[k]], share[: inside[k]])
        exact = values[at[: inside[k]]]
        size = torch.linalg.vector_norm(exact, dim=1)
        difference = context - exact
        after = torch.linalg.vector_norm(difference, dim=1)
        if k >= BURN_IN:
            logs.append((torch.maximum(after, epsilon * size) / before).log())
        turned = difference * (radius * size / after)[:, None]
        context = exact + torch.where((after > 0)[:, None], turned, -radius * exact)
    rate = float(torch.cat(logs).double().mean().exp()) if logs else None
    return Recurrence(rate, memory, distances)


def _finite(values: Tensor) -> bool:
    # Without the copies that isfinite makes; NaN is the least and the greatest.
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def _relative(new: Tensor, old: Tensor) -> Tensor:
    """‖new − old‖ / ‖new‖ per row; 0 where both are zero."""
    difference = torch.linalg.vector_norm(new - old, dim=1)
    norm = torch.linalg.vector_norm(new, dim=1)
    return torch.where(difference == 0, torch.zeros_like(norm), difference / norm)


def _change(new: Tensor, old: Tensor) -> Tensor:
    """The largest change of a row, absolute and relative: [2]."""
    absolute = torch.linalg.vector_norm(new - old, dim=1)
    return torch.stack([absolute.max(), _relative(new, old).max()])


def _named(change: Tensor) -> dict[str, float]:
    absolute, relative = change.tolist()
    return {"absolute": absolute, "relative": relative}
