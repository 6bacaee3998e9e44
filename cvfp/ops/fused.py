"""The formulas with gradients by hand: they save, cast and read only what the gradient needs,
and logits stay in the type of the products, a few rows at a time on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvfp.ops import plain
from cvfp.ops.precision import product_type

DEVICES = ("cpu", "cuda")
# Matrix units work in tiles: in bfloat16 50,257 logits cost a GPU more than 50,304.
TILE = {"cpu": 1, "cuda": 64}
# Logits computed at a time: what a CPU's caches hold; all on a GPU.
LOGITS = {"cpu": 2**22, "cuda": 2**40}
TINY = torch.finfo(torch.float32).tiny


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a·b in `dtype`, on a GPU not rounded to the type of a and b on the way (torch 2.8 on)."""
    if a.dtype != dtype and a.is_cuda and "dtype" in torch.ops.aten.mm.overloads():
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def _sum(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_b rows[b], as a product on a CPU, where sums over rows take twice as long."""
    if rows.is_cuda:
        return rows.sum(0, dtype=dtype)
    return (rows.new_ones(1, len(rows)) @ rows)[0].to(dtype)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        dtype: torch.dtype,
        *parts: Tensor,
    ) -> Tensor:
        ctx.widths = [part.shape[-1] for part in parts]
        with torch.autocast(weight.device.type, enabled=False):
            read = residual.new_empty(*residual.shape[:-1], sum(ctx.widths), dtype=dtype)
            for place, part in zip(read.split(ctx.widths, dim=-1), parts, strict=True):
                place.copy_(part)
            read = read.flatten(0, -2)
            product = torch.addmm(bias.to(dtype), read, weight.to(dtype).T).relu_()
            total = residual.reshape(product.shape).to(scale.dtype) + product
            out, *moments = torch.native_layer_norm(total, scale.shape, scale, shift, eps)
        ctx.save_for_backward(read, product, total, weight, residual, scale, shift, *moments)
        return out.view(residual.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        read, product, total, weight, residual, scale, shift, *moments = ctx.saved_tensors
        for_total, for_scale, for_shift = torch.ops.aten.native_layer_norm_backward(
            gradient.reshape(total.shape),
            total,
            scale.shape,
            *moments,
            scale,
            shift,
            [True, True, True],
        )
        for_product = torch.ops.aten.threshold_backward(for_total.to(product.dtype), product, 0)
        for_parts: list[Tensor | None] = []
        with torch.autocast(weight.device.type, enabled=False):
            for_weight = _product(for_product.T, read, weight.dtype)
            for_bias = _sum(for_product, scale.dtype)
            columns = weight.to(product.dtype).split(ctx.widths, dim=1)
            for needed, column in zip(ctx.needs_input_grad[7:], columns, strict=True):
                made = _product(for_product, column, scale.dtype) if needed else None
                for_parts.append(None if made is None else made.view(*residual.shape[:-1], -1))
        for_residual = for_total.to(residual.dtype).view(residual.shape)
        return for_weight, for_bias, for_residual, for_scale, for_shift, None, None, *for_parts


def residual_norm(
    parts: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
) -> Tensor:
    layer = weight, bias, residual, scale, shift, eps
    made: Tensor = _ResidualNorm.apply(*layer, product_type(weight), *parts)
    return made


class _NextTokenNats(torch.autograd.Function):
    """Softmax minus one-hot is the gradient of the logits: one softmax serves loss and gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        device, (size, width), total = weight.device.type, weight.shape, len(hidden)
        tile = TILE[device] if dtype == torch.bfloat16 else 1
        rows = math.ceil(size / tile) * tile  # what fills the last tile has no share in the softmax
        at_once = max(64, LOGITS[device] // rows)
        table = weight.new_empty(rows, width, dtype=dtype)
        table[:size], table[size:] = weight, 0
        offset = weight.new_full((rows,), -math.inf, dtype=dtype)
        offset[:size] = 0 if bias is None else bias
        for_hidden, nats = torch.empty_like(hidden), hidden.new_empty(total)
        for_weight: Tensor | None = None
        for_bias: Tensor | None = None
        with torch.autocast(device, enabled=False):
            for i in range(0, total, at_once):
                some = slice(i, i + at_once)
                read = hidden[some].to(dtype)
                if bias is None and rows == size:
                    shares = read @ table.T
                else:
                    shares = torch.addmm(offset, read, table.T)
                torch.softmax(shares, dim=1, out=shares)
                here = torch.arange(len(shares), device=shares.device), target[some]
                # A share too small for its type counts as the smallest there is.
                nats[some] = -shares[here].to(nats.dtype).clamp(min=TINY).log()
                shares[here] -= 1  # scatter_add_ copies all of it in bfloat16
                for_hidden[some] = _product(shares, table, hidden.dtype)
                if ctx.needs_input_grad[1]:
                    across = _product(shares.T, read, hidden.dtype)[:size]
                    for_weight = across if for_weight is None else for_weight.add_(across)
                if ctx.needs_input_grad[2]:
                    summed = _sum(shares, hidden.dtype)[:size]
                    for_bias = summed if for_bias is None else for_bias.add_(summed)
        ctx.save_for_backward(*[for_hidden, for_weight, for_bias])
        ctx.total = total
        return nats.mean()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale = upstream / ctx.total
        return *[None if one is None else one * scale for one in ctx.saved_tensors], None, None


def next_token_nats(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    nats: Tensor = _NextTokenNats.apply(hidden, weight, bias, target, product_type(weight))
    return nats


def score_next_tokens(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor]:
    if hidden.is_cuda:
        return plain.score_next_tokens(hidden, weight, bias, target)
    logits = F.linear(hidden, weight, bias)  # the rest in place: fresh memory costs a CPU more
    here = torch.arange(len(target)), target
    right = logits[here]
    logits[here] = -math.inf
    others = logits.amax(dim=1)
    most = torch.maximum(others, right)
    rest = logits.sub_(most[:, None]).exp_().sum(dim=1)
    gap = right - most
    return (rest + gap.exp()).log() - gap, right > others


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, shares: Tensor) -> Tensor:
        logits = torch.addmm(bias, hidden, weight.T)
        totals = torch.logsumexp(logits, dim=1)
        logits.sub_(totals[:, None]).exp_().mul_(shares[:, None])
        ctx.save_for_backward(hidden, weight, logits)
        return shares @ totals

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, logits = ctx.saved_tensors
        made = logits @ weight, logits.T @ hidden, logits.sum(0)
        return *(one.mul_(upstream) for one in made), None


def log_partition(hidden: Tensor, weight: Tensor, bias: Tensor, shares: Tensor) -> Tensor:
    total: Tensor = _LogPartition.apply(hidden, weight, bias, shares)
    return total


class _ChangeAndSpread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        size, width = new.shape[1:]
        delta, centred = new - old, new - new.mean(dim=1, keepdim=True)
        change = torch.linalg.vector_norm(delta, dim=2).square_().div_(width)
        spread = torch.linalg.vector_norm(centred, dim=(1, 2)).div_(size)
        ctx.save_for_backward(delta, centred, spread)
        return change, spread

    @staticmethod
    def backward(ctx: Any, for_change: Tensor, for_spread: Tensor) -> tuple[Tensor, None]:
        delta, centred, spread = ctx.saved_tensors
        size, width = delta.shape[1:]
        # Equal contexts have no direction in which to part.
        pull = for_spread / (size**2 * spread.clamp(min=TINY))
        gradient = delta * (for_change * (2 / width))[..., None]
        return gradient.addcmul_(centred, pull[:, None, None]), None


def change_and_spread(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    made: tuple[Tensor, Tensor] = _ChangeAndSpread.apply(new, old)
    return made
