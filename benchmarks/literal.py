"""Phase 1 and Phase 2 as SPEC §3 and §4 read, in plain eager PyTorch: the kit is timed against it.

Same seeds, same Adam, same autocast, no care taken: a Python loop over the groups of the loss,
float32 logits, a vocabulary of whatever size, autograd throughout.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cvfp.config import Experiment
from cvfp.model import CVFP, ContextBlock, TokenInputs, autocast


def phase1(
    block: ContextBlock, inputs: TokenInputs, experiment: Experiment, generator: torch.Generator
) -> tuple[Tensor, int]:
    """The contexts [T, D] that Phase 1 leaves, and its iterations."""
    device, total = inputs.table.device, len(inputs)
    contexts = torch.empty(total, block.context_dim, device=device)
    contexts.normal_(0.0, 0.01, generator=generator)
    optimiser = torch.optim.Adam(block.parameters(), lr=experiment.phase1_learning_rate)
    groups = [slice(i, i + experiment.loss_group) for i in range(0, total, experiment.loss_group)]
    weight, iteration = experiment.dist_reg_weight, 1
    for iteration in range(2, experiment.phase1_max_iterations + 1):
        optimiser.zero_grad()
        read = contexts.roll(1, dims=0)
        made, converged = [], 0
        for group in groups:
            noise = torch.empty_like(read[group])
            noise.normal_(0.0, experiment.phase1_noise, generator=generator)
            with autocast(experiment.precision, device):
                new = block(read[group] + noise, inputs.dense(group))[-1].float()
            change = (new - contexts[group]).square().mean(dim=1)
            diversity = torch.linalg.matrix_norm(new - new.mean(dim=0)) / len(new)
            loss = (1 - weight) * change.mean() - weight * diversity
            (loss / len(groups)).backward()
            converged += int((change < experiment.convergence_threshold).sum())
            made.append(new.detach())
        torch.nn.utils.clip_grad_norm_(block.parameters(), experiment.phase1_gradient_clip)
        optimiser.step()
        contexts = torch.cat(made)
        done = converged >= experiment.convergence_rate * total
        if done and iteration >= experiment.phase1_min_iterations:
            break
    return contexts, iteration


def phase2(
    model: CVFP,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    experiment: Experiment,
    generator: torch.Generator,
) -> tuple[float, int]:
    """Validation perplexity of the best epoch, and the epochs run; streams are (contexts [T, D],
    tokens [T])."""
    model.context_block.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=experiment.phase2_learning_rate)
    contexts, tokens = train
    total, size = len(tokens) - 1, experiment.phase2_batch_size
    best, best_epoch, epoch = math.inf, 0, 0
    kept = None
    for epoch in range(1, experiment.phase2_epochs + 1):
        order = torch.arange(total)
        if experiment.phase2_shuffle:
            order = torch.randperm(total, generator=generator)
        losses = 0.0
        for positions in order.to(tokens.device).split(size):
            with autocast(experiment.precision, tokens.device):
                logits = _logits(model, contexts, tokens, positions)
            loss = F.cross_entropy(logits.float(), tokens[positions + 1])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses += loss.item() * len(positions)
        loss = _loss(model, *validation)
        if loss < best:
            best, best_epoch, kept = loss, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= experiment.phase2_patience:
            break
    assert kept is not None
    model.load_state_dict(kept)
    return math.exp(best), epoch


def _logits(model: CVFP, contexts: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    read = contexts[(positions - 1).clamp(min=0)].float() * (positions > 0)[:, None]
    e = model.context_inputs(tokens).dense(positions)
    hidden = e
    residual = e[:, -model.embedding.shape[1] :]
    outputs = model.context_block(read, e)
    block = model.token_block
    for context, linear, norm in zip(outputs, block.linears, block.norms, strict=True):
        hidden = norm(residual + F.relu(linear(torch.cat([context, hidden], dim=-1))))
        residual = hidden
    return model.logits(hidden)


@torch.no_grad()
def _loss(model: CVFP, contexts: Tensor, tokens: Tensor) -> float:
    losses = [
        F.cross_entropy(
            _logits(model, contexts, tokens, positions), tokens[positions + 1], reduction="sum"
        )
        for positions in torch.arange(len(tokens) - 1, device=tokens.device).split(1024)
    ]
    return float(torch.stack(losses).double().sum()) / (len(tokens) - 1)
