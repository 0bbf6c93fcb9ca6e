"""A tensor that is added as it is stored: ΔW = s·D, as a trained bias on a LoRA's output is (PEFT's ``lora_bias``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasmith.deltas.axis import Axis
from lorasmith.deltas.low_rank import Factor, beside
from lorasmith.safefile import Reader, TensorEntry

if TYPE_CHECKING:
    import torch

    from lorasmith.deltas import Blocks, OpenDelta


@dataclass(frozen=True)
class Addition:
    """``scale`` times a stored matrix; a vector is a column."""

    stored: Factor
    scale: float

    kind = "addition"
    alignment = 1
    needs_base = False
    rank = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return (self.stored.entry,)

    def transposed(self) -> Addition:
        return Addition(self.stored.transposed(), self.scale)

    def part(self, rows: Axis | None = None, columns: Axis | None = None) -> Addition:
        return Addition(self.stored.part(rows, columns), self.scale)

    def low_rank(self) -> None:
        return None

    def memory(self, block_rows: int) -> int:
        return self.stored.memory(min(block_rows, self.shape[0]))

    def open(self, dtype: torch.dtype, blocks: Blocks) -> OpenDelta:
        return _OpenAddition(self, dtype)


class _OpenAddition:
    def __init__(self, delta: Addition, dtype: torch.dtype) -> None:
        self._stored, self._scale = delta.stored, delta.scale
        self._dtype = dtype
        self._reader = Reader(delta.stored.entry.file)

    def add_to(self, acc: torch.Tensor, w0: torch.Tensor | None, rows: slice, factor: float) -> None:
        acc.add_(beside(self._stored.read(self._reader, rows, self._dtype), acc), alpha=factor * self._scale)

    def __del__(self) -> None:
        if hasattr(self, "_reader"):
            self._reader.close()
