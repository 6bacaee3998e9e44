"""ContextBlock, TokenBlock and the model that joins them (docs/method.md, *Model*).

Shapes: B positions in a batch (any leading shape), T a stream's, D context_dim, E embedding_dim,
n num_input_tokens, V vocabulary, L num_layers. `widths[i]` is the width that ContextBlock layer i
puts out: D everywhere, or falling to D in the equal-decrease design.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvfp import ops
from cvfp.inputs import TokenInputs

if TYPE_CHECKING:
    from cvfp.tokenizer import Tokenizer

WEIGHT_STD, BIAS_STD = 0.1, 0.01


class Linear(nn.Linear):
    """nn.Linear that is NaN until `initialise` runs, so that a forgotten one fails loudly."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.constant_(parameter, float("nan"))


def initialise(module: nn.Module, generator: torch.Generator, std: float = WEIGHT_STD) -> None:
    """Published initialisation: weights N(0, std²), biases N(0, 0.01²), LayerNorm the identity.

    Drawn on the CPU in the modules' order, so that every device starts from the same.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            for parameter, size in ((part.weight, std), (part.bias, BIAS_STD)):
                drawn = torch.empty(parameter.shape, device="cpu")
                parameter.data.copy_(drawn.normal_(0.0, size, generator=generator))
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif list(part.parameters(recurse=False)):
            raise TypeError(f"no initialisation for {type(part).__name__}")


def _layer(parts: Sequence[Tensor], linear: Any, residual: Tensor, norm: Any) -> Tensor:
    """LayerNorm(residual + ReLU(Linear([parts]))): what both blocks are made of."""
    affine = linear.weight, linear.bias
    return ops.residual_norm(parts, *affine, residual, norm.weight, norm.bias, norm.eps)


class Block(nn.Module):
    """What the two phases need of a ContextBlock: `forward(c [B, D], e [B, n·E])` -> the outputs
    [B, widths[i]] that the TokenBlock reads, the last of them the new context."""

    context_dim: int
    widths: list[int]

    def initialise(self, generator: torch.Generator) -> None:
        raise NotImplementedError


class ContextBlock(Block):
    """c <- LayerNorm(c + ReLU(Linear([c ; e]))), L times.

    Args:
        input_dim: n·E, the width of e.
        token_input_all_layers: every layer sees e. If False (equal-decrease), only layer 1 does
            and the width falls linearly from D + n·E to D; where it changes, the residual goes
            through a Linear.
        context_std, input_std: of the weights on c and on e, at initialisation.
    """

    linears: Any
    residuals: Any
    norms: Any

    def __init__(
        self,
        num_layers: int,
        context_dim: int,
        input_dim: int,
        token_input_all_layers: bool,
        context_std: float = WEIGHT_STD,
        input_std: float = WEIGHT_STD,
    ) -> None:
        super().__init__()
        self.context_dim, self.input_dim = context_dim, input_dim
        self.context_std, self.input_std = context_std, input_std
        falls = 0 if token_input_all_layers else input_dim
        layers = range(1, num_layers + 1)
        self.widths = [context_dim + falls - falls * i // num_layers for i in layers]
        self.sees_tokens = [token_input_all_layers or i == 1 for i in layers]
        reads = [context_dim, *self.widths[:-1]]
        self.linears, self.residuals, self.norms = (nn.ModuleList() for _ in range(3))
        for read, width, sees in zip(reads, self.widths, self.sees_tokens, strict=True):
            self.linears.append(Linear(read + input_dim * sees, width))
            self.residuals.append(nn.Identity() if read == width else Linear(read, width))
            self.norms.append(nn.LayerNorm(width))

    def initialise(self, generator: torch.Generator) -> None:
        initialise(self, generator, self.context_std)
        for linear, sees in zip(self.linears, self.sees_tokens, strict=True):
            if sees:  # its last columns read e
                linear.weight.data[:, -self.input_dim :] *= self.input_std / self.context_std

    def forward(self, context: Tensor, inputs: Tensor) -> list[Tensor]:
        """c [B, D], e [B, n·E] -> all layers' outputs [B, widths[i]], last the new context."""
        if (width := inputs.shape[-1]) != self.input_dim:
            raise ValueError(f"inputs: got {width} columns; accepted: {self.input_dim}")
        outputs = []
        layers = zip(self.linears, self.residuals, self.norms, self.sees_tokens, strict=True)
        for linear, residual, norm, sees in layers:
            parts = [context, inputs] if sees else [context]
            context = _layer(parts, linear, residual(context), norm)
            outputs.append(context)
        return outputs


