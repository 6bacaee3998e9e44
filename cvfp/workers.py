"""What a process does that takes runs of a sweep, whoever started it, and the GPU that it gets."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import BaseFileLock, FileLock, Timeout
from joblib.externals.loky import get_reusable_executor

from cvfp import registry
from cvfp.config import Experiment
from cvfp.data import Data
from cvfp.embeddings import Table
from cvfp.experiment import run
from cvfp.result import Result

MEMORY = 0.9  # of a GPU, for all that share it: each has a CUDA context besides
_held: list[BaseFileLock] = []


# A run's number; its Result, None (it diverged, and may) or how it failed; what it warned of.
Ended = tuple[int, Result | str | None, list[Warning]]


class Job(NamedTuple):
    """A run of a sweep, with what it reads (None: it draws its table) and its size (vocabulary,
    embedding, tokens); keys in the store (None: not stored), also of its Phase 1 if it has one."""

    experiment: Experiment
    data: Data
    table: Table | None
    size: tuple[int, int, int]
    key: str | None
    phase1: str | None


class Place(NamedTuple):
    """Of the processes of a team: how many share a GPU."""

    team: str
    share: int = 1


def pin(place: Place) -> None:
    """See one GPU from now on: the next of those that this process would see, counted over its
    team's processes on this machine. Only before the process has used CUDA; each asks once."""
    count = torch.cuda.device_count()  # does not start CUDA
    for number in itertools.count() if count and not _held else ():
        with suppress(Timeout):  # it is another's, as long as that lives
            path = Path(tempfile.gettempdir(), f"cvfp-{place.team}-{number}.lock")
            _held.append(FileLock(path, 0, thread_local=False).acquire().lock)
            seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
            names = sorted(seen.split(","))  # dask-cuda's lists begin each with another one
            os.environ["CUDA_VISIBLE_DEVICES"] = names[number % len(names)]
            break


@contextmanager
def mps() -> Iterator[None]:
    """NVIDIA's daemon by which processes use a GPU at once, not in turns, unless there is none or
    it runs already. Never limit a client's CUDA_MPS_ACTIVE_THREAD_PERCENTAGE: runs then computed
    nonsense (reports/LOG.md)."""
    program = shutil.which("nvidia-cuda-mps-control")
    if program is None:
        yield
        return
    torch.zeros(1, device="cuda")  # before it starts: this process stays outside
    started = subprocess.run([program, "-d"], capture_output=True).returncode == 0
    try:
        yield
    finally:
        if started:
            get_reusable_executor().shutdown()  # a client that is killed takes others along
            subprocess.run([program], input=b"quit\n", capture_output=True)


def perform(
    experiment: Experiment,
    gives_up: bool,
    own: bytes,
    place: Place,
    threads: int,
    watch: Callable[[Any], object] = lambda row: None,
) -> tuple[Result | str | None, list[Warning]]:
    """A run, None (it diverged, and may) or how it failed twice; and what it warned of. It prints
    nothing, for nobody looks here."""
    said: list[Warning] = []
    os.environ["CVFP_PROGRESS"] = "none"
    with ExitStack() as held:
        held.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_, **__: said.append(message)
        nowhere = held.enter_context(open(os.devnull, "w", encoding="utf-8"))
        held.enter_context(redirect_stdout(nowhere))
        held.enter_context(redirect_stderr(nowhere))
        pin(place)
        torch.set_num_threads(threads)
        failed = False
        while True:
            try:
                if experiment.device == "cuda":
                    part = MEMORY / place.share if place.share > 1 else 1.0
                    torch.cuda.set_per_process_memory_fraction(part)
                registry.receive(own)
                return run_one(experiment, gives_up, watch), said
            except Exception as error:
                if failed or isinstance(error, FloatingPointError):  # that would again
                    return traceback.format_exc(), said
            failed = True


def run_one(
    experiment: Experiment, gives_up: bool, watch: Callable[[Any], object] = lambda row: None
) -> Result | None:
    """A run without its model, which stays in the store; None: it diverged, and may."""
    try:
        result = run(experiment, watch=watch)
    except FloatingPointError:
        if not gives_up:
            raise
        return None
    result._model = None
    return result


def numbered(number: int, *how: Any) -> Ended:
    return number, *perform(*how)
