"""The ledger of claims: what the notes say, their tables give and runs of this kit measured.

A notebook that measures a claim stores the measurement with `record`;
`python -m cvfp.analysis.ledger FILE` writes the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from cvfp import cache
from cvfp.analysis import recomputed
from cvfp.analysis.claims import CLAIMS, FEWEST_SEEDS, Claim, Measurement, Verdict, known, verdict


def record(id: str, measurement: Measurement) -> Path:
    """Store a claim's measurement, in place of an earlier one; returns its file.

    Raises:
        ValueError: no claim of that id.
    """
    path = cache.home() / "claims" / f"{known(id)}.json"
    cache.keep(path, lambda temporary: _write(temporary, asdict(measurement)))
    return path


def measurements() -> dict[str, Measurement]:
    """The store's measurements by claim, in the ledger's order."""
    paths = {id: cache.home() / "claims" / f"{id}.json" for id in CLAIMS}
    read = {id: path.read_text(encoding="utf-8") for id, path in paths.items() if cache.sound(path)}
    return {id: Measurement(**json.loads(text)) for id, text in read.items()}


def load(path: Path) -> dict[str, Measurement]:
    """The measurements of a ledger, from the .json beside its page.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        return {known(id): Measurement(**row) for id, row in dict(read).items()}
    except (TypeError, ValueError) as error:
        accepted = "a file that cvfp.analysis.ledger wrote"
        raise ValueError(f"{path}: got {error}; accepted: {accepted}") from error


def _write(path: Path, rows: dict[str, Any]) -> None:
    text = json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def row(claim: Claim, measurement: Measurement | None) -> dict[str, str]:
    """A claim's row of the ledger."""
    measured, seeds, by = f"not run; takes {claim.takes}", "–", claim.notebook
    if measurement is not None:
        measured = f"{measurement.figure} ({measurement.words})"
        seeds, by = str(measurement.seeds), measurement.notebook
    return {
        "claim": claim.id,
        "sentence": claim.sentence,
        "published": claim.published,
        "recomputed": from_tables(claim),
        "measured": measured,
        "n": seeds,
        "verdict": verdict(claim, measurement),
        "by": by,
    }


def from_tables(claim: Claim) -> str:
    """What the notes' own tables say of a claim, in words."""
    stands = {True: "stands", False: "does not stand as printed", None: "cannot be told"}
    words = claim.recomputed.format(**recomputed.figures(claim.id))
    return f"{stands[claim.stands]}: {words}"


def frame(ids: Iterable[str], measured: Mapping[str, Measurement]) -> pd.DataFrame:
    """These claims of the ledger, one row a claim.

    Columns: claim, sentence, published, recomputed, measured (value and 95 % interval), n (seeds),
    verdict, by (the notebook).

    Raises:
        ValueError: no claim of that id.
    """
    for id in measured:
        known(id)
    return pd.DataFrame([row(CLAIMS[known(id)], measured.get(id)) for id in ids])


def rows(ids: Sequence[str], measured: Mapping[str, Measurement]) -> str:
    """These claims of the ledger as a Markdown table, as notebooks print them; see `frame`."""
    return _lines(frame(ids, {id: one for id, one in measured.items() if id in ids}))


def markdown(measured: Mapping[str, Measurement]) -> str:
    """The whole ledger as a page: how to read it, the table, and each claim in full.

    Raises:
        ValueError: a measurement of no claim.
    """
    table = frame(CLAIMS, measured)
    counts = table.verdict.value_counts()
    summary = ", ".join(f"{name} {counts.get(name, 0)}" for name in get_args(Verdict))
    head = f"""# The claims of the notes, one by one

Each claim is put as one sentence that can be false on any corpus, about one number. *Published* is
what the note says; *recomputed* is the same from the note's own tables; *measured* is the number
from runs of this kit, with its 95 % interval, and *n* the seeds behind it. The verdict follows from
a rule fixed before the runs: the measurement *agrees* if its whole interval lies in the claim's
region, *contradicts* if none of it does, and is *inconclusive* otherwise, or on fewer than
{FEWEST_SEEDS} seeds. A verdict holds for the corpus, tokeniser and sizes it was measured on.

{len(measured)} of {len(CLAIMS)} claims are measured. Verdicts: {summary}.
"""
    full = [_full(claim, measured.get(claim.id)) for claim in CLAIMS.values()]
    return "\n\n".join([head + "\n" + _lines(table), *full]) + "\n"


def _lines(table: pd.DataFrame) -> str:
    head = [_line(table.columns), _line(["---"] * len(table.columns))]
    return "\n".join(head + [_line(cells) for cells in table.to_numpy().tolist()])


def _line(cells: Iterable[str]) -> str:
    clean = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(clean)} |"


def _full(claim: Claim, measurement: Measurement | None) -> str:
    said = [
        f"## {claim.id} · {claim.title}",
        f"**{claim.sentence}** (note {claim.notes})",
        f"- Number: {claim.quantity}. It agrees if its whole 95 % interval lies {claim.where}, and "
        "contradicts if none of it does.",
        f"- Published: {claim.published}.",
        f"- Recomputed: {from_tables(claim)}.",
    ]
    if measurement is None:
        said.append(f"- Measured: not run; takes {claim.takes} (`{claim.notebook}`).")
    else:
        seeds = f"{measurement.seeds} seed{'' if measurement.seeds == 1 else 's'}"
        said += [
            f"- Measured: {measurement.figure}, {seeds}: {measurement.words}. "
            f"On {measurement.ran_on}.",
            f"- Verdict: **{verdict(claim, measurement)}**. Again by `{measurement.command}`",
        ]
    return "\n\n".join(said[:2]) + "\n\n" + "\n".join(said[2:])


def main() -> None:
    """Write the page, and the measurements behind it beside it."""
    parser = argparse.ArgumentParser(
        prog="python -m cvfp.analysis.ledger",
        description="Write the ledger of claims. The measurements behind it stay in a .json of the "
        "same name beside it; those of the store take the place of earlier ones.",
    )
    parser.add_argument("file", type=Path, help="where to, such as reports/claims.md")
    path: Path = parser.parse_args().file
    beside = path.with_suffix(".json")
    both = {**(load(beside) if beside.exists() else {}), **measurements()}
    both = {id: both[id] for id in CLAIMS if id in both}
    with cache.whole(beside) as temporary:
        _write(temporary, {id: asdict(one) for id, one in both.items()})
    path.write_text(markdown(both), encoding="utf-8")
    print(f"{path}: {len(both)} of {len(CLAIMS)} claims measured")


if __name__ == "__main__":
    main()
