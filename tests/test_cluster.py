"""Sweeps on a Dask cluster: a scheduler and workers as a user would start them."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch

from cvfp import Experiment, ParameterError, cluster, registry, sweep
from cvfp.experiment import prepare
from cvfp.progress import Whole

RATES = [0.001, 0.002]
SWEEP: Any = sys.modules["cvfp.sweep"]
Start = Callable[..., "subprocess.Popen[bytes]"]


@contextmanager
def programs(folder: Path) -> Iterator[tuple[str, Start]]:
    """A scheduler's address, and a function that starts a worker with a home and threads."""
    file = Path(tempfile.mkdtemp(dir=folder), "scheduler.json")
    with ExitStack() as held:

        def start(program: str, *words: str, home: Path | None = None) -> Any:
            command = [sys.executable, "-m", f"distributed.cli.dask_{program}", *words]
            command += ["--scheduler-file", str(file), "--host", "127.0.0.1"]
            there = {**os.environ, "CVFP_HOME": str(home)}
            quiet: dict[str, Any] = dict.fromkeys(["stdout", "stderr"], subprocess.DEVNULL)
            process = subprocess.Popen(command, cwd=folder, env=there, **quiet)
            held.callback(process.wait)
            held.callback(process.kill)
            return process

        def worker(home: Path, threads: int = 1, *words: str) -> Any:
            words = ("--nthreads", str(threads), "--memory-limit", "0", *words)
            return start("worker", *words, "--no-nanny", home=home)

        start("scheduler", "--port", "0", "--dashboard-address", ":0")
        with distributed.Client(scheduler_file=str(file), timeout=30, set_as_default=False) as c:
            address = c.scheduler.address
        yield address, worker


def joined(address: str, count: int) -> None:
    with distributed.Client(address, set_as_default=False) as client:
        client.wait_for_workers(count, timeout=60)


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Start]]:
    with programs(tmp_path_factory.mktemp("dask")) as started:
        yield started


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worker's home, which is not the caller's."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def address(scheduler: tuple[str, Start], elsewhere: Path) -> str:
    """Of a cluster with one worker of one thread."""
    scheduler[1](elsewhere)
    joined(scheduler[0], 1)
    return scheduler[0]


@pytest.fixture(scope="module")
def small(tiny: Experiment) -> Experiment:
    return tiny.replace(samples=3, validation_samples=2, phase2_epochs=1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, small: Experiment) -> Path:
    """A home with the table and tokens of `small`, and no run."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVFP_HOME", str(folder))
        prepare(small.resolved())
    return folder


@pytest.fixture
def home(home: Path, prepared: Path) -> Path:
    shutil.copytree(prepared, home)
    return home


def names(home: Path, kind: str) -> set[str]:
    return {path.name for path in (home / kind).glob("[!.]*")}


def test_a_scheduler_without_workers_is_refused_by_name(
    scheduler: tuple[str, Start], home: Path, small: Experiment
) -> None:
    """First: the other tests' worker comes later."""
    with pytest.raises(ParameterError, match=r"^address: got 'tcp.*it has no workers"):
        sweep(small, seed=[1], engine="dask", address=scheduler[0])


