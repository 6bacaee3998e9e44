"""Both training loops against literal loops, and their stopping rules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cvfp import phase1, phase2
from cvfp.config import Experiment
from cvfp.model import CVFP, TokenInputs, initialise

SMALL: dict[str, Any] = dict(
    context_dim=10, embedding_dim=8, num_layers=2, device="cpu", precision="float32"
)


def make_model(tying: bool = True, freeze: bool = True, every: bool = True) -> CVFP:
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(20, 8, generator=generator)
    model = CVFP(
        table,
        num_layers=2,
        context_dim=10,
        num_input_tokens=1,
        token_input_all_layers=every,
        weight_tying=tying,
        freeze_embedding=freeze,
    )
    initialise(model.context_block, generator)
    initialise(model.token_block, generator)
    return model


def make_tokens(total: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 20, (total,), generator=torch.Generator().manual_seed(seed))


def test_group_loss_is_the_formula() -> None:
    new, old = torch.randn(7, 5).double(), torch.randn(7, 5).double()
    loss, change, diversity = phase1.group_loss(new, old, 0.8)
    mse = sum((new[t, d] - old[t, d]) ** 2 for t in range(7) for d in range(5)) / 35
    mean = new.mean(dim=0)
    frobenius = math.sqrt(float(sum(((new[t] - mean) ** 2).sum() for t in range(7))))
    assert float(loss) == pytest.approx(0.2 * float(mse) - 0.8 * frobenius / 7, abs=1e-12)
    assert float(diversity) == pytest.approx(frobenius / 7, abs=1e-12)
    assert change.tolist() == pytest.approx(
        [float(((new[t] - old[t]) ** 2).mean()) for t in range(7)]
    )


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("group", [16, 17, 1000])
def test_phase1_equals_a_literal_loop(group: int, every: bool) -> None:
    """Token by token, with the same draws: same weights, same contexts."""
    total = 50
    experiment = Experiment(
        **SMALL, phase1_max_iterations=5, loss_group=group, convergence_rate=1.0
    )
    model, tokens = make_model(every=every).double(), make_tokens(total)
    literal = make_model(every=every).double().context_block
    inputs = TokenInputs(tokens, model.embedding.detach(), 1)

    torch.set_default_dtype(torch.float64)
    try:
        made = phase1.train(
            model.context_block, inputs, experiment, torch.Generator().manual_seed(5)
        )
        draws = torch.Generator().manual_seed(5)
        state = torch.empty(total, 10).normal_(0, 0.01, generator=draws)
        sizes = [min(group, total - i) for i in range(0, total, group)]
        noise = [
            torch.cat([torch.empty(g, 10).normal_(0, 0.1, generator=draws) for g in sizes])
            for _ in range(4)
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    e = F.layer_norm(model.embedding.detach(), (8,))[tokens]
    optimiser = torch.optim.Adam(literal.parameters(), lr=experiment.phase1_learning_rate)
    for k in range(4):
        read = torch.cat([state[-1:], state[:-1]]) + noise[k]
        new = torch.cat([literal(read[t : t + 1], e[t : t + 1])[-1] for t in range(total)])
        losses = [
            phase1.group_loss(new[i : i + group], state[i : i + group], 0.8)[0]
            for i in range(0, total, group)
        ]
        optimiser.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(literal.parameters(), 1.0)
        optimiser.step()
        state = new.detach()
    assert made.iterations == 5
    torch.testing.assert_close(made.contexts, state, rtol=0, atol=1e-9)
    for got, want in zip(model.context_block.parameters(), literal.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_phase1_counts_and_stops_as_published() -> None:
    model, tokens = make_model(), make_tokens(400)
    inputs = TokenInputs(tokens, model.embedding, 1)
    easy = Experiment(**SMALL, convergence_threshold=100.0)
    made = phase1.train(model.context_block, inputs, easy, torch.Generator().manual_seed(0))
    assert made.iterations == 5  # converged from the first application on, but not before 5
    assert [row["iteration"] for row in made.history] == [2, 3, 4, 5]
    hard = Experiment(**SMALL, convergence_threshold=1e-9, phase1_max_iterations=7)
    made = phase1.train(make_model().context_block, inputs, hard, torch.Generator().manual_seed(0))
    assert made.iterations == 7
    assert made.converged < 0.99


def test_phase1_names_a_loss_that_is_not_finite() -> None:
    model = make_model()
    with torch.no_grad():
        model.context_block.linears[0].bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="phase1_learning_rate"):
        phase1.train(
            model.context_block,
            TokenInputs(make_tokens(30), model.embedding, 1),
            Experiment(**SMALL),
            torch.Generator().manual_seed(0),
        )


@pytest.mark.parametrize("tying", [True, False])
def test_evaluation_equals_a_token_by_token_loop(tying: bool) -> None:
    model, tokens = make_model(tying=tying), make_tokens(30)
    if not tying:
        assert model.head is not None
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    contexts = torch.randn(30, 10)
    made = phase2.evaluate(phase2.Positions(model, contexts, tokens))
    e = F.layer_norm(model.embedding, (8,))[tokens]
    for t in range(29):
        read = contexts[t - 1 : t] if t else torch.zeros(1, 10)
        outputs = model.context_block(read, e[t : t + 1])
        logits = model.logits(model.token_block(outputs, e[t : t + 1]))[0]
        wanted = -torch.log_softmax(logits, 0)[tokens[t + 1]]
        assert float(made.nats[t]) == pytest.approx(float(wanted.detach()), abs=1e-4)
        assert bool(made.correct[t]) == (int(logits.argmax()) == int(tokens[t + 1]))
    assert made.loss == pytest.approx(float(made.nats.mean()))


def phase2_run(model: CVFP, **fields: Any) -> phase2.Phase2:
    experiment = Experiment(**{**SMALL, "phase2_batch_size": 32, **fields})
    generator = torch.Generator().manual_seed(1)
    contexts = torch.randn(300, 10, generator=generator)
    return phase2.train(
        phase2.Positions(model, contexts, make_tokens(300)),
        phase2.Positions(model, contexts[:100], make_tokens(300)[:100]),
        experiment,
        torch.Generator().manual_seed(2),
    )


def test_phase2_stream_order_equals_a_literal_loop() -> None:
    model, literal = make_model(), make_model()
    made = phase2_run(model, phase2_epochs=2, phase2_shuffle=False)
    contexts = torch.randn(300, 10, generator=torch.Generator().manual_seed(1))
    tokens = make_tokens(300)
    e = F.layer_norm(literal.embedding, (8,))[tokens]
    shifted = torch.cat([torch.zeros(1, 10), contexts[:-1]])
    optimiser = torch.optim.Adam(literal.token_block.parameters(), lr=0.003)
    total = 0.0
    for epoch in range(2):
        for first in range(0, 299, 32):
            piece = slice(first, min(first + 32, 299))
            with torch.no_grad():
                outputs = literal.context_block(shifted[piece], e[piece])
            logits = literal.logits(literal.token_block(outputs, e[piece]))
            loss = F.cross_entropy(logits, tokens[piece.start + 1 : piece.stop + 1])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * (piece.stop - piece.start) * (epoch == 0)
    assert made.history[0]["train_loss"] == pytest.approx(total / 299, abs=1e-5)
    for got, want in zip(
        model.token_block.parameters(), literal.token_block.parameters(), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_phase2_keeps_the_best_epoch_and_stops_by_patience() -> None:
    model = make_model()
    made = phase2_run(model, phase2_epochs=40, phase2_patience=2, phase2_learning_rate=0.2)
    losses = [row["val_loss"] for row in made.history]
    assert made.best_epoch == 1 + losses.index(min(losses))
    assert len(losses) == min(40, made.best_epoch + 2)
    contexts = torch.randn(300, 10, generator=torch.Generator().manual_seed(1))[:100]
    again = phase2.evaluate(phase2.Positions(model, contexts, make_tokens(300)[:100]))
    assert again.loss == pytest.approx(min(losses), abs=1e-7)


@pytest.mark.parametrize("tying", [True, False])
@pytest.mark.parametrize("freeze", [True, False])
def test_phase2_trains_what_it_says_and_nothing_else(tying: bool, freeze: bool) -> None:
    model = make_model(tying=tying, freeze=freeze)
    before = {name: p.clone() for name, p in model.named_parameters()}
    phase2_run(model, phase2_epochs=1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    wanted = {name for name in before if name.startswith("token_block")}
    wanted |= set() if freeze else {"embedding"}
    wanted |= set() if tying else {"head.weight", "head.bias"}
    assert moved == wanted
    # A trained table must not move what the frozen ContextBlock reads.
    if not freeze:
        assert model.context_table is not None
        assert torch.equal(model.context_table, before["embedding"])


@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_frozen_head_equals_cross_entropy(precision: str, limit: float) -> None:
    weight, target = torch.randn(50, 8), torch.randint(0, 50, (12,))
    head = phase2.FrozenHead(weight, 20, precision)
    for _ in range(2):  # the buffers are used again
        hidden = torch.randn(12, 8, requires_grad=True)
        wanted = F.cross_entropy(hidden @ weight.T, target)
        (gradient,) = torch.autograd.grad(3 * wanted, hidden)
        made = head.loss(hidden, target)
        (by_hand,) = torch.autograd.grad(3 * made, hidden)
        assert float((made - wanted).detach().abs()) < limit * float(wanted.detach())
        assert float((by_hand - gradient).norm() / gradient.norm()) < limit


def test_frozen_head_bears_a_hopeless_token() -> None:
    head = phase2.FrozenHead(torch.tensor([[300.0], [-300.0]]), 1, "float32")
    hidden = torch.ones(1, 1, requires_grad=True)
    loss = head.loss(hidden, torch.tensor([1]))
    assert 80 < float(loss.detach()) < 601
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert float(gradient) == pytest.approx(600)
