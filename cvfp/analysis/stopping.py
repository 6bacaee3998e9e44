"""Early stopping replayed: what a Phase 2 with another patience would have kept (claim C10)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from cvfp.experiment import Result


def replay(result: Result, patiences: Sequence[int]) -> pd.DataFrame:
    """The epoch that each patience would have kept, from the curve of one run.

    Patience changes only where the run ends, so a run of enough epochs holds all shorter ones.

    Returns:
        Indexed by patience: stopped (epochs run), best_epoch, val_ppl, val_acc. Where the run did
        all its epochs, also "none, best kept" and "none, last kept" (no epoch chosen by
        validation).

    Raises:
        ValueError: the run itself stopped before one of the patiences would have.
    """
    history = result.phase2_history
    rows: dict[int | str, dict[str, float]] = {}
    for patience in patiences:
        best = history[0]
        stopped = history[-1]
        for row in history[1:]:
            if row["val_loss"] < best["val_loss"]:
                best = row
            elif row["epoch"] - best["epoch"] >= patience:
                stopped = row
                break
        else:
            if len(history) < result.experiment.phase2_epochs:
                raise ValueError(
                    f"patiences: got {patience}, and the run stopped at epoch {len(history)} of "
                    f"{result.experiment.phase2_epochs}; accepted: a run that went on"
                )
        rows[patience] = _row(stopped, best)
    if len(history) == result.experiment.phase2_epochs:
        best = min(history, key=lambda row: row["val_loss"])
        rows["none, best kept"] = _row(history[-1], best)
        rows["none, last kept"] = _row(history[-1], history[-1])
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("patience")


def rise(result: Result) -> float | None:
    """Relative rise of validation perplexity from the best epoch to two epochs later; None where
    Phase 2 did not go on for two."""
    history = result.phase2_history
    best = min(range(len(history)), key=lambda place: history[place]["val_loss"])
    if best + 2 >= len(history):
        return None
    return math.expm1(history[best + 2]["val_loss"] - history[best]["val_loss"])


def _row(stopped: dict[str, float], best: dict[str, float]) -> dict[str, float]:
    return {
        "stopped": int(stopped["epoch"]),
        "best_epoch": int(best["epoch"]),
        "val_ppl": best["val_ppl"],
        "val_acc": best["val_acc"],
    }
