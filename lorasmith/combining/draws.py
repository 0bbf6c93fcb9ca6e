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


def drawn(key: bytes, rows: slice, columns: int, density: float) -> torch.Tensor:
    """A boolean mask of shape (rows, columns), each element True with probability ``density``."""
    import numpy as np
    import torch

    steps = -(-columns // _PER_STEP)
    generator = np.random.Philox(key=int.from_bytes(key[:16], "little"), counter=rows.start * steps)
    height = rows.stop - rows.start
    bits = generator.random_raw(height * steps * 4).view(np.uint32).reshape(height, -1)[:, :columns]
    return torch.from_numpy(bits < np.uint32(min(round(density * 2**32), 2**32 - 1)))


def key(seed: int, adapter: str, tensor: str) -> bytes:
    """The key of one adapter's delta for one tensor; ``adapter`` is the digest of its file."""
    return hashlib.sha256(f"{seed}\n{adapter}\n{tensor}".encode("utf-8", "surrogateescape")).digest()
