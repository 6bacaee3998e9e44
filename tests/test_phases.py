"""Both training loops against literal loops, and their stopping rules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cvfp import controls, kernels, phase1, phase2, seeds
from cvfp.config import Experiment
from cvfp.experiment import build_cvfp
from cvfp.model import CVFP, Predictor, TokenInputs, initialise

SMALL: dict[str, Any] = dict(
    context_dim=10, embedding_dim=8, num_layers=2, device="cpu", precision="float32"
)


def make_model(
    tying: bool = True, freeze: bool = True, every: bool = True, tokens: int = 1, layers: int = 2
) -> CVFP:
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(20, 8, generator=generator)
    model = CVFP(
        table,
        num_layers=layers,
        context_dim=10,
        num_input_tokens=tokens,
        token_input_all_layers=every,
        weight_tying=tying,
        freeze_embedding=freeze,
    )
    initialise(model.context_block, generator)
    initialise(model.token_block, generator)
    return model


def make_tokens(total: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 20, (total,), generator=torch.Generator().manual_seed(seed))


def literal_loss(new: torch.Tensor, old: torch.Tensor, weight: float) -> torch.Tensor:
    """SPEC §3, as it reads, for one group [G, D]."""
    diversity = torch.linalg.matrix_norm(new - new.mean(dim=0)) / len(new)
    return (1 - weight) * (new - old).square().mean() - weight * diversity


def test_group_loss_is_the_formula() -> None:
    new, old = torch.randn(3, 7, 5).double(), torch.randn(3, 7, 5).double()
    losses, diversities, change, gradient = phase1.group_loss(new, old, 0.8)
    for k in range(3):
        mse = sum((new[k, t, d] - old[k, t, d]) ** 2 for t in range(7) for d in range(5)) / 35
        mean = new[k].mean(dim=0)
        frobenius = math.sqrt(float(sum(((new[k, t] - mean) ** 2).sum() for t in range(7))))
        wanted = 0.2 * float(mse) - 0.8 * frobenius / 7
        assert float(losses[k]) == pytest.approx(wanted, abs=1e-12)
        assert float(diversities[k]) == pytest.approx(frobenius / 7, abs=1e-12)
        assert change[k].tolist() == pytest.approx(
            [float(((new[k, t] - old[k, t]) ** 2).mean()) for t in range(7)]
        )
        leaf = new[k].clone().requires_grad_()
        literal_loss(leaf, old[k], 0.8).backward()
        torch.testing.assert_close(gradient[k], leaf.grad, rtol=0, atol=1e-14)


def test_group_loss_of_equal_contexts_is_finite() -> None:
    same = torch.ones(1, 6, 4)
    for part in phase1.group_loss(same, torch.zeros(1, 6, 4), 0.8):
        assert torch.isfinite(part).all()


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
        draw = seeds.normals(torch.Generator().manual_seed(5))
        state = draw(torch.empty(total, 10), 0.01)
        noise = [draw(torch.empty(total, 10), 0.1) for _ in range(4)]
    finally:
        torch.set_default_dtype(torch.float32)
    e = F.layer_norm(model.embedding.detach(), (8,))[tokens]
    optimiser = torch.optim.Adam(literal.parameters(), lr=experiment.phase1_learning_rate)
    for k in range(4):
        read = torch.cat([state[-1:], state[:-1]]) + noise[k]
        new = torch.cat([literal(read[t : t + 1], e[t : t + 1])[-1] for t in range(total)])
        losses = [
            literal_loss(new[i : i + group], state[i : i + group], 0.8)
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


def phase1_run(precision: str = "float32", total: int = 400) -> phase1.Phase1:
    model, tokens = make_model(), make_tokens(total)
    experiment = Experiment(
        **{**SMALL, "precision": precision},
        phase1_max_iterations=6,
        loss_group=64,
        convergence_rate=1.0,
    )
    inputs = TokenInputs(tokens, model.embedding.detach(), 1)
    return phase1.train(model.context_block, inputs, experiment, torch.Generator().manual_seed(5))


def test_phase1_does_not_depend_on_how_groups_are_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(phase1.PASS, "cpu", 1)  # one group a pass
    one = phase1_run()
    monkeypatch.setitem(phase1.PASS, "cpu", 2 * 64 * 10)
    two = phase1_run()
    monkeypatch.setitem(phase1.PASS, "cpu", 2**20)
    everything = phase1_run()
    for other in (two, everything):
        torch.testing.assert_close(other.contexts, one.contexts, rtol=0, atol=1e-5)
        for mine, theirs in zip(other.history, one.history, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["host", "disk"])
def test_phase1_is_the_same_wherever_contexts_are(
    where: str, precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = phase1_run(precision)
    monkeypatch.setenv("CVFP_HOME", str(tmp_path))
    monkeypatch.setenv("CVFP_CONTEXTS", where)
    monkeypatch.setitem(phase1.PASS, "cpu", 2**20)
    there = phase1_run(precision)
    assert torch.equal(there.contexts, here.contexts)
    assert there.history == here.history
    assert here.contexts.dtype == getattr(torch, precision)


def test_bfloat16_phase1_follows_float32() -> None:
    exact, rounded = phase1_run("float32", 4000), phase1_run("bfloat16", 4000)
    for mine, theirs in zip(rounded.history, exact.history, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.02, abs=2e-4)
        assert mine["change"] == pytest.approx(theirs["change"], rel=0.02)
    difference = (rounded.contexts.float() - exact.contexts).norm() / exact.contexts.norm()
    assert float(difference) < 0.02


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


def phase2_run(model: CVFP, products: str = "", **fields: Any) -> phase2.Phase2:
    experiment = Experiment(**{**SMALL, "phase2_batch_size": 32, **fields})
    generator = torch.Generator().manual_seed(1)
    contexts = torch.randn(300, 10, generator=generator)
    return phase2.train(
        phase2.Positions(model, contexts, make_tokens(300), products or experiment.precision),
        phase2.Positions(model, contexts[:100], make_tokens(300)[:100]),
        experiment,
        torch.Generator().manual_seed(2),
    )


@pytest.mark.parametrize(("every", "layers"), [(True, 2), (False, 2), (True, 4)])
def test_phase2_stream_order_equals_a_literal_loop(every: bool, layers: int) -> None:
    model, literal = (make_model(every=every, layers=layers) for _ in range(2))
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


def test_fit_refuses_a_loss_without_gradients() -> None:
    with pytest.raises(RuntimeError, match="neither a graph nor gradients"):
        phase2.fit(
            make_model(),
            lambda: [(torch.arange(3),)],
            lambda positions: torch.zeros(()),
            lambda: pytest.fail("a step without gradients passed"),
            Experiment(**SMALL),
        )


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


@pytest.mark.parametrize("chunk", [1, 64, 10_000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_phase2_does_not_depend_on_chunks(
    chunk: int, shuffle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = phase2_run(make_model(), phase2_epochs=2, phase2_shuffle=shuffle)
    monkeypatch.setitem(phase2.CHUNK, "cpu", chunk)
    made = phase2_run(make_model(), phase2_epochs=2, phase2_shuffle=shuffle)
    assert made.train_loss == pytest.approx(wanted.train_loss, abs=1e-6)
    torch.testing.assert_close(made.validation.nats, wanted.validation.nats, rtol=0, atol=1e-5)


def test_the_head_may_have_another_precision_than_the_block() -> None:
    mixed = phase2_run(make_model(), products="float32", precision="bfloat16").history
    exact = phase2_run(make_model()).history
    assert exact != mixed != phase2_run(make_model(), precision="bfloat16").history
    assert [row["val_loss"] for row in mixed] == pytest.approx(
        [row["val_loss"] for row in exact], rel=1e-3
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("every", "tokens"), [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_phase2_repeats_steps_without_a_difference(
    precision: str, every: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second epoch on every step is one already made, in the same memory."""
    made: list[int] = []
    plain = phase2.TokenStep.__init__

    def counted(self: Any, *given: Any) -> None:
        made.append(1)
        plain(self, *given)

    monkeypatch.setattr(phase2.TokenStep, "__init__", counted)

    def run(most: int) -> tuple[int, list[dict[str, float]], list[torch.Tensor]]:
        monkeypatch.setattr(kernels.Repeated, "MOST", most)
        model = make_model(every=every, tokens=tokens)
        made.clear()
        history = phase2_run(model, precision=precision, phase2_epochs=3).history
        return sum(made), history, [p.detach().clone() for p in model.token_block.parameters()]

    (all_steps, *wanted), (first_epoch, *found), (some, *part) = run(0), run(64), run(3)
    assert first_epoch < some < all_steps
    assert first_epoch < all_steps / 2
    assert wanted[0] == found[0] == part[0]
    for mine, *others in zip(wanted[1], found[1], part[1], strict=True):
        assert all(torch.equal(mine, other) for other in others)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize(("every", "tokens"), [(True, 1), (False, 2)])
