"""The notes' claims in their parts, what was measured of each, and the rules that compare the two.

The claims stand in claims.toml, which also says what the fields of `Claim` and `Part` are."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cvfp.config import ParameterError, toml

Key = tuple[str, str, str]  # claim, part, setting
Verdict = Literal["agrees", "contradicts", "inconclusive"]

FEWEST_SEEDS, ALPHA = 3, 0.05
SETTINGS = ("mini", "published_size", "ultrachat")
OTHER = "other"  # kept and shown, not counted
EVERY = (*SETTINGS, OTHER)


@dataclass(frozen=True)
class Part:
    """One number of a claim."""

    id: str
    quantity: str
    region: Sequence[float]
    crosses: str
    unit: str = ""
    scale: Literal["plain", "relative", "correlation"] = "plain"
    magnitude: Sequence[float] | None = None
    cannot_fail: bool = False

    def said(self, value: float) -> str:
        """A value of the quantity with its unit: "-2.73 %"."""
        if self.unit == "%":
            return f"{100 * value:.3g} %"
        digits = f"{float(f'{value:.4g}'):,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
        return f"{digits} {self.unit}".strip()

    @property
    def printed(self) -> str:
        """What the note prints for it: "-39 % … -38 %", or "–"."""
        return " … ".join(map(self.said, self.magnitude or ())) or "–"

    @property
    def where(self) -> str:
        """The region in words: "above 0", "above -2 points and below 2 points"."""
        ends = zip(("above", "below"), self.region, strict=True)
        return " and ".join(f"{side} {self.said(x)}" for side, x in ends if math.isfinite(x))


@dataclass(frozen=True)
class Claim:
    """One published claim, in a form that other corpora and tokenisers can contradict."""

    id: str
    title: str
    notes: str
    sentence: str
    parts: Mapping[str, Part]
    published: str
    recomputed: str
    notebook: str
    takes: str
    stands: bool | None = None


_READ = toml("analysis/claims")
ABOUT: str = _READ.pop("about").strip()
CLAIMS: Mapping[str, Claim] = {
    id: Claim(id, **row | {"parts": {one["id"]: Part(**one) for one in row["parts"]}})
    for id, row in _READ.items()
}
# Every part in every setting, in the ledger's order.
KEYS = [(id, part, one) for id in CLAIMS for part in CLAIMS[id].parts for one in EVERY]


@dataclass(frozen=True)
class Measurement:
    """What a notebook measured for a claim's part in a setting; the fields are explained in
    docs/method.md. Raises `ParameterError`: no such part, or setting."""

    id: str
    part: str
    setting: str
    n: int
    estimate: float | None
    low: float | None
    high: float | None
    p: float | None
    words: str
    by: str
    parameters: dict[str, Any]
    ran_on: str
    holm: float | None = None

    def __post_init__(self) -> None:
        if self.key not in KEYS:
            accepted = f"a part in claims.toml, and one of {', '.join(EVERY)}"
            raise ParameterError("id, part, setting", self.key, accepted)
        # As they will be read again: tuples become lists, for one.
        plain = json.loads(json.dumps(self.parameters, allow_nan=False))
        object.__setattr__(self, "parameters", plain)

    @property
    def key(self) -> Key:
        return self.id, self.part, self.setting

    @property
    def of(self) -> Part:
        """The part that it is of."""
        return CLAIMS[self.id].parts[self.part]

    @property
    def interval(self) -> tuple[float, float] | None:
        """What verdicts go by: none on fewer than three seeds."""
        if self.n < FEWEST_SEEDS or self.low is None or self.high is None:
            return None
        return self.low, self.high

    @property
    def direction(self) -> Verdict:
        """Whether the whole interval lies in the region (its ends excluded), or none of it."""
        if self.interval is None:
            return "inconclusive"
        (low, high), (least, most) = self.interval, self.of.region
        if least < low and high < most:
            return "agrees"
        return "contradicts" if high <= least or most <= low else "inconclusive"

    @property
    def magnitude(self) -> Literal["agrees", "contradicted", "inconclusive"] | None:
        """Whether the interval holds what the note prints, or of several numbers any from the least
        to the largest; None where it prints none."""
        printed, ends = self.of.magnitude, self.interval
        if printed is None or ends is None:
            return None if printed is None else "inconclusive"
        return "agrees" if ends[0] <= max(printed) and min(printed) <= ends[1] else "contradicted"

    @property
    def command(self) -> str:
        """The command that measures it again."""
        words = ["papermill", f"notebooks/{self.by}.ipynb", "out.ipynb"]
        for name, value in self.parameters.items():
            # Notebooks take lists as "0,1,2".
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += ["-p", name, text]
        return shlex.join(words)

    @property
    def judged(self) -> str:
        """Figure and verdicts: "-2.7 % [-3.8 %, -1.7 %], n 5: direction agrees (p 0.001, …)"."""
        figure = "no value" if self.estimate is None else self.of.said(self.estimate)
        ends = [self.of.said(end) if end is not None else "no end" for end in (self.low, self.high)]
        words = f"{figure} [{', '.join(ends)}], n {self.n}: direction {self.direction}"
        why = ["nothing could fail it"] * self.of.cannot_fail
        why += [] if self.p is None else [f"p {self.p:.2g}"]
        if self.holm is not None and self.direction != "inconclusive":
            why.append("survives Holm" if self.holm < ALPHA else "does not survive Holm")
        words += f" ({', '.join(why)})" if why else ""
        words += f"; {self.of.printed} {self.magnitude}" if self.magnitude else ""
        return words + (f": {figure}" if self.magnitude == "contradicted" else "")


def corrected(measured: Iterable[Measurement]) -> list[Measurement]:
    """The measurements in the ledger's order, the later of the same part and setting, each with its
    p corrected for all of its setting: what is under 0.05 would be told even if all the others were
    chance (Holm 1979, Scand. J. Statist. 6, 65)."""
    found = {one.key: replace(one, holm=None) for one in measured}
    for setting in EVERY:
        ps = sorted((m.p, k) for k, m in found.items() if k[2] == setting and m.p is not None)
        steps = (min(1.0, p * (len(ps) - place)) for place, (p, _) in enumerate(ps))
        for holm, (_, key) in zip(itertools.accumulate(steps, max), ps, strict=True):
            found[key] = replace(found[key], holm=holm)
    return [found[key] for key in KEYS if key in found]
