"""Several adapters' deltas on one weight, made one by a rule: a Delta itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING

from lorasmith.combining import DUST, Method, combine, kept_count
from lorasmith.combining.draws import drawn, key
from lorasmith.deltas import Delta
from lorasmith.deltas.low_rank import Factor, beside
from lorasmith.deltas.patchwork import Patchwork
from lorasmith.errors import Unsupported
from lorasmith.lowrank import Pair, Reduced, shared_bases
from lorasmith.records import Term
from lorasmith.safefile import Reader, TensorEntry

if TYPE_CHECKING:
    import torch

    from lorasmith.adapter import ModuleDelta
    from lorasmith.deltas import Blocks, OpenDelta
    from lorasmith.deltas.axis import Axis

_HALVES = 1 << 16


@dataclass(frozen=True)
class Source:
    """What one adapter does to the weight: the sum of its ``deltas``, each with a weight within; ``weight`` is its own.

    ``digest`` and ``name`` name the adapter and its weight to what is drawn, which is for the weight as the adapter has
    it: ``turned`` says that the deltas stand the other way round.
    """

    deltas: tuple[tuple[Delta, float], ...]
    weight: float
    digest: str = ""
    name: str = ""
    turned: bool = False


@dataclass(frozen=True)
class Combined:
    """``method`` over the ``sources`` of one tensor."""

    method: Method
    sources: tuple[Source, ...]

    kind = "combination"
    alignment = 1

    @property
    def _deltas(self) -> tuple[Delta, ...]:
        return tuple(delta for source in self.sources for delta, _ in source.deltas)

    @property
    def shape(self) -> tuple[int, int]:
        return self._deltas[0].shape

    @property
    def rank(self) -> int:
        return sum(delta.rank for delta in self._deltas)

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def needs_base(self) -> bool:
        return any(delta.needs_base for delta in self._deltas)

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return tuple(entry for delta in self._deltas for entry in delta.entries)

    def transposed(self) -> Combined:
        sources = tuple(
            replace(
                source,
                deltas=tuple((delta.transposed(), factor) for delta, factor in source.deltas),
                turned=not source.turned,
            )
            for source in self.sources
        )
        return Combined(self.method, sources)

    def part(self, rows: Axis | None = None, columns: Axis | None = None) -> Combined:
        """The whole; what is kept of a part depends on the rest."""
        for axis, length in zip((rows, columns), self.shape, strict=True):
            if axis is not None and not axis.is_whole(length):
                raise NotImplementedError("a part of a combination")
        return self

    def low_rank(self) -> None:
        return None

    def memory(self, block_rows: int) -> int:
        rows, columns = self.shape
        if self.method.space == "core":
            return 2 * 8 * self.rank * (rows + columns) + 6 * 8 * self.rank**2 + 4 * self.rank * (rows + columns)
        block = min(block_rows, rows) * columns
        return sum(delta.memory(block_rows) for delta in self._deltas) + (4 * len(self.sources) + 8) * 4 * block

    def open(self, dtype: torch.dtype, blocks: Blocks) -> OpenDelta:
        if self.method.space == "core" and not self.method.is_linear:
            return _OpenCore(self, dtype)
        return _OpenDense(self, dtype, blocks)


def combine_terms(terms: Sequence[Term], method: Method, digests: Sequence[str], tensor: str) -> tuple[Term, ...]:
    """Terms of one tensor, those with a low-rank part made one by a rule; ``digests`` are the adapters' by position.

    Raises Unsupported for what has no core, where the rule is applied to cores.
    """
    ranked = [term for term in terms if term.delta.rank]
    if not ranked:
        return tuple(terms)
    for term in ranked:
        if isinstance(term.delta, Patchwork) and any(patch.factor != 1 for patch in term.delta.patches):
            raise Unsupported(
                f"{tensor!r} holds several layers of an adapter, to which --weights give different weights; with "
                f"--method {method.name}, one tensor has one weight"
            )
        if method.space == "core" and term.delta.low_rank() is None:
            raise Unsupported(
                f"{term.delta.entries[0].name!r} belongs to a {term.delta.kind} of {tensor!r}, which is of no low rank "
                "and has no core; use --space dense"
            )
    sources: dict[int, list[Term]] = {}
    for term in ranked:
        sources.setdefault(term.adapter, []).append(term)
    parts = [
        Source(
            tuple((one.delta, one.factor / some[0].factor) for one in some),
            some[0].factor,
            digests[adapter],
            (len(some) == 1 and some[0].name) or tensor.removesuffix(".weight"),
            len(some) == 1 and some[0].flipped,
        )
        for adapter, some in sources.items()
    ]
    rest = [term for term in terms if not term.delta.rank]
    return (*rest, Term(Combined(method, tuple(parts)), 1.0, ranked[0].adapter))


def draw_name(source: ModuleDelta) -> str:
    """What a module's weight is called to what is drawn."""
    return source.module if source.parameter == "weight" else f"{source.module}.{source.parameter}"


