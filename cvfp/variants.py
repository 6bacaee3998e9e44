"""Parts that question `remember`, or go beyond it: contexts that are a window and nothing else, the
same objective with targets that mean nothing, and blocks that forget more slowly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvfp import objectives, registry, seeds
from cvfp.config import Experiment
from cvfp.model import CVFP, ContextBlock

SAMPLE = 20_000  # windows that principal components are taken of
PRIME = 1_000_003  # multiplied by it and wrapped around, numbers are in another order


def delay_line(model: CVFP, tokens: Tensor, experiment: Experiment, by: str) -> Tensor:
    """LayerNorm of a fixed projection of the last `window_tokens` embeddings, without their mean:
    [T, D]. `by` "pca": on their first D principal components in the first stream that this is
    called with, training's; "random": on normal directions."""
    inputs = model.context_inputs(tokens)
    none, width = len(inputs.table) - 1, experiment.context_dim
    before = tokens.new_full((experiment.window_tokens - 1,), none)
    rows = torch.cat([before, tokens]).unfold(0, experiment.window_tokens, 1)  # [T, k]
    if not hasattr(model, "delay_line"):
        some = inputs.embed(rows[:: max(1, len(rows) // SAMPLE)])  # [S, k·E]
        if by == "pca":
            covariance = torch.cov(some.T.double())
            axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :width]
        else:
            drawn = torch.empty(some.shape[1], width)
            axes = drawn.normal_(generator=seeds.generator(experiment.seed, "context_block"))
        vars(model)["delay_line"] = some.mean(dim=0), axes.to(some)
    mean, axes = vars(model)["delay_line"]
    parts = [(inputs.embed(part) - mean) @ axes for part in rows.split(8192)]
    projected = F.pad(torch.cat(parts), (0, width - axes.shape[1]))
    return F.layer_norm(projected, (width,))


@registry.context_source("delay_pca")
def delay_pca(model: CVFP, tokens: Tensor, experiment: Experiment) -> Tensor:
    """A `delay_line` by principal components."""
    return delay_line(model, tokens, experiment, "pca")


@registry.context_source("delay_random")
def delay_random(model: CVFP, tokens: Tensor, experiment: Experiment) -> Tensor:
    """A `delay_line` by random directions."""
    return delay_line(model, tokens, experiment, "random")


@registry.objective("remember_permuted")
class Permuted(objectives.Remember):
    """`remember` with the table's rows permuted: what a token means is gone, which it was stays."""

    def target(self, batch: objectives.Batch, lag: int) -> Tensor:
        tokens, none = batch.tokens(lag), len(batch.inputs.table) - 1
        return batch.inputs.table[torch.where(tokens < 0, -1, (tokens * PRIME + 1) % none)]


@registry.objective("remember_elsewhere")
class Elsewhere(objectives.Remember):
    """`remember` of the tokens at other positions, far off: nothing that the contexts have read."""

    def target(self, batch: objectives.Batch, lag: int) -> Tensor:
        elsewhere = (batch.positions * PRIME + 1) % len(batch.inputs)
        return batch.inputs.table[batch.inputs.tokens[elsewhere]]


class _Block(ContextBlock):
    def __init__(self, experiment: Experiment, input_dim: int) -> None:
        stds = experiment.context_std, experiment.input_std
        every = experiment.token_input_all_layers
        super().__init__(experiment.num_layers, experiment.context_dim, input_dim, every, *stds)


@registry.block("orthogonal")
class Orthogonal(_Block):
    """The published block whose weights on c start as orthogonal matrices of the same size: none of
    its directions is forgotten faster than another (Saxe, McClelland and Ganguli 2014)."""

    def initialise(self, generator: torch.Generator) -> None:
        super().initialise(generator)
        for linear, sees in zip(self.linears, self.sees_tokens, strict=True):
            on_c = linear.weight.data[:, : linear.weight.shape[1] - self.input_dim * sees]
            drawn = torch.empty(on_c.shape)
            gain = self.context_std * max(on_c.shape) ** 0.5
            nn.init.orthogonal_(drawn, gain, generator=generator)
            on_c.copy_(drawn)


@registry.block("leaky")
class Leaky(_Block):
    """c <- k·c + √(1 − k²)·f(c, e), f the published block: every dimension keeps a share k of its
    own, with time constants from a quarter of a token to `leak_tokens`, evenly on a log scale."""

    learnt = False

    def __init__(self, experiment: Experiment, input_dim: int) -> None:
        super().__init__(experiment, input_dim)
        times = torch.logspace(-2, torch.tensor(experiment.leak_tokens).log2(), self.context_dim, 2)
        logit = torch.special.logit(torch.exp(-1 / times))
        if self.learnt:
            self.logit = nn.Parameter(logit)
        else:
            self.register_buffer("logit", logit)

    def forward(self, context: Tensor, inputs: Tensor) -> list[Tensor]:
        *outputs, new = super().forward(context, inputs)
        keep = self.logit.sigmoid()
        return [*outputs, keep * context + (1 - keep.square()).sqrt() * new]


@registry.block("leaky_learnt")
class LeakyLearnt(Leaky):
    """`leaky`, whose shares Phase 1 learns from there."""

    learnt = True
    logit: nn.Parameter

    def initialise(self, generator: torch.Generator) -> None:
        logit = self.logit
        del self.logit  # is not drawn
        super().initialise(generator)
        self.logit = logit
