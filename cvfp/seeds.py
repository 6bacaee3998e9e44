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


def normals(generator: torch.Generator) -> Callable[[Tensor, float], Tensor]:
    """A source of Gaussian draws: called with a tensor and a standard deviation, it fills it.

    On a CPU `Tensor.normal_` is serial. There the draws are random bits through the inverse of the
    distribution function, four times as fast, with a resolution of 2^-24 (values up to 5.3 sigma).
    """
    if generator.device.type != "cpu":
        return lambda out, std: out.normal_(0.0, std, generator=generator)
    bits = np.random.SFC64(int(torch.randint(2**63 - 1, (), generator=generator, device="cpu")))

    def fill(out: Tensor, std: float) -> Tensor:
        words = bits.random_raw((out.numel() + 1) // 2).view(np.int32)[: out.numel()]
        uniform = torch.from_numpy(words).to(torch.float32).mul_(2.0**-31)
        uniform.clamp_(2.0**-24 - 1, 1 - 2.0**-24)  # at 1 the inverse is infinite
        return out.copy_(uniform.erfinv_().mul_(std * 2**0.5).view(out.shape))

    return fill
