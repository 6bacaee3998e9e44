"""Phase 1: contexts learned as fixed points (SPEC §3).

The Jacobi method on the recurrence c_t = f(c_{t-1}, e_t): every iteration applies the ContextBlock
to all tokens at once, each reading its predecessor's context of the iteration before, and takes
one Adam step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cvfp import memory, seeds
from cvfp.config import Experiment
from cvfp.model import (
    ContextBlock,
    ContextLayer,
    TokenInputs,
    exact_product,
    looped,
    product_type,
)
from cvfp.optimiser import Adam

if TYPE_CHECKING:
    from cvfp.kernels import Room

INITIAL_STD = 0.01
QUANTILES = (0.1, 0.5, 0.9)
# Numbers of [tokens, D] that go through the block at once, in whole groups: near the cache on a
# CPU, enough to fill a GPU.
PASS = {"cpu": 2**20, "cuda": 2**26, "mps": 2**24}
# Note 004's rules for giving up: judged once, at this iteration.
ABORT_ITERATION = 20
ABORT_SINCE = 15
ABORT_RANK = 0.70


@dataclass
class Phase1:
    """What Phase 1 leaves.

    Attributes:
        contexts: [T, D], the last iterate as it was made: with noise, before the last update. In
            the type of the products, and where `memory.rows` found room for them.
        iterations: the published count, in which the initial contexts are number 1.
        converged: fraction of tokens whose mean squared change was under the threshold.
        history: one dict per iteration from 2 on: iteration, loss, change (mean squared),
            diversity (‖C − mean‖_F / tokens, mean over groups), converged, and the 10, 50 and
            90 % quantiles of the tokens' changes; at iteration 20 also what the probe found.
        aborted: why Phase 1 gave up, where it was allowed to and did.
    """

    contexts: Tensor
    iterations: int
    converged: float
    history: list[dict[str, float]] = field(default_factory=list)
    aborted: str | None = None


def abort_reason(history: Sequence[Mapping[str, float]]) -> str | None:
    """Which of note 004's rules say at iteration 20 that Phase 1 should be given up; None: none do.

    They are: effective rank of the validation contexts under 70 %; no more tokens converged than at
    iteration 15; a loss no lower than the first. A Phase 1 that ended sooner is never given up.
    """
    rows = {int(row["iteration"]): row for row in history}
    now, since = rows.get(ABORT_ITERATION), rows.get(ABORT_SINCE)
    if now is None or since is None:
        return None
    said = []
    rank = now.get("val_er")
    if rank is not None and rank < ABORT_RANK:
        said.append(f"effective rank {rank:.1%} under {ABORT_RANK:.0%}")
    if now["converged"] <= since["converged"] and now["converged"] < 1:
        said.append(f"converged tokens {since['converged']:.1%} -> {now['converged']:.1%}")
    if now["loss"] >= history[0]["loss"]:
        said.append(f"loss {history[0]['loss']:.4g} -> {now['loss']:.4g}")
    return "; ".join(said) or None


def group_loss(
    contexts: Tensor, previous: Tensor, dist_reg_weight: float, room: Room | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of each of K groups [K, G, D]: (1-w)·MSE − w·‖C − mean‖_F / G.

    Returns:
        The losses [K], the diversity terms ‖C − mean‖_F / G [K], each token's mean squared change
        [K, G], and the losses' gradient [K, G, D]: by hand, since autograd takes twice as many
        passes over the contexts.
    """
    if looped(contexts):
        from cvfp import kernels

        return kernels.group_loss(contexts, previous, dist_reg_weight, room)
    size, width = contexts.shape[1:]
    delta = contexts - previous
    change = torch.linalg.vector_norm(delta, dim=2).square() / width
    centred = contexts - contexts.mean(dim=1, keepdim=True)
    spread = torch.linalg.vector_norm(centred, dim=(1, 2))
    diversity = spread / size
    losses = (1 - dist_reg_weight) * change.mean(dim=1) - dist_reg_weight * diversity
    # Equal contexts have no direction in which to part.
    pull = dist_reg_weight / size / spread.clamp(min=torch.finfo(spread.dtype).tiny)
    gradient = delta.mul_(2 * (1 - dist_reg_weight) / (size * width))
    gradient.addcmul_(centred, pull[:, None, None], value=-1)
    return losses, diversity, change, gradient


class Step:
    """One application of a ContextBlock, as `ContextBlock.step`, with its gradients by hand.

    Autograd would keep more, cast more and add up more: a third of an iteration's time.

    Args:
        layers: of the block, in the type of the products.
        context: [B, D]; inputs: e [B, n·E].

    Attributes:
        made: the new contexts [B, D]; rounded: the same in the type of the products.
    """

    def __init__(
        self,
        block: ContextBlock,
        layers: Sequence[ContextLayer],
        context: Tensor,
        inputs: Tensor,
        room: Room | None = None,
    ) -> None:
        self.block, self.layers, self.room = block, layers, room
        self.outputs, self.reads = block.outputs(context, inputs, layers, keep=True, room=room)
        self.made, self.rounded = self.outputs[-1].out, self.outputs[-1].rounded

    def backward(self, gradient: Tensor) -> None:
        """Add the gradients of the parameters, given that of `made`, to what they have."""
        exact, block, added = gradient.dtype, self.block, None
        for i in reversed(range(len(self.layers))):
            layer, made, read = self.layers[i], self.outputs.pop(), self.reads.pop()
            norm, linear = layer.norm, block.linears[i]
            room = None if self.room is None else self.room.of("gradients", i % 2)
            gradient, into, sums = made.backward(gradient, added, room)
            for parameter, summed in zip((norm.weight, norm.bias, linear.bias), sums, strict=True):
                _add(parameter, summed)
            _add(linear.weight, exact_product(into.t(), read, exact))
            if layer.residual is not None:
                residual, rounded = block.residuals[i], gradient.to(read.dtype)
                of_context = read[:, : layer.read]
                _add(residual.weight, exact_product(rounded.t(), of_context, exact))
                _add(residual.bias, rounded.sum(0, dtype=exact))
                gradient = exact_product(rounded, layer.residual[0], exact)
            added = into, layer.weight[: layer.read].t()


