"""Sweeps side by side against one after the other, in turn, as JSON on stdout.

    python -m benchmarks.sweeps cluster [--runs 12] [--turns 3]

`cluster`: a scheduler and `dask worker` processes of one thread, as a user would start them, and
runs of `mini` on one of them and on two; again on two, of which one is killed in the middle. Each
worker has a home of its own. Perplexities are compared bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import cvfp
from cvfp import config, watch
from cvfp.progress import Whole

SMALL: dict[str, Any] = dict(samples=20, phase2_epochs=3, device="cpu", precision="float32")


@contextlib.contextmanager
def cluster(workers: int, folder: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler's address, and its workers' processes."""
    import distributed

    file, ended = folder / "scheduler.json", []
    common = ["--scheduler-file", str(file), "--host", "127.0.0.1"]

    def start(program: str, *words: str, home: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{program}", *words, *common]
        there = {**os.environ, "CVFP_HOME": str(folder / home)}
        quiet: dict[str, Any] = dict.fromkeys(["stdout", "stderr"], subprocess.DEVNULL)
        ended.append(subprocess.Popen(command, env=there, **quiet))
        return ended[-1]

    try:
        start("scheduler", "--port", "0", "--dashboard-address", ":0", home="none")
        words = ["--nthreads", "1", "--memory-limit", "0", "--no-nanny"]
        there = [start("worker", *words, home=f"worker {n}") for n in range(workers)]
        with distributed.Client(scheduler_file=str(file), set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=120)
            address = client.scheduler.address
        yield address, there
    finally:
        for process in ended:
            process.kill()
            process.wait()


def timed(one: cvfp.Experiment, runs: int, **where: Any) -> tuple[float, list[Any]]:
    """Seconds of a sweep into an empty home with the table in it, and what it gave."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CVFP_HOME"] = folder
        cvfp.experiment.prepare(one.resolved())
        start = time.perf_counter()
        results = cvfp.sweep(one, seed=range(runs), **where)
        seconds = time.perf_counter() - start
        return seconds, [(result.key, result.val_ppl) for result in results]


def on_cluster(runs: int, turns: int) -> dict[str, Any]:
    one = cvfp.Experiment.preset("mini", **SMALL)
    took: dict[int, list[float]] = {1: [], 2: []}
    alone, here = timed(one, runs)
    same = True
    for _ in range(turns):
        for workers in took:
            with tempfile.TemporaryDirectory() as folder, cluster(workers, Path(folder)) as there:
                where = dict(engine="dask", address=there[0])
                # The first of a worker imports, compiles and measures; these are others.
                timed(one.replace(samples=5), workers, **where)
                seconds, made = timed(one, runs, **where)
            took[workers].append(seconds)
            same &= made == here
    with tempfile.TemporaryDirectory() as folder, cluster(2, Path(folder)) as (address, processes):
        finish, count = Whole.finish, 0

        def disturb(whole: Whole, *how: Any) -> None:
            nonlocal count
            finish(whole, *how)
            if (count := count + 1) == runs // 3:
                processes[0].kill()

        with contextlib.ExitStack() as held:
            held.callback(setattr, Whole, "finish", finish)
            setattr(Whole, "finish", disturb)  # noqa: B010
            seconds, made = timed(one, runs, engine="dask", address=address)
    ratios = [one / two for one, two in zip(took[1], took[2], strict=True)]
    return {
        "runs": runs,
        "seconds_here": alone,
        "seconds_one_worker": took[1],
        "seconds_two_workers": took[2],
        "times_as_fast": statistics.median(ratios),
        "identical": same,
        "killed": {"seconds": seconds, "lost": runs - len(made), "identical": made == here},
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.sweeps", description=__doc__)
    parser.add_argument("what", choices=["cluster"])
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    on = {"device": watch.device_name(config.resolve_device("auto")), "torch": torch.__version__}
    found = on_cluster(given.runs, given.turns)
    print(json.dumps({**on, "load_at_the_end": os.getloadavg()[0], **found}, indent=1))


if __name__ == "__main__":
    main()
