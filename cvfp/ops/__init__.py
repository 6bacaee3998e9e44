"""The door to speed: formulas on tensors, each differentiable by autograd.

Every function has a plain form (`cvfp.ops.plain`), which is its definition, and where it pays a
faster one for the device and type of its arguments; `using("plain")` takes the plain form
everywhere. The rest of the package knows nothing of devices, types or memory beyond this door.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from cvfp.errors import ParameterError
from cvfp.ops import fused, graph, placement, plain
from cvfp.ops.adam import Adam
from cvfp.ops.placement import prefetch as prefetch
from cvfp.ops.precision import WORTH as WORTH
from cvfp.ops.precision import autocast as autocast
from cvfp.ops.precision import bfloat16_gain as bfloat16_gain
from cvfp.ops.precision import full_precision as full_precision
from cvfp.ops.precision import processor as processor
from cvfp.ops.precision import product_rate as product_rate

MODES = ("auto", "plain")
_mode: ContextVar[str] = ContextVar("ops", default="auto")


@contextmanager
def using(mode: str) -> Iterator[None]:
    """Within the block: "plain", the formulas as they read; "auto", the fastest there is.

    Raises:
        ParameterError: another mode.
    """
    if mode not in MODES:
        raise ParameterError("ops", mode, " or ".join(map(repr, MODES)))
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def _engine(*tensors: Tensor | None) -> Any:
    """The module that takes these tensors fastest."""
    here = [tensor for tensor in tensors if tensor is not None]
    known = all(t.dtype == torch.float32 and t.device.type in fused.DEVICES for t in here)
    return fused if known and _mode.get() == "auto" else plain


def residual_norm(
    parts: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
) -> Tensor:
    """LayerNorm(residual + ReLU([parts] @ weight.T + bias)): a layer of either block.

    Args:
        parts: [..., K_i] each, side by side the [..., K] that `weight` [W, K] multiplies.
        residual: [..., W]; scale, shift: [W], the LayerNorm's.
    """
    layer = weight, bias, residual, scale, shift, eps
    made: Tensor = _engine(weight, bias, scale, shift).residual_norm(parts, *layer)
    return made


def change_and_spread(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Of contexts [K, G, D]: each one's mean squared change [K, G], and each group's spread,
    ‖C − mean‖_F / G [K]."""
    figures: tuple[Tensor, Tensor] = _engine(new, old).change_and_spread(new, old)
    return figures


def next_token_nats(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of `target` [B] under softmax(hidden [B, E] · weightᵀ [V, E] +
    bias [V])."""
    nats: Tensor = _engine(hidden, weight, bias).next_token_nats(hidden, weight, bias, target)
    return nats


@torch.no_grad()
def score_next_tokens(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each `target` [B] in float64, and whether its logit is above all others
    (a tie is wrong); without a graph."""
    engine = _engine(hidden, weight, bias)
    nats, correct = engine.score_next_tokens(hidden, weight, bias, target)
    return nats.double(), correct


def log_partition(hidden: Tensor, weight: Tensor, bias: Tensor, shares: Tensor) -> Tensor:
    """Σ_b shares_b · log Σ_v exp(hidden_b · weight_v + bias_v), in nats: what a softmax over
    `weight` [V, E] has in common for every target of `hidden` [B, E]; `shares` [B] is constant."""
    total: Tensor = _engine(hidden, weight, bias).log_partition(hidden, weight, bias, shares)
    return total


def gaussian_(out: Tensor, std: float, generator: torch.Generator, rows: int) -> Tensor:
    """`out` [B, W], filled with Gaussian draws of mean 0 and that standard deviation, `rows` rows
    at a time: the same draws however many such pieces are passed at once."""
    return plain.gaussian_(out, std, generator, rows)


def recorded(step: Callable[..., Tensor], steps: int) -> Callable[..., Tensor]:
    """`step`, on a GPU recorded as a CUDA graph and replayed where that pays over `steps` calls.

    `step` may depend on its tensor arguments alone; the next call overwrites its result.
    """
    if _mode.get() == "plain" or not torch.cuda.is_available():
        return step
    return graph.Recorded(step) if steps >= graph.WORTH_RECORDING else step


def optimiser(parameters: Sequence[Tensor], lr: float, decay: float = 0.0) -> Any:
    """Adam with torch's defaults: `zero_grad()`, `step()`; with `decay`, AdamW."""
    if _mode.get() == "plain":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    return Adam(parameters, lr, decay)


def context_rows(total: int, width: int, precision: str, like: Tensor) -> Tensor:
    """An empty [total, width] for contexts, in the type of the products, wherever it fits."""
    dtype = torch.bfloat16 if precision == "bfloat16" else like.dtype
    return placement.rows(total, width, dtype, like.device)


def group_slices(
    total: int, group: int, width: int, layers: int, device: torch.device
) -> list[slice]:
    """A stream of `total` tokens in slices of whole groups, as many as the device takes at once;
    "plain": one. A smaller last group has a slice of its own.

    Args:
        layers: of the model that reads them, each of which keeps what its gradient takes.
    """
    at_once = 1
    if _mode.get() == "auto":
        most = placement.memory(device) // 8 // (placement.LAYER_BYTES * layers + 48)
        at_once = max(1, min(placement.PASS[device.type], most) // (group * width))
    return placement.slices(total, group, at_once)


def batches_at_once(size: int, widths: Sequence[int], device: torch.device) -> int:
    """Batches of `size` positions for which a frozen block's outputs are held; "plain": one."""
    if _mode.get() == "plain":
        return 1
    return max(1, placement.PASS[device.type] // (size * sum(widths)))


def rows_at_once(vocab_size: int, device: torch.device) -> int:
    """Positions scored at a time."""
    return max(1, placement.LOGITS[device.type] // vocab_size)


def side_by_side(device: torch.device) -> int:
    """Blocks of a recurrence that fill the device without spilling its caches."""
    return placement.SIDE_BY_SIDE[device.type]
