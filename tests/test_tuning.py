"""Choosing on development conversations: equal trials, a search that finds, no judge."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_experiment
from synthetic import made

import cvfp
from cvfp import Experiment, ParameterError, Result, tuning
from cvfp.analysis import tables
from cvfp.config import HINTS
from cvfp.tuning import CVFP, KINDS, LSTM, RANDOM, SCALED, SHUFFLED, WINDOW

BASE = Experiment(selection="development", samples=100)
RATE, DECAY, DROPOUT = "phase2_learning_rate", "weight_decay", "dropout"
Loss = Callable[[Experiment], float | None]


class Runs:
    """In place of `sweep.runs`: development perplexities by a formula; keeps what was asked for."""

    def __init__(self, loss: Loss, val_ppl: Loss) -> None:
        self.loss, self.val_ppl = loss, val_ppl
        self.asked: list[Experiment] = []

    def __call__(self, given: Sequence[Experiment], n_jobs: int = 1) -> list[Result | None]:
        self.asked += given
        return [self.result(one, self.loss(one)) for one in given]

    def result(self, one: Experiment, loss: float | None) -> Result | None:
        return (
            None if loss is None else made(one.to_dict(), dev_ppl=loss, val_ppl=self.val_ppl(one))
        )


Plant = Callable[..., Runs]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    def put(loss: Loss, val_ppl: Loss = lambda one: None) -> Runs:
        runs = Runs(loss, val_ppl)
        monkeypatch.setattr(tuning, "runs", runs)
        return runs

    return put


def bowl(**least: float) -> Loss:
    """A separable function with its least value there: the squared way in logs of each field."""

    def loss(one: Experiment) -> float:
        ways = [math.log((getattr(one, k) + 1e-3) / (v + 1e-3)) for k, v in least.items()]
        return 100 + sum(way**2 for way in ways)

    return loss


def spread(one: Experiment) -> float:
    """Another loss for each Experiment."""
    fields = (RATE, "phase1_learning_rate", DECAY, DROPOUT, "context_std", "input_std")
    fields += ("token_block_std", "unroll", "window_tokens")
    return 100 + sum(abs(math.log(getattr(one, name) + 0.07)) for name in fields)


# The search


@pytest.mark.parametrize(
    "least", [{RATE: 0.01, DROPOUT: 0.2, DECAY: 0.1}, {RATE: 0.0001, DROPOUT: 0.4, DECAY: 0.3}]
)
def test_search_finds_the_least_of_a_separable_function(
    plant: Plant, least: dict[str, float]
) -> None:
    runs = plant(bowl(**least))
    results, inside = tuning.search(BASE, tuning.axes(list(least), 128), 60)
    best = min(results, key=lambda one: one.dev_ppl or math.inf)
    assert {name: getattr(best.experiment, name) for name in least} == least
    assert inside
    assert len(runs.asked) == len(set(runs.asked)) == 60


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].tuned])
@pytest.mark.parametrize("trials", [1, 2, 3, 12, 25])
def test_every_kind_has_as_many_trials(plant: Plant, kind: str, trials: int) -> None:
    runs = plant(spread)
    tuning.choose(BASE, [100], trials, kinds=[kind])
    assert len(runs.asked) == len(set(runs.asked)) == trials
    fixed = set(HINTS) - set(KINDS[kind].tuned)
    assert len({tuple(getattr(one, name) for name in fixed) for one in runs.asked}) == 1
    for name, value in KINDS[kind].fields.items():
        assert name in KINDS[kind].tuned or getattr(runs.asked[0], name) == value


def test_search_goes_along_one_axis_after_the_other_around_the_best(plant: Plant) -> None:
    runs = plant(bowl(**{RATE: 0.02, DROPOUT: 0.3}))
    tuning.search(BASE.replace(phase2_learning_rate=0.0047), tuning.axes([RATE, DROPOUT], 128), 7)
    assert [(one.phase2_learning_rate, one.dropout) for one in runs.asked] == [
        (0.005, 0.0),  # the nearest
        *((0.01, 0.0), (0.002, 0.0)),
        (0.01, 0.1),  # the other axis: there is nothing under 0
        *((0.02, 0.1), (0.005, 0.1)),
        (0.02, 0.2),  # and 0.0, for which no trial is left
    ]


def along(rates: Mapping[float, float | None]) -> Loss:
    return lambda one: rates.get(one.phase2_learning_rate, 200.0)


ONE = {RATE: [0.001, 0.002, 0.005, 0.01, 0.02]}


@pytest.mark.parametrize(
    ("losses", "trials", "wanted"),
    [
        ({0.002: 100.0}, 3, True),  # begins there, and tries both neighbours
        ({0.002: 100.0}, 2, False),  # one neighbour was not tried
        ({0.005: 100.0}, 3, False),  # its upper neighbour was not
        ({0.005: 100.0}, 4, True),
        ({0.001: 100.0}, 5, False),  # at the end
        ({0.02: 100.0, 0.01: 110.0, 0.005: 120.0}, 5, False),
    ],
)
def test_inside_is_better_than_all_neighbours(
    plant: Plant, losses: dict[float, float | None], trials: int, wanted: bool
) -> None:
    plant(along(losses))
    found = tuning.search(BASE.replace(phase2_learning_rate=0.002), ONE, trials)[1]
    assert found == wanted


def test_nothing_is_less_than_zero(plant: Plant) -> None:
    plant(bowl(**{RATE: 0.002, DECAY: 0.0}))
    results, inside = tuning.search(BASE, tuning.axes([RATE, DECAY], 128), 12)
    assert min(results, key=lambda one: one.dev_ppl or math.inf).experiment.weight_decay == 0
    assert inside
    plant(bowl(**{RATE: 0.002, DECAY: 5.0}))  # the other end is one
    assert not tuning.search(BASE, tuning.axes([RATE, DECAY], 128), 30)[1]


def test_a_run_that_diverged_loses_and_counts_as_tried(plant: Plant) -> None:
    runs = plant(along({0.001: 120.0, 0.002: 100.0, 0.005: None}))
    results, inside = tuning.search(BASE.replace(phase2_learning_rate=0.002), ONE, 3)
    assert inside
    assert len(runs.asked) == 3
    assert [one.experiment.phase2_learning_rate for one in results] == [0.002, 0.001]


def test_a_search_in_which_all_diverged_says_so(plant: Plant) -> None:
    plant(lambda one: None)
    with pytest.raises(FloatingPointError, match="all 3 trials diverged"):
        tuning.choose(BASE, [100], 3, kinds=[RANDOM])


def test_search_refuses_what_is_judged_on_what_it_chose(plant: Plant) -> None:
    runs = plant(spread)
    one = BASE.replace(selection="validation")
    with pytest.raises(ParameterError, match=r"^selection: got 'validation'; .*'development'"):
        tuning.search(one, ONE, 3)
    assert not runs.asked


def test_axes_hold_where_searches_begin_and_what_may_be_run() -> None:
    names = sorted({name for kind in KINDS.values() for name in kind.tuned})
    for width in (16, 128, 768):
        axes = tuning.axes(names, width)
        for name, values in axes.items():
            assert list(values) == sorted(set(values))
            for value in values:
                BASE.replace(**{name: type(getattr(BASE, name))(value)})
        for name, value in tuning.READ["start"].items():
            assert float(f"{value / math.sqrt(width):.3g}") in axes[name][1:-1]
    narrow, wide = tuning.axes(["context_std"], 64), tuning.axes(["context_std"], 256)
    assert [2 * value for value in wide["context_std"]] == pytest.approx(
        narrow["context_std"], 0.01
    )


# The choice


def test_choices_begin_at_the_nearest_sizes(plant: Plant) -> None:
    runs = plant(bowl(**{RATE: 0.02, DECAY: 0.1, "phase1_learning_rate": 0.0005}))
    found = tuning.choose(BASE, [100, 400], 30, kinds=[CVFP])
    chosen = found[CVFP]["100"]["choice"]
    assert chosen == {RATE: 0.02, DECAY: 0.1, "phase1_learning_rate": 0.0005}
    assert all(one.samples == 100 for one in runs.asked[:30])
    second = runs.asked[30]
    assert second.samples == 400
    assert {name: getattr(second, name) for name in chosen} == chosen


def test_a_choice_is_that_of_the_nearest_size_by_ratio() -> None:
    found = {SCALED: {size: {"choice": {RATE: float(size)}} for size in ("100", "1000")}}
    for size, nearest in ((10, 100), (300, 100), (330, 1000), (400, 1000), (9999, 1000)):
        for kind in (SCALED, SHUFFLED):  # which has no choice of its own
            assert tuning.choice(found, kind, size) == {RATE: nearest}
    with pytest.raises(ParameterError, match=f"choices: got .*choices for '{LSTM}'"):
        tuning.choice(found, LSTM, 100)


def test_what_the_file_has_is_taken_from_it(plant: Plant, tmp_path: Path) -> None:
    file, runs = tmp_path / "choices.json", plant(spread)
    kinds = [CVFP, LSTM, SHUFFLED]
    first = tuning.choose(BASE, [100], 4, file=file, kinds=kinds)
    assert len(runs.asked) == 8
    assert tuning.choose(BASE, [100], 4, file=file, kinds=kinds) == first
    assert len(runs.asked) == 8
    more = tuning.choose(BASE, [100], 4, file=file, kinds=[*kinds, WINDOW])
    assert len(runs.asked) == 12
    assert json.loads(file.read_text()) == more == tuning.read(file)
    assert {kind: more[kind] for kind in first} == first
    row = first[LSTM]["100"]
    assert (row["seed"], len(row["trials"])) == (BASE.seed, 4)
    assert row["dev_ppl"] == min(trial["dev_ppl"] for trial in row["trials"])
    assert row["choice"] | {"dev_ppl": row["dev_ppl"]} in row["trials"]
    assert tuning.read(None) == tuning.read(tmp_path / "none.json") == {}


def test_what_was_chosen_before_an_interruption_is_kept(plant: Plant, tmp_path: Path) -> None:
    def loss(one: Experiment) -> float:
        if one.model == "lstm":
            raise KeyboardInterrupt
        return spread(one)

    file = tmp_path / "choices.json"
    plant(loss)
    with pytest.raises(KeyboardInterrupt):
        tuning.choose(BASE, [100], 3, file=file, kinds=[CVFP, WINDOW, LSTM])
    assert set(tuning.read(file)) == {CVFP, WINDOW}


@pytest.mark.parametrize(
    "val_ppl", [lambda one: math.nan, lambda one: 1.0, lambda one: 1000 - spread(one)]
)
def test_validation_is_never_read(plant: Plant, val_ppl: Loss, tmp_path: Path) -> None:
    plant(spread)
    wanted = tuning.choose(BASE, [100, 300], 6)
    plant(spread, val_ppl)
    assert tuning.choose(BASE, [100, 300], 6, file=tmp_path / "choices.json") == wanted


def test_selection_is_development_whatever_the_base_says(plant: Plant) -> None:
    runs = plant(spread)
    tuning.choose(BASE.replace(selection="validation"), [50], 2, kinds=[RANDOM])
    assert {one.selection for one in runs.asked} == {"development"}


def test_a_kinds_experiment_has_its_fields_and_what_it_chose() -> None:
    for kind, one in KINDS.items():
        began = tuning.experiment(BASE, kind)
        changed = {k for k, v in began.to_dict().items() if v != getattr(BASE, k)}
        differs = {k for k, v in one.fields.items() if v != getattr(BASE, k)}
        assert changed == differs | (set(tuning.READ["start"]) & set(one.tuned))
        for name in set(tuning.READ["start"]) & set(one.tuned):
            assert getattr(began, name) == tuning.READ["start"][name] / math.sqrt(BASE.context_dim)
    chosen = tuning.experiment(BASE, WINDOW, window_tokens=4, weight_decay=0.3)
    assert (chosen.contexts, chosen.window_tokens, chosen.weight_decay) == ("window", 4, 0.3)
    assert tuning.experiment(BASE, SHUFFLED, context_std=0.7).context_std == 0.7


def test_table_of_choices(plant: Plant) -> None:
    plant(bowl(**{RATE: 0.002, DECAY: 0.0}))
    found = tuning.choose(BASE, [50, 100], 9, kinds=[RANDOM])
    found |= {WINDOW: {"100": {**found[RANDOM]["100"], "inside": False}}}
    table = tables.choices(found, [100])
    assert table.index.tolist() == [(100, RANDOM), (100, WINDOW)]
    row = table.loc[(100, RANDOM)]
    assert row["trials"] == 9
    assert row["choice"] == f"{RATE} 0.002, {DECAY} 0"
    assert row["PPL, development"] == "100.0"
    assert table.remark.tolist() == ["", "a neighbour was not tried, or there is none"]


# Real runs


def test_runs_has_nothing_for_one_that_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tiny_experiment(contexts="zero"), tiny_experiment(contexts="zero", seed=2)
    module = sys.modules["cvfp.sweep"]
    kept = module.run

    def run(experiment: Experiment, **how: Any) -> Result:
        if experiment.seed == 2:
            raise FloatingPointError("Phase 2 is not finite")
        return kept(experiment, **how)

    monkeypatch.setattr(module, "run", run)
    first, second = tuning.runs([one, other])
    assert second is None
    assert first is not None
    assert first.val_ppl == cvfp.run(one).val_ppl
    with pytest.raises(FloatingPointError):
        cvfp.sweep(one, seed=[2])


def test_a_choice_from_real_runs() -> None:
    base = tiny_experiment(development_samples=3, phase2_epochs=1)
    found = tuning.choose(base, [6], 3, kinds=[tuning.ZERO.format(1)])
    row = found[tuning.ZERO.format(1)]["6"]
    best = min(row["trials"], key=lambda trial: trial["dev_ppl"])
    one = base.replace(contexts="zero", selection="development", **row["choice"])
    assert cvfp.run(one).dev_ppl == best["dev_ppl"] == row["dev_ppl"]
    assert len({tuple(trial.values()) for trial in row["trials"]}) == 3


@pytest.mark.parametrize("trials", [0, -1, 1.5])
def test_trials_that_cannot_be_are_refused(trials: Any) -> None:
    one = Experiment(selection="development")
    with pytest.raises(ParameterError, match="trials"):
        tuning.search(one, {"phase2_learning_rate": [0.001]}, trials)


@pytest.mark.parametrize("content", ["", "null", '{"a": {"6": {}}}', "\x00"])
def test_a_file_that_holds_no_choices_is_named(content: str, tmp_path: Path) -> None:
    file = tmp_path / "choices.json"
    file.write_text(content)
    with pytest.raises(ParameterError, match="choices"):
        tuning.read(file)


def test_choices_of_another_experiment_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Experiment] = []

    def fake(experiments: Any, n_jobs: int = 1) -> list[Any]:
        ran.extend(experiments)
        return [types.SimpleNamespace(experiment=one, dev_ppl=1.0) for one in experiments]

    monkeypatch.setattr(tuning, "runs", fake)
    base, file = Experiment(selection="development", seed=7), tmp_path / "choices.json"
    kinds = [tuning.RANDOM]
    tuning.choose(base, [6], 2, file=file, kinds=kinds)
    count = len(ran)
    tuning.choose(base.replace(seed=8, device="cpu"), [6], 2, file=file, kinds=kinds)
    assert len(ran) == count
    with pytest.raises(ParameterError, match="choices of the same Experiment"):
        tuning.choose(base.replace(context_dim=64), [6], 2, file=file, kinds=kinds)
