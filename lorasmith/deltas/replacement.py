"""A tensor trained whole and stored whole: ΔW = W_new − W0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasmith.deltas.low_rank import Factor, beside
from lorasmith.deltas.token_rows import replace_rows
from lorasmith.safefile import Reader, TensorEntry

if TYPE_CHECKING:
    import torch

    from lorasmith.deltas import Blocks, OpenDelta


@dataclass(frozen=True)
class Replacement:
    """The new tensor, of the same shape as the one it replaces."""

    new: TensorEntry

    kind = "replacement"
    alignment = 1
    needs_base = True
    rank = 0
    scale = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.new.matrix

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return (self.new,)

    def transposed(self) -> Replacement:
        """A replacement is stored the way the base stores the weight."""
        return self

    def low_rank(self) -> None:
        return None

    def memory(self, block_rows: int) -> int:
        rows, columns = self.shape
        height = min(block_rows, rows)
        return Factor(self.new).memory(height) + 4 * height * columns

    def open(self, dtype: torch.dtype, blocks: Blocks) -> OpenDelta:
        return _OpenReplacement(self, dtype)


class _OpenReplacement:
    def __init__(self, delta: Replacement, dtype: torch.dtype) -> None:
        self._new = Factor(delta.new)
        self._dtype = dtype
        self._reader = Reader(delta.new.file)

    def add_to(self, acc: torch.Tensor, w0: torch.Tensor | None, rows: slice, factor: float) -> None:
        assert w0 is not None
        replace_rows(acc, w0, beside(self._new.read(self._reader, rows, self._dtype), acc), factor)

    def __del__(self) -> None:
        if hasattr(self, "_reader"):
            self._reader.close()
