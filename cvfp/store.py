"""Finished work, found again by content: one file per run, Phase 1 kept apart for its variants.

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

import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cvfp import cache
from cvfp.config import Experiment

PHASE1_CODE = ("data", "embeddings", "model", "phase1", "seeds", "contexts", "metrics")
RUN_CODE = (*PHASE1_CODE, "phase2", "controls", "end_to_end", "baselines", "experiment")

MODEL_BYTES = 50_000_000
# Phase 1's contexts are large and can be made again: the least recently used go first.
PHASE1_BYTES = 8_000_000_000


def key(experiment: Experiment, data: str, table: str, *, phase1: bool = False) -> str:
    """The key of a run, or of its Phase 1 alone, from a resolved Experiment and fingerprints."""
    if "auto" in (experiment.device, experiment.precision):
        raise ValueError("experiment: got unresolved device or precision; accepted: .resolved()")
    # The data's and the table's fields are in their fingerprints.
    stages = ("context", "phase1", "run") if phase1 else ("context", "phase1", "phase2", "run")
    code = cache.code_fingerprint(*(PHASE1_CODE if phase1 else RUN_CODE))
    versions = [torch.__version__, tokenizers.__version__]
    if experiment.model == "transformer":
        versions.append(importlib.metadata.version("transformers"))
    return cache.digest(experiment.to_dict(*stages), data, table, code, versions)


def read_run(key: str) -> dict[str, Any] | None:
    """A finished run's record, or None."""
    path = cache.home() / "runs" / f"{key}.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def write_run(key: str, record: dict[str, Any]) -> None:
    with cache.whole(cache.home() / "runs" / f"{key}.json") as path:
        path.write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")


def read_baselines(key: str) -> dict[str, float | None] | None:
    """Kept nats per token of the baselines, or None."""
    path = cache.home() / "baselines" / f"{key}.json"
    if not path.exists():
        return None
    lines: dict[str, float | None] = json.loads(path.read_text(encoding="utf-8"))
    return lines


def write_baselines(key: str, lines: dict[str, float | None]) -> None:
    with cache.whole(cache.home() / "baselines" / f"{key}.json") as path:
        path.write_text(json.dumps(lines, allow_nan=False), encoding="utf-8")


def read_model(key: str) -> dict[str, Tensor] | None:
    """The kept weights of a run, or None."""
    path = cache.home() / "models" / f"{key}.safetensors"
    return load_file(path) if path.exists() else None


def write_model(key: str, weights: dict[str, Tensor]) -> bool:
    """Keep the weights if they are small (at most 50 MB); says whether it did."""
    if sum(tensor.nbytes for tensor in weights.values()) > MODEL_BYTES:
        return False
    _save(cache.home() / "models" / f"{key}.safetensors", weights, {})
    return True


def read_phase1(key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """A kept Phase 1: its tensors and its record, or None."""
    path = cache.home() / "phase1" / f"{key}.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        record: dict[str, Any] = json.loads(file.metadata()["record"])
    os.utime(path)  # used now
    return load_file(path), record


def write_phase1(key: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    if sum(tensor.nbytes for tensor in tensors.values()) > PHASE1_BYTES:
        return
    path = cache.home() / "phase1" / f"{key}.safetensors"
    _save(path, tensors, {"record": json.dumps(record, allow_nan=False)})
    kept = []
    for other in path.parent.glob("[!.]*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            status = other.stat()
            kept.append((status.st_mtime, status.st_size, other))
    total = sum(size for _, size, _ in kept)
    for _, size, oldest in sorted(kept):
        if total <= PHASE1_BYTES:
            break
        total -= size
        oldest.unlink(missing_ok=True)


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with cache.whole(path) as temporary:
        save_file(plain, temporary, metadata=metadata)
