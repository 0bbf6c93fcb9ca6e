"""DoRA: a low-rank update of the direction, with a trained length per output.

Liu et al. 2024, arXiv:2402.09353, equation 5, as PEFT stores it (``DoraLinearLayer``): one magnitude per output,
``W' = m / ‖W0 + s·B·A‖ · (W0 + s·B·A)``, the norm running over the inputs. A weight stored as (out, in) has its
norms within rows, and so has a convolution's, seen as (out, in·k); stored as (in, out), as GPT-2's Conv1D is, the
norms of its columns take a pass of their own. So they do in an embedding, whose outputs are its columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from lorasmith.deltas.axis import Axis, span
from lorasmith.deltas.low_rank import Factor, LowRank, beside
from lorasmith.safefile import Reader, TensorEntry

if TYPE_CHECKING:
    import torch

    from lorasmith.deltas import Blocks, OpenDelta


@dataclass(frozen=True)
class Dora:
    """The direction's update and the magnitudes, one per row (``by_column``: one per column).

    ``outputs`` are those of the stored magnitudes that are meant, in their order, where it is not all of them.
    """

    direction: LowRank
    magnitude: TensorEntry
    by_column: bool = False
    outputs: Axis | None = None

    kind = "DoRA"
    alignment = 1
    needs_base = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.direction.shape

    @property
    def rank(self) -> int:
        return self.direction.rank

    @property
    def scale(self) -> float:
        return self.direction.scale

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return (*self.direction.entries, self.magnitude)

    def transposed(self) -> Dora:
        return replace(self, direction=self.direction.transposed(), by_column=not self.by_column)

    def part(self, rows: Axis | None = None, columns: Axis | None = None) -> Dora:
        """Some outputs, whole: a norm runs over all inputs. NotImplementedError for some of the inputs."""
        wanted, inputs = (columns, rows) if self.by_column else (rows, columns)
        height, width = self.shape[::-1] if self.by_column else self.shape
        if inputs is not None and not inputs.is_whole(width):
            raise NotImplementedError("DoRA on some of a weight's inputs")
        if wanted is None:
            return self
        outputs = (self.outputs or span(0, height)).of(wanted)
        return replace(self, direction=self.direction.part(rows, columns), outputs=outputs)

    def low_rank(self) -> None:
        return None

    def memory(self, block_rows: int) -> int:
        rows, columns = self.shape
        return self.direction.memory(block_rows) + 4 * (2 * min(block_rows, rows) * columns + 8 * max(rows, columns))

    def open(self, dtype: torch.dtype, blocks: Blocks) -> OpenDelta:
        return _OpenDora(self, dtype, blocks)


class _OpenDora:
    def __init__(self, delta: Dora, dtype: torch.dtype, blocks: Blocks) -> None:
        self._direction = delta.direction.open(dtype, blocks)
        reader = Reader(delta.magnitude.file)
        try:
            outputs = delta.shape[1] if delta.by_column else delta.shape[0]
            shape = (prod(delta.magnitude.shape),)  # PEFT has (1, out, 1, 1) for a convolution
            magnitude = Factor(replace(delta.magnitude, shape=shape), rows=delta.outputs)
            self._magnitude = magnitude.read(reader, slice(0, outputs), dtype)
        finally:
            reader.close()
        self._ratios = self._column_ratios(blocks) if delta.by_column else None

    def _column_ratios(self, blocks: Blocks) -> torch.Tensor:
        import torch

        squares = torch.zeros(len(self._magnitude), dtype=torch.float64)
        for rows, w0 in blocks():
            squares += self._adapted(w0, rows).square_().sum(dim=0).cpu()
        return self._magnitude.t() / squares.sqrt().to(self._magnitude.dtype)

    def _adapted(self, w0: torch.Tensor, rows: slice) -> torch.Tensor:
        adapted = w0.clone()
        self._direction.add_to(adapted, None, rows, 1.0)
        return adapted

    def add_to(self, acc: torch.Tensor, w0: torch.Tensor | None, rows: slice, factor: float) -> None:
        assert w0 is not None
        adapted = self._adapted(w0, rows)
        ratios = self._ratios
        if ratios is None:
            ratios = beside(self._magnitude[rows], acc) / adapted.norm(dim=1, keepdim=True)
        acc.add_(adapted.mul_(beside(ratios, acc)).sub_(w0), alpha=factor)
