"""Parts that question `remember` or go beyond it, and what measures and compares them, against
loops and NumPy."""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import literal
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WriteJsonl, tiny_experiment
from synthetic import judged, made
from test_phases import SMALL
from torch import Tensor

import cvfp
from cvfp import (
    Experiment,
    ParameterError,
    Result,
    abort,
    build,
    cache,
    checkpoint,
    contexts,
    corpora,
    data,
    gap,
    objectives,
    phase1,
    phase2,
    registry,
    seeds,
    tuning,
    variants,
)
from cvfp.analysis import comparison, plots, readings, tables
from cvfp.config import PRESETS
from cvfp.corpora import Corpus
from cvfp.inputs import TokenInputs
from cvfp.model import CVFP, Block

D, E, V = 8, 6, 40


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tokens_of(total: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (total,), generator=torch.Generator().manual_seed(seed))


def block_of(name: str, **fields: Any) -> Any:
    """An initialised block of width D over e of width E."""
    one = Experiment(**{**SMALL, "context_dim": D, "block": name, **fields})
    block = registry.resolve("block", name)(one, E)
    block.initialise(torch.Generator().manual_seed(3))
    return block


def np_layer_norm(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)


# Leaky blocks


def times_of(longest: float, width: int = D) -> list[float]:
    """A quarter of a token to `longest`, each so many times the one before."""
    return [0.25 * (longest / 0.25) ** (i / (width - 1)) for i in range(width)]


def leaky_loop(block: Block, e: Tensor, longest: float) -> Tensor:
    """c <- k·c + √(1 − k²)·f(c, e), token by token and dimension by dimension."""
    w, c, rows = literal.weights(block), [0.0] * D, []
    keep = [math.exp(-1 / time) for time in times_of(longest)]
    for row in e:
        new = literal.context_block(w, torch.tensor([c], dtype=torch.float64), row[None])[-1][0]
        c = [k * a + math.sqrt(1 - k * k) * float(b) for k, a, b in zip(keep, c, new, strict=True)]
        rows.append(c)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("name", ["leaky", "leaky_learnt"])
def test_a_leaky_block_is_the_plain_loop(name: str, every: bool) -> None:
    block = block_of(name, leak_tokens=5.0, token_input_all_layers=every)
    inputs = TokenInputs(tokens_of(60), drawn(V, E), 1)
    wanted = leaky_loop(block, literal.layer_norm(drawn(V, E))[inputs.tokens], 5.0)
    values = contexts.evaluate(block.double(), inputs, method="sequential").values
    torch.testing.assert_close(values, wanted, rtol=0, atol=1e-5)  # its shares are of float32


@pytest.mark.parametrize("longest", [0.5, 16.0, 256.0])
def test_shares_go_from_a_quarter_of_a_token_to_the_longest(longest: float) -> None:
    keep = block_of("leaky", leak_tokens=longest).logit.double().sigmoid()
    times = (-1 / keep.log()).tolist()
    assert times == pytest.approx(times_of(longest), rel=1e-4)
    assert (times[0], times[-1]) == pytest.approx((0.25, longest), rel=1e-4)


def test_a_fixed_share_is_no_parameter_and_a_learnt_one_is() -> None:
    fixed, learnt = block_of("leaky"), block_of("leaky_learnt")
    names = [{name for name, _ in one.named_parameters()} for one in (fixed, learnt)]
    assert names[1] - names[0] == {"logit"}
    assert "logit" in fixed.state_dict()  # stored with the model
    assert torch.equal(fixed.logit, learnt.logit.detach())


@pytest.mark.parametrize("longest", [4.0, 16.0])
def test_blocks_of_a_leaky_recurrence_equal_the_loop(longest: float) -> None:
    block = block_of("leaky", leak_tokens=longest)
    inputs = TokenInputs(tokens_of(400), drawn(V, E).float(), 1)
    made, loop = (
        contexts.evaluate(block, inputs, method=method, block_length=50 if method else None)
        for method in ("blocks", "sequential")
    )
    assert made.converged
    assert made.sweeps > 2  # one from zeros, and what the leak carries over
    error = (made.values - loop.values).norm(dim=1) / loop.values.norm(dim=1)
    assert float(error.max()) < 1e-5


def test_leaky_blocks_draw_the_weights_of_the_published_one_and_leave_their_shares() -> None:
    ends = []
    for name in ("published", "leaky", "leaky_learnt"):
        block, generator = block_of(name), torch.Generator().manual_seed(5)
        shares = getattr(block, "logit", None)
        before = None if shares is None else shares.detach().clone()
        block.initialise(generator)
        assert getattr(block, "logit", None) is shares  # what an optimiser would have
        assert before is None or torch.equal(block.logit.detach(), before)
        weights = literal.weights(block)
        weights.pop("logit", None)
        ends.append((weights, torch.randn(1, generator=generator)))
    for weights, following in ends[1:]:
        assert list(weights) == list(ends[0][0])
        assert all(torch.equal(weights[name], ends[0][0][name]) for name in weights)
        assert following == ends[0][1]  # nothing else was drawn


@pytest.mark.parametrize("name", ["leaky", "leaky_learnt"])
def test_phase1_moves_the_shares_that_are_learnt(name: str) -> None:
    one = Experiment(**SMALL | dict(context_dim=D, phase1_max_iterations=4, objective="remember"))
    block = block_of(name)
    before = copy.deepcopy(block.state_dict())
    inputs = TokenInputs(tokens_of(100), drawn(V, E).float(), 1)
    phase1.train(block, inputs, one, torch.Generator().manual_seed(5))
    assert not torch.equal(block.linears[0].weight, before["linears.0.weight"])
    moved = (block.logit.detach() - before["logit"]).abs()
    assert bool((moved > 1e-4).all() if name == "leaky_learnt" else (moved == 0).all())


# Orthogonal weights


