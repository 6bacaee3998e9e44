"""Both training loops against their definition in plain float64, and their stopping rules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import literal
import pytest
import torch
from torch import Tensor

from cvfp import controls, ops, phase1, phase2
from cvfp.build import build_cvfp
from cvfp.config import Experiment
from cvfp.inputs import TokenInputs
from cvfp.model import CVFP, ContextBlock, Predictor, initialise

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
        ContextBlock(layers, 10, tokens * 8, every),
        num_input_tokens=tokens,
        weight_tying=tying,
        freeze_embedding=freeze,
    )
    initialise(model.context_block, generator)
    initialise(model.token_block, generator)
    return model


def make_tokens(total: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 20, (total,), generator=torch.Generator().manual_seed(seed))


# Phase 1


class Draws:
    """Every draw of Phase 1, kept in order: rows of [T, D], and their deviations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[Tensor] = []
        self.deviations: list[float] = []
        monkeypatch.setattr(ops, "gaussian_", self)

    def __call__(self, out: Tensor, std: float, generator: torch.Generator, rows: int) -> Tensor:
        out.normal_(0.0, 1.0, generator=generator).mul_(std)
        self.rows.append(out.double().clone())
        self.deviations += [std] * len(out)
        return out

    def streams(self, total: int) -> list[Tensor]:
        return list(torch.cat(self.rows).split(total))


