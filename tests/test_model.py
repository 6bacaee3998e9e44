"""The blocks against SPEC §2, layer by layer."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvfp.analysis import tables
from cvfp.model import (
    CVFP,
    ContextBlock,
    TokenBlock,
    TokenInputs,
    count_parameters,
    initialise,
)


def make_block(layers: int, dim: int, inputs: int, every: bool, seed: int = 0) -> ContextBlock:
    block = ContextBlock(layers, dim, inputs, every)
    initialise(block, torch.Generator().manual_seed(seed))
    return block.double()


@pytest.mark.parametrize(
    ("layers", "dim", "context", "token"),
    [(6, 768, 10_630_656, 7_681_536), (3, 1536, 14_169_600, 5_905_152)],
)
def test_published_parameter_counts(layers: int, dim: int, context: int, token: int) -> None:
    block = ContextBlock(layers, dim, 2 * 768, True)
    assert count_parameters(block) == context
    assert count_parameters(TokenBlock(block.widths, 768, 2 * 768)) == token


def test_published_counts_table_agrees() -> None:
    table = tables.published_parameter_counts()
    assert (table["ContextBlock"] == table["ContextBlock, published"]).all()
    assert (table["TokenBlock"] == table["TokenBlock, published"]).all()


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_equal_decrease_widths(layers: int, n: int) -> None:
    dim, inputs = 24, n * 10
    block = ContextBlock(layers, dim, inputs, False)
    assert block.widths == [dim + inputs - (inputs * i) // layers for i in range(1, layers + 1)]
    assert block.widths[-1] == dim
    assert block.sees_tokens == [True] + [False] * (layers - 1)


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("layers", [1, 3, 4])
def test_context_block_is_the_formula(layers: int, every: bool) -> None:
    block = make_block(layers, 12, 20, every)
    context, inputs = torch.randn(5, 12).double(), torch.randn(5, 20).double()
    expected: list[Tensor] = []
    state = context
    for i, (linear, residual, norm) in enumerate(
        zip(block.linears, block.residuals, block.norms, strict=True)
    ):
        seen = torch.cat([state, inputs], dim=1) if every or i == 0 else state
        state = norm(residual(state) + F.relu(F.linear(seen, linear.weight, linear.bias)))
        expected.append(state)
    outputs = block(context, inputs)
    assert [o.shape[1] for o in outputs] == block.widths
    for got, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_token_block_is_the_formula(n: int, every: bool) -> None:
    block = make_block(3, 12, n * 8, every)
    tokens = TokenBlock(block.widths, 8, n * 8).double()
    initialise(tokens, torch.Generator().manual_seed(0))
    contexts = [torch.randn(4, w).double() for w in block.widths]
    inputs = torch.randn(4, n * 8).double()
    hidden = inputs
    for i, (linear, norm) in enumerate(zip(tokens.linears, tokens.norms, strict=True)):
        residual = inputs[:, -8:] if i == 0 else hidden
        hidden = norm(residual + F.relu(linear(torch.cat([contexts[i], hidden], dim=1))))
    torch.testing.assert_close(tokens(contexts, inputs), hidden, rtol=0, atol=1e-13)


def test_every_parameter_is_drawn_as_published() -> None:
    block = ContextBlock(3, 256, 256, False)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(float("nan"))
    initialise(block, torch.Generator().manual_seed(1))
    for part in block.modules():
        if isinstance(part, nn.Linear):
            assert abs(float(part.weight.detach().std()) - 0.1) < 0.002
            assert abs(float(part.weight.detach().mean())) < 0.002
            assert abs(float(part.bias.detach().std()) - 0.01) < 0.002
    assert all(torch.isfinite(p).all() for p in block.parameters())


@pytest.mark.parametrize("n", [1, 2, 3])
def test_token_inputs_are_the_last_n_normalised_rows(n: int) -> None:
    table = torch.randn(11, 6) * 3 + 1
    tokens = torch.randint(0, 11, (9,))
    inputs = TokenInputs(tokens, table, n)
    rows = F.layer_norm(table, (6,))
    for t in range(9):
        parts = [
            rows[tokens[t - n + 1 + j]] if t - n + 1 + j >= 0 else torch.zeros(6) for j in range(n)
        ]
        torch.testing.assert_close(inputs.dense(torch.tensor([t]))[0], torch.cat(parts))
    continued = TokenInputs(tokens[4:], table, n, history=tokens[4 - n + 1 : 4])
    torch.testing.assert_close(continued.dense(), inputs.dense(slice(4, None)))


def test_own_head_starts_at_zero_and_tied_head_is_the_table() -> None:
    table = torch.randn(30, 8)
    shape = dict(num_layers=2, context_dim=6, num_input_tokens=1, token_input_all_layers=True)
    own = CVFP(table, **shape, weight_tying=False, freeze_embedding=True)  # type: ignore[arg-type]
    hidden = torch.randn(3, 8)
    assert torch.equal(own.logits(hidden), torch.zeros(3, 30))
    assert own.parameter_counts()["head"] == 30 * 8 + 30
    tied = CVFP(table, **shape, weight_tying=True, freeze_embedding=True)  # type: ignore[arg-type]
    torch.testing.assert_close(tied.logits(hidden), hidden @ table.T)
    assert tied.parameter_counts()["head"] == 0
    assert not tied.embedding.requires_grad


@pytest.mark.parametrize("lead", [(5,), (2, 3)])
@pytest.mark.parametrize("tokens", [1, 2])
def test_token_block_gradients(lead: tuple[int, ...], tokens: int) -> None:
    """By hand against finite differences, contexts and inputs included."""
    block = TokenBlock([3, 4], 6, 6 * tokens).double()
    initialise(block, torch.Generator().manual_seed(0))
    for norm in block.norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    contexts = [
        torch.randn(*lead, width, dtype=torch.float64, requires_grad=True) for width in (3, 4)
    ]
    inputs = torch.randn(*lead, 6 * tokens, dtype=torch.float64, requires_grad=True)
    parameters = list(block.parameters())

    def apply(a: torch.Tensor, b: torch.Tensor, e: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return block([a, b], e)

    assert torch.autograd.gradcheck(apply, (*contexts, inputs, *parameters))


def test_token_block_in_bfloat16_is_near() -> None:
    draws = torch.Generator().manual_seed(0)
    block = TokenBlock([32, 32], 16, 16)
    initialise(block, draws)
    contexts = [torch.randn(50, 32, generator=draws) for _ in range(2)]
    inputs, toward = (torch.randn(50, 16, generator=draws) for _ in range(2))
    # A direction of its own for each token: the norm of what a LayerNorm gives has no gradient.
    exact = torch.autograd.grad((block(contexts, inputs) * toward).sum(), [*block.parameters()])
    made = block(contexts, inputs, torch.bfloat16)
    assert made.dtype == torch.float32
    assert not torch.equal(made, block(contexts, inputs))
    near = torch.autograd.grad((made * toward).sum(), [*block.parameters()])
    torch.testing.assert_close(made, block(contexts, inputs), rtol=0, atol=0.05)
    for mine, theirs in zip(near, exact, strict=True):
        assert float((mine - theirs).norm()) < 0.05 * float(theirs.norm())


def test_token_block_takes_the_type_that_autocast_asks_for() -> None:
    block = TokenBlock([32, 32], 16, 16)
    initialise(block, torch.Generator().manual_seed(0))
    contexts, inputs = [torch.randn(50, 32) for _ in range(2)], torch.randn(50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        made = block(contexts, inputs)
    assert torch.equal(made, block(contexts, inputs, torch.bfloat16))
    assert not torch.equal(made, block(contexts, inputs))


def test_a_step_is_gone_with_its_result() -> None:
    """A graph that held its own result would keep a batch's memory until garbage is collected."""
    block = TokenBlock([6, 6], 4, 4)
    initialise(block, torch.Generator().manual_seed(0))
    gc.disable()
    try:
        made = block([torch.randn(3, 6), torch.randn(3, 6)], torch.randn(3, 4))
        assert made.requires_grad
        there = weakref.ref(made)
        del made
        assert there() is None
    finally:
        gc.enable()
