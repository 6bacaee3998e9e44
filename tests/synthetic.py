"""Finished runs that nobody trained, with figures and truths to choose, and textbook statistics."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from cvfp import Experiment, Result, Results
from cvfp.analysis.claims import Measurement

LEVELS: Mapping[str, Sequence[Any]] = {
    "dist_reg_weight": (0.8, 0.9),
    "context_dim": (64, 128, 256),
    "num_input_tokens": (1, 2),
}

LENGTHS = np.array([100.0, 300.0, 200.0])  # tokens of the held-out conversations
SIZES = (50, 100, 200, 400, 800)
TOKENS = 1000  # of a conversation


@functools.cache
def experiment(**given: Any) -> Experiment:
    return Experiment(**{"num_layers": 1, "context_dim": 64, **given})


def made(given: dict[str, Any] | None = None, **measured: Any) -> Result:
    """A Result with nothing in it but what is given, and what cannot do without."""
    exp = experiment(**(given or {}))
    blank: dict[str, Any] = {f.name: None for f in fields(Result) if f.init}
    usual = dict(
        experiment=exp,
        key=f"{exp.samples}-{exp.seed}",
        train_tokens=TOKENS * exp.samples,
        vocab_size=4096,
        val_ppl=100.0,
        train_ppl=80.0,
        train_er=0.78,
        val_er=0.77,
        phase1_iterations=25,
        converged=0.995,
        baselines={},
        phase1_history=[],
        phase2_history=[],
        val_conversations=[],
        seconds={},
        device_name="a CPU",
        precision="float32",
    )
    return Result(**{**blank, **usual, **measured})


def judged(loss: float, given: dict[str, Any], **measured: Any) -> Result:
    """A run of that loss, nats a token; conversations vary about it, by the seed."""
    by_chance = np.random.default_rng(given.get("seed", 0)).normal(0, 0.02, len(LENGTHS))
    nats = LENGTHS * (loss + by_chance - by_chance @ LENGTHS / LENGTHS.sum())
    return made(given, **(scored(LENGTHS, nats) | {"val_ppl": math.exp(loss)} | measured))


def scored(tokens: np.ndarray, nats: np.ndarray) -> dict[str, Any]:
    """Held-out conversations of so many tokens and nats, and their perplexity."""
    rows = [{"tokens": float(t), "nats": float(n)} for t, n in zip(tokens, nats, strict=True)]
    ppl = math.exp(nats.sum() / tokens.sum()) if len(tokens) else None
    return {"val_conversations": rows, "val_ppl": ppl}


def ladder(losses: ArrayLike, sizes: Sequence[int] = SIZES, **given: Any) -> list[Result]:
    """A run for each seed's losses [seeds, sizes], the largest size first."""
    table = np.asarray(losses, dtype=float)
    return [
        judged(float(row[place]), {"samples": sizes[place], "seed": seed, **given})
        for place in reversed(range(len(sizes)))
        for seed, row in enumerate(table)
    ]


def curve(losses: Sequence[float], **given: Any) -> Result:
    """A run of all its epochs, with these validation losses."""
    rows = [
        {"epoch": float(epoch), "val_loss": loss, "val_ppl": math.exp(loss), "val_acc": epoch / 100}
        for epoch, loss in enumerate(losses, start=1)
    ]
    return made({"phase2_epochs": len(rows), **given}, phase2_history=rows)


def losses(seeds: int, sizes: int = len(SIZES), start: int = 0) -> np.ndarray:
    """Laws of exponents about -0.3, with scatter: [seeds, sizes]."""
    generator = np.random.default_rng(start)
    alphas = -0.3 + generator.normal(0, 0.02, (seeds, 1))
    scatter = generator.normal(0, 0.02, (seeds, sizes))
    return 8 + alphas * np.log(TOKENS * np.array(SIZES[:sizes])) + scatter


def matrix(change: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {}) -> Results:
    """Every combination of LEVELS at two sizes and seeds, with scatter of each configuration."""
    generator, results = np.random.default_rng(3), Results()
    for values in itertools.product(*LEVELS.values()):
        given: dict[str, Any] = dict(zip(LEVELS, values, strict=True))
        rank, strength, alpha = generator.normal((0.77, 0.0, -0.3), (0.01, 0.05, 0.02))
        rank += 0.02 * (given["dist_reg_weight"] == 0.9) - 0.03 * (given["context_dim"] == 256)
        strength -= 0.1 * (given["num_input_tokens"] == 2)
        for samples, seed in itertools.product((50, 200), (0, 1, 2)):
            run = {**given, "samples": samples, "seed": seed}
            loss = 8 + strength + alpha * math.log(samples / 100) + 0.01 * generator.normal()
            er = rank + 0.002 * generator.normal()
            rest = dict(val_er=er, train_er=er + 0.01 * (1 if seed else -3), converged=0.995)
            results.append(judged(loss, run, **(rest | change(run))))
    return results


def configurations(
    generator: np.random.Generator,
    count: int,
    *,
    beta: float = 0.0,
    own: float = 0.0,
    noise: float = 0.0,
    sizes: Sequence[int] = (50_000, 100_000, 200_000),
    seeds: int = 2,
    ranks: Sequence[float] | None = None,
) -> Results:
    """log PPL = 10 − 0.4·log tokens + beta·ER + each configuration's own strength + noise; in
    training half of it."""
    ranks = generator.normal(77, 4, count) if ranks is None else ranks
    results = Results()
    for number, rank in enumerate(ranks):
        strength = own * generator.normal()
        for size, seed in itertools.product(sizes, range(seeds)):
            er = min(rank + 0.1 * seed, 99)
            log_ppl = 10 - 0.4 * np.log(size) + beta * er + strength + noise * generator.normal()
            results.append(
                made(
                    dict(context_dim=64 + number, seed=seed),
                    train_tokens=size,
                    val_ppl=float(np.exp(log_ppl)),
                    train_ppl=float(np.exp(log_ppl / 2)),
                    val_er=er / 100,
                    train_er=er / 100,
                    phase1_iterations=20 + number,
                )
            )
    return results


def slope(line: Sequence[float], sizes: Sequence[int] = SIZES) -> float:
    return float(np.polyfit(np.log(np.array(sizes)), line, 1)[0])


def student(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval, from the textbook."""
    centre, count = statistics.fmean(values), len(values)
    half = stats.t.ppf(0.975, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return centre, centre - half, centre + half


def parts(measured: Iterable[Measurement]) -> dict[str, Measurement]:
    """By claim and part: "C1.ppl"."""
    return {f"{one.id}.{one.part}": one for one in measured}


def claims_of(measured: Iterable[Measurement]) -> set[str]:
    return {one.id for one in measured}


def figures(one: Measurement) -> Any:
    return one.estimate, one.low, one.high
