"""The one place where random generators are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    what to draw around, B rows in one piece or several (nothing: zero), it fills the tensor.

    On a CPU `Tensor.normal_` is serial, and five times as slow as what float32 gets here.
    """
    seed: int | None = None

    def fill(out: Tensor, std: float, *around: Tensor) -> Tensor:
        nonlocal seed
        pieces = out.split([len(piece) for piece in around]) if around else (out,)
        if out.device.type != "cpu":
            out.normal_(0.0, std, generator=generator)
            for piece, given in zip(pieces, around, strict=False):
                piece.add_(given)
            return out
        from cvfp import kernels

        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), generator=generator, device="cpu"))
        centres: Sequence[Tensor | None] = around or [None]
        for piece, centre in zip(pieces, centres, strict=True):
            if out.dtype == torch.float32:
                seed = kernels.normals(piece, std, centre, seed)
                continue
            draws = torch.empty(piece.shape, dtype=torch.float32, device="cpu")
            seed = kernels.normals(draws, std, None, seed)
            piece.copy_(draws)
            if centre is not None:
                piece.add_(centre)
        return out

    return fill
