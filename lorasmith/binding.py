"""An adapter's deltas on a base: which stored tensors each of them changes, turned and cut the way these are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from lorasmith import naming
from lorasmith.adapter import Adapter, ModuleDelta
from lorasmith.assembly import Bound
from lorasmith.checkpoint import Checkpoint
from lorasmith.deltas import Delta
from lorasmith.deltas.experts import Stacked
from lorasmith.deltas.replacement import Replacement
from lorasmith.deltas.token_rows import TokenRows
from lorasmith.dtypes import FLOATS
from lorasmith.errors import AdapterMismatch, Unsupported
from lorasmith.naming.ties import EMBEDDINGS, HEADS, layer
from lorasmith.placing import describe, laid_out, matrix, place, told_by_shape
from lorasmith.safefile import TensorEntry
from lorasmith.structure import LABELS, Structure

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
CONV1D_MODULES = ("c_attn", "q_attn", "c_proj", "c_fc")
"""transformers' ``Conv1D`` layers, which store their weight as (in, out)."""


@dataclass(frozen=True)
class Binding:
    """An adapter's deltas on the model's tensors, its new layers, and the names of tensors left out."""

    bound: tuple[Bound, ...]
    heads: tuple[ModuleDelta, ...]
    tensors_used: int
    unmatched: tuple[str, ...]
    placed: Mapping[tuple[str, str], str]


def bind(
    checkpoint: Checkpoint,
    structure: Structure,
    adapter: Adapter,
    *,
    renames: tuple[str, ...] = (),
    expert_layout: str | None = None,
    allow_unmatched: bool = False,
) -> Binding:
    """Find every delta of an adapter its tensor, and turn it the way that is stored.

    Raises AdapterMismatch or Unsupported where one has none, or fits several; see ``naming.match`` and ``placing``.
    """
    matched, left = naming.match(
        adapter,
        structure.tensors,
        checkpoint,
        renames=renames,
        allow_unmatched=allow_unmatched,
    )
    heads = tuple(one for one in left if one.may_be_new)
    grown = _grown(structure, matched)
    bound: list[Bound] = []
    turned = told_by_shape(matched)
    for one in matched:
        if one.view.is_stored and not isinstance(one.source.delta, Stacked):
            bound.append(_bind_whole(checkpoint, adapter, one, grown))
        else:
            bound += _bind_parts(checkpoint, adapter, one, expert_layout, turned)
    _require_distinct(adapter, bound)
    used = [*(one.source for one in matched), *heads]
    return Binding(
        tuple(bound),
        heads,
        sum(len(one.tensors) for one in used) + len(adapter.ignored),
        tuple(name for one in left if not one.may_be_new for name in one.tensors),
        {(one.source.module, one.source.parameter): describe(one) for one in matched},
    )


def _require_distinct(adapter: Adapter, bound: Sequence[Bound]) -> None:
    """Refuse two modules of one adapter for one tensor: they are layers of two models, or of two parts of one."""
    modules: dict[str, str] = {}
    for one in bound:
        first = modules.setdefault(one.target.name, one.source.module) if one.is_whole else one.source.module
        if first != one.source.module:
            raise AdapterMismatch(
                f"{adapter.path}: its modules {first!r} and {one.source.module!r} both fit {one.target.name!r}, "
                "the only such layer of the base; the adapter was trained on a larger model, or --rename joins them"
            )


def _bind_whole(
    checkpoint: Checkpoint, adapter: Adapter, match: naming.Match, grown: Mapping[str, TensorEntry]
) -> Bound:
    """A delta on a parameter that is a tensor of the base."""
    delta = match.source.delta
    flipped = not match.source.stored_as_base and _is_flipped(checkpoint, adapter, match)
    if flipped:
        delta = delta.transposed()
    target = grown.get(match.target.name, match.target)
    if isinstance(delta, TokenRows):
        delta = _on(adapter, target, delta)
    _require_fit(adapter, match, target, delta)
    return Bound(match.target, match.source, delta, flipped)


