"""The store, keyed by content: one file per run; runs that differ in Phase 2 share a Phase 1.

A key covers everything that makes the numbers and nothing else: the Experiment's fields with
device and precision resolved, the fingerprints of the data and of the table, the versions of torch
and of tokenizers, and the code, as an AST without docstrings, so that a comment discards nothing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from cvfp import cache, registry
from cvfp.config import Experiment
from cvfp.ops import placement

DATA_CODE = ("corpora", "data", "embeddings", "hub", "tokenizer")
MODEL_CODE = ("build", "contexts", "inputs", "metrics", "model", "ops", "recurrence", "seeds")
PHASE1_CODE = (*DATA_CODE, *MODEL_CODE, "checkpoint", "objectives", "phase1", "share", "variants")
RUN_CODE = (*PHASE1_CODE, "phase2", "controls", "end_to_end", "baselines", "experiment", "result")

MODEL_BYTES = 50_000_000
# NumPy has no bfloat16: a file of contexts holds their bits.
BITS = {2: np.uint16, 4: np.float32, 8: np.float64}
STAGED = 2**24  # bytes of pinned memory
# Phase 1's contexts are large and can be recomputed: the least recently used are deleted first.
PHASE1_BYTES = 8_000_000_000


def key(experiment: Experiment, data: str, table: str, *, phase1: bool = False) -> str:
    """The key of a run, or of its Phase 1 alone, from a resolved Experiment and fingerprints."""
    if "auto" in (experiment.device, experiment.precision):
        raise ValueError("experiment: got unresolved device or precision; accepted: .resolved()")
    # The data's and the table's fields are in their fingerprints.
    stages = ("context", "phase1", "run") if phase1 else ("context", "phase1", "phase2", "run")
    code = cache.code_fingerprint(*(PHASE1_CODE if phase1 else RUN_CODE))
    versions: list[str | None] = [torch.__version__, tokenizers.__version__]
    if experiment.model == "transformer":
        versions.append(importlib.metadata.version("transformers"))
    own = registry.sources(experiment, "objective", "block", *([] if phase1 else ["contexts"]))
    versions += own.values()
    return cache.digest(experiment.key_fields(*stages), data, table, code, versions)


def read_run(key: str) -> dict[str, Any] | None:
    """A finished run's record, or None."""
    path = cache.home() / "runs" / f"{key}.json"
    return json.loads(path.read_text(encoding="utf-8")) if cache.sound(path) else None


def write_run(key: str, record: dict[str, Any]) -> None:
    def write(path: Path) -> None:
        path.write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")

    cache.keep(cache.home() / "runs" / f"{key}.json", write)


def read_model(key: str) -> dict[str, Tensor] | None:
    """The stored weights of a run, or None."""
    path = cache.home() / "models" / f"{key}.safetensors"
    return load_file(path) if cache.sound(path) else None


def write_model(key: str, weights: dict[str, Tensor]) -> bool:
    """Keep the weights if they are small (at most 50 MB); says whether it did."""
    if sum(tensor.nbytes for tensor in weights.values()) > MODEL_BYTES:
        return False
    path = cache.home() / "models" / f"{key}.safetensors"
    return cache.keep(path, lambda temporary: cache.save(temporary, weights))


def read_phase1(key: str) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]] | None:
    """A kept Phase 1: its weights, its contexts mapped from their file, its record; or None."""
    path, rows = _phase1_paths(key)
    if not all([cache.sound(path), cache.sound(rows)]):
        return None
    with contextlib.suppress(OSError):  # a home that cannot be written
        for one in (path, rows):
            os.utime(one)  # used now
    with contextlib.suppress(FileNotFoundError):  # another process has just made room
        with safe_open(path, "pt") as file:
            record: dict[str, Any] = json.loads(file.metadata()["record"])
        # Copy on write: what is done to the tensor is not done to the file.
        bits = torch.from_numpy(np.load(rows, mmap_mode="c"))
        return load_file(path), bits.view(getattr(torch, record["contexts_dtype"])), record
    return None


def write_phase1(
    key: str, weights: dict[str, Tensor], contexts: Tensor, record: dict[str, Any]
) -> None:
    """Keep a Phase 1, if it is not larger than all that may be kept; the oldest go for it.

    Contexts [T, D] are most of it. They are copied straight into a mapped file, without the
    interpreter's lock, so that a thread can do it while Phase 2 trains."""
    if contexts.nbytes + sum(tensor.nbytes for tensor in weights.values()) > PHASE1_BYTES:
        return
    path, rows = _phase1_paths(key)

    def write(temporary: Path) -> None:
        dtype = BITS[contexts.dtype.itemsize]
        # Not flushed to the disk, which would hold the interpreter's lock: the system does it.
        mapped = np.lib.format.open_memmap(temporary, "w+", dtype, tuple(contexts.shape))
        cache.reserve(temporary, temporary.stat().st_size)
        _copy(contexts.view(torch.from_numpy(mapped).dtype), torch.from_numpy(mapped))

    record = {**record, "contexts_dtype": str(contexts.dtype).removeprefix("torch.")}
    metadata = {"record": json.dumps(record, allow_nan=False)}
    saved = cache.keep(path, lambda temporary: cache.save(temporary, weights, metadata))
    if saved and not cache.keep(rows, write):
        cache.delete(path)
    cache.evict(path.parent, PHASE1_BYTES)


def _phase1_paths(key: str) -> tuple[Path, Path]:
    folder = cache.home() / "phase1"
    return folder / f"{key}.safetensors", folder / f"{key}.npy"


def _copy(source: Tensor, target: Tensor) -> None:
    if source.device.type != "cuda":
        target.copy_(source)
        return
    # Beside the kernels of the caller's stream, not after them; and by way of pinned memory, since
    # a copy to other memory keeps all threads from launching any.
    rows = max(1, STAGED // (source.nbytes // len(source)))
    with placement.DEVICE:
        side = torch.cuda.Stream(source.device)
        side.wait_stream(torch.cuda.default_stream(source.device))
        staged = torch.empty_like(source[:rows], device="cpu", pin_memory=True)
    for part, there in zip(source.split(rows), target.split(rows), strict=True):
        with placement.DEVICE, torch.cuda.stream(side):
            staged[: len(part)].copy_(part, non_blocking=True)
            side.synchronize()
        there.copy_(staged[: len(part)])
