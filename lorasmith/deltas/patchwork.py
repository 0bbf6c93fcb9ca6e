"""Deltas on parts of one weight: q, k and v of a fused layer, the experts of a stacked one.

A patch is a delta and the rows and columns of the weight that it is about; both rise, so that the patch's share of a
block of rows is a range of its own rows. Patches are opened when a block reaches them and let go when it has passed:
of a stack of experts, only those at hand take memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lorasmith.deltas.axis import Axis, span
from lorasmith.deltas.dora import Dora
from lorasmith.deltas.replacement import Replacement

if TYPE_CHECKING:
    import torch

    from lorasmith.deltas import Blocks, Delta, OpenDelta
    from lorasmith.safefile import TensorEntry


@dataclass(frozen=True)
class Patch:
    """A delta of as many rows and columns as it is placed on, and what it is multiplied with."""

    delta: Delta
    rows: Axis
    columns: Axis
    factor: float = 1.0

    @property
    def reach(self) -> tuple[int, int]:
        """The first of its rows, and the one beyond the last."""
        return self.rows[0], self.rows[len(self.rows) - 1] + 1

    def transposed(self) -> Patch:
        turned = self.delta.turned() if isinstance(self.delta, Replacement) else self.delta.transposed()
        return Patch(turned, self.columns, self.rows, self.factor)


@dataclass(frozen=True)
class Patchwork:
    """Patches of a weight of ``shape``, which is left as it is elsewhere."""

    patches: tuple[Patch, ...]
    shape: tuple[int, int]

    @property
    def kind(self) -> str:
        return self.patches[0].delta.kind

    @property
    def rank(self) -> int:
        return max(one.delta.rank for one in self.patches)

    @property
    def scale(self) -> float:
        return self.patches[0].delta.scale

    @property
    def alignment(self) -> int:
        return 1

    @property
    def needs_base(self) -> bool:
        return any(one.delta.needs_base for one in self.patches)

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return tuple(dict.fromkeys(entry for one in self.patches for entry in one.delta.entries))

    def transposed(self) -> Patchwork:
        return Patchwork(tuple(one.transposed() for one in self.patches), (self.shape[1], self.shape[0]))

    def part(self, rows: Axis | None = None, columns: Axis | None = None) -> Patchwork:
        """The whole; a patchwork is never cut up again."""
        for axis, length in zip((rows, columns), self.shape, strict=True):
            if axis is not None and not axis.is_whole(length):
                raise NotImplementedError("a part of a patchwork")
        return self

    def low_rank(self) -> None:
        return None

    def memory(self, block_rows: int) -> int:
        largest, walked = 0, 8 * min(block_rows, self.shape[0]) * self.shape[1]
        for count, some in self._at_once(block_rows):
            height = min(block_rows, len(some.rows))
            copies = 2 if some.delta.needs_base else 1
            gathered = 0 if _is_view(some) else 4 * copies * height * len(some.columns) + 16 * len(some.rows)
            gathered += walked if isinstance(some.delta, Dora) and some.delta.by_column else 0
            largest = max(largest, count * (some.delta.memory(height) + gathered))
        return largest

    def _at_once(self, block_rows: int) -> Iterator[tuple[int, Patch]]:
        """For every patch, how many a block of rows reaches from where it begins."""
        reaches, last = self.reaches, 0
        for place, (patch, (first, _)) in enumerate(zip(self.patches, reaches, strict=True)):
            last = max(last, place)
            while last + 1 < len(reaches) and reaches[last + 1][0] < first + block_rows:
                last += 1
            open_before = next((at for at in range(max(0, place - 8), place) if reaches[at][1] > first), place)
            yield last - open_before + 1 + (1 if open_before else 0), patch

    def open(self, dtype: torch.dtype, blocks: Blocks) -> OpenDelta:
        return _OpenPatchwork(self, dtype, blocks)

    @cached_property
    def reaches(self) -> tuple[tuple[int, int], ...]:
        """The first row of every patch, and the one beyond its last."""
        return tuple(one.reach for one in self.patches)


def join(works: Sequence[Patchwork]) -> Patchwork:
    """Several patchworks of one weight as one, whose patches come in the order of their first rows."""
    patches = [patch for work in works for patch in work.patches]
    patches.sort(key=lambda patch: (patch.rows[0], patch.columns[0]))
    return Patchwork(tuple(patches), works[0].shape)


def clash(work: Patchwork) -> tuple[Patch, Patch] | None:
    """Two patches that are about the same elements, if there are any; patches must be in the order of their rows."""
    recent: list[Patch] = []
    for patch in work.patches:
        first = patch.reach[0]
        recent = [one for one in recent if one.reach[1] > first]
        for one in recent:
            if _meet(one.rows, patch.rows) and _meet(one.columns, patch.columns):
                return one, patch
        recent.append(patch)
    return None


def _meet(one: Axis, other: Axis) -> bool:
    if one == other:
        return True
    mine, theirs = one.plain, other.plain
    if mine is not None and theirs is not None and mine.step == theirs.step == 1:
        return mine.start < theirs.stop and theirs.start < mine.stop
    return not set(one.part(slice(0, len(one)))).isdisjoint(other.part(slice(0, len(other))))


def _is_view(patch: Patch) -> bool:
    """Whether a block's share of a patch is a rectangle of it."""
    return all(axis.plain is not None and axis.plain.step == 1 for axis in (patch.rows, patch.columns))


