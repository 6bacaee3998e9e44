"""Many Experiments, one after the other or side by side: here, or on a Dask cluster."""

from __future__ import annotations

import importlib
import itertools
import os
import traceback
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import partial
from typing import Any

import joblib
import torch

from cvfp import distributed, registry, store
from cvfp.build import build
from cvfp.config import Experiment, ParameterError, plain
from cvfp.data import load
from cvfp.experiment import prepare, run
from cvfp.progress import Whole
from cvfp.result import Result, Results


def sweep(
    experiment: Experiment,
    *,
    n_jobs: int = 1,
    engine: str | None = None,
    address: str | None = None,
    **grid: Iterable[Any],
) -> Results:
    """Run every combination of the grid's values, the last field varying fastest.

    Finished runs come from the store, and every run is stored as it ends, so that an interrupted
    sweep goes on where it stopped. Side by side, a run that fails is tried once more, and the
    others go on: RuntimeError at the end names the failed.

    Args:
        n_jobs: processes, as joblib counts them (-1: one for each core); each has its share of the
            cores. Seconds measured with more than one are those of processes that compete.
        engine: "loky", joblib's processes; or "dask", a cluster. None: `CVFP_ENGINE`, or "loky".
        address: of the cluster's scheduler, whose workers are all used; None: `CVFP_ADDRESS`, or
            a cluster of `n_jobs` workers on this machine, for this sweep (docs/scale.md).
        grid: fields of the Experiment, each with the values to run.

    Raises `ParameterError` before the first run starts, for any: an unknown field, a bad value, a
    size that exceeds the corpus, a cluster or a peer that cannot be (own blocks: ValueError)."""
    lists: dict[str, list[Any]] = {}
    for name, values in grid.items():
        lists[name] = list(values) if isinstance(values, Iterable) else []
        if isinstance(values, str) or not lists[name]:
            raise ParameterError(name, values, "a list of at least one value")
    combinations = (dict(zip(grid, one, strict=True)) for one in itertools.product(*lists.values()))
    given = [experiment.replace(**one) for one in combinations]
    return Results(_runs(given, tuple(grid), False, n_jobs, engine=engine, address=address))


def runs(experiments: Sequence[Experiment], n_jobs: int = 1, **where: Any) -> list[Result | None]:
    """Run these Experiments, as `sweep` does; None for one whose training diverged."""
    return _runs(experiments, (), True, n_jobs, **where)


