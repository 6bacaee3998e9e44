"""Many Experiments, one after the other or side by side."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import joblib
import torch

from cvfp import registry, share
from cvfp.build import build
from cvfp.config import Experiment, ParameterError, plain
from cvfp.data import load
from cvfp.experiment import prepare, run
from cvfp.progress import Whole
from cvfp.result import Result, Results


def sweep(experiment: Experiment, *, n_jobs: int = 1, **grid: Iterable[Any]) -> Results:
    """Run every combination of the grid's values, the last field varying fastest.

    Finished runs come from the store, and every run is stored as it ends, so that an interrupted
    sweep goes on where it stopped.

    Args:
        n_jobs: processes, as joblib counts them (-1: one for each core); each has its share of the
            cores. Seconds measured with more than one are those of processes that compete.
        grid: fields of the Experiment, each with the values to run.

    Raises `ParameterError` before the first run starts, for any of them: an unknown field, a bad
    value, a size that exceeds the corpus, a peer that cannot be built (own blocks: ValueError)."""
    lists: dict[str, list[Any]] = {}
    for name, values in grid.items():
        lists[name] = list(values) if isinstance(values, Iterable) else []
        if isinstance(values, str) or not lists[name]:
            raise ParameterError(name, values, "a list of at least one value")
    combinations = (dict(zip(grid, one, strict=True)) for one in itertools.product(*lists.values()))
    return Results(_runs([experiment.replace(**one) for one in combinations], n_jobs, tuple(grid)))


def runs(experiments: Sequence[Experiment], n_jobs: int = 1) -> list[Result | None]:
    """Run these Experiments, as `sweep` does; None for one whose training diverged."""
    return list(_runs(experiments, n_jobs, (), gives_up=True))


def _runs(
    given: Sequence[Experiment], n_jobs: int, shown: Sequence[str], gives_up: bool = False
) -> list[Any]:
    jobs = plain(n_jobs)
    if type(jobs) is not int or jobs == 0:
        raise ParameterError("n_jobs", n_jobs, "an integer of at least 1, or -1 for all cores")
    jobs = joblib.effective_n_jobs(jobs)
    if jobs > 1 and share.started().size > 1:
        raise ParameterError("n_jobs", n_jobs, "1 under torchrun, whose processes share each run")
    experiments = [one.resolved() for one in given]
    # What sizes left alone become with the largest holds for all, or they could not be compared.
    most: dict[str, int] = {}
    for one in experiments:
        most[one.dataset] = max(one.samples, most.get(one.dataset, 0))
    sizes = [load(one.replace(samples=most[one.dataset])).sizes for one in experiments]
    experiments = [one.settled(size) for one, size in zip(experiments, sizes, strict=True)]
    for one in experiments:
        data, table = prepare(one)
        if one.model != "cvfp" or one.block != "published":
            build(one, table.weight, data.tokenizer)
    results, work = [], [one.samples for one in experiments]
    with warnings.catch_warnings(), Whole("Sweep", len(work), sum(work)) as every:
        if jobs == 1:
            finished: Iterable[Any] = (_run_one(one, gives_up) for one in experiments)
        else:
            # Workers that idle between short runs are started again: no news to a reader.
            warnings.filterwarnings("ignore", "A worker stopped while", UserWarning)
            threads, own = max(1, torch.get_num_threads() // jobs), registry.own()
            finished = joblib.Parallel(jobs, return_as="generator")(
                joblib.delayed(_run_apart)(one, gives_up, threads, own) for one in experiments
            )
        for _, result in zip(map(every.begin, work), finished, strict=True):
            results.append(result)
            row = {} if result is None else result.row()
            figures = {name: row.get(name) for name in (*shown, "val_ppl")}
            numbers = {k: v for k, v in figures.items() if isinstance(v, (int, float))}
            every.finish(bool(result and result.from_store), numbers)
    return results


def _run_one(experiment: Experiment, gives_up: bool) -> Result | None:
    try:
        result = run(experiment)
    except FloatingPointError:
        if not gives_up:
            raise
        return None
    result._model = None  # a sweep's models stay in the store
    return result


def _run_apart(experiment: Experiment, gives_up: bool, threads: int, own: Any) -> Result | None:
    registry.receive(own)  # a worker has not run the caller's notebook
    torch.set_num_threads(threads)
    os.environ["CVFP_PROGRESS"] = "none"
    return _run_one(experiment, gives_up)
