"""Runs that are killed or stopped go on where they were, and end with the same numbers."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cvfp
from cvfp import Experiment, ParameterError, Result, cache, checkpoint, data, embeddings
from cvfp.model import ContextBlock

FORK = multiprocessing.get_context("fork")
Row = dict[str, float]
Tally = Callable[..., None]


class Counts(nn.Module):
    """With parameters of its own, and a buffer that the losses depend on."""

    calls: Tensor

    def __init__(self, experiment: Experiment, context_dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(context_dim, embedding_dim)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, new: Tensor, old: Tensor, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        missed = (self.map(new) - batch.embeddings()).square().mean(dim=(1, 2))
        return missed / self.calls + (new - old).square().mean(dim=(1, 2)), {}


class Counting(ContextBlock):
    """With a buffer that the outputs depend on."""

    seen: Tensor

    def __init__(self, experiment: Experiment, input_dim: int) -> None:
        super().__init__(experiment.num_layers, experiment.context_dim, input_dim, True)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, context: Tensor, inputs: Tensor) -> list[Tensor]:
        if self.training and torch.is_grad_enabled():
            self.seen += 1e-3
        return super().forward(context + self.seen.clone(), inputs)


SETTINGS: dict[str, dict[str, Any]] = {
    "published": {},
    "bfloat16": {"precision": "bfloat16"},
    "groups": {"loss_group": 90, "training_contexts": "exact"},
    "all trained": {"weight_tying": False, "freeze_embedding": False},
    "own objective": {"objective": f"{__name__}:Counts"},
    "shuffled": {"contexts": "shuffled"},
    "end to end": {"contexts": "end_to_end"},
    "own block, end to end": {"block": f"{__name__}:Counting", "contexts": "end_to_end"},
    "lstm": {"model": "lstm"},
    "dropped": {
        "model": "lstm",
        "dropout": 0.3,
        "weight_decay": 0.1,
        "selection": "development",
        "development_samples": 2,
    },
    "dropped, end to end": {"contexts": "end_to_end", "dropout": 0.3},
    "transformer": {"model": "transformer", "num_layers": 4, "context_dim": 32},
}


UNROLLED = ("end to end", "own block, end to end", "lstm", "transformer")
UNROLLED += ("dropped", "dropped, end to end")


@pytest.fixture(autouse=True)
def after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "TIMES", 0)


@pytest.fixture
def fresh_home(tiny: Experiment, home: Path) -> Iterator[Path]:
    """An empty home, its corpus and table read; nothing of it is remembered after the test."""
    yield home
    data._load.cache_clear()
    embeddings._table.cache_clear()


def numbers(result: Result) -> Any:
    record = result.to_dict()
    for incidental in ("seconds", "peak_memory_mib", "phase1_from_store"):
        del record[incidental]
    return record


def states() -> list[Path]:
    return sorted((cache.home() / "checkpoints").glob("[!.]*"))


def weights(result: Result) -> dict[str, Tensor]:
    return result.model().state_dict()


def rows(experiment: Experiment) -> tuple[Result, list[Row]]:
    """An undisturbed run, and what it told its watcher."""
    told: list[Row] = []
    result = cvfp.run(experiment, reuse=False, watch=told.append)
    assert not states()
    return result, told


def forget(key: str) -> None:
    """As if the run had not been made."""
    for path in [*cache.home().glob("phase1/*"), *cache.home().glob(f"*/{key}*")]:
        cache.delete(path)


def killed(experiment: Experiment, at: int) -> None:
    """A process of its own runs it, and is killed when it tells its row number `at`."""
    told = 0

    def watch(row: Row) -> None:
        nonlocal told
        told += 1
        if told == at:
            os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=cvfp.run, args=(experiment,), kwargs={"watch": watch})
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def run_logged(experiment: Experiment, log: Path) -> None:
    """A line for every step that is taken."""
    taken = checkpoint.Checkpoint.tell

    def tell(self: checkpoint.Checkpoint, row: Row) -> None:
        with log.open("a") as file:
            file.write("step\n")
        taken(self, row)

    checkpoint.Checkpoint.tell = tell  # type: ignore[method-assign]
    cvfp.run(experiment)


def check_kill(experiment: Experiment, at: int, tally: Tally) -> None:
    whole, told = rows(experiment)
    trained = weights(whole)
    forget(whole.key)
    killed(experiment, at)
    first_sweeps = len(whole.phase1_history)
    # A row is told before its state is kept; nothing is kept of the first of either phase.
    kept = at - 1 if at <= first_sweeps else at - 1 - first_sweeps
    assert len(states()) == (kept > 0)
    done: list[Row] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = cvfp.run(experiment, watch=done.append)
    assert not again.from_store
    assert numbers(again) == numbers(whole)
    assert all(torch.equal(one, trained[name]) for name, one in weights(again).items())
    assert not states()
    # Every row once, those of the dead process too; a Phase 1 from the store tells none.
    assert done == (told if at <= first_sweeps else told[first_sweeps:])
    # Of what was kept, only the step that was under way is done again.
    tally("kills of a run", tried=1, after_a_checkpoint=int(kept > 0), steps_done_again=1)


@pytest.mark.parametrize("at", [2, 3, 5, 6, 7])
def test_a_killed_run_goes_on(at: int, tiny: Experiment, fresh_home: Path, tally: Tally) -> None:
    check_kill(tiny, at, tally)


@pytest.mark.parametrize(
    ("setting", "at"),
    [
        *(
            (name, 2)
            for name in ("own objective", "all trained", "own block, end to end", "dropped")
        ),
        *(
            pytest.param(name, at, marks=pytest.mark.full)
            for name in SETTINGS
            for at in (2, 4, 7)
            if at == 2 or name not in UNROLLED
        ),
    ],
)
def test_any_killed_run_goes_on(
    setting: str, at: int, tiny: Experiment, fresh_home: Path, tally: Tally
) -> None:
    check_kill(tiny.replace(**SETTINGS[setting]), at, tally)


@pytest.mark.full
def test_a_run_that_is_killed_at_any_moment_goes_on(
    tiny: Experiment, fresh_home: Path, tally: Tally
) -> None:
    longer = tiny.replace(phase1_max_iterations=20, phase2_epochs=12, phase2_batch_size=64)
    whole, told = rows(longer)
    forget(whole.key)
    draw, kills, after, again = random.Random(0), 0, 0, 0
    log = fresh_home / "log"
    while True:
        process = FORK.Process(target=run_logged, args=(longer, log))
        process.start()
        process.join(0.05 + 0.5 * draw.random())
        if process.exitcode == 0:
            break
        process.kill()
        process.join()
        kills += 1
        after += len(states()) > 0
    assert numbers(cvfp.run(longer)) == numbers(whole)
    again = len(log.read_text().splitlines()) - len(told)
    assert kills > 5
    tally("kills of a run", tried=kills, after_a_checkpoint=after, steps_done_again=again)


def test_the_best_epoch_of_a_dead_process_counts(tiny: Experiment, fresh_home: Path) -> None:
    settings = dict(phase2_learning_rate=0.03, phase2_batch_size=64, phase2_epochs=5)
    overshooting = tiny.replace(**settings, phase2_patience=3)
    whole, _ = rows(overshooting)
    assert whole.best_epoch < 5  # the dead process had it
    forget(whole.key)
    cvfp.run(overshooting, watch=lambda row: row["phase"] == 1 and row["iteration"] == 6)
    killed(overshooting, 5)
    again = cvfp.run(overshooting)
    assert numbers(again) == numbers(whole)
    assert all(torch.equal(one, weights(whole)[name]) for name, one in weights(again).items())


# Stopped by its watcher


def stop_after(count: int, told: list[Row]) -> Any:
    def watch(row: Row) -> bool:
        told.append(row)
        return len(told) == count

    return watch


@pytest.mark.parametrize("at", [1, 3, 5, 6, 7])
def test_a_stopped_run_is_partial_and_goes_on(at: int, tiny: Experiment, fresh_home: Path) -> None:
    whole, told = rows(tiny)
    sweeps, epochs = len(whole.phase1_history), len(whole.phase2_history)
    assert (sweeps, epochs) == (5, 2)
    forget(whole.key)
    seen: list[Row] = []
    stopped = cvfp.run(tiny, watch=stop_after(at, seen))
    assert seen == told[:at]
    # What was stopped after its last step is whole.
    assert stopped.partial == (at < sweeps + epochs)
    assert len(states()) == (at not in (sweeps, sweeps + epochs))
    assert ("stopped before its end" in stopped.warnings) == stopped.partial
    assert stopped.phase1_history == whole.phase1_history[:at]
    assert stopped.val_er is not None
    if at <= sweeps:
        assert stopped.val_ppl is None
        assert stopped.phase2_history == []
    else:
        assert stopped.phase2_history == whole.phase2_history[: at - sweeps]
        assert stopped.val_ppl == min(row["val_ppl"] for row in stopped.phase2_history)
    assert (cache.home() / "runs" / f"{whole.key}.json").exists() == (not stopped.partial)
    again = cvfp.run(tiny)
    assert again.from_store == (not stopped.partial)
    assert numbers(again) == numbers(whole)
    assert not states()
    assert again.partial is False


def test_a_stop_in_an_unrolled_run(tiny: Experiment, fresh_home: Path) -> None:
    unrolled = tiny.replace(contexts="end_to_end")
    whole, _ = rows(unrolled)
    forget(whole.key)
    stopped = cvfp.run(unrolled, watch=lambda row: True)
    assert stopped.partial
    assert stopped.val_ppl == whole.phase2_history[0]["val_ppl"]
    assert numbers(cvfp.run(unrolled)) == numbers(whole)


def test_what_is_no_watcher_is_refused_at_once(tiny: Experiment, fresh_home: Path) -> None:
    with pytest.raises(ParameterError, match="watch: got 5; accepted: a function of a row"):
        cvfp.run(tiny, watch=5)  # type: ignore[arg-type]
    assert not fresh_home.exists()


def test_what_a_watcher_raises_reaches_the_caller(tiny: Experiment, fresh_home: Path) -> None:
    def watch(row: Row) -> None:
        if row["phase"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cvfp.run(tiny, watch=watch)
    result = cvfp.run(tiny)
    assert result.phase1_from_store
    assert not result.from_store


# What is kept


def test_plain_runs_keep_no_state(tiny: Experiment, fresh_home: Path) -> None:
    plain = tiny.replace(ops="plain")
    killed(plain, 4)
    assert not states()
    assert cvfp.run(plain).val_ppl == cvfp.run(plain, reuse=False).val_ppl


def test_a_damaged_state_is_told_and_the_loop_starts_anew(
    tiny: Experiment, fresh_home: Path
) -> None:
    whole, _ = rows(tiny)
    forget(whole.key)
    killed(tiny, 4)
    (state,) = states()
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{state}: damaged"):
        assert numbers(cvfp.run(tiny)) == numbers(whole)


def test_training_again_takes_no_state_up(tiny: Experiment, fresh_home: Path) -> None:
    whole, told = rows(tiny)
    forget(whole.key)
    killed(tiny, 4)
    assert states()
    seen: list[Row] = []
    again = cvfp.run(tiny, reuse=False, watch=stop_after(1, seen))
    assert again.partial
    assert seen == told[:1]


def test_states_are_kept_only_as_often_as_pays(
    tiny: Experiment, fresh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 1000.0)
    whole, _ = rows(tiny)
    forget(whole.key)
    killed(tiny, 4)
    assert not states()
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "TIMES", 10**9)
    killed(tiny, 5)
    assert numbers(cvfp.run(tiny)) == numbers(whole)


def test_states_have_a_limit(
    tiny: Experiment, fresh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tiny, tiny.replace(seed=1)
    killed(first, 3)
    (state,) = states()
    os.utime(state, (1, 1))
    size = state.stat().st_size
    monkeypatch.setattr(checkpoint, "BYTES", size + size // 2)
    killed(second, 3)
    (left,) = states()
    assert left.name != state.name
    assert not cache.checksum_file(state).exists()
    monkeypatch.setattr(checkpoint, "BYTES", size // 2)
    killed(tiny.replace(seed=2), 3)
    assert states() == [left]


def test_seconds_of_the_dead_count(tiny: Experiment, fresh_home: Path) -> None:
    stopped = cvfp.run(tiny, watch=lambda row: row["phase"] == 1 and row["iteration"] == 4)
    before = stopped.seconds["phase1"]
    assert cvfp.run(tiny).seconds["phase1"] > before


def test_a_state_that_cannot_be_deleted_loses_no_result(
    tiny: Experiment, fresh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tiny, 4)
    (state,) = states()
    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path == state:
            raise PermissionError("read-only")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    assert cvfp.run(tiny).val_ppl is not None


def test_a_stopped_run_is_read_as_such(tiny: Experiment, fresh_home: Path) -> None:
    stopped = cvfp.run(tiny, watch=lambda row: row["phase"] == 1 and row["iteration"] == 3)
    said = cvfp.analysis.readings.quickstart(stopped)
    assert said == "**Phase 1** was given up at iteration 3: stopped by hand."
