"""The one place where random generators are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

# A purpose has a stream of its own: drawing more for one changes none of the others.
PURPOSES = (
    "context_block",
    "phase1",
    "token_block",
    "batches",
    "embedding",
    "gap",
    "order",
    "peer",
)
Purpose = Literal[
    "context_block", "phase1", "token_block", "batches", "embedding", "gap", "order", "peer"
]


def generator(seed: int, purpose: Purpose, device: str = "cpu") -> torch.Generator:
    """A generator on `device` for one purpose, independent of the other purposes'."""
    sequence = np.random.SeedSequence([seed, PURPOSES.index(purpose)])
    state = int(sequence.generate_state(1, np.uint64)[0]) >> 1
    return torch.Generator(device).manual_seed(state)


def normals(generator: torch.Generator) -> Callable[..., Tensor]:
    """A source of Gaussian draws: called with a tensor [B, W] to fill, a standard deviation, and
    what to draw around [B, W] (nothing: zero), it fills the tensor.

    On a CPU `Tensor.normal_` is serial, and five times as slow as what float32 gets here.
    """
    seed: int | None = None

    def fill(out: Tensor, std: float, around: Tensor | None = None) -> Tensor:
        nonlocal seed
        if out.device.type != "cpu":
            out.normal_(0.0, std, generator=generator)
            return out if around is None else out.add_(around)
        from cvfp import kernels

        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), generator=generator, device="cpu"))
        if out.dtype == torch.float32:
            seed = kernels.normals(out, std, around, seed)
            return out
        draws = torch.empty(out.shape, dtype=torch.float32, device="cpu")
        seed = kernels.normals(draws, std, None, seed)
        return out.copy_(draws) if around is None else torch.add(around, draws, out=out)

    return fill