@pytest.mark.parametrize("std", [0.1, 0.3])
def test_orthogonal_weights_have_equal_singular_values(std: float) -> None:
    fields: dict[str, Any] = dict(num_layers=3, context_std=std, input_std=0.2)
    block, plain = block_of("orthogonal", **fields), block_of("published", **fields)
    for ours, theirs in zip(block.linears, plain.linears, strict=True):
        values = torch.linalg.svdvals(ours.weight[:, :D].detach())
        assert values.tolist() == pytest.approx([std * math.sqrt(D)] * D, rel=1e-5)
        assert torch.equal(ours.weight[:, D:], theirs.weight[:, D:])
        assert torch.equal(ours.bias, theirs.bias)
    first, second, _ = (one.weight[:, :D] for one in block.linears)
    assert not torch.allclose(first, second)


def test_orthogonal_weights_of_the_equal_decrease_design() -> None:
    fields: dict[str, Any] = dict(num_layers=3, token_input_all_layers=False)
    block, plain = block_of("orthogonal", **fields), block_of("published", **fields)
    reads = [D, *block.widths[:-1]]
    for read, width, ours, theirs in zip(
        reads, block.widths, block.linears, plain.linears, strict=True
    ):
        values = torch.linalg.svdvals(ours.weight[:, :read].detach())
        gain = 0.1 * math.sqrt(max(read, width))
        assert values.tolist() == pytest.approx([gain] * min(read, width), rel=1e-5)
        assert torch.equal(ours.weight[:, read:], theirs.weight[:, read:])
    inputs = TokenInputs(tokens_of(50), drawn(V, E).float(), 1)
    assert contexts.evaluate(block, inputs).values.isfinite().all()


# Delay lines


def delay_model(name: str, **fields: Any) -> tuple[Experiment, CVFP, Callable[[Tensor], Tensor]]:
    given = {**SMALL, "context_dim": D, "embedding_dim": E, "contexts": name, "window_tokens": 3}
    one = Experiment(**{**given, **fields})
    model = build.build_cvfp(one, drawn(V, E).float())
    source = registry.resolve("contexts", name)
    return one, model, lambda tokens: source(model, tokens, one)


def windows(tokens: Tensor, count: int, table: np.ndarray) -> np.ndarray:
    """The last `count` embeddings at each position, oldest first, zeros before the start."""
    rows = np_layer_norm(table)
    made = []
    for t in range(len(tokens)):
        places = range(t - count + 1, t + 1)
        made.append(np.concatenate([rows[tokens[s]] if s >= 0 else 0 * rows[0] for s in places]))
    return np.array(made)


def components(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean, and the first principal components as columns."""
    mean = rows.mean(axis=0)
    return mean, np.linalg.svd(rows - mean, full_matrices=False)[2][:count].T


def signs(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Of columns that are the same up to these."""
    return np.sign((ours * theirs).sum(axis=0))


def test_delay_line_is_pca_of_training_applied_to_validation() -> None:
    _, model, source = delay_model("delay_pca")
    train, validation = tokens_of(500), tokens_of(200, seed=1)
    made = source(train), source(validation)
    table = model.embedding.detach().double().numpy()
    mean, axes = components(windows(train, 3, table), D)
    found = model.delay_line[1].double().numpy()
    assert found @ found.T == pytest.approx(axes @ axes.T, abs=1e-4)
    axes = axes * signs(axes, found)
    for tokens, values in zip((train, validation), made, strict=True):
        wanted = np_layer_norm((windows(tokens, 3, table) - mean) @ axes)
        assert values.numpy() == pytest.approx(wanted, abs=1e-3)
        assert values.mean(dim=1).abs().max() < 1e-5
        assert values.var(dim=1, unbiased=False).numpy() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["delay_pca", "delay_random"])
def test_nothing_of_validation_reaches_a_delay_lines_axes(name: str) -> None:
    _, _, source = delay_model(name)
    train, validation = tokens_of(500), tokens_of(200, seed=1)
    before, here = source(train), source(validation)
    assert torch.equal(source(validation[:90]), here[:90])  # nor does what comes later
    assert torch.equal(source(train), before)


def test_random_delay_line_is_its_axes() -> None:
    one, model, source = delay_model("delay_random")
    train, validation = tokens_of(500), tokens_of(200, seed=1)
    source(train)
    mean, axes = (part.double().numpy() for part in model.delay_line)
    wanted = torch.empty(3 * E, D).normal_(generator=seeds.generator(one.seed, "context_block"))
    assert axes == pytest.approx(wanted.numpy())
    table = model.embedding.detach().double().numpy()
    assert mean == pytest.approx(windows(train, 3, table).mean(axis=0), abs=1e-5)
    rows = (windows(validation, 3, table) - mean) @ axes
    assert source(validation).numpy() == pytest.approx(np_layer_norm(rows), abs=1e-4)
    other = delay_model("delay_random", seed=1)
    other[2](train)
    assert not torch.allclose(other[1].delay_line[1], model.delay_line[1])


def test_a_short_delay_line_is_padded_with_zeros() -> None:
    _, model, source = delay_model("delay_pca", window_tokens=1)
    train = tokens_of(300)
    values = source(train)
    table = model.embedding.detach().double().numpy()
    mean, axes = components(windows(train, 1, table), E)
    axes = axes * signs(axes, model.delay_line[1].double().numpy())
    # The last direction of LayerNorm'ed rows has no variance, and no sign.
    rows = ((windows(train, 1, table) - mean) @ axes)[:, : E - 1]
    wanted = np_layer_norm(np.pad(rows, ((0, 0), (0, D - E + 1))))
    assert values.shape == (300, D)
    assert values.numpy() == pytest.approx(wanted, abs=1e-3)


def test_principal_components_are_of_every_nth_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "SAMPLE", 100)
    _, model, source = delay_model("delay_pca")
    train = tokens_of(500)
    source(train)
    table = model.embedding.detach().double().numpy()
    mean, axes = components(windows(train, 3, table)[::5], D)
    found = model.delay_line[1].double().numpy()
    assert model.delay_line[0].numpy() == pytest.approx(mean, abs=1e-5)
    assert found @ found.T == pytest.approx(axes @ axes.T, abs=1e-4)


@pytest.fixture(scope="module")
def delayed() -> Result:
    return cvfp.run(tiny_experiment(contexts="delay_pca", window_tokens=2, phase2_epochs=1))


