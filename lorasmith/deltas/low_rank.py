"""Sums of low-rank products, ΔW = Σ cᵢ·Lᵢ·Rᵢ: LoRA, and everything that is one in disguise.

LoRA (Hu et al. 2021, arXiv:2106.09685, equation 3) is ``ΔW = s·B·A`` with ``s = α/r``; rank-stabilised LoRA
(Kalajdzievski 2023, arXiv:2312.03732) has ``s = α/√r``. Products on one weight are added by stacking factors:
``[c₁L₁ c₂L₂] · [R₁; R₂]``, one matrix product of rank Σrᵢ. The coefficient is multiplied into the left rows.

A convolution is a product, too, on its weight seen as (out, in·k). Of a grouped one, (out, in/g·k), every block of
rows has inputs of its own: ``block_diag(B₁ … B_g) · [A₁₁; …; A_gg]``, where A_jj is what rank block j has for the
inputs of group j. BD-LoRA, where A or B is ``block_diag`` of what is stored, has the same two arrangements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasmith.deltas.axis import Axis, span
from lorasmith.dtypes import itemsize, torch_dtype
from lorasmith.safefile import Reader, TensorEntry

if TYPE_CHECKING:
    import torch

    from lorasmith.deltas import Blocks, OpenDelta

_CHUNK = 1 << 20
"""Bytes of a factor that are held while single rows or columns are taken of it."""


@dataclass(frozen=True)
class Factor:
    """A stored matrix, read by rows; ``flipped`` reads its transpose.

    ``spread`` says that the stored rows are that many blocks, which lie on the diagonal of the matrix and have zeros
    beside them. ``diagonal`` is the way back: of as many blocks of rows as of columns, the matrix has only those on
    the diagonal, one below the other. ``rows`` and ``columns`` are what is taken of the result, in that order, before
    it is flipped.
    """

    entry: TensorEntry
    flipped: bool = False
    spread: int = 1
    diagonal: int = 1
    rows: Axis | None = None
    columns: Axis | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self._whole
        rows = rows if self.rows is None else len(self.rows)
        columns = columns if self.columns is None else len(self.columns)
        return (columns, rows) if self.flipped else (rows, columns)

    @property
    def _whole(self) -> tuple[int, int]:
        rows, columns = self.entry.matrix
        return rows, columns * self.spread // self.diagonal

    @property
    def _blocks(self) -> int:
        return max(self.spread, self.diagonal)

    def transposed(self) -> Factor:
        return replace(self, flipped=not self.flipped)

    def part(self, rows: Axis | None = None, columns: Axis | None = None) -> Factor:
        """Some rows and columns of the matrix."""
        if self.flipped:
            rows, columns = columns, rows
        own_rows, own_columns = (
            axis if axis is not None else span(0, length)
            for axis, length in zip((self.rows, self.columns), self._whole, strict=True)
        )
        return replace(
            self,
            rows=self.rows if rows is None else _unless_whole(own_rows.of(rows), self._whole[0]),
            columns=self.columns if columns is None else _unless_whole(own_columns.of(columns), self._whole[1]),
        )

    def memory(self, rows: int) -> int:
        """Bytes that reading so many rows takes, the result among them, for a result of 4 bytes an element."""
        height, width = self.entry.matrix
        size, result = itemsize(self.entry.dtype), 4 * rows * self.shape[1]
        if self._blocks > 1:
            taken = 8 * (height + self._whole[1]) + 4 * height * self._whole[1] if self._is_part else 0
            if self.flipped or self._is_part:
                return height * width * (size + 4) + 4 * height * self._whole[1] + 2 * result + taken
            return rows * width * (size + 4) + result
        if self._is_part:
            chunk = min(height, max(1, _CHUNK // max(1, width * size))) * width * size
            return chunk + 2 * rows * self.shape[1] * size + 2 * result + 16 * (height + width)
        return rows * self.shape[1] * size + result * (2 if self.flipped else 1)

    @property
    def _is_part(self) -> bool:
        return self.rows is not None or self.columns is not None

    def read(self, reader: Reader, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the matrix as a contiguous tensor of ``dtype``."""
        if self._is_part:
            return self._taken(reader, rows, dtype)
        if self._blocks > 1:
            return self._arranged(reader, rows, dtype)
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

    def _taken(self, reader: Reader, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Rows of a matrix of which only a part is taken."""
        height, width = self._whole
        high, wide = (self.rows or span(0, height)), (self.columns or span(0, width))
        some, across = slice(0, len(high)), slice(0, len(wide))
        if self.flipped:
            across = rows
        else:
            some = rows
        if self._blocks > 1:
            whole = replace(self, flipped=False, rows=None, columns=None)._arranged(reader, slice(0, height), dtype)
            block = _picked(_picked(whole, 0, high.part(some)), 1, wide.part(across))
        else:
            block = self._chosen(reader, high.part(some), wide.part(across))
        return (block.t() if self.flipped else block).to(dtype).contiguous()

    def _chosen(self, reader: Reader, rows: Sequence[int], columns: Sequence[int]) -> torch.Tensor:
        """Single rows and columns; of what lies between wanted rows, only a little is held at a time."""
        import torch

        width = self.entry.matrix[1]
        block = torch.empty(len(rows), len(columns), dtype=torch_dtype(self.entry.dtype))
        height = max(1, _CHUNK // max(1, width * itemsize(self.entry.dtype)))
        if isinstance(rows, range) and rows.step == 1:
            for first in range(rows.start, rows.stop, height):
                stored = self._stored(reader, first, min(rows.stop, first + height))
                block[first - rows.start :][: len(stored)] = _picked(stored, 1, columns)
            return block
        wanted = torch.tensor(rows)
        for first in range(min(rows, default=0), max(rows, default=-1) + 1, height):
            here = ((wanted >= first) & (wanted < first + height)).nonzero().squeeze(1)
            if len(here):
                last = int(wanted[here].max()) + 1
                stored = _picked(self._stored(reader, first, last), 1, columns)
                block[here] = stored[wanted[here] - first]
        return block

    def _arranged(self, reader: Reader, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Rows of a matrix whose blocks are not where they are stored."""
        import torch

        (height, width), columns = self.entry.matrix, self._whole[1]
        first, last = (0, height) if self.flipped else (rows.start, rows.stop)
        stored = self._stored(reader, first, last).to(dtype)
        matrix = torch.zeros(last - first, columns, dtype=dtype)
        step = height // self._blocks
        for block in range(first // step, -(-last // step)):
            here = slice(max(first, block * step) - first, min(last, (block + 1) * step) - first)
            if self.spread > 1:
                matrix[here, block * width : (block + 1) * width] = stored[here]
            else:
                matrix[here] = stored[here, block * columns : (block + 1) * columns]
        return matrix[:, rows].t().contiguous() if self.flipped else matrix

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


def _unless_whole(axis: Axis, length: int) -> Axis | None:
    return None if axis.is_whole(length) else axis


def _picked(block: torch.Tensor, dim: int, which: Sequence[int]) -> torch.Tensor:
    """Rows (``dim`` 0) or columns of a block: a view where they are evenly spaced."""
    import torch

    if isinstance(which, range):
        cut = slice(which.start, which.stop, which.step)
        return block[cut] if dim == 0 else block[:, cut]
    return block.index_select(dim, torch.tensor(which))


def read_tensor(reader: Reader, tensor: torch.Tensor, offset: int) -> None:
    """Fill a contiguous tensor with the bytes at ``offset``."""
    import torch

    if tensor.numel():
        reader.into(tensor.view(-1).view(torch.uint8).numpy().data, offset)


def beside(tensor: torch.Tensor, acc: torch.Tensor) -> torch.Tensor:
    """The tensor on the device of ``acc``; what lies in pinned memory a GPU fetches while its thread goes on."""
    return tensor.pin_memory().to(acc.device, non_blocking=True) if acc.is_cuda and not tensor.is_cuda else tensor


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

    def part(self, rows: Axis | None = None, columns: Axis | None = None) -> LowRank:
        products = (
            Product(one.left.part(rows=rows), one.right.part(columns=columns), one.coefficient) for one in self.products
        )
        return LowRank(tuple(products))

    def low_rank(self) -> LowRank:
        return self

    def scaled(self, factor: float) -> LowRank:
        return LowRank(tuple(replace(one, coefficient=one.coefficient * factor) for one in self.products))

    def memory(self, block_rows: int) -> int:
        rows, columns = self.shape
        height = min(block_rows, rows)
        right = max(one.right.memory(one.right.shape[0]) for one in self.products)
        left = max(one.left.memory(height) for one in self.products)
        copies = 1 if len(self.products) == 1 else 2
        return 4 * self.rank * copies * (columns + height) + max(right, left)

    def open(self, dtype: torch.dtype, blocks: Blocks) -> OpenDelta:
        return _OpenLowRank(self, dtype)


def stack(deltas: list[tuple[LowRank, float]]) -> LowRank:
    """``Σ factor · delta`` as one delta."""
    return LowRank(tuple(one for delta, factor in deltas for one in delta.scaled(factor).products))


class _OpenLowRank:
    def __init__(self, delta: LowRank, dtype: torch.dtype) -> None:
        import torch

        self._products = delta.products
        self._dtype = dtype
        self._readers = {file: Reader(file) for file in {entry.file for entry in delta.entries}}
        rights = [
            one.right.read(self._readers[one.right.entry.file], slice(0, one.right.shape[0]), dtype)
            for one in delta.products
        ]
        self._right = torch.cat(rights) if len(rights) > 1 else rights[0]

    def add_to(self, acc: torch.Tensor, w0: torch.Tensor | None, rows: slice, factor: float) -> None:
        self._right = beside(self._right, acc)
        acc.addmm_(beside(self._left(rows, factor), acc), self._right)

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
