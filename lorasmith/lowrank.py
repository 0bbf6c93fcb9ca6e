"""Algebra on stacked factors: sums of products recompressed exactly, never a dense matrix.

The products on one weight are stacked, ``ΔW = Σ wᵢsᵢBᵢAᵢ = [B₁ … B_T] · [w₁s₁A₁; …; w_Ts_TA_T]``, and both stacks are
reduced by a QR decomposition, ``[B₁ … B_T] = Q_b R_b`` and ``[A₁; …; A_T]ᵀ = Q_a R_a``. Each delta is then ``Q_b · Mᵢ ·
Q_aᵀ`` with a small *core* ``Mᵢ = R_b,ᵢ R_a,ᵢᵀ``, and whatever depends on sums, products, norms and singular values only
is the same on the cores as on the dense matrices. The singular values of ``Σ Mᵢ`` are those of ``ΔW``, so that cutting
them off is the best approximation there is of that rank, with an error of ``√Σ_{j>k} σⱼ²`` (Eckart and Young 1936).
Everything is float64: Householder's QR is as exact as the factors' product of norms, and the factors are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasmith.errors import BadOption

if TYPE_CHECKING:
    import torch

    Rows = Callable[[slice], torch.Tensor]
    """Reads rows of a matrix in float64."""

ROUNDING = 2.0**-44
"""Singular values below this share of the factors' product of norms are what rounding left of zeros."""

_CHUNK = 2048
"""Rows of tall matrices that are decomposed at once, where their Q is not needed."""


