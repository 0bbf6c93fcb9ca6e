"""Single rows of a weight trained whole: the tokens of PEFT's ``trainable_token_indices``.

What PEFT calls ``trainable_tokens_delta`` are new rows, not differences (``TrainableTokensLayer.update_layer``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasmith.deltas.axis import Axis
from lorasmith.deltas.low_rank import Factor, beside
from lorasmith.safefile import Reader, TensorEntry

if TYPE_CHECKING:
    import torch

    from lorasmith.deltas import Blocks, OpenDelta


@dataclass(frozen=True)
class TokenRows:
    """Row ``i`` of ``new`` takes the place of row ``tokens[i]`` of a weight of ``shape``; of none where that is −1."""

    new: TensorEntry
    tokens: tuple[int, ...]
    shape: tuple[int, int]

    kind = "token rows"
    alignment = 1
    needs_base = True
    rank = 0
    scale = 1.0

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return (self.new,)

    def transposed(self) -> TokenRows:
        """Token rows are stored the way the base stores its rows."""
        return self

    def part(self, rows: Axis | None = None, columns: Axis | None = None) -> TokenRows:
        """Some of the rows; a token without its row there changes nothing."""
        if columns is not None and not columns.is_whole(self.shape[1]):
            raise NotImplementedError("token rows on some of a weight's columns")
        if rows is None:
            return self
        places = {row: place for place, row in enumerate(rows.part(slice(0, len(rows))))}
        tokens = tuple(places.get(token, -1) for token in self.tokens)
        return TokenRows(self.new, tokens, (len(rows), self.shape[1]))

    def low_rank(self) -> None:
        return None

    def memory(self, block_rows: int) -> int:
        return self.new.nbytes + 8 * len(self.tokens) * self.shape[1]

    def open(self, dtype: torch.dtype, blocks: Blocks) -> OpenDelta:
        return _OpenTokenRows(self, dtype)


class _OpenTokenRows:
    def __init__(self, delta: TokenRows, dtype: torch.dtype) -> None:
        reader = Reader(delta.new.file)
        try:
            new = Factor(delta.new).read(reader, slice(0, len(delta.tokens)), dtype)
        finally:
            reader.close()
        self._rows = dict(zip(delta.tokens, new, strict=True))

    def add_to(self, acc: torch.Tensor, w0: torch.Tensor | None, rows: slice, factor: float) -> None:
        assert w0 is not None
        for token, new in self._rows.items():
            if rows.start <= token < rows.stop:
                replace_rows(acc[token - rows.start], w0[token - rows.start], beside(new, acc), factor)


def replace_rows(acc: torch.Tensor, w0: torch.Tensor, new: torch.Tensor, factor: float) -> None:
    """``acc += factor · (new − w0)``, which leaves exactly ``new`` where ``acc`` was ``w0`` and the factor is 1."""
    if factor == 1:
        acc.sub_(w0).add_(new)
    else:
        acc.add_(new - w0, alpha=factor)
