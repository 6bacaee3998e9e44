"""Adam is torch's, and the definition's."""

from __future__ import annotations

import subprocess
import sys

import literal
import pytest
import torch
from torch import Tensor

from cvfp import ops
from cvfp.ops.adam import Adam


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=draw).to(dtype).requires_grad_() for s in ((7, 5), (3,))]


def gradients(of: list[Tensor], step: int) -> list[Tensor]:
    return list(torch.autograd.grad(sum((p * (step + 1)).sin().sum() for p in of), of))


def test_adam_is_torchs_to_the_last_bit() -> None:
    mine, theirs, idle = parameters(), parameters(), torch.randn(2, requires_grad=True)
    still = idle.detach().clone()
    one, other = Adam([*mine, idle], lr=0.01), torch.optim.Adam(theirs, lr=0.01, fused=True)
    for step in range(20):
        one.zero_grad()
        other.zero_grad()
        for group in (mine, theirs):
            for parameter, gradient in zip(group, gradients(group, step), strict=True):
                parameter.grad = gradient
        one.step()
        other.step()
    for p, q in zip(mine, theirs, strict=True):
        assert torch.equal(p, q)
    assert torch.equal(idle, still)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.1, 3.0])
def test_decay_is_that_of_torchs_adamw_to_the_last_bit(dtype: torch.dtype, decay: float) -> None:
    mine, theirs = parameters(dtype), parameters(dtype)
    one = Adam(mine, lr=0.01, decay=decay)
    other = torch.optim.AdamW(theirs, lr=0.01, weight_decay=decay, fused=True)
    for step in range(20):
        for group in (mine, theirs):
            for parameter, gradient in zip(group, gradients(group, step), strict=True):
                parameter.grad = gradient
        one.step()
        other.step()
    for p, q in zip(mine, theirs, strict=True):
        assert torch.equal(p, q)


def test_decay_is_the_definition() -> None:
    """lr · decay of each weight is taken off before Adam's step, whatever the gradient."""
    mine, theirs = parameters(torch.float64), parameters(torch.float64)
    one, other = Adam(mine, lr=0.01, decay=0.5), literal.Adam(theirs, lr=0.01)
    for step in range(10):
        for parameter, gradient in zip(mine, gradients(mine, step), strict=True):
            parameter.grad = gradient
        found = gradients(theirs, step)
        one.step()
        with torch.no_grad():
            for parameter in theirs:
                parameter *= 1 - 0.01 * 0.5
        other.step(found)
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_both_forms_of_the_optimiser_decay(decay: float) -> None:
    ends = []
    for mode in ("auto", "plain"):
        mine = parameters(torch.float64)
        with ops.using(mode):
            one = ops.optimiser(mine, 0.01, decay)
        for step in range(5):
            one.zero_grad()
            for parameter, gradient in zip(mine, gradients(mine, step), strict=True):
                parameter.grad = gradient
            one.step()
        ends.append(mine)
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_adam_is_the_definition(steps: int) -> None:
    mine, theirs = parameters(torch.float64), parameters(torch.float64)
    one, other = Adam(mine, lr=0.01), literal.Adam(theirs, lr=0.01)
    for step in range(steps):
        for parameter, gradient in zip(mine, gradients(mine, step), strict=True):
            parameter.grad = gradient
        one.step()
        other.step(gradients(theirs, step))
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_parameter_without_a_gradient_waits() -> None:
    moved, waits = parameters()
    one, before = Adam([moved, waits], lr=0.1), waits.detach().clone()
    one.step()  # none has one
    moved.grad = torch.ones_like(moved)
    one.step()
    assert torch.equal(waits, before)
    one.zero_grad()
    assert moved.grad is None


def test_training_does_not_import_the_compiler() -> None:
    """It takes as long as all else that stands before training."""
    code = """
import sys, torch
from cvfp.ops.adam import Adam
weight = torch.ones(3, requires_grad=True)
optimiser = Adam([weight], lr=0.1)
weight.sum().backward()
optimiser.step()
assert weight[0] != 1
for module in ("torch._dynamo", "pandas", "scipy", "matplotlib"):
    assert module not in sys.modules, module
"""
    subprocess.run([sys.executable, "-c", code], check=True)
