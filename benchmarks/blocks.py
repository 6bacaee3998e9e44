"""What pages show of the measurements, written from JSON; each notebook's first cell.

Between `<!-- measured: NAME -->` and `<!-- end -->` stands what the function that `BLOCKS` has by
that name makes of the files in reports/; `python dodo.py readme` writes it there, and the first
cells. The repository's address, which both have, comes from pyproject.toml.
"""

from __future__ import annotations

import functools
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import nbformat
import pandas as pd

from benchmarks.report import STAGES, short, table
from cvfp import cache
from cvfp.analysis import claims, comparison, ledger
from cvfp.tuning import CVFP, KINDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "reports/README.md")
MARKED = re.compile(r"(<!-- measured: (\S+) -->)\n(.*?)(<!-- end -->)", re.DOTALL)


def verdicts(reports: Path) -> str:
    """How many of the claims' parts were measured in each setting, and the verdicts by claim."""
    judged = claims.corrected(ledger.load(reports / "claims.json"))
    lines = []
    for setting in claims.SETTINGS:
        here = [one for one in judged if one.setting == setting]
        ids = {v: [one.id for one in here if one.direction == v] for v in get_args(claims.Verdict)}
        free = sum(one.of.cannot_fail and one.direction == "agrees" for one in here)
        against = f" ({', '.join(ids['contradicts'])})" if ids["contradicts"] else ""
        printed = [one.magnitude for one in here if one.magnitude]
        line = (
            f"- `{setting}`, {len(here)} parts of {len({one.id for one in here})} claims: the "
            f"direction agrees in **{len(ids['agrees'])}** ({free} of them could not fail), "
            f"contradicts in **{len(ids['contradicts'])}**{against}, is inconclusive in "
            f"**{len(ids['inconclusive'])}**; of {len(printed)} numbers that the notes print "
            f"{printed.count('agrees')} in the interval measured."
        )
        lines.append(line if here else f"- `{setting}`: nothing measured yet.")
    return "\n".join(lines)


def speed(reports: Path) -> str:
    """Seconds of the stages at the notes' size on a GPU, and of the same formulas as they read."""
    found = json.loads((reports / "performance" / "h100.json").read_text(encoding="utf-8"))
    stages, on, run = found["stages"], found["machine"], found["run"]
    details = {
        "phase1": f"{stages['phase1']['iterations']['auto'] - 1} iterations",
        "contexts": f"exact, {stages['contexts']['tokens']:,} tokens",
        "phase2": f"{stages['phase2']['epochs']['auto']} epochs",
    }
    rows = [["stage", "auto", "plain", "ratio"]]
    for name, (title, _) in STAGES.items():
        medians = [
            f"{short(stages[name]['seconds'][form]['median'])} s" for form in ("auto", "plain")
        ]
        ratio = f"{stages[name]['ratio']['median']:.3g}"
        rows.append([f"{title} ({details[name]})", *medians, ratio])
    rows.append(
        ["whole run, warm, stored and measured", f"{short(run['seconds']['median'])} s", "", ""]
    )
    ppl = stages["phase2"]["val_ppl"]
    return (
        f"{run['train_tokens']:,} training tokens on one {on['device']} in {found['precision']}, "
        f"{on['date']}; medians of {stages['phase1']['seconds']['auto']['turns']} turns with the "
        f'method as it reads (`ops="plain"`) in the same process.\n\n{table(rows)}\n\n'
        f"Perplexity {ppl['auto']:.1f}, plain {ppl['plain']:.1f}. Plain contexts are computed "
        "token by token."
    )


def controls(setting: str, reports: Path) -> str:
    """A setting's controls, a row a kind and a column a size, from controls_SETTING.json, which
    notebook 06 writes: `setting`, `device`, perhaps `date`; `rows` of samples, kind and ppl, where
    it was trained seeds and tokens, and where it is compared change, low, high: of the change
    against CVFP as published, fractions."""
    found = json.loads((reports / f"controls_{setting}.json").read_text(encoding="utf-8"))
    cells = {(row["kind"], row["samples"]): row for row in found["rows"]}
    sizes = sorted({size for _, size in cells})
    there = dict.fromkeys(kind for kind, _ in cells)
    kinds = [*(kind for kind in KINDS if kind in there), *(k for k in there if k not in KINDS)]
    first = CVFP if CVFP in there else next(iter(there))
    base = [cells[first, size] for size in sizes]
    words = "{samples:,} conversations, {tokens:,} tokens, {seeds} seeds"
    rows = [["", *(words.format(**one) for one in base)]]
    for kind in kinds:
        rows.append([kind, *(_change(cells.get((kind, one["samples"])), one) for one in base)])
    on = ", ".join(filter(None, [f"`{found['setting']}`", found["device"], found.get("date")]))
    return (
        f"Perplexity, mean of the seeds, and its change against *{first}* with the 95 % interval. "
        f"{on}.\n\n{table(rows)}"
    )


