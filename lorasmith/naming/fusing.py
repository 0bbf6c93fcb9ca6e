"""Layers that one side has in one piece and the other in several, by their names alone.

What transformers itself fuses or splits on loading is in ``conversions``. These rules are for everybody else: adapters
trained expert by expert for a base whose experts are stacked, and the other way round; q, k and v for a base with one
layer for all, and the other way round. Each applies only where names, shapes and config leave one reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorasmith.deltas.axis import Axis, span
from lorasmith.naming.conversions import is_known
from lorasmith.naming.tiles import CannotCompute, Tile, View, chunks, concatenate, permute, split, stack
from lorasmith.naming.tiles import transpose as exchange

INTERLEAVED = ("gpt_oss",)
"""Model types whose stacked experts have gate and up in alternating rows."""

_GATES, _UPS, _DOWNS = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")

_EXPERT = re.compile(
    rf"^(?P<stem>.*\bexperts)\.(?P<number>\d+)\.(?P<which>{'|'.join(_GATES + _UPS + _DOWNS)})\.(?P<leaf>weight|bias)$"
)
_EXPERTS = re.compile(r"^(?P<stem>.*\bexperts)\.(?P<which>gate_up_proj|down_proj)(?P<leaf>_bias)?$")

_HEADS_FIRST = ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "minimax")
"""Model types whose fused layer holds q, k and v of one head after the other."""

_OTHERWISE = ("codegen", "mobilevitv2")
"""Model types whose fused layer is neither that nor blocks."""

_BLOCKS = ("qkv_proj", "qkv", "Wqkv", "W_pack")
"""What layers are called that hold all of q, then k, then v; ``query_key_value`` may be anything."""

_THREE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("wq", "wk", "wv"))
_TWO = {"gate_up_proj": ("gate_proj", "up_proj"), "up_gate_proj": ("up_proj", "gate_proj")}
_DENSE = re.compile(r"^(?P<stem>(?:.*\.)?)(?P<layer>[^.]+)\.(?P<leaf>weight|bias)$")


@dataclass(frozen=True)
class Names:
    """Parameters that can be had by name (``view`` gives None for others), and the config of their model."""

    view: Callable[[str], View | None]
    all: Iterable[str]
    config: Mapping[str, Any]
    _experts: dict[str, int] = field(default_factory=dict)
    _apart: dict[str, list[View]] = field(default_factory=dict)

    def experts(self, stem: str) -> int:
        """How many experts are stored one by one below a path."""
        if not self._experts:
            self._experts[""] = 0
            for name in self.all:
                match = _EXPERT.match(name)
                if match is not None:
                    self._experts[match["stem"]] = max(self._experts.get(match["stem"], 0), int(match["number"]) + 1)
        return self._experts.get(stem, 0)

    def apart(self, name: str, view: View) -> list[View]:
        """The experts of a stack, one by one."""
        if name not in self._apart:
            self._apart[name] = _apart(view)
        return self._apart[name]


def fused_or_split(name: str, names: Names) -> View | None:
    """What a parameter that is not there by this name consists of; None where no rule says so.

    Raises CannotCompute where two rules apply, or one does and the arrangement is not known.
    """
    rules = (_one_expert, _all_experts, _of_fused, _of_split)
    found = [view for rule in rules for view in rule(name, names)]
    if len(found) > 1:
        raise CannotCompute(f"{name} may be in {len(found)} places")
    return found[0] if found else None


# ----------------------------------------------------------------------------------------------------- experts


def _one_expert(name: str, names: Names) -> Iterator[View]:
    """One expert's layer, where the base has all experts in one tensor."""
    match = _EXPERT.match(name)
    if match is None:
        return
    suffix = "" if match["leaf"] == "weight" else "_bias"
    for stem in _stems(match["stem"]):
        part = "down_proj" if match["which"] in _DOWNS else "gate_up_proj"
        view = names.view(f"{stem}.{part}{suffix}")
        if view is None or len(view.shape) != (2 if suffix else 3):
            continue
        if int(match["number"]) >= view.shape[0]:
            raise CannotCompute(f"{name} would be one of only {view.shape[0]} experts")
        one = _upright(stem, names, names.apart(f"{stem}.{part}{suffix}", view)[int(match["number"])])
        if part == "gate_up_proj":
            yield _halves(one, names)[0 if match["which"] in _GATES else 1]
        else:
            yield one


