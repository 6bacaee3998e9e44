"""Seconds and peak memory of a run, and work in the background."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cvfp import ops

MEBIBYTE = 2**20


class Background(contextlib.AbstractContextManager["Background"]):
    """Work in a second thread while a GPU trains; leaving the block waits for it and raises its
    errors. On a CPU it is done at once: a second thread that computes there halves the speed of the
    first, for OpenMP then puts waiting threads to sleep."""

    def __init__(self, device: str) -> None:
        self.beside = device == "cuda"
        self.pool = ThreadPoolExecutor(1)
        self.work: list[Future[None]] = []

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        if self.beside:
            self.work.append(self.pool.submit(work, *arguments))
        else:
            work(*arguments)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.pool.shutdown()  # waits: an error of training does not lose Phase 1
        if kind is None:
            for one in self.work:
                one.result()


class Watch:
    """Seconds per stage and peak memory of a run."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        # Linux: start the high-water mark of resident memory anew.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds[stage] = time.perf_counter() - start

    def peaks(self) -> dict[str, Any]:
        device = torch.cuda.max_memory_allocated() / MEBIBYTE if self.device == "cuda" else None
        return {"peak_memory_mib": _peak_resident_mib(), "peak_device_memory_mib": device}


def _peak_resident_mib() -> float:
    with contextlib.suppress(OSError):  # Linux alone has it
        if found := re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()):
            return int(found[1]) / 1024
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MEBIBYTE if sys.platform == "darwin" else 1024)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else ops.processor()