class TokenBlock(nn.Module):
    """h <- LayerNorm(r + ReLU(Linear([c^(i) ; h]))), L times; c^(i) from ContextBlock layer i.

    Layer 1 takes h = e (n·E wide) and puts out E; its residual r is the current token's part of e.
    """

    def __init__(self, widths: Sequence[int], embedding_dim: int, input_dim: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        reads = [width + embedding_dim for width in widths]
        reads[0] = widths[0] + input_dim
        self.linears = nn.ModuleList(Linear(read, embedding_dim) for read in reads)
        self.norms = nn.ModuleList(nn.LayerNorm(embedding_dim) for _ in widths)

    def forward(self, contexts: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """c^(i) [B, widths[i]] each, e [B, n·E] -> h [B, E]."""
        hidden, residual = inputs, inputs[..., -self.embedding_dim :]
        for context, linear, norm in zip(contexts, self.linears, self.norms, strict=True):
            hidden = residual = _layer([context, hidden], linear, residual, norm)
        return hidden


class Predictor(nn.Module):
    """A model's ends: embedding table [V, E], and as head the table or a Linear of zeros."""

    def __init__(self, table: Tensor, *, weight_tying: bool, freeze_embedding: bool) -> None:
        super().__init__()
        self.embedding = nn.Parameter(table.clone(), requires_grad=not freeze_embedding)
        self.head = None if weight_tying else nn.Linear(table.shape[1], len(table))
        for parameter in () if self.head is None else self.head.parameters():
            nn.init.zeros_(parameter)

    def _head(self) -> tuple[Tensor, Tensor | None]:
        """Its weight [V, E] and bias [V]: the table (tied), or its own."""
        return (self.embedding, None) if self.head is None else (self.head.weight, self.head.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """h [B, E] -> [B, V]."""
        return F.linear(hidden, *self._head())

    def nats(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Mean nats of the `target` tokens [B], from h [B, E]."""
        return ops.next_token_nats(hidden, *self._head(), target)

    def score(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Nats (float64) of each `target` token [B], and whether it was the likeliest; no graph."""
        return ops.score_next_tokens(hidden, *self._head(), target)


class CVFP(Predictor):
    """ContextBlock, TokenBlock, embedding table and head, with a tokeniser for text.

    If Phase 2 trains the table (`freeze_embedding=False`), the ContextBlock goes on reading it as
    it was in Phase 1, or its contexts would no longer be fixed points.

    Args:
        context_widths: of what the TokenBlock's layers read; None: the ContextBlock's outputs.
        generates: False for a control that reads no contexts of its own.
    """

    context_table: Tensor | None

    def __init__(
        self,
        table: Tensor,
        context_block: Block,
        *,
        num_input_tokens: int,
        weight_tying: bool,
        freeze_embedding: bool,
        tokenizer: Tokenizer | None = None,
        context_widths: Sequence[int] | None = None,
        generates: bool = True,
    ) -> None:
        super().__init__(table, weight_tying=weight_tying, freeze_embedding=freeze_embedding)
        width = table.shape[1]
        self.num_input_tokens, self.generates = num_input_tokens, generates
        self.tokenizer, self.context_block = tokenizer, context_block
        self.context_widths = list(context_widths or context_block.widths)
        self.token_block = TokenBlock(self.context_widths, width, num_input_tokens * width)
        self.register_buffer("context_table", None if freeze_embedding else table.clone())

    def context_inputs(self, tokens: Tensor) -> TokenInputs:
        """What the ContextBlock reads at each position of a stream (int64 [T]).

        Raises:
            ValueError: a token that the table has no row for.
        """
        table = self.embedding if self.context_table is None else self.context_table
        for end in map(int, torch.aminmax(tokens) if len(tokens) else ()):
            if not 0 <= end < len(table):
                raise ValueError(f"tokens: got {end}; accepted: 0 to {len(table) - 1}")
        return TokenInputs(tokens, table.detach(), self.num_input_tokens)

    def token_inputs(self, tokens: Tensor) -> TokenInputs:
        """What the TokenBlock reads; the graph reaches the table if that is being trained."""
        return TokenInputs(tokens, self.embedding, self.num_input_tokens)
