"""The exact evaluation of the recurrence against a plain loop in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cvfp import contexts
from cvfp.model import ContextBlock, TokenInputs, initialise


def make_block(layers: int, n: int, every: bool) -> ContextBlock:
    block = ContextBlock(layers, 16, n * 12, every)
    initialise(block, torch.Generator().manual_seed(layers))
    return block


def loop(block: ContextBlock, inputs: Tensor) -> Tensor:
    """The oracle: one token after the other."""
    context = inputs.new_zeros(1, block.context_dim)
    rows = []
    with torch.no_grad():
        for t in range(len(inputs)):
            context = block(context, inputs[t : t + 1])[-1]
            rows.append(context)
    return torch.cat(rows)


def stream(total: int, n: int) -> TokenInputs:
    generator = torch.Generator().manual_seed(total)
    table = torch.randn(40, 12, generator=generator)
    tokens = torch.randint(0, 40, (total,), generator=generator)
    return TokenInputs(tokens, table.double(), n)


@pytest.mark.parametrize("method", ["sequential", "jacobi", "blocks"])
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize(("layers", "n"), [(1, 1), (2, 3), (3, 2), (6, 1)])
def test_equal_to_the_loop(method: contexts.Method, layers: int, n: int, every: bool) -> None:
    # Deep and equal-decrease, random weights are chaotic: errors of any size grow token by token.
    total = 31 if layers == 6 and not every else 301
    block, inputs = make_block(layers, n, every).double(), stream(total, n)
    wanted = loop(block, inputs.dense())
    # A block that does not contract amplifies float32's rounding, in the loop too.
    single = make_block(layers, n, every)
    rounding = float((loop(single, inputs.dense().float()) - wanted).abs().max())
    for given in (inputs, inputs.dense()):
        made = contexts.evaluate(block, given, method=method, tol=1e-12, max_sweeps=400)
        assert made.converged
        assert float((made.values - wanted).abs().max()) < 1e-10
    made = contexts.evaluate(
        single, inputs.dense().float(), method=method, tol=1e-6, max_sweeps=400
    )
    assert float((made.values - wanted).abs().max()) < max(1e-4, 3 * rounding)


@pytest.mark.parametrize("total", [1, 2, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("length", [None, 1, 7, 32, 500])
def test_any_length_and_block(total: int, length: int | None) -> None:
    block, inputs = make_block(2, 1, True).double(), stream(total, 1)
    made = contexts.evaluate(block, inputs, tol=1e-12, block_length=length, max_sweeps=200)
    assert made.converged
    assert float((made.values - loop(block, inputs.dense())).abs().max()) < 1e-10


def test_initial_state_continues_a_stream() -> None:
    block, inputs = make_block(2, 1, True).double(), stream(90, 1)
    whole = contexts.evaluate(block, inputs, tol=1e-12).values
    rest = contexts.evaluate(
        block, inputs.dense(slice(50, None)), tol=1e-12, initial=whole[49], block_length=8
    )
    torch.testing.assert_close(rest.values, whole[50:], rtol=0, atol=1e-10)


def test_k_jacobi_sweeps_see_k_tokens() -> None:
    block, inputs = make_block(2, 1, True).double(), stream(40, 1)
    two = contexts.evaluate(block, inputs, method="jacobi", max_sweeps=2, tol=0).values
    context = torch.zeros(1, 16).double()
    for t in (29, 30):
        context = block(context, inputs.dense(torch.tensor([t])))[-1]
    torch.testing.assert_close(two[30:31], context.detach(), rtol=0, atol=1e-12)


def test_too_few_sweeps_and_broken_values_are_not_converged() -> None:
    block, inputs = make_block(2, 1, True).double(), stream(200, 1)
    assert not contexts.evaluate(block, inputs, max_sweeps=1, block_length=10).converged
    with torch.no_grad():
        block.norms[0].weight[0] = float("nan")
    for method in ("sequential", "jacobi", "blocks"):
        made = contexts.evaluate(block, inputs, method=method, max_sweeps=3)  # type: ignore[arg-type]
        assert not made.converged


def test_a_stiff_block_converges_or_says_so() -> None:
    block, inputs = make_block(3, 1, True).double(), stream(150, 1)
    with torch.no_grad():
        for linear in block.linears:
            linear.weight.mul_(3)
    made = contexts.evaluate(block, inputs, tol=1e-12, block_length=16, max_sweeps=5)
    right = float((made.values - loop(block, inputs.dense())).abs().max()) < 1e-9
    assert right or not made.converged
    enough = contexts.evaluate(block, inputs, tol=1e-12, block_length=16)
    assert enough.sweeps <= 11  # 10 blocks: one final by each sweep, and one sweep to see it
    assert enough.converged
    assert float((enough.values - loop(block, inputs.dense())).abs().max()) < 1e-10


def test_bad_arguments_are_named() -> None:
    block, inputs = make_block(1, 1, True).double(), stream(5, 1)
    with pytest.raises(ValueError, match="method: got 'newton'"):
        contexts.evaluate(block, inputs, method="newton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="initial: got shape"):
        contexts.evaluate(block, inputs, initial=torch.zeros(3))
    with pytest.raises(ValueError, match="inputs: got no tokens"):
        contexts.evaluate(block, inputs.dense()[:0])
