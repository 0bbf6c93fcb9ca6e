"""What adapters store whole: layers trained whole, biases, rows of tokens, and how several of them make one."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorasmith.adapter import Adapter, ModuleDelta
from lorasmith.assembly import Bound
from lorasmith.deltas import Delta
from lorasmith.deltas.addition import Addition
from lorasmith.deltas.replacement import Replacement
from lorasmith.deltas.token_rows import TokenRows
from lorasmith.errors import AdapterMismatch, listed
from lorasmith.formats.peft import PREFIX, TOKEN_ROWS
from lorasmith.safefile import TensorEntry, equal_bytes

Weighted = Sequence[tuple[Adapter, float]]


@dataclass(frozen=True)
class Whole:
    """A tensor that is no product: ``stored`` as it is, or the base's ``entry`` with ``parts`` added to it."""

    name: str
    source: ModuleDelta
    adapter: int
    stored: TensorEntry
    entry: TensorEntry | None = None
    parts: tuple[tuple[Delta, float], ...] = ()


def weighed(adapters: Weighted) -> Iterator[tuple[int, ModuleDelta, float]]:
    """Every delta that counts, with the position and the weight of its adapter."""
    for position, (adapter, weight) in enumerate(adapters):
        for source in adapter.deltas:
            if weight * source.weight != 0:
                yield position, source, weight * source.weight


def whole_tensors(
    adapters: Weighted, preferred: int | None, bound: Mapping[int, Bound] | None, notes: list[str]
) -> Iterator[Whole]:
    """One tensor of each place where adapters have some; what is told of it goes into ``notes``."""
    found: dict[tuple[str, str, bool], list[tuple[int, ModuleDelta, float]]] = {}
    for position, source, weight in weighed(adapters):
        if not source.delta.rank and not isinstance(source.delta, Addition):
            key = (source.module, source.parameter, isinstance(source.delta, TokenRows))
            found.setdefault(key, []).append((position, source, weight))
    for some in found.values():
        yield _whole(adapters, some, preferred, bound, notes)


def _whole(
    adapters: Weighted,
    some: Sequence[tuple[int, ModuleDelta, float]],
    preferred: int | None,
    bound: Mapping[int, Bound] | None,
    notes: list[str],
) -> Whole:
    chosen = next((one for one in some if one[0] == preferred), None)
    position, source, weight = chosen or some[0]
    stored = source.delta.entries[0]
    weights = [one[2] for one in some]
    name = stored.name
    alike = all(_is_alike(source, other) for _, other, _ in some)
    passes = alike and (_is_whole(weights) or is_base(source))
    if chosen is not None and not passes:
        notes.append(f"{stored.name} is that of {adapters[position][0].path}, as it is (--prefer)")
    if chosen is not None or passes:
        return Whole(name, source, position, stored)
    entry = bound[id(source)].target if bound and all(id(other) in bound for _, other, _ in some) else None
    fits = entry is not None and all(
        isinstance(other.delta, Replacement) and other.delta.new.shape == entry.shape for _, other, _ in some
    )
    if fits and entry is not None:
        return Whole(name, source, position, stored, entry, tuple((other.delta, w) for _, other, w in some))
    owners = [adapters[at][0].path for at, _, _ in some]
    what = f"{stored.name!r} is trained whole in {listed(owners)}"
    why = (
        f"with the weight {weight:g}"
        if len(some) == 1
        else "and differs"
        if not alike
        else "with weights that do not add up to 1"
    )
    if isinstance(source.delta, TokenRows):
        base = "and rows of tokens are not weighted; take"
    elif bound is None:
        base = "which depends on the base: give it with --base BASE, or take"
    else:
        base = f"and the base has {'no such tensor' if entry is None else 'it in another shape'}; take"
    raise AdapterMismatch(f"{what}, {why}, {base} one as it is with --prefer {owners[0]}")


def _is_whole(weights: Sequence[float]) -> bool:
    """Whether tensors that are the same stay what they are: their weights add up to one, or each is one."""
    return all(weight == 1 for weight in weights) or math.isclose(math.fsum(weights), 1, rel_tol=1e-12)


def is_base(source: ModuleDelta) -> bool:
    """Whether a tensor is one of the base that PEFT saved along, as it does with embeddings: nothing to be weighted."""
    return source.shared and source.parameter == "weight" and not isinstance(source.delta, TokenRows)


def _is_alike(one: ModuleDelta, other: ModuleDelta) -> bool:
    mine, theirs = one.delta, other.delta
    tokens = [delta.tokens for delta in (mine, theirs) if isinstance(delta, TokenRows)]
    return len(set(tokens)) <= 1 and mine.shape == theirs.shape and equal_bytes(mine.entries[0], theirs.entries[0])


def named(whole: Whole, adapted: Collection[str]) -> Whole:
    """The tensor under the name that PEFT has for it: of a layer that is ``adapted``, the one within it."""
    layer = ".base_layer" if whole.source.module in adapted else ""
    rows = isinstance(whole.source.delta, TokenRows)
    name = TOKEN_ROWS if rows else f"{layer}.{whole.source.parameter}"
    return replace(whole, name=f"{PREFIX}{whole.source.module}{name}" if whole.source.module else PREFIX + name[1:])


def saved_modules(adapters: Weighted, wholes: Sequence[Whole]) -> list[str]:
    """The names in the adapters' ``modules_to_save`` whose layers are in the mix."""
    modules = {whole.source.module for whole in wholes}
    named = [name for adapter, _ in adapters for name in _names(adapter.config.get("modules_to_save"))]
    return [
        name for name in dict.fromkeys(named) if any(name in one.split(".") or one.endswith(name) for one in modules)
    ]


def _names(value: object) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def trained_tokens(adapters: Weighted, wholes: Sequence[Whole]) -> Any:
    """``trainable_token_indices`` of the layers whose rows are in the mix; None without any."""
    rows = [(whole, whole.source.delta) for whole in wholes if isinstance(whole.source.delta, TokenRows)]
    if len(rows) == 1:
        said = adapters[rows[0][0].adapter][0].config.get("trainable_token_indices")
        if isinstance(said, list):
            return said
    tokens = {whole.source.module: list(delta.tokens) for whole, delta in rows}
    return tokens or None
