"""Many Experiments, one after the other or side by side: here, or on a cluster."""

from __future__ import annotations

import heapq
import itertools
import os
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from typing import Any

import joblib
import torch

from cvfp import cache, estimate, packs, registry, store
from cvfp.build import build
from cvfp.config import Experiment, ParameterError, parse, plain
from cvfp.data import load
from cvfp.experiment import prepare
from cvfp.ops import placement
from cvfp.progress import Whole
from cvfp.result import Result, Results
from cvfp.workers import MEMORY, Ended, Job, Place, mps, numbered, run_one

MOST = 8  # runs side by side on a GPU that "auto" takes: more gain nothing
NAMED = 20  # failed runs in an error; its notes have all
LATEST = 100  # stored runs by which seconds are foretold


def sweep(
    experiment: Experiment,
    *,
    n_jobs: int = 1,
    engine: str | None = None,
    address: str | None = None,
    per_device: int | str | None = None,
    **grid: Iterable[Any],
) -> Results:
    """Run every combination of the grid's values, the last field varying fastest.

    Finished runs come from the store, and every run is stored as it ends, so that an interrupted
    sweep goes on where it stopped. Side by side, the longest begin, and a run that fails is tried
    once more and does not keep the others from ending: RuntimeError at the end names the failed.

    Args:
        n_jobs: processes, as joblib counts them (-1: one for each core); each has its share of the
            cores. Seconds measured with more than one are those of processes that compete.
        engine: "loky", joblib's processes; or "dask": a cluster. None: `CVFP_ENGINE`, or "loky".
        address: of the cluster's scheduler, whose workers are all used; None: `CVFP_ADDRESS`, or
            a cluster of `n_jobs` workers on this machine, for this sweep (docs/scale.md).
        per_device: runs side by side on each GPU, a share of its memory for each, through NVIDIA's
            MPS where it can be started; "auto": up to 8, as many as fit. At an address: how many
            of its workers share a GPU. None: `CVFP_PER_DEVICE`, or what `n_jobs` makes of it.
        grid: fields of the Experiment, each with the values to run.

    Raises `ParameterError` before the first run starts, for any of them: an unknown field, a bad
    value, a size that exceeds the corpus, a peer that cannot be built (own blocks: ValueError), a
    cluster that cannot be reached or whose workers would compute something else."""
    lists: dict[str, list[Any]] = {}
    for name, values in grid.items():
        lists[name] = list(values) if isinstance(values, Iterable) else []
        if isinstance(values, str) or not lists[name]:
            raise ParameterError(name, values, "a list of at least one value")
    combinations = (dict(zip(grid, one, strict=True)) for one in itertools.product(*lists.values()))
    experiments = [experiment.replace(**one) for one in combinations]
    return Results(_runs(experiments, tuple(grid), False, n_jobs, engine, address, per_device))


def runs(
    experiments: Sequence[Experiment],
    n_jobs: int = 1,
    engine: str | None = None,
    address: str | None = None,
    per_device: int | str | None = None,
) -> list[Result | None]:
    """Run these Experiments, as `sweep` does; None for one whose training diverged."""
    return list(_runs(experiments, (), True, n_jobs, engine, address, per_device))


