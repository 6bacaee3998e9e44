"""e_t, what the model reads of the tokens at every position of a stream, without storing it."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenInputs:
    """A stream's e_t, as a normalised table and the rows of it that each position reads.

    Args:
        tokens: int64 [T].
        table: [V, E], the embedding table; LayerNorm'ed here, without affine.
        num_input_tokens: n; position t sees tokens t-n+1 … t, oldest first, zeros before the start.
    """

    def __init__(self, tokens: Tensor, table: Tensor, num_input_tokens: int) -> None:
        # [V+1, E]: LayerNorm'ed without affine, and a row of zeros for "no token"
        self.table = F.pad(F.layer_norm(table, table.shape[-1:]), (0, 0, 0, 1))
        self.tokens = tokens
        before = tokens.new_full((num_input_tokens - 1,), len(table))
        # [T, n]: a view onto the padded stream, nothing is copied
        self.rows = torch.cat([before, tokens]).unfold(0, num_input_tokens, 1)

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, length: int, start: int = 0) -> TokenInputs:
        """The same for the first `length` positions from `start` on; nothing is copied."""
        part = copy.copy(self)
        part.rows, part.tokens = (x[start : start + length] for x in (self.rows, self.tokens))
        return part

    def dense(self, positions: Tensor | slice = slice(None)) -> Tensor:
        """e_t at `positions`: [B, n·E]."""
        return self.embed(self.rows[positions])

    def embed(self, windows: Tensor) -> Tensor:
        """n tokens, oldest first (V: "no token"), int64 [B, n] -> what the blocks read [B, n·E]."""
        return F.embedding(windows, self.table).flatten(-2)