def test_a_run_takes_the_axes_of_training(delayed: Result) -> None:
    model: Any = delayed.model()
    train = data.load(delayed.experiment).train.tokens
    rows = windows(train, 2, model.embedding.detach().double().numpy())
    mean, axes = components(rows, 16)
    found = model.delay_line[1].double().numpy()
    assert model.delay_line[0].numpy() == pytest.approx(mean, abs=1e-5)
    assert found @ found.T == pytest.approx(axes @ axes.T, abs=1e-3)


# Targets that mean nothing


def target_of(name: str, tokens: Tensor, lag: int, size: int = V) -> tuple[Tensor, Tensor]:
    """An objective's targets [T, E] of a stream, and the normalised table."""
    inputs = TokenInputs(tokens, drawn(size, E), 1)
    one = Experiment(**SMALL, objective=name, objective_lags=f"{lag}")
    batch = objectives.Batch(one, inputs, torch.arange(len(tokens))[None])
    objective: Any = registry.resolve("objective", name)(one, D, E)
    return objective.target(batch, lag)[0], inputs.table[:-1]


def rows_of(targets: Tensor, table: Tensor) -> Tensor:
    """Which row of the table each target is."""
    same = (targets[:, None] == table).all(dim=2)
    assert (same.sum(dim=1) == 1).all()
    return same.int().argmax(dim=1)


@pytest.mark.parametrize("size", [V, 401])
def test_permuted_targets_are_another_row_for_every_token(size: int) -> None:
    rows = rows_of(*target_of("remember_permuted", torch.arange(size), 0, size))
    assert sorted(rows.tolist()) == list(range(size))
    assert float((rows == torch.arange(size)).double().mean()) < 0.1
    tokens = torch.randint(size, (300,), generator=torch.Generator().manual_seed(1))
    targets, table = target_of("remember_permuted", tokens, 3, size)
    assert not targets[:3].any()  # beyond the stream
    assert torch.equal(rows_of(targets[3:], table), rows[tokens[:-3]])  # the token's, wherever


@pytest.mark.parametrize("total", [64, 97, 500])
def test_targets_elsewhere_are_of_other_positions(total: int) -> None:
    """Every token of the stream is another, so that a target tells its position."""
    for lag in (0, 1):
        places = rows_of(*target_of("remember_elsewhere", torch.arange(total), lag, total))
        assert sorted(places.tolist()) == list(range(total))
        back = torch.arange(total) - places
        assert int((back == 0).sum()) <= 1
        assert int(((back >= 0) & (back < 8)).sum()) <= 0.1 * total + 8
        assert len(set(back.tolist())) > total // 4  # no shift


@pytest.mark.parametrize("name", ["remember_permuted", "remember_elsewhere"])
def test_targets_that_mean_nothing_have_the_loss_of_remember(name: str) -> None:
    tokens, new = tokens_of(60), drawn(1, 60, D)
    one = Experiment(**SMALL, objective=name, objective_lags="0,2")
    batch = objectives.Batch(one, TokenInputs(tokens, drawn(V, E), 1), torch.arange(60)[None])
    objective = registry.resolve("objective", name)(one, D, E).double()
    losses, figures = objective(new, new, batch)
    errors = [
        ((linear(new[0]) - target_of(name, tokens, lag)[0]) ** 2).mean().item()
        for lag, linear in zip((0, 2), objective.maps, strict=True)
    ]
    assert [float(figures[f"lag_{lag}"].detach()) for lag in (0, 2)] == pytest.approx(errors)
    assert float(losses.detach()) == pytest.approx(sum(errors) / 2)


# Weighted lags


def test_weighted_lags_are_a_weighted_mean() -> None:
    new = drawn(2, 30, D)
    inputs, positions = TokenInputs(tokens_of(60), drawn(V, E), 1), torch.arange(60).view(2, 30)
    told: dict[str, Tensor] = {}
    for lags in ("0:1,4:0.5", "0,4", "0:3,4:3", "0,4:0.5"):
        one = Experiment(**SMALL, objective_lags=lags)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of the maps
            objective = objectives.Remember(one, D, E).double()
        told[lags], figures = objective(new, new, objectives.Batch(one, inputs, positions))
        errors = figures["lag_0"], figures["lag_4"]
    torch.testing.assert_close(told["0:1,4:0.5"], (errors[0] + 0.5 * errors[1]) / 1.5)
    torch.testing.assert_close(told["0,4"], (errors[0] + errors[1]) / 2)
    torch.testing.assert_close(told["0:3,4:3"], told["0,4"])
    torch.testing.assert_close(told["0,4:0.5"], told["0:1,4:0.5"])
    assert Experiment(objective_lags=" 0:1, 4:0.5").lags == {0: 1.0, 4: 0.5}


WRONG = "0:1,0:2 0,0:1 -1:1 0,-1 0:0 0,1:0 0:-1 0:nan 0:1,1:nan 0:inf 0:1,1:inf 0: 0,1: :1 a:1 "
WRONG += "0:b 0:1:2 0:1, 0.5:1 0:1;1:2 0:1e308,1:1e308"


@pytest.mark.parametrize("lags", WRONG.split())
def test_lags_and_weights_that_cannot_be_are_refused(lags: str) -> None:
    with pytest.raises(ParameterError, match=r"objective_lags: got .*weights above 0"):
        Experiment(objective_lags=lags)


# Text that only Phase 1 reads


def test_unlabelled_text_is_what_follows_training(tiny: Experiment) -> None:
    plain, more, larger = (
        data.load(tiny.replace(**fields))
        for fields in ({}, {"unlabelled_samples": 4}, {"samples": 10})
    )
    assert torch.equal(more.train.tokens, plain.train.tokens)
    assert torch.equal(torch.cat([more.train.tokens, more.unlabelled.tokens]), larger.train.tokens)
    assert (len(plain.unlabelled), len(more.unlabelled.starts)) == (0, 4)
    assert torch.equal(more.validation.tokens, plain.validation.tokens)
    assert torch.equal(more.fitting.tokens, plain.fitting.tokens)
    assert more.sizes == plain.sizes
    fingerprints = {one.fingerprint for one in (plain, more, larger)}
    assert len(fingerprints) == 3
    said = [plain.train, plain.validation, plain.fitting]  # as before there was any
    parts = [part for one in said for part in (one.tokens, one.starts)]
    digest = cache.digest(plain.tokenizer.fingerprint, *parts, plain.validation.text_bytes)
    assert plain.fingerprint == digest


