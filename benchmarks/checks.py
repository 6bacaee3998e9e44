"""What checks cost: whole runs with checksums, locks, reserved disk, estimate and checkpoints, and
without them, in turn.

    python -m benchmarks.checks [setting=reference] [pairs=10]

Every run trains both phases, stores what it made and reads what it can read from its store; the two
kinds have a store each. Prints the median of the pairs' ratios and its ends.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import cvfp
from benchmarks.speed import experiment
from cvfp import cache, checkpoint, data, embeddings, estimate
from cvfp.config import Experiment


@contextmanager
def unchecked() -> Iterator[None]:
    """The package without what keeps runs safe."""

    @contextmanager
    def alone(path: Path) -> Iterator[None]:
        yield

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (cache, "checksum", lambda file, path: b"none"),
        (cache, "sound", Path.exists),
        (cache, "alone", alone),
        (cache, "reserve", lambda file, size: os.truncate(file, size)),
        (cache, "check_home", lambda: None),
        (cache, "evict", lambda folder, most: None),
        (estimate, "check", lambda *sizes: None),
        (checkpoint, "_write", lambda *state: None),
    ]
    with ExitStack() as stack:
        for module, name, other in replaced:
            stack.enter_context(mock.patch.object(module, name, other))
        yield


def seconds(one: Experiment) -> float:
    """Of a run that trains everything, and reads its data from the store."""
    data._load.cache_clear()
    embeddings._table.cache_clear()
    start = time.perf_counter()
    cvfp.run(one, reuse=False)
    return time.perf_counter() - start


def main(setting: str = "reference", pairs: str = "10") -> None:
    home, ratios = cache.home(), []
    with mock.patch.dict(os.environ, CVFP_PROGRESS="none"):
        one = experiment(setting)
        seconds(one)  # tables, and what a first run loads
        with mock.patch.dict(os.environ, CVFP_HOME=str(home / "unchecked")), unchecked():
            seconds(one)
        for pair in range(int(pairs)):
            taken = {}
            for kind in (("with", "without"), ("without", "with"))[pair % 2]:
                if kind == "with":
                    taken[kind] = seconds(one)
                    continue
                with mock.patch.dict(os.environ, CVFP_HOME=str(home / "unchecked")), unchecked():
                    taken[kind] = seconds(one)
            ratios.append(taken["with"] / taken["without"])
            print(f"with {taken['with']:.3f} s, without {taken['without']:.3f} s", flush=True)
    middle = statistics.median(ratios)
    print(f"with / without: {middle:.4f} ({min(ratios):.3f} to {max(ratios):.3f}), {pairs} pairs")


if __name__ == "__main__":
    main(**dict(word.split("=", 1) for word in sys.argv[1:]))
