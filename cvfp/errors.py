"""The error for a parameter that cannot be used."""

from __future__ import annotations

from typing import Any


class ParameterError(ValueError):
    """A parameter has a value that cannot be used; says which, what it was and what would be."""

    def __init__(self, parameter: str, value: object, accepted: str) -> None:
        self.parameter, self.value, self.accepted = parameter, value, accepted
        super().__init__(f"{parameter}: got {value!r}; accepted: {accepted}")

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the class with the one-string message (sweeps cross processes).
        return type(self), (self.parameter, self.value, self.accepted)
