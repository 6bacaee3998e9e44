"""AdamW as torch computes it, without the class: its constructor imports torch's compiler (2 s)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Adam:
    """Adam (Kingma and Ba 2015) with torch's defaults: betas 0.9 and 0.999, eps 1e-8; with `decay`
    AdamW (Loshchilov and Hutter 2019), which first takes lr · decay off each weight.

    One kernel for all parameters, and one step counter on their device, so that a CUDA graph can
    record it. A parameter without a gradient is left as it is.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, decay: float = 0.0) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.param_groups = [{"lr": lr}]  # where torch has it
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.count = torch.zeros((), dtype=torch.float32, device=self.parameters[0].device)
        self.state = [self.count, *self.means, *self.squares]  # restored in place

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters along their gradients."""
        all_of = zip(self.parameters, self.means, self.squares, strict=True)
        moved = [(p, p.grad, m, s) for p, m, s in all_of if p.grad is not None]
        if not moved:
            return
        self.count += 1
        parameters, gradients, means, squares = map(list, zip(*moved, strict=True))
        torch.ops.aten._fused_adamw_(
            parameters,
            gradients,
            means,
            squares,
            [],
            [self.count] * len(moved),
            lr=self.param_groups[0]["lr"],
            beta1=0.9,
            beta2=0.999,
            weight_decay=self.decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