def _runs(
    given: Sequence[Experiment], shown: Sequence[str], gives_up: bool, n_jobs: int, **where: Any
) -> list[Any]:
    jobs = plain(n_jobs)
    if type(jobs) is not int or jobs == 0:
        raise ParameterError("n_jobs", n_jobs, "an integer of at least 1, or -1 for all cores")
    jobs = joblib.effective_n_jobs(jobs)
    connect = _cluster(**where)
    if (jobs > 1 or connect) and distributed.ranks().size > 1:
        raise ParameterError("n_jobs", n_jobs, "1 under torchrun, whose processes share each run")
    with warnings.catch_warnings(), ExitStack() as held:
        # Workers that idle between short runs are started again: no news to a reader.
        warnings.filterwarnings("ignore", "A worker stopped while|Sending large", UserWarning)
        finish = held.enter_context(connect(jobs)) if connect else None
        experiments = [one.resolved() for one in given]
        # What sizes left alone become with the largest holds for all, or they could not be compared
        most: dict[str, int] = {}
        for one in experiments:
            most[one.dataset] = max(one.samples, most.get(one.dataset, 0))
        sizes = [load(one.replace(samples=most[one.dataset])).sizes for one in experiments]
        experiments = [one.settled(size) for one, size in zip(experiments, sizes, strict=True)]
        todo: dict[int, Any] = {}
        for number, one in enumerate(experiments):
            data, table = prepare(one)
            if one.model != "cvfp" or one.block != "published":
                build(one, table.weight, data.tokenizer)
            made_of = one.settled(data.sizes), data.fingerprint, table.fingerprint
            key = store.key(*made_of)
            if (finish or jobs > 1) and store.read_run(key) is None:
                size = len(data.train) * one.num_layers * one.context_dim * table.weight.shape[1]
                job = number, one, key, data, None if one.embedding == "random" else table
                todo[number] = size, store.key(*made_of, phase1=True), job
        here = [(n, one) for n, one in enumerate(experiments) if n not in todo]
        stored: Iterable[Any] = ((n, _run_one(one, gives_up), []) for n, one in here)
        apart: Iterable[Any] = ()
        if todo:
            order, how = _order(todo.values()), (gives_up, registry.own(experiments))
            threads = max(1, torch.get_num_threads() // jobs)
            calls = (joblib.delayed(_run_apart)(*job[:2], *how, threads) for job in order)
            side_by_side = joblib.Parallel(jobs, return_as="generator_unordered")
            apart = finish(_run_apart, order, how) if finish else side_by_side(calls)
        results: list[Any] = [None] * len(experiments)
        failed: dict[str, str] = {}
        work = [one.samples for one in experiments]
        every = held.enter_context(Whole("Sweep", len(work), sum(work)))
        ended = zip(map(every.begin, work), itertools.chain(stored, apart), strict=True)
        for _, (number, result, said) in ended:
            every.begin(work[number])  # they end in any order
            for message in said:
                warnings.warn(message, stacklevel=3)
            if isinstance(result, str):
                fields = [f"{name}={getattr(experiments[number], name)!r}" for name in shown]
                failed[", ".join(fields) or f"number {number}"], result = result, None
            results[number] = result
            row = {} if result is None else result.row()
            figures = {name: row.get(name) for name in (*shown, "val_ppl")}
            numbers = {k: v for k, v in figures.items() if isinstance(v, (int, float))}
            every.finish(bool(result and result.from_store), numbers)
    if failed:
        each = "; ".join([f"{name}: {text.splitlines()[-1]}" for name, text in failed.items()][:20])
        words = f"{len(failed)} of {len(work)} runs failed, others are stored: {each}"
        raise RuntimeError(words) from RuntimeError("\n".join(failed.values()))
    return results


def _cluster(engine: Any = None, address: Any = None) -> Any:
    """How to connect to a cluster, if one is asked for; raises `ParameterError`."""
    engine = engine or os.environ.get("CVFP_ENGINE") or "loky"
    if engine not in ("loky", "dask"):
        raise ParameterError("engine", engine, "'loky' or 'dask'")
    if not isinstance(address, str | None) or (address and engine != "dask"):
        raise ParameterError("address", address, "None, or text with engine 'dask'")
    try:
        found = importlib.import_module("cvfp.cluster") if engine == "dask" else None
    except ImportError as error:
        accepted = f"'loky', or 'dask' after: pip install distributed ({error})"
        raise ParameterError("engine", engine, accepted) from error
    return found and partial(found.connected, address)


def _order(todo: Iterable[tuple[float, str, Any]]) -> list[Any]:
    """The longest first; but one of each Phase 1 before all others, which then find it."""
    longest = sorted(todo, key=lambda one: -one[0])
    firsts = {phase1: job for _, phase1, job in reversed(longest)}
    return [job for _, one, job in sorted(longest, key=lambda one: firsts[one[1]] is not one[2])]


def _run_one(experiment: Experiment, gives_up: bool, **how: Any) -> Result | None:
    try:
        result = run(experiment, **how)
    except FloatingPointError:
        if not gives_up:
            raise
        return None
    result._model = None  # a sweep's models stay in the store
    return result


def _run_apart(n: int, one: Experiment, gives_up: bool, own: Any, threads: int, **how: Any) -> Any:
    """In a worker: a run's number; its Result, None or how it failed twice; what it warned of."""
    os.environ["CVFP_PROGRESS"] = "none"
    torch.set_num_threads(threads)
    result: Any = None
    with open(os.devnull, "w") as no, redirect_stdout(no), redirect_stderr(no), ExitStack() as held:
        said: Any = held.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("default")
        for _ in range(2):
            try:
                registry.receive(own)  # a worker has not run the caller's notebook
                result = _run_one(one, gives_up, **how)
                break
            except Exception:
                result = traceback.format_exc()
    return n, result, [each.message for each in said]
