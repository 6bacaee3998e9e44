"""reports/performance.md from the files that `python -m benchmarks.speed` wrote.

python -m benchmarks.report reports/performance.md reports/performance/*.json
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

STAGES = {
    "phase1": ("Phase 1", "loop over groups, autograd"),
    "contexts": ("validation contexts", "token by token"),
    "phase2": ("Phase 2", "eager, float32 logits"),
}
HEAD = """# Performance

What each stage costs, on what it was measured, and how. Every table is written by
`python -m benchmarks.report` from the JSON files in `reports/performance/`, and these by the
command above each table.

**How.** All versions of a stage run in one process and take turns; one turn before the first is not
counted. Figures are medians over the turns, in brackets the quartiles; a ratio is the median of the
turns' ratios. A device is waited for before its clock is read. *Plain* is the same package with
`ops="plain"`, the method as it reads in eager PyTorch with the same seeds, precision and batches:
one group of Phase 1's loss at a time, autograd throughout, float32 logits; contexts token by token
are timed on 5,000 tokens and scaled, being linear in them. *Floor* is the arithmetic of training
alone (products, forward and backward) at the rate of one large product measured in the same
process; validation, sums and memory traffic come on top of it.
"""


def seconds(found: dict[str, Any]) -> str:
    low, high = found["quartiles"]
    return f"{short(found['median'])} ({short(low)}–{short(high)})"


def from_start(found: dict[str, Any]) -> str:
    return (
        f"{seconds(found['to_training'])} s, of which `import torch` "
        f"{seconds(found['import_torch'])}; to Phase 1's first step, an iteration over all tokens, "
        f"{seconds(found['to_first_step'])} s; to the end of the run {seconds(found['to_end'])} s. "
        f"{found['to_training']['turns']} processes, {found['to_end']['turns']} to the end."
    )


def short(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def stages(found: dict[str, Any]) -> str:
    rate = found["rates"][found["precision"]]
    rows = [["stage", "auto, s", "plain, s", "ratio", "tokens/s", "floor, s", "part of the floor"]]
    for name, (title, plain) in STAGES.items():
        if name not in found["stages"]:
            continue
        one = found["stages"][name]
        # Exact contexts are float32 whatever the precision of training.
        at = found["rates"]["float32"] if name == "contexts" else rate
        floor, kit = one["flops"] / at, one["seconds"]["auto"]
        rows.append(
            [
                title,
                seconds(kit),
                f"{seconds(one['seconds']['plain'])}, {plain}",
                f"{one['ratio']['median']:.1f}",
                f"{one['tokens_per_second']:,.0f}",
                short(floor),
                f"{floor / kit['median']:.0%}",
            ]
        )
    second = found["stages"]["phase2"]
    kit, plain = second["val_ppl"]["auto"], second["val_ppl"]["plain"]
    first = found["stages"]["phase1"]["iterations"]
    return (
        table(rows)
        + f"\n\n{kit_turns(found)} turns. Phase 1 took {first['auto'] - 1} iterations (plain: "
        f"{first['plain'] - 1}), Phase 2 {second['epochs']['auto']} epochs (plain: "
        f"{second['epochs']['plain']}). Validation perplexity {kit:.2f}, plain {plain:.2f} "
        f"({100 * (kit / plain - 1):+.2f} %). Contexts in blocks and token by token differ by "
        f"{found['stages']['contexts']['largest_difference']:.1e} at most."
    )


def kit_turns(found: dict[str, Any]) -> int:
    turns: int = found["stages"]["phase1"]["seconds"]["auto"]["turns"]
    return turns


def run(found: dict[str, Any]) -> str:
    one = found["run"]
    parts = ", ".join(f"{name} {short(value)}" for name, value in one["stages"].items())
    device = one["peak_device_memory_mib"]
    lines = [
        "A whole run with data and table cached, storing included: "
        f"**{seconds(one['seconds'])} s** in a warm process ({one['seconds']['turns']} turns; "
        f"{parts}); the first "
        f"of a process {short(one['first_seconds'])} s. "
        f"{one['train_tokens']:,} training and {one['val_tokens']:,} validation tokens, "
        f"{one['epochs']} epochs, perplexity {one['val_ppl']:.2f}. Peak memory "
        f"{one['peak_memory_mib'] / 1024:.1f} GiB"
        + (f", on the device {device / 1024:.1f} GiB." if device else ".")
    ]
    if "start" in found:
        lines.append(
            "From the start of a process to training, caches filled (Python's bytecode too): "
            + from_start(found["start"])
        )
        if "without_bytecode" in found["start"]:
            lines.append(
                "The same with this machine's environment as it is, which forbids Python to keep "
                "bytecode (`PYTHONDONTWRITEBYTECODE`), so that modules installed without it are "
                "compiled at every start, torch's among them: "
                + from_start(found["start"]["without_bytecode"])
            )
    return "\n\n".join(lines)


def ladder(found: dict[str, Any]) -> str:
    one = found["ladder"]
    rows = [["samples", *map(str, one["samples"])]]
    rows.append(["training tokens", *(f"{tokens:,}" for tokens in one["train_tokens"])])
    rows.append(["perplexity", *(f"{ppl:.1f}" for ppl in one["val_ppl"])])
    rows.append(["epochs", *map(str, one["epochs"])])
    turns = one["seconds"]["turns"]
    return f"The ladder, warm: **{seconds(one['seconds'])} s** in all, {turns} turns.\n\n" + table(
        rows
    )


def slope(found: dict[str, Any]) -> str:
    rows = [
        [
            "tokens",
            "contexts kept",
            "Phase 1 iteration, s",
            "Phase 2 epoch, s",
            "exact contexts, s",
            "peak device memory, GiB",
            "peak memory, GiB",
        ]
    ]
    on_device = any(one["peak_device_memory_mib"] for one in found["slope"])
    for one in found["slope"]:
        rows.append(
            [
                f"{one['tokens']:,}",
                {"auto": "as fits"}.get(one["place"], one["place"]),
                *(
                    short(one[name]) if name in one else ""
                    for name in ("phase1_iteration", "phase2_epoch", "contexts")
                ),
                f"{one['peak_device_memory_mib'] / 1024:.2f}" if on_device else "",
                f"{one['peak_memory_mib'] / 1024:.2f}",
            ]
        )
    auto = [one for one in found["slope"] if one["place"] == "auto"]
    tokens = np.array([one["tokens"] for one in auto])
    said = []
    for name, title in (
        ("phase1_iteration", "a Phase 1 iteration"),
        ("phase2_epoch", "a Phase 2 epoch"),
        ("contexts", "exact contexts"),
    ):
        power = np.polyfit(np.log(tokens), np.log([one[name] for one in auto]), 1)[0]
        said.append(f"{title} {power:.3f}")
    memory = "peak_device_memory_mib" if on_device else "peak_memory_mib"
    per_token, base = np.polyfit(tokens, [one[memory] * 2**20 for one in auto], 1)
    return (
        table(rows)
        + "\n\nLog-log slope of time against tokens: "
        + ", ".join(said)
        + f". Peak {'device ' if 'device' in memory else ''}memory grows by {per_token:,.0f} bytes "
        f"a token from {base / 2**30:.2f} GiB. The stream of the run above is repeated to reach "
        "these lengths; the mean of two iterations, one epoch with its recording and validation. "
        f"Medians of turns, as fits: {auto[0]['turns']}, host and disk: 1."
    )


def against(found: dict[str, Any]) -> str:
    one = found["against"]
    rows = [["samples", "earlier, s", "kit, s", "ratio", "per epoch", "earlier PPL", "kit PPL"]]
    sizes = sorted({row["samples"] for row in one["rows"]})

    def medians(rows: list[dict[str, Any]]) -> list[str]:
        earlier, kit = ([r[f"{name}_seconds"] for r in rows] for name in ("earlier", "kit"))
        ratios = [a / b for a, b in zip(earlier, kit, strict=True)]
        epochs = [r["kit_epochs"] / r["earlier_epochs"] for r in rows]
        each = [a * b for a, b in zip(ratios, epochs, strict=True)]
        return [
            short(statistics.median(earlier)),
            short(statistics.median(kit)),
            f"{statistics.median(ratios):.2f}",
            f"{statistics.median(each):.2f}",
        ]

    for samples in sizes:
        at = [row for row in one["rows"] if row["samples"] == samples]
        ppl = [", ".join(f"{row[f'{name}_ppl']:.1f}" for row in at) for name in ("earlier", "kit")]
        rows.append([str(samples), *medians(at), *ppl])
    turns = sorted({row["turn"] for row in one["rows"]})
    whole = []
    for turn in turns:
        at = [row for row in one["rows"] if row["turn"] == turn]
        names = [f"{name}_{what}" for name in ("earlier", "kit") for what in ("seconds", "epochs")]
        whole.append({name: sum(row[name] for row in at) for name in names})
    rows.append(["all", *medians(whole), "", ""])
    return (
        f"The ladder against commit `{one['commit']}`, each version in a process of its own, in "
        f"turn, seeds 42 to {41 + len(turns)}; whole runs, data and table cached. Where the two "
        "stop at different epochs, *per epoch* is the ratio times that of the epochs.\n\n"
        + table(rows)
    )


def section(path: Path) -> str:
    found = json.loads(path.read_text(encoding="utf-8"))
    on = found["machine"]
    lines = [
        f"## {on['device']}{', held down' * bool(on.get('limits'))}: "
        f"{found['setting']}, {found['precision']}",
        f"{on['threads']} threads, torch {on['torch']}, Python {on['python']}, {on['date']}. One "
        f"large product: {found['rates']['bfloat16'] / 1e12:.2f} TFLOP/s in bfloat16, "
        f"{found['rates']['float32'] / 1e12:.2f} in float32.",
        f"`python -m benchmarks.speed {path} --setting {found['setting']}"
        + (" --against CHECKOUT`" if "against" in found else "`"),
    ]
    if on.get("limits"):
        held = " ".join(f"{name}={value}" for name, value in on["limits"].items())
        lines[1] += f" Its products were held down by `{held}`."
    stolen = {name: part for name, part in found.get("stolen", {}).items() if part is not None}
    if stolen:
        lines[1] += " The processors' time that their host gave to others meanwhile: "
        lines[1] += ", ".join(f"{name} {part:.0%}" for name, part in stolen.items()) + "."
    for name, written in (
        ("stages", stages),
        ("run", run),
        ("ladder", ladder),
        ("slope", slope),
        ("against", against),
    ):
        if name in found:
            lines.append(written(found))
    return "\n\n".join(lines)


def main(target: str, *files: str) -> None:
    text = "\n\n".join([HEAD.rstrip(), *(section(Path(file)) for file in files), NOTES])
    Path(target).write_text(text + "\n", encoding="utf-8")


NOTES = """## A CPU without matrix units

