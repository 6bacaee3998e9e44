"""What Phase 1 minimises (docs/method.md, *Phase 1*).

An objective takes the contexts of K groups of G tokens, new and old [K, G, D] (old: no gradient),
and their `Batch`; it returns each group's loss [K], and figures for the history [K]. One that has
parameters is an `nn.Module` class, called with (experiment, context_dim, embedding_dim).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
