"""A device's share of Phase 1's tokens: all of them, unless several share them (`distributed`)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class Share:
    """All of it; `distributed.Ranks` does what the methods say with the other devices."""

    def own(self, total: int, unit: int) -> range:
        """Its rows of `total`: whole units, the last of which may be smaller."""
        return range(total)

    def before(self, last: Tensor) -> Tensor:
        """The row before its first, given its last [1, D]; the rows are a ring."""
        return last

    def add(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace each tensor by its sum over the devices."""

    def whole(self, rows: Tensor, own: range, total: int) -> Tensor:
        """All rows, given its own."""
        return rows


ALONE = Share()
