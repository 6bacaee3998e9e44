"""Phase 1: contexts learned as fixed points (SPEC §3).

The Jacobi method on the recurrence c_t = f(c_{t-1}, e_t): every iteration applies the ContextBlock
to all tokens at once, each reading its predecessor's context of the iteration before, and takes
one Adam step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cvfp.config import Experiment
from cvfp.model import ContextBlock, TokenInputs, autocast

INITIAL_STD = 0.01
QUANTILES = (0.1, 0.5, 0.9)
# Note 004's rules for giving up: judged once, at this iteration.
ABORT_ITERATION = 20
ABORT_SINCE = 15
ABORT_RANK = 0.70


@dataclass
class Phase1:
    """What Phase 1 leaves.

    Attributes:
        contexts: [T, D], the last iterate as it was made: with noise, before the last update.
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
    contexts: Tensor, previous: Tensor, dist_reg_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of one group [G, D]: (1-w)·MSE − w·‖C − mean‖_F / G; also each token's change [G] and
    the diversity term."""
    change = (contexts - previous).square().mean(dim=1)
    diversity = torch.linalg.vector_norm(contexts - contexts.mean(dim=0)) / len(contexts)
    loss = (1 - dist_reg_weight) * change.mean() - dist_reg_weight * diversity
    return loss, change.detach(), diversity.detach()


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
        experiment: its `phase1` fields, and the precision of the products; contexts are float32.
        generator: on the device of the block; draws the initial contexts and the noise.
        report: called with each row of the history.
        probe: called once, after iteration 20 if there is one; what it returns joins that row.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    device = inputs.table.device
    total, width = len(inputs), block.context_dim
    contexts = torch.empty(total, width, device=device)
    contexts.normal_(0.0, INITIAL_STD, generator=generator)
    size = experiment.loss_group
    groups = [slice(i, min(i + size, total)) for i in range(0, total, size)]
    optimiser = torch.optim.Adam(block.parameters(), lr=experiment.phase1_learning_rate)
    quantiles = torch.tensor(QUANTILES, device=device)
    result = Phase1(contexts, 1, 0.0)
    new = torch.empty_like(contexts)
    change = torch.empty(total, device=device)
    for iteration in range(2, experiment.phase1_max_iterations + 1):
        losses = torch.zeros(2, device=device)
        optimiser.zero_grad(set_to_none=True)
        for group in groups:
            # Token t reads the context of t-1; token 0 that of the last (a ring).
            read = (
                contexts[group.start - 1 : group.stop - 1]
                if group.start
                else torch.cat([contexts[-1:], contexts[: group.stop - 1]])
            )
            jitter = torch.empty_like(read).normal_(
                0.0, experiment.phase1_noise, generator=generator
            )
            with autocast(experiment.precision, device):
                made = block(read + jitter, inputs.dense(group))[-1].to(contexts.dtype)
            loss, changed, diversity = group_loss(made, contexts[group], experiment.dist_reg_weight)
            (loss / len(groups)).backward()
            new[group], change[group] = made.detach(), changed
            losses += torch.stack([loss.detach(), diversity]) / len(groups)
        torch.nn.utils.clip_grad_norm_(block.parameters(), experiment.phase1_gradient_clip)
        optimiser.step()
        contexts, new = new, contexts
        converged = (change < experiment.convergence_threshold).float().mean()
        # The one read from the device in an iteration.
        figures = torch.cat(
            [losses, torch.stack([change.mean(), converged]), _quantiles(change, quantiles)]
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
    result.contexts = contexts
    return result


def _quantiles(change: Tensor, quantiles: Tensor) -> Tensor:
    # torch.quantile refuses more than 16 M values; every k-th token says as much.
    return torch.quantile(change[:: max(1, len(change) // 1_000_000)], quantiles)
