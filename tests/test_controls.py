"""Controls and peers: each is what it says, by a loop or a model written apart."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_experiment
from torch import Tensor, nn

import cvfp
from cvfp import Experiment, ParameterError, contexts, controls, end_to_end, phase2
from cvfp.build import build, build_cvfp, cvfp_size
from cvfp.end_to_end import LSTM, Transformer, unrolled
from cvfp.inputs import TokenInputs
from cvfp.model import CVFP

V, E, T = 40, 16, 150
CONTROLS = ("random", "zero", "shuffled", "window", "end_to_end")
PEERS = ("lstm", "transformer")


def table(seed: int = 0) -> Tensor:
    return torch.randn(V, E, generator=torch.Generator().manual_seed(seed))


def stream(length: int = T, seed: int = 1) -> Tensor:
    return torch.randint(V, (length,), generator=torch.Generator().manual_seed(seed))


def experiment(**fields: Any) -> Experiment:
    small: dict[str, Any] = dict(embedding_dim=E, phase2_batch_size=32, phase2_epochs=2, unroll=8)
    return tiny_experiment(**{**small, **fields})


def made(**fields: Any) -> tuple[Experiment, CVFP]:
    one = experiment(**fields)
    return one, build_cvfp(one, table())


def evaluate(model: CVFP, tokens: Tensor) -> phase2.Evaluation:
    """On exact contexts, as runs do."""
    inputs = model.context_inputs(tokens)
    exact = cvfp.experiment.exact_contexts(model.context_block, inputs)
    return phase2.evaluate(phase2.Positions(model, exact.values, tokens))


# Zero contexts


class Contextless(nn.Module):
    """TokenBlock without any context input, written apart: h <- LN(r + ReLU(W h + b))."""

    def __init__(self, model: CVFP) -> None:
        super().__init__()
        width = model.embedding.shape[1]
        self.linears = nn.ModuleList()
        for linear, context in zip(model.token_block.linears, model.context_widths, strict=True):
            assert isinstance(linear, nn.Linear)
            mine = nn.Linear(linear.in_features - context, width)
            with torch.no_grad():
                mine.weight.copy_(linear.weight[:, context:])
                mine.bias.copy_(linear.bias)
            self.linears.append(mine)
        self.norms = copy.deepcopy(model.token_block.norms)
        self.width = width

    def forward(self, e: Tensor) -> Tensor:
        hidden, residual = e, e[:, -self.width :]
        for linear, norm in zip(self.linears, self.norms, strict=True):
            hidden = residual = norm(residual + F.relu(linear(hidden)))
        return hidden


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_input_tokens": 2, "token_input_all_layers": False}, {"weight_decay": 5.0}],
)
def test_zero_contexts_equal_a_model_built_without_them(fields: dict[str, Any]) -> None:
    one, model = made(contexts="zero", phase2_shuffle=False, **fields)
    apart = Contextless(model)
    tokens = stream()
    ran = phase2.train(
        controls.positions(model, None, tokens, one),
        controls.positions(model, None, tokens[:60], one),
        one,
        torch.Generator(),
    )
    e = model.context_inputs(tokens).dense()
    rate, decay = one.phase2_learning_rate, one.weight_decay
    optimiser = torch.optim.AdamW(apart.parameters(), lr=rate, weight_decay=decay)
    losses: list[float] = []
    for _ in range(one.phase2_epochs):
        for positions in torch.arange(T - 1).split(32):
            logits = apart(e[positions]) @ model.embedding.T
            loss = F.cross_entropy(logits, tokens[positions + 1])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            logits = apart(e[:59]) @ model.embedding.T
        losses.append(float(F.cross_entropy(logits, tokens[1:60])))
    assert [row["val_loss"] for row in ran.history] == pytest.approx(losses, abs=1e-5)
    counted = controls.parameter_counts(model, one)
    assert counted["token_block"] == sum(p.numel() for p in apart.parameters())
    assert counted["context_block"] == 0


# Shuffled contexts, window


def test_shuffled_contexts_are_those_of_other_positions() -> None:
    one, model = made(contexts="shuffled")
    tokens, contexts_ = stream(), torch.randn(T, 16)
    plain = phase2.Positions(model, contexts_, tokens)
    mixed = controls.positions(model, contexts_, tokens, one)
    assert isinstance(mixed, controls.Shuffled)
    order = mixed.order
    assert sorted(order.tolist()) == list(range(T))
    assert int((order == torch.arange(T)).sum()) < 10
    again = controls.positions(model, contexts_, tokens, one)
    assert isinstance(again, controls.Shuffled)
    assert torch.equal(again.order, order)
    everywhere = torch.arange(T)
    wanted = plain.outputs(everywhere, plain.previous(everywhere))
    positions = torch.tensor([0, 7, T - 1])
    for layer, mine in zip(
        wanted, mixed.outputs(positions, mixed.previous(positions)), strict=True
    ):
        torch.testing.assert_close(mine, layer[order[positions]])
    # The tokens of the position itself are still its own.
    h = mixed.hidden(
        positions, mixed.outputs(positions, mixed.previous(positions)), mixed.token_inputs()
    )
    e = plain.context_inputs.dense(positions)
    torch.testing.assert_close(h, model.token_block([o[order[positions]] for o in wanted], e))


def test_window_holds_the_tokens_before_and_no_other() -> None:
    one, model = made(contexts="window", window_tokens=3)
    tokens = stream()
    window = controls.positions(model, None, tokens, one)
    rows = F.layer_norm(table(), (E,))
    for t in (0, 1, 2, 3, 50):
        before = [rows[tokens[s]] if s >= 0 else torch.zeros(E) for s in range(t - 3, t)]
        position = torch.tensor([t])
        for layer in window.outputs(position, window.previous(position)):
            torch.testing.assert_close(layer[0], torch.cat(before))
    assert model.context_widths == [3 * E] * one.num_layers


def test_window_brings_as_much_into_a_layer_as_a_context() -> None:
    _, wide = made(contexts="window", window_tokens=40)
    _, plain = made()
    for mine, theirs in zip(wide.token_block.linears, plain.token_block.linears, strict=True):
        assert isinstance(mine, nn.Linear)
        assert isinstance(theirs, nn.Linear)
        ours = mine.weight.detach()[:, : 40 * E].square().sum(dim=1).mean()
        assert float(
            ours / theirs.weight.detach()[:, :16].square().sum(dim=1).mean()
        ) == pytest.approx(1, abs=0.2)


# End to end


@pytest.mark.parametrize(
    "fields", [{}, {"num_input_tokens": 3, "token_input_all_layers": False, "num_layers": 3}]
)
@pytest.mark.parametrize("steps", [1, 7, T - 1])
def test_unrolled_equals_exact_contexts(fields: dict[str, Any], steps: int) -> None:
    _, model = made(contexts="end_to_end", **fields)
    model = model.double()
    tokens = stream()
    inputs = model.context_inputs(tokens)
    exact = contexts.evaluate(model.context_block, inputs, method="sequential")
    whole = phase2.Positions(model, exact.values, tokens)
    positions = torch.arange(T - 1)
    wanted = whole.hidden(
        positions, whole.outputs(positions, whole.previous(positions)), whole.token_inputs()
    )
    read, state, parts = unrolled(model), None, []
    for piece in positions.split(steps):
        hidden, state = read(inputs, piece[None], state)
        parts.append(hidden[0])
        assert not state[0].requires_grad
    torch.testing.assert_close(torch.cat(parts), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("freeze", [True, False])
def test_end_to_end_trains_the_context_block(freeze: bool) -> None:
    one, model = made(contexts="end_to_end", freeze_embedding=freeze)
    before = {name: p.clone() for name, p in model.named_parameters()}
    tokens = stream()
    ran = end_to_end.train(
        model,
        unrolled(model),
        lambda: evaluate(model, tokens[:60]),
        tokens,
        one,
        torch.Generator().manual_seed(0),
    )
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before) - ({"embedding"} if freeze else set())
    # What is reported is what the weights left behind give, contexts exact.
    assert evaluate(model, tokens[:60]).loss == pytest.approx(ran.validation.loss, abs=1e-6)
    sequential = contexts.evaluate(
        model.context_block, model.context_inputs(tokens[:60]), method="sequential"
    )
    literal = phase2.evaluate(phase2.Positions(model, sequential.values, tokens[:60]))
    assert literal.loss == pytest.approx(ran.validation.loss, abs=1e-5)


@pytest.mark.parametrize(("length", "batch", "unroll"), [(150, 32, 8), (97, 32, 8), (40, 1024, 8)])
def test_an_epoch_reads_every_token_once(length: int, batch: int, unroll: int) -> None:
    one, model = made(
        contexts="end_to_end", phase2_batch_size=batch, unroll=unroll, phase2_epochs=1
    )
    tokens = stream(length)
    read = unrolled(model)
    seen: list[Tensor] = []
    fresh: list[bool] = []

    def spy(inputs: TokenInputs, positions: Tensor, state: Any) -> Any:
        seen.append(positions)
        fresh.append(state is None)
        if seen[:-1] and state is not None:
            assert torch.equal(positions[:, 0], seen[-2][:, -1] + 1)  # lanes go on
        return read(inputs, positions, state)

    end_to_end.train(model, spy, lambda: evaluate(model, tokens), tokens, one, torch.Generator())
    everything = torch.cat([one.flatten() for one in seen]).tolist()
    lanes = len(seen[0])
    assert len(set(everything)) == len(everything)
    assert length - 1 - lanes < len(everything) <= length - 1
    assert max(everything) <= length - 2
    assert lanes * unroll <= max(batch, unroll)
    assert fresh == [True] + [False] * (len(seen) - 1)


def trained(
    one: Experiment,
    model: Any,
    tokens: Tensor,
    generator: torch.Generator,
    report: Callable[[dict[str, float]], None] = lambda row: None,
) -> phase2.Phase2:
    """End to end; what judges finds each epoch better than the one before, whatever the model."""
    read = model.read if isinstance(model, end_to_end.Peer) else unrolled(model)
    losses = itertools.count(-1, -1)

    def judge() -> phase2.Evaluation:
        nats = torch.full((3,), float(next(losses)), dtype=torch.float64)
        return phase2.Evaluation(nats, torch.ones(3, dtype=torch.bool))

    return end_to_end.train(model, read, judge, tokens, one, generator, report)


@pytest.mark.parametrize("tokens_seen", [1, 2])
def test_the_state_is_carried_as_a_plain_loop_carries_it(tokens_seen: int) -> None:
    """Two epochs in float64: lanes side by side, a state of zeros at an epoch's start, gradients
    only within `unroll` tokens, their norm clipped at 1."""
    fields = dict(num_input_tokens=tokens_seen, phase2_epochs=2, weight_decay=0.4)
    one, model = made(contexts="end_to_end", phase2_learning_rate=0.05, **fields)
    model, tokens, draw = model.double(), stream(151), torch.Generator().manual_seed(0)
    apart = copy.deepcopy(model)
    ran = trained(one, model, tokens, torch.Generator().manual_seed(0))
    learnt = [p for p in apart.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learnt, lr=0.05, weight_decay=0.4)
    lanes, steps, total = 32 // 8, 8, 150
    length, losses = total // lanes, []
    e = TokenInputs(tokens, apart.embedding, tokens_seen).dense()
    for _ in range(2):
        first = int(torch.randint(total - lanes * length + 1, (), generator=draw))
        state = [torch.zeros(1, 16, dtype=torch.float64)] * lanes
        summed = 0.0
        for start in range(0, length, steps):
            inside, nats = range(start, min(start + steps, length)), []
            for lane in range(lanes):
                context = state[lane].detach()
                for place in inside:
                    t = first + lane * length + place
                    outputs = apart.context_block(context, e[t : t + 1])
                    context = outputs[-1]
                    hidden = apart.token_block(outputs, e[t : t + 1])
                    nats.append(F.cross_entropy(hidden @ apart.embedding.T, tokens[t + 1 : t + 2]))
                state[lane] = context
            optimiser.zero_grad()
            torch.stack(nats).mean().backward()
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            optimiser.step()
            summed += float(torch.stack(nats).detach().sum())
        losses.append(summed / (lanes * length))
    assert [row["train_loss"] for row in ran.history] == pytest.approx(losses, rel=1e-6)
    for mine, theirs in zip(model.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


# Dropout

DROPPED: list[dict[str, Any]] = [{"contexts": "end_to_end"}, {"model": "lstm"}]


def unread(one: Experiment) -> Any:
    """The Experiment's model, the same each time."""
    if one.model == "cvfp":
        return build_cvfp(one, table())
    return end_to_end.peer(one, table(), 3000, seed=1)