@pytest.mark.parametrize("mode", ["auto", "plain"])
@pytest.mark.parametrize(("every", "tokens"), [(True, 1), (False, 2)])
@pytest.mark.parametrize("group", [16, 17, 1000])
def test_phase1_is_the_definition(
    group: int, every: bool, tokens: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token, with the same draws: same losses, same weights, same contexts."""
    total = 50
    experiment = Experiment(
        **SMALL,
        phase1_max_iterations=5,
        loss_group=group,
        convergence_rate=1.0,
        num_input_tokens=tokens,
        token_input_all_layers=every,
        phase1_noise=0.3,
        phase1_gradient_clip=0.05,
        dist_reg_weight=0.7,
    )
    model, stream = make_model(every=every, tokens=tokens).double(), make_tokens(total)
    table = model.embedding.detach().clone()
    w = literal.weights(model.context_block, trained=True)
    draws = Draws(monkeypatch)
    with ops.using(mode):
        made = phase1.train(
            model.context_block,
            model.context_inputs(stream),
            experiment,
            torch.Generator().manual_seed(5),
        )
    initial, *noise = draws.streams(total)
    assert draws.deviations == [phase1.INITIAL_STD] * total + [0.3] * 4 * total
    assert phase1.INITIAL_STD == 0.01
    assert len(torch.cat([initial, *noise]).unique(dim=0)) == 5 * total  # none twice
    contexts, losses = literal.phase1(
        w,
        literal.inputs(table, stream, tokens),
        initial,
        noise,
        group=group,
        weight=0.7,
        lr=experiment.phase1_learning_rate,
        clip=0.05,
    )
    assert made.iterations == 5
    assert [row["loss"] for row in made.history] == pytest.approx(losses, abs=1e-7)
    torch.testing.assert_close(made.contexts, contexts, rtol=0, atol=1e-9)
    for name, parameter in model.context_block.named_parameters():
        torch.testing.assert_close(parameter.detach(), w[name].detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("every", [True, False])
def test_phase1_in_float32_is_near_the_definition(
    every: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stream = make_model(every=every), make_tokens(90)
    w = literal.weights(model.context_block, trained=True)
    experiment = Experiment(**SMALL, phase1_max_iterations=8, loss_group=32, convergence_rate=1.0)
    draws = Draws(monkeypatch)
    made = phase1.train(
        model.context_block, model.context_inputs(stream), experiment, torch.Generator()
    )
    initial, *noise = draws.streams(90)
    e = literal.inputs(model.embedding.detach().double(), stream, 1)
    fields = dict(group=32, weight=0.8, lr=experiment.phase1_learning_rate, clip=1.0)
    contexts, losses = literal.phase1(w, e, initial, noise, **fields)  # type: ignore[arg-type]
    assert [row["loss"] for row in made.history] == pytest.approx(losses, abs=1e-4)
    torch.testing.assert_close(made.contexts.double(), contexts, rtol=0, atol=1e-2)


def test_the_history_is_of_the_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change, quantiles and the converged fraction of the iteration, the last by hand."""
    total = 60
    kept: list[Tensor] = []
    model, stream = make_model().double(), make_tokens(total)
    forward = ContextBlock.forward
    monkeypatch.setattr(
        ContextBlock,
        "forward",
        lambda self, *given: (made := forward(self, *given), kept.append(made[-1].detach()))[0],
    )
    experiment = Experiment(
        **SMALL,
        phase1_max_iterations=7,
        loss_group=25,
        convergence_rate=1.0,
        convergence_threshold=0.5,
    )
    made = phase1.train(
        model.context_block,
        model.context_inputs(stream),
        experiment,
        torch.Generator().manual_seed(0),
    )
    iterates = torch.cat(kept).split(total)
    assert torch.equal(made.contexts, iterates[-1])
    for row, before, after in zip(made.history[1:], iterates, iterates[1:], strict=False):
        change = (after - before).square().mean(dim=1)
        assert row["change"] == pytest.approx(float(change.mean()), rel=1e-5)
        assert row["converged"] == pytest.approx(float((change < 0.5).double().mean()), abs=1e-6)
        for q in (10, 50, 90):
            assert row[f"change_p{q}"] == pytest.approx(
                float(torch.quantile(change, q / 100)), rel=1e-5
            )
        groups = after.split(25)
        spread = [float((g - g.mean(0)).norm() / len(g)) for g in groups]
        assert row["diversity"] == pytest.approx(sum(spread) / 3, rel=1e-5)
    assert made.converged == made.history[-1]["converged"]


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
    numbers = torch.randn(400 * 6, 10, generator=torch.Generator().manual_seed(0))
    place = 0

    def in_order(out: Tensor, std: float, generator: torch.Generator, rows: int) -> Tensor:
        nonlocal place
        place += len(out)
        return out.copy_(numbers[(place - len(out)) % 2400 : (place - 1) % 2400 + 1]).mul_(std)

    monkeypatch.setattr(ops, "gaussian_", in_order)
    monkeypatch.setitem(ops.placement.PASS, "cpu", 1)  # one group a pass
    one = phase1_run()
    monkeypatch.setitem(ops.placement.PASS, "cpu", 2 * 64 * 10)
    two = phase1_run()
    monkeypatch.setitem(ops.placement.PASS, "cpu", 2**20)
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
    monkeypatch.setitem(ops.placement.PASS, "cpu", 2**20)
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


def test_phase1_gives_up_where_it_is_told_to() -> None:
    seen: list[dict[str, float]] = []

    def report(row: dict[str, float]) -> str | None:
        seen.append(row)
        row["mine"] = 2.0 * row["iteration"]
        return "enough" if row["iteration"] == 4 else None

    made = phase1.train(
        make_model().context_block,
        TokenInputs(make_tokens(100), make_model().embedding, 1),
        Experiment(**SMALL, convergence_rate=1.0),
        torch.Generator().manual_seed(0),
        report,
    )
    assert made.iterations == 4
    assert made.aborted == "enough"
    assert made.history == seen
    assert [row["mine"] for row in made.history] == [4, 6, 8]


def test_phase1_reads_noise_and_begins_from_little() -> None:
    """The draws are the generator's; without noise the first contexts are nearly those of zeros."""
    firsts = []
    for noise, seed in ((0.0, 0), (0.0, 1), (0.5, 0), (0.5, 1)):
        model = make_model()
        made = phase1.train(
            model.context_block,
            model.context_inputs(make_tokens(200)),
            Experiment(**SMALL, phase1_max_iterations=2, phase1_noise=noise),
            torch.Generator().manual_seed(seed),
        )
        firsts.append(made.contexts)
    near, far = float((firsts[0] - firsts[1]).norm()), float((firsts[2] - firsts[3]).norm())
    assert 0 < near < 0.2 * far


def test_phase1_names_a_loss_that_is_not_finite() -> None:
    model = make_model()

    def spoil(row: dict[str, float]) -> None:
        with torch.no_grad():
            model.context_block.linears[0].bias[0] = math.nan

    with pytest.raises(FloatingPointError, match=r"at iteration 3.*phase1_learning_rate"):
        phase1.train(
            model.context_block,
            TokenInputs(make_tokens(30), model.embedding, 1),
            Experiment(**SMALL),
            torch.Generator().manual_seed(0),
            spoil,
        )


# Phase 2


def definition(model: CVFP, contexts: Tensor, tokens: Tensor) -> literal.Phase2:
    """The same model, written apart, with copies of its weights that are trained where its are."""
    table = model.embedding.detach().double().clone()
    frozen = not model.embedding.requires_grad
    embedding = table if frozen else table.clone().requires_grad_()
    head = None
    if model.head is not None:
        w = literal.weights(model.head, trained=True)
        head = w["weight"], w["bias"]
    return literal.Phase2(
        literal.weights(model.context_block),
        literal.weights(model.token_block, trained=True),
        table,
        embedding,
        model.num_input_tokens,
        head,
    )


def trained(one: literal.Phase2) -> dict[str, Tensor]:
    found = {f"token_block.{name}": p for name, p in one.token_block.items()}
    if one.embedding.requires_grad:
        found["embedding"] = one.embedding
    if one.head is not None:
        found |= {"head.weight": one.head[0], "head.bias": one.head[1]}
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(("every", "tokens"), [(True, 1), (False, 2)])
@pytest.mark.parametrize("tying", [True, False])
def test_evaluation_is_the_definition(tying: bool, every: bool, tokens: int) -> None:
    model, stream = make_model(tying=tying, every=every, tokens=tokens), make_tokens(30)
    if model.head is not None:
        for parameter in model.head.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    contexts = torch.randn(30, 10)
    made = phase2.evaluate(phase2.Positions(model, contexts, stream))
    one = definition(model, contexts, stream)
    positions = torch.arange(29)
    with torch.no_grad():
        logits = one.logits(contexts.double(), stream, positions)
        nats = literal.nats(logits, stream[1:])
    torch.testing.assert_close(made.nats, nats, rtol=0, atol=1e-5)
    assert torch.equal(made.correct, logits.argmax(dim=1) == stream[1:])
    assert made.loss == pytest.approx(float(nats.mean()))
    assert made.accuracy == pytest.approx(float(made.correct.double().mean()))


def phase2_run(model: CVFP, **fields: Any) -> phase2.Phase2:
    experiment = Experiment(**{**SMALL, "phase2_batch_size": 32, **fields})
    generator = torch.Generator().manual_seed(1)
    contexts = torch.randn(300, 10, generator=generator).to(model.embedding.dtype)
    return phase2.train(
        phase2.Positions(model, contexts, make_tokens(300)),
        phase2.Positions(model, contexts[:100], make_tokens(300)[:100]),
        experiment,
        torch.Generator().manual_seed(2),
    )


@pytest.mark.parametrize("mode", ["auto", "plain"])
@pytest.mark.parametrize(
    ("tying", "freeze"), [(True, True), (True, False), (False, True), (False, False)]
)
@pytest.mark.parametrize(("every", "layers", "tokens"), [(True, 2, 1), (False, 3, 2)])
def test_phase2_is_the_definition(
    every: bool, layers: int, tokens: int, tying: bool, freeze: bool, mode: str
) -> None:
    model = make_model(tying, freeze, every, tokens, layers).double()
    contexts = torch.randn(300, 10, generator=torch.Generator().manual_seed(1))[:80].double()
    stream = make_tokens(80)
    one = definition(model, contexts, stream)
    experiment = Experiment(
        **SMALL, phase2_batch_size=32, phase2_epochs=2, phase2_shuffle=False, phase2_patience=2
    )
    with ops.using(mode):
        made = phase2.train(
            phase2.Positions(model, contexts, stream),
            phase2.Positions(model, contexts[:30], stream[:30]),
            experiment,
            torch.Generator(),
        )
    parameters = trained(one)
    optimiser = literal.Adam(list(parameters.values()), 0.003)
    best, kept = math.inf, {}
    for row in made.history:
        loss = one.epoch(optimiser, contexts, stream, torch.arange(79), 32)
        with torch.no_grad():
            nats = one.nats(contexts[:30], stream[:30], torch.arange(29)).mean()
        assert row["train_loss"] == pytest.approx(loss, abs=1e-6)
        assert row["val_loss"] == pytest.approx(float(nats), abs=1e-9)
        assert row["val_ppl"] == pytest.approx(math.exp(float(nats)), rel=1e-9)
        if float(nats) < best:
            best = float(nats)
            kept = {name: p.detach().clone() for name, p in parameters.items()}
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moving == set(kept)
    for name, parameter in model.named_parameters():
        if name in kept:
            torch.testing.assert_close(parameter.detach(), kept[name], rtol=0, atol=1e-9)


def test_phase2_in_float32_is_near_the_definition() -> None:
    model = make_model(layers=4)
    contexts = torch.randn(300, 10, generator=torch.Generator().manual_seed(1))
    stream = make_tokens(300)
    one = definition(model, contexts, stream)
    made = phase2_run(model, phase2_epochs=1, phase2_shuffle=False, num_layers=4)
    optimiser = literal.Adam(list(trained(one).values()), 0.003)
    loss = one.epoch(optimiser, contexts.double(), stream, torch.arange(299), 32)
    assert made.history[0]["train_loss"] == pytest.approx(loss, abs=1e-5)
    for name, parameter in model.token_block.named_parameters():
        torch.testing.assert_close(
            parameter.detach().double(), one.token_block[name].detach(), rtol=0, atol=1e-3
        )


def test_phase2_reads_every_token_once_an_epoch_in_the_generators_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []
    hidden = phase2.Positions.hidden
    monkeypatch.setattr(
        phase2.Positions,
        "hidden",
        lambda self, positions, *given: (
            torch.is_grad_enabled() and seen.append(positions),
            hidden(self, positions, *given),
        )[1],
    )

    def order(shuffle: bool, seed: int) -> list[int]:
        seen.clear()
        model, contexts = make_model(), torch.randn(100, 10)
        stream = phase2.Positions(model, contexts, make_tokens(100))
        experiment = Experiment(
            **SMALL, phase2_batch_size=32, phase2_epochs=2, phase2_shuffle=shuffle
        )
        phase2.train(stream, stream, experiment, torch.Generator().manual_seed(seed))
        assert [len(one) for one in seen] == [32, 32, 32, 3] * 2
        return torch.cat(seen).tolist()

    plain = order(False, 0)
    assert plain == list(range(99)) * 2
    shuffled = order(True, 0)
    assert sorted(shuffled[:99]) == sorted(shuffled[99:]) == list(range(99))
    assert shuffled[:99] != shuffled[99:] != list(range(99))
    assert shuffled == order(True, 0) != order(True, 1)


def test_bfloat16_phase2_follows_float32() -> None:
    exact = phase2_run(make_model(), phase2_epochs=3).history
    rounded = phase2_run(make_model(), phase2_epochs=3, precision="bfloat16").history
    assert exact != rounded
    for mine, theirs in zip(rounded, exact, strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=5e-3)
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=5e-3)


