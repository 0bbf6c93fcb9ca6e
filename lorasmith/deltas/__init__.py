"""What one adapter does to one weight: one file per family.

A weight is seen as a matrix of the stored tensor's rows (all but the first dimension flattened). A Delta is a
plain, picklable fact (which file ranges, which scale) and stands for ``ΔW = W'(W0) − W0``: deltas of one weight
can be summed in any order and each can be weighted, whatever it is. Opened, it adds rows of itself to a block:

    opened = delta.open(torch.float32, blocks)
    opened.add_to(acc, w0, rows, factor)        acc[:] += factor · ΔW[rows]

A layer that a model fuses may be stored in pieces, and the other way round: ``part`` gives a delta on some rows and
columns of its weight, ``patchwork`` puts deltas on parts of a larger one. For a product these are rows and columns of
its factors.

Additive low-rank deltas of one weight become one product (``low_rank.stack``). A delta that reads the base says
so (``needs_base``); one whose rows depend on each other asks for blocks of a multiple of ``alignment`` rows, and
one that must see the whole weight first (column norms) reads it, block by block, when it is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from lorasmith.deltas.axis import Axis
    from lorasmith.deltas.low_rank import LowRank
    from lorasmith.safefile import TensorEntry

    Blocks = Callable[..., Iterator[tuple[slice, torch.Tensor]]]


class OpenDelta(Protocol):
    """A delta with its factors at hand."""

    def add_to(self, acc: torch.Tensor, w0: torch.Tensor | None, rows: slice, factor: float) -> None:
        """Add ``factor · ΔW[rows]`` to ``acc`` (float32 or float64, shape (rows, columns)).

        ``w0`` holds the base's rows in the dtype of ``acc``; it is None unless the delta needs the base. Both may be
        on a GPU; what was read is not, and is brought there (``low_rank.beside``).
        """


class Delta(Protocol):
    """One adapter's effect on one weight of ``shape`` (rows, columns)."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def rank(self) -> int:
        """Rank of the low-rank part; 0 where there is none."""

    @property
    def scale(self) -> float:
        """What the product of the factors, or what is added, is multiplied with; 1 where there is neither."""

    @property
    def kind(self) -> str:
        """What users call it: LoRA, DoRA, addition, replacement."""

    @property
    def alignment(self) -> int: ...

    @property
    def needs_base(self) -> bool: ...

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The adapter's tensors it is made of."""

    def transposed(self) -> Delta:
        """The same effect on a weight that is stored the other way round."""

    def part(self, rows: Axis | None = None, columns: Axis | None = None) -> Delta:
        """The effect on some rows and columns of the weight, in that order; all of them where None.

        NotImplementedError where the rest of the weight bears on it.
        """

    def low_rank(self) -> LowRank | None:
        """The delta as exact factors, or None where it is not a product."""

    def memory(self, block_rows: int) -> int:
        """Bytes that ``open`` and adding blocks of that many rows take."""

    def open(self, dtype: torch.dtype, blocks: Blocks) -> OpenDelta:
        """Read what every row needs, in the dtype of the sum.

        ``blocks()`` walks over the base's rows, ``blocks(start, stop)`` over those from ``start`` to ``stop`` and
        what else is in their blocks.
        """
