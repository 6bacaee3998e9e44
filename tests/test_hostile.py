"""Whatever is passed is taken or refused by name: values of fields, files of any content."""

from __future__ import annotations

import gzip
import json
import math
import random
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cvfp import Experiment, ParameterError, corpora
from cvfp.config import HINTS

Tally = Callable[..., None]
# Each made anew: some are spent by looking at them.
VALUES: list[Callable[[random.Random], Any]] = [
    lambda draw: draw.choice([0, -1, 1, 10**9 + 1, 10**19, -(2**63), 2**200]),
    lambda draw: draw.choice([0.0, -0.0, 1e-300, 1e308, 1e30, 0.5, math.nan, math.inf, -math.inf]),
    lambda draw: draw.choice([True, False, None, ..., NotImplemented]),
    lambda draw: draw.choice(["", " ", "\0", "\n", "None", "none", "nan", "1e999", "9" * 5000]),
    lambda draw: draw.choice(
        ["/", "~", "..", "//", ".", "a/b/c", "a:b", "::", "x" * 300, "/" * 99]
    ),
    lambda draw: "".join(chr(draw.randrange(1, 0xD7FF)) for _ in range(draw.randrange(40))),
    lambda draw: draw.choice(["(" * 3000, "[" * 3000, "1" + "+1" * 3000, "-" * 3000, "\ud800"]),
    lambda draw: draw.randbytes(draw.randrange(9)),
    lambda draw: draw.choice([[], {}, (), set(), [1], ["bpe"], {"a": 1}, range(3), object()]),
    lambda draw: draw.choice([np.int64(7), np.float32(0.5), np.bool_(True), np.array([1, 2])]),
    lambda draw: draw.choice([np.array("bpe"), np.datetime64("2020-01-01"), np.str_("bpe")]),
    lambda draw: draw.choice([torch.tensor(3), torch.ones(2, 2), torch.float32]),
    lambda draw: draw.choice([Path("x"), Path(), 1j, Decimal("1.5"), Fraction(1, 3)]),
    lambda draw: draw.choice([int, len, lambda: 1, Experiment, ParameterError]),
    lambda draw: draw.choice(["module:function", "os:system", "cvfp:run", "builtins:eval", "a:"]),
    lambda draw: "x" * 100_000,
]


def try_fields(seed: int) -> bool:
    """Whether a random value for a random field is taken."""
    draw = random.Random(seed)
    name = draw.choice([*HINTS, "unknown", "samples "])
    value = draw.choice(VALUES)(draw)
    build = draw.choice([lambda **one: Experiment(**one), lambda **one: Experiment.preset(**one)])
    try:
        experiment = build(**{name: value})
    except ParameterError as error:
        assert name.strip() in str(error)  # noqa: PT017
        assert len(str(error)) < 3000  # noqa: PT017
        return False
    json.dumps(experiment.to_dict(), allow_nan=False)
    assert Experiment(**experiment.to_dict()) == experiment
    return True


@pytest.mark.parametrize("part", range(4))
def test_fields_take_a_value_or_refuse_it_by_name(part: int, tally: Tally) -> None:
    taken = [try_fields(seed) for seed in range(300 * part, 300 * (part + 1))]
    assert 20 < sum(taken) < 200
    tally("hostile values of fields", tried=len(taken))


GOOD = [{"text": f"A text with the number {number} in it."} for number in range(30)]


def lines(draw: random.Random) -> bytes:
    return "\n".join(map(json.dumps, GOOD)).encode()


def spoilt(draw: random.Random) -> bytes:
    """Bytes of a good file exchanged, left out or put in."""
    content = bytearray(draw.choice([lines, whole_list, table])(draw))
    for _ in range(draw.choice([1, 3, 100])):
        at = draw.randrange(len(content))
        content[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
    return bytes(content)


def whole_list(draw: random.Random) -> bytes:
    return json.dumps(GOOD, indent=draw.choice([None, 1])).encode()


def table(draw: random.Random) -> bytes:
    return "\r\n".join(["text,other", *(f'"{row["text"]}",1' for row in GOOD)]).encode()


def values(draw: random.Random) -> bytes:
    """Rows of any JSON."""

    def one(depth: int) -> Any:
        kinds: list[Callable[[], Any]] = [
            lambda: draw.choice([None, True, 0, -1.5, 10**400, "", "text", "\ud800", "é" * 9]),
            lambda: [one(depth + 1) for _ in range(draw.randrange(4))],
            lambda: {
                draw.choice(
                    ["text", "messages", "content", "role", "conversations", "value", ""]
                ): one(depth + 1)
                for _ in range(draw.randrange(4))
            },
        ]
        return draw.choice(kinds if depth < 4 else kinds[:1])()

    return "\n".join(json.dumps(one(0)) for _ in range(20)).encode()


def deep(draw: random.Random) -> bytes:
    return b'{"text": ' + draw.choice([b"[", b'{"a":']) * draw.choice([50, 3000, 200_000])


CONTENTS: list[Callable[[random.Random], bytes]] = [
    spoilt,
    values,
    deep,
    lambda draw: draw.randbytes(draw.choice([0, 1, 100, 10_000])),
    lambda draw: lines(draw)[: draw.randrange(400)],
    lambda draw: lines(draw).decode().encode(draw.choice(["utf-16", "utf-32", "utf-8-sig"])),
    lambda draw: b"\0" * draw.choice([1, 5000]),
    lambda draw: gzip.compress(lines(draw))[: draw.choice([5, 60, 10**6])],
    lambda draw: b"\n" * 500 + lines(draw),
    lambda draw: b"PAR1" + draw.randbytes(200) + b"PAR1",
    lambda draw: b'"' * 100_001,
]


def try_file(seed: int, folder: Path) -> bool:
    """Whether a file of hostile content, or a folder with it, is read."""
    draw = random.Random(seed)
    suffix = draw.choice([*corpora.READERS, ".jsonl.gz", ".JSONL", ".csv.gz", "", ".bin"])
    name = draw.choice(["a", "[a]", "*", "a b", "a::b", "?", "ä", "~", "-", "a'b"])
    path = folder / f"{seed}" / f"{name}{suffix}"
    path.parent.mkdir()
    path.write_bytes(draw.choice(CONTENTS)(draw))
    asked = draw.choice([path, path, path.parent])
    try:
        found = corpora.read(asked, draw.choice([None, None, "text", "nothing"]))
    except ParameterError as error:
        assert len(str(error)) < 3000  # noqa: PT017
        return False
    assert found.texts
    assert all(isinstance(text, str) and text.strip() for text in found.texts)
    for text in found.texts:
        text.encode()
    return True


@pytest.mark.parametrize("part", range(4))
def test_files_are_read_or_refused(part: int, tmp_path: Path, tally: Tally) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = [try_file(seed, tmp_path) for seed in range(60 * part, 60 * (part + 1))]
    assert 1 < sum(read) < 50
    tally("hostile files", tried=len(read))


@pytest.mark.full
def test_many_more_files_are_read_or_refused(tmp_path: Path, tally: Tally) -> None:
    read = [try_file(seed, tmp_path) for seed in range(1000, 3000)]
    tally("hostile files", tried=len(read))
