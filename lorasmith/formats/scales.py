"""What a LoraConfig multiplies each module's product with: alpha over rank, by module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lorasmith.errors import AdapterMismatch, BadFile, listed
from lorasmith.formats.patterns import Pattern, compile_pattern


class Scales:
    """What each module's product is multiplied with.

    The rule is PEFT's (``LoraModel._create_and_replace``, ``get_pattern_key``): the first pattern, in the config's
    order, that matches the end of the module's path at a dot decides. PEFT sorts patterns when it saves them, so where
    several match, the order that was trained with may be another: a rank is then the tensors', and an alpha is the one
    that PEFT takes on loading, with a warning in ``unsure``.
    """

    def __init__(self, where: str, config: Mapping[str, Any], *, known: bool) -> None:
        self._where = where
        self._known = known
        self._r = self._number(config, "r", 8)
        self._alpha = self._number(config, "lora_alpha", 8)
        self._rslora = bool(config.get("use_rslora"))
        self._ranks = self._pattern(config, "rank_pattern")
        self._alphas = self._pattern(config, "alpha_pattern")
        self.assumed = False
        self._unsure: dict[str, None] = {}

    @property
    def unsure(self) -> tuple[str, ...]:
        return tuple(self._unsure)

    def of(self, module: str, rank: int, alpha: float | None) -> float:
        """alpha/rank, or alpha/√rank; an ``.alpha`` tensor must agree with the config."""
        if not self._known:
            self.assumed |= alpha is None
            return 1.0 if alpha is None else alpha / rank
        ranks = self._lookup(self._ranks, module) or {"": self._r}
        if rank not in ranks.values():
            raise AdapterMismatch(
                f"{self._where}: module {module!r} has rank {rank}, but the config says "
                f"r = {next(iter(ranks.values())):g}; the config belongs to another adapter, or rank_pattern was lost"
            )
        alphas = self._lookup(self._alphas, module) or {"": self._alpha}
        ours = next(iter(alphas.values()))
        if len(set(alphas.values())) > 1 and alpha is None:
            self._doubt(alphas)
        if alpha is not None and alpha != ours:
            raise AdapterMismatch(
                f"{self._where}: module {module!r} has alpha {alpha:g} in its tensors and {ours:g} in the config"
            )
        return ours / math.sqrt(rank) if self._rslora else ours / rank

    def rank(self, module: str, rows: int) -> int:
        """The rank of a stack of ``rows``: the config's, or all of the rows where nothing is known."""
        if not self._known:
            return rows
        return int(next(iter(self._lookup(self._ranks, module).values()), self._r))

    def _lookup(self, patterns: Mapping[Pattern, float], module: str) -> dict[str, float]:
        """The patterns that match, in their order."""
        return {pattern.text: value for pattern, value in patterns.items() if pattern.matches(module)}

    def _doubt(self, alphas: Mapping[str, float]) -> None:
        values = [f"{pattern!r}: {value:g}" for pattern, value in alphas.items()]
        text = (
            f"{self._where}: several of alpha_pattern match the same modules ({listed(values)}) and the first was "
            "taken, as PEFT does on loading; PEFT sorts them on saving, so training may have taken another"
        )
        self._unsure[text] = None

    def _number(self, config: Mapping[str, Any], key: str, default: float) -> float:
        value = config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
            raise BadFile(f"{self._where}: {key} = {value!r} is not a number")
        return value

    def _pattern(self, config: Mapping[str, Any], key: str) -> dict[Pattern, float]:
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise BadFile(f"{self._where}: {key} must map module patterns to numbers")
        where = f"{self._where}: {key}"
        return {compile_pattern(where, pattern): self._number(patterns, pattern, 0) for pattern in patterns}
