"""BD-LoRA: which factors of an adapter are block-diagonal, as its LoraConfig says.

Of a block-diagonal factor PEFT stores the blocks, one below the other (``BlockDiagonalLinear``): for n blocks, A as
(rank, in/n) or B as (out, rank/n).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorasmith.errors import AdapterMismatch, BadFile


@dataclass(frozen=True)
class BlockDiagonal:
    """``count`` blocks in the A of modules whose path has a part of ``in_a`` in it, in the B of those of ``in_b``."""

    where: str
    count: int = 1
    in_a: tuple[str, ...] = ()
    in_b: tuple[str, ...] = ()
    strict: bool = False

    def of(self, module: str) -> tuple[int, int]:
        """The number of blocks in a module's A and in its B (PEFT, ``BdLoraLinearVariant.init``)."""
        a, b = (any(part in module for part in parts) for parts in (self.in_a, self.in_b))
        if (a and b) or (self.strict and not a and not b):
            raise AdapterMismatch(
                f"{self.where}: use_bdlora names {'both factors' if a else 'no factor'} of module {module!r} as "
                "block-diagonal, and PEFT takes exactly one; the config belongs to another adapter"
            )
        return (self.count if a else 1), (self.count if b else 1)


def read_block_diagonal(where: str, config: Mapping[str, Any]) -> BlockDiagonal:
    """What a LoraConfig's ``use_bdlora`` says; without it, no factor has blocks."""
    said = config.get("use_bdlora")
    if not said:
        return BlockDiagonal(where)
    count = said.get("nblocks", 1) if isinstance(said, dict) else None
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise BadFile(f"{where}: use_bdlora = {said!r:.80} must say in nblocks how many blocks there are")
    in_a, in_b = (said.get(key) or [] for key in ("target_modules_bd_a", "target_modules_bd_b"))
    for names in (in_a, in_b):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadFile(f"{where}: use_bdlora = {said!r:.80} must list parts of module names")
    return BlockDiagonal(where, count, tuple(in_a), tuple(in_b), bool(said.get("match_strict", True)))