None was at hand alone. Two cores of a Xeon, held down to AVX2 by
`ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2`, on a machine
shared with others, 2026-11-26: one pair of runs of `mini` with 100 conversations in float32, data
and table cached, took 45.5 s with commit `d5323bc` and 40.1 s with the kit (Phase 1 17.6 and
13.3 s, Phase 2 26.4 and 25.8 s), a ratio of 1.14. An EPYC with AVX2 alone had taken 33.6 and 37.1 s
with the code before, 0.91. In each checkout, under these settings, twice (the first fits a table):
`cvfp.run(cvfp.Experiment.preset("mini", samples=100, precision="float32"), reuse=False)`.

## Ten million tokens

Contexts are the only thing that grows with the stream and the width: in bfloat16 10 M tokens at
D = 768 are 10^7 x 768 x 2 bytes = 15.4 GB. Phase 1 replaces them in place, so there is one copy. A
GPU of 24 GB holds them beside 80 MB of tokens, 40 MB of changes, the model (6 x 768, V = 50,257,
own head: 0.1 G parameters with gradients and Adam's moments, 1 GB), one pass of Phase 1 (an eighth
of the device's memory, 3 GB) or Phase 2's logits (0.8 GB for a batch, 1.1 GB for validation): 20 GB
in all. The host then holds the tokens alone. Where the device has no room for the contexts they are
kept in pinned host memory, and where that has none in a file mapped into memory, whose pages the
system takes back as it needs them: 16 GB of host memory suffice (`CVFP_CONTEXTS=host` or `disk`
forces either). Batches are read ahead by a thread. A Phase 1 of more than 8 GB is not kept in the
store. Ten million tokens were not run."""


if __name__ == "__main__":
    main(*sys.argv[1:])