@pytest.mark.parametrize("control", ["trained", "zero", "shuffled", "window"])
def test_phase2_in_memory_taken_again_equals_fresh_memory(
    control: str,
    every: bool,
    tokens: int,
    freeze: bool,
    layers: int,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    fresh_memory_is_nan: None,
) -> None:
    """Chunks and batches of two sizes, fresh memory full of NaN."""
    monkeypatch.setitem(phase2.CHUNK, "cpu", 64)

    def run() -> list[float]:
        exp = Experiment(
            **SMALL,
            contexts=control,
            freeze_embedding=freeze,
            num_input_tokens=tokens,
            token_input_all_layers=every,
            window_tokens=2,
            phase2_batch_size=32,
            phase2_epochs=2,
        ).replace(num_layers=layers, precision=precision)
        generator = torch.Generator().manual_seed(1)
        model = build_cvfp(exp, torch.randn(20, 8, generator=generator))
        contexts, stream = torch.randn(300, 10, generator=generator), make_tokens(300)
        found = phase2.train(
            controls.positions(model, contexts, stream, exp, precision),
            controls.positions(model, contexts[:101], stream[:101], exp),
            exp,
            torch.Generator().manual_seed(2),
        )
        return [row[name] for row in found.history for name in ("train_loss", "val_loss")]

    made = run()
    monkeypatch.setattr(phase2, "looped", lambda parameter: False)
    assert made == pytest.approx(run(), rel=1e-5 if precision == "float32" else 3e-3)


