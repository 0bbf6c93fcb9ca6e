"""What a parameter of the running model consists of: blocks of stored tensors, each with its place.

The operations of ``conversions`` are carried out on these blocks instead of on numbers, so that the result says of
every element where it is stored, and a delta can be cut up accordingly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from lorasmith.deltas.axis import Axis, span
from lorasmith.safefile import TensorEntry

Stored = tuple[int | None, Axis]
"""For a dimension of a stored tensor: which of the parameter's runs along it (None: only one position), and where."""


class CannotCompute(Exception):
    """A rearrangement that is known by name and not in what it does, for this checkpoint."""


@dataclass(frozen=True)
class Tile:
    """A block: ``own`` are its positions along each of the parameter's dimensions, ``stored`` those in the tensor."""

    entry: TensorEntry
    own: tuple[Axis, ...]
    stored: tuple[Stored, ...]


@dataclass(frozen=True)
class View:
    """A parameter of ``shape``, made of tiles."""

    shape: tuple[int, ...]
    tiles: tuple[Tile, ...]

    @property
    def is_stored(self) -> bool:
        """Whether it is a stored tensor just as it stands there."""
        return len(self.tiles) == 1 and self == whole(self.tiles[0].entry)


@dataclass(frozen=True)
class Facts:
    """What operations ask about the model: its config, and the sizes of what a tensor is split into."""

    config: Mapping[str, Any]
    sizes: Callable[[str], int | None]


def whole(entry: TensorEntry) -> View:
    """A stored tensor as it is."""
    axes, stored = _axes(entry.shape)
    return View(entry.shape, (Tile(entry, axes, stored),))


@lru_cache(maxsize=1 << 10)
def _axes(shape: tuple[int, ...]) -> tuple[tuple[Axis, ...], tuple[Stored, ...]]:
    axes = tuple(span(0, length) for length in shape)
    return axes, tuple(enumerate(axes))


def stack(views: Sequence[View]) -> View:
    """Views of one shape along a new first dimension."""
    if len({view.shape for view in views}) != 1:
        raise CannotCompute("tensors of different shapes would be stacked")
    return View((len(views), *views[0].shape), tuple(_stacked(views)))


def _stacked(views: Sequence[View]) -> Iterator[Tile]:
    for number, view in enumerate(views):
        for tile in view.tiles:
            yield Tile(tile.entry, (span(number, 1), *tile.own), _shifted(tile.stored))


@lru_cache(maxsize=1 << 10)
def _shifted(stored: tuple[Stored, ...]) -> tuple[Stored, ...]:
    """What a stored tensor's dimensions are once the parameter has one more before them."""
    return tuple((None if dim is None else dim + 1, axis) for dim, axis in stored)


def concatenate(views: Sequence[View], dim: int) -> View:
    """Views one behind the other."""
    if len({(*view.shape[:dim], *view.shape[dim + 1 :]) for view in views}) != 1:
        raise CannotCompute("tensors of different shapes would be put together")
    tiles, offset = [], 0
    for view in views:
        for tile in view.tiles:
            axis = tile.own[dim]
            tiles.append(_with(tile, dim, replace(axis, start=axis.start + offset)))
        offset += view.shape[dim]
    return View((*views[0].shape[:dim], offset, *views[0].shape[dim + 1 :]), tuple(tiles))


def _with(tile: Tile, dim: int, axis: Axis) -> Tile:
    return replace(tile, own=(*tile.own[:dim], axis, *tile.own[dim + 1 :]))


def cut(view: View, dim: int, start: int, length: int) -> View:
    """A range along a dimension."""
    tiles = []
    for tile in view.tiles:
        found = _cut_run(tile.own[dim], start, length) or _cut_digit(tile.own[dim], start, length)
        if found is None:
            raise CannotCompute("a rearranged tensor would be cut")
        own, inner = found
        if len(own):
            stored = tuple((at, axis.of(inner)) if at == dim else (at, axis) for at, axis in tile.stored)
            tiles.append(replace(_with(tile, dim, own), stored=stored))
    return View((*view.shape[:dim], length, *view.shape[dim + 1 :]), tuple(tiles))