def _runs(
    given: Sequence[Experiment], shown: Sequence[str], gives_up: bool, n_jobs: int, *where: Any
) -> list[Any]:
    engine, address, share = _asked(*where)
    processes = plain(n_jobs)
    if type(processes) is not int or processes == 0:
        raise ParameterError("n_jobs", n_jobs, "an integer of at least 1, or -1 for all cores")
    with ExitStack() as held:
        connect = _dask() if engine == "dask" else None
        team: Any = None
        if connect and address:
            place = Place(cache.digest(address), share or 1)
            team = held.enter_context(connect(given, place, address))
        experiments = team.experiments if team else [one.resolved() for one in given]
        if share not in (None, 1, "auto") and any(one.device != "cuda" for one in experiments):
            raise ParameterError("per_device", share, "1 or 'auto' where a run is on no NVIDIA GPU")
        # What sizes left alone become with the largest holds for all, or they could not be compared
        most: dict[str, int] = {}
        for one in experiments:
            most[one.dataset] = max(one.samples, most.get(one.dataset, 0))
        sizes = [load(one.replace(samples=most[one.dataset])).sizes for one in experiments]
        experiments = [one.settled(size) for one, size in zip(experiments, sizes, strict=True)]
        # In an order in which what was read last is read again.
        alike = sorted(range(len(given)), key=lambda n: repr(experiments[n].to_dict("data")))
        made = {n: _job(experiments[n], team is not None) for n in alike}
        jobs = [made[n] for n in range(len(given))]
        work = [one.samples for one in experiments]
        every = held.enter_context(Whole("Sweep", len(work), sum(work)))

        def begin(number: int) -> Experiment:
            every.begin(work[number])
            return experiments[number]

        processes = joblib.effective_n_jobs(processes)
        ended = _ended(jobs, gives_up, begin, connect, team, processes, share)
        results: list[Any] = [None] * len(jobs)
        failed: dict[str, str] = {}
        for number, result, said in held.enter_context(closing(ended)):
            one = begin(number)
            for message in said:
                warnings.warn(message, stacklevel=4)
            if isinstance(result, str):
                fields = ", ".join(f"{name}={getattr(one, name)!r}" for name in shown)
                failed[fields or f"number {number}"] = result
                result = None
            results[number] = result
            row = {} if result is None else result.row()
            figures = {name: row.get(name) for name in (*shown, "val_ppl")}
            numbers = {k: v for k, v in figures.items() if isinstance(v, (int, float))}
            every.finish(bool(result and result.from_store), numbers)
    if failed:
        each = [f"{name}: {text.splitlines()[-1]}" for name, text in failed.items()]
        words = "; ".join(each[:NAMED]) + "; …" * (len(each) > NAMED)
        count = f"{len(failed)} of {len(jobs)} runs failed, others are stored"
        error = RuntimeError(f"{count}: {words}")
        error.add_note("\n".join(failed.values()))
        raise error
    return results


def _asked(engine: Any, address: Any, per_device: Any) -> tuple[str, str | None, Any]:
    """What was asked for, or the environment asks for; raises `ParameterError`."""
    if engine is None:
        engine = os.environ.get("CVFP_ENGINE") or "loky"
        address = address or os.environ.get("CVFP_ADDRESS") or None
    if engine not in ("loky", "dask"):
        raise ParameterError("engine", engine, "'loky' or 'dask'")
    if not isinstance(address, str | None) or (address and engine != "dask"):
        raise ParameterError("address", address, "None, or text with engine 'dask'")
    if per_device is None:
        per_device = os.environ.get("CVFP_PER_DEVICE") or None
    share = parse(per_device, int)
    fits = share is None or (type(share) is int and share > 0) or (share == "auto" and not address)
    if not fits:
        accepted = "an integer of at least 1, or, without an address, 'auto'"
        raise ParameterError("per_device", per_device, accepted)
    return engine, address, share


def _dask() -> Any:
    try:
        from cvfp.cluster import connected
    except ImportError as error:
        accepted = f"'loky', or 'dask' after: pip install distributed ({error})"
        raise ParameterError("engine", "dask", accepted) from error
    return connected


def _job(one: Experiment, remote: bool) -> Job:
    """A run, all of whose parameters fit. Somebody else's device is not asked about."""
    data, table = prepare(one.replace(device="cpu") if remote else one)
    if one.model != "cvfp" or one.block != "published":
        build(one, table.weight, data.tokenizer)
    one = one.settled(data.sizes)
    key = phase1 = None
    if None not in registry.sources(one).values():
        made_of = one, data.fingerprint, table.fingerprint
        key = store.key(*made_of)
        if one.model == "cvfp" and one.contexts in estimate.WITH_PHASE1:
            phase1 = store.key(*made_of, phase1=True)
    size = data.vocab_size, table.weight.shape[1], len(data.train)
    return Job(one, data, None if one.embedding == "random" else table, size, key, phase1)