def _all_experts(name: str, names: Names) -> Iterator[View]:
    """All experts in one tensor, where the base has them one by one."""
    match = _EXPERTS.match(name)
    if match is None:
        return
    leaf = "bias" if match["leaf"] else "weight"
    for stem in _stems(match["stem"]):
        count = names.experts(stem)
        layers = (_DOWNS,) if match["which"] == "down_proj" else (_GATES, _UPS)
        found = [list(_each(stem, count, those, leaf, names)) for those in layers] if count else []
        if not found or not all(found):
            continue
        whole = [stack(views) for views in found]
        if len(whole) == 1:
            yield whole[0]
            continue
        both = concatenate(whole, 1)
        half = both.shape[1] // 2
        yield permute(both, 1, (1, 2, half)) if _interleaves(names) else both


def _each(stem: str, count: int, layers: Iterable[str], leaf: str, names: Names) -> Iterator[View]:
    for number in range(count):
        views = [names.view(f"{stem}.{number}.{layer}.{leaf}") for layer in layers]
        there = [view for view in views if view is not None]
        if len(there) != 1 and number:
            raise CannotCompute(f"expert {number} of {stem} lacks a layer that others have")
        yield from there


def _stems(stem: str) -> Iterator[str]:
    """A path of experts, and what else transformers has called it."""
    yield stem
    for one, other in ((".block_sparse_moe.", ".mlp."), (".mlp.", ".block_sparse_moe.")):
        if one in stem:
            yield stem.replace(one, other)


def _apart(view: View) -> list[View]:
    """Each of stacked views."""
    tiles: list[list[Tile]] = [[] for _ in range(view.shape[0])]
    for tile in view.tiles:
        for place, number in enumerate(tile.own[0].part(slice(0, len(tile.own[0])))):
            stored = tuple(
                (None, span(axis[place], 1)) if dim == 0 else (None if dim is None else dim - 1, axis)
                for dim, axis in tile.stored
            )
            tiles[number].append(Tile(tile.entry, tile.own[1:], stored))
    return [View(view.shape[1:], tuple(some)) for some in tiles]


def _upright(stem: str, names: Names, one: View) -> View:
    """An expert's weight as (out, in): two gates' rows for one column of ``down``, or the other way round."""
    both, down = (names.view(f"{stem}.{part}") for part in ("gate_up_proj", "down_proj"))
    if len(one.shape) == 1:
        return one
    if both is None or down is None:
        raise CannotCompute(f"{stem} lacks gate_up_proj or down_proj, so which way these are stored cannot be told")
    (x, y), (u, v) = both.shape[-2:], down.shape[-2:]
    if (x, y) == (2 * v, u):
        return one
    if (y, x) == (2 * u, v):
        return exchange(one, 0, 1)
    raise CannotCompute(f"the shapes of {stem} are not those of gated experts")


def _halves(one: View, names: Names) -> list[View]:
    """Gate and up of an expert's ``gate_up_proj`` of shape (2·inner, …)."""
    return chunks(_uneven(one) if _interleaves(names) else one, 2, 0)


