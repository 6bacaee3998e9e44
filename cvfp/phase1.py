"""Phase 1: contexts learned as fixed points (docs/method.md, *Phase 1*).

The Jacobi method on the recurrence c_t = f(c_{t-1}, e_t): every iteration applies the ContextBlock
to all tokens at once, each reading its predecessor's context of the iteration before, and takes
one Adam step; with `phase1_step="group"` one after every group of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cvfp import objectives, ops, registry
from cvfp.inputs import TokenInputs
from cvfp.model import Block
from cvfp.share import ALONE, Ranks

if TYPE_CHECKING:
    from cvfp.config import Experiment

INITIAL_STD = 0.01
QUANTILES = (0.1, 0.5, 0.9)


@dataclass
class Phase1:
    """What Phase 1 leaves."""

    # [T, D], the last iterate as it was computed: with noise, before the last update. Stored as
    # the products are, bfloat16 or float32, on the device, in host memory or on disk.
    contexts: Tensor
    iterations: int  # the published count, in which the initial contexts are number 1
    converged: float  # fraction of tokens whose mean squared change was under the threshold
    # One dict per iteration from 2 on: iteration, loss, the objective's own figures (means over
    # groups), change (mean squared), converged, and quantiles of the tokens' changes.
    history: list[dict[str, float]] = field(default_factory=list)
    aborted: str | None = None  # why Phase 1 gave up, where it was told to


def train(
    block: Block,
    inputs: TokenInputs,
    experiment: Experiment,
    generator: torch.Generator,
    report: Callable[[dict[str, float]], str | None] = lambda row: None,
    rest: Callable[..., Iterable[int]] = lambda steps, *state: steps,
    share: Ranks = ALONE,
) -> Phase1:
    """Train `block` in place until its contexts over the stream stop changing.

    Args:
        inputs: e_t for T positions.
        experiment: its `phase1` fields, and the precision of the products and of the contexts.
        generator: on the device of the block; draws the initial contexts and the noise.
        report: called with each row of the history; may add to it, and return why to give up.
        rest: (steps, the loop's state) -> the steps still to do (`checkpoint.Checkpoint.rest`).
        share: of the groups, where several devices have some each; the contexts are theirs alone.

    Raises:
        ValueError: the objective returned something else than losses with a gradient.
        FloatingPointError: the loss is not finite.
    """
    device, total, width = inputs.table.device, len(inputs), block.context_dim
    seed = generator.initial_seed()
    objective, own = registry.build_objective(experiment, width, inputs.table, seed)
    trained = [*block.parameters(), *own]  # the objective's own are discarded after Phase 1
    optimiser = ops.optimiser(trained, experiment.phase1_learning_rate)
    size = min(experiment.loss_group, total)
    groups = math.ceil(total / size)  # the last may be smaller, and has a pass of its own
    mine = share.own(total, size)
    # A pass: as many whole groups as fit the device at once, with what each layer keeps of them.
    passes = ops.group_slices(len(mine), size, width, len(block.widths), device)
    by_group = experiment.phase1_step == "group"
    if by_group or experiment.phase1_fresh:  # else what a group reads depended on the device
        passes = [slice(start, min(start + size, total)) for start in range(0, total, size)]
    contexts = ops.context_rows(len(mine), width, experiment.precision, inputs.table)
    for part in passes:
        fresh = inputs.table.new_empty(part.stop - part.start, width)
        contexts[part] = ops.gaussian_(fresh, INITIAL_STD, generator, size).to(contexts.dtype)
    result = Phase1(contexts, 1, 0.0)
    change = torch.empty(len(mine), device=device)  # of each token, mean squared
    elsewhere = contexts.device != device
    steps = range(2, experiment.phase1_max_iterations + 1)
    parts = block, objective, contexts, optimiser

    def move(done: float) -> None:
        """An Adam step, when a share `done` of all there can be is behind."""
        share.add(parameter.grad for parameter in trained)
        torch.nn.utils.clip_grad_norm_(trained, experiment.phase1_gradient_clip)
        if experiment.phase1_decay == "linear":
            rate = experiment.phase1_learning_rate * (1 - done / len(steps))
            optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        optimiser.zero_grad()

    for iteration in rest(steps, parts, generator, result.history):
        sums: dict[str, Tensor] = {}  # read once, when the iteration ends
        last = share.every(contexts[-1:].to(device, copy=True))[share.rank - 1]
        for part, old in ops.prefetch(passes, lambda part: contexts[part].to(device), elsewhere):
            # Token t reads the context of t-1; token 0 that of the last (a ring).
            read = torch.cat([last, old[:-1]]).to(inputs.table.dtype)  # [K·G, D]
            last = old[-1:].clone()
            if experiment.phase1_noise:
                noise = torch.empty_like(read)
                read += ops.gaussian_(noise, experiment.phase1_noise, generator, size)
            positions = torch.arange(part.start, part.stop, device=device) + mine.start
            with ops.autocast(experiment.precision, device):
                new = block(read, inputs.dense(positions))[-1].to(inputs.table.dtype)  # [K·G, D]
            grouped = [c.view(-1, min(size, len(c)), width) for c in (new, old.to(new.dtype))]
            batch = objectives.Batch(experiment, inputs, positions.view(grouped[0].shape[:2]))
            change[part] = (new.detach() - old).square().mean(dim=1)
            returned = objective(*grouped, batch)
            if iteration == 2:
                registry.check_objective(experiment.objective, returned, grouped[0])
            losses, figures = returned  # [K], {name: [K]}
            # Pass by pass, or all graphs would be there at once.
            (losses.sum() / (1 if by_group else groups)).backward()
            for name, values in {"loss": losses, **figures}.items():
                sums[name] = sums.get(name, 0) + values.detach().sum() / groups
            contexts[part] = new.detach().to(contexts.dtype)  # overwrites the previous ones
            if experiment.phase1_fresh:
                last = new.detach()[-1:].clone()
            if by_group:
                move(iteration - 2 + part.start / total)
        if not by_group:
            move(iteration - 2)

        share.add(sums.values())
        changes = share.whole(change, mine, total)
        row = {"iteration": float(iteration), **_read(sums, changes, experiment)}
        if not all(map(math.isfinite, row.values())):
            got = f"Phase 1 is not finite at iteration {iteration}: {row}"
            raise FloatingPointError(f"{got}; a smaller phase1_learning_rate would be accepted")
        result.history.append(row)
        result.iterations, result.converged = iteration, row["converged"]
        result.aborted = report(row)
        settled = experiment.phase1_stop == "converged"
        enough = settled and iteration >= experiment.phase1_min_iterations
        if result.aborted or (enough and row["converged"] >= experiment.convergence_rate):
            break
    return result


def _read(sums: Mapping[str, Tensor], change: Tensor, experiment: Experiment) -> dict[str, float]:
    """An iteration's figures, in the one read from the device."""
    converged = (change < experiment.convergence_threshold).float().mean()
    # torch.quantile refuses more than 16 M values; a subsample is accurate enough.
    some = change[:: max(1, len(change) // 100_000)]
    quantiles = torch.quantile(some, change.new_tensor(QUANTILES))
    figures = [*sums.values(), change.mean(), converged, *quantiles]
    names = [*sums, "change", "converged", *(f"change_p{q * 100:.0f}" for q in QUANTILES)]
    return dict(zip(names, torch.stack([f.to(change) for f in figures]).tolist(), strict=True))