@pytest.mark.parametrize("mode", ["auto", "plain"])
def test_contexts_that_bfloat16_left_can_be_read_in_float32(mode: str) -> None:
    model, tokens, contexts = make_model(), make_tokens(80), torch.randn(80, 10).bfloat16()
    with ops.using(mode):
        made = phase2.evaluate(phase2.Positions(model, contexts, tokens))
        wanted = phase2.evaluate(phase2.Positions(model, contexts.float(), tokens))
    torch.testing.assert_close(made.nats, wanted.nats, rtol=0, atol=1e-4)


def test_phase2_keeps_the_best_epoch_and_stops_by_patience() -> None:
    model = make_model()
    made = phase2_run(model, phase2_epochs=40, phase2_patience=2, phase2_learning_rate=0.2)
    losses = [row["val_loss"] for row in made.history]
    assert made.best_epoch == 1 + losses.index(min(losses))
    assert len(losses) == min(40, made.best_epoch + 2)
    contexts = torch.randn(300, 10, generator=torch.Generator().manual_seed(1))[:100]
    again = phase2.evaluate(phase2.Positions(model, contexts, make_tokens(300)[:100]))
    assert again.loss == pytest.approx(min(losses), abs=1e-7)


def test_phase2_names_a_loss_that_is_not_finite() -> None:
    model = make_model()
    with torch.no_grad():
        model.token_block.linears[0].bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="Phase 2 is not finite at epoch 1"):
        phase2_run(model)


