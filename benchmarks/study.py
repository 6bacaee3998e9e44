"""The reports of reports/study.toml: how each stands, made anew, confirmed by a short run.

What a report was made of, on what, and what became of it since stands in reports/study.json.
`make study` (dodo.py) calls what is here.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import os
import re
import subprocess
import time
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import nbformat
import torch

import cvfp
from cvfp import cache, config, store, watch

Entry = dict[str, Any]  # a report's part of study.json
State = Literal["fresh", "unconfirmed", "stale", "outdated", "not run"]

ROOT = Path(__file__).resolve().parents[1]
REPORTS, NOTEBOOKS = ROOT / "reports", ROOT / "notebooks"
PRESETS = {"mini": "mini", "published_size": "published_size", "ultrachat": "published"}
# How far a spot run's perplexity may be from the report's, in parts of it: where all of these are
# the same; elsewhere, where sums in another order move whole runs (one thread and two: by 0.13 %).
SAME, ACROSS = 1e-4, 0.005
MACHINE = ("device", "torch", "precision", "threads")


@dataclass(frozen=True)
class Report:
    """A table of study.toml, which says what its fields are."""

    name: str
    notebook: str
    setting: str
    parameters: dict[str, Any]
    spot: dict[str, Any]
    needs_gpu: bool = False
    needs: str | None = None
    picture: bool = False
    spot_needs_gpu: bool = False

    @property
    def source(self) -> Path:
        return NOTEBOOKS / f"{self.notebook}.ipynb"

    @property
    def experiment(self) -> cvfp.Experiment:
        """Of the spot run."""
        return cvfp.Experiment.preset(PRESETS[self.setting], **self.spot)

    @property
    def made_of(self) -> Entry:
        """What the report would be made of now: code, the notebook's cells, parameters."""
        cells = nbformat.read(self.source, 4).cells
        told = [c.source for c in cells if "setup" not in c.metadata.get("tags", [])]
        return {
            "fingerprint": fingerprint(),
            "notebook": cache.digest(told),
            "parameters": {"preset": PRESETS[self.setting], **self.parameters},
        }

    def lacks(self, gpu: bool) -> str | None:
        """What it needs that is not there, in words; `gpu`: whether what is to run needs one."""
        if self.needs and not os.environ.get("HUB"):
            return f"{self.needs} (then: HUB=1)"
        return "a GPU" if gpu and not torch.cuda.is_available() else None


def reports(folder: Path | None = None) -> dict[str, Report]:
    """All reports by name, in study.toml's order."""
    tables = tomllib.loads(((folder or REPORTS) / "study.toml").read_text(encoding="utf-8"))
    return {name: Report(name, **table) for name, table in tables.items()}


@functools.cache
def fingerprint() -> str:
    """Of the code that makes a run's numbers, as in a run's key, but the same whatever Python:
    versions differ in whether `ast.dump` tells of empty lists, and reports come from several."""
    folder = Path(cvfp.__file__).parent
    each = [sorted((folder / n).glob("*.py")) or [folder / f"{n}.py"] for n in store.RUN_CODE]
    code = [cache.normalised(file.read_text(encoding="utf-8")) for files in each for file in files]
    return cache.digest([re.sub(r"\w+=\[\]|[, ]", "", one) for one in code])


