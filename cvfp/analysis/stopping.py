"""Early stopping replayed: which epoch a Phase 2 with another patience would choose (claim C10)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from cvfp.result import Result


def replay(result: Result, patiences: Sequence[int]) -> pd.DataFrame:
    """The epoch that each patience would have chosen, from the curve of one run: patience changes
    only where the run ends, so a run of enough epochs contains all shorter ones.

    Indexed by patience: stopped (epochs run), best_epoch, val_ppl, val_acc. Where the run did all
    its epochs, also "none, best kept" and "none, last kept". Raises ValueError: the run itself
    stopped before one of the patiences would have."""
    history = result.phase2_history
    rows: dict[int | str, tuple[dict[str, float], dict[str, float]]] = {}
    for patience in patiences:
        chosen = history[0]
        for stopped in history:
            if stopped["val_loss"] < chosen["val_loss"]:
                chosen = stopped
            elif stopped["epoch"] - chosen["epoch"] >= patience:
                break
        else:
            if len(history) < (epochs := result.experiment.phase2_epochs):
                got = f"{patience}, and the run stopped at epoch {len(history)} of {epochs}"
                raise ValueError(f"patiences: got {got}; accepted: a run that went on")
        rows[patience] = stopped, chosen
    if len(history) == result.experiment.phase2_epochs:
        rows["none, best kept"] = history[-1], best(result)
        rows["none, last kept"] = history[-1], history[-1]
    columns = ["epoch", "val_ppl", "val_acc"]
    table = pd.DataFrame([one for _, one in rows.values()], list(rows), columns)
    table = table.rename(columns={"epoch": "best_epoch"}).astype({"best_epoch": int})
    table.insert(0, "stopped", [int(last["epoch"]) for last, _ in rows.values()])
    return table.rename_axis("patience")


def best(result: Result) -> dict[str, float]:
    """The epoch with the lowest validation loss."""
    return min(result.phase2_history, key=lambda row: row["val_loss"])


def rise(result: Result) -> float | None:
    """Relative rise of validation perplexity from the best epoch to two epochs later; None where
    Phase 2 did not go on for two."""
    lowest = best(result)
    for row in result.phase2_history:
        if row["epoch"] == lowest["epoch"] + 2:
            return math.expm1(row["val_loss"] - lowest["val_loss"])
    return None
