"""Own objectives: what they are given, what becomes of them, and which are refused."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from conftest import tiny_experiment
from test_phases import SMALL, make_model, make_tokens
from torch import Tensor, nn

import cvfp
from cvfp import Experiment, ParameterError, cache, objectives, ops, phase1, registry, store
from cvfp.inputs import TokenInputs

TOTAL = 110  # of groups of 32: three, and one of 14


@pytest.fixture(autouse=True)
def names() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(registry.PARTS["objective"])
    yield
    registry.PARTS["objective"].clear()
    registry.PARTS["objective"].update(before)


def experiment(**fields: Any) -> Experiment:
    given = dict(phase1_max_iterations=5, loss_group=32, convergence_rate=1.0)
    return Experiment(**{**SMALL, **given, **fields})


def trained(
    objective: str, mode: str = "plain", **fields: Any
) -> tuple[phase1.Phase1, dict[str, Tensor]]:
    model = make_model(tokens=fields.get("num_input_tokens", 1))
    with ops.using(mode):
        made = phase1.train(
            model.context_block,
            model.context_inputs(make_tokens(TOTAL)),
            experiment(objective=objective, **fields),
            torch.Generator().manual_seed(5),
        )
    return made, model.context_block.state_dict()


def copied(new: Tensor, old: Tensor, batch: objectives.Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The published one, in the words of a researcher."""
    change = (new - old).square().mean(dim=2).mean(dim=1)
    centred = new - new.mean(dim=1, keepdim=True)
    spread = torch.linalg.vector_norm(centred, dim=(1, 2)) / new.shape[1]
    w = batch.experiment.dist_reg_weight
    return (1 - w) * change - w * spread, {"diversity": spread}


# The same figures


@pytest.mark.parametrize("fields", [{}, {"precision": "bfloat16"}, {"dist_reg_weight": 0.3}])
def test_a_copy_gives_the_published_figures(fields: dict[str, Any]) -> None:
    cvfp.objective("copied")(copied)
    made, weights = trained("copied", **fields)
    wanted, same = trained("published", **fields)
    assert made.history == wanted.history
    assert torch.equal(made.contexts, wanted.contexts)
    assert all(torch.equal(weights[name], same[name]) for name in same)
    made, weights = trained("copied", "auto", **fields)
    wanted, same = trained("published", "auto", **fields)
    close = 1e-5 if not fields.get("precision") else 1e-3
    for mine, theirs in zip(made.history, wanted.history, strict=True):
        assert mine == pytest.approx(theirs, abs=close)
    torch.testing.assert_close(
        made.contexts.float(), wanted.contexts.float(), rtol=0, atol=1e-3 if not fields else 0.1
    )


def test_a_copy_gives_the_published_run(tiny: Experiment) -> None:
    cvfp.objective("copied")(copied)
    for mode, close in (("plain", 0.0), ("auto", 1e-4)):
        one = tiny.replace(ops=mode, samples=2)
        made = cvfp.run(one.replace(objective="copied"), reuse=False)
        wanted = cvfp.run(one, reuse=False)
        assert made.key != wanted.key
        assert made.val_ppl == pytest.approx(wanted.val_ppl, rel=close, abs=0)
        assert made.val_er == pytest.approx(wanted.val_er, rel=close, abs=0)


def test_published_is_its_formula_and_settle_its_first_term() -> None:
    draw = torch.Generator().manual_seed(0)
    new, old = (torch.randn(3, 7, 5, generator=draw).double() for _ in range(2))
    inputs = TokenInputs(make_tokens(21), torch.randn(20, 4), 1)
    batch = objectives.Batch(experiment(dist_reg_weight=0.8), inputs, torch.arange(21).view(3, 7))
    losses, figures = objectives.published(new, old, batch)
    first, _ = objectives.settle(new, old, batch)
    for k in range(3):
        mse = float(((new[k] - old[k]) ** 2).sum() / 35)
        spread = float(torch.sqrt(((new[k] - new[k].sum(0) / 7) ** 2).sum()) / 7)
        assert float(losses[k]) == pytest.approx(0.2 * mse - 0.8 * spread, abs=1e-12)
        assert float(figures["diversity"][k]) == pytest.approx(spread, abs=1e-12)
        assert float(first[k]) == pytest.approx(mse, abs=1e-12)
    alone, _ = trained("settle")
    assert alone.history[-1]["change"] < trained("published")[0].history[-1]["change"]


# What an objective is given


