"""How fast the kit is, against the method as it reads (ops="plain"), in one process on one machine.

    python -m benchmarks.speed reports/performance/NAME.json [--setting mini|reference]
        [--repeats 5] [--parts stages,run,ladder,slope,start] [--against CHECKOUT]

Competing versions take turns, so that a slow minute of the machine falls on all of them; figures
are medians over the turns, ratios are medians of each turn's ratio. `--against` runs the ladder of
an earlier checkout of this repository in turn with this one, each in a process of its own.
`python -m benchmarks.report` writes reports/performance.md from the files.
"""

from __future__ import annotations

import argparse
import ast
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

import cvfp
from cvfp import Experiment, cache, contexts, corpora, ops, phase1, phase2, seeds
from cvfp.build import build_cvfp
from cvfp.experiment import prepare
from cvfp.model import CVFP
from cvfp.watch import Watch

MODES = ("auto", "plain")
LADDER = (50, 100, 200, 500)
SLOPE_TOKENS = (100_000, 300_000, 1_000_000, 3_000_000)
STEP_BY_STEP = 5_000  # tokens; its time is linear in them
SETTINGS: dict[str, dict[str, Any]] = {
    "mini": dict(samples=100),
    # That of the published measurements: 6 x 768, V = 50,257, own head, stream order.
    "reference": dict(
        preset="published",
        train_split="train",
        validation_split=None,
        embedding="ppmi",
        embedding_dim=768,
        fitting_samples=2000,
    ),
}


def experiment(setting: str, **fields: Any) -> Experiment:
    given = {**SETTINGS[setting], **fields}
    if setting == "reference":
        given |= dict(dataset=str(_conversations()), tokenizer="gpt2-bpe")
        made = Experiment.preset(given.pop("preset"), **given)
        return made.replace(validation_split=None, column="text").resolved()
    return Experiment.preset(**given).resolved()


def _conversations() -> Path:
    """chitchat with 2,000 conversations to fit on before those to train on, as a local file."""
    path = cache.home() / "benchmarks" / "conversations.jsonl"
    if not path.exists():
        every = corpora.load_corpus(Experiment(samples=2999, tokenizer="none", embedding="none"))
        train = every.train
        with cache.whole(path) as file, file.open("w", encoding="utf-8") as out:
            for text in [*train[500:2500], *train[:500]]:
                out.write(json.dumps({"text": text}) + "\n")
    return path


