"""Objectives beside the published one and Phase 1's other regimes, against plain float64 loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import literal
import pytest
import torch
from conftest import tiny_experiment
from test_phases import SMALL, Draws, make_model, make_tokens
from torch import Tensor

import cvfp
from cvfp import Experiment, ParameterError, objectives, ops, phase1, registry
from cvfp.inputs import TokenInputs
from cvfp.ops import placement

GROUP, TOTAL, WIDTH, TABLE = 32, 110, 8, 6


def batch_of(tokens: Tensor, table: Tensor, **fields: Any) -> objectives.Batch:
    """All of a stream in groups of `GROUP`."""
    inputs = TokenInputs(tokens, table, 1)
    positions = torch.arange(len(tokens)).view(-1, GROUP)
    return objectives.Batch(Experiment(**{**SMALL, **fields}), inputs, positions)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_remember_is_the_mean_of_its_maps_errors() -> None:
    tokens, table = torch.randint(9, (2 * GROUP,)), drawn(9, TABLE)
    batch = batch_of(tokens, table, objective_lags="0,2")
    new = drawn(2, GROUP, WIDTH, seed=1)
    one = objectives.Remember(batch.experiment, WIDTH, TABLE).double()
    losses, figures = one(new, new, batch)
    rows = literal.layer_norm(table)
    for group in range(2):
        errors = []
        for lag, linear in zip((0, 2), one.maps, strict=True):
            sums = 0.0
            for place in range(GROUP):
                at = group * GROUP + place - lag
                target = rows[tokens[at]] if at >= 0 else torch.zeros(TABLE)
                told = linear.weight.double() @ new[group, place] + linear.bias
                sums += float(((told - target) ** 2).detach().mean())
            errors.append(sums / GROUP)
        assert [float(figures[f"lag_{lag}"][group].detach()) for lag in (0, 2)] == pytest.approx(
            errors
        )
        assert float(losses[group].detach()) == pytest.approx(sum(errors) / 2)


def test_next_is_a_softmax_over_the_drawn_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives.Next, "CANDIDATES", 10)
    tokens, table = torch.randint(9, (2 * GROUP,)), drawn(9, TABLE)
    batch = batch_of(tokens, table)
    new = drawn(2, GROUP, WIDTH, seed=1)
    one = objectives.Next(batch.experiment, WIDTH, TABLE).double()
    losses, _ = one(new, new, batch)
    rows, count = literal.layer_norm(table), torch.bincount(tokens, minlength=9)
    share = count / len(tokens)
    for group in range(2):
        following = [*tokens[group * GROUP + 1 : group * GROUP + GROUP + 1].tolist()]
        candidates = following[::4]  # of 32, every fourth: eight
        total, there = 0.0, 0
        for place, target in enumerate(following):
            h = one.map.weight @ new[group, place] + one.map.bias
            own = math.exp(float(h @ rows[target])) / float(share[target])
            rest = sum(
                math.exp(float(h @ rows[other])) / float(share[other])
                for other in (candidates if len(following) == GROUP else [*candidates, None])
                if other is not None and other != target
            )
            total, there = total + math.log((own + rest) / own), there + 1
        if group == 0:
            assert float(losses[0]) == pytest.approx(total / there)
        else:  # the stream's last has no next; its candidates are the same
            assert there == GROUP - 1
            assert float(losses[1]) == pytest.approx(total / there)


def test_vicreg_has_its_three_terms() -> None:
    tokens, table = torch.randint(9, (2 * GROUP,)), drawn(9, TABLE)
    new, old = 0.5 * drawn(2, GROUP, WIDTH, seed=1), drawn(2, GROUP, WIDTH, seed=2)
    losses, figures = objectives.vicreg(new, old, batch_of(tokens, table))
    for group in range(2):
        c = new[group] - new[group].mean(dim=0)
        change = float(((new[group] - old[group]) ** 2).mean())
        stds = [math.sqrt(float((c[:, d] ** 2).mean()) + 1e-4) for d in range(WIDTH)]
        short = sum(max(0.0, 1 - std) for std in stds) / WIDTH
        covariance = c.T @ c / (GROUP - 1)
        off = sum(
            float(covariance[i, j]) ** 2 for i in range(WIDTH) for j in range(WIDTH) if i != j
        )
        assert float(figures["variance"][group]) == pytest.approx(short)
        assert float(losses[group]) == pytest.approx(25 * change + 25 * short + off / WIDTH)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("decay", ["none", "linear"])
def test_a_step_a_group_is_the_plain_loop(
    fresh: bool, decay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps, lr = 3, 0.01
    model = make_model()
    block, stream = model.double().context_block, make_tokens(TOTAL)
    experiment = Experiment(**SMALL).replace(
        objective="remember",
        objective_lags="0,1",
        phase1_step="group",
        phase1_decay=decay,
        phase1_fresh=fresh,
        phase1_stop="never",
        phase1_noise=0.0,
        phase1_learning_rate=lr,
        phase1_gradient_clip=1e9,
        phase1_max_iterations=sweeps + 1,
        loss_group=GROUP,
        precision="float32",
    )
    inputs = model.context_inputs(stream)
    width, e = block.context_dim, literal.inputs(model.embedding.detach().double(), stream, 1)
    objective, _ = registry.build_objective(experiment, width, inputs.table, 5)
    w = literal.weights(block, trained=True)
    maps = literal.weights(objective, trained=True)  # type: ignore[arg-type]
    draws = Draws(monkeypatch)
    with ops.using("plain"):
        made = phase1.train(block, inputs, experiment, torch.Generator().manual_seed(5))
    (old,) = draws.streams(TOTAL)
    starts = range(0, TOTAL, GROUP)
    optimiser = literal.Adam([*w.values(), *maps.values()], lr)
    targets = [e, torch.cat([torch.zeros_like(e[:1]), e[:-1]])]
    losses = []
    for sweep in range(sweeps):
        new, sums = old.clone(), 0.0
        for start in starts:
            end = min(start + GROUP, TOTAL)
            before = new if fresh else old
            read = torch.cat([(before if start else old)[start - 1][None], old[start : end - 1]])
            c = literal.context_block(w, read, e[start:end])[-1]
            loss = (
                sum(
                    (
                        (c @ maps[f"maps.{i}.weight"].T + maps[f"maps.{i}.bias"] - t[start:end])
                        ** 2
                    ).mean()
                    for i, t in enumerate(targets)
                )
                / 2
            )
            gradients = torch.autograd.grad(loss, optimiser.parameters)
            if decay == "linear":
                optimiser.lr = lr * (1 - (sweep + start / TOTAL) / sweeps)
            optimiser.step(gradients)
            new[start:end] = c.detach()
            sums += float(loss.detach())
        losses.append(sums / len(starts))
        old = new
    assert [row["loss"] for row in made.history] == pytest.approx(losses, rel=1e-7)
    torch.testing.assert_close(made.contexts, old, rtol=0, atol=1e-9)


def test_never_runs_all_sweeps_and_decay_ends_near_nothing() -> None:
    rows: list[int] = []
    one = tiny_experiment(phase1_max_iterations=9, phase1_stop="never", convergence_threshold=100.0)
    result = cvfp.run(one, watch=lambda row: rows.append(int(row["phase"])))
    assert rows.count(1) == 8
    assert result.phase1_iterations == 9
    stops = cvfp.run(one.replace(phase1_stop="converged"))
    assert stops.phase1_iterations == 5


@pytest.mark.parametrize("objective", ["remember", "next", "vicreg"])
def test_each_objective_runs_in_both_regimes_and_comes_from_the_store(
    objective: str, home: Path
) -> None:
    for step in ("sweep", "group"):
        one = tiny_experiment(objective=objective, phase1_step=step, phase1_decay="linear")
        made = cvfp.run(one)
        first, *_, last = made.phase1_history
        assert last["loss"] < first["loss"] or objective == "vicreg"  # whose change only begins
        assert cvfp.run(one).from_store


def test_a_stopped_run_by_groups_ends_with_the_same_numbers(home: Path) -> None:
    one = tiny_experiment(objective="remember", phase1_step="group", phase1_decay="linear")
    whole = cvfp.run(one, reuse=False)
    for path in [*home.glob("*/*.json"), *(home / "phase1").glob("*")]:
        path.unlink()
    cvfp.run(one, watch=lambda row: row["iteration"] == 3)
    again = cvfp.run(one)
    assert again.phase1_history == whole.phase1_history
    assert again.val_ppl == whole.val_ppl


@pytest.mark.parametrize("lags", ["", "0,0", "0, 0", "-1", "a", "0;1"])
def test_lags_that_cannot_be_are_refused(lags: str) -> None:
    with pytest.raises(ParameterError, match="objective_lags"):
        Experiment(objective_lags=lags)


def test_lags_matter_to_the_key_only_where_they_are_said() -> None:
    assert "objective_lags" not in Experiment().key_fields("phase1")
    assert Experiment(objective_lags="0").key_fields("phase1")["objective_lags"] == "0"


@pytest.mark.parametrize("fresh", [False, True])
def test_what_a_group_reads_does_not_depend_on_the_size_of_a_pass(
    fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for at_once in (1, 3):
        monkeypatch.setattr(
            ops,
            "group_slices",
            lambda total, group, *_, n=at_once: placement.slices(total, group, n),
        )
        model = make_model().double()
        one = Experiment(**SMALL, loss_group=GROUP, phase1_fresh=fresh, phase1_max_iterations=4)
        inputs = model.context_inputs(make_tokens(TOTAL))
        generator = torch.Generator().manual_seed(5)
        made.append(phase1.train(model.context_block, inputs, one, generator).contexts)
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-9)
