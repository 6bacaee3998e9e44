"""Sweeps on a Dask cluster: a scheduler and workers as a user would start them."""

from __future__ import annotations

import dataclasses
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

import cvfp
from cvfp import (
    Experiment,
    ParameterError,
    cluster,
    registry,
    store,
    sweep,
    workers,
)
from cvfp.experiment import prepare
from cvfp.ops import placement
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
    """Equal to the bit, with the same keys; the file of the texts is gone; each Phase 1 is trained
    once; model and record come to the caller's store, where the sweep finds them again."""
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
    monkeypatch.setattr(SWEEP, "_order", lambda jobs, todo: todo)  # not the longest first
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
    other = {**cluster.facts(), "torch": "0"}
    monkeypatch.setattr(cluster, "facts", lambda: other)
    with pytest.raises(ParameterError, match=r"^address: .*torch 0.*tcp\S* has torch"):
        sweep(small, seed=[1], engine="dask", address=address)


def test_a_device_that_no_worker_has_is_refused_by_name(address: str, small: Experiment) -> None:
    with pytest.raises(ParameterError, match=r"^device: got 'cuda'"):
        sweep(small, device=["cpu", "cuda"], engine="dask", address=address)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(engine="ray"), "engine: got 'ray'; accepted: 'loky' or 'dask'"),
        (dict(address="tcp://h:1"), "address: got 'tcp://h:1'; accepted: None, or"),
        (dict(engine="dask", address=3), "address: got 3"),
        (dict(engine="dask", address="tcp://127.0.0.1:9"), "address: got .*a Dask scheduler"),
        (dict(engine="dask", address="nonsense"), "address: got 'nonsense'"),
        (dict(per_device=0.5), "per_device: got 0.5; accepted: an integer"),
        (dict(per_device=-1), "per_device: got -1"),
        (dict(per_device=0), "per_device: got 0"),
        (dict(per_device=True), "per_device: got True"),
        (dict(per_device=2), "per_device: got 2; accepted: 1 or 'auto' where a run is on no"),
        (dict(engine="dask", address="tcp://h:1", per_device="auto"), "per_device: got 'auto'"),
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
    heard = ("heard", "resource_tracker") if dies else ("heard",)  # what was killed leaks
    assert said
    assert all(any(word in line for word in heard) for line in said), ran.stderr


# Which GPU, and in which order


def test_processes_of_a_team_see_one_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    team = workers.Place(f"test-{os.getpid()}", 2)
    seen: list[str] = []
    held: list[Any] = []
    for listed in (None, "1,2,0", "0,1,2", "2,0,1"):  # as dask-cuda lists them
        with monkeypatch.context() as patch:
            patch.setattr(workers, "_held", [])
            if listed:
                patch.setenv("CUDA_VISIBLE_DEVICES", listed)
            else:
                patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            workers.pin(team)
            workers.pin(team)  # keeps it
            seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
            held += workers._held
    assert seen == ["0", "1", "2", "0"]
    assert len(held) == 4
    for one in held:
        one.release()


GIB = 2**30


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(placement, "memory", lambda device: 80 * GIB)


def job(samples: int = 10, phase1: str | None = None, **fields: Any) -> workers.Job:
    one = Experiment(precision="float32", **{"device": "cuda", **fields})
    return workers.Job(one, None, None, (2048, 128, samples * 100), None, phase1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "processes", "share", "wanted"),
    [
        ("cuda", 1, None, (1, 1)),
        ("cuda", 1, 1, (2, 1)),  # one on each
        ("cuda", 6, None, (6, 3)),  # n_jobs is the number in all
        ("cuda", 1, 3, (6, 3)),
        ("cuda", 1, "auto", (16, 8)),
        ("cpu", 1, "auto", (1, 1)),
        ("cpu", 4, 1, (4, 1)),
    ],
)
def test_processes_and_how_many_share_a_gpu(
    device: str, processes: int, share: Any, wanted: tuple[int, int], two_gpus: None
) -> None:
    jobs = [job(device=device)] * 24
    assert SWEEP._side_by_side(jobs, processes, share) == wanted


def test_no_more_processes_than_runs_and_as_many_as_fit(two_gpus: None) -> None:
    assert SWEEP._side_by_side([job()] * 3, 16, 1) == (3, 2)
    large = [job(), *[job(samples=25_000, context_dim=512)] * 23]
    processes, share = SWEEP._side_by_side(large, 1, "auto")
    assert 1 < share < 8
    assert processes == 2 * share
    needed = SWEEP._needed(large[-1])
    assert share * needed <= workers.MEMORY * 80 * GIB < (share + 1) * needed


def test_the_longest_first_but_one_of_each_phase1_before_all(home: Path) -> None:
    jobs = [job(3), job(9, "a"), job(5, "a"), job(4), job(8, "a"), job(7, "b"), job(6, "b")]
    assert SWEEP._order(jobs, [0, 1, 2, 3, 4, 5, 6]) == [1, 5, 3, 0, 4, 6, 2]
    assert SWEEP._order(jobs, [4, 3, 2, 0]) == [4, 3, 0, 2]


def test_what_stored_runs_took_tells_how_long_others_of_their_kind_take(
    home: Path, tiny: Experiment
) -> None:
    result = cvfp.run(tiny.replace(contexts="zero"))
    jobs = [job(10, device="cpu"), job(9, device="cpu", contexts="zero")]
    for seconds, wanted in ((1e-9, [0, 1]), (1e9, [1, 0])):
        result.seconds = {"phase2": seconds}
        other = dataclasses.replace(
            result, key="0" * 20, experiment=tiny.resolved(), seconds={"phase1": 1.0}
        )
        for one in (result, other):
            store.write_run(one.key, one.to_dict())
        assert SWEEP._order(jobs, [0, 1]) == wanted


DAEMON = """#!/bin/sh
echo "$@" $(cat) >> {calls}
exit {code}
"""


@pytest.mark.parametrize("runs_already", [False, True])
def test_mps_is_ended_by_whoever_started_it(
    runs_already: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, calls = tmp_path / "nvidia-cuda-mps-control", tmp_path / "calls"
    program.write_text(DAEMON.format(calls=calls, code=int(runs_already)))
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(sys, "stdin", None)
    with workers.mps():
        assert calls.read_text() == "-d\n"
    assert calls.read_text() == "-d\n" + "quit\n" * (not runs_already)


def test_a_share_of_the_gpus_memory_is_all_a_run_may_have(
    home: Path, tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", parts.append)
    monkeypatch.setattr(workers, "run_one", lambda *_: None)
    monkeypatch.setenv("CVFP_PROGRESS", "none")
    one = tiny.replace(device="cuda")
    for share in (1, 4):
        workers.perform(one, False, registry.own([one]), workers.Place("t", share), 1)
    assert parts == [1.0, workers.MEMORY / 4]


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
    """Twelve runs of `mini` on two workers, each with a home of its own: undisturbed, with each
    Phase 1 trained once for both; and with one killed in the middle, and another that comes. All
    as here, to the bit."""
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
    assert sum(not result.phase1_from_store for result in again) == 6
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