def test_unlabelled_text_is_not_taken_for_text_that_chooses(
    tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last conversations of an embedded corpus may be either."""
    whole = corpora.load_corpus(tiny.replace(samples=10)).train

    def load(one: Experiment) -> Corpus:
        choosing = one.development_samples if one.selection == "development" else 0
        development = whole[len(whole) - choosing :]
        return Corpus(whole[: one.samples], whole[:2], whole[:60], development)

    monkeypatch.setattr(data, "load_corpus", load)
    made = [
        data._load.__wrapped__(tiny.replace(samples=6, **fields), cache.home(), (), "")
        for fields in (
            {"unlabelled_samples": 4},
            {"selection": "development", "development_samples": 4},
        )
    ]
    assert torch.equal(made[0].unlabelled.tokens, made[1].development.tokens)
    assert made[0].fingerprint != made[1].fingerprint


@pytest.mark.parametrize("kind", ["parallel", "exact"])
def test_phase1_reads_both_and_phase2_the_first_alone(
    tiny: Experiment, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tiny.replace(unlabelled_samples=4, training_contexts=kind, phase2_epochs=1, seed=11)
    streams = data.load(one)
    read: list[Tensor] = []
    left: list[phase1.Phase1] = []
    second: list[phase2.Positions] = []
    first_train, second_train = phase1.train, phase2.train

    def first(block: Block, inputs: TokenInputs, *rest: Any) -> phase1.Phase1:
        read.append(inputs.tokens)
        left.append(first_train(block, inputs, *rest))
        return left[-1]

    def then(train: phase2.Positions, *rest: Any) -> phase2.Phase2:
        second.append(train)
        return second_train(train, *rest)

    monkeypatch.setattr(phase1, "train", first)
    monkeypatch.setattr(phase2, "train", then)
    result = cvfp.run(one, reuse=False)
    whole = torch.cat([streams.train.tokens, streams.unlabelled.tokens])
    count = len(streams.train)
    assert torch.equal(read[0], whole)
    assert torch.equal(second[0].tokens, streams.train.tokens)
    assert second[0].contexts.shape == (count, one.context_dim)
    if kind == "parallel":
        assert torch.equal(second[0].contexts, left[0].contexts[:count])
    assert result.train_tokens == count
    # Phase 1 from the store is cut as well.
    again = cvfp.run(one.replace(phase2_learning_rate=0.002))
    assert again.phase1_from_store
    assert torch.equal(second[-1].contexts, second[0].contexts)


def test_unlabelled_text_is_refused_by_name(tiny: Experiment) -> None:
    with pytest.raises(ParameterError, match=r"unlabelled_samples: got 4; accepted: 0 .*'tail'"):
        data.load(tiny.replace(unlabelled_samples=4, validation="tail"))
    words = r"unlabelled_samples: got 5000; accepted: fewer \(6 \+ 5000 samples; at most 2999"
    with pytest.raises(ParameterError, match=words):
        data.load(tiny.replace(unlabelled_samples=5000))
    with pytest.raises(ParameterError, match=r"^samples: got 5000"):
        data.load(tiny.replace(samples=5000))
    with pytest.raises(ParameterError, match="unlabelled_samples: got -1"):
        tiny.replace(unlabelled_samples=-1)


def test_unlabelled_text_of_a_local_file(write_jsonl: WriteJsonl, tiny: Experiment) -> None:
    texts = [f"{one:b} in twos, {one:o} in eights, is number {one}" for one in range(40)]
    rows = texts.copy()
    rows[10:10] = ["", texts[1]]  # no text, and a copy of what is held out
    fields: dict[str, Any] = dict(dataset=write_jsonl(*rows), validation_samples=2)
    one = tiny.replace(**fields, fitting_samples=12, vocab_size=270, samples=4)
    both = one.replace(unlabelled_samples=6)
    corpus = data._corpus(both)
    assert corpus.validation == texts[:2]
    assert corpus.fitting == texts[2:14]
    assert corpus.train == texts[14:18]
    assert corpus.unlabelled == texts[18:24]
    assert corpus.development == []
    plain, more = data.load(one), data.load(both)
    assert (plain.skipped, plain.copies) == (more.skipped, more.copies) == (1, 1)
    assert torch.equal(plain.train.tokens, more.train.tokens)
    assert len(more.unlabelled.starts) == 6
    with pytest.raises(ParameterError, match=r"unlabelled_samples: got 23; .*at most 26 with"):
        data.load(one.replace(unlabelled_samples=23))
    assert len(data.load(one.replace(unlabelled_samples=22)).unlabelled.starts) == 22


# End to end after Phase 1


@pytest.fixture(scope="module")
def three() -> dict[str, Result]:
    """The same Experiment with three kinds of contexts."""
    one = tiny_experiment(objective="remember", phase2_learning_rate=0.01)
    return {
        kind: cvfp.run(one.replace(contexts=kind))
        for kind in ("trained", "end_to_end", "fine_tuned")
    }


def weights_of(result: Result) -> dict[str, Tensor]:
    model: Any = result.model()
    return literal.weights(model.context_block)


def test_fine_tuning_goes_on_from_phase1(three: dict[str, Result]) -> None:
    first, both = three["trained"], three["fine_tuned"]
    assert both.phase1_history == first.phase1_history != []
    assert both.phase1_from_store  # the other kind's, which is the same
    assert both.phase1_iterations == first.phase1_iterations == 6
    assert (both.converged, both.aborted) == (first.converged, None)
    assert three["end_to_end"].phase1_history == []
    assert len(both.phase2_history) == 2
    assert len({one.val_ppl for one in three.values()}) == 3
    assert None not in (both.contraction_rate, both.context_sweeps, both.val_er)
    ends = {kind: weights_of(one) for kind, one in three.items()}
    for kind in ("trained", "end_to_end"):
        apart = [float((ends["fine_tuned"][n] - ends[kind][n]).abs().max()) for n in ends[kind]]
        assert min(apart) > 1e-3, kind  # every weight has moved on


def test_fine_tuning_begins_with_phase1s_weights(three: dict[str, Result]) -> None:
    slow = dict(phase2_learning_rate=1e-7, phase2_epochs=1)
    moved = weights_of(cvfp.run(three["fine_tuned"].experiment.replace(**slow), reuse=False))
    wanted = weights_of(three["trained"])
    for name in wanted:
        torch.testing.assert_close(moved[name], wanted[name], rtol=0, atol=1e-5)
    assert not all(torch.equal(moved[name], wanted[name]) for name in wanted)


def test_a_fine_tuned_model_generates(three: dict[str, Result]) -> None:
    model: Any = three["fine_tuned"].model()
    assert model.generates
    text = cvfp.generate(model, "hello", 5, temperature=0.0)
    assert text.startswith("hello")
    assert len(text) > len("hello")


def test_a_stopped_fine_tuning_goes_on(three: dict[str, Result]) -> None:
    one = three["fine_tuned"].experiment.replace(seed=5)
    phases: list[int] = []
    whole = cvfp.run(one, watch=lambda row: phases.append(int(row["phase"])))
    assert phases == [1] * 5 + [2] * 2  # Phase 1 first
    home = cache.home()
    cache.delete(home / "runs" / f"{whole.key}.json")
    with pytest.warns(RuntimeWarning, match="stopped before its end"):
        stopped = cvfp.run(one, watch=lambda row: row["phase"] == 2)
    assert stopped.partial
    assert len(stopped.phase2_history) == 1
    assert checkpoint.path_of(whole.key).exists()
    again = cvfp.run(one)
    assert not again.from_store
    assert again.val_ppl == whole.val_ppl
    assert again.phase2_history == whole.phase2_history


def test_fine_tuning_stopped_in_phase1_has_no_phase2(three: dict[str, Result]) -> None:
    one = three["fine_tuned"].experiment.replace(seed=6)
    with pytest.warns(RuntimeWarning, match="stopped before its end"):
        stopped = cvfp.run(one, watch=lambda row: row["iteration"] == 3)
    assert stopped.partial
    assert [row["iteration"] for row in stopped.phase1_history] == [2, 3]
    nothing = (stopped.val_ppl, stopped.best_epoch, stopped.phase2_history, stopped.val_er)
    assert nothing == (None, None, [], None)
    again = cvfp.run(one)
    assert not again.partial
    assert again.phase1_iterations == 6
    assert again.val_ppl is not None


def test_fine_tuning_is_given_up_in_phase1(
    three: dict[str, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(abort, "ITERATION", 4)
    monkeypatch.setattr(abort, "SINCE", 3)
    monkeypatch.setattr(abort, "RANK", 1.1)  # that no contexts have
    one = three["fine_tuned"].experiment.replace(seed=8, phase1_abort=True)
    given_up = cvfp.run(one)
    assert "effective rank" in str(given_up.aborted)
    assert given_up.phase1_iterations == 4
    nothing = (given_up.val_ppl, given_up.best_epoch, given_up.phase2_history)
    assert nothing == (None, None, [])
    assert not given_up.partial


# Steps of exact evaluation


class Counted(torch.nn.Module):
    """A block that counts how often it is applied."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block, self.context_dim, self.calls = block, block.context_dim, 0

    def forward(self, context: Tensor, inputs: Tensor) -> list[Tensor]:
        self.calls += 1
        return self.block(context, inputs)


WAYS: list[dict[str, Any]] = [
    dict(method="sequential"),
    dict(method="blocks"),
    *(dict(method="blocks", block_length=length) for length in (7, 40, 500)),
    dict(method="blocks", block_length=40, max_sweeps=2),
]


@pytest.mark.parametrize("way", WAYS)
def test_steps_are_the_times_that_the_block_is_applied(way: dict[str, Any]) -> None:
    inputs = TokenInputs(tokens_of(210), drawn(V, E).float(), 1)
    block: Any = Counted(block_of("leaky"))
    made = contexts.evaluate(block, inputs, **way)
    assert made.steps == block.calls
    if way["method"] == "sequential" or way.get("block_length") == 500:
        assert made.steps == 210
    elif way.get("block_length") == 40:
        assert made.steps == 32 + 40 * (made.sweeps - 1)  # the first sweep is a warm-up


def test_a_run_says_its_steps(three: dict[str, Result]) -> None:
    for result in three.values():
        model: Any = result.model()
        block: Any = Counted(model.context_block)
        stream = data.load(result.experiment).validation.tokens
        exact = contexts.evaluate(block, model.context_inputs(stream))
        assert result.context_steps == block.calls > 0
        assert result.context_sweeps == exact.sweeps
    assert cvfp.run(tiny_experiment(contexts="zero", phase2_epochs=1)).context_steps is None


# Losses by bigrams


def test_losses_by_bigrams_are_a_plain_count(three: dict[str, Result]) -> None:
    result = three["trained"]
    streams, model = data.load(result.experiment), three["trained"].model()
    assert isinstance(model, CVFP)
    train, validation = (one.tokens.tolist() for one in (streams.train, streams.validation))
    seen = collections.Counter(itertools.pairwise(train))
    exact = cvfp.experiment.exact_contexts(
        model.context_block, model.context_inputs(streams.validation.tokens)
    )
    told = phase2.evaluate(phase2.Positions(model, exact.values, streams.validation.tokens))
    wanted: dict[int, list[float]] = {}
    for place, pair in enumerate(itertools.pairwise(validation)):
        count = seen[pair]
        low = 0 if count == 0 else 10 ** (len(str(count)) - 1)
        row = wanted.setdefault(low, [0.0, 0.0, 0.0])
        figures = 1.0, float(told.nats[place]), float(told.correct[place])
        wanted[low] = [a + b for a, b in zip(row, figures, strict=True)]
    assert sorted(wanted) == [0, 1, 10]
    found = {row["low"]: row for row in result.val_bigrams}
    assert list(found) == sorted(wanted)
    for low, row in wanted.items():
        assert [found[low][n] for n in ("tokens", "nats", "correct")] == pytest.approx(row)
    for name in ("tokens", "nats", "correct"):
        total = sum(row[name] for row in result.val_conversations)
        assert sum(row[name] for row in result.val_bigrams) == pytest.approx(total)


# What contexts hold


def embedding_back(tokens: Tensor, model: CVFP, lag: int) -> Tensor:
    return model.context_inputs(tokens.roll(lag)).dense()


def current(model: CVFP, tokens: Tensor, experiment: Experiment) -> Tensor:
    return embedding_back(tokens, model, 0)


def before(model: CVFP, tokens: Tensor, experiment: Experiment) -> Tensor:
    return embedding_back(tokens, model, 1)


def following(model: CVFP, tokens: Tensor, experiment: Experiment) -> Tensor:
    return embedding_back(tokens, model, -1)


def mixed(model: CVFP, tokens: Tensor, experiment: Experiment) -> Tensor:
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    return embedding_back(tokens, model, 0)[order]


def untrained(tiny: Experiment, contexts: str) -> Result:
    """A Result of that kind with an untrained model."""
    one = tiny.replace(contexts=contexts).resolved()
    prepared, table = cvfp.experiment.prepare(one)
    return made(experiment=one, _model=build.build(one, table.weight, prepared.tokenizer))


@pytest.mark.parametrize(("name", "lag"), [("current", 0), ("before", 1), ("following", -1)])
def test_contexts_that_are_an_embedding_recall_it_and_no_other(
    tiny: Experiment, name: str, lag: int
) -> None:
    table = gap.recall(untrained(tiny, f"{__name__}:{name}"), (-1, 0, 1, 2))
    r2 = dict(zip(table.lag, table.r2, strict=True))
    assert r2.pop(lag) > 0.999
    assert max(r2.values()) < 0.5


def test_shuffled_contexts_recall_nothing(tiny: Experiment) -> None:
    table = gap.recall(untrained(tiny, f"{__name__}:mixed"), gap.LAGS)
    assert table.lag.tolist() == list(gap.LAGS)
    assert table.r2.max() < 0.02
    assert table.r2.min() > -0.3


def test_recall_is_ridge_regression_on_training(three: dict[str, Result]) -> None:
    result, streams = three["trained"], data.load(three["trained"].experiment)
    model: Any = result.model()
    table = literal.layer_norm(model.embedding.detach().double())
    parts = []
    for one in (streams.train, streams.validation):
        e = table[one.tokens]
        c = contexts.evaluate(copy.deepcopy(model.context_block).double(), e).values
        parts.append((c[2:].numpy(), e[:-2].numpy()))  # two back
    (c, y), (c_val, y_val) = parts
    middle, mean = c.mean(axis=0), y.mean(axis=0)
    ridge = 1e-4 * np.trace(gram := (c - middle).T @ (c - middle)) / len(gram)
    wide = np.vstack([c - middle, math.sqrt(ridge) * np.eye(len(gram))])
    fitted = np.linalg.lstsq(wide, np.vstack([y - mean, np.zeros((len(gram), y.shape[1]))]))[0]
    left = ((y_val - mean - (c_val - middle) @ fitted) ** 2).sum()
    (found,) = gap.recall(result, [2]).r2
    assert found == pytest.approx(1 - left / ((y_val - mean) ** 2).sum(), abs=1e-4)


@pytest.mark.parametrize("fields", [{"contexts": "zero"}, {"contexts": "window"}])
def test_kinds_without_contexts_recall_nothing(tiny: Experiment, fields: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=r"contexts: got .* a kind that makes contexts"):
        gap.recall(untrained(tiny, **fields), [0])


@pytest.mark.parametrize("fields", [{"contexts": "shuffled"}, {"model": "lstm"}])
def test_shuffled_contexts_and_peers_are_refused(tiny: Experiment, fields: dict[str, Any]) -> None:
    one = tiny.replace(**fields).resolved()
    prepared, table = cvfp.experiment.prepare(one)
    result = made(experiment=one, _model=build.build(one, table.weight, prepared.tokenizer))
    with pytest.raises(ParameterError, match=r"contexts: got .* a kind that makes contexts"):
        gap.recall(result, [0])


def test_what_a_run_remembers_is_plain_json(three: dict[str, Result], delayed: Result) -> None:
    result = three["fine_tuned"]
    record = gap.remembers(result)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["ppl"], record["steps"]) == (result.val_ppl, result.context_steps)
    assert (record["size"], record["seed"]) == (6, 42)
    assert record["contraction_rate"] == result.contraction_rate
    assert (record["memory_length"], record["sweeps"]) == (
        result.memory_length,
        result.context_sweeps,
    )
    assert record["recall"]["lag"] == list(gap.LAGS)
    assert record["recall"]["r2"] == gap.recall(result, gap.LAGS).r2.tolist()
    assert list(record["cuts"]) == ["tokens", "nats", *map(str, gap.CUTS)]
    nats = sum(row["nats"] for row in result.val_conversations)
    assert sum(record["cuts"]["nats"]) == pytest.approx(nats, rel=1e-6)
    other = gap.remembers(delayed)  # whose contexts no block makes
    assert "cuts" not in other
    assert other["steps"] is other["contraction_rate"] is None
    assert other["recall"]["r2"][gap.LAGS.index(0)] > 0.5
    # From its stored model, which has no axes: these are training's again.
    stored = gap.remembers(cvfp.run(delayed.experiment))
    assert stored["recall"]["r2"] == pytest.approx(other["recall"]["r2"], abs=1e-3)
    assert json.loads(json.dumps(other, allow_nan=False)) == other


