"""What Phase 2 reads in place of contexts: the controls that say what contexts are worth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvfp import seeds
from cvfp.config import Experiment
from cvfp.model import CVFP
from cvfp.phase2 import Positions


class Zero(Positions):
    """Every c^(i) is zero: the model knows the current tokens and nothing else."""

    def reads(self, positions: Tensor) -> Tensor:
        return self.contexts

    def outputs(self, positions: Tensor, reads: Tensor, seen: Tensor) -> list[Tensor]:
        return [seen.new_zeros(len(seen), width) for width in self.model.context_widths]


class Shuffled(Positions):
    """Every position reads the c^(i) of another one, always the same: their distribution, without
    what they say of the position.

    Args:
        order: int64 [T], a permutation of the positions.
    """

    def __init__(
        self, model: CVFP, contexts: Tensor, tokens: Tensor, order: Tensor, precision: str
    ) -> None:
        super().__init__(model, contexts, tokens, precision)
        self.order = order.to(tokens.device)

    def reads(self, positions: Tensor) -> Tensor:
        return super().reads(self.order[positions])

    def outputs(self, positions: Tensor, reads: Tensor, seen: Tensor) -> list[Tensor]:
        other = self.order[positions]
        return super().outputs(other, reads, self.context_inputs.dense(other))


class Window(Positions):
    """Every c^(i) is the same plain window: the embeddings of the tokens before the current one."""

    def __init__(self, model: CVFP, tokens: Tensor, length: int, precision: str) -> None:
        super().__init__(model, tokens.new_zeros(0, 0), tokens, precision)
        table = self.context_inputs.table
        # [T, length + 1]; what is before the stream is "no token", a row of zeros
        before = tokens.new_full((length,), len(table) - 1)
        self.rows = torch.cat([before, tokens]).unfold(0, length + 1, 1)[:, :-1]

    def reads(self, positions: Tensor) -> Tensor:
        return self.contexts

    def outputs(self, positions: Tensor, reads: Tensor, seen: Tensor) -> list[Tensor]:
        window = F.embedding(self.rows[positions], self.context_inputs.table).flatten(-2)
        return [window for _ in self.model.context_widths]


def context_widths(experiment: Experiment, embedding_dim: int) -> list[int] | None:
    """Widths of what the TokenBlock's layers read where it is not the ContextBlock's outputs."""
    if experiment.contexts != "window":
        return None
    return [experiment.window_tokens * embedding_dim] * experiment.num_layers


def level_window(model: CVFP, context_dim: int) -> None:
    """Scale the columns that read a window so that it brings as much into a layer as a context
    does: the published initialisation is of a fixed width, and a window is many times wider."""
    with torch.no_grad():
        for width, linear in zip(model.context_widths, model.token_block.linears, strict=True):
            assert isinstance(linear, nn.Linear)
            linear.weight[:, :width] *= (context_dim / width) ** 0.5


def positions(
    model: CVFP,
    contexts: Tensor | None,
    tokens: Tensor,
    experiment: Experiment,
    precision: str = "float32",
) -> Positions:
    """The positions of a stream as the Experiment's `contexts` asks for.

    Args:
        contexts: [T, D] of the stream; None for those that take none.
        precision: of the products.
    """
    if experiment.contexts == "window":
        return Window(model, tokens, experiment.window_tokens, precision)
    if experiment.contexts == "zero":
        return Zero(model, tokens.new_zeros(0, 0), tokens, precision)
    assert contexts is not None
    if experiment.contexts == "shuffled":
        order = torch.randperm(len(tokens), generator=seeds.generator(experiment.seed, "order"))
        return Shuffled(model, contexts, tokens, order, precision)
    return Positions(model, contexts, tokens, precision)


def parameter_counts(model: CVFP, experiment: Experiment) -> dict[str, int]:
    """Parameters by part, those that do nothing aside: without contexts neither the ContextBlock
    nor the columns that would read it."""
    counts = model.parameter_counts()
    if experiment.contexts in ("zero", "window"):
        counts["context_block"] = 0
    if experiment.contexts == "zero":
        width = model.embedding.shape[1]
        counts["token_block"] -= sum(model.context_widths) * width
    return counts