def _uneven(one: View) -> View:
    """Every second row, then the others."""
    return permute(one, 0, (1, one.shape[0] // 2, 2))


def _interleaves(names: Names) -> bool:
    """Whether gate and up alternate; only models that transformers has are known not to."""
    types = [part.get("model_type") for part in (names.config, part_for(names.config, ""))]
    if not any(is_known(one) for one in types):
        raise CannotCompute(f"how a model of type {types[0]} arranges gate and up in one tensor is not known")
    return any(one in INTERLEAVED for one in types)


# ----------------------------------------------------------------------------------------------- dense layers


def _of_fused(name: str, names: Names) -> Iterator[View]:
    """One of several layers that the base has in one."""
    match = _DENSE.match(name)
    if match is None:
        return
    stem, layer, leaf = match["stem"], match["layer"], match["leaf"]
    for fused, pair in _TWO.items():
        view = names.view(f"{stem}{fused}.{leaf}") if layer in pair else None
        if view is not None:
            yield chunks(view, 2, 0)[pair.index(layer)]
    for three in _THREE:
        if layer not in three or three == ("q", "k", "v"):
            continue
        for fused in (*_BLOCKS, "query_key_value"):
            view = names.view(f"{stem}{fused}.{leaf}")
            if view is not None:
                yield _thirds(view, fused, stem, names)[three.index(layer)]


def _of_split(name: str, names: Names) -> Iterator[View]:
    """One layer that the base has in several."""
    match = _DENSE.match(name)
    if match is None:
        return
    stem, layer, leaf = match["stem"], match["layer"], match["leaf"]
    groups = [_TWO[layer]] if layer in _TWO else list(_THREE) if layer in _BLOCKS else []
    for group in groups:
        views = [names.view(f"{stem}{one}.{leaf}") for one in group]
        there = [view for view in views if view is not None]
        if len(there) == len(group):
            yield concatenate(there, 0)


def _thirds(view: View, fused: str, stem: str, names: Names) -> list[View]:
    """q, k and v of a fused layer."""
    config = part_for(names.config, stem)
    model_type = config.get("model_type")
    if fused != "query_key_value" and model_type not in _HEADS_FIRST:
        if model_type in _OTHERWISE or not (fused == "W_pack" or is_known(model_type)):
            raise CannotCompute(f"how {model_type} arranges {stem}{fused} is not known")
        return split(view, _sizes(view.shape[0], config), 0)
    if model_type in _HEADS_FIRST:
        heads = _heads(config)[0]
        return [_in_groups(view, heads, 3, place, 1) for place in range(3)]
    if model_type == "falcon":
        return _falcon(view, config)
    raise CannotCompute(f"how {model_type} arranges {stem}{fused} is not known")


def _falcon(view: View, config: Mapping[str, Any]) -> list[View]:
    """Groups of queries with their key and value; without groups, one key and value behind all queries, or each."""
    heads, _, width = _heads(config)
    if config.get("new_decoder_architecture"):
        groups = _number_of(config, "num_kv_heads", default=heads)
        per = max(1, heads // groups)
        return [_in_groups(view, groups, per + 2, first, many) for first, many in ((0, per), (per, 1), (per + 1, 1))]
    if config.get("multi_query", True):
        return split(view, [heads * width, width, width], 0)
    return [_in_groups(view, heads, 3, place, 1) for place in range(3)]


def _in_groups(view: View, groups: int, parts: int, first: int, many: int) -> View:
    """Of rows in ``groups`` of ``parts`` equal parts each, ``many`` parts from the ``first`` on, of every group."""
    width, rest = divmod(view.shape[0], groups * parts)
    (tile,) = view.tiles
    if rest or not tile.own[0].is_whole(view.shape[0]):
        raise CannotCompute(f"{view.shape[0]} rows are not {groups} groups of {parts}")
    picked = Axis(first * width, ((groups, parts * width), (many * width, 1)))
    stored = tuple((dim, axis.of(picked)) if dim == 0 else (dim, axis) for dim, axis in tile.stored)
    count = groups * many * width
    own = (Axis(0, ((count, 1),)), *tile.own[1:])
    return View((count, *view.shape[1:]), (Tile(tile.entry, own, stored),))


def _sizes(rows: int, config: Mapping[str, Any]) -> list[int]:
    """Rows of q, k and v that stand one behind the other."""
    heads, pairs, width = _heads(config)
    if (heads + 2 * pairs) * width == rows:
        return [heads * width, pairs * width, pairs * width]
    if heads == pairs and rows % 3 == 0:
        return [rows // 3] * 3
    raise CannotCompute(f"{rows} rows are not those of {heads} heads of {width} and {pairs} keys and values")


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Heads, heads of keys and values, and their width, by a config."""
    heads = _number_of(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
    pairs = _number_of(config, "num_key_value_heads", "num_kv_heads", default=heads)
    hidden = _number_of(config, "hidden_size", "n_embd", "embed_dim", "d_model", default=0)
    return heads, pairs, _number_of(config, "head_dim", default=hidden // heads)


def _number_of(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    if default is None:
        raise CannotCompute("the config does not say how many heads there are")
    return default


def part_for(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The part of a config that describes the part of the model that a parameter is in."""
    for words, key in (("visual|vision|image", "vision_config"), ("audio", "audio_config"), ("", "text_config")):
        part = config.get(key)
        if isinstance(part, Mapping) and re.search(words, name):
            return part
    return config


def divided(config: Mapping[str, Any], target: str) -> int | None:
    """Rows of q, k or v by the config, for a layer that is split by the sizes of its parts."""
    layer = next((place for place, one in enumerate(_THREE[0]) if one in target), None)
    if layer is None:
        return None
    heads, pairs, width = _heads(part_for(config, target))
    return (heads if layer == 0 else pairs) * width