# Kinds of run


@pytest.mark.parametrize("preset", ["mini", "published_size"])
def test_every_kind_is_an_experiment(preset: str) -> None:
    base = Experiment.preset(preset, precision="float32", device="cpu")
    for name, kind in tuning.KINDS.items():
        chooses = tuning.KINDS[kind.like or name]
        axes = tuning.axes(chooses.tuned, base.context_dim)
        assert all(values == sorted(set(values)) for values in axes.values())
        chosen = {field: values[1] for field, values in axes.items()}
        whole = {k: type(getattr(base, k))(v) for k, v in chosen.items()}
        one = tuning.experiment(base, name, **whole)
        for field, value in {**kind.fields, **whole}.items():
            assert getattr(one, field) == value, (name, field)
        differs = {k for k, v in one.to_dict().items() if v != getattr(base, k)}
        assert differs <= {*kind.fields, *whole}, name
        if one.model == "cvfp":
            assert build.cvfp_size(one, one.embedding_dim or 768) > 0, name


def test_kinds_choose_or_share_a_choice() -> None:
    assert sum(map(len, tuning.GROUPS.values())) == len(tuning.KINDS)  # no name twice
    for name, kind in tuning.KINDS.items():
        assert bool(kind.tuned) != bool(kind.like), name
        if kind.like is not None:
            assert tuning.KINDS[kind.like].tuned, name
    names = {tuning.DELAY, tuning.DELAY_RANDOM, tuning.FINE_TUNED, tuning.LEAKY, tuning.REMEMBER}
    names |= {tuning.LEAKY_REMEMBER, tuning.LEAKY_JOINT, tuning.NEXT}
    assert names == set(tuning.GROUPS["discovery"])
    assert tuning.KINDS[tuning.REMEMBER].fields == PRESETS["remember"]
    assert tuning.KINDS[tuning.REMEMBER].tuned == tuning.SCALES
    next_token = tuning.KINDS[tuning.NEXT].fields
    assert next_token == {**PRESETS["remember"], "objective": "next"}
    regimes = [name.split(" · ") for name in tuning.GROUPS["regimes"]]
    assert len({tuple(one) for one in regimes}) == 5 * 2 * 2
    for (objective, regime, read), kind in zip(
        regimes, tuning.GROUPS["regimes"].values(), strict=True
    ):
        one = Experiment(**kind.fields)
        assert (one.objective, one.training_contexts) == (objective, read)
        assert (one.phase1_step == "group") == (regime == "a step a group")


