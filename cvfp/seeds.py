"""The one place where random generators are made."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch

# A purpose has a stream of its own: drawing more for one changes none of the others.
Purpose = Literal[
    "context_block", "phase1", "token_block", "batches", "embedding", "gap", "order", "peer"
]
PURPOSES = get_args(Purpose)


def generator(seed: int, purpose: Purpose, device: str = "cpu") -> torch.Generator:
    """A generator on `device` for one purpose, independent of the other purposes'."""
    sequence = np.random.SeedSequence([seed, PURPOSES.index(purpose)])
    state = int(sequence.generate_state(1, np.uint64)[0]) >> 1
    return torch.Generator(device).manual_seed(state)
