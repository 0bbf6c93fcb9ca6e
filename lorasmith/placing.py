"""A delta on a parameter of the running model, cut up and turned the way the base stores what that is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod

from lorasmith.adapter import Adapter
from lorasmith.deltas import Delta
from lorasmith.deltas.axis import Axis, span
from lorasmith.deltas.experts import Stacked
from lorasmith.deltas.patchwork import patch_over
from lorasmith.deltas.replacement import Replacement
from lorasmith.errors import AdapterMismatch
from lorasmith.formats.stacks import generation, is_by_expert
from lorasmith.naming import Match
from lorasmith.naming.tiles import Stored, Tile, View
from lorasmith.safefile import TensorEntry

LAYOUTS = ("peft", "peft-0.19.0", "peft-0.18", "unsloth")
"""How the factors of stacked experts may be stored; what each means is in ``laid_out`` and below it."""

TRANSPOSED = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
"""Model types whose experts say of themselves that they are stored as (in, out)."""


def matrix(view: View, delta: Delta) -> tuple[int, int]:
    """The rows and columns that a delta of a parameter must have: those of stacked experts one below the other."""
    if len(view.shape) == 3 and isinstance(delta, Stacked):
        return view.shape[0] * view.shape[1], view.shape[2]
    return (view.shape[0] if view.shape else 1), prod(view.shape[1:])


def place(view: View, delta: Delta) -> Iterator[tuple[TensorEntry, Delta]]:
    """The stored tensors that a delta changes, each with its own delta; ``matrix`` must be the delta's shape.

    Raises NotImplementedError where a part of the delta depends on the rest of the weight.
    """
    if view.is_stored and not isinstance(delta, Stacked):
        yield view.tiles[0].entry, delta
        return
    for tile in view.tiles:
        if _is_flat(view, tile, delta):
            stored = tuple((dim, axis) for dim, axis in tile.stored if dim is None or dim < 2 or len(view.shape) < 3)
            yield tile.entry, _placed(tile.entry, delta, tile.own[:2], stored, deep=len(view.shape) > 2)
        else:
            yield from _by_expert(view, tile, delta)


def _is_flat(view: View, tile: Tile, delta: Delta) -> bool:
    """Whether a tile takes part of the rows and leaves the rest of the dimensions together."""
    if len(view.shape) < 3:
        return True
    if isinstance(delta, Stacked):
        return False
    if [dim for dim, _ in tile.stored] != list(range(len(view.shape))):
        return False
    axes = [*tile.own[1:], *(axis for _, axis in tile.stored[1:])]
    lengths = (*view.shape[1:], *tile.entry.shape[1:])
    return all(axis.is_whole(length) for axis, length in zip(axes, lengths, strict=True))


def _by_expert(view: View, tile: Tile, delta: Delta) -> Iterator[tuple[TensorEntry, Delta]]:
    """A tile of stacked experts: each expert's delta where that expert is stored."""
    if len(view.shape) != 3 or not isinstance(delta, (Stacked, Replacement)):
        raise NotImplementedError(f"{delta.kind} on a kernel")
    rows, columns = view.shape[1:]
    if isinstance(delta, Replacement):
        delta = Replacement(replace(delta.new, shape=(view.shape[0] * rows, columns)))
    for place, expert in enumerate(tile.own[0].part(slice(0, len(tile.own[0])))):
        stored = tuple(
            (None, span(axis[place], 1)) if dim == 0 else (None if dim is None else dim - 1, axis)
            for dim, axis in tile.stored
        )
        if isinstance(delta, Stacked):
            one: Delta = delta.expert(expert)
        else:
            one = delta.part(rows=span(expert * rows, rows))
        yield tile.entry, _placed(tile.entry, one, tile.own[1:], stored)


def _placed(
    entry: TensorEntry, delta: Delta, own: tuple[Axis, ...], stored: tuple[Stored, ...], *, deep: bool = False
) -> Delta:
    """The part of a delta that a tile has, on the rows and columns of the stored tensor that it is about."""
    height, width = delta.shape
    rows = None if own[0].is_whole(height) else own[0]
    columns = None if deep or len(own) < 2 or own[1].is_whole(width) else own[1]
    part = delta if rows is None and columns is None else delta.part(rows, columns)
    if deep:
        return patch_over(part, entry.matrix, stored[0][1], None)
    shape = entry.shape if len(entry.shape) > 1 else (*entry.shape, 1)
    places = stored if len(entry.shape) > 1 else (*stored, (1, span(0, 1)))
    if _is_turned(places[-2], places[-1], one_column=len(own) < 2):
        part = part.turned() if isinstance(part, Replacement) else part.transposed()
    across, down = places[-1][1], places[-2][1]
    if len(shape) == 3:
        down = replace(down, start=down.start + places[0][1][0] * shape[1])
    return patch_over(part, (prod(shape[:-1]), shape[-1]), down, across)


def _is_turned(row: Stored, column: Stored, *, one_column: bool) -> bool:
    """Whether the delta's rows run along the stored tensor's columns."""
    return column[0] == 0 or (row[0] == 1 and not one_column)


# ----------------------------------------------------------------------------------------- stacked experts' layout


def told_by_shape(matches: Iterable[Match]) -> bool | None:
    """Which way round an adapter's stacks are, if those with experts that are not square agree about it.

    PEFT decides it for a module, not for a parameter: the square one beside them is like them.
    """
    found = set()
    for match in matches:
        delta, shape = match.source.delta, match.view.shape
        if isinstance(delta, Stacked) and len(shape) == 3 and shape[1] != shape[2]:
            found |= {one.turned for one in _both(delta) if one.each == shape[1:]}
    return found.pop() if len(found) == 1 else None


