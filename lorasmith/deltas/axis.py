"""Positions along one dimension of a tensor, as arithmetic rather than as a list.

What fused and split layers do to rows are all mixed-radix counts: a range, every second row, the rows of one of three
kinds in every head, the two halves of every head taken in turn. ``start + Σ dₖ·stepₖ``, with digits ``dₖ`` below
``countₖ`` of which the last runs fastest, says each of them in a few numbers, for a matrix of any height.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Axis:
    """``start`` plus every combination of ``digits`` (count, step): ``Axis(1, ((3, 2),))`` is 1, 3, 5."""

    start: int
    digits: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        if len(self.digits) == 1:  # as most are, of tens of thousands
            return self.digits[0][0]
        return math.prod(count for count, _ in self.digits)

    def __getitem__(self, index: int) -> int:
        position = self.start
        for count, step in reversed(self.digits):
            index, digit = divmod(index, count)
            position += digit * step
        return position

    @cached_property
    def plain(self) -> range | None:
        """The same as a range, where it is one."""
        if len(self.digits) < 2:
            count, step = self.digits[0] if self.digits else (1, 1)
            return range(self.start, self.start + count * step, step) if step > 0 else None
        count, step = self.digits[0]
        for more, finer in self.digits[1:]:
            if count > 1 and more > 1 and step != more * finer:
                return None
            step = finer if more > 1 else step
            count *= more
        return range(self.start, self.start + count * step, step) if step > 0 else None

    @property
    def rises(self) -> bool:
        """Whether every position is larger than the one before it."""
        reach = 0
        for count, step in reversed(self.digits):
            if count > 1 and step <= reach:
                return False
            reach += (count - 1) * step
        return True

    def is_whole(self, length: int) -> bool:
        """Whether these are all positions of a dimension, in order."""
        return self.plain == range(length)

    def within(self, start: int, stop: int) -> slice:
        """Which of the positions of a rising axis lie from ``start`` on and before ``stop``."""
        plain = self.plain
        if plain is not None and plain.step == 1:
            return slice(*(min(max(edge - plain.start, 0), len(plain)) for edge in (start, stop)))
        return slice(bisect_left(self, start), bisect_left(self, stop))

    def positions(self, which: slice) -> npt.NDArray[np.int64]:
        """Some of the positions as an array."""
        import numpy as np

        rest = np.arange(which.start, which.stop, dtype=np.int64)
        found = np.full(len(rest), self.start, dtype=np.int64)
        for count, step in reversed(self.digits):
            found += rest % count * step
            rest //= count
        return found

    def part(self, which: slice) -> range | Sequence[int]:
        """Some of the positions, as a range where they are one."""
        plain = self.plain
        return plain[which] if plain is not None else self.positions(which).tolist()

    def of(self, inner: Axis) -> Axis:
        """The positions that ``inner`` picks out of these.

        Raises NotImplementedError where digits would have to be cut.
        """
        if inner.is_whole(len(self)):
            return self
        plain = self.plain
        if plain is None:
            raise NotImplementedError(f"{inner} of {self}")
        step = plain.step
        return Axis(plain.start + inner.start * step, tuple((count, each * step) for count, each in inner.digits))


@lru_cache(maxsize=1 << 14)
def span(start: int, length: int, step: int = 1) -> Axis:
    """``length`` positions from ``start`` on, every ``step``-th; one object for the many of a large model."""
    return Axis(start, ((length, step),))
