"""Parameters of notebooks, parsed: papermill passes text such as "0,1,2", numbers and lists.

Every function here takes the parameter's name and its value, and raises a `ParameterError` that
names the parameter for any other value than its docstring says. `KINDS` has them by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cvfp.config import ParameterError, UpTo, parse

T = TypeVar("T", int, float)
Fits = Callable[[T], bool]
# What tells a parameter from other variables: values that a notebook's parameters can have.
PLAIN = (int, float, str, bool, type(None), list, tuple, dict)


def integers(parameter: str, value: object, *, low: int = 0) -> list[int]:
    """3, "3", [0, 1, 2], "0,1,2" or "[0, 1, 2]" -> list of different ints of at least `low`."""
    accepted = f"an integer of at least {low}, or a list of different ones such as 0,1,2"
    return _numbers(parameter, value, int, lambda one: one >= low, accepted)


def numbers(parameter: str, value: object) -> list[float]:
    """0.1, "0.1", [0.1, 0.2] or "0.1,0.2" -> list of different floats over 0."""
    accepted = "a number above 0, or a list of different ones such as 0.001,0.003"
    return _numbers(parameter, value, float, lambda x: 0 < x < math.inf, accepted)


def integer(parameter: str, value: object, *, low: int = 1, why: str = "") -> int:
    """3 or "3" -> int of at least `low`; `why`, words for the error."""
    found = parse(value, int)
    if type(found) in (int, UpTo) and found >= low:
        return int(found)
    raise ParameterError(parameter, value, f"one integer of at least {low}{why}")


def number(parameter: str, value: object) -> float:
    """0.8, 1 or "0.8" -> finite float of at least 0."""
    found = parse(value, float)
    if type(found) in (int, float) and 0 <= found < math.inf:
        return float(found)
    raise ParameterError(parameter, value, "one finite number of at least 0")


def pair(parameter: str, value: object) -> tuple[int, int]:
    """Two integers of at least 1, which may be equal: "6,768" or [6, 768]."""
    accepted = "two integers of at least 1, such as 6,768"
    found = _numbers(parameter, value, int, lambda one: one >= 1, accepted, alike=True)
    if len(found) != 2:
        raise ParameterError(parameter, value, accepted)
    return found[0], found[1]


def flag(parameter: str, value: object) -> bool:
    """True, "true", "False", … -> bool."""
    found = parse(value, bool)
    if isinstance(found, bool):
        return found
    raise ParameterError(parameter, value, "true or false")


def text(parameter: str, value: object) -> str:
    """Text that is not empty; a number, as papermill makes of `-p prompt 5`, is written out."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    raise ParameterError(parameter, value, "text that is not empty")


def file(parameter: str, value: object) -> str:
    """The path of a file that exists."""
    if not Path(path := text(parameter, value)).is_file():
        raise ParameterError(parameter, value, f"a file that exists, seen from {Path.cwd().name}/")
    return path


def ladder(parameter: str, value: object) -> list[int]:
    """Sizes 50, 100, 200, 500, 1000, 2000, … up to an integer above 50, itself the last of them."""
    cap = integer(parameter, value, low=51, why=" (a law needs two sizes)")
    sizes = [m * 10**k for k in range(1, len(str(cap)) + 1) for m in (1, 2, 5)]
    return sorted({size for size in sizes if 50 <= size < cap} | {cap})


def _numbers(
    parameter: str, value: object, kind: type[T], fits: Fits[T], accepted: str, alike: bool = False
) -> list[T]:
    """The numbers of a list or of text such as "[0, 1]"; anything else is the only one."""
    items: Any = value if isinstance(value, (list, tuple, range)) else [value]
    if isinstance(value, str):
        items = value.strip("[](), ").split(",")
    found = [parse(item, kind) for item in items]
    fitting = all(type(one) in (int, kind) and fits(one) for one in found)
    if not found or not fitting or (not alike and len(set(found)) < len(found)):
        raise ParameterError(parameter, value, accepted)
    return list(map(kind, found))


KINDS: Mapping[str, Callable[[str, object], Any]] = {
    "seeds": integers,
    "sizes": functools.partial(integers, low=1),  # numbers of training conversations
    "size": integer,  # one of them
    "ladder": ladder,  # all rungs up to one
    "counts": functools.partial(integers, low=1),
    "count": integer,
    "numbers": numbers,
    "number": number,
    "pair": pair,
    "flag": flag,
    "text": text,
    "file": file,
}
# The kinds that are numbers of training conversations: the corpus must have as many.
SIZES = ("sizes", "size", "ladder")


def parsed(parameter: str, value: object, kind: str) -> Any:
    """What the kind's function returns; with "… or None", None for None and the text "none". Raises
    `ParameterError`: a value that the kind does not accept; ValueError: no such kind."""
    name = kind.removesuffix(" or None")
    if name not in KINDS:
        raise ValueError(f"{parameter}: got kind {kind!r}; accepted: {', '.join(KINDS)}")
    if name != kind and (value is None or str(value).strip().lower() == "none"):
        return None
    return KINDS[name](parameter, value)