def laid_out(
    adapter: Adapter, match: Match, layout: str | None, config: Mapping[str, object], turned: bool | None
) -> Stacked:
    """The factors of stacked experts, knowing how they are stored: by shapes, the adapter's config, or ``layout``.

    ``turned`` is what ``told_by_shape`` says of the adapter.
    Raises AdapterMismatch where they do not fit, or where it cannot be known.
    """
    delta, shape = match.source.delta, match.view.shape
    assert isinstance(delta, Stacked)
    name = f"{match.source.module}.{match.source.parameter}"
    if len(shape) != 3 or shape[0] != delta.count:
        raise AdapterMismatch(
            f"{adapter.path}: {match.source.tensors[0]!r} has factors for {delta.count} experts and the base has "
            f"{shape[0] if len(shape) == 3 else 'none'} at {name}; the adapter was trained on another model"
        )
    by_expert = layout == "unsloth" if layout else is_by_expert(adapter.config)
    if by_expert is None:
        raise AdapterMismatch(
            f"{adapter.path}: lora_B_layout = {adapter.config.get('lora_B_layout')!r:.80} is not known, so which "
            f"columns of {match.source.tensors[1]!r} belong to which expert is not; say it with --expert-layout "
            f"{'|'.join(LAYOUTS)}"
        )
    said = layout if layout != "unsloth" else None
    fitting = [one for one in _both(delta) if one.each == shape[1:] and turned in (None, one.turned)]
    if len(fitting) > 1:
        fitting = _by_generation(fitting, said, generation(adapter.config), config)
    if len(fitting) > 1:
        raise AdapterMismatch(
            f"{adapter.path}: the experts of {name} are square, and nothing says which PEFT has written "
            f"{match.source.tensors[0]!r}, and with which transformers, so which way round they are is not known; say "
            f"it with --expert-layout {'|'.join(LAYOUTS)}"
        )
    if not fitting:
        raise AdapterMismatch(
            f"{adapter.path}: {match.source.tensors[0]!r} has shape {list(delta.a.shape)} and "
            f"{match.source.tensors[1]!r} {list(delta.b.shape)}, which do not fit experts of shape "
            f"{list(shape[1:])} at {name}; the adapter was trained on another model or size"
        )
    return replace(fitting[0], by_expert=by_expert)


def _both(delta: Stacked) -> tuple[Stacked, Stacked]:
    """The ways round in which factors may be meant."""
    return replace(delta, turned=False), replace(delta, turned=True)


def _by_generation(
    both: list[Stacked], said: str | None, written: str | None, config: Mapping[str, object]
) -> list[Stacked]:
    """What is left of two ways round, knowing which PEFT has ``written`` the factors, or has been ``said`` to have.

    PEFT up to 0.18 has A run over the weight's rows and B over its columns (so that the product is its transpose);
    0.19.0 has that but for experts that say they are stored as (in, out), and later versions have it for these only
    (``lora.ParamWrapper.update_layer``). Whether they say so depends on the transformers it was.
    """
    types = {part.get("model_type") for part in (config, config.get("text_config")) if isinstance(part, Mapping)}
    is_transposed = not types.isdisjoint(TRANSPOSED)
    known = said or written
    if known is None or (is_transposed and not said and known != "peft-0.18"):
        return both
    turned = {"peft-0.18": True, "peft-0.19.0": not is_transposed}.get(known, is_transposed)
    return [one for one in both if one.turned == turned]


# ------------------------------------------------------------------------------------------------- what to tell


def describe(match: Match) -> str:
    """What the base has for a parameter, for people; nothing where that is a tensor of its name."""
    view, name = match.view, match.source.parameter
    if name in ("weight", "bias"):
        name = match.source.module.rpartition(".")[2]
    entries = list(dict.fromkeys(tile.entry.name for tile in view.tiles))
    if view.is_stored:
        wanted = f"{match.source.module}.{match.source.parameter}"
        if isinstance(match.source.delta, Stacked):
            return f"stacked {name} → {view.shape[0]} experts of one tensor"
        return "" if entries[0] == wanted else f"→ {_starred(entries[0])}"
    dim = 1 if len(view.shape) == 3 else 0
    spans = list(dict.fromkeys(_rows(tile.own[dim]) for tile in view.tiles))
    if len(entries) > 1 and dim:
        count = len(entries) // view.shape[0]
        if count:
            return f"fused {name} → {view.shape[0]} experts × {_tensors(count)}, rows {_and(spans)}"
    if len(entries) > 1:
        return f"fused {name} → {_tensors(len(entries))}, rows {_and(spans)}"
    stored = _and([_rows(axis) for at, axis in view.tiles[0].stored if at == 0])
    way = "rows" if view.tiles[0].stored[-1][0] != 0 else "columns"
    return f"{name} → {way} {stored} of {_starred(entries[0])}"


def _rows(axis: Axis) -> str:
    plain = axis.plain
    if plain is None:
        return f"{axis[0]}… of every head or pair"
    return f"{plain.start}:{plain.stop}" + (f":{plain.step}" if plain.step != 1 else "")


def _and(texts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1]))) if texts else ""


def _tensors(count: int) -> str:
    return f"{count} tensor{'' if count == 1 else 's'}"


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
