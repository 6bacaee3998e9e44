"""Progress: a bar for a person who watches, short lines for a log.

Many runs are one whole, with the time left. A terminal or a live notebook has a tqdm bar of it and,
below, one of the stage under way; both vanish. Elsewhere (logs, CI) a line is written for every run
of a whole, and each minute; of a run alone, for every epoch and every tenth iteration. A notebook
executed by papermill or nbclient stores nothing: its lines go to the terminal that papermill was
started from. `CVFP_PROGRESS` set to bar, lines or none overrides the choice."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

MODES = {"bar": 0.2, "lines": 60.0, "none": 1e9}  # with seconds between showings of a whole
# Besides all that: called with a stage's title, its steps done and in all, and any figures.
Listener = Callable[[str, int, int, Mapping[str, float]], None]
LISTENER: ContextVar[Listener | None] = ContextVar("LISTENER", default=None)


class Bar(tqdm):  # type: ignore[misc]
    monitor_interval = 0  # no thread of tqdm's, which disabled bars start, too, and none ends


def mode() -> str:
    """'bar', 'lines' or 'none'."""
    chosen = "none" if LISTENER.get() else os.environ.get("CVFP_PROGRESS", "auto")
    if chosen in MODES:
        return chosen
    if chosen != "auto":
        raise ValueError(f"CVFP_PROGRESS: got {chosen!r}; accepted: auto, bar, lines or none")
    seen = watched() if _in_kernel() else sys.stderr.isatty()
    return "bar" if seen else "lines"


def _in_kernel() -> bool:
    return "ipykernel" in sys.modules and hasattr(sys.stderr, "pub_thread")


def watched() -> bool:
    """A person's front end sent what runs now, and drew the message's id; ids of Python's client,
    which executes notebooks for papermill and nbclient, begin with the session's."""
    sent = getattr(sys.stderr, "parent_header", {})
    return bool(sent) and not str(sent.get("msg_id")).startswith(f"{sent.get('session')}_")


def _write(line: str) -> None:
    if not _in_kernel():
        print(line, file=sys.stderr, flush=True)
    # The descriptor that stderr had before the kernel began to capture it.
    elif (descriptor := getattr(sys.stderr, "_original_stdstream_copy", None)) is not None:
        os.write(descriptor, (line + "\n").encode())


def tell(line: str) -> None:
    """A line for whoever watches or reads the log; not within a whole, which says the time left."""
    if mode() == "lines" and not _whole.get():
        _write(line)
    elif mode() == "bar" and not _whole.get():
        tqdm.write(line, sys.stderr)


_whole: ContextVar[Whole | None] = ContextVar("whole", default=None)


class Whole(AbstractContextManager["Whole"]):
    """`with Whole("Sweep", runs, work) as whole`: so many runs of so much work in all, any unit;
    their phases count into it. One inside of another counts into that, and is not shown."""

    def __init__(self, title: str, runs: int, work: float) -> None:
        self.title, self.runs, self.work, self.mode = title, runs, work, mode()
        self.count, self.done, self.one = 0, 0.0, 0.0  # runs and work done; work of the one now
        self.phases: dict[str, float] = {}  # how far it has come in each
        self.start = self.shown = time.monotonic()
        self.outer = _whole.get()
        how: dict[str, Any] = dict(leave=False, disable=self.mode != "bar" or bool(self.outer))
        how |= dict(bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}")
        self.bar = Bar(total=1, desc=title, **how)

    def __enter__(self) -> Whole:
        self.token = _whole.set(self.outer or self)
        return self.outer or self

    def __exit__(self, *error: object) -> None:
        _whole.reset(self.token)
        self.bar.close()

    def begin(self, work: float) -> None:
        self.one, self.phases = work, {}

    def reached(self, phase: str, fraction: float) -> None:
        self.phases[phase] = fraction * phase.startswith("Phase")  # the table's fit is apart
        if time.monotonic() - self.shown >= MODES[self.mode]:
            self.show({})

    def finish(self, stored: bool, figures: Mapping[str, float]) -> None:
        """The run is done; one from the store took no time, which tells nothing of the others."""
        self.count += 1
        self.work, self.done = self.work - self.one * stored, self.done + self.one * (not stored)
        self.phases = {}
        self.show(figures)

    def show(self, figures: Mapping[str, float]) -> None:
        self.shown, phases = time.monotonic(), 2 if "Phase 1" in self.phases else 1
        at = self.done + self.one * sum(self.phases.values()) / phases
        left = (self.work - at) / at * (self.shown - self.start) if at else 0.0
        words = [f"{self.count} of {self.runs} runs"]
        words += [f"{Bar.format_interval(left)} left"] * (at > 0) + [_said(figures)] * bool(figures)
        self.bar.n = at / (self.work or 1.0)
        self.bar.set_postfix_str(", ".join(words))
        if self.mode == "lines":
            _write(f"{self.title}: {', '.join(words)}")


def _said(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


class Stage(AbstractContextManager["Stage"]):
    """One stage of a run: `with Stage("Phase 1", total=40) as stage: stage.advance(1, figures)`. As
    lines, outside of a whole, the figures of so many calls (`every`) and the last are written."""

    def __init__(self, title: str, total: int, unit: str = "it", every: int = 1) -> None:
        self.title, self.total, self.every, self.mode = title, total, every, mode()
        self.calls = self.done = 0
        self.pending: str | None = None
        self.whole = _whole.get()
        how: dict[str, Any] = dict(leave=False, disable=self.mode != "bar", miniters=1)
        self.bar = Bar(total=total, desc=title, unit=unit, unit_scale=True, **how)

    def advance(self, steps: int = 1, figures: Mapping[str, float] | None = None) -> None:
        """Count `steps`; show `figures` if there are any."""
        self.done += steps
        if listener := LISTENER.get():
            listener(self.title, self.done, self.total, figures or {})
        self.bar.update(steps)
        if self.whole is not None:
            self.whole.reached(self.title, self.done / self.total)
        if figures:
            self.show(figures)

    def show(self, figures: Mapping[str, float]) -> None:
        self.pending = _said(figures)
        self.bar.set_postfix_str(self.pending)
        self.calls += 1
        if self.calls % self.every == 0:
            self._flush()

    def _flush(self) -> None:
        if self.mode == "lines" and self.whole is None and self.pending is not None:
            _write(f"{self.title}: {self.pending}")
        self.pending = None

    def __exit__(self, *error: object) -> None:
        self._flush()
        self.bar.close()


if _in_kernel() and not watched():  # other libraries' bars would be stored, too
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
