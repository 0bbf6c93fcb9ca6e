"""Low-rank factors of a matrix that is only ever seen some rows at a time.

The randomised range finder of Halko, Martinsson and Tropp (2011, SIAM Review 53), with the products of all power
iterations kept: multiply the matrix with random columns, orthonormalise, multiply its transpose with that, and so on,
each new block orthogonal to those before (the block Krylov space of Musco and Musco 2015, arXiv:1504.05477; for the
same passes its error is some ten times nearer to the least there is than that of the last block alone). What the matrix
has in the span Q of all blocks, ``QᵀD``, is then decomposed exactly. The residual is no estimate:
``‖D − Q QᵀD‖² = ‖D‖² − ‖QᵀD‖²``, both summed up in float64. Blocks are added until it settles, and with fresh columns
as long as they do not hold what is asked for.

Memory is that of a few blocks of factors. Where they are not much smaller than the matrix, all its singular vectors on
the shorter side are found instead: of a small matrix by decomposing it, of a large one from ``DᵀD``, whose eigenvalues
tell singular values down to 10⁻⁸ of the largest; the projection on them, and with it the error, is as exact as ever.
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
"""Iterations end when the square of the error falls by less than this share of itself."""

UNSEEN = 2.0**-48
"""Squares of errors below this share of ‖D‖² are the rounding of the sums that they are the difference of."""

MOST_ITERATIONS = 24

MOST_BLOCKS = 6
"""Of a space, before it is condensed to what is best in it."""

WIDE = 2
"""A space of more than one in so many columns costs more than finding all singular vectors."""

SMALL = 1 << 21
"""Elements of a matrix that may be held in memory as a whole."""

_PANEL = 1 << 22
"""Elements of the rows that are multiplied with all others at once."""


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

    @property
    def error2(self) -> float:
        """The square of the error in the Frobenius norm."""
        return max(0.0, self.norm2 - self.kept2)


def approximate(blocks: Blocks, shape: tuple[int, int], criterion: Criterion) -> Approximation:
    """The best approximation of a matrix of ``shape`` that a criterion (rank, energy or max_error) asks for.

    ``blocks()`` is called several times and must give the same rows each time.
    """
    matrix = _Streamed(blocks, shape)
    found = _search(matrix, criterion)
    if found is None:
        found = (_whole if math.prod(shape) <= SMALL else _from_squares)(matrix, criterion)
    return found


class _Streamed:
    """Products with a matrix that is walked over block by block, in float64; ``norm2`` is its ‖D‖² after the first."""

    def __init__(self, blocks: Blocks, shape: tuple[int, int]) -> None:
        self._blocks = blocks
        self.shape = shape
        self.norm2 = 0.0

    def times(self, right: torch.Tensor) -> torch.Tensor:
        """``D · right``."""
        import torch

        result = torch.empty(self.shape[0], right.shape[1], dtype=torch.float64)
        norm2 = self.norm2
        for rows, block in self._blocks():
            wide = block.double()
            right = right.to(wide.device)
            result[rows] = (wide @ right).cpu()
            if not norm2:
                self.norm2 += float(wide.square().sum())
        return result

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        """``Dᵀ · left``."""
        import torch

        result = torch.zeros(left.shape[1], self.shape[1], dtype=torch.float64)  # this way round takes half the time
        for rows, block in self._blocks():
            wide = block.double()
            result = result.to(wide.device).addmm_(left[rows].t().to(wide.device), wide)
        return result.t().cpu()

    def dense(self) -> torch.Tensor:
        """``D``."""
        import torch

        result = torch.empty(self.shape, dtype=torch.float64)
        for rows, block in self._blocks():
            result[rows] = block.cpu()
        return result

    def squared(self) -> torch.Tensor:
        """``DᵀD``, or ``D Dᵀ`` where that is smaller."""
        import torch

        rows, columns = self.shape
        result = torch.zeros(min(self.shape), min(self.shape), dtype=torch.float64)
        if columns <= rows:
            for _, block in self._blocks():
                wide = block.double()
                result = result.to(wide.device).addmm_(wide.t(), wide)
            return result.cpu()
        height = max(1, _PANEL // columns)
        for first in range(0, rows, height):
            panel = self._panel(slice(first, min(rows, first + height)))
            for some, block in self._blocks():
                if some.stop > first:  # the rest is known by symmetry
                    result[some, first : first + height] = (block.double() @ panel.to(block.device).t()).cpu()
        whole: torch.Tensor = result.tril() + result.tril(-1).t()
        return whole

    def _panel(self, wanted: slice) -> torch.Tensor:
        """Some of the rows."""
        import torch

        panel = torch.empty(wanted.stop - wanted.start, self.shape[1], dtype=torch.float64)
        for rows, block in self._blocks():
            first, last = max(rows.start, wanted.start), min(rows.stop, wanted.stop)
            if first < last:
                panel[first - wanted.start : last - wanted.start] = block[first - rows.start : last - rows.start].cpu()
        return panel


# ------------------------------------------------------------------------------------------- a part of the space


class _Space:
    """An orthonormal ``basis`` Q of some of the matrix's columns, and what the matrix has ``inside`` it, ``DᵀQ``."""

    def __init__(self, matrix: _Streamed) -> None:
        import torch

        rows, columns = matrix.shape
        self._matrix = matrix
        self.basis = torch.empty(rows, 0, dtype=torch.float64)
        self.inside = torch.empty(columns, 0, dtype=torch.float64)

    @property
    def width(self) -> int:
        return self.basis.shape[1]

    def extend(self, columns: torch.Tensor) -> torch.Tensor:
        """Add the span of ``D · columns``; returns the columns of the next power iteration."""
        import torch

        new = self._matrix.times(columns)
        # Householder's reflectors stay orthogonal where nothing but rounding is left of a column
        new = torch.linalg.qr(torch.cat([self.basis, new], dim=1))[0][:, self.width :]
        inside = self._matrix.transposed_times(new)
        self.basis = torch.cat([self.basis, new], dim=1)
        self.inside = torch.cat([self.inside, inside], dim=1)
        following: torch.Tensor = torch.linalg.qr(inside)[0]
        return following

    def condense(self, width: int) -> None:
        """Keep the ``width`` best directions only."""
        import torch

        turn = torch.linalg.svd(torch.linalg.qr(self.inside)[1].t(), full_matrices=False)[0][:, :width]
        self.basis, self.inside = self.basis @ turn, self.inside @ turn


