"""What Phase 1 minimises (docs/method.md, *Phase 1*).

An objective takes the contexts of K groups of G tokens, new and old [K, G, D] (old: no gradient),
and their `Batch`; it returns each group's loss [K], and figures for the history [K]. One that has
parameters is an `nn.Module` class, called with (experiment, context_dim, embedding_dim).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvfp import ops
from cvfp.inputs import TokenInputs
from cvfp.registry import objective

if TYPE_CHECKING:
    from cvfp.config import Experiment


@dataclass(frozen=True)
class Batch:
    """The stream positions of an objective's contexts."""

    experiment: Experiment
    inputs: TokenInputs
    positions: Tensor  # int64 [K, G]

    def tokens(self, lag: int = 0) -> Tensor:
        """The tokens `lag` back (-1: the next ones), -1 beyond the stream's ends: int64 [K, G]."""
        at, end = self.positions - lag, len(self.inputs)
        return torch.where((at >= 0) & (at < end), self.inputs.tokens[at.clamp(0, end - 1)], -1)

    def embeddings(self, lag: int = 0) -> Tensor:
        """Their normalised embeddings, 0 beyond the stream's ends: [K, G, E]."""
        return self.inputs.table[self.tokens(lag)]  # row -1 is zeros


@objective("published")
def published(new: Tensor, old: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """(1-w)·MSE(C, C_old) − w·‖C − mean‖_F / G."""
    change, spread = ops.change_and_spread(new, old)
    w = batch.experiment.dist_reg_weight
    return (1 - w) * change.mean(dim=1) - w * spread, {"diversity": spread}


@objective("settle")
def settle(new: Tensor, old: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """MSE(C, C_old): the published objective's first term alone."""
    change, spread = ops.change_and_spread(new, old)
    return change.mean(dim=1), {"diversity": spread}


@objective("remember")
class Remember(nn.Module):
    """Mean squared error of linear maps from C to the embeddings of tokens seen, one for each of
    `objective_lags` (0: the current one). No target beyond what the contexts have read."""

    def __init__(self, experiment: Experiment, context_dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.lags = experiment.lags
        self.maps = nn.ModuleList(nn.Linear(context_dim, embedding_dim) for _ in self.lags)

    def target(self, batch: Batch, lag: int) -> Tensor:
        return batch.embeddings(lag)

    def forward(self, new: Tensor, old: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        errors = {
            f"lag_{lag}": (one(new) - self.target(batch, lag)).square().mean(dim=(1, 2))
            for lag, one in zip(self.lags, self.maps, strict=True)
        }
        weighted = zip(self.lags.values(), errors.values(), strict=True)
        return sum(weight * error for weight, error in weighted) / sum(self.lags.values()), errors


@objective("next")
class Next(nn.Module):
    """Nats of the next token among those of its group that follow every so many-th position, by a
    linear map from C to embeddings: a target. Sampled softmax (Bengio and Senécal 2003): frequent
    tokens, which are sampled more often, count less."""

    CANDIDATES = 1024

    def __init__(self, experiment: Experiment, context_dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(context_dim, embedding_dim)

    def forward(self, new: Tensor, old: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        target, embedded = batch.tokens(-1), batch.embeddings(-1)  # [K, G], [K, G, E]
        every = -(-target.shape[1] // self.CANDIDATES)
        drawn, rows = target[:, ::every], embedded[:, ::every]  # [K, N], [K, N, E]
        share = torch.bincount(batch.inputs.tokens).to(new) / len(batch.inputs)
        h = self.map(new)  # [K, G, E]
        among = h @ rows.mT - share[drawn].log()[:, None]  # [K, G, N]
        # Its own token is no candidate a second time.
        among = among.masked_fill(drawn[:, None] == target[..., None], -torch.inf)
        own = (h * embedded).sum(dim=-1, keepdim=True) - share[target].log()[..., None]
        nats = torch.cat([own, among], dim=-1).logsumexp(dim=-1) - own[..., 0]
        there = target >= 0  # the stream's last has no next
        return (nats * there).sum(dim=1) / there.sum(dim=1).clamp(min=1), {}


@objective("vicreg")
def vicreg(new: Tensor, old: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """25·MSE(C, C_old) + 25·mean max(0, 1 − std of a dimension) + the squared covariances of
    different dimensions, summed, / D (Bardes, Ponce and LeCun 2022, with its weights)."""
    centred = new - new.mean(dim=1, keepdim=True)
    change, _ = ops.change_and_spread(new, old)
    short = F.relu(1 - (centred.square().mean(dim=1) + 1e-4).sqrt()).mean(dim=1)
    covariance = centred.mT @ centred / max(1, new.shape[1] - 1)  # [K, D, D]
    squares = covariance.square()
    off = squares.sum(dim=(1, 2)) - squares.diagonal(dim1=1, dim2=2).sum(dim=1)
    figures = {"variance": short, "covariance": off / new.shape[2]}
    return 25 * change.mean(dim=1) + 25 * short + figures["covariance"], figures