def test_groups_tokens_and_embeddings_are_the_streams() -> None:
    """In order, at both ends; the smaller last group comes alone and counts as one group."""
    calls: list[tuple[Tensor, Tensor, objectives.Batch]] = []
    losses_given: list[Tensor] = []

    @cvfp.objective("spy")
    def spy(new: Tensor, old: Tensor, batch: objectives.Batch) -> Any:
        calls.append((new.detach().clone(), old.clone(), batch))
        assert new.requires_grad
        assert not old.requires_grad
        losses, figures = copied(new, old, batch)
        losses_given.append(losses.detach())
        return losses, {**figures, "length": torch.full_like(losses.detach(), new.shape[1])}

    made, _ = trained("spy", num_input_tokens=2)
    tokens = make_tokens(TOTAL)
    rows = torch.nn.functional.layer_norm(make_model().embedding.detach(), (8,))
    assert [tuple(new.shape) for new, _, _ in calls[:4]] == [(1, 32, 10)] * 3 + [(1, 14, 10)]
    assert len(calls) == 4 * 4
    everywhere = torch.cat([batch.positions.flatten() for _, _, batch in calls[:4]])
    assert everywhere.tolist() == list(range(TOTAL))
    for lag in (-2, -1, 0, 1, 3, 200, -200):
        seen = torch.cat([batch.tokens(lag).flatten() for _, _, batch in calls[:4]])
        embedded = torch.cat([batch.embeddings(lag).flatten(0, 1) for _, _, batch in calls[:4]])
        for t in range(TOTAL):
            inside = 0 <= t - lag < TOTAL
            assert int(seen[t]) == (int(tokens[t - lag]) if inside else -1)
            wanted = rows[tokens[t - lag]] if inside else torch.zeros(8)
            torch.testing.assert_close(embedded[t], wanted)
    # What is new now is old an iteration later.
    for before, after in zip(calls, calls[4:], strict=False):
        assert torch.equal(before[0], after[1])
    for row, part in zip(made.history, torch.cat(losses_given).split(4), strict=True):
        assert row["loss"] == pytest.approx(float(part.mean()), abs=1e-6)
        assert row["length"] == pytest.approx((3 * 32 + 14) / 4)


def test_whole_groups_come_together_where_that_is_faster() -> None:
    shapes: list[tuple[int, ...]] = []

    @cvfp.objective("spy")
    def spy(new: Tensor, old: Tensor, batch: objectives.Batch) -> Any:
        shapes.append(tuple(new.shape))
        assert batch.positions.shape == batch.tokens(1).shape == new.shape[:2]
        assert batch.embeddings().shape == (*new.shape[:2], 8)
        return copied(new, old, batch)

    trained("spy", "auto")
    assert shapes == [(3, 32, 10), (1, 14, 10)] * 4


class Guess(nn.Module):
    """Contexts from which a linear map can tell the next token's embedding."""

    made: ClassVar[list[Guess]] = []

    def __init__(self, experiment: Experiment, context_dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(context_dim, embedding_dim)
        with torch.no_grad():
            self.map.weight.fill_(0.1)
            self.map.bias.zero_()
        self.made.append(self)

    def forward(self, new: Tensor, old: Tensor, batch: objectives.Batch) -> Any:
        there = (batch.tokens(-1) >= 0).float()[..., None]
        apart = (self.map(new) - batch.embeddings(-1)).square() * there
        return apart.mean(dim=(1, 2)), {"apart": apart.detach().mean(dim=(1, 2))}


@pytest.mark.parametrize("mode", ["auto", "plain"])
def test_an_objective_with_parameters_is_trained(mode: str) -> None:
    Guess.made.clear()
    cvfp.objective("guess")(Guess)
    made, weights = trained("guess", mode, phase1_max_iterations=30, phase1_learning_rate=0.01)
    (one,) = Guess.made
    assert not torch.equal(one.map.weight, torch.full_like(one.map.weight, 0.1))
    assert float(one.map.bias.detach().norm()) > 0
    losses = [row["loss"] for row in made.history]
    assert losses[-1] < 0.9 * losses[0]
    assert [row["apart"] for row in made.history] == pytest.approx(losses)
    start = make_model().context_block.state_dict()
    assert not torch.equal(weights["linears.0.weight"], start["linears.0.weight"])
    assert weights.keys() == start.keys()


# Refused


BAD: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "one number for all": (lambda new, old: (new.mean(), {}), "shape"),
    "one a token": (lambda new, old: (new.square().mean(2), {}), "shape"),
    "one too many": (lambda new, old: (new.mean((1, 2)).repeat(2), {}), "shape"),
    "not a number": (lambda new, old: (new.mean((1, 2)) * torch.nan, {}), "not finite"),
    "infinite": (lambda new, old: (new.mean((1, 2)) + torch.inf, {}), "not finite"),
    "no gradient": (lambda new, old: (new.detach().mean((1, 2)), {}), "gradient"),
    "the old ones": (lambda new, old: (old.mean((1, 2)), {}), "gradient"),
    "no tensor": (lambda new, old: (0.5, {}), ""),
    "a list": (lambda new, old: ([0.5], {}), ""),
    "nothing": (lambda new, old: (None, {}), ""),
    "a wrong figure": (lambda new, old: (new.mean((1, 2)), {"mine": new.detach()}), "figures"),
    "a figure without a tensor": (lambda new, old: (new.mean((1, 2)), {"mine": 0.5}), "figures"),
    "figures that are no dict": (lambda new, old: (new.mean((1, 2)), [1.0]), "figures"),
    "one value": (lambda new, old: new.mean((1, 2)), ""),
}