def _search(matrix: _Streamed, criterion: Criterion) -> Approximation | None:
    """What a space finds that is smaller than the matrix; None where none such settles on what is asked for."""
    import torch

    generator = torch.Generator().manual_seed(0)
    width = (criterion.rank or OVERSAMPLING) + OVERSAMPLING
    space, fresh, following, found = _Space(matrix), width, torch.empty(matrix.shape[1], 0, dtype=torch.float64), None
    reached = False
    for _ in range(MOST_ITERATIONS):
        if WIDE * (space.width + following.shape[1] + fresh) >= min(matrix.shape):
            return None
        drawn = torch.randn(matrix.shape[1], fresh, dtype=torch.float64, generator=generator)
        following = space.extend(torch.cat([following, drawn], dim=1))
        before, (found, reached) = found, _cut(space.basis, space.inside, matrix.norm2, criterion)
        if reached and before is not None and _is_settled(before, found):
            break
        fresh = 0 if reached else space.width
        if reached and space.width > MOST_BLOCKS * following.shape[1]:
            space.condense(found.rank + OVERSAMPLING)
    return found if reached else None


def _is_settled(before: Approximation, found: Approximation) -> bool:
    gained = before.error2 - found.error2
    return before.rank == found.rank and gained <= SETTLED * found.error2 + UNSEEN * found.norm2


def _cut(basis: torch.Tensor, inside: torch.Tensor, norm2: float, criterion: Criterion) -> tuple[Approximation, bool]:
    """What a criterion keeps of ``basis · insideᵀ``, and whether a wider basis would not be asked for."""
    import torch

    span, triangle = torch.linalg.qr(inside)
    parts = spectrum(triangle.t(), ROUNDING * math.sqrt(norm2))
    rank = criterion.keep(parts.values, norm2)
    left, right = parts.halves(rank)
    kept2 = math.fsum(value * value for value in parts.values[:rank])
    reached = criterion.rank is not None or rank + OVERSAMPLING <= basis.shape[1] or len(parts.values) < basis.shape[1]
    return Approximation(basis @ left, (span @ right).t(), norm2, kept2), reached


# ------------------------------------------------------------------------------------------------ all of the space


def _whole(matrix: _Streamed, criterion: Criterion) -> Approximation:
    """The same of a matrix that is held in memory."""
    dense = matrix.dense()
    parts = spectrum(dense, ROUNDING * float(dense.norm()))
    norm2 = math.fsum(value * value for value in parts.values)
    rank = criterion.keep(parts.values)
    left, right = parts.halves(rank)
    return Approximation(left, right.t(), norm2, math.fsum(value * value for value in parts.values[:rank]))


def _from_squares(matrix: _Streamed, criterion: Criterion) -> Approximation:
    """The same of one that is not: the projection on the eigenvectors of ``DᵀD`` or ``D Dᵀ``."""
    import torch

    squares, vectors = torch.linalg.eigh(matrix.squared())
    values = squares.flip(0).clamp(min=0).sqrt().tolist()
    basis = vectors.flip(1)[:, : criterion.keep(values)]
    upright = matrix.shape[1] <= matrix.shape[0]
    inside = matrix.times(basis) if upright else matrix.transposed_times(basis)
    found, _ = _cut(basis, inside, math.fsum(value * value for value in values), Criterion(rank=basis.shape[1] or 1))
    return Approximation(found.right.t(), found.left.t(), found.norm2, found.kept2) if upright else found