def _cut_run(axis: Axis, start: int, length: int) -> tuple[Axis, Axis] | None:
    """What a range has of positions that are a range: where these are now, and which ones they were."""
    run = axis.plain
    if run is None or run.step != 1:
        return None
    first, last = max(run.start, start), min(run.stop, start + length)
    size = max(0, last - first)
    return span(first - start, size), span(first - run.start, size)


def _cut_digit(axis: Axis, start: int, length: int) -> tuple[Axis, Axis] | None:
    """The same for positions that were permuted, where the range is all of those with some values of one digit."""
    unit = 1
    for place in range(len(axis.digits) - 1, -1, -1):
        count, step = axis.digits[place]
        others = sum((many - 1) * each for at, (many, each) in enumerate(axis.digits) if at != place)
        if others < step and axis.start == start % step == length % step == 0:
            low, high = start // step, min(count, (start + length) // step)
            units = [math.prod(many for many, _ in axis.digits[at + 1 :]) for at in range(len(axis.digits))]
            counts = [many if at != place else high - low for at, (many, _) in enumerate(axis.digits)]
            own = Axis(0, tuple(zip(counts, (each for _, each in axis.digits), strict=True)))
            return own, Axis(low * unit, tuple(zip(counts, units, strict=True)))
        unit *= count
    return None