def _ended(
    jobs: list[Job],
    gives_up: bool,
    begin: Callable[[int], Experiment],
    connect: Any,
    team: Any,
    processes: int,
    share: Any,
) -> Generator[Ended]:
    """The runs by number, as they end; those in the store first."""
    todo = []
    for number, job in enumerate(jobs):
        if (record := store.read_run(job.key) if job.key else None) is None:
            todo.append(number)
            continue
        record |= {"experiment": job.experiment.to_dict(), "from_store": True}
        yield number, Result.from_dict(record), []
    if not todo:
        return
    if not team:
        processes, share = _side_by_side([jobs[n] for n in todo], processes, share)
    if processes == 1 and not connect:
        yield from ((number, run_one(begin(number), gives_up), []) for number in todo)
        return
    own, place = registry.own(job.experiment for job in jobs), Place(str(os.getpid()), share or 1)
    threads = max(1, torch.get_num_threads() // processes)
    ordered = {number: jobs[number] for number in _order(jobs, todo)}
    with ExitStack() as held:
        if not team and share > 1:
            held.enter_context(mps())
        if connect:
            given = [job.experiment for job in jobs]
            team = team or held.enter_context(connect(given, place, None, processes, threads))
            yield from team.finish(ordered, gives_up, own)
        else:
            # Workers that idle between short runs are started again: no news to a reader.
            held.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "A worker stopped while", UserWarning)
            yield from joblib.Parallel(processes, return_as="generator_unordered")(
                joblib.delayed(numbered)(number, job.experiment, gives_up, own, place, threads)
                for number, job in ordered.items()
            )


def _side_by_side(jobs: list[Job], processes: int, share: Any) -> tuple[int, int]:
    """Processes on this machine, and how many share a GPU."""
    gpus = torch.cuda.device_count() if any(j.experiment.device == "cuda" for j in jobs) else 0
    if share == "auto":
        share = 1
        if gpus:
            memory = MEMORY * placement.memory(torch.device("cuda"))
            share = max(1, min(MOST, *(int(memory / _needed(job)) for job in jobs)))
    processes = min(max(processes, (share or 0) * gpus), len(jobs))
    return processes, -(-processes // gpus) if gpus else 1


def _needed(job: Job) -> float:
    """Bytes of a GPU, rather too many."""
    contexts = 4 * job.size[-1] * job.experiment.context_dim
    return 2.0 * (estimate.memory(job.experiment, *job.size) + contexts)


def _order(jobs: list[Job], todo: list[int]) -> list[int]:
    """The longest first; but of those with the same Phase 1, one before all others: they find it.

    Seconds go by products, and by how long those took in the latest stored runs of that kind."""

    def kind(one: Experiment) -> tuple[str, str, str]:
        return one.device, one.model, one.contexts

    took = defaultdict(list)
    latest = heapq.nlargest(LATEST, (cache.home() / "runs").glob("*.json"), os.path.getmtime)
    for one in filter(None, map(packs._read, latest)):
        size = one.vocab_size, one.embedding_dim, one.train_tokens
        seconds = sum(one.seconds.values())
        took[kind(one.experiment)].append(seconds / estimate.products(one.experiment, *size))
    rates = {kind: statistics.median(each) for kind, each in took.items()}
    usual = statistics.median(rates.values() or [1.0])

    def expected(number: int) -> float:
        job = jobs[number]
        rate = rates.get(kind(job.experiment), usual)
        return rate * estimate.products(job.experiment, *job.size)

    longest = sorted(todo, key=expected, reverse=True)
    firsts: dict[Any, int] = {}
    for number in longest:
        firsts.setdefault(jobs[number].phase1 or number, number)
    return sorted(longest, key=lambda number: number not in firsts.values())
