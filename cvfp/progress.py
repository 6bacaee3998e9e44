"""Progress of a running stage: a bar for a person who watches, short lines for a log.

A terminal or a live notebook gets a tqdm bar that vanishes when the stage ends. Elsewhere (logs,
CI) one line is written for every epoch and every tenth iteration. A notebook executed by papermill
or nbclient stores nothing: its lines go to the terminal that papermill was started from.
`CVFP_PROGRESS` set to bar, lines or none overrides the choice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from tqdm.auto import tqdm

MODES = ("bar", "lines", "none")


def mode() -> str:
    """'bar', 'lines' or 'none'."""
    chosen = os.environ.get("CVFP_PROGRESS", "auto")
    if chosen in MODES:
        return chosen
    if chosen != "auto":
        raise ValueError(f"CVFP_PROGRESS: got {chosen!r}; accepted: auto, bar, lines or none")
    watched = _watched_kernel() if _in_kernel() else sys.stderr.isatty()
    return "bar" if watched else "lines"


def _in_kernel() -> bool:
    return "ipykernel" in sys.modules and hasattr(sys.stderr, "pub_thread")


def _watched_kernel() -> bool:
    """A person's front end sent what runs now, and drew the message's id; ids of Python's client,
    which executes notebooks for papermill and nbclient, begin with the session's."""
    sent = getattr(sys.stderr, "parent_header", {})
    return bool(sent) and not str(sent.get("msg_id")).startswith(f"{sent.get('session')}_")


def _write(line: str) -> None:
    if _in_kernel():
        # The descriptor that stderr had before the kernel began to capture it.
        descriptor = getattr(sys.stderr, "_original_stdstream_copy", None)
        if descriptor is not None:
            os.write(descriptor, (line + "\n").encode())
        return
    print(line, file=sys.stderr, flush=True)


def tell(line: str) -> None:
    """A line for whoever watches or reads the log."""
    if mode() == "lines":
        _write(line)
    elif mode() == "bar":
        tqdm.write(line, sys.stderr)


class Stage(AbstractContextManager["Stage"]):
    """One stage of a run: `with Stage("Phase 1", total=40) as stage: stage.advance(1, figures)`. As
    lines, the figures of every so many calls (`every`) are written, and the last ones."""

    def __init__(self, title: str, total: int, unit: str = "it", every: int = 1) -> None:
        self.title, self.every, self.mode = title, every, mode()
        self.calls = 0
        self.pending: str | None = None
        how: dict[str, Any] = dict(leave=False, disable=self.mode != "bar")
        self.bar = tqdm(total=total, desc=title, unit=unit, unit_scale=True, **how)

    def advance(self, steps: int = 1, figures: Mapping[str, float] | None = None) -> None:
        """Count `steps`; show `figures` if there are any."""
        self.bar.update(steps)
        if figures:
            self.show(figures)

    def show(self, figures: Mapping[str, float]) -> None:
        self.pending = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.bar.set_postfix_str(self.pending)
        self.calls += 1
        if self.calls % self.every == 0:
            self._flush()

    def _flush(self) -> None:
        if self.mode == "lines" and self.pending is not None:
            _write(f"{self.title}: {self.pending}")
        self.pending = None

    def __exit__(self, *error: object) -> None:
        self._flush()
        self.bar.close()


if _in_kernel() and not _watched_kernel():  # other libraries' bars would be stored, too
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