@dataclass(frozen=True)
class Criterion:
    """How much of a delta is kept; exactly one of these is set, beside ``rank`` perhaps as a limit to a ``sv_`` one.

    ``energy`` is the share of Σσ² that stays, ``max_error`` the relative error in the Frobenius norm that is allowed,
    ``params`` the number of parameters of the whole adapter. The ``sv_`` ones are sd-scripts' (``resize_lora.py``):
    σ₀ and all σ > σ₀/``sv_ratio`` stay, ``sv_cumulative`` is the share of Σσ that stays, ``sv_fro`` that of the
    Frobenius norm.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    params: int | None = None
    sv_ratio: float | None = None
    sv_fro: float | None = None
    sv_cumulative: float | None = None

    def __post_init__(self) -> None:
        given = self.given
        limited = [name for name in given if not (name == "rank" and any(one.startswith("sv_") for one in given))]
        if len(limited) > 1:
            raise BadOption(f"{' and '.join(_option(name) for name in limited)} exclude each other; give one of them")
        for name, low, high in (
            ("energy", 0.0, 1.0),
            ("max_error", 0.0, 1.0),
            ("sv_fro", 0.0, 1.0),
            ("sv_cumulative", 0.0, 1.0),
            ("sv_ratio", 1.0, 1e300),
        ):
            value = getattr(self, name)
            # an error of 0 keeps all there is, an energy of 0 would keep nothing
            if value is not None and not (low <= value <= high and (value > 0 or name == "max_error")):
                bounds = f"between {low:g} and {high:g}" if high == 1 else f"a number from {low:g} on"
                raise BadOption(f"{_option(name)} must be {bounds}, not {value:g}")
        for name in ("rank", "params"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise BadOption(f"{_option(name)} must be a whole number from 1 on, not {value}")

    @property
    def given(self) -> tuple[str, ...]:
        """Names of what is set."""
        return tuple(name for name in self.__dataclass_fields__ if getattr(self, name) is not None)

    @property
    def facts(self) -> dict[str, float]:
        """What is set, by name."""
        return {name: getattr(self, name) for name in self.given}

    def __bool__(self) -> bool:
        return bool(self.given)

    def keep(self, values: Sequence[float], norm2: float | None = None) -> int:
        """How many of the singular values, largest first, are to be kept.

        ``norm2`` is the square of the whole delta's Frobenius norm, where ``values`` are not all it has.
        """
        squares = [value * value for value in values]
        total = math.fsum(squares) if norm2 is None else norm2
        if total <= 0:
            return 0
        count = len(values)
        if self.energy is not None:
            count = _reach(squares, self.energy * total)
        elif self.sv_fro is not None:
            count = _reach(squares, self.sv_fro**2 * total)
        elif self.max_error is not None:
            count = _reach(squares, total - self.max_error**2 * total)
        elif self.sv_cumulative is not None:
            count = _reach(values, self.sv_cumulative * math.fsum(values))
        elif self.sv_ratio is not None:
            count = max(1, sum(value > values[0] / self.sv_ratio for value in values))
        return count if self.rank is None else min(count, self.rank)


def _reach(parts: Sequence[float], target: float) -> int:
    """How many of the parts it takes to reach a target, which rounding may put a hair above what there is."""
    so_far = 0.0
    for count, part in enumerate(parts, 1):
        so_far += part
        if so_far >= target * (1 - 2.0**-48):
            return count
    return len(parts)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def allocate(spectra: Mapping[str, tuple[Sequence[float], int]], params: int) -> dict[str, int]:
    """The rank of each module, so that all take at most ``params`` parameters and the kept Σσ² is large.

    ``spectra`` gives singular values, largest first, and the parameters that one of them takes (rows + columns). They
    are taken by σ² per parameter, as far as the budget goes; of equal ones, the first by name.
    """
    offers = [
        (value * value / cost, name, position)
        for name, (values, cost) in spectra.items()
        for position, value in enumerate(values)
    ]
    ranks = dict.fromkeys(spectra, 0)
    left = params
    for _, name, position in sorted(offers, key=lambda one: (-one[0], one[1], one[2])):
        cost = spectra[name][1]
        if cost <= left and ranks[name] == position:  # never one without those before it
            ranks[name] += 1
            left -= cost
    return ranks


@dataclass(frozen=True)
class Pair:
    """One product, ``coefficient · left · rightᵀ``, by what reads rows of (rows, rank) and of (columns, rank)."""

    rank: int
    left: Rows
    right: Rows
    coefficient: float


class Reduced:
    """Several deltas on one weight, as cores between two orthonormal bases.

    ``deltas`` are the products of each: all are stacked together. ``cores[i]`` has shape (p, q), at most the total
    rank, and ``inputs[i]``, ``outputs[i]`` hold the i-th delta's A and B in the bases: (q, rankᵢ) and (p, rankᵢ).
    Only with its ``bases`` can it ``expand``; without them it takes little memory, however large ``shape`` is.
    """

    def __init__(self, deltas: Sequence[Sequence[Pair]], shape: tuple[int, int], *, bases: bool = True) -> None:
        pairs = [pair for delta in deltas for pair in delta]
        step = max(shape) if bases else _CHUNK
        self._left = _Basis([(pair.rank, pair.left) for pair in pairs], shape[0], step)
        self._right = _Basis([(pair.rank, pair.right) for pair in pairs], shape[1], step)
        self.outputs: list[torch.Tensor] = []
        self.inputs: list[torch.Tensor] = []
        self.cores: list[torch.Tensor] = []
        first = 0
        for delta in deltas:
            last = first + sum(pair.rank for pair in delta)
            self.outputs.append(self._left.triangle[:, first:last])
            self.inputs.append(self._right.triangle[:, first:last])
            self.cores.append(self.outputs[-1] * _coefficients(delta) @ self.inputs[-1].t())
            first = last
        self._sizes = [one * other for one, other in zip(self._left.norms, self._right.norms, strict=True)]
        self._deltas = deltas

    def floor(self, weights: Sequence[float]) -> float:
        """The size of what rounding may leave where the deltas' weighted sum is zero."""
        factors = [
            abs(weight * pair.coefficient)
            for weight, delta in zip(weights, self._deltas, strict=True)
            for pair in delta
            for _ in range(pair.rank)
        ]
        return ROUNDING * math.fsum(factor * size for factor, size in zip(factors, self._sizes, strict=True))

    def expand(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``Q_b · left`` and ``(Q_a · right)ᵀ``: a core's factors, (p, k) and (q, k), as those of the weight."""
        return self._left.apply(left), self._right.apply(right).t()


def _coefficients(delta: Sequence[Pair]) -> torch.Tensor:
    import torch

    return torch.tensor([pair.coefficient for pair in delta for _ in range(pair.rank)], dtype=torch.float64)


class _Basis:
    """The QR decomposition of matrices side by side, its Q as Householder's reflectors.

    It errs column by column, relative to each column's norm, so that no small delta drowns beside a large one. Taken
    ``step`` rows at a time, each with the triangle of those before, it has the triangle in the end, but no Q.
    """

    def __init__(self, matrices: Sequence[tuple[int, Rows]], rows: int, step: int) -> None:
        import torch

        self._rows = rows
        self.triangle = torch.empty(0, 0, dtype=torch.float64)
        squares = torch.zeros(0, dtype=torch.float64)
        for first in range(0, rows, step):
            stacked = _beside(matrices, slice(first, min(rows, first + step)))
            here = torch.linalg.vector_norm(stacked, dim=0).square()
            squares = squares + here if first else here
            self._reflectors, self._tau = torch.geqrf(torch.cat([self.triangle, stacked]) if first else stacked)
            self.triangle = self._reflectors[: len(self._tau)].triu()
        self.norms: list[float] = squares.sqrt().tolist()

    def apply(self, small: torch.Tensor) -> torch.Tensor:
        """``Q · small``."""
        import torch

        assert self._reflectors.shape[0] == self._rows, "taken in parts, there is no Q"
        padded = torch.zeros(self._rows, small.shape[1], dtype=small.dtype)
        padded[: small.shape[0]] = small
        return torch.ormqr(self._reflectors[:, : len(self._tau)], self._tau, padded)


def _beside(matrices: Sequence[tuple[int, Rows]], rows: slice) -> torch.Tensor:
    """Some rows of matrices, each of a number of columns, side by side; no two of them are held at once."""
    import torch

    stacked = torch.empty(rows.stop - rows.start, sum(width for width, _ in matrices), dtype=torch.float64)
    first = 0
    for width, read in matrices:
        stacked[:, first : first + width] = read(rows)
        first += width
    return stacked


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of a core, without what is only rounding: ``U · diag(values) · Vᵀ``."""

    u: torch.Tensor
    values: tuple[float, ...]
    v: torch.Tensor

    def halves(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``rank`` terms as two factors, √σ on each side: (p, rank) and (q, rank)."""
        import torch

        roots = torch.tensor(self.values[:rank], dtype=torch.float64).sqrt()
        return self.u[:, :rank] * roots, self.v[:, :rank] * roots


def spectrum(core: torch.Tensor, floor: float = 0.0) -> Spectrum:
    """The singular values of a core above ``floor``, and its singular vectors."""
    import torch

    u, values, vt = torch.linalg.svd(core, full_matrices=False)
    kept = tuple(value for value in values.tolist() if value > floor)
    return Spectrum(u, kept, vt.t())


def shared_bases(cores: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases of all outputs and of all inputs of several cores, each ordered by how much the cores have
    there.

    They are the left singular vectors of ``[M₁ … M_T]`` and the right ones of ``[M₁; …; M_T]`` (the higher-order SVD of
    De Lathauwer et al. 2000), and depend on the deltas only: on no order, and not on how a delta is split into factors.
    Which way round each vector points is open.
    """
    import torch

    outputs, heights, _ = torch.linalg.svd(torch.cat(list(cores), dim=1), full_matrices=False)
    _, widths, inputs = torch.linalg.svd(torch.cat(list(cores)), full_matrices=False)
    return outputs[:, heights >= ROUNDING * heights[0]], inputs[widths >= ROUNDING * widths[0]].t()


def balanced_bases(cores: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """``shared_bases`` of the cores brought to the same norm, so that the loudest has no more say than the others."""
    norms = [float(core.norm()) for core in cores]
    return shared_bases([core / norm for core, norm in zip(cores, norms, strict=True) if norm > 0])


def share_kept(core: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> float | None:
    """How much of a core's energy lies in the spans of ``u`` (p, k) and ``v`` (q, k): ‖UᵀMV‖²/‖M‖²; None for zero."""
    total = float(core.norm()) ** 2
    return float((u.t() @ core @ v).norm()) ** 2 / total if total > 0 else None
