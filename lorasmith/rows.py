"""Rows of stored tensors, some at a time: what a matrix larger than the memory is walked over with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorasmith.deltas.low_rank import read_tensor
from lorasmith.dtypes import itemsize, torch_dtype
from lorasmith.safefile import Reader, TensorEntry

if TYPE_CHECKING:
    import torch

_ELEMENTS = 1 << 19
"""Elements of a block of rows."""


def spans(shape: tuple[int, int]) -> Iterator[slice]:
    """The blocks of rows in which a matrix is walked over."""
    rows, columns = shape
    height = max(1, _ELEMENTS // max(1, columns))
    for first in range(0, rows, height):
        yield slice(first, min(rows, first + height))


def walk(*entries: TensorEntry) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """The same rows of tensors of one shape, each in its dtype, one block after the other."""
    import torch

    columns = entries[0].matrix[1]
    readers = [Reader(entry.file) for entry in entries]
    try:
        for rows in spans(entries[0].matrix):
            found = []
            for entry, reader in zip(entries, readers, strict=True):
                block = torch.empty(rows.stop - rows.start, columns, dtype=torch_dtype(entry.dtype))
                read_tensor(reader, block, entry.start + rows.start * columns * itemsize(entry.dtype))
                found.append(block)
            yield rows, found
    finally:
        for reader in readers:
            reader.close()