def _add(parameter: Any, gradient: Tensor) -> None:
    parameter.grad += gradient


@torch.no_grad()
def train(
    block: ContextBlock,
    inputs: TokenInputs,
    experiment: Experiment,
    generator: torch.Generator,
    report: Callable[[dict[str, float]], None] = lambda row: None,
    probe: Callable[[], dict[str, float]] = dict,
) -> Phase1:
    """Train `block` in place until its contexts over the stream stop changing.

    Args:
        inputs: e_t for T positions.
        experiment: its `phase1` fields, and the precision of the products and of the contexts.
        generator: on the device of the block; draws the initial contexts and the noise.
        report: called with each row of the history.
        probe: called once, after iteration 20 if there is one; what it returns joins that row.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    device = inputs.table.device
    exact = inputs.table.dtype
    dtype = product_type(experiment.precision, inputs.table)
    draw = seeds.normals(generator)
    total, width = len(inputs), block.context_dim
    size = min(experiment.loss_group, total)
    # What a number costs: read, product and sum of every layer, and half a dozen besides.
    wide = 1 + block.input_dim / width
    most = memory.pass_bytes(device) // int((6 + 2 * wide) * len(block.linears) + 24)
    whole = max(1, min(PASS[device.type], most) // (size * width)) * size
    end = total - total % size
    passes = [slice(i, min(i + whole, end)) for i in range(0, end, whole)]
    passes += [slice(end, total)] if end < total else []  # the last group is smaller
    groups = math.ceil(total / size)
    contexts = memory.rows(total, width, dtype, device)
    for part in passes:
        fresh = torch.empty(part.stop - part.start, width, dtype=exact, device=device)
        contexts[part] = draw(fresh, INITIAL_STD)
    room = None
    if looped(inputs.table):
        from cvfp import kernels

        room = kernels.Room()
    inputs = inputs.to(dtype)
    optimiser = Adam(block.parameters(), experiment.phase1_learning_rate)
    result = Phase1(contexts, 1, 0.0)
    change = torch.empty(total, device=device)
    for iteration in range(2, experiment.phase1_max_iterations + 1):
        losses = torch.zeros(2, device=device)
        for parameter in block.parameters():
            parameter.grad = torch.zeros_like(parameter)
        layers = block.layers(dtype)
        # Token t reads the context of t-1; token 0 that of the last (a ring). The new contexts
        # take the old ones' place, pass by pass: `last` is what the next pass has to read first.
        last = contexts[-1:].to(device, copy=True)
        for part, previous in memory.ahead(contexts, passes, device):
            read = (
                torch.empty(previous.shape, dtype=exact, device=device)
                if room is None
                else room("read", previous.shape, exact)
            )
            shape = (-1, min(size, len(read)), width)
            for group, around in zip(read.view(shape), previous.view(shape), strict=True):
                # The same however groups are passed
                draw(group, experiment.phase1_noise, last, around[:-1])
                last = around[-1:]
            last = last.clone()
            step = Step(block, layers, read, inputs.dense(part, room), room)
            grouped = step.made.view(shape), previous.view(shape)
            each, diversity, changed, gradient = group_loss(
                *grouped, experiment.dist_reg_weight, room
            )
            losses += torch.stack([each.sum(), diversity.sum()]) / groups
            change[part] = changed.flatten()
            contexts[part] = step.rounded
            step.backward(gradient.div_(groups).view(step.made.shape))
        torch.nn.utils.clip_grad_norm_(block.parameters(), experiment.phase1_gradient_clip)
        optimiser.step()
        converged = (change < experiment.convergence_threshold).float().mean()
        # The one read from the device in an iteration.
        figures = torch.cat(
            [losses, torch.stack([change.mean(), converged]), _quantiles(change)]
        ).tolist()
        names = (
            "loss",
            "diversity",
            "change",
            "converged",
            "change_p10",
            "change_p50",
            "change_p90",
        )
        row = {"iteration": float(iteration), **dict(zip(names, figures, strict=True))}
        if not all(map(math.isfinite, figures)):
            raise FloatingPointError(
                f"Phase 1 is not finite at iteration {iteration}: {row}; "
                "a smaller phase1_learning_rate would be accepted"
            )
        if iteration == ABORT_ITERATION:
            row |= probe()
        result.history.append(row)
        result.iterations, result.converged = iteration, row["converged"]
        report(row)
        done = row["converged"] >= experiment.convergence_rate
        if done and iteration >= experiment.phase1_min_iterations:
            break
        if experiment.phase1_abort and iteration == ABORT_ITERATION:
            result.aborted = abort_reason(result.history)
            if result.aborted is not None:
                break
    return result


def _quantiles(change: Tensor) -> Tensor:
    if change.device.type == "cpu":  # by selection; torch sorts
        return torch.from_numpy(np.quantile(change.numpy(), QUANTILES)).to(change)
    # torch.quantile refuses more than 16 M values; every k-th token says as much.
    levels = change.new_tensor(QUANTILES)
    return torch.quantile(change[:: max(1, len(change) // 1_000_000)], levels)