def _bind_parts(
    checkpoint: Checkpoint, adapter: Adapter, match: naming.Match, layout: str | None, turned: bool | None
) -> Iterator[Bound]:
    """A delta on a parameter that is several tensors of the base, or a part of one."""
    delta, name = match.source.delta, match.source.tensors[0]
    if isinstance(delta, Stacked) and delta.count == 1 and len(match.view.shape) == 2:
        delta = delta.expert(0)
    rows, columns = matrix(match.view, delta)
    if isinstance(delta, Stacked):
        delta = laid_out(adapter, match, layout, checkpoint.config, turned)
    if isinstance(delta, TokenRows):
        delta = replace(delta, shape=(rows, delta.shape[1]))
    if delta.shape != (rows, columns):
        raise AdapterMismatch(
            f"{adapter.path}: the delta for {match.source.module}.{match.source.parameter} has shape "
            f"{list(delta.shape)} and what the base has for it {list(match.view.shape)} ({name}); the adapter was "
            "trained on another model or size"
        )
    try:
        for entry, part in place(match.view, delta):
            _require_float(entry)
            yield Bound(entry, match.source, part, is_whole=False)
    except NotImplementedError as error:
        raise Unsupported(
            f"{adapter.path}: {name!r} would be divided between several weights, which cannot be done with {error}"
        ) from None


def _grown(structure: Structure, matched: Sequence[naming.Match]) -> dict[str, TensorEntry]:
    """Embeddings and output heads, with their biases, that an adapter gives another number of rows, as it has them."""
    grown: dict[str, TensorEntry] = {}
    rows: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for one in sorted(matched, key=lambda one: len(one.target.shape), reverse=True):
        new, old = one.source.delta.entries[0], one.target
        if not one.view.is_stored or not isinstance(one.source.delta, Replacement):
            continue
        if new.shape == old.shape or new.shape[1:] != old.shape[1:]:
            continue
        labels = one.source.may_be_new and LABELS.search(old.name)
        tokens = layer(old.name) in EMBEDDINGS + HEADS or (old.shape[:1], new.shape[:1]) in rows
        if not new.shape or not (labels or tokens):
            continue
        if labels:
            grown[old.name] = replace(old, shape=new.shape)
            continue
        rows.add((old.shape[:1], new.shape[:1]))
        for name in structure.group(old.name) if one.source.shared else (old.name,):
            grown[name] = replace(old, name=name, shape=new.shape)
    return grown


def _on(adapter: Adapter, target: TensorEntry, delta: TokenRows) -> TokenRows:
    """Token rows on the weight that they are rows of."""
    rows = target.matrix[0]
    beyond = [token for token in delta.tokens if token >= rows]
    if beyond:
        raise AdapterMismatch(
            f"{adapter.path}: {delta.new.name!r} has a row for token {beyond[0]}, but {target.name!r} has only "
            f"{rows}; the adapter was trained on a larger vocabulary: save it with save_embedding_layers=True"
        )
    return replace(delta, shape=(rows, delta.shape[1]))


def _is_flipped(checkpoint: Checkpoint, adapter: Adapter, match: naming.Match) -> bool:
    """Whether the base stores this weight as (in, out): by its shape, else by the layer's kind, else by the flag.

    PEFT, too, corrects the flag by the layer's kind; it is the last word only on models that transformers doesn't have.
    """
    shape = match.target.matrix
    if shape[0] != shape[1]:
        return match.source.delta.shape == (shape[1], shape[0])
    parts = [checkpoint.config, *(one for one in checkpoint.config.values() if isinstance(one, Mapping))]
    if any(part.get("model_type") in CONV1D_MODELS for part in parts):
        return match.source.module.rsplit(".", 1)[-1] in CONV1D_MODULES
    foreign = "model_type" not in checkpoint.config or "auto_map" in checkpoint.config
    return foreign and bool(adapter.fan_in_fan_out)


def _require_fit(adapter: Adapter, match: naming.Match, target: TensorEntry, delta: Delta) -> None:
    _require_float(target)
    stored = delta.entries[0].shape
    rows, columns = delta.shape
    shape = (rows, columns // max(1, prod(stored[2:])), *stored[2:])[: len(stored)]
    if shape != target.shape:
        raise AdapterMismatch(
            f"{adapter.path}: the delta for {target.name!r} has shape {list(shape)} and the base tensor "
            f"{list(target.shape)} ({match.source.tensors[0]}); the adapter was trained on another model or size"
        )


def _require_float(target: TensorEntry) -> None:
    if target.dtype not in FLOATS:
        raise Unsupported(f"the base stores {target.name!r} as {target.dtype}, to which no delta can be added")
