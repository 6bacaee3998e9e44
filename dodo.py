"""One study, one command: doit's tasks (`make study`), and what stands beside them.

python dodo.py status    how each report of reports/study.toml stands
python dodo.py readme    write what README.md and reports/README.md show of the measurements

The environment says which and how: ONLY=name,name, JOBS=runs side by side, HUB=1 for what needs it;
CVFP_ENGINE and CVFP_ADDRESS where they run (docs/scale.md).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

from benchmarks import blocks, study
from cvfp import cache

DOIT_CONFIG = {
    "default_tasks": ["study", "readme"],
    "continue": True,  # past a failure
    "verbosity": 2,
    # doit's own records; what is out of date, study.json says.
    "backend": "json",
    "dep_file": str(cache.home() / "doit.json"),
}


def chosen() -> list[study.Report]:
    """The reports that ONLY names, or all; raises ValueError: an unknown one."""
    every = study.reports()
    only = [name for name in os.environ.get("ONLY", "").split(",") if name]
    if unknown := sorted(set(only) - set(every)):
        raise ValueError(f"ONLY: got {', '.join(unknown)}; accepted: some of {', '.join(every)}")
    return [one for name, one in every.items() if name in (only or every)]


def states() -> dict[str, study.State]:
    known = study.entries()
    return {name: study.state(known.get(name), r.made_of) for name, r in study.reports().items()}


def task_study() -> Iterator[dict[str, Any]]:
    """Make the reports that are out of date."""
    now = states()
    due = [one for one in chosen() if now[one.name] != "fresh"]
    ahead = [one.name for one in due if not one.lacks(one.needs_gpu)]
    for one in chosen():
        yield {"name": one.name, "actions": [(make, [one, ahead])], "uptodate": [one not in due]}


def make(one: study.Report, ahead: list[str]) -> None:
    if why := one.lacks(one.needs_gpu):
        print(f"{one.name}: skipped; needs {why}")
        return
    place = ahead.index(one.name)
    left = study.left(ahead[place:], study.entries())
    print(f"{one.name}: {place + 1} of {len(ahead)}, {left}", flush=True)
    study.make(one)


def task_confirm() -> Iterator[dict[str, Any]]:
    """Run the spots of reports whose code has changed since."""
    now = states()
    for one in chosen():
        due = now[one.name] in ("unconfirmed", "stale")
        yield {"name": one.name, "actions": [(confirm, [one])], "uptodate": [not due]}


def confirm(one: study.Report) -> None:
    if why := one.lacks(one.spot_needs_gpu):
        print(f"{one.name}: skipped; its spot run needs {why}")
        return
    found = "fresh" if study.confirm(one) else "stale: the spot run gave another figure"
    print(f"{one.name}: {found}")


def task_readme() -> dict[str, Any]:
    """Write the pages' measured blocks from the JSON files."""
    return {"actions": [blocks.write], "uptodate": [False]}


def status() -> None:
    """Print how each report stands, with what it was made of."""
    known = study.entries()
    for one in study.reports().values():
        entry = known.get(one.name, {})
        made = [str(entry[part]) for part in ("date", "commit", "device") if entry.get(part)]
        why = one.lacks(one.needs_gpu)
        said = "; ".join(filter(None, [", ".join(made), f"needs {why}" if why else ""]))
        print(f"{study.state(entry or None, one.made_of):12} {one.name:36} {said}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python dodo.py", description=__doc__)
    parser.add_argument("command", choices=["status", "readme"])
    {"status": status, "readme": blocks.write}[parser.parse_args().command]()
