"""Sums of low-rank products, ΔW = Σ cᵢ·Lᵢ·Rᵢ: LoRA, and everything that is one in disguise.

LoRA (Hu et al. 2021, arXiv:2106.09685, equation 3) is ``ΔW = s·B·A`` with ``s = α/r``; rank-stabilised LoRA
(Kalajdzievski 2023, arXiv:2312.03732) has ``s = α/√r``. Products on one weight are added by stacking factors:
``[c₁L₁ c₂L₂] · [R₁; R₂]``, one matrix product of rank Σrᵢ. The coefficient is multiplied into the left rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasmith.dtypes import itemsize, torch_dtype
from lorasmith.safefile import Reader, TensorEntry

if TYPE_CHECKING:
    import torch

    from lorasmith.deltas import Blocks, OpenDelta


@dataclass(frozen=True)
class Factor:
    """A stored matrix, read by rows; ``flipped`` reads its transpose."""

    entry: TensorEntry
    flipped: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.entry.matrix
        return (columns, rows) if self.flipped else (rows, columns)

    def transposed(self) -> Factor:
        return replace(self, flipped=not self.flipped)

    def read(self, reader: Reader, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the matrix as a contiguous tensor of ``dtype``."""
        if not self.flipped:
            return self._stored(reader, rows.start, rows.stop).to(dtype)
        stored_rows, _ = self.entry.matrix
        import torch

        block = torch.empty(stored_rows, rows.stop - rows.start, dtype=torch_dtype(self.entry.dtype))
        if block.shape[1] == self.entry.matrix[1]:
            read_tensor(reader, block, self.entry.start)
        else:
            self._columns(reader, block, rows.start)
        return block.t().to(dtype).contiguous()

    def _stored(self, reader: Reader, start: int, stop: int) -> torch.Tensor:
        import torch

        columns = self.entry.matrix[1]
        block = torch.empty(stop - start, columns, dtype=torch_dtype(self.entry.dtype))
        read_tensor(reader, block, self.entry.start + start * columns * itemsize(self.entry.dtype))
        return block

    def _columns(self, reader: Reader, block: torch.Tensor, first: int) -> None:
        size, columns = itemsize(self.entry.dtype), self.entry.matrix[1]
        for row in range(block.shape[0]):
            read_tensor(reader, block[row], self.entry.start + (row * columns + first) * size)


def read_tensor(reader: Reader, tensor: torch.Tensor, offset: int) -> None:
    """Fill a contiguous tensor with the bytes at ``offset``."""
    import torch

    if tensor.numel():
        reader.into(tensor.view(-1).view(torch.uint8).numpy().data, offset)


@dataclass(frozen=True)
class Product:
    """``coefficient · left · right``, of shapes (rows, rank) and (rank, columns)."""

    left: Factor
    right: Factor
    coefficient: float


@dataclass(frozen=True)
class LowRank:
    """A sum of products on one weight of ``shape``."""

    products: tuple[Product, ...]

    kind = "LoRA"
    alignment = 1
    needs_base = False

    @property
    def shape(self) -> tuple[int, int]:
        first = self.products[0]
        return first.left.shape[0], first.right.shape[1]

    @property
    def rank(self) -> int:
        return sum(product.right.shape[0] for product in self.products)

    @property
    def scale(self) -> float:
        return self.products[0].coefficient

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return tuple(factor.entry for one in self.products for factor in (one.right, one.left))

    def transposed(self) -> LowRank:
        return LowRank(
            tuple(Product(one.right.transposed(), one.left.transposed(), one.coefficient) for one in self.products)
        )

    def low_rank(self) -> LowRank:
        return self

    def scaled(self, factor: float) -> LowRank:
        return LowRank(tuple(replace(one, coefficient=one.coefficient * factor) for one in self.products))

    def memory(self, block_rows: int) -> int:
        rows, columns = self.shape
        largest = max(factor.entry.nbytes for one in self.products for factor in (one.right,))
        return 4 * self.rank * (2 * columns + 3 * min(block_rows, rows)) + largest

    def open(self, dtype: torch.dtype, blocks: Blocks) -> OpenDelta:
        return _OpenLowRank(self, dtype)


def lora(a: TensorEntry, b: TensorEntry, scale: float) -> LowRank:
    """``ΔW = scale · B · A`` with A of shape (rank, in) and B of shape (out, rank)."""
    return LowRank((Product(Factor(b), Factor(a), scale),))


def stack(deltas: list[tuple[LowRank, float]]) -> LowRank:
    """``Σ factor · delta`` as one delta."""
    return LowRank(tuple(one for delta, factor in deltas for one in delta.scaled(factor).products))


class _OpenLowRank:
    def __init__(self, delta: LowRank, dtype: torch.dtype) -> None:
        import torch

        self._products = delta.products
        self._dtype = dtype
        self._readers = {entry.file: Reader(entry.file) for entry in delta.entries}
        rights = [
            one.right.read(self._readers[one.right.entry.file], slice(0, one.right.shape[0]), dtype)
            for one in delta.products
        ]
        self._right = torch.cat(rights) if len(rights) > 1 else rights[0]

    def add_to(self, acc: torch.Tensor, w0: torch.Tensor | None, rows: slice, factor: float) -> None:
        acc.addmm_(self._left(rows, factor), self._right)

    def _left(self, rows: slice, factor: float) -> torch.Tensor:
        import torch

        lefts = [
            one.left.read(self._readers[one.left.entry.file], rows, self._dtype).mul_(one.coefficient * factor)
            for one in self._products
        ]
        return torch.cat(lefts, dim=1) if len(lefts) > 1 else lefts[0]

    def __del__(self) -> None:
        for reader in getattr(self, "_readers", {}).values():
            reader.close()
