"""Own parts: what of them is in a key, and what a worker is sent."""

from __future__ import annotations

import functools
import importlib
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import tiny_experiment

import cvfp
from cvfp import registry, store
from cvfp.model import ContextBlock

SCALE = 2.0
TABLE = torch.arange(3.0)


def helper(x: Any) -> Any:
    return SCALE * x


def mine(new: Any, old: Any, batch: Any) -> Any:
    return helper((new - old).abs().mean(dim=(1, 2))) + 0 * TABLE.sum(), {}


class Wide(torch.nn.Module):
    """An objective with parameters of its own."""

    def __init__(self, experiment: Any, context_dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.map = torch.nn.Linear(context_dim, 1)

    def forward(self, new: Any, old: Any, batch: Any) -> Any:
        return helper(self.map(new).square().mean(dim=(1, 2))), {}


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    before = dict(registry.PARTS["objective"])
    yield
    registry.PARTS["objective"].clear()
    registry.PARTS["objective"].update(before)
    registry.RECEIVED.clear()


def key() -> str:
    return store.key(tiny_experiment(objective="mine"), "data", "table", phase1=True)


@pytest.mark.parametrize("part", [mine, Wide])
def test_a_changed_helper_constant_or_table_is_another_run(
    part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cvfp.objective("mine")(part)
    keys = [key(), key()]
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    keys.append(key())
    monkeypatch.setitem(globals(), "helper", lambda x: x)
    keys.append(key())
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    if part is mine:
        monkeypatch.setitem(globals(), "TABLE", torch.arange(3.0) + 1)
        assert key() not in keys


def test_values_closed_over_and_defaults_count() -> None:
    def closing(scale: float) -> Any:
        def part(new: Any, old: Any, batch: Any, power: int = 2) -> Any:
            return (scale * (new - old) ** power).mean(dim=(1, 2)), {}

        return part

    keys = []
    for scale in (1.0, 2.0, 1.0):
        cvfp.objective("mine")(closing(scale))
        keys.append(key())
    assert keys[0] == keys[2] != keys[1]


class Setting:
    weight = 1.0


FIRST, SECOND = {"w": 1.0}, {"w": 1.0}


def of_two_dicts(new: Any, old: Any, batch: Any) -> Any:
    return (new - old).square().mean(dim=(1, 2)) * FIRST["w"] * SECOND["w"], {}


def of_a_class(new: Any, old: Any, batch: Any) -> Any:
    return (new - old).square().mean(dim=(1, 2)) * Setting.weight, {}


def test_the_second_of_two_equal_dicts_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cvfp.objective("mine")(of_two_dicts)
    before = key()
    monkeypatch.setitem(SECOND, "w", -3.0)
    assert key() != before


def test_a_class_attribute_set_later_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cvfp.objective("mine")(of_a_class)
    before = key()
    monkeypatch.setattr(Setting, "weight", -1.0)
    assert key() != before


def test_a_helper_of_an_own_module_counts(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what runs is what counts, not the text that the file has by now."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_helpers.py").write_text("def scaled(x):\n    return 2 * x\n")
    (tmp_path / "own_part.py").write_text(
        "import own_helpers\n\n"
        "def part(new, old, batch):\n"
        "    return own_helpers.scaled((new - old).square().mean(dim=(1, 2))), {}\n"
    )
    name = "own_part:part"
    before = registry.source("objective", name)
    assert before
    (tmp_path / "own_helpers.py").write_text("def scaled(x):\n    return -7 * x\n")
    assert registry.source("objective", name) == before
    importlib.invalidate_caches()
    importlib.reload(sys.modules["own_helpers"])
    assert registry.source("objective", name) not in (before, None)
    del sys.modules["own_helpers"], sys.modules["own_part"]


LOSS = torch.nn.MSELoss()


def of_an_instance(new: Any, old: Any, batch: Any) -> Any:
    return LOSS(new, old)[None], {}


def importing(new: Any, old: Any, batch: Any) -> Any:
    import conftest

    return (new - old).square().mean(dim=(1, 2)) * len(conftest.__name__), {}


@pytest.mark.parametrize("part", [functools.partial(mine), of_an_instance, importing])
def test_what_cannot_be_told_has_no_source(part: Any) -> None:
    cvfp.objective("mine")(part)
    assert registry.source("objective", "mine") is None


def test_lambdas_on_one_line_are_apart() -> None:
    pair = (
        lambda n, o, b: ((n - o).square().mean((1, 2)), {}),
        lambda n, o, b: ((n - o).abs().mean((1, 2)), {}),
    )
    keys = []
    for part in pair:
        cvfp.objective("mine")(part)
        keys.append(key())
    assert keys[0] != keys[1]


def test_names_that_are_phase_1s_own_are_refused() -> None:
    new = torch.ones(1, 2, 3, requires_grad=True)
    losses = new.mean(dim=(1, 2))
    for name in ("loss", "change_p50"):
        with pytest.raises(ValueError, match="objective: got figures named"):
            registry.check_objective("mine", (losses, {name: torch.zeros(1)}), new)


def test_a_loss_must_reach_the_contexts_and_figures_be_finite() -> None:
    new, weight = torch.ones(1, 2, 3, requires_grad=True), torch.ones(1, requires_grad=True)
    registry.check_objective("mine", (new.mean(dim=(1, 2)), {"x": torch.zeros(1)}), new)
    with pytest.raises(ValueError, match="gradient that reaches the new contexts"):
        registry.check_objective("mine", (2 * weight, {}), new)
    nan = torch.full((1,), torch.nan)
    with pytest.raises(ValueError, match="a figure that is not finite, of \\['x'\\]"):
        registry.check_objective("mine", (new.mean(dim=(1, 2)), {"x": nan}), new)


@pytest.mark.parametrize("name", ["", "a:b"])
def test_names_that_could_not_be_told_are_refused(name: str) -> None:
    with pytest.raises(cvfp.ParameterError, match="a name without ':'"):
        cvfp.objective(name)(lambda new, old, batch: None)
    with pytest.raises(cvfp.ParameterError, match="a name without ':'"):
        cvfp.objective("mine")(3)  # type: ignore[type-var]


class Undrawn(ContextBlock):
    """Leaves its weights as torch draws them."""

    def initialise(self, generator: torch.Generator) -> None:
        pass


class FromAnywhere(ContextBlock):
    """Draws from torch's own generator."""

    def initialise(self, generator: torch.Generator) -> None:
        super().initialise(generator)
        torch.nn.init.normal_(self.linears[0].weight)


def test_a_block_draws_all_its_weights_from_its_generator() -> None:
    registry.check_block("mine", ContextBlock(2, 6, 4, True), 6, 4)
    for kind in (Undrawn, FromAnywhere):
        with pytest.raises(ValueError, match="does not draw from its generator"):
            registry.check_block("mine", kind(2, 6, 4, True), 6, 4)
    still = torch.nn.Identity()
    still.context_dim, still.widths, still.initialise = 6, [6], lambda generator: None
    with pytest.raises(ValueError, match="block: got no parameters"):
        registry.check_block("mine", still, 6, 4)


def test_contexts_that_are_not_finite_are_called_so() -> None:
    with pytest.raises(ValueError, match="contexts: got contexts that are not finite"):
        registry.check_contexts("mine", torch.full((2, 3), torch.nan), (2, 3))


def test_built_in_parts_add_nothing_and_their_names_are_refused() -> None:
    assert registry.source("objective", "published") == ""
    with pytest.raises(cvfp.ParameterError, match="objective: got 'published'"):
        cvfp.objective("published")(mine)


@pytest.mark.parametrize("name", [":f", "nothing:f", "math:nothing", "publishd"])
def test_an_unknown_part_is_refused(name: str) -> None:
    with pytest.raises(cvfp.ParameterError, match="objective: got"):
        tiny_experiment(objective=name)


def test_without_source_a_run_is_not_stored_and_says_so(home: Any) -> None:
    made: dict[str, Any] = {}
    exec(
        "def part(new, old, batch):\n    return (new - old).square().mean(dim=(1, 2)), {}",
        {"__name__": "nowhere"},
        made,
    )
    cvfp.objective("mine")(made["part"])
    experiment = tiny_experiment(objective="mine")
    with pytest.warns(UserWarning, match="objective 'mine': its source"):
        first = cvfp.run(experiment)
    with pytest.warns(UserWarning, match="nor stored"):
        second = cvfp.run(experiment)
    assert not first.from_store
    assert not second.from_store
    assert not (home / "phase1").exists()
    assert not (home / "runs").exists()


def test_a_worker_gets_the_parts_and_their_sources() -> None:
    """A part of a module that no worker can import goes by value; its runs are stored."""
    part = types.FunctionType(mine.__code__, globals(), "mine")
    part.__module__ = "__main__"
    cvfp.objective("mine")(part)
    experiment = tiny_experiment(objective="mine", phase2_epochs=1, phase1_max_iterations=3)
    results = cvfp.sweep(experiment, seed=[1, 2], n_jobs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = cvfp.run(experiment.replace(seed=2))
    assert again.from_store
    assert again.val_ppl == results[1].val_ppl


def test_an_objectives_own_parameters_are_drawn_from_the_seed() -> None:
    cvfp.objective("mine")(Wide)
    table, experiment = torch.zeros(3, 5), tiny_experiment(objective="mine")
    before = torch.random.get_rng_state()
    one, other, third = (registry.build_objective(experiment, 4, table, s)[1][0] for s in (1, 1, 2))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    assert torch.equal(torch.random.get_rng_state(), before)
    cvfp.objective("mine")(int)
    with pytest.raises((cvfp.ParameterError, TypeError)):
        registry.build_objective(experiment, 4, table, 1)
