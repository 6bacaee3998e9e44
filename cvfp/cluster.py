"""A sweep's runs on a Dask cluster: somebody's, or one of this machine that ends with the sweep.

A task is a run. Dask brings it to a worker, and to another if that dies; along go its data, as the
caller prepared it, and the Phase 1 that the first run with the same one has trained.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from distributed import Client, LocalCluster, Worker, WorkerPlugin, as_completed, get_worker

from cvfp import cache, config, embeddings, estimate, store
from cvfp import experiment as experiment_module
from cvfp.config import Experiment, ParameterError
from cvfp.data import Data
from cvfp.embeddings import Table
from cvfp.result import Result
from cvfp.watch import Watch
from cvfp.workers import Ended, Job, Place, perform, pin

ONE = {"cvfp": 1}  # run at a time: what a worker has, and a run takes
TIMEOUT = 10  # seconds in which a scheduler must answer
ALONE = threading.Lock()  # one also of two callers'
Kind = tuple[str, str]  # device and precision
Files = dict[str, bytes]
Greeting = tuple[dict[str, str], dict[Kind, dict[str, str]], bool]
Done = tuple[Result | str | None, list[Warning], Files]


# In a worker


def facts() -> dict[str, str]:
    """What must be the same everywhere, or keys and numbers would not be."""
    code = cache.code_fingerprint(*store.RUN_CODE, "cluster", "registry", "store", "workers")
    versions = {"torch": torch.__version__, "tokenizers": tokenizers.__version__}
    return {"Python": ".".join(map(str, sys.version_info[:2])), **versions, "code of cvfp": code}


def settle(place: Place) -> None:
    pin(place)
    with suppress(OSError, AttributeError):  # where there is no such function
        # Dask has malloc give all back at once, which halves a run's speed: as glibc would do.
        malloc = ctypes.CDLL(None).mallopt
        malloc(-3, 2**25)
        malloc(-1, 2**26)


def greet(place: Place, kinds: Iterable[Kind], probe: str) -> Greeting:
    """A worker's facts, what devices and precisions become there, and whether its store is the
    caller's."""
    settle(place)
    devices = {kind: config.resolve_device(kind[0]) for kind in kinds}
    became = {
        kind: dict(device=one, precision=config.resolve_precision(kind[1], one))
        for kind, one in devices.items()
    }
    said = {**facts(), "devices": " ".join(sorted(set(devices.values())))}
    return said, became, (cache.home() / probe).exists()


class Team(WorkerPlugin):
    """Workers that would compute the same may take runs, those that come later, too."""

    def __init__(self, wanted: dict[str, str], *how: Any) -> None:
        self.wanted, self.how = wanted, how

    async def setup(self, worker: Worker) -> None:
        fits = greet(*self.how)[0] == self.wanted
        await worker.set_resources(**dict.fromkeys(ONE, float(fits)))


def work(
    one: Experiment,
    data: Data,
    table: Table | None,
    first: Done | None,
    wanted: Sequence[str],
    probe: str,
    how: tuple[bool, bytes, Place],
) -> Done:
    """`perform`, and what the store then has of `wanted`, unless it is the caller's. The run stops
    when the task is cancelled: at the caller's Ctrl-C, or when the caller is gone."""
    worker = get_worker()
    task = worker.state.tasks[worker.get_current_task()]

    def prepare(experiment: Experiment, watch: Watch | None = None) -> tuple[Data, Table]:
        watch = watch or Watch(experiment.device)
        with watch("data"), watch("table"):
            there = table or embeddings.load(experiment, data)
        estimate.check(experiment, data.vocab_size, there.weight.shape[1], len(data.train))
        return data, there

    def stops(row: object) -> bool:
        return task.state != "executing"

    with ALONE:
        keep(first[-1] if first else {})
        before, experiment_module.prepare = experiment_module.prepare, prepare
        try:
            result, said = perform(one, *how, worker.state.nthreads, stops)
        finally:
            experiment_module.prepare = before
    return result, said, {} if (cache.home() / probe).exists() else read(wanted)


def read(names: Iterable[str]) -> Files:
    """Of these files of the store, those that are there."""
    paths = {name: cache.home() / name for name in names}
    return {name: path.read_bytes() for name, path in paths.items() if cache.sound(path)}


def keep(files: Files) -> None:
    """Put files into the store, which keeps what it has."""
    for name, content in files.items():
        if not cache.sound(path := cache.home() / name):
            cache.keep(path, partial(Path.write_bytes, data=content))


def same(value: Any) -> Any:
    """As a task: what is sent once, and again by Dask when the worker that has it dies."""
    return value


# At the caller


