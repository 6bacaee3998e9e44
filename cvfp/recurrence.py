"""How a recurrence forgets where it started (docs/method.md, *Metrics*)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cvfp import ops
from cvfp.contexts import Stream
from cvfp.inputs import TokenInputs
from cvfp.metrics import relative_errors
from cvfp.model import Block

RESTARTS = 1024
HORIZON = 256  # tokens that a restarted context may take to forget
BURN_IN, RATE_STEPS = 16, 64  # in which a difference turns its own way; then the rate is measured
LOOK = 8  # distances read from the device at once
MEMORY_TOLERANCE = 0.01


@dataclass
class Recurrence:
    """How a recurrence forgets."""

    # Geometric mean, per token, by which two nearby trajectories approach; its logarithm is the
    # largest Lyapunov exponent. Over 1: they part. None: too few tokens.
    contraction_rate: float | None
    # The smallest number of tokens after which a context restarted from zeros is within 1 % of the
    # exact one (relative, mean over restarts). None: not within `distances`.
    memory_length: int | None
    distances: list[float]  # that distance after 1, 2, … tokens


@torch.no_grad()
def diagnose(block: Block, inputs: Tensor | TokenInputs, values: Tensor) -> Recurrence:
    """How fast the recurrence forgets, from its exact contexts `values` [T, D].

    At up to 1,024 places, spread over the stream, a context is restarted from zeros and followed
    until it is within 1 % of the exact one; and one that differs by a little is followed, its
    difference pulled back to the same small size after every token.

    Raises:
        ValueError: as many values as inputs are needed, or an input that `evaluate` refuses.
    """
    stream = Stream(block, inputs)
    total = stream.length
    if len(values) != total:
        raise ValueError(f"values: got {len(values)} contexts; accepted: {total}")
    if total == 1:
        return Recurrence(None, None, [])
    spread = torch.linspace(1, total - 1, min(RESTARTS, total - 1), dtype=torch.float64)
    restarts = spread.round().long().unique().to(values.device)
    with ops.full_precision(values.device):
        distances = _distances(stream, values, restarts)
        rate = _rate(stream, values, restarts)
    forgotten = (k for k, distance in enumerate(distances, 1) if distance < MEMORY_TOLERANCE)
    return Recurrence(rate, next(forgotten, None), distances)


def _distances(stream: Stream, values: Tensor, restarts: Tensor) -> list[float]:
    """From contexts restarted from zeros to the exact ones, after 1, 2, … tokens."""
    distances: list[float] = []
    pending: list[Tensor] = []
    end = stream.length - int(restarts[0])  # tokens that the first restart can be followed
    for k, context in enumerate(stream.steps(stream.zeros(len(restarts)), restarts, HORIZON)):
        at = restarts + k
        inside = at < stream.length
        apart = relative_errors(context, values[at.clamp(max=stream.length - 1)])
        pending.append(torch.where(inside, apart, 0).sum() / inside.sum())
        last = k + 1 == min(end, HORIZON)
        if len(pending) == LOOK or last:
            distances += torch.stack(pending).tolist()
            pending = []
        if last or any(distance < MEMORY_TOLERANCE for distance in distances):
            break
    return distances


def _rate(stream: Stream, values: Tensor, restarts: Tensor) -> float | None:
    """The geometric mean of the factors by which a small difference changes, per token."""
    epsilon = torch.finfo(values.dtype).eps
    radius = math.sqrt(epsilon)  # as far from rounding as from where the recurrence bends
    logs, count = values.new_zeros(2, dtype=torch.float64)
    exact = values[restarts - 1]
    context = exact * (1 - radius)
    step = ops.recorded(stream.step, BURN_IN + RATE_STEPS)
    for k in range(BURN_IN + RATE_STEPS):
        at = restarts + k
        inside = at < stream.length
        at = at.clamp(max=stream.length - 1)
        before = torch.linalg.vector_norm(context - exact, dim=1)
        exact = values[at]
        size = torch.linalg.vector_norm(exact, dim=1)
        difference = step(context, at) - exact
        after = torch.linalg.vector_norm(difference, dim=1)
        if k >= BURN_IN:
            factor = (torch.maximum(after, epsilon * size) / before).log()
            logs += torch.where(inside, factor, 0).sum(dtype=torch.float64)
            count += inside.sum()
        turned = difference * (radius * size / after)[:, None]
        context = exact + torch.where((after > 0)[:, None], turned, -radius * exact)
    return math.exp(float(logs / count)) if count else None
