"""The recurrence c_t = f(c_{t-1}, e_t) evaluated with fixed weights, and exactly (SPEC §7).

`sequential` is the oracle: a loop over tokens. `jacobi` iterates all tokens at once: after k
sweeps a context has seen k tokens. `blocks` cuts the stream into blocks, runs them side by side,
each token by token, hands every block's last state to the next block as its start, and repeats
for the blocks whose start has changed until none has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cvfp.model import ContextBlock, TokenInputs

Method = Literal["sequential", "jacobi", "blocks"]


@dataclass
class Contexts:
    """Contexts of a stream and how far they can be trusted.

    Attributes:
        values: [T, D].
        residuals: per sweep, the largest change it found: {"absolute": …, "relative": …} of the
            block starts (`blocks`) or of all contexts (`jacobi`), relative to their norm.
        converged: the last sweep changed nothing by more than `tol`, and all values are finite.
    """

    values: Tensor
    residuals: list[dict[str, float]]
    sweeps: int
    converged: bool


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
    """Contexts [T, D] from `initial` [D] (zeros). No gradients: use `block` itself for those.

    Args:
        inputs: e_t as [T, n·E], or TokenInputs.
        tol: largest relative change of a start (`blocks`) or context (`jacobi`) that counts as
            none. In units of a context's norm.
        max_sweeps: None: as many as always suffice, since every sweep makes at least one more
            block (`blocks`) or token (`jacobi`) final. A block that contracts takes two or three.
        block_length: tokens in a block; None: chosen from T.

    Raises:
        ValueError: an unknown method, no tokens, or a shape that does not fit.
    """
    source = _Source(block, inputs)
    start = source.zeros(1)[0] if initial is None else initial.to(source.like)
    if start.shape != (block.context_dim,):
        raise ValueError(
            f"initial: got shape {tuple(start.shape)}; accepted: ({block.context_dim},)"
        )
    if len(inputs) == 0:
        raise ValueError("inputs: got no tokens; accepted: at least one")
    if method == "sequential":
        return _sequential(source, start)
    if method == "jacobi":
        return _jacobi(source, start, tol, max_sweeps)
    if method == "blocks":
        return _blocks(source, start, tol, max_sweeps, block_length)
    raise ValueError(f"method: got {method!r}; accepted: 'sequential', 'jacobi' or 'blocks'")


class _Source:
    """The token shares of a stream's positions: gathered from a table's product, or computed."""

    def __init__(self, block: ContextBlock, inputs: Tensor | TokenInputs) -> None:
        self.block = block
        self.inputs = inputs
        self.length = len(inputs)
        table = inputs.table if isinstance(inputs, TokenInputs) else inputs
        self.like = table
        # With a table of no more rows than there are tokens its product is taken once, and a
        # token's share is a lookup.
        self.products: list[Tensor] | None = None
        if isinstance(inputs, TokenInputs) and len(table) <= len(inputs):
            width = table.shape[1]
            self.products = [
                torch.nn.functional.linear(table, part)
                for part in block.token_weight().split(width, dim=1)
            ]

    def zeros(self, rows: int) -> Tensor:
        return self.like.new_zeros(rows, self.block.context_dim)

    def share(self, positions: Tensor | slice) -> Tensor:
        if isinstance(self.inputs, Tensor):
            return self.block.share(self.inputs[positions])
        if self.products is None:
            return self.block.share(self.inputs.dense(positions))
        rows = self.inputs.rows[positions]
        total = self.products[0][rows[:, 0]]
        for slot in range(1, rows.shape[1]):
            total = total + self.products[slot][rows[:, slot]]
        return total


def _sequential(source: _Source, start: Tensor) -> Contexts:
    values = source.zeros(source.length)
    context = start[None]
    chunk = 1024
    for first in range(0, source.length, chunk):
        shares = source.share(slice(first, first + chunk))
        for offset in range(len(shares)):
            context = source.block.step(context, shares[offset : offset + 1])[-1]
            values[first + offset] = context[0]
    return Contexts(values, [], 1, bool(torch.isfinite(values).all()))


def _jacobi(source: _Source, start: Tensor, tol: float, max_sweeps: int | None) -> Contexts:
    values = source.zeros(source.length)
    residuals: list[dict[str, float]] = []
    converged = False
    chunk = 8192
    for _ in range(source.length + 1 if max_sweeps is None else max_sweeps):
        new = torch.empty_like(values)
        for first in range(0, source.length, chunk):
            read = values[max(first - 1, 0) : first + chunk - 1]
            read = read if first else torch.cat([start[None], read])[:chunk]
            piece = slice(first, first + chunk)
            new[piece] = source.block.step(read[: len(new[piece])], source.share(piece))[-1]
        residuals.append(_residual(new, values))
        values = new
        converged = residuals[-1]["relative"] <= tol
        if converged:
            break
    finite = bool(torch.isfinite(values).all())
    return Contexts(values, residuals, len(residuals), converged and finite)


def _blocks(
    source: _Source,
    start: Tensor,
    tol: float,
    max_sweeps: int | None,
    block_length: int | None,
) -> Contexts:
    total = source.length
    length = block_length or _block_length(total)
    count = math.ceil(total / length)
    values = source.zeros(total)
    starts = source.zeros(count)
    starts[0] = start
    positions = torch.arange(count, device=values.device) * length
    active = torch.arange(count, device=values.device)
    residuals: list[dict[str, float]] = []
    converged = False
    for _ in range(count + 1 if max_sweeps is None else max_sweeps):
        context = starts[active]
        last = int(active[-1]) == count - 1
        tail = total - (count - 1) * length  # tokens in the last block
        for offset in range(length):
            if last and offset == tail:
                active, context = active[:-1], context[:-1]
                if len(active) == 0:
                    break
            at = positions[active] + offset
            context = source.block.step(context, source.share(at))[-1]
            values[at] = context
        # Each block's last state is the next block's start.
        handed = torch.cat([start[None], values[positions[1:] - 1]])
        residuals.append(_residual(handed, starts))
        moved = _relative(handed, starts) > tol
        starts = handed
        # Not `max <= tol`: a NaN must count as moved.
        active = torch.nonzero(moved | ~torch.isfinite(handed).all(dim=1))[:, 0]
        if len(active) == 0:
            converged = True
            break
    finite = bool(torch.isfinite(values).all())
    return Contexts(values, residuals, len(residuals), converged and finite)


def _block_length(total: int) -> int:
    """Short enough for many blocks side by side, long enough for few hand-overs."""
    return min(256, max(32, 2 ** round(math.log2(max(total, 1)) / 2)))


def _relative(new: Tensor, old: Tensor) -> Tensor:
    """‖new − old‖ / ‖new‖ per row; 0 where both are zero."""
    difference = torch.linalg.vector_norm(new - old, dim=1)
    norm = torch.linalg.vector_norm(new, dim=1)
    return torch.where(difference == 0, torch.zeros_like(norm), difference / norm)


def _residual(new: Tensor, old: Tensor) -> dict[str, float]:
    absolute = torch.linalg.vector_norm(new - old, dim=1).max()
    relative = _relative(new, old).max()
    return {"absolute": float(absolute), "relative": float(relative)}