def test_fit_refuses_a_loss_without_gradients() -> None:
    with pytest.raises(RuntimeError, match="does not require grad"):
        phase2.fit(
            make_model(),
            lambda: [(torch.arange(3),)],
            lambda positions: torch.zeros(()),
            lambda: pytest.fail("a step without gradients passed"),
            Experiment(**SMALL),
            torch.Generator(),
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


@pytest.mark.parametrize("logits", [1, 200, 2**21])
def test_evaluation_does_not_depend_on_how_many_are_scored_at_once(
    logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens, contexts = make_model(), make_tokens(90), torch.randn(90, 10)
    wanted = phase2.evaluate(phase2.Positions(model, contexts, tokens))
    monkeypatch.setitem(ops.placement.LOGITS, "cpu", logits)
    made = phase2.evaluate(phase2.Positions(model, contexts, tokens))
    torch.testing.assert_close(made.nats, wanted.nats, rtol=0, atol=1e-5)
    assert torch.equal(made.correct, wanted.correct)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize(("every", "tokens"), [(True, 1), (False, 2)])
@pytest.mark.parametrize("control", ["trained", "zero", "shuffled", "window"])
def test_phase2_of_every_control_is_the_plain_one(
    control: str,
    every: bool,
    tokens: int,
    freeze: bool,
    layers: int,
    fresh_memory_is_nan: None,
) -> None:
    """Batches of two sizes, fresh memory full of NaN."""

    def run(mode: str) -> list[float]:
        exp = Experiment(
            **SMALL,
            contexts=control,
            freeze_embedding=freeze,
            num_input_tokens=tokens,
            token_input_all_layers=every,
            window_tokens=2,
            phase2_batch_size=32,
            phase2_epochs=2,
        ).replace(num_layers=layers)
        generator = torch.Generator().manual_seed(1)
        model = build_cvfp(exp, torch.randn(20, 8, generator=generator))
        contexts, stream = torch.randn(300, 10, generator=generator), make_tokens(300)
        with ops.using(mode):
            found = phase2.train(
                controls.positions(model, contexts, stream, exp),
                controls.positions(model, contexts[:101], stream[:101], exp),
                exp,
                torch.Generator().manual_seed(2),
            )
        return [row[name] for row in found.history for name in ("train_loss", "val_loss")]

    assert run("auto") == pytest.approx(run("plain"), rel=1e-5)


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


def test_loss_bears_a_hopeless_token() -> None:
    for freeze in (True, False):
        table = torch.tensor([[300.0], [-300.0]])
        model = Predictor(table, weight_tying=True, freeze_embedding=freeze)
        hidden = torch.ones(1, 1, requires_grad=True)
        loss = model.nats(hidden, torch.tensor([1]))
        assert 80 < float(loss.detach()) < 601
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert float(gradient) == pytest.approx(600)


def test_a_tie_is_not_right() -> None:
    """A head of zeros knows nothing."""
    model, tokens = make_model(tying=False), make_tokens(30)
    made = phase2.evaluate(phase2.Positions(model, torch.randn(30, 10), tokens))
    assert made.accuracy == 0
    assert made.loss == pytest.approx(math.log(20), abs=1e-6)