# Comparisons, on runs that nobody trained

SEEDS = (0, 1, 2)
BETTER = {
    tuning.REMEMBER: -0.05,
    tuning.LEAKY: -0.06,
    tuning.LEAKY_REMEMBER: -0.08,
    tuning.DELAY: 0.03,
    tuning.RANDOM_SCALED: 0.02,
    tuning.JOINT: -0.10,
    tuning.FINE_TUNED: -0.13,
}


def runs_of(kind: str, nats: float, seeds: tuple[int, ...] = SEEDS, **measured: Any) -> list[Any]:
    usual = dict(
        parameters={"context_block": 10, "token_block": 20, "embedding": 400, "head": 0},
        best_epoch=3,
        val_acc=0.15,
        val_bpb=1.9,
        baselines=dict.fromkeys(comparison.COUNTED),
    )
    given = {"samples": 100, **tuning.KINDS[kind].fields}
    return [judged(nats, {**given, "seed": seed}, **(usual | measured)) for seed in seeds]


@pytest.fixture
def groups() -> dict[str, list[Any]]:
    """Without CVFP as published; the untrained block first."""
    order = sorted(BETTER, key=lambda kind: kind != tuning.RANDOM_SCALED)
    return {kind: runs_of(kind, 5 + BETTER[kind]) for kind in order}


