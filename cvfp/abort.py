"""Note 004's rules for giving Phase 1 up early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ITERATION = 20  # at which they are applied, once
SINCE = 15
RANK = 0.70


def reason(history: Sequence[Mapping[str, float]]) -> str | None:
    """Which of note 004's rules say at iteration 20 that Phase 1 should be given up; None: none do.

    They are: effective rank of the validation contexts under 70 %; no more tokens converged than at
    iteration 15; a loss no lower than the first. A Phase 1 that ended sooner is never given up."""
    rows = {int(row["iteration"]): row for row in history}
    now, since = rows.get(ITERATION), rows.get(SINCE)
    if now is None or since is None:
        return None
    said = []
    rank = now.get("val_er")
    if rank is not None and rank < RANK:
        said.append(f"effective rank {rank:.1%} under {RANK:.0%}")
    if now["converged"] <= since["converged"] and now["converged"] < 1:
        said.append(f"converged tokens {since['converged']:.1%} -> {now['converged']:.1%}")
    if now["loss"] >= history[0]["loss"]:
        said.append(f"loss {history[0]['loss']:.4g} -> {now['loss']:.4g}")
    return "; ".join(said) or None
