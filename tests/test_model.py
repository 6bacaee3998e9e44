"""The blocks against SPEC §2, layer by layer."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import literal
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_experiment
from torch import Tensor, nn

from cvfp import contexts as contexts_module
from cvfp import ops
from cvfp.build import build_cvfp
from cvfp.controls import count_parameters, end_counts
from cvfp.inputs import TokenInputs
from cvfp.model import CVFP, ContextBlock, TokenBlock, initialise


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
    lively(block)
    context, inputs = torch.randn(5, 12).double(), torch.randn(5, 20).double()
    outputs = block(context, inputs)
    assert [o.shape[1] for o in outputs] == block.widths
    wanted = literal.context_block(literal.weights(block), context, inputs)
    for got, want in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    near = block.float()(context.float(), inputs.float())
    for got, want in zip(near, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_token_block_is_the_formula(n: int, every: bool) -> None:
    block = make_block(3, 12, n * 8, every)
    tokens = TokenBlock(block.widths, 8, n * 8).double()
    initialise(tokens, torch.Generator().manual_seed(0))
    lively(tokens)
    contexts = [torch.randn(4, w).double() for w in block.widths]
    inputs = torch.randn(4, n * 8).double()
    wanted = literal.token_block(literal.weights(tokens), contexts, inputs, 8)
    torch.testing.assert_close(tokens(contexts, inputs), wanted, rtol=0, atol=1e-13)


def lively(block: nn.Module) -> None:
    """LayerNorms that are not the identity."""
    for norm in block.modules():
        if isinstance(norm, nn.LayerNorm):
            nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
            nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("width", [19, 21])
def test_inputs_of_another_width_are_named(width: int) -> None:
    with pytest.raises(ValueError, match=f"inputs: got {width} columns; accepted: 20"):
        make_block(2, 12, 20, True)(torch.zeros(5, 12).double(), torch.zeros(5, width).double())


def test_a_block_that_was_not_initialised_is_not_a_number() -> None:
    block = ContextBlock(2, 4, 3, False)
    assert all(p.isnan().all() for linear in block.linears for p in linear.parameters())
    assert block(torch.zeros(1, 4), torch.zeros(1, 3))[-1].isnan().all()


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
    torch.testing.assert_close(inputs.dense(), literal.inputs(table, tokens, n))
    torch.testing.assert_close(inputs.first(4).dense(), inputs.dense(slice(0, 4)))
    assert len(inputs.first(4)) == 4


@pytest.mark.parametrize("wrong", [-1, 20])
def test_a_token_without_a_row_is_named(wrong: int) -> None:
    table = torch.randn(20, 8)
    model = CVFP(
        table,
        ContextBlock(2, 6, 8, True),
        num_input_tokens=1,
        weight_tying=True,
        freeze_embedding=True,
    )
    with pytest.raises(ValueError, match=f"tokens: got {wrong}; accepted: 0 to 19"):
        model.context_inputs(torch.tensor([3, wrong, 4]))


@pytest.mark.parametrize("every", [True, False])
def test_published_standard_deviations_draw_to_the_bit_as_published(every: bool) -> None:
    """N(0, 0.1²) and N(0, 0.01²) in the order of the modules, each matrix in one draw."""
    block = ContextBlock(3, 24, 20, every, 0.1, 0.1)
    block.initialise(torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    for part in block.modules():
        if isinstance(part, nn.Linear):
            weight = torch.empty_like(part.weight).normal_(0.0, 0.1, generator=generator)
            assert torch.equal(part.weight, weight)
            bias = torch.empty_like(part.bias).normal_(0.0, 0.01, generator=generator)
            assert torch.equal(part.bias, bias)
        elif isinstance(part, nn.LayerNorm):
            assert torch.equal(part.weight, torch.ones_like(part.weight))
            assert torch.equal(part.bias, torch.zeros_like(part.bias))


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize(("context", "inputs"), [(0.3, 0.1), (0.1, 0.02), (0.05, 0.5), (0.2, 0.0)])
def test_contexts_and_inputs_have_standard_deviations_of_their_own(
    context: float, inputs: float, every: bool
) -> None:
    block = ContextBlock(2, 300, 200, every, context, inputs)
    block.initialise(torch.Generator().manual_seed(0))
    for i, linear in enumerate(block.linears):
        sees = every or i == 0
        on_c = linear.weight.detach()[:, :-200] if sees else linear.weight.detach()
        assert float(on_c.std()) == pytest.approx(context, rel=0.02)
        if sees:
            on_e = linear.weight.detach()[:, -200:]
            assert on_c.shape[1] == (300 if i == 0 else block.widths[i - 1])
            assert float(on_e.std()) == pytest.approx(inputs, rel=0.02, abs=1e-12)
        assert float(linear.bias.detach().std()) == pytest.approx(0.01, rel=0.2)
    for residual in block.residuals:
        if isinstance(residual, nn.Linear):
            assert float(residual.weight.detach().std()) == pytest.approx(context, rel=0.02)


@pytest.mark.parametrize("contexts", ["trained", "window"])
def test_an_experiment_sets_the_standard_deviations(contexts: Any) -> None:
    table = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))

    def made(**fields: Any) -> CVFP:
        one = tiny_experiment(embedding_dim=128, context_dim=128, contexts=contexts, **fields)
        return build_cvfp(one, table)

    plain = made()
    same = made(context_std=0.1, input_std=0.1, token_block_std=0.1)
    for mine, theirs in zip(plain.parameters(), same.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    other = made(context_std=0.2, input_std=0.04, token_block_std=0.05)
    for linear in other.context_block.linears:
        assert float(linear.weight.detach()[:, :128].std()) == pytest.approx(0.2, rel=0.03)
        assert float(linear.weight.detach()[:, 128:].std()) == pytest.approx(0.04, rel=0.03)
    for mine, theirs in zip(other.token_block.linears, plain.token_block.linears, strict=True):
        torch.testing.assert_close(2 * mine.weight, theirs.weight)
        assert torch.equal(mine.bias, theirs.bias)


def test_own_head_starts_at_zero_and_tied_head_is_the_table() -> None:
    table = torch.randn(30, 8)

    def made(tying: bool, freeze: bool) -> CVFP:
        block = ContextBlock(2, 6, 8, True)
        return CVFP(table, block, num_input_tokens=1, weight_tying=tying, freeze_embedding=freeze)

    own, hidden = made(False, True), torch.randn(3, 8)
    assert torch.equal(own.logits(hidden), torch.zeros(3, 30))
    assert end_counts(own) == {"embedding": 30 * 8, "head": 30 * 8 + 30}
    tied = made(True, True)
    torch.testing.assert_close(tied.logits(hidden), hidden @ table.T)
    assert end_counts(tied) == {"embedding": 30 * 8, "head": 0}
    assert not tied.embedding.requires_grad
    assert tied.context_table is None
    # Tied: what the head learns, the table learns; and what moves the table moves the head.
    moving = made(True, False)
    for value in (moving.logits(hidden).square().sum(), moving.nats(hidden, torch.arange(3))):
        moving.embedding.grad = None
        value.backward()
        assert moving.embedding.grad is not None
        assert float(moving.embedding.grad.norm()) > 0
    with torch.no_grad():
        moving.embedding.mul_(2)
    torch.testing.assert_close(moving.logits(hidden), 2 * hidden @ table.T)
    assert moving.context_table is not None
    assert torch.equal(moving.context_table, table)


@pytest.mark.parametrize("lead", [(5,), (2, 3)])
@pytest.mark.parametrize("tokens", [1, 2])
def test_token_block_gradients(lead: tuple[int, ...], tokens: int) -> None:
    """Against finite differences, contexts and inputs included."""
    block = TokenBlock([3, 4], 6, 6 * tokens).double()
    initialise(block, torch.Generator().manual_seed(0))
    lively(block)
    contexts = [
        torch.randn(*lead, width, dtype=torch.float64, requires_grad=True) for width in (3, 4)
    ]
    inputs = torch.randn(*lead, 6 * tokens, dtype=torch.float64, requires_grad=True)

    def apply(a: Tensor, b: Tensor, e: Tensor, *_: Tensor) -> Tensor:
        return block([a, b], e)

    assert torch.autograd.gradcheck(apply, (*contexts, inputs, *block.parameters()))


@pytest.mark.parametrize("mode", ["auto", "plain"])
def test_token_block_in_bfloat16_is_near(mode: str) -> None:
    draws = torch.Generator().manual_seed(0)
    block = TokenBlock([32, 32], 16, 16)
    initialise(block, draws)
    contexts = [torch.randn(50, 32, generator=draws) for _ in range(2)]
    inputs, toward = (torch.randn(50, 16, generator=draws) for _ in range(2))
    # A direction of its own for each token: the norm of what a LayerNorm gives has no gradient.
    exact = torch.autograd.grad((block(contexts, inputs) * toward).sum(), [*block.parameters()])
    with ops.using(mode), torch.autocast("cpu", torch.bfloat16):
        made = block(contexts, inputs)
    assert made.dtype == torch.float32
    assert not torch.equal(made, block(contexts, inputs))
    near = torch.autograd.grad((made * toward).sum(), [*block.parameters()])
    torch.testing.assert_close(made, block(contexts, inputs), rtol=0, atol=0.05)
    for mine, theirs in zip(near, exact, strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - theirs).norm()) < 0.05 * float(theirs.norm())


@pytest.mark.parametrize("mode", ["auto", "plain"])
def test_a_step_is_gone_with_its_result(mode: str) -> None:
    """A graph that held its own result would keep a batch's memory until garbage is collected."""
    block = TokenBlock([6, 6], 4, 4)
    initialise(block, torch.Generator().manual_seed(0))
    gc.disable()
    try:
        with ops.using(mode):
            made = block([torch.randn(3, 6), torch.randn(3, 6)], torch.randn(3, 4))
            assert made.requires_grad
            there = weakref.ref(made)
            del made
            assert there() is None
            nats = ops.next_token_nats(
                torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), None, torch.arange(3)
            )
            gone = weakref.ref(nats)
            del nats
            assert gone() is None
    finally:
        gc.enable()


class Own(nn.Module):
    """Nothing but what the recurrence needs."""

    def __init__(self) -> None:
        super().__init__()
        self.context_dim = 5
        self.linear = nn.Linear(8, 5)

    def forward(self, c: Tensor, e: Tensor) -> list[Tensor]:
        return [c, torch.tanh(0.5 * self.linear(torch.cat([c, e], dim=-1)))]


def test_contexts_need_no_more_of_a_block_than_this() -> None:
    block, e = Own().double(), torch.randn(150, 3).double()
    c, rows = torch.zeros(1, 5).double(), []
    with torch.no_grad():
        for t in range(150):
            c = block(c, e[t : t + 1])[-1]
            rows.append(c[0])
    made = contexts_module.evaluate(block, e, tol=1e-12)  # type: ignore[arg-type]
    assert made.converged
    torch.testing.assert_close(made.values, torch.stack(rows), rtol=0, atol=1e-10)