def test_the_reference_is_cvfp_or_the_first(groups: dict[str, list[Any]]) -> None:
    first = tuning.RANDOM_SCALED
    assert comparison.reference(groups) == first
    assert comparison.reference({**groups, tuning.CVFP: []}) == tuning.CVFP
    assert comparison.reference({}) == tuning.CVFP
    assert comparison.sizes(groups) == [100]
    groups[tuning.NEXT] = runs_of(tuning.NEXT, 5.0, seeds=(7,))  # shares no seed
    found = comparison.against(groups, 100)
    assert set(found) == set(BETTER) - {first}
    assert found[tuning.LEAKY].change == pytest.approx(math.expm1(-0.08))
    table = tables.comparison(groups)
    assert table.loc[(100, tuning.LEAKY)][f"change against the {first}"] == "-7.7%"
    assert table.loc[(100, tuning.NEXT)][f"change against the {first}"] == "–"
    assert f"perplexity against\n{first}" in plots.comparison(groups).axes[0].get_xlabel()
    with pytest.raises(ParameterError, match=f"groups: .* runs of '{first}'"):
        comparison.sizes({first: []})


def test_families_of_the_new_kinds() -> None:
    families = {kind: comparison.family(kind) for kind in tuning.GROUPS["discovery"]}
    tokens = {kind for kind, of in families.items() if of == "tokens alone"}
    joint = {kind for kind, of in families.items() if of == "end to end"}
    untrained = {kind for kind, of in families.items() if of == "contexts of an untrained block"}
    assert tokens == {tuning.DELAY, tuning.DELAY_RANDOM}
    assert joint == {tuning.FINE_TUNED, tuning.LEAKY_JOINT}
    assert untrained == {tuning.LEAKY}
    assert families[tuning.REMEMBER] == "contexts of Phase 1"


def test_table_of_regimes() -> None:
    def of(kind: str, *ppl: float) -> list[Result]:
        fields = {"samples": 100, **tuning.KINDS[kind].fields}
        return [made({**fields, "seed": i}, val_ppl=one) for i, one in enumerate(ppl)]

    names = list(tuning.GROUPS["regimes"])
    parallel, exact = "published · as published · parallel", "published · as published · exact"
    by_group = "remember · a step a group · exact"
    assert {parallel, exact, by_group} <= set(names)
    runs: Mapping[str, list[Result]] = {
        tuning.RANDOM_SCALED: of(tuning.RANDOM_SCALED, 100.0),  # is no regime
        parallel: of(parallel, 120.0, 131.0),
        exact: of(exact, 118.04),
        by_group: of(by_group, 90.0, 91.0, 92.0),
    }
    table = tables.regimes(runs, 100)
    assert table.index.tolist() == ["published", "remember"]
    assert table.loc["published", "as published, parallel"] == "125.5 (2)"
    assert table.loc["published", "as published, exact"] == "118.0 (1)"
    assert table.loc["remember", "a step a group, exact"] == "91.0 (3)"
    assert pd.isna(table.loc["remember", "as published, exact"])


