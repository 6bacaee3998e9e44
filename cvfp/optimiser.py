"""Adam as torch computes it, without the class: its constructor imports torch's compiler (2 s)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.adam import adam


class Adam:
    """Adam (Kingma and Ba 2015) with torch's defaults: betas 0.9 and 0.999, eps 1e-8."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        self.parameters, self.lr = list(parameters), lr
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters by their gradients; those that have none stay."""
        given = zip(self.parameters, self.means, self.squares, self.steps, strict=True)
        moved = [state for state in given if state[0].grad is not None]
        if not moved:
            return
        parameters, means, squares, steps = map(list, zip(*moved, strict=True))
        gradients = [p.grad for p in parameters if p.grad is not None]
        adam(
            parameters,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=parameters[0].device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