class _OpenPatchwork:
    def __init__(self, delta: Patchwork, dtype: torch.dtype, blocks: Blocks) -> None:
        self._delta, self._dtype, self._blocks = delta, dtype, blocks
        self._opened: dict[int, OpenDelta] = {}

    def add_to(self, acc: torch.Tensor, w0: torch.Tensor | None, rows: slice, factor: float) -> None:
        here = list(self._reached(rows))
        self._opened = {place: one for place, one in self._opened.items() if place in here}
        for place in here:
            patch = self._delta.patches[place]
            own = patch.rows.within(rows.start, rows.stop)
            if own.start == own.stop:
                continue
            opened = self._opened.get(place) or self._open(place)
            base = w0 if patch.delta.needs_base else None
            if _is_view(patch):
                box = _box(patch, own, rows.start)
                opened.add_to(acc[box], base if base is None else base[box], own, factor * patch.factor)
            else:
                _add_gathered(patch, own, rows.start, opened, acc, base, factor)

    def _reached(self, rows: slice) -> Iterator[int]:
        """The patches with rows in a block; they come in the order of their first rows."""
        for place, (first, stop) in enumerate(self._delta.reaches):
            if stop > rows.start and first < rows.stop:
                yield place

    def _open(self, place: int) -> OpenDelta:
        patch = self._delta.patches[place]

        def own() -> Iterator[tuple[slice, torch.Tensor]]:
            """The blocks of the base, cut to the patch."""
            for rows, w0 in self._blocks(*patch.reach):
                mine = patch.rows.within(rows.start, rows.stop)
                if mine.start < mine.stop:
                    yield mine, _gathered(patch, mine, rows.start, w0)

        opened = patch.delta.open(self._dtype, own)
        self._opened[place] = opened
        return opened


def _box(patch: Patch, own: slice, first: int) -> tuple[slice, slice]:
    rows, columns = patch.rows.part(own), patch.columns.plain
    assert isinstance(rows, range)
    assert columns is not None
    return slice(rows.start - first, rows.stop - first), slice(columns.start, columns.stop)


def _index(axis: Axis, which: slice, first: int, device: torch.device) -> torch.Tensor:
    import torch

    return torch.from_numpy(axis.positions(which) - first).to(device)


def _gathered(patch: Patch, own: slice, first: int, block: torch.Tensor) -> torch.Tensor:
    if _is_view(patch):
        return block[_box(patch, own, first)]
    rows = _index(patch.rows, own, first, block.device)
    columns = _index(patch.columns, slice(0, len(patch.columns)), 0, block.device)
    return block[rows[:, None], columns]


def _add_gathered(
    patch: Patch,
    own: slice,
    first: int,
    opened: OpenDelta,
    acc: torch.Tensor,
    w0: torch.Tensor | None,
    factor: float,
) -> None:
    """Add a patch whose elements lie apart: they are taken out, added to and put back."""
    rows = _index(patch.rows, own, first, acc.device)
    columns = _index(patch.columns, slice(0, len(patch.columns)), 0, acc.device)
    mine = acc[rows[:, None], columns]
    opened.add_to(mine, None if w0 is None else w0[rows[:, None], columns], own, factor * patch.factor)
    acc[rows[:, None], columns] = mine


def patch_over(delta: Delta, shape: tuple[int, int], rows: Axis | None, columns: Axis | None) -> Delta:
    """A delta placed on rows and columns of a weight of ``shape``; itself where it covers all of it."""
    rows, columns = rows or span(0, shape[0]), columns or span(0, shape[1])
    if rows.is_whole(shape[0]) and columns.is_whole(shape[1]):
        return delta
    return Patchwork((Patch(delta, rows, columns),), shape)
