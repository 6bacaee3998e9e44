"""In which type products are taken, and which types this machine's products gain from."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from cvfp import cache

# bfloat16 is taken where its products are that much faster than float32's: where there are units
# for them the ratio is 2 and more, where they are emulated well under 1.
WORTH = 1.3


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Products in bfloat16 if `precision` says so; parameters and sums stay float32."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def product_type(like: Tensor) -> torch.dtype:
    """The type in which products of `like` are taken: autocast's, or its own."""
    device = like.device.type
    if like.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return like.dtype


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products as exact as their type: no autocast, no TF32, whatever the caller has set."""
    matmuls: list[Any] = [
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    ]
    if not hasattr(matmuls[0], "fp32_precision"):  # torch before 2.9: one setting for all
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            torch.set_float32_matmul_precision(legacy)
        return
    everywhere: Any = torch.backends
    above = [everywhere.fp32_precision, everywhere.mkldnn.fp32_precision]
    # What reads the same as the setting above it may be inherited, and is left to inherit.
    before = [m.fp32_precision for m in matmuls]
    back = ["none" if one == up else one for one, up in zip(before, above, strict=True)]
    try:
        for matmul in matmuls:
            matmul.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for matmul, setting in zip(matmuls, back, strict=True):
            matmul.fp32_precision = setting


def processor() -> str:
    """The CPU's name and the units that decide how fast its products are."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # a torch before 2.10 cannot tell
    found = {} if ask is None else ask()
    units = [unit for unit in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if found.get(unit)]
    return " ".join([str(found.get("cpu_name") or platform.machine()), *units])


def bfloat16_gain(device: str) -> float:
    """How many times as fast as in float32 this machine takes products in bfloat16.

    Measured once for a processor and a torch and then read from `CVFP_HOME`, so that the same
    Experiment stays the same run.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else processor()

    def measure() -> str:
        types = torch.float32, torch.bfloat16
        rates: dict[torch.dtype, list[float]] = {dtype: [] for dtype in types}
        for _ in range(9):  # in turn, so that a slow moment of the machine falls on both
            for dtype in types:
                rates[dtype].append(product_rate(device, dtype))
        gain = max(rates[torch.bfloat16][2:]) / max(rates[torch.float32][2:])
        return json.dumps({"processor": name, "gain": gain})

    file = f"{cache.digest(device, name, torch.__version__)}.json"
    return float(json.loads(cache.text("products", file, measure))["gain"])


@torch.no_grad()
def product_rate(device: str, dtype: torch.dtype) -> float:
    """Multiplications and additions a second, in a product of this type."""
    rows = 1024 if device == "cpu" else 4096  # a GPU's small products only wait to be launched
    a = torch.ones(rows, rows, dtype=dtype, device=device)
    start = time.perf_counter()
    (a @ a.T).sum().item()
    return 2 * rows**3 / (time.perf_counter() - start)
