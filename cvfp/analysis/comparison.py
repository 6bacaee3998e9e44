"""CVFP beside its controls and its peers: what each is, and how far it is from the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from cvfp.analysis import intervals
from cvfp.analysis.intervals import Paired
from cvfp.config import Experiment, ParameterError
from cvfp.result import Result

Groups = Mapping[str, Sequence[Result]]  # runs by kind

CVFP = "CVFP"
RANDOM, ZERO, SHUFFLED = "random ContextBlock", "zero contexts", "shuffled contexts"
WINDOW, JOINT = "plain window", "end to end"
LSTM, TRANSFORMER = "LSTM", "transformer"
TRAINED_TABLE = "fitted table, trained on"
RANDOM_TABLE, LEARNT_TABLE = "random table, frozen", "random table, trained"

# Every kind of run: the fields in which it differs from CVFP.
KINDS: Mapping[str, Mapping[str, Any]] = {
    CVFP: {},
    RANDOM: {"contexts": "random"},
    ZERO: {"contexts": "zero"},
    SHUFFLED: {"contexts": "shuffled"},
    WINDOW: {"contexts": "window"},
    JOINT: {"contexts": "end_to_end"},
    LSTM: {"model": "lstm"},
    TRANSFORMER: {"model": "transformer"},
    TRAINED_TABLE: {"freeze_embedding": False},
    RANDOM_TABLE: {"embedding": "random"},
    LEARNT_TABLE: {"embedding": "random", "freeze_embedding": False},
}
# Kinds tuned to a learning rate of their own; the others run at CVFP's.
TUNED = (CVFP, RANDOM, ZERO, WINDOW, JOINT, LSTM, TRANSFORMER)
# Models without any training by gradients, on the same tokens: `baselines.NAMES`.
COUNTED: Mapping[str, str] = {
    "kneser_ney": "Kneser–Ney bigram",
    "trigram": "Kneser–Ney trigram",
    "trigram_both": "Kneser–Ney trigram, fitting + training",
    "table": "fitted table alone",
}


def experiments(experiment: Experiment, rates: Mapping[str, float]) -> dict[str, Experiment]:
    """The Experiment as each kind of run, at its learning rate.

    Args:
        rates: Phase 2 learning rate of the kinds in `TUNED`.
    """
    rate = {kind: rates[kind if kind in TUNED else CVFP] for kind in KINDS}
    return {
        kind: experiment.replace(**changes, phase2_learning_rate=rate[kind])
        for kind, changes in KINDS.items()
    }


def best_rate(results: Sequence[Result]) -> float:
    """The Phase 2 learning rate of the run with the lowest perplexity.

    Raises:
        ParameterError: no run with a perplexity.
    """
    scored = [one for one in results if one.val_ppl is not None]
    if not scored:
        raise ParameterError("results", [one.key for one in results], "runs with a perplexity")
    best = min(scored, key=lambda one: one.val_ppl or 0.0)
    return best.experiment.phase2_learning_rate


def at(results: Sequence[Result], samples: int) -> list[Result]:
    """The runs of one size."""
    return [one for one in results if one.experiment.samples == samples]


def sizes(groups: Groups) -> list[int]:
    """The sizes that all kinds have.

    Raises:
        ParameterError: there is none.
    """
    there = {kind: {one.experiment.samples for one in runs} for kind, runs in groups.items()}
    shared = set.intersection(*there.values())
    if not shared:
        raise ParameterError("groups", there, "runs of all kinds at one size or more")
    return sorted(shared)


def against(groups: Groups, samples: int) -> dict[str, Paired]:
    """The change of perplexity of each kind against CVFP, at one size: paired over seeds and
    held-out conversations."""
    theirs = at(groups[CVFP], samples)
    return {
        kind: intervals.paired(at(runs, samples), theirs)
        for kind, runs in groups.items()
        if kind != CVFP
    }


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
    """Nats per token of each kind less the reference's, bin by bin, mean over seeds.

    Args:
        column: "val_positions" or "val_frequencies".

    Returns:
        Columns kind, low (least value in the bin), tokens, nats.
    """
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
