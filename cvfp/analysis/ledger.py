"""The ledger of claims: what the notes say, their tables give and runs of this kit measured.

A notebook that measures claims stores the measurements with `record`;
`python -m cvfp.analysis.ledger FILE` writes the page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from cvfp import cache
from cvfp.analysis import claims, recomputed
from cvfp.analysis.claims import CLAIMS, KEYS, SETTINGS, Claim, Measurement, corrected
from cvfp.config import ParameterError


def record(measurement: Measurement) -> Path:
    """Store a measurement, in place of an earlier one of its part and setting; returns its file."""
    path = _path(measurement.key)
    cache.keep(path, lambda temporary: _write(temporary, asdict(measurement)))
    return path


def measurements() -> list[Measurement]:
    """The store's measurements, in the ledger's order."""
    paths = [path for path in map(_path, KEYS) if cache.sound(path)]
    return [Measurement(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def load(path: Path) -> list[Measurement]:
    """The measurements of a ledger, from the .json beside its page; raises ValueError: no such
    file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        fields = [{k: x for k, x in r.items() if k not in ("direction", "magnitude")} for r in rows]
        return [Measurement(**row) for row in fields]
    except (AttributeError, TypeError, ValueError) as error:
        accepted = "a file that cvfp.analysis.ledger wrote"
        raise ValueError(f"{path}: got {error}; accepted: {accepted}") from error


def _path(key: claims.Key) -> Path:
    return cache.home() / "claims" / f"{'.'.join(key)}.json"


def _write(path: Path, rows: Any) -> None:
    text = json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def from_tables(claim: Claim) -> str:
    """What the notes' own tables say of a claim, in words."""
    stands = {True: "stands", False: "does not stand as printed", None: "cannot be told"}
    words = claim.recomputed.format(**recomputed.figures(claim.id))
    return f"{stands[claim.stands]}: {words}"


def frame(
    ids: Iterable[str], measured: Iterable[Measurement], settings: Iterable[str] = SETTINGS
) -> pd.DataFrame:
    """These claims of the ledger, one row a part: claim, sentence (in the claim's first row), part
    (with its region), quantity, published (the number printed), and what was measured in each of
    the settings, with both verdicts. Raises `ParameterError`: no claim of that id."""
    judged = {one.key: one.judged for one in corrected(measured)}
    if unknown := set(ids) - set(CLAIMS):
        raise ParameterError("ids", sorted(unknown), f"some of {', '.join(CLAIMS)}")
    return pd.DataFrame(
        {
            "claim": id,
            "sentence": "" if place else CLAIMS[id].sentence,
            "part": f"{part.id}: {part.where}",
            "quantity": part.quantity,
            "published": part.printed,
            **{one: judged.get((id, part.id, one), "not run") for one in settings},
        }
        for id in ids
        for place, part in enumerate(CLAIMS[id].parts.values())
    )


def rows(ids: Sequence[str], measured: Iterable[Measurement]) -> str:
    """These claims of the ledger as a Markdown table, as notebooks print them; see `frame`. Holm's
    correction is for the parts in this table alone."""
    here = [one for one in measured if one.id in ids]
    return _lines(frame(ids, here, {one.setting: 0 for one in here} or SETTINGS[:1]))


def markdown(measured: Iterable[Measurement]) -> str:
    """The whole ledger as a page: how to read it, the table, and each claim in full."""
    judged = corrected(measured)
    counts = pd.DataFrame([(m.setting, m.direction) for m in judged], columns=["setting", "said"])
    table, verdicts = pd.crosstab(counts.setting, counts.said), get_args(claims.Verdict)
    table = table.reindex(index=SETTINGS, columns=verdicts, fill_value=0)
    table = table.assign(measured=table.sum(axis=1)).reset_index().astype(str)
    head = ["# The claims of the notes, one by one", claims.ABOUT, _lines(table)]
    summary = frame(CLAIMS, judged).drop(columns=["sentence", "quantity"])
    full = [_full(claim, [m for m in judged if m.id == claim.id]) for claim in CLAIMS.values()]
    return "\n\n".join([*head, _lines(summary), *full]) + "\n"


def _lines(table: pd.DataFrame) -> str:
    head = [_line(table.columns), _line(["---"] * len(table.columns))]
    return "\n".join(head + [_line(cells) for cells in table.to_numpy().tolist()])


def _line(cells: Iterable[str]) -> str:
    clean = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(clean)} |"


def _full(claim: Claim, measured: Sequence[Measurement]) -> str:
    said = [
        f"- Published: {claim.published}.",
        f"- Recomputed: {from_tables(claim)}.",
        f"- Takes: {claim.takes} (`{claim.notebook}`).",
    ]
    for part in claim.parts.values():
        words = f"The claim: {part.where}; printed: {part.printed}. Interval over {part.crosses}."
        here = [m for m in measured if m.part == part.id]
        said.append(f"- **{part.id}**: {part.quantity}. {words}")
        said += [f"  - {m.setting}: {m.judged}. Measured: {m.words}." for m in here]
    again = {f"- {m.setting}, on {m.ran_on}: `{m.command}`": 0 for m in measured}
    head = f"## {claim.id} · {claim.title}\n\n**{claim.sentence}** (note {claim.notes})\n\n"
    return head + "\n".join([*said, *again])


def main() -> None:
    """Write the ledger of claims. The measurements behind it stay in a .json of the same name
    beside it; those of the store take the place of earlier ones."""
    parser = argparse.ArgumentParser("python -m cvfp.analysis.ledger", description=main.__doc__)
    parser.add_argument("file", type=Path, help="where to, such as reports/claims.md")
    path: Path = parser.parse_args().file
    beside = path.with_suffix(".json")
    both = corrected([*(load(beside) if beside.exists() else []), *measurements()])
    judged = [asdict(m) | {"direction": m.direction, "magnitude": m.magnitude} for m in both]
    with cache.whole(beside) as temporary:
        _write(temporary, judged)
    path.write_text(markdown(both), encoding="utf-8")
    print(f"{path}: {len(both)} measurements of claims' parts")


if __name__ == "__main__":
    main()
