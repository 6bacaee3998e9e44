"""Controls: replacements for the contexts in Phase 2, to measure what contexts contribute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvfp import seeds
from cvfp.config import Experiment
from cvfp.model import CVFP, Predictor
from cvfp.phase2 import Positions


class Zero(Positions):
    """Every c^(i) is zero: the current tokens are the only input."""

    def previous(self, positions: Tensor) -> Tensor:
        return self.contexts

    def outputs(self, positions: Tensor, previous: Tensor) -> list[Tensor]:
        like = self.context_inputs.table
        return [like.new_zeros(len(positions), width) for width in self.model.context_widths]


class Shuffled(Positions):
    """Every position has the c^(i) of another one, by the permutation `order` (int64 [T]): the same
    distribution, without information about the position."""

    def __init__(self, model: CVFP, contexts: Tensor, tokens: Tensor, order: Tensor) -> None:
        super().__init__(model, contexts, tokens)
        self.order = order.to(tokens.device)

    def previous(self, positions: Tensor) -> Tensor:
        return super().previous(self.order[positions])

    def outputs(self, positions: Tensor, previous: Tensor) -> list[Tensor]:
        return super().outputs(self.order[positions], previous)


class Window(Positions):
    """Every c^(i) is the concatenated embeddings of the tokens before the current one."""

    def __init__(self, model: CVFP, tokens: Tensor, length: int) -> None:
        super().__init__(model, tokens.new_zeros(0, 0), tokens)
        table = self.context_inputs.table
        # [T, length]; before the stream there is "no token", a row of zeros.
        before = tokens.new_full((length,), len(table) - 1)
        self.rows = torch.cat([before, tokens]).unfold(0, length + 1, 1)[:, :-1]

    def previous(self, positions: Tensor) -> Tensor:
        return self.contexts

    def outputs(self, positions: Tensor, previous: Tensor) -> list[Tensor]:
        window = self.context_inputs.embed(self.rows[positions])
        return [window for _ in self.model.context_widths]


def context_widths(experiment: Experiment, embedding_dim: int) -> list[int] | None:
    """Widths of the c^(i) that replace the ContextBlock's outputs; None: nothing does."""
    if experiment.contexts != "window":
        return None
    return [experiment.window_tokens * embedding_dim] * experiment.num_layers


def level_window(model: CVFP, context_dim: int) -> None:
    """Scale the weights on a window so that its initial contribution to a layer has a context's
    variance: the published initialisation has the same std at any width, and a window is wide."""
    with torch.no_grad():
        for width, linear in zip(model.context_widths, model.token_block.linears, strict=True):
            assert isinstance(linear, nn.Linear)
            linear.weight[:, :width] *= (context_dim / width) ** 0.5


def positions(
    model: CVFP, contexts: Tensor | None, tokens: Tensor, experiment: Experiment
) -> Positions:
    """The positions of a stream as the Experiment's `contexts` asks for; `contexts` [T, D] of the
    stream are None for 'zero' and 'window'."""
    if experiment.contexts == "window":
        return Window(model, tokens, experiment.window_tokens)
    if experiment.contexts == "zero":
        return Zero(model, tokens.new_zeros(0, 0), tokens)
    assert contexts is not None
    if experiment.contexts == "shuffled":
        order = torch.randperm(len(tokens), generator=seeds.generator(experiment.seed, "order"))
        return Shuffled(model, contexts, tokens, order)
    return Positions(model, contexts, tokens)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def end_counts(model: Predictor) -> dict[str, int]:
    """Parameters of table and head; a tied head has none of its own."""
    head = 0 if model.head is None else count_parameters(model.head)
    return {"embedding": model.embedding.numel(), "head": head}


def parameter_counts(model: Predictor, experiment: Experiment) -> dict[str, int]:
    """Number of used parameters by part: without contexts the ContextBlock and the weights on its
    outputs do not count. A peer has a body in place of the blocks."""
    ends = end_counts(model)
    if not isinstance(model, CVFP):
        return {"body": count_parameters(model) - sum(ends.values()), **ends}
    token_block = count_parameters(model.token_block)
    if experiment.contexts == "zero":
        token_block -= sum(model.context_widths) * model.embedding.shape[1]
    unused = experiment.contexts in ("zero", "window")
    context_block = 0 if unused else count_parameters(model.context_block)
    return {"context_block": context_block, "token_block": token_block, **ends}
