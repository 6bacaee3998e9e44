"""The formulas as they read: the definition that every faster version is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def residual_norm(
    parts: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
) -> Tensor:
    product = F.linear(torch.cat(list(parts), dim=-1), weight, bias)
    return F.layer_norm(residual + F.relu(product), scale.shape, scale, shift, eps)


def change_and_spread(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    change = (new - old).square().mean(dim=2)
    centred = new - new.mean(dim=1, keepdim=True)
    return change, torch.linalg.vector_norm(centred, dim=(1, 2)) / new.shape[1]


def next_token_nats(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), target)


def score_next_tokens(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight, bias)
    nats = F.cross_entropy(logits, target, reduction="none")
    right = logits.gather(1, target[:, None])
    others = logits.scatter_(1, target[:, None], -torch.inf)  # in place: the logits are our own
    return nats, right.squeeze(1) > others.amax(dim=1)


def log_partition(hidden: Tensor, weight: Tensor, bias: Tensor, shares: Tensor) -> Tensor:
    return shares @ torch.logsumexp(F.linear(hidden, weight, bias), dim=1)


def gaussian_(out: Tensor, std: float, generator: torch.Generator, rows: int) -> Tensor:
    for piece in out.split(rows):
        piece.normal_(0.0, std, generator=generator)
    return out