def test_positions_name_what_does_not_fit() -> None:
    model, tokens = make_model(), make_tokens(30)
    with pytest.raises(ValueError, match="contexts: got 20 rows; accepted: 30"):
        phase2.Positions(model, torch.randn(20, 10), tokens)
    for wrong in (-1, 20):
        tokens[29] = wrong  # only ever predicted
        with pytest.raises(ValueError, match=f"tokens: got {wrong}; accepted: 0 to 19"):
            phase2.Positions(model, torch.randn(30, 10), tokens)


def test_contexts_may_be_of_any_layout() -> None:
    model, tokens = make_model(), make_tokens(30)
    contexts = torch.randn(10, 30).T
    made = phase2.evaluate(phase2.Positions(model, contexts, tokens))
    wanted = phase2.evaluate(phase2.Positions(model, contexts.contiguous(), tokens))
    torch.testing.assert_close(made.nats, wanted.nats)


@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("tile", [1, 64])
@pytest.mark.parametrize(
    ("tying", "freeze"), [(True, True), (True, False), (False, True)], ids=["frozen", "tied", "own"]
)
def test_loss_and_gradients_equal_cross_entropy(
    tying: bool,
    freeze: bool,
    tile: int,
    precision: str,
    limit: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With logits by tiles as on a GPU, and without keeping them where nothing is trained."""
    monkeypatch.setitem(phase2.TILE, "cpu", tile)
    model, target = make_model(tying=tying, freeze=freeze), torch.randint(0, 20, (12,))
    weights = [model.embedding]
    if model.head is not None:
        torch.nn.init.normal_(model.head.weight)
        torch.nn.init.normal_(model.head.bias)
        weights = [model.head.weight, model.head.bias]
    head = phase2.NextToken(model, 20, precision)
    assert head.weighs == (tying and freeze)
    trained = [w for w in weights if w.requires_grad]
    for _ in range(2):  # the buffers are used again, the weights have changed
        hidden = torch.randn(12, 8, requires_grad=True)
        wanted = F.cross_entropy(model.logits(hidden), target)
        gradients = torch.autograd.grad(3 * wanted, [hidden, *trained])
        made = head.loss(hidden, target)
        by_hand = torch.autograd.grad(3 * made, [hidden, *trained])
        assert float((made - wanted).detach().abs()) < limit * float(wanted.detach())
        for mine, theirs in zip(by_hand, gradients, strict=True):
            assert mine.dtype == torch.float32
            assert float((mine - theirs).norm() / theirs.norm()) < limit
        with torch.no_grad():
            for weight in trained:
                weight *= 1.5


@pytest.mark.parametrize("freeze", [True, False])
def test_loss_bears_a_hopeless_token(freeze: bool) -> None:
    model = Predictor(torch.tensor([[300.0], [-300.0]]), weight_tying=True, freeze_embedding=freeze)
    head = phase2.NextToken(model, 1, "float32")
    hidden = torch.ones(1, 1, requires_grad=True)
    loss = head.loss(hidden, torch.tensor([1]))
    assert 80 < float(loss.detach()) < 601
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert float(gradient) == pytest.approx(600)


def test_a_tie_is_not_right() -> None:
    """A head of zeros knows nothing."""
    model, tokens = make_model(tying=False), make_tokens(30)
    made = phase2.evaluate(phase2.Positions(model, torch.randn(30, 10), tokens))
    assert made.accuracy == 0
    assert made.loss == pytest.approx(math.log(20), abs=1e-6)
