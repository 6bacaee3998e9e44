"""Tensors too large for the device: device, pinned host memory, or a memory-mapped file; how they
reach the device in time, and how much of them goes through at once.

Contexts are T x D numbers. They stay on the device if they fit, else in host memory, else in a
file mapped into memory; `CVFP_CONTEXTS` (device, host, disk) overrides the choice.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from cvfp import cache
from cvfp.errors import ParameterError

PLACES = ("device", "host", "disk")
# The part of the free memory that contexts may take: the rest is for training.
DEVICE_PART, HOST_PART = 0.75, 0.6
# Numbers of [tokens, D] in one pass: near the cache on a CPU, enough to fill a GPU.
PASS = {"cpu": 2**20, "cuda": 2**26, "mps": 2**24}
# Bytes that training keeps for each of them in each layer, with the layer's inputs and gradients.
LAYER_BYTES = 16
# Logits held at once when scoring: in the cache on a CPU, enough to fill a GPU.
LOGITS = {"cpu": 2**21, "cuda": 2**27, "mps": 2**24}
# Blocks of a recurrence side by side, measured at 3 x 128 on two cores and 6 x 768 on an H200.
SIDE_BY_SIDE = {"cpu": 512, "cuda": 4096, "mps": 4096}

# Held by a thread that works on the device beside training, and while a graph is recorded, which
# other threads' work would spoil.
DEVICE = threading.Lock()

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def rows(total: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor [total, width], on the device, in pinned host memory, or mapped from a file.

    Raises:
        ParameterError: `CVFP_CONTEXTS` names no place; the disk of `CVFP_HOME` is full.
    """
    size = total * width * dtype.itemsize
    where = place(size, device)
    if where == "device":
        return torch.empty(total, width, dtype=dtype, device=device)
    if where == "host":
        return torch.empty(total, width, dtype=dtype, pin_memory=device.type == "cuda")
    folder = cache.home() / "scratch"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The file has no name from the start: gone with the tensor, however the process ends.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=cache.temporary_prefix()) as file:
            cache.reserve(file.name, size)
            flat = torch.from_file(file.name, shared=True, size=total * width, dtype=dtype)
    except OSError as error:
        raise ParameterError("CVFP_HOME", str(folder), f"{size:,} bytes free there") from error
    return flat.view(total, width)


def asked_place() -> str | None:
    """What `CVFP_CONTEXTS` asks for; None: nothing.

    Raises:
        ParameterError: it names no place.
    """
    asked = os.environ.get("CVFP_CONTEXTS", "auto")
    if asked not in ("auto", *PLACES):
        raise ParameterError("CVFP_CONTEXTS", asked, "auto, device, host or disk")
    return None if asked == "auto" else asked


def place(size: int, device: torch.device) -> str:
    """One of `PLACES` for `size` bytes that a model on `device` reads."""
    asked = asked_place()
    if asked is not None:
        return asked
    if device.type == "cuda":
        used = torch.cuda.memory_allocated(device)
        cached = torch.cuda.memory_reserved(device) - used
        free = min(torch.cuda.mem_get_info(device)[0] + cached, memory(device) - used)
        if size <= DEVICE_PART * free:
            return "device"
    if size <= HOST_PART * psutil.virtual_memory().available:
        return "host" if device.type == "cuda" else "device"
    return "disk"


def memory(device: torch.device) -> int:
    """Bytes of the device's memory that this process may have, used or not."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return int(total * torch.cuda.get_per_process_memory_fraction(device.index))
    limits = [psutil.virtual_memory().total]
    with suppress(OSError, ValueError):  # a container's; "max": none
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def smaller() -> bool:
    """Let a GPU take half as much at once from now on; False: it is little already."""
    global DEVICE_PART
    DEVICE_PART /= 2
    for most in (PASS, LOGITS, SIDE_BY_SIDE):
        most["cuda"] //= 2
    return PASS["cuda"] >= 2**19


def slices(total: int, group: int, at_once: int) -> list[slice]:
    """[0, total) in slices of `at_once` whole groups; a smaller last group has its own."""
    end = total - total % group
    whole = [slice(i, min(i + group * at_once, end)) for i in range(0, end, group * at_once)]
    return whole + ([slice(end, total)] if end < total else [])


def prefetch(
    items: Iterable[Item], load: Callable[[Item], Loaded], threaded: bool
) -> Iterator[tuple[Item, Loaded]]:
    """(item, load(item)) for each item; threaded: the next is loaded while this one is used."""
    if not threaded:
        for item in items:
            yield item, load(item)
        return
    with ThreadPoolExecutor(1) as pool:
        coming: tuple[Item, Future[Loaded]] | None = None
        for item in items:
            following = item, pool.submit(load, item)
            if coming is not None:
                yield coming[0], coming[1].result()
            coming = following
        if coming is not None:
            yield coming[0], coming[1].result()