def reading(setting: str, reports: Path) -> str:
    """What a notebook has read from the same file's runs, in words."""
    found = json.loads((reports / f"{setting}.json").read_text(encoding="utf-8"))
    return str(found["reading"]).replace("-", "−").replace("\n− ", "\n- ")


# What a reader asks first, and how the lines of 06's and 09's readings that answer it begin.
QUESTIONS = {
    "Scales chosen on development text, against the published": "own scales over the published one",
    "Phase 1, against the block that nobody trained, each at its own scales": (
        "Phase 1 over an untrained block, both at their own scales"
    ),
    "The best contexts of Phase 1, against input tokens alone": "the best contexts of Phase 1",
    "Contexts of the untrained block, against input tokens alone": "an untrained block over no con",
    "An untrained block that leaks (time constants to 16 tokens), against one that does not": (
        "at the same scales, a leaky block untrained"
    ),
    "The objective `remember`, against the untrained block, at that block's scales": (
        "at the untrained block's scales, `remember`"
    ),
}
CHANGE = re.compile(r": ([-+][\d.]+%) \((?:95 % interval )?([^,]*), (?:(\d+) seeds?)?")
COUNTING = re.compile(r"the (Kneser[^,]*, .*?) has the lowest perplexity, ([\d.]+); .*: (.*)\.$")


def headline(reports: Path) -> str:
    """What changes perplexity by how much at the notes' size, a row a question, from the readings
    of notebooks 06 and 09; and what passes counting."""
    files = [f"{name}_published_size.json" for name in ("controls", "remember")]
    texts = [json.loads((reports / name).read_text(encoding="utf-8"))["reading"] for name in files]
    parts = [re.split(r"\*\*(\d+) conversations\*\*", text)[1:] for text in texts]
    lines = [
        (int(size), line.removeprefix("- "))
        for part in parts
        for size, text in zip(part[::2], part[1::2], strict=True)
        for line in text.splitlines()
    ]
    sizes = sorted({size for size, _ in lines})
    rows = [["change of perplexity", *(f"{size:,} conversations" for size in sizes)]]
    for question, begins in QUESTIONS.items():
        if not any(line.startswith(begins) for _, line in lines):
            raise ValueError(f"{begins!r}: no line of the readings begins so")
        cells = []
        for size in sizes:
            said = [line for at, line in lines if at == size and line.startswith(begins)]
            if not said:
                cells.append("–")
                continue
            if (found := CHANGE.search(said[0])) is None:
                raise ValueError(f"{said[0]!r}: got no change; accepted: as CHANGE has it")
            change, between, seeds = found.groups()
            alone = "1 seed" in between or seeds is None
            cells.append(f"{change} (1 seed)" if alone else f"{change} ({between}; {seeds} seeds)")
        rows.append([question, *cells])
    counting = {at: one for at, line in lines if (one := COUNTING.search(line))}
    best = [f"{one[2]} ({one[1]})" for one in (counting[size] for size in sizes)]
    rows.append(["Lowest perplexity of what only counts", *best])
    # Names of kinds have commas of their own.
    passes = ["; ".join(k for k in KINDS if k in counting[n][3]) or "none" for n in sizes]
    rows.append(["What passes that, of the kinds that were run there", *passes])
    return table(rows).replace(" (-", " (−").replace("| -", "| −").replace("to -", "to −")


def remembers(setting: str, reports: Path) -> str:
    """What contexts hold, and what is used of it, from the records of `gap.remembers`."""
    path = reports / f"memory_{setting}.json"
    records = [r for r in json.loads(path.read_text(encoding="utf-8")) if r["size"] == 200]
    rows = [["contexts", "perplexity", "contraction a token", "R² 1, 4 tokens back", "used tokens"]]
    rows[0].append("tokens one after the other, of 400,000")
    for kind in dict.fromkeys(one["kind"] for one in records):
        runs = [one for one in records if one["kind"] == kind]
        if "cuts" in runs[0]:
            r2 = dict(zip(*runs[0]["recall"].values(), strict=True))
            cut = comparison.memory([pd.DataFrame(runs[0]["cuts"])])
            used = cut.k[cut.change >= comparison.USED].max()
            steps = [f"{one['long']['steps']:,}" for one in runs if one.get("long")] or ["–"]
            row = [kind, f"{runs[0]['ppl']:.1f}", f"{runs[0]['contraction_rate']:.2f}"]
            row.append(", ".join(f"{r2[lag]:.2f}" for lag in (1, 4)))
            most = "at least " if used == cut.k.max() else ""
            rows.append([*row, f"{most}{used:.0f}", steps[0]])
    return f"One seed each, 200 conversations.\n\n{table(rows)}"


