"""The figures of a run (docs/method.md, *Metrics*)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cvfp.share import ALONE, Ranks


def singular_values(contexts: Tensor, device: str | None = None, share: Ranks = ALONE) -> Tensor:
    """Uncentred singular values of [T, D], float64, descending, at most min(T, D) of them, computed
    on `device` (None: where the contexts are).

    From the D x D Gram matrix in float64: its eigenvalues' roots. Faster than an SVD and uses
    every token; values under 1e-8 of the largest are lost in rounding.
    """
    width = contexts.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=device or contexts.device)
    for chunk in contexts.split(65_536):
        exact = chunk.to(gram)
        gram += exact.T @ exact
    share.add([gram])
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()
    return values[: min(contexts.shape)]


def effective_rank(singular: Tensor) -> float:
    """exp(entropy of σ/Σσ), in dimensions (Roy & Vetterli 2007); 0 for all-zero contexts."""
    total = singular.sum()
    if total == 0:
        return 0.0
    shares = singular / total
    return math.exp(float(torch.special.entr(shares).sum()))


def perplexity(nats_per_token: float) -> float:
    """exp of the mean cross-entropy; infinite where that exceeds a float."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


def bits_per_byte(total_nats: float, total_bytes: int) -> float:
    """Cross-entropy in bits over the UTF-8 bytes of the predicted tokens."""
    return total_nats / math.log(2) / total_bytes


def relative_errors(contexts: Tensor, reference: Tensor) -> Tensor:
    """‖Δ‖/‖reference‖ of each row of [T, D], 0 where they are equal: [T]."""
    difference = torch.linalg.vector_norm(contexts - reference, dim=1)
    norm = torch.linalg.vector_norm(reference, dim=1)
    return torch.where(difference == 0, 0, difference / norm)