def record_of(kind: str, ppl: float, r2: list[float], **rest: Any) -> dict[str, Any]:
    recalled = {"lag": list(gap.LAGS), "r2": r2 + [0.0] * (len(gap.LAGS) - len(r2))}
    return {"kind": kind, "ppl": ppl, "recall": recalled, **rest}


@pytest.fixture
def records() -> list[dict[str, Any]]:
    """Of two seeds of one kind, and of a kind that no block makes."""
    nats = [500.0, 1500.0]
    cuts = {"tokens": [100.0, 300.0], "nats": nats, "0": [520.0, 1560.0], "4": [501.0, 1503.0]}
    cuts |= {"16": [500.1, 1500.3]}
    how = dict(contraction_rate=0.724, memory_length=23, steps=1296, cuts=cuts)
    return [
        record_of("leaky", 100.0, [0.3, 0.9, 0.8, 0.6, 0.5, 0.4], **how),
        record_of("leaky", 110.0, [0.3, 0.8, 0.7, 0.5, 0.3, 0.2], **how),
        record_of("delay", 120.0, [0.1, 1.0], contraction_rate=None, memory_length=None),
    ]


def test_table_of_memories(records: list[dict[str, Any]]) -> None:
    table = tables.memories(records)
    assert table.index.tolist() == ["leaky", "delay"]
    row = table.loc["leaky"]
    assert row["PPL"].startswith("105.0 ±")
    assert row["runs"] == 2
    back = [row[f"R², {lag} back"] for lag in (0, 1, 4, 8)]
    assert back == ["0.85", "0.75", "0.30", "0.00"]
    assert (row["contraction a token"], row["forgets after"]) == ("0.72", "23")
    assert row["steps of exact evaluation"] == "1,296"
    # 4/400 nats a token are 1 %; 0.4/400, 0.1 %, are under 0.2 %.
    assert row["used, tokens"] == "4"
    other = table.loc["delay"]
    assert (other["used, tokens"], other["contraction a token"]) == ("–", "–")
    assert other["R², 0 back"] == "1.00"
    deaf = copy.deepcopy(records[0])
    deaf["cuts"] |= dict.fromkeys(("0", "4", "16"), deaf["cuts"]["nats"])
    assert tables.memories([deaf]).loc["leaky"]["used, tokens"] == "under 1"


def test_figure_of_recall_is_the_mean_over_runs(records: list[dict[str, Any]]) -> None:
    (axes,) = plots.recall(records).axes
    one, other = axes.lines
    assert [one.get_label(), other.get_label()] == ["leaky", "delay"]
    assert list(one.get_xdata()) == [lag for lag in gap.LAGS if lag >= 0]  # back, not to come
    assert list(one.get_ydata())[:5] == pytest.approx([0.85, 0.75, 0.55, 0.4, 0.3])
    assert float(other.get_ydata()[0]) == 1.0


def lines_of(text: str) -> Iterator[tuple[str, str]]:
    for one in text.splitlines():
        if one.startswith("- "):
            words, _, said = one[2:].partition(": ")
            yield words, said


def test_reading_of_discovery_follows_the_intervals(groups: dict[str, list[Any]]) -> None:
    text = readings.discovery(groups)
    assert text.startswith("**100 conversations**")
    said = dict(lines_of(text))
    for words, nats in (
        ("`remember` over the best untrained block", -0.07),
        (f"`remember` over the best without contexts ({tuning.DELAY})", -0.08),
        ("a leaky block, untrained, over the published block, untrained", -0.08),
        ("a leaky block, untrained, over `remember`", -0.01),
        ("`remember` on a leaky block over the leaky block untrained", -0.02),
        ("end to end over `remember`", -0.05),
        ("end to end from `remember` over end to end", -0.03),
    ):
        assert said.pop(words).startswith(f"{math.expm1(nats):+.1%} ("), words
        assert f"{words}: " in text
    worse = said["a delay line over the best untrained block"]
    assert worse.startswith(f"{math.expm1(0.01):+.1%} (")
    assert worse.endswith("Worse, beyond chance.")
    # Kinds without runs are left out.
    assert not any("next token" in words or "published objective" in words for words in said)
    assert "One seed: no interval" in readings.discovery(
        {kind: runs[:1] for kind, runs in groups.items()}
    )


def test_reading_takes_the_best_without_contexts_on_development(
    groups: dict[str, list[Any]],
) -> None:
    """The delay line has the best perplexity in validation, two tokens in development; shuffled
    contexts, the best of all, are trained ones."""
    two = tuning.ZERO.format(2)
    groups[tuning.DELAY] = runs_of(tuning.DELAY, 5.0, dev_ppl=150.0)
    groups[two] = runs_of(two, 5.1, dev_ppl=140.0)
    groups[tuning.SHUFFLED] = runs_of(tuning.SHUFFLED, 4.5, dev_ppl=90.0)
    said = dict(lines_of(readings.discovery(groups)))
    words = f"`remember` over the best without contexts ({two})"
    assert said[words].startswith(f"{math.expm1(-0.15):+.1%} (")


def test_reading_of_discovery_needs_no_kind_without_contexts(
    groups: dict[str, list[Any]],
) -> None:
    del groups[tuning.DELAY]
    said = dict(lines_of(readings.discovery(groups)))
    assert "`remember` over the best untrained block" in said
    assert not any("without contexts" in words for words in said)


def test_results_keep_the_new_figures(three: dict[str, Result]) -> None:
    result = three["fine_tuned"]
    again = Result.from_dict(json.loads(json.dumps(result.to_dict())))
    for name in ("val_bigrams", "context_steps", "phase1_history"):
        assert getattr(again, name) == getattr(result, name) != []
    assert {"val_bigrams", "context_steps"} <= {f.name for f in dataclasses.fields(Result)}
    assert "context_steps" in cvfp.Results([result]).frame()
