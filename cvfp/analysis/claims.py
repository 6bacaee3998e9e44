"""The notes' claims, what was measured of each, and the rule that compares the two.

The claims stand in claims.toml, as they were written down before any run.
"""

from __future__ import annotations

import json
import math
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from cvfp.config import ParameterError

Verdict = Literal["agrees", "contradicts", "inconclusive", "not run"]

FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Claim:
    """One published claim, in a form that other corpora and tokenisers can contradict.

    Attributes:
        id, title: "C1" to "C19", and a few words.
        notes: the note and section that it is from.
        sentence: what would be false if the claim were.
        quantity: what is measured, one number, with its unit.
        region: where the claim says that the quantity lies; its ends do not belong to it.
        published: what the note says.
        recomputed: what the notes' own tables give; names of `recomputed.figures` in braces.
        stands: whether these tables bear out the claim and every figure in `published`, rounding
            aside; None if there is no table, or none that could tell.
        notebook, takes: what measures it, and the runs that this needs.
    """

    id: str
    title: str
    notes: str
    sentence: str
    quantity: str
    region: tuple[float, float]
    published: str
    recomputed: str
    notebook: str
    takes: str
    stands: bool | None = None

    @property
    def where(self) -> str:
        """The region in words: "above 0", "between -2 and 2"."""
        low, high = self.region
        if math.isinf(high):
            return f"above {low:g}"
        return f"below {high:g}" if math.isinf(low) else f"between {low:g} and {high:g}"


_TEXT = files("cvfp.analysis").joinpath("claims.toml").read_text(encoding="utf-8")
CLAIMS: Mapping[str, Claim] = {
    id: Claim(id, **{**row, "region": tuple(row["region"])})
    for id, row in tomllib.loads(_TEXT).items()
}


def known(id: str) -> str:
    """The id itself.

    Raises:
        ValueError: no claim has it.
    """
    if id not in CLAIMS:
        raise ParameterError("id", id, f"one of {', '.join(CLAIMS)}")
    return id


@dataclass(frozen=True)
class Measurement:
    """What a notebook measured for a claim.

    Attributes:
        value: the claim's quantity, in its unit; None if the runs gave none.
        low, high: its 95 % interval; None if there is none.
        seeds: how many seeds are behind it.
        words, notebook: what exactly was measured, and by which notebook.
        parameters: the notebook's parameters that were not its defaults; JSON-able.
        ran_on: corpus, tokeniser, model and device, in words.
    """

    value: float | None
    low: float | None
    high: float | None
    seeds: int
    words: str
    notebook: str
    parameters: dict[str, Any]
    ran_on: str

    def __post_init__(self) -> None:
        # As they will be read again: tuples become lists, for one.
        plain = json.loads(json.dumps(self.parameters, allow_nan=False))
        object.__setattr__(self, "parameters", plain)

    @property
    def figure(self) -> str:
        """Value and interval: "0.7941 [0.7511, 0.8405]"."""
        if self.value is None:
            return "no value"
        if self.low is None or self.high is None:
            return f"{self.value:.4g}, no interval"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @property
    def command(self) -> str:
        """The command that measures it again."""
        words = ["papermill", f"notebooks/{self.notebook}.ipynb", "out.ipynb"]
        for name, value in self.parameters.items():
            # Notebooks take lists as "0,1,2".
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += ["-p", name, text]
        return shlex.join(words)


def verdict(claim: Claim, measurement: Measurement | None) -> Verdict:
    """What a measurement says of a claim; the same rule for all.

    "not run" without a measurement; "inconclusive" on fewer than three seeds or without an
    interval; "agrees" if the whole interval lies in the claim's region (its ends excluded),
    "contradicts" if none of it does, "inconclusive" otherwise.
    """
    if measurement is None:
        return "not run"
    if measurement.seeds < FEWEST_SEEDS or measurement.low is None or measurement.high is None:
        return "inconclusive"
    low, high = claim.region
    if low < measurement.low and measurement.high < high:
        return "agrees"
    if measurement.high <= low or high <= measurement.low:
        return "contradicts"
    return "inconclusive"