@contextmanager
def connected(
    given: Sequence[Experiment],
    place: Place,
    address: str | None,
    processes: int = 1,
    threads: int = 1,
) -> Iterator[Caller]:
    """The cluster of a scheduler that runs, or one of so many workers here. Raises
    `ParameterError`: it cannot be reached, has no workers, or one that would compute otherwise."""
    with ExitStack() as held:
        for log in map(logging.getLogger, ("distributed", "distributed.client")):
            held.callback(log.setLevel, log.level)
            log.setLevel(logging.CRITICAL)  # what matters is said by this module
        held.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Sending large graph", UserWarning)  # a table
        if address is None:
            local: dict[str, Any] = dict(dashboard_address=":0", silence_logs=logging.CRITICAL)
            local |= dict(n_workers=processes, threads_per_worker=threads, memory_limit=None)
            here = held.enter_context(LocalCluster(**local)).scheduler_address
        try:
            client = held.enter_context(
                Client(address or here, timeout=TIMEOUT, set_as_default=False)
            )
        except (OSError, ValueError, ImportError) as error:
            accepted = "the address of a Dask scheduler that runs, such as tcp://host:8786"
            raise ParameterError("address", address, f"{accepted} ({error})") from error
        probe = f"code/{client.id}"
        cache.keep(cache.home() / probe, lambda path: path.write_bytes(b"here"))
        held.callback(cache.delete, cache.home() / probe)
        kinds = [(one.device, one.precision) for one in given]
        how = place, set(kinds), probe
        said: dict[str, Any] = client.run(greet, *how, on_error="return")
        greeted = [one for one in said.values() if isinstance(one, tuple)]
        wanted = facts() | ({"devices": greeted[0][0]["devices"]} if greeted else {})
        why = []
        for name, one in said.items():
            if isinstance(one, ParameterError):
                raise one  # such as a device that is not there
            there = one[0] if isinstance(one, tuple) else {"error": repr(one)}
            differs = [f"{k} {v}" for k, v in there.items() if v != wanted.get(k)]
            why += [f"{name} has {', '.join(differs)}"] if differs else []
        if why or not said:
            have = ", ".join(f"{name} {value}" for name, value in wanted.items())
            words = "; ".join(why) or "it has no workers"
            accepted = f"a cluster whose workers all have {have} ({words})"
            raise ParameterError("address", address, accepted)
        client.register_plugin(Team(wanted, *how), name=probe)
        try:
            became = greeted[0][1]
            experiments = [one.replace(**became[k]) for one, k in zip(given, kinds, strict=True)]
            yield Caller(client, place, probe, experiments, all(one[-1] for one in greeted))
        finally:
            with suppress(Exception):  # the scheduler is gone
                client.unregister_worker_plugin(probe)


class Caller(NamedTuple):
    """A cluster, as one sweep sees it: its Experiments, with devices and precisions of the workers;
    whether these all have the caller's store."""

    client: Client
    place: Place
    probe: str
    experiments: list[Experiment]
    shared: bool

    def finish(self, jobs: dict[int, Job], gives_up: bool, own: bytes) -> Iterator[Ended]:
        """The runs as they end, begun in their order; those left when `connected` ends,
        Dask cancels."""
        sent: dict[str, Any] = {}
        firsts: dict[str, Any] = {}  # by Phase 1: who has it, or will
        runs: dict[Any, int] = {}
        sharing = Counter(job.phase1 for job in jobs.values())

        def send(key: str, value: Any) -> Any:
            if key not in sent:
                name = f"same-{key}-{self.client.id}"
                sent[key] = self.client.submit(same, value, key=name, priority=1)
            return sent[key]

        for job in jobs.values():
            send(job.data.fingerprint, job.data)
            if job.table:
                send(job.table.fingerprint, job.table)
            if job.phase1 and not self.shared and (there := read(phase1_files(job))):
                firsts[job.phase1] = send(job.phase1, (None, [], there))
        self.client.replicate(list(sent.values()))  # before runs take all threads
        for place, (number, job) in enumerate(jobs.items()):
            wanted = [f"runs/{job.key}.json", f"models/{job.key}.safetensors"]
            wanted += phase1_files(job) if sharing[job.phase1] > 1 else []
            table = job.table and sent[job.table.fingerprint]
            reads = sent[job.data.fingerprint], table, firsts.get(job.phase1 or "")
            given: dict[str, Any] = dict(resources=ONE, priority=-place, pure=False)
            task = job.experiment, *reads, wanted, self.probe, (gives_up, own, self.place)
            future = self.client.submit(work, *task, **given)
            runs[future] = number
            if job.phase1 and sharing[job.phase1] > 1:
                firsts.setdefault(job.phase1, future)
        for future in as_completed(list(runs), loop=self.client.loop):
            number = runs.pop(future)
            try:
                result, said, there = future.result()
            except Exception as error:  # not the run's own, which is returned
                result, said, there = f"{type(error).__name__}: {error}", [], {}
            sharing[jobs[number].phase1] -= 1
            if not sharing[jobs[number].phase1]:  # results stay at a worker until released
                firsts.pop(jobs[number].phase1 or "", None)
            keep(there)
            yield number, result, said


def phase1_files(job: Job) -> list[str]:
    return [f"phase1/{job.phase1}.{end}" for end in ("safetensors", "npy")] if job.phase1 else []
