"""Low-rank factors of a matrix that is only ever seen some rows at a time.

The randomised range finder of Halko, Martinsson and Tropp (2011, SIAM Review 53, algorithms 4.4 and 5.1): multiply the
matrix with random columns, orthonormalise, let power iterations turn the basis towards the largest singular values, and
decompose what the matrix has there, ``QᵀD``, exactly. The residual is no estimate: ``‖D − Q QᵀD‖² = ‖D‖² − ‖QᵀD‖²``,
both summed up in float64. Iterations go on until it settles, and with more columns while these do not hold what is
asked for. Memory is that of the factors; only where they are not much smaller than the matrix is it taken whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasmith.lowrank import ROUNDING, Criterion, spectrum

if TYPE_CHECKING:
    import torch

    from lorasmith.deltas import Blocks

OVERSAMPLING = 10
"""Columns beyond the rank that is looked for."""

SETTLED = 1e-3
"""Power iterations end when the square of the error falls by less than this share of itself."""

MOST_ITERATIONS = 12

WIDE = 4
"""A basis of more than one in so many columns costs more than decomposing the matrix whole."""


@dataclass(frozen=True)
class Approximation:
    """``left · right`` of shapes (rows, rank) and (rank, columns), float64, √σ on both.

    ``norm2`` is ‖D‖², ``kept2`` the Σσ² that is kept; the square of the error is the difference.
    """

    left: torch.Tensor
    right: torch.Tensor
    norm2: float
    kept2: float

    @property
    def rank(self) -> int:
        return self.left.shape[1]


def approximate(blocks: Blocks, shape: tuple[int, int], criterion: Criterion) -> Approximation:
    """The best approximation of a matrix of ``shape`` that a criterion (rank, energy or max_error) asks for.

    ``blocks()`` is called several times and must give the same rows each time.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    width = (criterion.rank or OVERSAMPLING) + OVERSAMPLING
    while WIDE * width < min(shape):
        found = _search(_Streamed(blocks, shape), width, criterion, generator)
        if found is not None:
            return found
        width *= 2
    return _whole(blocks, shape, criterion)


class _Streamed:
    """Products with a matrix that is walked over block by block, in float64; ``norm2`` is its ‖D‖² after the first."""

    def __init__(self, blocks: Blocks, shape: tuple[int, int]) -> None:
        self._blocks = blocks
        self._shape = shape
        self.norm2 = 0.0

    @property
    def columns(self) -> int:
        return self._shape[1]

    def times(self, right: torch.Tensor) -> torch.Tensor:
        """``D · right``."""
        import torch

        result = torch.empty(self._shape[0], right.shape[1], dtype=torch.float64)
        self.norm2 = 0.0
        for rows, block in self._blocks():
            wide = block.double()
            right = right.to(wide.device)
            result[rows] = (wide @ right).cpu()
            self.norm2 += float(wide.square().sum())
        return result

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        """``Dᵀ · left``."""
        import torch

        result = torch.zeros(self._shape[1], left.shape[1], dtype=torch.float64)
        for rows, block in self._blocks():
            wide = block.double()
            result = result.to(wide.device).addmm_(wide.t(), left[rows].to(wide.device))
        return result.cpu()


def _search(matrix: _Streamed, width: int, criterion: Criterion, generator: torch.Generator) -> Approximation | None:
    """What a basis of ``width`` columns finds; None where it takes a wider one."""
    import torch

    columns = torch.randn(matrix.columns, width, dtype=torch.float64, generator=generator)
    error2 = math.inf
    for _ in range(MOST_ITERATIONS):
        basis = torch.linalg.qr(matrix.times(columns))[0]
        inside = matrix.transposed_times(basis)
        found, reached = _cut(basis, inside, matrix.norm2, criterion)
        before, error2 = error2, found.norm2 - found.kept2
        if before - error2 <= SETTLED * max(error2, 0.0):
            return found if reached else None
        columns = torch.linalg.qr(inside)[0]
    return found if reached else None


def _cut(basis: torch.Tensor, inside: torch.Tensor, norm2: float, criterion: Criterion) -> tuple[Approximation, bool]:
    """What a criterion keeps of ``basis · insideᵀ``, and whether a wider basis would not be asked for."""
    parts = spectrum(inside.t(), ROUNDING * math.sqrt(norm2))
    rank = criterion.keep(parts.values, norm2)
    left, right = parts.halves(rank)
    kept2 = math.fsum(value * value for value in parts.values[:rank])
    reached = criterion.rank is not None or rank + OVERSAMPLING <= basis.shape[1] or len(parts.values) < basis.shape[1]
    return Approximation(basis @ left, right.t(), norm2, kept2), reached


def _whole(blocks: Blocks, shape: tuple[int, int], criterion: Criterion) -> Approximation:
    """The same of a matrix that is held in memory."""
    import torch

    dense = torch.empty(shape, dtype=torch.float64)
    for rows, block in blocks():
        dense[rows] = block.cpu()
    parts = spectrum(dense, ROUNDING * float(dense.norm()))
    norm2 = math.fsum(value * value for value in parts.values)
    rank = criterion.keep(parts.values)
    left, right = parts.halves(rank)
    return Approximation(left, right.t(), norm2, math.fsum(value * value for value in parts.values[:rank]))