def _change(row: Mapping[str, Any] | None, base: Mapping[str, Any]) -> str:
    """A cell of the controls: "133.8, +3.7 % (+2.7 to +4.7)"; with its seeds if not the base's."""
    if row is None or row["ppl"] is None:
        return "–"
    said = f"{row['ppl']:.1f}"
    change, low, high = (row.get(part) for part in ("change", "low", "high"))
    if change is not None:
        said += f", {100 * change:+.1f} %"
    if low is not None and high is not None:
        said += f" ({100 * low:+.1f} to {100 * high:+.1f})"
    if row.get("seeds") not in (None, base["seeds"]):
        said += f", {row['seeds']} seeds"
    return said.replace("-", "−")


def study(reports: Path) -> str:
    """The reports of study.toml, and what each was made on; `make study-status` says which the code
    has left behind."""
    listed = tomllib.loads((reports / "study.toml").read_text(encoding="utf-8"))
    path = reports / "study.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = [["report", "setting", "made", "commit", "on", "took"]]
    for name, one in listed.items():
        made, entry = ["not run", "", f"needs {one['needs']}" if "needs" in one else "", ""], None
        if entry := known.get(name):
            took = f"{entry['seconds'] / 60:.1f} min"
            made = [entry["date"], entry["commit"] or "–", entry["device"] or "–", took]
        title = f"[{name}]({name}.ipynb)" if entry else name
        rows.append([title, one["setting"], *made])
    return table(rows)


def address() -> str:
    """Where the repository is, as pyproject.toml has it."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["urls"]["Repository"])


def notebooks(reports: Path) -> str:
    """The notebooks, each with its title and a badge that opens it in Colab."""
    rows = [["notebook", "", ""]]
    colab = address().replace("https://github.com", "https://colab.research.google.com/github")
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    for path in sorted((reports.parent / "notebooks").glob("*.ipynb")):
        title = nbformat.read(path, 4).cells[0].source.splitlines()[0].partition("· ")[2]
        opens = f"[![Open in Colab]({badge})]({colab}/blob/main/notebooks/{path.name})"
        rows.append([f"[{path.stem}](notebooks/{path.name})", title, opens])
    return table(rows)


FIRST_CELL = """\
# @title Opens anywhere: where cvfp is missing, as on Colab, it is installed; nothing else changes.
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

if not getattr(importlib.util.find_spec("cvfp"), "origin", None):
    places = [Path("cvfp").resolve(), *Path.cwd().parents]  # a clone beside, or this one
    clones = [str(place) for place in places if (place / "cvfp/version.py").exists()][:1]
    source = ["-e", *clones] if clones else ["git+ADDRESS"]
    pip, how = [sys.executable, "-m", "pip"], dict(capture_output=True, text=True)
    there = subprocess.run([*pip, "list", "--format=freeze"], **how).stdout
    kept = Path(tempfile.mkdtemp(), "kept.txt")
    kept.write_text(there)
    done = subprocess.run([*pip, "install", "-c", str(kept), *source], **how)
    print(done.stderr if done.returncode else done.stdout.strip().split("\\n")[-1])
    sys.path += clones
    importlib.invalidate_caches()"""


def set_up(notebook: Path) -> None:
    """Write the first cell of a notebook, which is tagged `setup`."""
    book = nbformat.read(notebook, 4)
    for cell in book.cells:
        if "setup" in cell.metadata.get("tags", []):
            cell.source = FIRST_CELL.replace("ADDRESS", address())
            cell.metadata["cellView"] = "form"  # closed on Colab, and in JupyterLab:
            cell.metadata["jupyter"] = {"source_hidden": True}
    nbformat.write(book, notebook)


BLOCKS: Mapping[str, Callable[[Path], str]] = {
    "headline": headline,
    "claims": verdicts,
    "speed": speed,
    "study": study,
    "notebooks": notebooks,
    "controls_mini": functools.partial(controls, "mini"),
    "controls_published_size": functools.partial(controls, "published_size"),
    "controls_reading_published_size": functools.partial(reading, "controls_published_size"),
    "remember_reading_published_size": functools.partial(reading, "remember_published_size"),
    "memory_published_size": functools.partial(remembers, "published_size"),
}


def filled(page: str, reports: Path) -> str:
    """The page with every marked block as its files give it now.

    Raises:
        ValueError: a marker that names no block, or has no end.
    """

    def block(found: re.Match[str]) -> str:
        start, name, body, end = found.groups()
        if name not in BLOCKS or "<!-- measured:" in body:
            raise ValueError(
                f"<!-- measured: {name} -->: accepted: {', '.join(BLOCKS)}, and an end"
            )
        return f"{start}\n\n{BLOCKS[name](reports)}\n\n{end}"

    text, count = MARKED.subn(block, page)
    if count != page.count("<!-- measured:"):
        raise ValueError("<!-- measured: …: got one that is not followed by <!-- end -->")
    return text


def write(root: Path = ROOT) -> None:
    """Write the blocks of all pages, and the first cells of all notebooks, anew."""
    for notebook in sorted((root / "notebooks").glob("*.ipynb")):
        set_up(notebook)
    for name in PAGES:
        page = (root / name).read_text(encoding="utf-8")
        with cache.whole(root / name) as temporary:
            temporary.write_text(filled(page, root / "reports"), encoding="utf-8")