def chunks(view: View, count: int, dim: int) -> list[View]:
    """Equal parts along a dimension; the last is smaller where they cannot be (``torch.chunk``)."""
    length = view.shape[dim]
    size = max(1, -(-length // count))
    starts = range(0, length, size)
    if len(starts) != count:
        raise CannotCompute(f"{length} rows would be cut into {count} parts")
    return [cut(view, dim, start, min(size, length - start)) for start in starts]


def split(view: View, sizes: Sequence[int], dim: int) -> list[View]:
    """Parts of the given sizes along a dimension."""
    if sum(sizes) != view.shape[dim]:
        raise CannotCompute(f"{view.shape[dim]} rows would be split into {list(sizes)}")
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return [cut(view, dim, start, size) for start, size in zip(starts, sizes, strict=True)]


def transpose(view: View, one: int, other: int) -> View:
    """The view with two dimensions exchanged."""
    order = list(range(len(view.shape)))
    order[one], order[other] = other, one
    tiles = (
        Tile(
            tile.entry,
            tuple(tile.own[dim] for dim in order),
            tuple((None if dim is None else order[dim], axis) for dim, axis in tile.stored),
        )
        for tile in view.tiles
    )
    return View(tuple(view.shape[dim] for dim in order), tuple(tiles))


def permute(view: View, dim: int, counts: tuple[int, int, int]) -> View:
    """Along a dimension of ``a·b·c`` positions, what was at (i, j, k) of (a, b, c) is at (i, k, j) of (a, c, b)."""
    a, b, c = counts
    moved = Axis(0, ((a, b * c), (b, 1), (c, b)))
    if a * b * c != view.shape[dim] or any(not tile.own[dim].is_whole(a * b * c) for tile in view.tiles):
        raise CannotCompute("a part of a tensor would be permuted")
    return View(view.shape, tuple(_with(tile, dim, moved) for tile in view.tiles))


# -------------------------------------------------------------------------------------------------- operations


def made(
    operations: Sequence[tuple[str, Mapping[str, Any]]],
    sources: Mapping[str, list[View]],
    targets: Sequence[str],
    facts: Facts,
) -> dict[str, View]:
    """The views that a conversion makes, by its target patterns, of the stored tensors that its patterns matched.

    Raises CannotCompute for an operation that is not known, or where the tensors do not fit.
    """
    now = dict(sources)
    for name, options in operations:
        operate = OPERATIONS.get(name)
        if operate is None:
            raise CannotCompute(f"transformers' operation {name} is not known")
        now = operate(now, list(targets), options, facts)
    return {key: _only(views) for key, views in now.items()}


def _only(views: Sequence[View]) -> View:
    if len(views) != 1:
        raise CannotCompute(f"{len(views)} tensors have one name")
    return views[0]


Now = dict[str, list[View]]


def _merge_list(now: Now, targets: list[str], options: Mapping[str, Any], facts: Facts) -> Now:
    if options["dim"] != 0:
        raise CannotCompute("experts would be stacked along another dimension than the first")
    return {key if len(now) > 1 else targets[0]: [stack(views)] for key, views in now.items()}


def _concatenate(now: Now, targets: list[str], options: Mapping[str, Any], facts: Facts) -> Now:
    return {targets[0]: [concatenate([view for views in now.values() for view in views], options["dim"])]}


def _chunk(now: Now, targets: list[str], options: Mapping[str, Any], facts: Facts) -> Now:
    (views,) = now.values()
    return {key: [view] for key, view in zip(targets, chunks(_only(views), len(targets), options["dim"]), strict=True)}


def _split(now: Now, targets: list[str], options: Mapping[str, Any], facts: Facts) -> Now:
    (views,) = now.values()
    sizes = [facts.sizes(target) for target in targets]
    known = [size for size in sizes if size is not None]
    if len(known) != len(targets):
        raise CannotCompute("the config does not say how a fused layer is divided")
    return {key: [view] for key, view in zip(targets, split(_only(views), known, options["dim"]), strict=True)}


def _transpose(now: Now, targets: list[str], options: Mapping[str, Any], facts: Facts) -> Now:
    (views,) = now.values()
    view = _only(views)
    if options["check_dims"] and _stands_already(view, targets[0], facts):
        return {targets[0]: [view]}
    return {targets[0]: [transpose(view, options["dim0"], options["dim1"])]}


def _stands_already(view: View, target: str, facts: Facts) -> bool:
    """Whether stacked experts have the model's own layout: the inputs of gate and up, the outputs of down."""
    hidden = setting(facts.config, "hidden_size")
    rows, columns = view.shape[-2:]
    if rows == columns or hidden not in (rows, columns):
        raise CannotCompute(f"which dimension of experts of shape {list(view.shape)} is the inputs' cannot be told")
    return bool(hidden == (rows if "down" in target else columns))


def setting(config: Mapping[str, Any], *keys: str) -> Any:
    """What a config says under one of the keys, at its top or of its text model."""
    text = config.get("text_config")
    parts = [config, *([text] if isinstance(text, Mapping) else [])]
    return next((part[key] for key in keys for part in parts if part.get(key) is not None), None)


def _permute_for_rope(now: Now, targets: list[str], options: Mapping[str, Any], facts: Facts) -> Now:
    part = facts.config.get(options["subconfig_key"] or "")
    heads = (part if isinstance(part, Mapping) else facts.config).get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        raise CannotCompute("the config does not say how many heads there are")
    names = options["permute_layer_names"]
    out: Now = {}
    for key, views in now.items():
        view = _only(views)
        if names is None or any(name in key for name in names):
            half = view.shape[0] // heads // 2
            view = permute(view, 0, (heads, 2, half) if options["inverse"] else (heads, half, 2))
        out[targets[0] if len(now) == len(targets) == 1 else key] = [view]
    return out


def _interleave(now: Now, targets: list[str], options: Mapping[str, Any], facts: Facts) -> Now:
    (views,) = now.values()
    view, dim = _only(views), options["dim"]
    half = view.shape[dim] // 2
    return {targets[0]: [permute(view, dim, (1, 2, half) if options["inverse"] else (1, half, 2))]}


def _of_two_kinds(now: Now, targets: list[str], options: Mapping[str, Any], facts: Facts) -> Now:
    """Experts of which the first half are for text and the second for pictures (Ernie 4.5 VL)."""
    out: Now = {}
    for place, target in enumerate(targets):
        stacks = []
        for views in now.values():
            size = -(-len(views) // len(targets))
            stacks.append(stack(views[place * size : (place + 1) * size]))
        out[target] = [concatenate(stacks, options["concat_dim"])]
    return out


OPERATIONS: Mapping[str, Callable[[Now, list[str], Mapping[str, Any], Facts], Now]] = {
    "MergeModulelist": _merge_list,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Split": _split,
    "Transpose": _transpose,
    "PermuteForRope": _permute_for_rope,
    "Interleave": _interleave,
    "ErnieFuseAndSplitTextVisionExperts": _of_two_kinds,
}
"""What transformers' operations of these names do (``core_model_loading``)."""
