"""One computing thread's work: its reused buffers and the arithmetic, W0 + Σ factor·ΔW, rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasmith.deltas import OpenDelta
from lorasmith.deltas.low_rank import LowRank, read_tensor, stack
from lorasmith.dtypes import itemsize, torch_dtype
from lorasmith.execution.blocks import Task, block_rows, blocks, grid
from lorasmith.records import Convert, Merge, Term
from lorasmith.rounding import SAMPLE_EVERY, SAMPLED_ROWS, Sample, measure, round_into
from lorasmith.safefile import PAGE, AlignedBuffer, Reader

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Filled:
    """A panel with finished rows: ``nbytes`` from ``start`` on belong at ``offset`` of the task's file."""

    task: Task
    panel: AlignedBuffer
    start: int
    nbytes: int
    offset: int
    samples: tuple[Sample, ...] = ()


class Scratch:
    """Memory that is used again and again: fresh pages would cost more than the arithmetic."""

    def __init__(self, device: str = "cpu", *, pinned: bool = False) -> None:
        self._device = device
        self._pinned = pinned
        self._memory: dict[str, torch.Tensor] = {}

    def take(self, use: str, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
        """A matrix in the memory for this use, with whatever it held before."""
        import torch

        nbytes = rows * columns * dtype.itemsize
        memory = self._memory.get(use)
        if memory is None or len(memory) < nbytes:
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device, pin_memory=self._pinned)
            self._memory[use] = memory
        return memory[:nbytes].view(dtype).view(rows, columns)


class Worker:
    """Computes tasks one after the other; every computing thread has its own."""

    def __init__(self, readers: Mapping[str, Reader], *, allow_overflow: bool) -> None:
        self._readers = readers
        self._allow_overflow = allow_overflow
        self._device = "cpu"
        self._host = self._scratch = Scratch()
        self._opened_step: Merge | None = None
        self._opened: list[tuple[OpenDelta, float]] = []
        self._samples: list[Sample] = []

    def fill(self, task: Task, panel: AlignedBuffer) -> Filled:
        """Compute the task's rows into the panel, placed as direct writes need them."""
        step = task.step
        assert isinstance(step, Convert)
        columns, size = grid(step)[1], itemsize(step.dtype)
        offset, nbytes = step.offset + task.start * columns * size, (task.stop - task.start) * columns * size
        place = offset % PAGE if offset % size == 0 else 0
        out = _panel_tensor(panel, step.dtype, place, task.stop - task.start, columns)
        self._samples = []
        if isinstance(step, Merge):
            self._open(step)  # before a block is read: what walks over the whole weight uses the same memory
        for rows in blocks(step, task.start, task.stop):
            self._block(step, rows, out[rows.start - task.start : rows.stop - task.start])
        self._settle()
        return Filled(task, panel, place, nbytes, offset, tuple(self._samples))

    def _block(self, step: Convert, rows: slice, out: torch.Tensor) -> None:
        stored = self._read_rows(step, rows)
        acc = self._sum(step, stored, rows)
        round_into(out, acc, stored, step.name, step.dtype, saturate=self._allow_overflow)
        if is_sampled(step, rows):
            self._note(step, rows, out, self._measure(step, rows, out, stored).tolist())

    def _settle(self) -> None:
        """Wait for blocks that are still under way; here there are none."""

    def _sum(self, step: Convert, stored: torch.Tensor, rows: slice, use: str = "acc") -> torch.Tensor:
        """The base's rows with every term added to them, in memory that is used again."""
        acc = self._scratch.take(use, self._sum_dtype(step), *stored.shape).copy_(stored)
        if isinstance(step, Merge):
            self._add(step, acc, acc, rows)
        return acc

    def _add(self, step: Merge, acc: torch.Tensor, base: torch.Tensor, rows: slice) -> None:
        """Add every term to ``acc`` and apply the gain; ``base`` holds the base's rows (it may be ``acc`` itself)."""
        needed = any(term.delta.needs_base for term in step.terms)
        w0 = self._scratch.take("w0", acc.dtype, *base.shape).copy_(base) if needed else None
        for opened, factor in self._opened:
            opened.add_to(acc, w0, rows, factor)
        if step.gain != 1:
            acc.mul_(step.gain)

    def _measure(self, step: Convert, rows: slice, out: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """The sums of a sample of a block, given the block's result and the base's rows."""
        import torch

        assert isinstance(step, Merge)
        few = slice(rows.start, min(rows.stop, rows.start + SAMPLED_ROWS))
        height = few.stop - few.start
        base = stored[:height].to(self._sum_dtype(step))
        delta = torch.zeros_like(base)
        self._add(step, delta, base, few)
        return measure(out[:height], base.mul_(step.gain), delta)

    def _note(self, step: Convert, rows: slice, out: torch.Tensor, sums: list[float]) -> None:
        projection, delta, base = sums
        number, elements = rows.start // block_rows(step), out[:SAMPLED_ROWS].numel()
        self._samples.append(Sample(step.name, number, projection, delta, base, elements))

    def _open(self, step: Merge) -> None:
        """Open the step's deltas and keep them until another step comes."""
        if self._opened_step is step:
            return
        self._opened_step, self._opened = None, []
        dtype = self._sum_dtype(step)

        def base(start: int = 0, stop: int | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
            first = start - start % block_rows(step)
            use = "walked" if self._opened_step is step else "stored"  # which holds a block once these are computed
            for rows in blocks(step, first, grid(step)[0] if stop is None else stop):
                yield rows, self._read_rows(step, rows, use).to(self._device, dtype)

        self._opened = [(term.delta.open(dtype, base), term.factor) for term in _stacked(step.terms)]
        self._opened_step = step

    def _read_rows(self, step: Convert, rows: slice, use: str = "stored") -> torch.Tensor:
        entry, columns = step.entry, grid(step)[1]
        stored = self._host.take(use, torch_dtype(entry.dtype), rows.stop - rows.start, columns)
        read_tensor(self._readers[entry.file], stored, entry.start + rows.start * columns * itemsize(entry.dtype))
        return stored

    def _sum_dtype(self, step: Convert) -> torch.dtype:
        return torch_dtype("F64" if step.entry.dtype == "F64" else "F32")


def is_sampled(step: Convert, rows: slice) -> bool:
    """Whether a block's survival is measured."""
    return isinstance(step, Merge) and bool(step.terms) and rows.start // block_rows(step) % SAMPLE_EVERY == 0


def _panel_tensor(panel: AlignedBuffer, dtype: str, start: int, rows: int, columns: int) -> torch.Tensor:
    import torch

    flat = torch.frombuffer(panel.memory, dtype=torch_dtype(dtype), offset=start, count=rows * columns)
    return flat.view(rows, columns)


def _stacked(terms: tuple[Term, ...]) -> list[Term]:
    """All low-rank terms as one, the others as they are."""
    low: list[tuple[LowRank, float]] = []
    rest: list[Term] = []
    for term in terms:
        factors = term.delta.low_rank()
        if factors is None:
            rest.append(term)
        else:
            low.append((factors, term.factor))
    return ([Term(stack(low), 1.0, -1)] if low else []) + rest
