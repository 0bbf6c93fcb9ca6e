"""A tensor trained whole and stored whole: ΔW = W_new − W0."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasmith.deltas.axis import Axis, span
from lorasmith.deltas.low_rank import Factor, beside
from lorasmith.deltas.token_rows import replace_rows
from lorasmith.safefile import Reader, TensorEntry

if TYPE_CHECKING:
    import torch

    from lorasmith.deltas import Blocks, OpenDelta


@dataclass(frozen=True)
class Replacement:
    """The new tensor, of the same shape as the one it replaces; ``taken`` is what is meant of it, if not all."""

    new: TensorEntry
    taken: Factor | None = None

    kind = "replacement"
    alignment = 1
    needs_base = True
    rank = 0
    scale = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.factor.shape

    @property
    def factor(self) -> Factor:
        """The new values as a matrix."""
        return Factor(self.new) if self.taken is None else self.taken

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return (self.new,)

    def transposed(self) -> Replacement:
        """A replacement is stored the way the base stores the weight."""
        return self

    def turned(self) -> Replacement:
        """The transpose, for a base that stores the weight the other way round than the model has it."""
        turned = self.factor.transposed()
        return Replacement(self.new, None if turned == Factor(self.new) else turned)

    def part(self, rows: Axis | None = None, columns: Axis | None = None) -> Replacement:
        """Some rows and columns; rows that lie together are a tensor of their own."""
        height, width = self.shape
        plain = (rows or span(0, height)).plain
        if self.taken is None and plain is not None and plain.step == 1 and (columns or span(0, width)).is_whole(width):
            size = self.new.nbytes // max(1, height)
            shape = (len(plain), *self.new.shape[1:])
            start = self.new.start + plain.start * size
            return Replacement(replace(self.new, shape=shape, start=start, nbytes=len(plain) * size))
        return Replacement(self.new, self.factor.part(rows, columns))

    def low_rank(self) -> None:
        return None

    def memory(self, block_rows: int) -> int:
        rows, columns = self.shape
        height = min(block_rows, rows)
        return self.factor.memory(height) + 4 * height * columns

    def open(self, dtype: torch.dtype, blocks: Blocks) -> OpenDelta:
        return _OpenReplacement(self, dtype)


class _OpenReplacement:
    def __init__(self, delta: Replacement, dtype: torch.dtype) -> None:
        self._new = delta.factor
        self._dtype = dtype
        self._reader = Reader(delta.new.file)

    def add_to(self, acc: torch.Tensor, w0: torch.Tensor | None, rows: slice, factor: float) -> None:
        assert w0 is not None
        replace_rows(acc, w0, beside(self._new.read(self._reader, rows, self._dtype), acc), factor)

    def __del__(self) -> None:
        if hasattr(self, "_reader"):
            self._reader.close()
