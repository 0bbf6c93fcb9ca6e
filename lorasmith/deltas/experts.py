"""LoRA on a stack of experts, as PEFT's ``target_parameters`` stores it (``lora.ParamWrapper``).

For E experts of rank r, A is (r·E, m) with the rows of one expert together, and B is (n, r·E). Whose columns of B are
whose has two answers of the same shape: column k·E + e in PEFT's own files, and e·r + k in those that Unsloth wrote
before it marked them. What m and n are has two answers as well: for an expert's weight of (x, y), ΔW = s·B·A with
A of (r, y) and B of (x, r), or ΔW = s·(B·A)ᵀ with A of (r, x) and B of (y, r).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasmith.deltas.axis import Axis, span
from lorasmith.deltas.low_rank import Factor, LowRank, Product
from lorasmith.deltas.patchwork import Patch, Patchwork

if TYPE_CHECKING:
    import torch

    from lorasmith.deltas import Blocks, OpenDelta
    from lorasmith.safefile import TensorEntry


@dataclass(frozen=True)
class Stacked:
    """The factors of all ``count`` experts; seen as one weight, the experts' rows stand one below the other.

    ``turned`` says that a product is the transpose of an expert's weight, ``by_expert`` that the columns of B that
    belong to one expert are together.
    """

    a: TensorEntry
    b: TensorEntry
    count: int
    scale: float
    turned: bool = False
    by_expert: bool = False

    kind = "LoRA"
    alignment = 1
    needs_base = False

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.count

    @property
    def each(self) -> tuple[int, int]:
        """The shape of one expert's weight."""
        shape = self.b.shape[0], self.a.matrix[1]
        return (shape[1], shape[0]) if self.turned else shape

    @property
    def shape(self) -> tuple[int, int]:
        return self.count * self.each[0], self.each[1]

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return self.a, self.b

    def expert(self, number: int) -> LowRank:
        """The delta of one expert's weight."""
        rank = self.rank
        columns = span(number * rank, rank) if self.by_expert else span(number, rank, self.count)
        left, right = Factor(self.b, columns=columns), Factor(self.a, rows=span(number * rank, rank))
        delta = LowRank((Product(left, right, self.scale),))
        return delta.transposed() if self.turned else delta

    def spread(self) -> Patchwork:
        """The same as a delta on every expert."""
        rows, columns = self.each
        patches = (Patch(self.expert(one), span(one * rows, rows), span(0, columns)) for one in range(self.count))
        return Patchwork(tuple(patches), self.shape)

    def transposed(self) -> Stacked:
        """Experts are stored the way the base stores them, or their names say otherwise."""
        return self

    def part(self, rows: Axis | None = None, columns: Axis | None = None) -> Patchwork:
        return self.spread().part(rows, columns)

    def low_rank(self) -> None:
        return None

    def memory(self, block_rows: int) -> int:
        return self.spread().memory(block_rows)

    def open(self, dtype: torch.dtype, blocks: Blocks) -> OpenDelta:
        return self.spread().open(dtype, blocks)