@pytest.mark.parametrize("fields", DROPPED)
def test_without_dropout_nothing_is_drawn_for_it(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, tokens, mine = experiment(**fields), stream(), torch.Generator().manual_seed(0)
    model, inside = unread(one), list[Tensor]()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("torch was seeded"))
    before = torch.get_rng_state()
    trained(one, model, tokens, mine, lambda row: inside.append(torch.get_rng_state()))
    assert all(torch.equal(state, before) for state in inside)
    assert len(inside) == 2
    wanted = torch.Generator().manual_seed(0)
    for _ in inside:  # an epoch's first token, and no more
        torch.randint((T - 1) % (32 // 8) + 1, (), generator=wanted)
    assert torch.equal(mine.get_state(), wanted.get_state())


@pytest.mark.parametrize("fields", DROPPED)
def test_dropout_is_of_what_is_read_and_of_h(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = experiment(**fields, dropout=0.3, phase2_epochs=1)
    seen: list[tuple[int, ...]] = []
    drop = F.dropout

    def spy(values: Tensor, share: float) -> Tensor:
        made = drop(values, share)
        assert share == 0.3
        there = made != 0
        torch.testing.assert_close(made[there], values[there] / 0.7)
        if values.numel() > 400:
            assert 0.2 < 1 - there.sum() / (values != 0).sum() < 0.4
        seen.append(tuple(values.shape))
        return made

    monkeypatch.setattr(end_to_end.F, "dropout", spy)
    trained(one, unread(one), stream(), torch.Generator().manual_seed(0))
    # 4 lanes of 37 tokens, 8 at a time: 4 whole batches and one of 5 tokens.
    assert seen == [(4, 8, E), (32, E)] * 4 + [(4, 5, E), (20, E)]


@pytest.mark.parametrize("fields", DROPPED)
def test_dropout_is_drawn_by_the_runs_seed_alone(fields: dict[str, Any]) -> None:
    one, tokens = experiment(**fields), stream()

    def weights(share: float, seed: int = 0) -> list[Tensor]:
        model = unread(one)
        trained(one.replace(dropout=share), model, tokens, torch.Generator().manual_seed(seed))
        return [p.detach() for p in model.parameters()]

    def equal(these: list[Tensor], those: list[Tensor]) -> bool:
        return all(torch.equal(p, q) for p, q in zip(these, those, strict=True))

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = weights(0.3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)  # whatever else has drawn
    assert equal(weights(0.3), first)
    assert not equal(weights(0.3, seed=1), first)
    assert not equal(weights(0.0), first)
    assert not equal(weights(0.5), first)


def test_a_stream_too_short_to_unroll_is_named() -> None:
    one, model = made(contexts="end_to_end", unroll=64)
    tokens = stream(30)
    with pytest.raises(ParameterError, match="unroll: got 64"):
        end_to_end.train(
            model,
            unrolled(model),
            lambda: evaluate(model, tokens),
            tokens,
            one,
            torch.Generator(),
        )


# Peers


@pytest.mark.parametrize("model", PEERS)
@pytest.mark.parametrize(
    ("layers", "width", "dim"), [(3, 128, 128), (3, 64, 64), (6, 96, 128), (2, 128, 64)]
)
def test_peers_have_cvfps_size(model: Any, layers: int, width: int, dim: int) -> None:
    one = experiment(model=model, num_layers=layers, context_dim=width, embedding_dim=dim)
    size = cvfp_size(one, dim)
    plain = one.replace(model="cvfp")
    own = controls.parameter_counts(build_cvfp(plain, torch.zeros(V, dim)), plain)
    assert size == own["context_block"] + own["token_block"]
    peer = end_to_end.peer(one, torch.zeros(V, dim), size, seed=0)
    trained = sum(
        p.numel()
        for name, p in peer.named_parameters()
        if p.requires_grad and name not in ("embedding", "head.weight", "head.bias")
    )
    assert abs(trained / size - 1) <= 0.05
    assert controls.parameter_counts(peer, one) == {
        "body": trained,
        "embedding": V * dim,
        "head": 0,
    }


def lstm() -> LSTM:
    torch.manual_seed(0)
    return LSTM(table(), 12, 1, weight_tying=True, freeze_embedding=True)


def transformer(unroll: int = 8) -> Transformer:
    torch.manual_seed(0)
    return Transformer(table(), 20, unroll, weight_tying=True, freeze_embedding=True).eval()


def test_lstm_is_judged_as_a_step_by_step_loop_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "LONGEST", 16)
    model, tokens = lstm(), stream(60)
    cell = nn.LSTMCell(E, 12)
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            parameter.copy_(getattr(model.lstm, f"{name}_l0"))
    e = F.layer_norm(table(), (E,))[tokens]
    h = c = torch.zeros(1, 12)
    ours = model.evaluate(tokens, 1)
    for t in range(59):
        with torch.no_grad():
            h, c = cell(e[t : t + 1], (h, c))
            hidden = model.norm(e[t : t + 1] + model.out(h))
            wanted = F.cross_entropy(hidden @ table().T, tokens[t + 1 : t + 2])
        assert float(ours.nats[t]) == pytest.approx(float(wanted), abs=1e-5)


def test_transformer_is_judged_as_one_window_at_a_time_would() -> None:
    model, tokens = transformer(), stream(61)
    inputs = TokenInputs(tokens, model.embedding, 1)
    ours = model.evaluate(tokens, 1)
    assert len(ours.nats) == 60
    with torch.no_grad():
        for start in range(0, 60, 8):
            own = torch.arange(start, min(start + 8, 61))
            before = inputs.dense(torch.arange(max(0, start - 8), start))
            nothing = torch.zeros(8 - len(before), E)
            e = torch.cat([nothing, before, inputs.dense(own)])
            hidden = model.gpt2(inputs_embeds=e[None]).last_hidden_state[0, 8:]
            logits = hidden @ table().T
            for place, t in enumerate(own.tolist()):
                if t < 60:
                    wanted = F.cross_entropy(logits[place : place + 1], tokens[t + 1 : t + 2])
                    assert float(ours.nats[t]) == pytest.approx(float(wanted), abs=1e-4)


@pytest.mark.parametrize("make", [lstm, transformer])
def test_no_peer_sees_what_comes_later(make: Any) -> None:
    model, tokens = make(), stream(60)
    changed = tokens.clone()
    changed[30] = (changed[30] + 1) % V
    before, after = model.evaluate(tokens, 1).nats, model.evaluate(changed, 1).nats
    # Token 30 is predicted at 29, and read at 30.
    assert torch.equal(before[:29], after[:29])
    assert not torch.equal(before[30:], after[30:])


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("tying", [True, False])
@pytest.mark.parametrize("kind", PEERS)
def test_peers_learn_a_stream_that_can_be_learnt(kind: Any, tying: bool, freeze: bool) -> None:
    one = experiment(
        model=kind,
        weight_tying=tying,
        freeze_embedding=freeze,
        num_layers=3,
        context_dim=32,
        phase2_epochs=30,
        phase2_patience=30,
        phase2_learning_rate=0.01,
    )
    # What follows depends on the token before the last.
    tokens = torch.tensor([0, 1, 0, 2] * 60)
    model = end_to_end.peer(one, table(), 20_000, seed=1)
    ran = end_to_end.train(
        model,
        model.read,
        lambda: model.evaluate(tokens[:80], 1),
        tokens,
        one,
        torch.Generator().manual_seed(0),
    )
    assert ran.validation.nats[8:].mean() < 0.1
    moved = not torch.equal(model.embedding, table())
    assert moved == (not freeze)


def test_what_no_model_can_be_is_named() -> None:
    with pytest.raises(ParameterError, match="contexts: got 'zero'; accepted: 'trained'"):
        experiment(model="lstm", contexts="zero")
    with pytest.raises(ParameterError, match="num_input_tokens: got 2"):
        experiment(model="transformer", num_input_tokens=2)
    one = experiment(model="transformer", embedding_dim=18)
    with pytest.raises(ParameterError, match="embedding_dim: got 18; accepted: a multiple of 4"):
        end_to_end.peer(one, torch.zeros(V, 18), 10_000, 0)
    with pytest.raises(ParameterError, match="model: got 'transformer'; accepted: a model of"):
        end_to_end.peer(experiment(model="transformer"), table(), 100, 0)


# As runs


@pytest.mark.parametrize("kind", CONTROLS)
def test_a_control_runs_is_stored_and_loaded(tiny: Experiment, kind: Any) -> None:
    one = tiny.replace(contexts=kind, unroll=8)
    ran, kept = cvfp.run(one, reuse=False), cvfp.run(one)
    assert kept.from_store
    assert kept == ran
    assert ran.val_ppl is not None
    has_contexts = kind in ("random", "shuffled", "end_to_end")
    assert (ran.val_er is not None) == has_contexts
    assert (ran.context_sweeps is not None) == has_contexts
    assert (ran.phase1_iterations is not None) == (kind == "shuffled")
    ours, theirs = ran.model(), kept.model()
    for name, weights in ours.state_dict().items():
        assert torch.equal(weights, theirs.state_dict()[name])
    assert isinstance(theirs, CVFP)
    if kind in ("random", "end_to_end"):
        assert cvfp.generate(theirs, "hello", 3)
    else:
        with pytest.raises(ValueError, match="contexts: got a control"):
            cvfp.generate(theirs, "hello", 3)
        if not has_contexts:
            with pytest.raises(ParameterError, match="a run that has contexts"):
                _ = ran.ranks


def test_random_contexts_are_those_of_the_block_as_it_was_made(tiny: Experiment) -> None:
    ran = cvfp.run(tiny.replace(contexts="random"))
    data = cvfp.data.load(tiny)
    untrained = build(tiny, ran.model().embedding.detach(), data.tokenizer)
    for mine, theirs in zip(
        ran.model().context_block.parameters(), untrained.context_block.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_shuffled_contexts_share_phase_1_with_trained_ones(tiny: Experiment, home: Path) -> None:
    cvfp.run(tiny)
    shuffled = cvfp.run(tiny.replace(contexts="shuffled"))
    assert not shuffled.from_store
    assert shuffled.phase1_from_store


@pytest.mark.parametrize("kind", PEERS)
def test_a_peer_runs_is_stored_and_loaded(kind: Any) -> None:
    one = tiny_experiment(model=kind, unroll=8, num_layers=3, context_dim=32, embedding_dim=32)
    ran, kept = cvfp.run(one, reuse=False), cvfp.run(one)
    assert kept.from_store
    assert kept == ran
    assert ran.val_er is None
    assert set(ran.parameters) == {"body", "embedding", "head"}
    data = cvfp.data.load(one)
    model = kept.model()
    assert isinstance(model, end_to_end.Peer)
    again = model.evaluate(data.validation.tokens, 1)
    assert again.loss == pytest.approx(
        sum(r["nats"] for r in ran.val_conversations) / len(again.nats)
    )


def test_losses_by_bin_add_up(tiny: Experiment) -> None:
    ran = cvfp.run(tiny)
    data = cvfp.data.load(tiny)
    for column in ("tokens", "nats", "correct"):
        whole = sum(row[column] for row in ran.val_conversations)
        for bins in (ran.val_positions, ran.val_frequencies):
            assert sum(row[column] for row in bins) == pytest.approx(whole)
    counts = torch.bincount(data.train.tokens, minlength=data.vocab_size)
    target = data.validation.tokens[1:]
    tokens = {row["low"]: row["tokens"] for row in ran.val_frequencies}
    for low in (0, 1, 10, 100, 1000):
        high = 10 * low or 1
        inside = int(((counts[target] >= low) & (counts[target] < high)).sum())
        assert tokens.get(low, 0) == inside
    assert len(tokens) > 2
    # All conversations but the first have their first token predicted, by the one before.
    tokens = {row["low"]: row["tokens"] for row in ran.val_positions}
    ends = [*data.validation.starts[1:].tolist(), len(data.validation)]
    lengths = [
        end - start for start, end in zip(data.validation.starts.tolist(), ends, strict=True)
    ]
    assert tokens[0] == sum(min(4, length) for length in lengths) - 1
    for low in (4, 8, 16, 32):
        inside = sum(max(0, min(2 * low, length) - low) for length in lengths)
        assert tokens.get(low, 0) == inside


def test_a_sweep_names_a_peer_that_cannot_be_built_before_it_starts(
    tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["cvfp.sweep"], "_run_one", lambda *_: pytest.fail("it started"))
    with pytest.raises(ParameterError, match="model: got 'transformer'; accepted: a model of"):
        cvfp.sweep(tiny, model=["cvfp", "transformer"])
