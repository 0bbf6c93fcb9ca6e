"""What a caller may give as adapters and as weights, made plain."""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard, cast

from lorasmith.adapter import Adapter, ModuleDelta
from lorasmith.errors import BadOption, listed

Path = str | os.PathLike[str]
Given = Path | Adapter
AdapterArgument = Given | tuple[Given, float]
AdapterArguments = AdapterArgument | Sequence[AdapterArgument]

_WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)", re.DOTALL)


@dataclass(frozen=True)
class Weighted:
    """One adapter as it was given: a path or an adapter that was read already, and its weight."""

    given: str | Adapter
    weight: float
    text: str

    @property
    def path(self) -> str:
        return self.given if isinstance(self.given, str) else self.given.path


def weighted(adapters: AdapterArguments) -> list[Weighted]:
    """Every adapter with its weight: ``path``, ``"path:0.7"``, ``(path, 0.7)``, or an Adapter in a path's place."""
    return [_weighted(one) for one in _as_list(adapters)]


def _as_list(adapters: AdapterArguments) -> list[AdapterArgument]:
    """One adapter need not be put in a list; ``(path, weight)`` is one adapter."""
    if isinstance(adapters, (str, os.PathLike, Adapter)) or _is_pair(adapters):
        return [adapters]
    return list(cast("Sequence[AdapterArgument]", adapters))


def _is_pair(value: object) -> TypeGuard[tuple[Given, float]]:
    """Whether it is something with a number, numpy's included."""
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    return isinstance(value[1], numbers.Real) and not isinstance(value[1], bool)


def _weighted(adapter: AdapterArgument) -> Weighted:
    """An adapter and its weight; an existing path that ends like ``:0.7`` is a path."""
    given, weight = (adapter[0], float(adapter[1])) if _is_pair(adapter) else (adapter, 1.0)
    if isinstance(given, Adapter):
        one = Weighted(given, weight, given.path)
    elif isinstance(given, (str, os.PathLike)):
        path = os.fspath(given)
        match = None if isinstance(adapter, tuple) or os.path.exists(path) else _WEIGHTED.fullmatch(path)
        one = Weighted(match["path"], float(match["weight"]), path) if match else Weighted(path, weight, path)
    else:
        raise BadOption(f"{adapter!r} is not an adapter: give a path, 'path:0.7' or (path, 0.7)")
    if not abs(one.weight) < float("inf"):
        raise BadOption(f"the weight {one.weight} of {one.path} is not a finite number")
    return one


def weigh_modules(adapters: Sequence[Adapter], given: Sequence[Weighted], patterns: Iterable[str]) -> list[Adapter]:
    """The adapters with every module's weight multiplied by the factors of all ``patterns`` that are found in its name.

    A pattern is ``REGEX=FACTOR``, for one adapter ``ADAPTER:REGEX=FACTOR`` with the adapter as it was given. Raises
    BadOption for one that is none, or that no module has in its name.
    """
    adapters = list(adapters)
    for pattern in patterns:
        owners, regex, factor = _pattern(pattern, given)
        hits = 0
        for position in owners:
            hit = [regex.search(_called(one)) is not None for one in adapters[position].deltas]
            hits += sum(hit)
            deltas = zip(adapters[position].deltas, hit, strict=True)
            adapters[position] = replace(
                adapters[position],
                deltas=tuple(replace(one, weight=one.weight * factor) if found else one for one, found in deltas),
            )
        if not hits:
            names = list(dict.fromkeys(_called(one) for position in owners for one in adapters[position].deltas))
            raise BadOption(f"--weights {pattern!r} is found in no module's name; they are like {listed(names)}")
    return adapters


def numbered(patterns: Iterable[str], given: Sequence[Weighted]) -> list[str]:
    """The patterns of ``weigh_modules`` as a record has them: with an adapter's number, like ``[1]``, for its path."""
    found = []
    for pattern in patterns:
        owners, regex, _ = _pattern(pattern, given)
        rest = pattern.rpartition("=")[2]
        mark = "" if len(owners) == len(given) else "".join(f"[{position + 1}]" for position in owners) + ":"
        found.append(f"{mark}{regex.pattern}={rest}")
    return found


def _called(one: ModuleDelta) -> str:
    """What a pattern is searched in: the module's name, with that of a parameter that is not its weight or bias."""
    return one.module if one.parameter in ("weight", "bias") else one.path


def _pattern(pattern: str, given: Sequence[Weighted]) -> tuple[list[int], re.Pattern[str], float]:
    """Positions of the adapters that a pattern is for, its regular expression and its factor."""
    text, mark, number = pattern.rpartition("=")
    try:
        factor = float(number)
    except ValueError:
        factor = float("nan")
    if not mark or not abs(factor) < float("inf"):
        raise BadOption(f"--weights {pattern!r} is not REGEX=FACTOR with a finite number behind the last '='")
    owners = list(range(len(given)))
    names = sorted({name for one in given for name in (one.path, one.text)}, key=len, reverse=True)
    for name in names:
        if text.startswith(f"{name}:"):
            owners = [position for position, one in enumerate(given) if name in (one.path, one.text)]
            text = text[len(name) + 1 :]
            break
    try:
        return owners, re.compile(text), factor
    except re.error as error:
        raise BadOption(f"--weights {pattern!r}: {text!r} is no regular expression: {error}") from None