@pytest.mark.parametrize("mode", ["auto", "plain"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_objective_is_refused_by_name_at_its_first_iteration(name: str, mode: str) -> None:
    calls: list[int] = []
    bad, words = BAD[name]

    def objective(new: Tensor, old: Tensor, batch: objectives.Batch) -> Any:
        calls.append(len(new))
        return bad(new, old)

    cvfp.objective(name)(objective)
    with pytest.raises(ValueError, match=f"objective: got .*{words}.* from '{name}'; accepted: "):
        trained(name, mode)
    assert len(calls) == 1


def test_an_unknown_name_is_refused_and_the_nearest_named() -> None:
    with pytest.raises(ParameterError, match=r"objective: got 'publishd'; .*mean 'published'"):
        Experiment(objective="publishd")
    with pytest.raises(ParameterError, match="'published' or 'settle'"):
        Experiment(objective="something else")
    for name in ("no_such_module:f", "math:no_such_name", "math:pi", "math:", ":f"):
        with pytest.raises(ParameterError, match=f"objective: got '{name}'; accepted: "):
            Experiment(objective=name)


def test_a_module_and_a_name_in_it_are_an_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("somewhere")
    module.copied = copied  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somewhere", module)
    made, _ = trained("somewhere:copied")
    assert made.history == trained("published")[0].history


def test_a_built_in_name_stays_the_built_in() -> None:
    with pytest.raises(ParameterError, match="objective: got 'published'; accepted: a name that"):
        cvfp.objective("published")(copied)
    cvfp.objective("mine")(copied)
    cvfp.objective("mine")(objectives.settle)  # a cell that is run again
    assert registry.resolve("objective", "mine") is objectives.settle


# Keys


LATER = ("objective", "block", "context_std", "input_std", "token_block_std", "ops")
LATER += ("dropout", "weight_decay", "objective_lags", "leak_tokens")
LATER += tuple(f"phase1_{name}" for name in ("step", "decay", "fresh", "stop"))


@pytest.mark.parametrize("phase1_alone", [True, False])
def test_new_fields_at_their_defaults_are_not_in_a_key(
    phase1_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tiny_experiment()
    seen: list[Any] = []
    digest = cache.digest
    with monkeypatch.context() as patched:
        patched.setattr(cache, "digest", lambda *parts: (seen.append(parts), digest(*parts))[1])
        key = store.key(one, "data", "table", phase1=phase1_alone)
    fields, *rest = next(parts for parts in seen if isinstance(parts[0], dict))
    stages = (
        ("context", "phase1", "run") if phase1_alone else ("context", "phase1", "phase2", "run")
    )
    old = {k: v for k, v in one.to_dict(*stages).items() if k not in LATER}
    assert fields == old
    assert key == digest(old, *rest)


@pytest.mark.parametrize(
    "changed",
    [
        dict(objective="settle"),
        dict(context_std=0.2),
        dict(input_std=0.2),
        dict(token_block_std=0.2),
        dict(ops="plain"),
    ],
)
def test_new_fields_away_from_their_defaults_are(changed: dict[str, Any]) -> None:
    one, other = tiny_experiment(), tiny_experiment(**changed)
    assert store.key(one, "d", "t") != store.key(other, "d", "t")
    alone = store.key(one, "d", "t", phase1=True) != store.key(other, "d", "t", phase1=True)
    assert alone == ("token_block_std" not in changed)


def test_an_own_objectives_source_is_part_of_the_key() -> None:
    """A changed part is another run."""
    keys = []
    for part in (copied, objectives.settle):
        cvfp.objective("mine")(part)
        keys.append(store.key(tiny_experiment(objective="mine"), "d", "t", phase1=True))
    assert keys[0] != keys[1]