def test_a_worker_with_a_home_of_its_own_gives_what_this_process_gives(
    address: str,
    home: Path,
    elsewhere: Path,
    small: Experiment,
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Equal to the bit, with the same keys; each Phase 1 is trained once; model and record come
    to the caller's store, where the sweep finds them again."""
    grid: dict[str, Any] = dict(phase2_learning_rate=RATES)
    there = sweep(small, **grid, engine="dask", address=address)
    assert sorted(one.phase1_from_store for one in there) == [False, True]
    assert names(home, "models") == {f"{one.key}.safetensors" for one in there}
    assert names(home, "runs") == names(elsewhere, "runs")
    assert {f"{one.key}.json" for one in there} == names(home, "runs")
    assert all(one.from_store for one in sweep(small, **grid, engine="dask", address=address))
    assert not list((home / "code").glob("Client*"))
    monkeypatch.setenv("CVFP_HOME", str(shutil.copytree(prepared, tmp_path / "here")))
    here = sweep(small, **grid)
    assert [(one.key, one.val_ppl) for one in here] == [(one.key, one.val_ppl) for one in there]
    for one, other in zip(there, here, strict=True):
        assert one.seconds.keys() == other.seconds.keys()


PART = """
import warnings, cvfp, helping
@cvfp.objective("far")
def far(new, old, batch):
    return helping.loss(new, old, batch.experiment.seed, {path!r}), {{}}
"""
HELPING = """
import warnings
def loss(new, old, seed, path):
    with open(path, "a") as file:
        file.write(f"{seed}")
    print("a print")
    if seed == 2:
        raise LookupError("no loss")
    warnings.warn("a warning")
    return (new - old).square().mean(dim=(1, 2))
"""


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An own objective in a file that is only here, with a helper in another; it writes seeds."""
    calls = tmp_path / "calls.txt"
    (tmp_path / "farther.py").write_text(PART.format(path=str(calls)))
    (tmp_path / "helping.py").write_text(HELPING)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield calls
    for name in ("farther", "helping"):
        sys.modules.pop(name, None)
    registry.PARTS["objective"].pop("far", None)


@pytest.mark.parametrize("registered", [True, False])
def test_own_parts_go_by_value_and_a_failed_run_is_told_beside_the_finished(
    address: str, home: Path, small: Experiment, far: Path, registered: bool
) -> None:
    """Tried twice; what the worker warns of is heard."""
    if registered:
        importlib.import_module("farther")
    one = small.replace(objective="far" if registered else "farther:far", phase1_max_iterations=3)
    seeds = [1, 2, 3 + registered]
    with (
        pytest.warns(UserWarning, match="a warning"),
        pytest.raises(RuntimeError, match=r"^1 of 3 runs failed.*: seed=2: LookupError: no loss"),
    ):
        sweep(one, seed=seeds, engine="dask", address=address)
    assert len(names(home, "runs")) == 2
    calls = far.read_text()
    assert calls.count("2") == 2


def test_ctrl_c_keeps_what_is_finished_and_leaves_the_cluster_idle(
    address: str, home: Path, small: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Whole, "finish", interrupt)
    monkeypatch.setattr(
        SWEEP, "_order", lambda todo: [one[2] for one in todo]
    )  # not the longest first
    long = small.replace(phase2_epochs=50_000, phase2_patience=50_000)
    with pytest.raises(KeyboardInterrupt):
        SWEEP.runs(
            [small.replace(seed=21), long.replace(seed=22), long.replace(seed=23)],
            engine="dask",
            address=address,
        )
    assert len(names(home, "runs")) == 1
    with distributed.Client(address, set_as_default=False) as client:
        for _ in range(100):
            tasks = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.tasks))
            busy = client.run(lambda dask_worker: dask_worker.state.executing_count)
            if not tasks and not any(busy.values()):
                break
            time.sleep(0.1)
    assert tasks == []
    assert list(busy.values()) == [0]


def test_a_worker_of_other_code_is_refused_by_name(
    address: str, small: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "0")
    with pytest.raises(ParameterError, match=r"^address: .*'torch': '0'.*tcp.*'torch': '2"):
        sweep(small, seed=[1], engine="dask", address=address)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(engine="ray"), "engine: got 'ray'; accepted: 'loky' or 'dask'"),
        (dict(address="tcp://h:1"), "address: got 'tcp://h:1'; accepted: None, or"),
        (dict(engine="dask", address=3), "address: got 3"),
        (dict(engine="dask", address="tcp://127.0.0.1:9"), "address: got .*a Dask scheduler"),
        (dict(engine="dask", address="nonsense"), "address: got 'nonsense'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    given: dict[str, Any], message: str, home: Path, small: Experiment, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cluster, "TIMEOUT", 1)
    with pytest.raises(ParameterError, match=f"^{message}"):
        sweep(small, seed=[1], **given)
    assert not (home / "runs").exists()


def test_without_dask_it_says_how_to_install_it(
    small: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "cvfp.cluster")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ParameterError, match=r"^engine: got 'dask'.*pip install distributed"):
        sweep(small, seed=[1], engine="dask")


HERE = """
import distributed, os, warnings, cvfp, psutil
@cvfp.objective("mine")
def mine(new, old, batch):
    print("printed")
    warnings.warn("heard")
    with open("calls", "a") as file:
        file.write(f"{os.getpid()} {distributed.get_worker().state.executing_count}\\n")
    if batch.experiment.seed == 2 and not os.path.exists("died"):
        open("died", "w").close()
        os.kill(os.getpid(), 9)
    return (new - old).square().mean(dim=(1, 2)), {}
if __name__ == "__main__":
    results = cvfp.sweep(cvfp.Experiment(**OPTIONS), seed=[1, 2, 3])
    print([one.threads for one in results], [one.from_store for one in results])
    children = psutil.Process().children(recursive=True)
    print([one.cmdline() for one in children if "resource_tracker" not in str(one.cmdline())])
"""


@pytest.mark.parametrize("dies", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_cluster_of_this_machine_ends_with_the_sweep_and_prints_nothing(
    dies: bool, home: Path, small: Experiment, tmp_path: Path
) -> None:
    """As the environment asks for it; a worker of two threads has one run at a time, which has
    both; one that the second run kills comes again."""
    if not dies:
        (tmp_path / "died").touch()
    options = {**small.to_dict(), "objective": "mine", "phase1_max_iterations": 5}
    (tmp_path / "script.py").write_text(f"OPTIONS = {options!r}\n{HERE}")
    there = {**os.environ, "CVFP_ENGINE": "dask", "CVFP_PROGRESS": "lines", "OMP_NUM_THREADS": "2"}
    ran = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=there, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["[2, 2, 2] [False, False, False]", "[]"]
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert {count for _, count in calls} == {"1"}
    assert len({process for process, _ in calls}) == 1 + dies
    said = [line for line in ran.stderr.splitlines() if not line.startswith(("Sweep: ", "Table: "))]
    heard = ["heard", "cvfp.sweep(", *["resource_tracker"] * dies]  # what was killed leaks
    assert said
    assert all(any(word in line for word in heard) for line in said), ran.stderr


# In which order


def test_the_longest_first_but_one_of_each_phase1_before_all() -> None:
    kinds = [(3, "c"), (9, "a"), (5, "a"), (4, "d"), (8, "a"), (7, "b"), (6, "b")]
    jobs = [(*kind, [number]) for number, kind in enumerate(kinds)]
    assert SWEEP._order(jobs) == [[1], [5], [3], [0], [4], [6], [2]]
    assert SWEEP._order([jobs[number] for number in (4, 3, 2, 0)]) == [[4], [3], [0], [2]]


def test_processes_of_joblib_tell_a_failed_run_beside_the_finished(
    small: Experiment, tmp_path: Path, far: Path
) -> None:
    importlib.import_module("farther")
    one = small.replace(objective="far", phase1_max_iterations=3)
    with (
        pytest.warns(UserWarning, match="a warning"),
        pytest.raises(RuntimeError, match=r"^1 of 2 runs failed.*: seed=2: LookupError: no loss"),
    ):
        sweep(one, seed=[2, 31], n_jobs=2)
    assert sweep(one, seed=[31])[0].from_store


# What takes long


TWELVE: dict[str, Any] = dict(seed=[1, 2, 3, 4, 5, 6], phase2_learning_rate=RATES)


@pytest.mark.full
def test_a_worker_that_dies_loses_nothing_and_one_that_comes_takes_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve runs of `mini` on two workers, each with a home of its own: undisturbed; and with one
    killed in the middle, and another that comes. All as here, to the bit."""
    one = Experiment.preset("mini", samples=15, phase2_epochs=2, device="cpu", precision="float32")

    def run(name: str, **where: Any) -> list[Any]:
        monkeypatch.setenv("CVFP_HOME", str(tmp_path / name))
        return [(r.key, r.val_ppl, r.from_store) for r in sweep(one, **TWELVE, **where)]

    here = run("here")
    with programs(tmp_path) as (address, worker):
        for number in (1, 2):
            worker(tmp_path / f"undisturbed {number}", 1)
        joined(address, 2)
        assert run("undisturbed", engine="dask", address=address) == here
    again = sweep(one, **TWELVE)
    assert all(result.from_store for result in again)
    with programs(tmp_path) as (address, worker):
        processes = [worker(tmp_path / f"there {number}", 1) for number in (1, 2)]
        joined(address, 2)
        finish, count = Whole.finish, 0

        def disturb(*given: Any) -> None:
            nonlocal count
            finish(*given)
            count += 1
            if count == 3:
                os.kill(processes[0].pid, signal.SIGKILL)
                processes.append(worker(tmp_path / "there 3", 1))

        monkeypatch.setattr(Whole, "finish", disturb)
        assert run("disturbed", engine="dask", address=address) == here
        assert processes[0].poll() == -signal.SIGKILL
        assert names(tmp_path / "there 3", "runs")
