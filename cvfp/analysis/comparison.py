"""CVFP beside its controls and its peers: what each is, and how far it is from the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cvfp.analysis import intervals, style
from cvfp.analysis.intervals import Paired
from cvfp.config import ParameterError
from cvfp.result import Result
from cvfp.tuning import CVFP, KINDS

Groups = Mapping[str, Sequence[Result]]  # runs by kind

COUNTED: Mapping[str, str] = style.COLUMNS["counted"]  # models that only count
USED = 0.002  # change of perplexity that a cut of the contexts must cost to count


def family(kind: str) -> str:
    """What a kind of run, or a model that counts, predicts from."""
    if kind not in KINDS:
        return "counted"
    fields = KINDS[kind].fields
    if "model" in fields:
        return "end to end"
    return str(style.COLUMNS["families"].get(fields.get("contexts"), "contexts of Phase 1"))


def best(ppl: Mapping[str, float], of: str, but: Sequence[str] = ()) -> str:
    """The kind of a family with the lowest perplexity; "" where there is none."""
    kinds = [kind for kind in ppl if family(kind) == of and kind not in but]
    return min(kinds, key=lambda kind: ppl[kind], default="")


def at(results: Sequence[Result], samples: int) -> list[Result]:
    """The runs of one size."""
    return [one for one in results if one.experiment.samples == samples]


def reference(groups: Groups) -> str:
    """The kind that others are compared with: CVFP as published, or where it is left out, the
    first."""
    return CVFP if CVFP in groups else next(iter(groups), CVFP)


def sizes(groups: Groups) -> list[int]:
    """The sizes that the reference has; at any of them another kind may have no runs. Raises
    `ParameterError`: there is none."""
    first = reference(groups)
    there = sorted({one.experiment.samples for one in groups.get(first, ())})
    if not there:
        raise ParameterError("groups", list(groups), f"runs of {first!r}, the reference")
    return there


def of_size(groups: Groups, samples: int) -> dict[str, list[Result]]:
    """The runs of one size by kind, of the kinds that have any."""
    runs = {kind: at(results, samples) for kind, results in groups.items()}
    return {kind: there for kind, there in runs.items() if there}


def against(groups: Groups, samples: int) -> dict[str, Paired]:
    """The change of perplexity of each kind against the reference, at one size: paired over
    held-out conversations and the seeds that both have; of kinds that share one."""
    runs, first = of_size(groups, samples), reference(groups)
    seeds = {kind: {one.experiment.seed for one in there} for kind, there in runs.items()}
    kinds = [kind for kind in runs if kind != first and seeds[kind] & seeds[first]]
    return {kind: shared(runs[kind], runs[first]) for kind in kinds}


def shared(first: Sequence[Result], second: Sequence[Result]) -> Paired:
    """`intervals.paired` of the seeds that both have."""
    ours, theirs = ({one.experiment.seed: one for one in runs} for runs in (first, second))
    seeds = ours.keys() & theirs.keys()
    return intervals.paired([ours[one] for one in seeds], [theirs[one] for one in seeds])


def rows(groups: Groups) -> list[dict[str, Any]]:
    """Every kind at every size, for JSON: mean perplexity; change against CVFP and its interval,
    fractions (None: CVFP itself, or no interval); what it took."""
    found = []
    for size in sizes(groups):
        changes = against(groups, size)
        for kind, runs in of_size(groups, size).items():
            pair = changes.get(kind)
            ends = (pair.change, pair.low, pair.high) if pair else (None, None, None)
            row = {"samples": size, "kind": kind, "tokens": runs[0].train_tokens}
            row |= {"ppl": float(np.mean([one.val_ppl for one in runs])), "seeds": len(runs)}
            row |= zip(("change", "low", "high"), ends, strict=True)
            row["seconds"] = float(np.mean([training_seconds(one) for one in runs]))
            found.append(row)
        for name, line in counted(at(groups[reference(groups)], size)[0]).items():
            found.append({"samples": size, "kind": name, "ppl": line["ppl"]})
    return found


def counted(run: Result) -> dict[str, dict[str, float]]:
    """The models that only count beside a run, those that it has: nats, ppl and so on, by name."""
    lines = {name: run.baselines[key] for key, name in COUNTED.items()}
    return {name: line for name, line in lines.items() if line}


def trained_parameters(result: Result) -> int:
    """Parameters that either phase trains."""
    counts = dict(result.parameters)
    if result.experiment.freeze_embedding:
        counts.pop("embedding")
    if result.experiment.contexts == "random":
        counts.pop("context_block")
    return sum(counts.values())


def training_seconds(result: Result) -> float:
    """Seconds of both phases, exact contexts included."""
    return sum(result.seconds.get(stage, 0.0) for stage in ("phase1", "contexts", "phase2"))


def by_bin(groups: Groups, samples: int, column: str, reference: str) -> pd.DataFrame:
    """Nats per token of each kind less the reference's, bin by bin, mean over seeds, of the runs'
    "val_positions", "val_frequencies" or "val_bigrams": columns kind, low (least value in the bin),
    tokens, nats."""
    rows = [
        {"kind": kind, "low": row["low"], "tokens": row["tokens"], "nats": row["nats"]}
        for kind, results in groups.items()
        for one in at(results, samples)
        for row in getattr(one, column)
    ]
    frame = pd.DataFrame(rows).assign(nats=lambda table: table.nats / table.tokens)
    means = frame.groupby(["kind", "low"], sort=False).mean()
    means["nats"] -= means.nats[reference].reindex(means.index, level="low")
    return means.drop(index=reference, level="kind").reset_index()


def memory(seeds: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """`gap.memory` of several seeds: for each k the change of perplexity against whole contexts,
    with its 95 % interval over seeds and conversations (None for one seed): columns k (tokens),
    change, low, high."""
    rows = []
    for name in seeds[0].columns[2:]:
        nats = np.array([frame[name] - frame.nats for frame in seeds])
        found = intervals.crossed(nats, seeds[0].tokens.to_numpy())
        ends = (None if end is None else math.expm1(end) for end in (found.low, found.high))
        rows.append((int(name), math.expm1(found.value), *ends))
    return pd.DataFrame(rows, columns=["k", "change", "low", "high"])


def recall(records: Sequence[Mapping[str, Any]], kind: str) -> pd.Series:
    """R² by lag, mean over the kind's runs, of records of `gap.remembers`."""
    tables = [pd.DataFrame(one["recall"]) for one in records if one["kind"] == kind]
    return pd.concat(tables).groupby("lag").r2.mean()


def used_memory(table: pd.DataFrame) -> int | None:
    """The largest k of `memory` whose cut still costs 0.2 %, its interval above 0; None: none."""
    costs = table[(table.change >= USED) & (table.low.astype(float) > 0)]
    return None if costs.empty else int(costs.k.max())
