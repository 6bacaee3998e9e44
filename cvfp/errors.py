"""The error for a parameter that cannot be used."""

from __future__ import annotations

from typing import Any

LONGEST = 200  # characters of a value in a message


class ParameterError(ValueError):
    """A parameter has a value that cannot be used; says which, what it was and what would be."""

    def __init__(self, parameter: str, value: object, accepted: str) -> None:
        self.parameter, self.value, self.accepted = parameter, value, accepted
        super().__init__(f"{parameter}: got {shortened(repr(value))}; accepted: {accepted}")

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the class with the one-string message (sweeps cross processes).
        return type(self), (self.parameter, self.value, self.accepted)


def shortened(text: str) -> str:
    """At most `LONGEST` characters of the text, and how many there are."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"
