"""How tensors are cut up: blocks that are computed at once, panels that are read and written at once.

A *block* is some rows of one tensor and depends on nothing but the tensor: the last bit of a float32 product may
depend on the height of the block it was computed in, so the same block grid is what makes results the same for every
number of threads and every memory budget. A *panel* is as many blocks as the memory allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from lorasmith.dtypes import itemsize
from lorasmith.errors import BudgetTooSmall
from lorasmith.records import Convert, Copy, Merge, Plan, Step, Write
from lorasmith.rounding import SAMPLED_ROWS
from lorasmith.safefile import PAGE

BLOCK_ELEMENTS = 1 << 19
"""Elements of a block: 2 MiB of float32, which stays in a core's second-level cache."""

PANELS = tuple(1 << exponent for exponent in range(23, 15, -1))
"""Panel sizes tried, largest first, in bytes. Beyond 8 MiB nothing is gained."""

IN_FLIGHT = 2
"""Blocks a feeding thread has under way on a device."""

WRITERS = 2
"""Threads that write; the disk is slower with one, and no faster with more."""


@dataclass(frozen=True)
class Task:
    """Part of a step: bytes ``start`` to ``stop`` of a Copy, else rows of its matrix."""

    output: int
    step: Step
    start: int
    stop: int


@dataclass(frozen=True)
class Budget:
    """``threads`` that compute (or feed a GPU), ``panels`` of ``panel`` bytes that go round; ``nbytes`` in all."""

    threads: int
    panels: int
    panel: int
    nbytes: int


def grid(step: Convert) -> tuple[int, int]:
    """Rows and columns in which a step is computed; a mere conversion has no rows of its own."""
    return step.entry.matrix if isinstance(step, Merge) else (prod(step.entry.shape), 1)


def block_rows(step: Convert) -> int:
    """Rows of a block: whole rows, a multiple of 16 where possible and of what the deltas ask for."""
    rows, columns = grid(step)
    height = max(1, BLOCK_ELEMENTS // max(1, columns))
    if height > 16:
        height -= height % 16
    for term in step.terms if isinstance(step, Merge) else ():
        height = -(-height // term.delta.alignment) * term.delta.alignment
    return min(height, max(1, rows))


def blocks(step: Convert, start: int, stop: int) -> Iterator[slice]:
    """The blocks of rows ``start`` to ``stop``; ``start`` must be on the grid."""
    height = block_rows(step)
    for first in range(start, stop, height):
        yield slice(first, min(first + height, stop))


def tasks(plan: Plan, output: int, panel: int) -> Iterator[Task]:
    """Cut one output file into tasks, each of which fits a panel."""
    for step in plan.outputs[output].steps:
        if isinstance(step, Write):
            yield Task(output, step, 0, step.nbytes)
        elif isinstance(step, Copy):
            position = 0
            while position < step.nbytes:
                stop = min(step.nbytes, position + panel - (step.offset + position) % PAGE)
                yield Task(output, step, position, stop)
                position = stop
        else:
            rows, columns = grid(step)
            height = block_rows(step)
            height *= max(1, panel // (height * columns * itemsize(step.dtype)))
            for first in range(0, rows, height):
                yield Task(output, step, first, min(first + height, rows))


def fit(plan: Plan, memory: int, threads: int) -> Budget:
    """The most threads, then the largest panels, that stay within ``memory`` bytes.

    Raises BudgetTooSmall with the smallest budget that works.
    """
    steps = [step for output in plan.outputs for step in output.steps if isinstance(step, Convert)]
    one_thread = _block_bytes if plan.device == "cpu" else _feeding_bytes
    each = max((one_thread(step) for step in steps), default=0)
    smallest = max((block_rows(step) * grid(step)[1] * itemsize(step.dtype) for step in steps), default=0)
    sizes = list(dict.fromkeys(max(size, smallest) for size in PANELS))
    shapes = [(count, count + WRITERS, size) for count in range(threads, 0, -1) for size in sizes]
    shapes.append((1, 1, sizes[-1]))
    for count, panels, size in shapes:
        needed = count * each + panels * (size + PAGE)
        if needed <= memory:
            return Budget(count, panels, size, needed)
    raise BudgetTooSmall(
        f"a memory budget of {memory:,} bytes is too small for this merge; the smallest that works is "
        f"{needed:,} bytes (--memory {-(-needed // (1 << 20))}MiB)"
    )


def _block_bytes(step: Convert) -> int:
    """Bytes one thread needs for a step, its panel apart."""
    height = block_rows(step)
    elements = height * grid(step)[1]
    wide = 8 if step.entry.dtype == "F64" else 4
    total = elements * (itemsize(step.entry.dtype) + wide)
    if isinstance(step, Merge):
        total += sum(term.delta.memory(height) for term in step.terms) * wide // 4
        if any(term.delta.needs_base for term in step.terms):
            total += elements * wide
        total += 3 * min(height, SAMPLED_ROWS) * grid(step)[1] * wide  # base, delta and change of a sample
    return total


def _feeding_bytes(step: Convert) -> int:
    """Bytes of the computer's memory that one thread needs to feed a device with a step, its panel apart.

    torch rounds pinned memory up to powers of two and keeps what has become too small; factors go through it as well.
    """
    height = block_rows(step)
    elements = height * grid(step)[1]
    read, result = (2 << (elements * itemsize(code) - 1).bit_length() for code in (step.entry.dtype, step.dtype))
    deltas = sum(term.delta.memory(height) for term in step.terms) if isinstance(step, Merge) else 0
    return IN_FLIGHT * (read + result) + read + 2 * deltas * (2 if step.entry.dtype == "F64" else 1)
