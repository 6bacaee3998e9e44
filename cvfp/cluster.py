"""A sweep's runs on a Dask cluster: somebody's, or one of this machine that ends with the sweep."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import dask
import tokenizers
import torch
from distributed import Client, LocalCluster, Worker, WorkerPlugin, as_completed, get_worker

from cvfp import cache, embeddings, experiment, store
from cvfp.config import Experiment, ParameterError
from cvfp.data import Data
from cvfp.embeddings import Table
from cvfp.watch import Watch

ONE = {"cvfp": 1}  # run at a time: what a worker has, and a run takes
TIMEOUT = 10  # seconds in which a scheduler must answer


def facts() -> dict[str, str]:
    """What must be the same everywhere, or keys and numbers would not be."""
    code = cache.code_fingerprint(*store.RUN_CODE, "cluster", "registry", "store", "sweep")
    versions = dict(torch=torch.__version__, tokenizers=tokenizers.__version__)
    return {"Python": ".".join(map(str, sys.version_info[:2])), **versions, "code of cvfp": code}


class Takes(WorkerPlugin):
    """Workers that would compute the same take runs, those that come later, too."""

    def __init__(self, wanted: dict[str, str]) -> None:
        self.wanted = wanted

    async def setup(self, worker: Worker) -> None:
        await worker.set_resources(**dict.fromkeys(ONE, float(facts() == self.wanted)))


@contextmanager
def connected(address: str | None, processes: int) -> Iterator[Any]:
    """`finish` for a cluster; `ParameterError`: it cannot be reached, or computes otherwise."""
    at = address = address or os.environ.get("CVFP_ADDRESS") or None
    quiet: dict[str, Any] = dict(silence_logs=logging.CRITICAL, dashboard_address=":0")
    with ExitStack() as held:
        if not at:
            # Dask would have malloc give all back at once, which halves a run's speed.
            held.enter_context(dask.config.set({"distributed.nanny.pre-spawn-environ": {}}))
            threads = max(1, torch.get_num_threads() // processes)
            local = LocalCluster(None, processes, threads, memory_limit=None, **quiet)
            at = held.enter_context(local).scheduler_address
        try:
            client = held.enter_context(Client(at, timeout=TIMEOUT, set_as_default=False))
        except (OSError, ValueError, ImportError) as error:
            accepted = f"the address of a Dask scheduler, such as tcp://host:8786 ({error})"
            raise ParameterError("address", address, accepted) from error
        wanted, said = facts(), client.run(facts, on_error="return")
        differ = {name: one for name, one in said.items() if one != wanted}
        if differ or not said:
            accepted = f"workers that all have {wanted} ({differ or 'it has no workers'})"
            raise ParameterError("address", address, accepted)
        probe = cache.home() / "code" / client.id  # tells a worker that its home is the caller's
        cache.keep(probe, lambda path: path.write_bytes(b"here"))
        held.callback(cache.delete, probe)
        client.register_plugin(Takes(wanted), name=client.id)
        try:
            yield partial(finish, client)
        finally:
            with suppress(Exception):  # the scheduler is gone
                client.unregister_worker_plugin(client.id)


def finish(client: Client, call: Callable[..., Any], jobs: list[Any], how: Any) -> Iterator[Any]:
    """What `call` returns for each run, as they end, begun in their order."""
    sent: dict[str, Any] = {part.fingerprint: part for job in jobs for part in job[3:] if part}
    for name, part in sent.items():  # as a task, which Dask repeats when its worker dies
        sent[name] = client.submit(lambda x: x, part, key=f"{name}-{client.id}", priority=1)
    client.replicate(list(sent.values()))  # before runs take all threads
    futures = {}
    for place, (number, one, key, *parts) in enumerate(jobs):
        reads = [part and sent[part.fingerprint] for part in parts]
        task = f"code/{client.id}", key, *reads, call, number, one, *how
        futures[client.submit(work, *task, resources=ONE, priority=-place, pure=False)] = number
    for future in as_completed(list(futures), loop=client.loop):
        number = futures.pop(future)
        try:
            ended, files = future.result()
        except Exception as error:  # not the run's own, which is returned
            ended, files = (number, f"{type(error).__name__}: {error}", []), {}
        for name, content in files.items():
            cache.keep(cache.home() / name, partial(Path.write_bytes, data=content))
        yield ended


def work(probe: str, key: str, data: Data, table: Table | None, call: Any, *how: Any) -> Any:
    """In a worker: `call`, and what the store then has of the run, unless it is the caller's. The
    run stops when the task is cancelled: at the caller's Ctrl-C, or when the caller is gone."""
    worker = get_worker()
    task = worker.state.tasks[worker.get_current_task()]

    def prepare(one: Experiment, watch: Watch) -> tuple[Data, Table]:
        with watch("data"), watch("table"):
            return data, table or embeddings.load(one, data)

    with ExitStack() as held:
        held.callback(setattr, experiment, "prepare", experiment.prepare)
        setattr(experiment, "prepare", prepare)  # noqa: B010
        ended = call(*how, worker.state.nthreads, watch=lambda row: task.state != "executing")
    home = cache.home()
    names = [f"models/{key}.safetensors", f"runs/{key}.json"] * (not (home / probe).exists())
    return ended, {name: (home / name).read_bytes() for name in names if cache.sound(home / name)}
