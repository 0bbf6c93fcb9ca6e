"""A safetensors file whose tensors are written one after the other, before it is known how large they will be.

Its header is written last, into room that was left for the largest it can become, and padded with spaces, as the format
allows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lorasmith.safefile import Reader, TensorEntry, build_header

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64
"""Tensor data begins at a multiple of so many bytes."""

_BLOCK = 4 << 20


class GrowingFile:
    """Appends tensors to a new file at ``path``.

    ``most`` lists all tensors that may come (name, format code, shape, bytes) at their largest, and ``metadata`` is the
    longest the header will have.
    """

    def __init__(
        self, path: str, most: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]
    ) -> None:
        longest = len(build_header(most, metadata))
        self._start = -(-longest // ALIGNMENT) * ALIGNMENT
        self._tensors: list[tuple[str, str, tuple[int, ...], int]] = []
        self._file = open(path, "xb")  # noqa: SIM115 - closed by finish or close
        self._file.seek(self._start)

    def begin(self, name: str, code: str, shape: Sequence[int], nbytes: int) -> None:
        """Say which tensor the bytes that follow are of."""
        self._tensors.append((name, code, tuple(shape), nbytes))

    def write(self, data: memoryview | bytes) -> None:
        """Append bytes of the tensor that was begun last."""
        self._file.write(data)

    def add(self, name: str, code: str, tensor: torch.Tensor) -> None:
        """Append a whole tensor, on the CPU and of the dtype that ``code`` is for."""
        import torch

        self.begin(name, code, tuple(tensor.shape), tensor.nbytes)
        self.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def copy(self, name: str, entry: TensorEntry) -> None:
        """Append a tensor as it is stored elsewhere."""
        self.begin(name, entry.dtype, entry.shape, entry.nbytes)
        reader, buffer = Reader(entry.file), memoryview(bytearray(min(_BLOCK, entry.nbytes)))
        try:
            for start in range(0, entry.nbytes, _BLOCK):
                block = buffer[: min(_BLOCK, entry.nbytes - start)]
                reader.into(block, entry.start + start)
                self.write(block)
        finally:
            reader.close()

    def finish(self, metadata: Mapping[str, str]) -> int:
        """Write the header, and return once the file is on the disk; its size in bytes."""
        header = build_header(self._tensors, metadata)
        padding = self._start - len(header)
        length = (len(header) - 8 + padding).to_bytes(8, "little")
        assert padding >= 0, "the header has become longer than was foreseen"
        size = self._file.tell()
        self._file.seek(0)
        self._file.write(length + header[8:] + b" " * padding)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return size

    def close(self) -> None:
        """Close the file; once is enough."""
        self._file.close()
