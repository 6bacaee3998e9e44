"""Adam is torch's."""

from __future__ import annotations

import subprocess
import sys

import torch

from cvfp.optimiser import Adam


def test_adam_is_torchs_to_the_last_bit() -> None:
    mine = [torch.randn(7, 5, requires_grad=True), torch.randn(3, requires_grad=True)]
    idle = torch.randn(2, requires_grad=True)
    theirs = [p.detach().clone().requires_grad_() for p in mine]
    still = idle.detach().clone()
    one, other = Adam([*mine, idle], lr=0.01), torch.optim.Adam(theirs, lr=0.01, fused=True)
    for step in range(20):
        one.zero_grad()
        other.zero_grad()
        for parameters in (mine, theirs):
            sum((p * (step + 1)).sin().sum() for p in parameters).backward()
        one.step()
        other.step()
    for p, q in zip(mine, theirs, strict=True):
        assert torch.equal(p, q)
    assert torch.equal(idle, still)


def test_training_does_not_import_the_compiler() -> None:
    """It takes as long as all else that stands before training."""
    code = """
import sys, torch
from cvfp.optimiser import Adam
weight = torch.ones(3, requires_grad=True)
optimiser = Adam([weight], lr=0.1)
weight.sum().backward()
optimiser.step()
assert weight[0] != 1
for module in ("torch._dynamo", "pandas", "scipy", "matplotlib"):
    assert module not in sys.modules, module
"""
    subprocess.run([sys.executable, "-c", code], check=True)
