"""Which elements of a delta are drawn: a function of seed, adapter, tensor and row alone.

The generator is Philox (Salmon et al. 2011), whose n-th output is computed from a key and n, so that the draws of a row
do not depend on which rows were looked at before, by which thread, or in which blocks.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PER_STEP = 8
"""Draws of 32 bits that one step of Philox 4x64 gives."""


def drawn(key: bytes, rows: slice, columns: slice, width: int, density: float) -> torch.Tensor:
    """Which elements of some rows and columns of a matrix of ``width`` are drawn, each with this probability."""
    import numpy as np
    import torch

    steps = -(-width // _PER_STEP)
    number = int.from_bytes(key[:16], "little")
    limit = np.uint32(min(round(density * 2**32), 2**32 - 1))
    first, last = columns.start // _PER_STEP, -(-columns.stop // _PER_STEP)
    if (first, last) == (0, steps):  # one stretch of the sequence
        words = np.random.Philox(key=number, counter=rows.start * steps).random_raw(
            (rows.stop - rows.start) * steps * 4
        )
    else:
        starts = (np.random.Philox(key=number, counter=row * steps + first) for row in range(rows.start, rows.stop))
        words = np.concatenate([each.random_raw((last - first) * 4) for each in starts])
    bits = words.view(np.uint32).reshape(rows.stop - rows.start, -1)
    return torch.from_numpy(bits[:, columns.start - first * _PER_STEP :][:, : columns.stop - columns.start] < limit)


def key(seed: int, adapter: str, tensor: str) -> bytes:
    """The key of one adapter's delta for one tensor; ``adapter`` is the digest of its file."""
    return hashlib.sha256(f"{seed}\n{adapter}\n{tensor}".encode("utf-8", "surrogateescape")).digest()
