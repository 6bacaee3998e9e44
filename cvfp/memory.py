"""Where rows that may exceed memory are kept, and how they reach the device in time.

Contexts are T x D numbers. They are kept on the device if they fit there, else in host memory,
else in a file on disk that is mapped into memory; `CVFP_CONTEXTS` (device, host, disk) decides
where this judgement is wrong.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from cvfp import cache
from cvfp.config import ParameterError

PLACES = ("device", "host", "disk")
# The part of the free memory that the rows may take: the rest is for training.
DEVICE_PART, HOST_PART = 0.75, 0.6

# Held by a thread that works on the device beside training, and while a graph is recorded, which
# other threads' work would spoil.
DEVICE = threading.Lock()

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def rows(total: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor [total, width], on the device, in host memory, or mapped from a file.

    Raises:
        ParameterError: `CVFP_CONTEXTS` names no place.
    """
    size = total * width * dtype.itemsize
    where = place(size, device)
    if where == "device":
        return torch.empty(total, width, dtype=dtype, device=device)
    if where == "host":
        return torch.empty(total, width, dtype=dtype, pin_memory=device.type == "cuda")
    folder = cache.home() / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    # Without a name from the start: gone with the tensor, however the process ends.
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.truncate(size)
        flat = torch.from_file(file.name, shared=True, size=total * width, dtype=dtype)
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
    if device.type == "cuda" and size <= DEVICE_PART * _free_on(device):
        return "device"
    if size <= HOST_PART * psutil.virtual_memory().available:
        return "host" if device.type == "cuda" else "device"
    return "disk"


def _free_on(device: torch.device) -> int:
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def pass_bytes(device: torch.device) -> int:
    """Bytes that one pass of training may take: an eighth of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 8
    return psutil.virtual_memory().total // 8


def ahead(
    source: Tensor, pieces: Sequence[slice], device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Each piece and its rows of `source`, on `device`."""
    loaded = prefetched(pieces, lambda piece: source[piece].to(device), source.device != device)
    return zip(pieces, loaded, strict=True)


def prefetched(
    items: Iterable[Item], load: Callable[[Item], Loaded], threaded: bool
) -> Iterator[Loaded]:
    """`load(item)` for each item; threaded: the next is loaded while the caller uses this one."""
    if not threaded:
        yield from map(load, items)
        return
    with ThreadPoolExecutor(1) as pool:
        coming: Future[Loaded] | None = None
        for item in items:
            following = pool.submit(load, item)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()