def entries(folder: Path | None = None) -> dict[str, Entry]:
    """study.json, by report."""
    path = (folder or REPORTS) / "study.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def keep(name: str, entry: Entry) -> None:
    """Write a report's part of study.json, one process at a time."""
    path = REPORTS / "study.json"
    with cache.alone(path), cache.whole(path) as temporary:
        text = json.dumps({**entries(), name: entry}, indent=1, sort_keys=True, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def state(entry: Entry | None, now: Entry) -> State:
    """How a report stands, from its entry and what it would be made of now.

    "fresh": nothing has changed, or the code has and a spot run then gave the same figure.
    "unconfirmed": the code has, and there was no spot run. "stale": there was, and it gave another
    figure; that stays until one agrees or the report is made anew. "outdated": notebook or
    parameters are others, which only making it anew mends.
    """
    if entry is None:
        return "not run"
    same_code, confirmed = entry["fingerprint"] == now["fingerprint"], entry["confirmed"]
    if not same_code and confirmed and not confirmed["agrees"]:
        return "stale"
    if any(entry[part] != now[part] for part in ("notebook", "parameters")):
        return "outdated"
    confirmed_code = bool(confirmed) and confirmed["fingerprint"] == now["fingerprint"]
    return "fresh" if same_code or confirmed_code else "unconfirmed"


def agrees(before: Entry, now: Entry) -> bool:
    """Whether two spot runs gave the same perplexity, as far as their machines allow to ask."""
    same = all(before[part] == now[part] for part in MACHINE)
    return bool(abs(now["val_ppl"] / before["val_ppl"] - 1) <= (SAME if same else ACROSS))


def left(names: Sequence[str], known: dict[str, Entry]) -> str:
    """How long these reports take, in words, by what they took the last time."""
    last = [known[name]["seconds"] for name in names if name in known]
    words = f"about {sum(last) / 60:.0f} min left"
    return words + f", {len(names) - len(last)} never timed" * (len(last) < len(names))


def execute(report: Report) -> nbformat.NotebookNode:
    """The notebook, executed; runs that the store has are taken from it. As far as it came, it is
    kept under CVFP_HOME. Raises RuntimeError: a cell failed."""
    import papermill

    # It warns of every parameter that the notebook does not list, but `given` may know as a field.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    working = cache.home() / "study" / f"{report.name}.ipynb"
    working.parent.mkdir(parents=True, exist_ok=True)
    given = {**report.made_of["parameters"], "n_jobs": int(os.environ.get("JOBS") or 1)}
    try:
        papermill.execute_notebook(report.source, working, given, cwd=NOTEBOOKS)
    except papermill.PapermillExecutionError as error:
        why = f"{report.name}: cell {error.exec_count}: {error.ename}: {error.evalue}"
        raise RuntimeError(f"{why}\nAs far as it came: {working}") from None
    return nbformat.read(working, 4)


def spot(report: Report) -> Entry:
    """The figure of the spot run, and what it ran on."""
    one = cvfp.run(report.experiment)
    on = dict(
        zip(MACHINE, (one.device_name, torch.__version__, one.precision, one.threads), strict=True)
    )
    return {"val_ppl": one.val_ppl, **on}


def write(report: Report, book: nbformat.NotebookNode) -> None:
    """The report and its picture, whole; without what went to stderr, and without cells' times."""
    pictures = []
    for cell in book.cells:
        for noise in ("execution", "papermill"):
            cell.metadata.pop(noise, None)
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
            data = [one.get("data", {}) for one in cell.outputs]
            pictures += [one["image/png"] for one in data if "image/png" in one]
    if "papermill" in book.metadata:  # not where on this machine
        book.metadata.papermill["input_path"] = f"notebooks/{report.notebook}.ipynb"
        book.metadata.papermill["output_path"] = f"reports/{report.name}.ipynb"
    with cache.whole(REPORTS / f"{report.name}.ipynb") as temporary:
        nbformat.write(book, temporary)
    if report.picture:
        with cache.whole(REPORTS / f"{report.name}.png") as temporary:
            temporary.write_bytes(base64.b64decode(pictures[0]))


def make(
    report: Report,
    execute: Callable[[Report], nbformat.NotebookNode] = execute,
    spot: Callable[[Report], Entry] = spot,
) -> None:
    """Execute the report and write it, its picture and its entry; what fails leaves all three as
    they were."""
    made_of, at, start = report.made_of, commit(), time.monotonic()
    book = execute(report)
    seconds = round(time.monotonic() - start, 1)
    # Mostly from the store: it is one of the report's own runs.
    figure = None if report.lacks(report.spot_needs_gpu) else spot(report)
    write(report, book)
    on = {"device": watch.device_name(config.resolve_device("auto")), "torch": torch.__version__}
    made = {"seconds": seconds, "commit": at, "date": today(), **on}
    keep(report.name, {**made_of, **made, "spot": figure, "confirmed": None})


def confirm(report: Report, spot: Callable[[Report], Entry] = spot) -> bool:
    """Run the report's spot again and keep what came of it; whether the figures agree.

    Raises:
        ValueError: the report has no figure to compare with; it is to be made anew.
    """
    entry = entries()[report.name]
    if entry["spot"] is None:
        raise ValueError(f"{report.name}: no figure of a spot run was kept with it; make it anew")
    now = spot(report)
    found = {**now, "agrees": agrees(entry["spot"], now), "date": today()}
    keep(report.name, {**entry, "confirmed": {"fingerprint": fingerprint(), **found}})
    return bool(found["agrees"])


def commit() -> str | None:
    """The commit, with "+" where files differ from it that no report writes; None without git."""
    others = [".", ":!reports", ":!README.md"]
    with suppress(OSError, subprocess.CalledProcessError):
        head, changed = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--short", "--", *others])
        )
        return head.stdout.strip() + "+" * bool(changed.stdout)
    return None


def today() -> str:
    return datetime.now(UTC).date().isoformat()