class _OpenCore:
    """Factors of what the rule makes of the cores."""

    def __init__(self, delta: Combined, dtype: torch.dtype) -> None:
        reduced = Reduced([factors(source.deltas) for source in delta.sources], delta.shape)
        core = combined_core(delta.method, delta.sources, reduced.cores)
        import torch

        left, right = reduced.expand(core, torch.eye(core.shape[1], dtype=torch.float64))
        self._left, self._right = left.to(dtype), right.to(dtype).contiguous()

    def add_to(self, acc: torch.Tensor, w0: torch.Tensor | None, rows: slice, factor: float) -> None:
        acc.addmm_(beside(self._left[rows], acc), beside(self._right, acc), alpha=factor)


def combined_core(method: Method, sources: Sequence[Source], cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a rule makes of deltas' cores, (p, q), in the bases that they share, as a core again."""
    weights = [source.weight for source in sources]
    if method.is_linear:
        return reduce(
            lambda one, other: one + other, (core * weight for core, weight in zip(cores, weights, strict=True))
        )
    u, v = shared_bases(cores)
    turned = [_without_dust(u.t() @ core @ v) for core in cores]
    if method.draws:
        keep = [_drawn(method, one, slice(0, u.shape[1]), (u.shape[1], v.shape[1])) for one in sources]
    else:
        keep = [_largest(core, kept_count(method, core.numel())) for core in turned]
    return u @ combine(method, turned, weights, keep) @ v.t()


def _without_dust(core: torch.Tensor) -> torch.Tensor:
    """The core with zeros where rounding has left something of them, which would vote and be counted."""
    return core.where(core.abs() > DUST * core.norm(), 0.0)


def _largest(core: torch.Tensor, count: int) -> torch.Tensor:
    import torch

    mask = torch.zeros(core.numel(), dtype=torch.bool)
    mask[core.abs().flatten().topk(count).indices] = True
    return mask.view(core.shape)


def factors(deltas: Sequence[tuple[Delta, float]]) -> list[Pair]:
    """The products of low-rank deltas."""
    found = []
    for delta, factor in deltas:
        low = delta.low_rank()
        assert low is not None, "only low-rank deltas have factors"
        for one in low.products:
            left, right = FactorRows(one.left), FactorRows(one.right.transposed())
            found.append(Pair(one.right.shape[0], left, right, one.coefficient * factor))
    return found


def _drawn(method: Method, source: Source, rows: slice, shape: tuple[int, int]) -> torch.Tensor:
    """Which elements of some rows of a weight of ``shape`` are drawn; turned, these rows are the adapter's columns."""
    name = key(method.seed, source.digest, source.name)
    if not source.turned:
        return drawn(name, rows, slice(0, shape[1]), shape[1], method.density)
    return drawn(name, slice(0, shape[1]), rows, shape[0], method.density).t()


class FactorRows:
    """Reads rows of a factor in float64."""

    def __init__(self, factor: Factor) -> None:
        self._factor = factor
        self._reader = Reader(factor.entry.file)

    def __call__(self, rows: slice) -> torch.Tensor:
        import torch

        return self._factor.read(self._reader, rows, torch.float64)

    def __del__(self) -> None:
        if hasattr(self, "_reader"):
            self._reader.close()


def read_factor(factor: Factor) -> torch.Tensor:
    """A whole factor in float64."""
    return FactorRows(factor)(slice(0, factor.shape[0]))


class _OpenDense:
    """The rule on the elements of the weight, some rows at a time."""

    def __init__(self, delta: Combined, dtype: torch.dtype, blocks: Blocks) -> None:
        self._delta = delta
        self._opened = [
            [(one.open(dtype, blocks), factor) for one, factor in source.deltas] for source in delta.sources
        ]
        self._weights = [source.weight for source in delta.sources]
        prunes = not delta.method.is_linear and not delta.method.draws and delta.method.density < 1
        self._thresholds = self._search(blocks) if prunes else None

    def add_to(self, acc: torch.Tensor, w0: torch.Tensor | None, rows: slice, factor: float) -> None:
        deltas = self.each(acc, w0, rows)
        acc.add_(combine(self._delta.method, deltas, self._weights, self._keep(deltas, rows)), alpha=factor)

    def each(self, acc: torch.Tensor, w0: torch.Tensor | None, rows: slice) -> list[torch.Tensor]:
        """The sources' deltas on some rows, of the shape, dtype and device of ``acc``."""
        import torch

        deltas = []
        for source in self._opened:
            delta = torch.zeros_like(acc)
            for one, factor in source:
                one.add_to(delta, w0, rows, factor)
            deltas.append(delta)
        return deltas

    def _keep(self, deltas: Sequence[torch.Tensor], rows: slice) -> Sequence[torch.Tensor] | None:
        method = self._delta.method
        if self._thresholds is not None:
            pairs = zip(deltas, self._thresholds, strict=True)
            return [delta.abs().float() >= threshold for delta, threshold in pairs]
        if not method.draws or method.density == 1:
            return None
        return [beside(_drawn(method, one, rows, self._delta.shape), deltas[0]) for one in self._delta.sources]

    def _search(self, blocks: Blocks) -> list[float]:
        """The smallest magnitude that is kept of each source's delta, as float32.

        Its bits are found in two passes, the upper and the lower half, each by counting.
        """
        import torch

        count = kept_count(self._delta.method, self._delta.shape[0] * self._delta.shape[1])
        if count == 0:
            return [math.inf] * len(self._opened)
        upper = [_find(counts, count) for counts in self._count(blocks, [None] * len(self._opened))]
        lower = self._count(blocks, [half for half, _ in upper])
        bits = [half << 16 | _find(counts, left)[0] for (half, left), counts in zip(upper, lower, strict=True)]
        return torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist()

    def _count(self, blocks: Blocks, uppers: Sequence[int | None]) -> list[torch.Tensor]:
        """How often each upper half of a magnitude's bits occurs, or each lower half beside a given upper one."""
        import torch

        counts = [torch.zeros(_HALVES, dtype=torch.int64) for _ in uppers]
        for rows, w0 in blocks():
            for so_far, upper, delta in zip(counts, uppers, self.each(torch.empty_like(w0), w0, rows), strict=True):
                bits = delta.float().abs().view(torch.int32).flatten()
                halves = bits >> 16 if upper is None else bits[bits >> 16 == upper] & (_HALVES - 1)
                so_far += torch.bincount(halves, minlength=_HALVES).cpu()
        return counts


def shares_kept(
    delta: Combined, blocks: Blocks, left: torch.Tensor, right: torch.Tensor
) -> tuple[list[float], list[float | None]]:
    """Each source's norm, and the share of its energy in the spans of ``left`` (rows, k) and ``right`` (k, columns)."""
    import torch

    u, v = torch.linalg.qr(left)[0], torch.linalg.qr(right.t())[0]
    opened = _OpenDense(replace(delta, method=Method()), torch.float32, blocks)
    inside = [torch.zeros(u.shape[1], v.shape[1], dtype=torch.float64) for _ in delta.sources]
    total = [0.0 for _ in delta.sources]
    for rows, w0 in blocks():
        for position, one in enumerate(opened.each(torch.empty_like(w0), w0, rows)):
            wide = one.double()
            inside[position] += u[rows].t() @ (wide @ v)
            total[position] += float(wide.square().sum())
    shares = [float(one.square().sum()) / whole if whole else None for one, whole in zip(inside, total, strict=True)]
    return [math.sqrt(whole) for whole in total], shares


def _find(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The value that is the ``rank``-th largest, given how often each occurs, and how many as large it still takes."""
    above = counts.flip(0).cumsum(0).flip(0)  # as large or larger
    value = int((above >= rank).nonzero()[-1])
    return value, rank - int(above[value] - counts[value])
