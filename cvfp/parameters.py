"""Parameters of notebooks: one value or text such as "0,1,2" -> what it spells, or an error.

papermill passes text, numbers and lists. Every function here takes the parameter's name and its
value, and raises a `ParameterError` that names the parameter. `KINDS` has them by name.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cvfp.config import ParameterError, parse

# What tells a parameter from other variables: values that a notebook's parameters can have.
PLAIN = (int, float, str, bool, type(None), list, tuple, dict)


def integers(parameter: str, value: object, *, low: int = 0) -> list[int]:
    """3, "3", [0, 1, 2], "0,1,2" or "[0, 1, 2]" -> list of ints.

    Raises:
        ParameterError: anything else, an empty list, a repeated value, or one under `low`.
    """
    accepted = f"an integer of at least {low}, or a list of different ones such as 0,1,2"
    found = [parse(item, int) for item in _items(value)]
    if not found or any(type(one) is not int or one < low for one in found):
        raise ParameterError(parameter, value, accepted)
    if len(set(found)) < len(found):
        raise ParameterError(parameter, value, accepted)
    return typing.cast(list[int], found)


def numbers(parameter: str, value: object, *, above: float = 0.0) -> list[float]:
    """0.1, "0.1", [0.1, 0.2] or "0.1,0.2" -> list of floats.

    Raises:
        ParameterError: anything else, an empty list, a repeated value, or one not over `above`.
    """
    accepted = f"a number above {above:g}, or a list of different ones such as 0.001,0.003"
    found = [parse(item, float) for item in _items(value)]
    for one in found:
        if type(one) not in (int, float) or not above < one < float("inf"):
            raise ParameterError(parameter, value, accepted)
    if not found or len(set(found)) < len(found):
        raise ParameterError(parameter, value, accepted)
    return [float(one) for one in found]


def integer(parameter: str, value: object, *, low: int = 1) -> int:
    """3 or "3" -> int.

    Raises:
        ParameterError: anything else, or one under `low`.
    """
    found = parse(value, int)
    if type(found) is int and found >= low:
        return found
    raise ParameterError(parameter, value, f"one integer of at least {low}")


def number(parameter: str, value: object, *, low: float = 0.0) -> float:
    """0.8, 1 or "0.8" -> float.

    Raises:
        ParameterError: anything else, one under `low`, or one that is not finite.
    """
    found = parse(value, float)
    if type(found) in (int, float) and low <= found < float("inf"):
        return float(found)
    raise ParameterError(parameter, value, f"one finite number of at least {low:g}")


def pair(parameter: str, value: object, *, low: int = 1) -> tuple[int, int]:
    """Two integers, which may be equal: "6,768" or [6, 768].

    Raises:
        ParameterError: anything else, or one under `low`.
    """
    parts = value.strip("[]() ").split(",") if isinstance(value, str) else value
    if isinstance(parts, (list, tuple)) and len(parts) == 2:
        first, second = (parse(part, int) for part in parts)
        if type(first) is int and type(second) is int and min(first, second) >= low:
            return first, second
    raise ParameterError(parameter, value, f"two integers of at least {low}, such as 6,768")


def flag(parameter: str, value: object) -> bool:
    """True, "true", "False", … -> bool.

    Raises:
        ParameterError: anything else.
    """
    found = parse(value, bool)
    if isinstance(found, bool):
        return found
    raise ParameterError(parameter, value, "true or false")


def text(parameter: str, value: object) -> str:
    """Text that is not empty; a number, as papermill makes of `-p prompt 5`, is written out.

    Raises:
        ParameterError: anything else.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    raise ParameterError(parameter, value, "text that is not empty")


def ladder(parameter: str, value: object) -> list[int]:
    """Sizes 50, 100, 200, 500, 1000, 2000, … up to `value`, which is itself the last rung.

    Raises:
        ParameterError: not one integer above 50; a law needs two sizes.
    """
    cap = parse(value, int)
    if type(cap) is not int or cap <= 50:
        raise ParameterError(parameter, value, "one integer above 50 (a law needs two sizes)")
    sizes = [m * 10**k for k in range(1, len(str(cap)) + 1) for m in (1, 2, 5)]
    return sorted({size for size in sizes if 50 <= size < cap} | {cap})


def _items(value: object) -> Iterable[object]:
    """The items of a list or of text such as "[0, 1]"; anything else is the only one."""
    if isinstance(value, str):
        return [part for part in value.strip("[]() ").split(",") if part.strip()]
    return value if isinstance(value, (list, tuple, range)) else [value]


Kind = Callable[[str, object], Any]

KINDS: Mapping[str, Kind] = {
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
}
# The kinds that are numbers of training conversations: the corpus must have as many.
SIZES = ("sizes", "size", "ladder")


def parsed(parameter: str, value: object, kind: str) -> Any:
    """The value as its kind reads it; with "… or None", None and the text "none" are None.

    Raises:
        ParameterError: what the kind does not accept.
        ValueError: no such kind.
    """
    name = kind.removesuffix(" or None")
    if name not in KINDS:
        raise ValueError(f"{parameter}: got kind {kind!r}; accepted: {', '.join(KINDS)}")
    if name != kind and (value is None or str(value).strip().lower() == "none"):
        return None
    return KINDS[name](parameter, value)