class Bench:
    """One setting on one machine."""

    def __init__(self, setting: str, repeats: int) -> None:
        self.setting, self.repeats = setting, repeats
        self.exp = experiment(setting)
        self.device = torch.device(self.exp.device)
        self.data, self.table = prepare(self.exp)
        self.train = self.data.train.tokens.to(self.device)
        self.val = self.data.validation.tokens.to(self.device)

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        self.sync()
        start = time.perf_counter()
        made = work()
        self.sync()
        return time.perf_counter() - start, made

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def model(self) -> CVFP:
        return build_cvfp(self.exp, self.table.weight.to(self.device))

    def turns(self, versions: dict[str, Callable[[], tuple[float, Any]]]) -> dict[str, list[Any]]:
        """Each version in turn, `repeats` times, after one turn that is not counted."""
        kept: dict[str, list[Any]] = {name: [] for name in versions}
        for turn in range(self.repeats + 1):
            for name, version in versions.items():
                gc.collect()
                made = version()
                if turn:
                    kept[name].append(made)
                print(f"  {name}: {made[0]:.3f} s", file=sys.stderr, flush=True)
        return kept

    # What is timed

    def phase1(self, mode: str) -> tuple[float, Any]:
        model = self.model()
        inputs = model.context_inputs(self.train)
        draws = seeds.generator(self.exp.seed, "phase1", self.exp.device)
        with ops.using(mode):
            seconds, made = self.timed(
                lambda: phase1.train(model.context_block, inputs, self.exp, draws)
            )
        return seconds, (model, made.contexts, made.iterations)

    def phase2(
        self, mode: str, first: tuple[CVFP, Tensor, int], exact: Tensor
    ) -> tuple[float, Any]:
        model = self.model()
        model.context_block.load_state_dict(first[0].context_block.state_dict())
        draws = seeds.generator(self.exp.seed, "batches")

        def work() -> phase2.Phase2:
            return phase2.train(
                phase2.Positions(model, first[1], self.train),
                phase2.Positions(model, exact, self.val),
                self.exp,
                draws,
            )

        with ops.using(mode):
            seconds, made = self.timed(work)
        return seconds, (math.exp(made.validation.loss), len(made.history))

    def exact(
        self, model: CVFP, method: Any, tokens: Tensor, mode: str = "auto"
    ) -> tuple[float, Any]:
        block, inputs = model.context_block, model.context_inputs(tokens)
        with ops.using(mode):
            return self.timed(lambda: contexts.evaluate(block, inputs, method=method).values)

    def stages(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        first = self.turns({mode: partial(self.phase1, mode) for mode in MODES})
        model, _, iterations = first["auto"][-1][1]
        plain = first["plain"][-1][1]
        tokens = len(self.train) * (iterations - 1)
        flops = self.phase1_flops() * tokens
        found["phase1"] = summary(first, tokens, flops) | {
            "iterations": {"auto": iterations, "plain": plain[2]}
        }
        short = self.val[:STEP_BY_STEP]
        of_context = self.turns(
            {
                "auto": lambda: self.exact(model, "blocks", self.val),
                "plain": lambda: self.exact(model, "sequential", short, "plain"),
            }
        )
        # Step by step is linear in the tokens: scaled to all of them.
        scale = len(self.val) / len(short)
        of_context["plain"] = [(s * scale, made) for s, made in of_context["plain"]]
        found["contexts"] = summary(
            of_context, len(self.val), 2 * self.weights()[0] * len(self.val)
        )
        exact = of_context["auto"][-1][1]
        difference = exact[: len(short)] - of_context["plain"][-1][1]
        found["contexts"]["largest_difference"] = float(difference.abs().max())
        plain_exact = self.exact(plain[0], "blocks", self.val)[1]
        second = self.turns(
            {
                "auto": lambda: self.phase2("auto", first["auto"][-1][1], exact),
                "plain": lambda: self.phase2("plain", plain, plain_exact),
            }
        )
        ppl, epochs = second["auto"][-1][1]
        plain_ppl, plain_epochs = second["plain"][-1][1]
        tokens = (len(self.train) - 1) * epochs
        found["phase2"] = summary(second, tokens, self.phase2_flops() * tokens) | {
            "epochs": {"auto": epochs, "plain": plain_epochs},
            "val_ppl": {"auto": ppl, "plain": plain_ppl},
        }
        return found

    def run(self) -> dict[str, Any]:
        """Whole runs, data and table cached: the first of this process, and later ones."""
        every = [
            self.timed(lambda: cvfp.run(self.exp, reuse=False)) for _ in range(self.repeats + 1)
        ]
        later = every[1:]
        last = later[-1][1]
        stages = {
            name: statistics.median(r.seconds[name] for _, r in later) for name in last.seconds
        }
        return {
            "first_seconds": every[0][0],
            "seconds": spread([s for s, _ in later]),
            "stages": stages,
            "val_ppl": last.val_ppl,
            "val_er": last.val_er,
            "epochs": len(last.phase2_history),
            "peak_memory_mib": last.peak_memory_mib,
            "peak_device_memory_mib": last.peak_device_memory_mib,
            "train_tokens": last.train_tokens,
            "val_tokens": last.val_tokens,
        }

    def ladder(self) -> dict[str, Any]:
        """Running time of the sizes 50 to 500 one after the other, warm."""
        each = [experiment(self.setting, samples=samples) for samples in LADDER]
        for one in each:
            prepare(one)
        totals: list[float] = []
        results: list[cvfp.Result] = []
        for turn in range(self.repeats + 1):
            seconds, results = self.timed(lambda: [cvfp.run(one, reuse=False) for one in each])
            if turn:
                totals.append(seconds)
            print(f"  ladder: {seconds:.2f} s", file=sys.stderr, flush=True)
        return {
            "samples": list(LADDER),
            "train_tokens": [r.train_tokens for r in results],
            "seconds": spread(totals),
            "val_ppl": [r.val_ppl for r in results],
            "epochs": [len(r.phase2_history) for r in results],
        }

    def slope(self) -> list[dict[str, Any]]:
        """Seconds and peak memory of a Phase 1 iteration, an epoch and exact contexts against
        tokens, the stream repeated; and the places that contexts can be kept in."""
        rows = []
        turns = min(3, self.repeats)
        cases = [(tokens, "auto") for tokens in SLOPE_TOKENS]
        cases += [(1_000_000, place) for place in ("host", "disk")]
        kept: dict[tuple[int, str], list[dict[str, Any]]] = {case: [] for case in cases}
        self._at(*cases[0])  # loops are compiled, libraries started
        for turn in range(turns):
            for case in cases:
                if turn and case[1] != "auto":
                    continue
                kept[case].append(self._at(*case))
                print(f"  {case}: {kept[case][-1]}", file=sys.stderr, flush=True)
        for (tokens, place), made in kept.items():
            medians = {name: statistics.median(m[name] for m in made) for name in made[0]}
            rows.append({"tokens": tokens, "place": place, "turns": len(made), **medians})
        return rows

    def _at(self, tokens: int, place: str) -> dict[str, float]:
        os.environ["CVFP_CONTEXTS"] = place
        try:
            row = self._trained(self.stream(tokens))
        finally:
            del os.environ["CVFP_CONTEXTS"]
        if place == "auto":
            row["contexts"] = self.exact(self.model(), "blocks", self.stream(tokens))[0]
        return row

    def stream(self, tokens: int) -> Tensor:
        """The training stream, repeated until it has that many tokens."""
        return self.train.repeat(math.ceil(tokens / len(self.train)))[:tokens]

    def _trained(self, stream: Tensor) -> dict[str, float]:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        exp = self.exp.replace(phase1_max_iterations=4, convergence_rate=1.0, phase2_epochs=1)
        model, watch = self.model(), Watch(exp.device)
        inputs, short = model.context_inputs(stream), self.val[:2048]
        draws = seeds.generator(exp.seed, "phase1", exp.device)
        ends: list[float] = []  # an iteration ends with a read from the device
        made = phase1.train(
            model.context_block, inputs, exp, draws, lambda row: ends.append(time.perf_counter())
        )
        exact = self.exact(model, "blocks", short)[1]
        second, _ = self.timed(
            lambda: phase2.train(
                phase2.Positions(model, made.contexts, stream),
                phase2.Positions(model, exact, short),
                exp,
                seeds.generator(exp.seed, "batches"),
            )
        )
        peaks = watch.peaks()
        return {
            "phase1_iteration": (ends[-1] - ends[0]) / (len(ends) - 1),
            "phase2_epoch": second,
            "peak_memory_mib": peaks["peak_memory_mib"],
            "peak_device_memory_mib": peaks["peak_device_memory_mib"] or 0.0,
        }

    # Arithmetic

    def weights(self) -> tuple[int, int, int]:
        """Weights that a token is multiplied with: ContextBlock, TokenBlock, head."""
        model = self.model()
        return (
            sum(p.numel() for p in model.context_block.parameters() if p.ndim == 2),
            sum(p.numel() for p in model.token_block.parameters() if p.ndim == 2),
            model.embedding.numel(),
        )

    def phase1_flops(self) -> float:
        """A token in an iteration: forward, weights' gradients, and contexts' but the first's."""
        context, _, _ = self.weights()
        inner = self.exp.context_dim**2 * (self.exp.num_layers - 1)
        return 2.0 * (2 * context + inner)

    def phase2_flops(self) -> float:
        """A token in an epoch of training; validation is not counted."""
        context, token, head = self.weights()
        inner = self.model().embedding.shape[1] ** 2 * (self.exp.num_layers - 1)
        trained = not self.exp.weight_tying or not self.exp.freeze_embedding
        return 2.0 * (context + 2 * token + inner + (3 if trained else 2) * head)

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of a large product, the best of several: what the floor is counted in."""
        size = 8192 if self.device.type == "cuda" else 4096
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        best = min(self.timed(lambda: a @ b)[0] for _ in range(8))
        return 2.0 * size**3 / best


def spread(seconds: list[float]) -> dict[str, Any]:
    low, high = np.percentile(seconds, [25, 75])
    return {
        "median": statistics.median(seconds),
        "quartiles": [float(low), float(high)],
        "turns": len(seconds),
    }


def summary(kept: dict[str, list[Any]], tokens: int, flops: float) -> dict[str, Any]:
    times = {name: [made[0] for made in each] for name, each in kept.items()}
    ratios = [b / a for a, b in zip(times["auto"], times["plain"], strict=True)]
    return {
        "seconds": {name: spread(each) for name, each in times.items()},
        "ratio": spread(ratios),
        "tokens": tokens,
        "tokens_per_second": tokens / statistics.median(times["auto"]),
        "flops": flops,
    }


STARTER = """
import sys, time
began, times = float(sys.argv[4]), {}
def reached(what):
    times.setdefault(what, time.time() - began)
import torch
reached("import_torch")
import cvfp
from benchmarks import speed
from cvfp.ops.adam import Adam
train, step = cvfp.phase1.train, Adam.step
def trained(*given, **named):
    reached("to_training")
    return train(*given, **named)
def stepped(*given):
    step(*given)
    reached("to_first_step")
    if sys.argv[3] == "start":
        sys.exit(print("STARTED", times))
cvfp.phase1.train, Adam.step = trained, stepped
cvfp.run(speed.experiment(sys.argv[1], seed=int(sys.argv[2])), reuse=False)
reached("to_end")
print("STARTED", times)
"""


def cold(setting: str, repeats: int) -> dict[str, Any]:
    """From the start of a process to training, and to the end of the run; caches filled, Python's
    bytecode among them. Containers often forbid Python to keep bytecode; then it compiles torch's
    modules at every start, which is measured beside it."""
    bytecode = str(cache.home() / "bytecode")
    keeping = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": bytecode}
    processes(setting, 1, keeping)  # fills the caches
    made = processes(setting, repeats, keeping)
    if sys.dont_write_bytecode:
        made["without_bytecode"] = processes(setting, repeats, {})
    return made


def processes(setting: str, repeats: int, environment: dict[str, str]) -> dict[str, Any]:
    made: dict[str, list[float]] = {}
    for seed in range(2 * repeats):
        until = "start" if seed % 2 else "end"
        ran = subprocess.run(
            [sys.executable, "-c", STARTER, setting, str(seed), until, str(time.time())],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **environment},
        )
        times = ast.literal_eval(ran.stdout.split("STARTED")[1].strip())
        for name, seconds in times.items():
            made.setdefault(name, []).append(seconds)
        print(f"  start: {times}", file=sys.stderr, flush=True)
    return {name: spread(seconds) for name, seconds in made.items()}


LADDER_WORKER = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import cvfp
assert cvfp.__file__.startswith(sys.argv[1]), cvfp.__file__
for line in sys.stdin:
    fields = json.loads(line)
    exp = cvfp.Experiment.preset(**fields)
    start = time.perf_counter()
    result = cvfp.run(exp, reuse=False)
    seconds = time.perf_counter() - start
    print("RAN", json.dumps([seconds, result.val_ppl, len(result.phase2_history)]), flush=True)
"""


def against(checkout: Path, repeats: int, precision: str) -> dict[str, Any]:
    """The mini ladder of an earlier checkout and of this one in turn; only one works at a time."""
    here = Path(__file__).resolve().parents[1]
    folders = {"earlier": checkout.resolve(), "kit": here}
    workers = {
        name: subprocess.Popen(
            [sys.executable, "-c", LADDER_WORKER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        for name, folder in folders.items()
    }

    def ask(name: str, **fields: Any) -> list[float]:
        worker = workers[name]
        assert worker.stdin is not None
        assert worker.stdout is not None
        print(json.dumps(fields | {"precision": precision}), file=worker.stdin, flush=True)
        for line in worker.stdout:
            if line.startswith("RAN"):
                made: list[float] = json.loads(line[3:])
                return made
        raise SystemExit(f"against: the worker of {folders[name]} ended")

    for samples in LADDER:  # data, table and libraries are there when the turns begin
        for name in workers:
            ask(name, samples=samples, phase1_max_iterations=2, phase2_epochs=1)
    rows = []
    for turn in range(repeats):
        for samples in LADDER:
            row: dict[str, Any] = {"turn": turn, "samples": samples}
            for name in workers if turn % 2 == 0 else reversed(list(workers)):
                seconds, ppl, epochs = ask(name, samples=samples, seed=42 + turn)
                row |= {f"{name}_seconds": seconds, f"{name}_ppl": ppl, f"{name}_epochs": epochs}
            rows.append(row)
            print(f"  {row}", file=sys.stderr, flush=True)
    for worker in workers.values():
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    named = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
    )
    known = (checkout / ".git").exists()  # or git would name the repository around it
    return {"commit": named.stdout.strip() if known else checkout.name, "rows": rows}


# Settings that hold a processor's products down, to stand for one without the units they forbid.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else ops.processor(),
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--setting", choices=SETTINGS, default="mini")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", default="stages,run,ladder,slope,start")
    parser.add_argument("--against", type=Path)
    given = parser.parse_args()
    parts = [part for part in given.parts.split(",") if part]
    os.environ["CVFP_PROGRESS"] = "none"
    found = json.loads(given.file.read_text()) if given.file.exists() else {}
    bench = Bench(given.setting, given.repeats)
    found |= {
        "setting": given.setting,
        "precision": bench.exp.precision,
        "machine": machine(bench.device),
    }
    if "stages" in parts or "rates" not in found:  # theirs are the floors
        found["rates"] = {str(t)[6:]: bench.rate(t) for t in (torch.bfloat16, torch.float32)}
    work: dict[str, Callable[[], Any]] = {
        "stages": bench.stages,
        "run": bench.run,
        "ladder": bench.ladder,
        "slope": bench.slope,
        "start": lambda: cold(given.setting, min(3, given.repeats)),
    }
    if given.against:
        work["against"] = lambda: against(given.against, given.repeats, bench.exp.precision)
        parts.append("against")
    stolen = found.setdefault("stolen", {})
    for part in parts:
        print(part, file=sys.stderr, flush=True)
        before = psutil.cpu_times()
        found[part] = work[part]()
        stolen[part] = taken_by_others(before, psutil.cpu_times())
        _write(given.file, found)


def taken_by_others(before: Any, after: Any) -> float | None:
    """Part of the processors' time that the machine they are virtual on gave to others."""
    if not hasattr(after, "steal"):
        return None  # counted on Linux only
    # What guests of this machine took is in `user` already.
    passed = sum(after[:8]) - sum(before[:8])
    return float((after.steal - before.steal) / passed)


def _write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
