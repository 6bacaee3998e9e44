"""Loops that stop and go on: their state on disk, written whole, as often as pays."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from cvfp import cache
from cvfp.ops.adam import Adam

# Between two checkpoints: at least so long, and so many times what writing the last one took.
SECONDS, TIMES = 20.0, 100
# All checkpoints together; the least recently written are deleted first.
BYTES = 8_000_000_000
Row = dict[str, float]
Follow = Callable[[Row], object]


class Checkpoint:
    """A loop's state in the store under `key` (None: it is not kept), and whether to go on.

    `follow` is called with each row of the history, and returns something true to stop the loop
    (`stop`; `partial`: and steps were left); `replay` with each that an earlier process left, where
    `read` has it taken up. `before`: seconds that earlier processes spent on it."""

    def __init__(self, key: str | None, follow: Follow, replay: Follow, read: bool = True) -> None:
        self.path = None if key is None else path_of(key)
        self.follow, self.replay, self.read = follow, replay, read
        self.stop = self.partial = False
        self.before = 0.0

    def tell(self, row: Row) -> None:
        """Pass a new row on."""
        self.stop = bool(self.follow(row)) or self.stop

    def rest(
        self,
        steps: range,
        parts: Iterable[Any],
        generator: torch.Generator,
        history: list[Row],
        best: dict[str, Tensor] | None = None,
    ) -> Iterator[int]:
        """The steps still to do, each of which adds a row to `history`; the state is kept between
        two steps, never after the last, whose outcome is stored. Tensors, modules and Adam among
        `parts` are restored in place, the tensors of `best` replaced whole."""
        live, best = dict(_tensors(parts)), {} if best is None else best
        if self.path is not None and self.read and cache.sound(self.path):
            with safe_open(self.path, "pt") as file, torch.no_grad():
                record = json.loads(file.metadata()["record"])
                kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                generator.set_state(kept.pop("generator"))
                for name, tensor in live.items():
                    tensor.copy_(kept.pop(name))
            best |= kept
            history += record["rows"]
            self.before = record["seconds"]
            for row in history:
                self.replay(row)
                self.follow(row)
        begun = last = time.monotonic()
        cost = 0.0
        for step in steps[len(history) :]:
            yield step
            start = time.monotonic()
            if step == steps[-1]:
                return
            if self.path and (self.stop or start - last >= max(SECONDS, TIMES * cost)):
                record = {"rows": history, "seconds": self.before + start - begun}
                _write(self.path, {"generator": generator.get_state(), **live, **best}, record)
                last = time.monotonic()
                cost = last - start
            if self.stop:
                self.partial = True
                return


def path_of(key: str) -> Path:
    return cache.home() / "checkpoints" / f"{key}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    if sum(tensor.nbytes for tensor in tensors.values()) <= BYTES:
        metadata = {"record": json.dumps(record, allow_nan=False)}
        cache.keep(path, lambda temporary: cache.save(temporary, tensors, metadata))
        cache.evict(path.parent, BYTES)


def _tensors(parts: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    for number, part in enumerate(parts):
        if isinstance(part, Tensor):
            yield f"part {number}", part
        elif isinstance(part, nn.Module):
            yield from ((f"part {number}.{k}", one) for k, one in part.state_dict().items())
        elif isinstance(part, Adam):
            yield from ((f"part {number}.{i}", one) for i, one in enumerate(part.state))
