"""The method from its definition (docs/method.md), in plain loops of float64 torch.

Nothing here calls the package: what tests compare it with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]
EPS = 1e-5


def weights(module: torch.nn.Module, *, trained: bool = False) -> dict[str, Tensor]:
    """A copy of the module's parameters, by name, float64."""
    return {
        name: parameter.detach().double().clone().requires_grad_(trained)
        for name, parameter in module.named_parameters()
    }


def layer_norm(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    normal = (x - mean) / torch.sqrt(variance + EPS)
    if scale is not None:
        normal = normal * scale
    return normal if shift is None else normal + shift


def layer(w: State, i: int, read: Tensor, residual: Tensor) -> Tensor:
    product = read @ w[f"linears.{i}.weight"].T + w[f"linears.{i}.bias"]
    total = residual + torch.where(product > 0, product, 0 * product)
    return layer_norm(total, w[f"norms.{i}.weight"], w[f"norms.{i}.bias"])


def depth(w: State) -> int:
    return sum(name.startswith("norms.") and name.endswith("weight") for name in w)


def context_block(w: State, c: Tensor, e: Tensor) -> list[Tensor]:
    """[B, D], [B, n·E] -> the outputs of all layers."""
    outputs = []
    for i in range(depth(w)):
        sees = w[f"linears.{i}.weight"].shape[1] > c.shape[1]
        kept = c
        if f"residuals.{i}.weight" in w:
            kept = c @ w[f"residuals.{i}.weight"].T + w[f"residuals.{i}.bias"]
        c = layer(w, i, torch.cat([c, e], dim=1) if sees else c, kept)
        outputs.append(c)
    return outputs


def token_block(w: State, outputs: Sequence[Tensor], e: Tensor, width: int) -> Tensor:
    """c^(i) [B, D_i] each, e [B, n·E] -> h [B, E]."""
    hidden, residual = e, e[:, -width:]
    for i, c in enumerate(outputs):
        hidden = residual = layer(w, i, torch.cat([c, hidden], dim=1), residual)
    return hidden


def inputs(table: Tensor, tokens: Tensor, n: int) -> Tensor:
    """e_t [T, n·E]: the last n tokens' rows normalised, oldest first, zeros before the start."""
    rows = layer_norm(table)
    made = []
    for t in range(len(tokens)):
        window = range(t - n + 1, t + 1)
        made.append(
            torch.cat([rows[tokens[s]] if s >= 0 else torch.zeros_like(rows[0]) for s in window])
        )
    return torch.stack(made)


def nats(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each row, [B]."""
    top = logits.max(dim=1, keepdim=True).values
    whole = (logits - top).exp().sum(dim=1).log() + top[:, 0]
    return whole - logits[torch.arange(len(target)), target]


def published(new: Tensor, old: Tensor, w: float) -> Tensor:
    """Phase 1's loss of one group [G, D]."""
    mse = ((new - old) ** 2).sum() / new.numel()
    centred = new - new.sum(dim=0) / len(new)
    return (1 - w) * mse - w * (centred**2).sum().sqrt() / len(new)


class Adam:
    """Kingma and Ba 2015, algorithm 1."""

    def __init__(self, parameters: Sequence[Tensor], lr: float) -> None:
        self.parameters, self.lr, self.t = parameters, lr, 0
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        self.t += 1
        for p, g, m, v in zip(self.parameters, gradients, self.m, self.v, strict=True):
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g * g)
            first, second = m / (1 - 0.9**self.t), v / (1 - 0.999**self.t)
            p -= self.lr * first / (second.sqrt() + 1e-8)


def phase1(
    w: State,
    e: Tensor,
    initial: Tensor,
    noise: Sequence[Tensor],
    *,
    group: int,
    weight: float,
    lr: float,
    clip: float,
) -> tuple[Tensor, list[float]]:
    """As many iterations as there is noise [T, D], which moves `w`: the last contexts, the losses.

    Token by token, each reading its predecessor of the iteration before; token 0 the last (a ring).
    """
    state, losses = initial, []
    parameters = list(w.values())
    optimiser = Adam(parameters, lr)
    for added in noise:
        rows = []
        for t in range(len(e)):
            read = state[t - 1] if t > 0 else state[len(e) - 1]
            rows.append(context_block(w, (read + added[t])[None], e[t : t + 1])[-1][0])
        new = torch.stack(rows)
        parts = [
            published(new[i : i + group], state[i : i + group], weight)
            for i in range(0, len(e), group)
        ]
        loss = torch.stack(parts).sum() / len(parts)
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.sqrt(torch.stack([(g**2).sum() for g in gradients]).sum())
        # torch divides by a millionth more than the norm.
        optimiser.step([g * min(1.0, clip / (float(norm) + 1e-6)) for g in gradients])
        losses.append(float(loss))
        state = new.detach()
    return state, losses


def recurrence(w: State, e: Tensor, initial: Tensor | None = None) -> Tensor:
    """c_t = f(c_{t-1}, e_t) from zeros, token by token."""
    width = w[f"linears.{depth(w) - 1}.weight"].shape[0]
    c = e.new_zeros(1, width) if initial is None else initial[None]
    rows = []
    for t in range(len(e)):
        c = context_block(w, c, e[t : t + 1])[-1]
        rows.append(c[0])
    return torch.stack(rows)


class Phase2:
    """Next-token prediction on given contexts [T, D].

    Args:
        table: [V, E]; what the ContextBlock reads, always.
        embedding: [V, E]; what the TokenBlock reads, and the tied head.
        head: weight and bias of a head of its own; None: tied.
    """

    def __init__(
        self,
        block: State,
        tokens_block: State,
        table: Tensor,
        embedding: Tensor,
        n: int,
        head: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.block, self.token_block, self.table, self.embedding = (
            block,
            tokens_block,
            table,
            embedding,
        )
        self.n, self.head = n, head

    def logits(self, contexts: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """Position t reads context t-1, and zeros at t = 0."""
        before = [contexts[t - 1] if t > 0 else torch.zeros_like(contexts[0]) for t in positions]
        frozen = inputs(self.table, tokens, self.n)[positions]
        with torch.no_grad():
            outputs = context_block(self.block, torch.stack(before), frozen)
        e = inputs(self.embedding, tokens, self.n)[positions]
        hidden = token_block(self.token_block, outputs, e, self.table.shape[1])
        if self.head is None:
            return hidden @ self.embedding.T
        return hidden @ self.head[0].T + self.head[1]

    def nats(self, contexts: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        return nats(self.logits(contexts, tokens, positions), tokens[positions + 1])

    def epoch(
        self,
        optimiser: Adam,
        contexts: Tensor,
        tokens: Tensor,
        order: Tensor,
        batch: int,
    ) -> float:
        """Train on the positions in this order; the mean nats on the way."""
        total = 0.0
        for start in range(0, len(order), batch):
            positions = order[start : start + batch]
            loss = self.nats(contexts, tokens, positions).mean()
            optimiser.step(torch.autograd.grad(loss, list(optimiser.parameters)))
            total += float(loss.detach()) * len(positions)
        return total / len(order)
