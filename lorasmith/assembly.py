"""Every tensor of the result that is not simply the base's: what it is read from, and what is added to it.

deltas are gathered tensor by tensor; a replacement of another shape becomes what the tensor is read from
a change of what a tied layer repeats (``shared``) goes to all that repeat it
tied tensors that still change alike stay tied; others are stored one by one, and the config says so
layers that the base lacks are new tensors
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from lorasmith.adapter import Adapter, ModuleDelta
from lorasmith.checkpoint import Checkpoint
from lorasmith.combining.combined import draw_name
from lorasmith.deltas import Delta
from lorasmith.deltas.patchwork import Patchwork, clash, join
from lorasmith.deltas.replacement import Replacement
from lorasmith.errors import AdapterMismatch, Unsupported, listed
from lorasmith.naming.ties import EMBEDDINGS, HEADS, gain, layer
from lorasmith.records import Term
from lorasmith.safefile import TensorEntry, equal_bytes
from lorasmith.structure import LABELS, Structure, config_changes


@dataclass(frozen=True)
class Bound:
    """One delta on one tensor of the model, turned the way that is stored; ``flipped`` if that is (inputs, outputs).

    ``is_whole`` says that it is all of the source's, and about all of the tensor.
    """

    target: TensorEntry
    source: ModuleDelta
    delta: Delta
    flipped: bool = False
    is_whole: bool = True


@dataclass(frozen=True)
class Slot:
    """A tensor of the result: ``gain · (what is read from entry + Σ terms)``."""

    name: str
    entry: TensorEntry
    terms: tuple[Term, ...] = ()
    gain: float = 1.0


@dataclass(frozen=True)
class Assembly:
    """Tensors that change (by name), tensors that the base lacks or has too many, and the config's keys that change."""

    changed: Mapping[str, Slot]
    added: tuple[Slot, ...]
    dropped: frozenset[str]
    config: Mapping[str, Any]


@dataclass
class _Draft:
    """What becomes of one tensor, while it is put together."""

    entry: TensorEntry
    terms: list[Term] = field(default_factory=list)
    owner: int | None = None
    resized: bool = False

    def slot(self, name: str, gain: float = 1.0) -> Slot:
        return Slot(name, self.entry, tuple(_seen_alike(self.terms)), gain)


def assemble(
    checkpoint: Checkpoint,
    structure: Structure,
    adapters: Sequence[tuple[Adapter, float]],
    bound: Sequence[Sequence[Bound]],
    heads: Sequence[Sequence[ModuleDelta]],
) -> Assembly:
    """Put the deltas of all adapters (``bound``) and their new layers (``heads``) together.

    Raises AdapterMismatch or Unsupported for changes that exclude each other or that the result could not express.
    """
    drafts: dict[str, _Draft] = {}
    stored = {entry.name for entry in checkpoint.entries}
    _resize(structure, adapters, bound, drafts)
    _gather(structure, adapters, bound, drafts)
    _join(adapters, drafts)
    _require_known_ties(checkpoint, structure, drafts)
    loose = _settle_ties(structure, stored, drafts)
    if loose and not checkpoint.config:
        raise Unsupported(
            f"the adapter changes {listed(sorted(loose))}, which the model may tie to another layer, and "
            f"{checkpoint.path} has no config.json beside it that could say so; put the model's config there"
        )
    new = _new_layers(structure, adapters, heads)
    gains = {name: gain(checkpoint.config) for name in loose if layer(name) in HEADS}
    added = [name for name in structure.tensors if name not in stored and (name in loose or name not in structure.ties)]
    slots = {
        name: drafts.get(name, _Draft(structure.tensors[name])).slot(name, gains.get(name, 1.0))
        for name in [*added, *drafts, *(name for name, value in gains.items() if value != 1)]
        if name in structure.tensors
    }
    return Assembly(
        changed={**_moved(checkpoint, structure), **{name: slots[name] for name in slots if name in stored}},
        added=(*(slots[name] for name in added), *new),
        dropped=frozenset(stored - structure.tensors.keys()),
        config=config_changes(
            checkpoint,
            structure,
            untied=bool(loose),
            rows=_require_equal_rows(structure, drafts, loose),
            heads={slot.name: slot.entry.shape[0] for slot in new if slot.entry.shape},
        ),
    )


def _moved(checkpoint: Checkpoint, structure: Structure) -> dict[str, Slot]:
    """Tensors of the base in whose place the model has a copy of another layer."""
    if structure.layer_map is None:
        return {}
    pairs = ((entry, structure.tensors.get(entry.name)) for entry in checkpoint.entries)
    return {entry.name: Slot(entry.name, now) for entry, now in pairs if now is not None and now != entry}


# ------------------------------------------------------------------------------------------------------- deltas


Weighted = Sequence[tuple[Adapter, float]]


def _each(adapters: Weighted, bound: Sequence[Sequence[Bound]]) -> Iterator[tuple[int, Adapter, float, Bound]]:
    """Every delta, with the position of its adapter, the adapter and its weight."""
    for position, ((adapter, weight), some) in enumerate(zip(adapters, bound, strict=True)):
        for one in some:
            yield position, adapter, weight * one.source.weight, one


def _others(structure: Structure, one: Bound) -> list[str]:
    """The tensors beside its own that a change of what tied layers repeat goes to.

    One that is stored with values of its own is not tied in truth, so that what its layer was saved with is not that
    of the others; token rows PEFT replaces in all of them.
    """
    if not one.source.shared:
        return []
    others = [member for member in structure.group(one.target.name) if member != one.target.name]
    if not isinstance(one.delta, Replacement):
        return others
    mine = structure.tensors[one.target.name]
    return [member for member in others if equal_bytes(mine, structure.tensors[member])]


def _resize(
    structure: Structure,
    adapters: Weighted,
    bound: Sequence[Sequence[Bound]],
    drafts: dict[str, _Draft],
) -> None:
    """Let tensors whose replacement has another number of rows be read from it."""
    for position, adapter, weight, one in _each(adapters, bound):
        new = one.delta.new if isinstance(one.delta, Replacement) else None
        if new is None or new.shape == one.target.shape or one.delta.shape == one.target.matrix:
            continue
        if weight != 1:
            raise AdapterMismatch(
                f"{adapter.path}: {new.name!r} has {new.shape[0]} rows and {one.target.name!r} has "
                f"{one.target.shape[0]}; what changes a shape must have the weight 1, not {weight:g}"
            )
        for name in [one.target.name, *_others(structure, one)]:
            draft = drafts.setdefault(name, _Draft(new, owner=position, resized=True))
            if draft.owner != position:
                raise AdapterMismatch(
                    f"{adapter.path} and {adapters[draft.owner or 0][0].path} both give {name!r} a new shape; "
                    "merge them one by one"
                )
            draft.entry = new
    for source in set(structure.ties.values()) & drafts.keys():
        for member in structure.group(source):  # what nobody resized follows the one that it repeats
            drafts.setdefault(member, replace(drafts[source], terms=[]))


def _gather(
    structure: Structure,
    adapters: Weighted,
    bound: Sequence[Sequence[Bound]],
    drafts: dict[str, _Draft],
) -> None:
    """Give every tensor its terms; an adapter at weight 0 has none."""
    own = [
        {one.target.name for one in some if one.source.shared or isinstance(one.delta, Replacement)} for some in bound
    ]
    for position, adapter, weight, one in _each(adapters, bound):
        name = one.target.name
        # what an adapter says of a tied layer itself is not what it says of the layer that this one repeats
        for member in [name, *(other for other in _others(structure, one) if other not in own[position])]:
            draft = drafts.get(member)
            if draft is not None and draft.resized and isinstance(one.delta, Replacement):
                continue
            _require_rows(adapter, one, draft.entry if draft else structure.tensors[member])
            if weight != 0:
                term = Term(one.delta, weight, position, draw_name(one.source) if one.is_whole else "", one.flipped)
                drafts.setdefault(member, _Draft(structure.tensors[member])).terms.append(term)
    for draft in drafts.values():
        draft.terms = _once(draft.terms)


def _once(terms: Sequence[Term]) -> list[Term]:
    """The terms without a tensor trained whole that another adapter has as well, to the bit, both at the weight 1."""
    kept: list[Term] = []
    for term in terms:
        new = term.delta.new if isinstance(term.delta, Replacement) and term.factor == 1 else None
        if new is None or not any(
            isinstance(one.delta, Replacement) and one.factor == 1 and equal_bytes(one.delta.new, new) for one in kept
        ):
            kept.append(term)
    return kept


def _seen_alike(terms: Sequence[Term]) -> Iterator[Term]:
    """The terms of one tensor, all of one shape: stacked experts may be seen as (experts, …) and as (all rows, …)."""
    shapes = {term.delta.shape for term in terms if not isinstance(term.delta, Replacement)}
    for term in terms:
        if len(shapes) == 1 and isinstance(term.delta, Replacement) and term.delta.shape not in shapes:
            (shape,) = shapes
            yield replace(term, delta=Replacement(replace(term.delta.new, shape=shape)))
        else:
            yield term


def _join(adapters: Weighted, drafts: Mapping[str, _Draft]) -> None:
    """Make one patchwork of what the modules of one adapter do to one tensor; they must do it to different rows."""
    for name, draft in drafts.items():
        works: dict[int, list[Patchwork]] = {}
        for term in _weighted_alike(draft.terms) if len(draft.terms) > 1 else ():
            if isinstance(term.delta, Patchwork):
                works.setdefault(term.adapter, []).append(term.delta)
        for position, several in works.items():
            whole = [term for term in draft.terms if term.adapter == position and not isinstance(term.delta, Patchwork)]
            joined = join(several)
            if whole or clash(joined):
                raise AdapterMismatch(
                    f"{adapters[position][0].path}: two of its modules change the same rows of {name!r}; it was put "
                    "together of adapters for different versions of the model"
                )
            factors = {term.factor for term in draft.terms if term.adapter == position}
            factor = factors.pop() if len(factors) == 1 else 1.0
            others = [term for term in draft.terms if term.adapter != position]
            draft.terms = [*others, Term(joined, factor, position)]
        draft.terms.sort(key=lambda term: term.adapter)


def _weighted_alike(terms: Sequence[Term]) -> Iterator[Term]:
    """The terms, those of one adapter all with one factor: what differs goes into their patches."""
    factors: dict[int, set[float]] = {}
    for term in terms:
        factors.setdefault(term.adapter, set()).add(term.factor)
    for term in terms:
        if len(factors[term.adapter]) > 1 and isinstance(term.delta, Patchwork):
            patches = tuple(replace(patch, factor=patch.factor * term.factor) for patch in term.delta.patches)
            yield replace(term, delta=replace(term.delta, patches=patches), factor=1.0)
        else:
            yield term


def is_stacked(shape: tuple[int, int], entry: TensorEntry) -> bool:
    """Whether a tensor of three dimensions is seen as the rows of all its matrices, one below the other."""
    return len(entry.shape) == 3 and shape == (entry.shape[0] * entry.shape[1], entry.shape[2])


def _require_rows(adapter: Adapter, one: Bound, entry: TensorEntry) -> None:
    """Refuse a delta that does not fit what another one has made of its tensor."""
    if one.delta.shape != entry.matrix and not is_stacked(one.delta.shape, entry):
        raise AdapterMismatch(
            f"{adapter.path}: the delta for {one.target.name!r} has shape {list(one.delta.shape)} and the tensor "
            f"{list(entry.shape)} ({one.source.tensors[0]}); the adapter was trained on another model or size"
        )


def _require_equal_rows(structure: Structure, drafts: Mapping[str, _Draft], loose: set[str]) -> dict[str, int]:
    """The new number of rows of tensors that have one; all embeddings and heads of as many before must agree."""
    resized = {name: draft.entry.shape[0] for name, draft in drafts.items() if draft.resized}
    rows = {name: count for name, count in resized.items() if not LABELS.search(name)}
    before = {structure.tensors[name].shape[0] for name in rows}
    for name, entry in structure.tensors.items():
        is_tied = name in structure.ties and name not in loose
        is_bias = name.endswith("bias") and math.prod(entry.shape) in before.intersection(entry.shape)
        counts_tokens = is_bias or (layer(name) in EMBEDDINGS + HEADS and entry.shape[:1] and entry.shape[0] in before)
        if is_tied or not counts_tokens or name in rows:
            continue
        remedy = "resize the base itself and save it" if is_bias else "save the adapter with save_embedding_layers=True"
        raise AdapterMismatch(
            f"the adapter gives {listed(sorted(rows))} {next(iter(rows.values()))} rows, but {name!r} stays at "
            f"{math.prod(entry.shape) if is_bias else entry.shape[0]}; {remedy}, so that both have as many"
        )
    if len(set(rows.values())) > 1:
        raise AdapterMismatch(f"the adapter gives the vocabulary different sizes: {rows}")
    return resized


# --------------------------------------------------------------------------------------------------------- ties


def _require_known_ties(checkpoint: Checkpoint, structure: Structure, drafts: Mapping[str, _Draft]) -> None:
    """Refuse changes to what the model may use twice, where that cannot be told."""
    touched = [name for name in drafts if layer(name) in EMBEDDINGS + HEADS]
    if touched and not structure.ties_known:
        raise Unsupported(
            f"the adapter changes {listed(touched)}, and which layers {structure.architecture} ties to it cannot be "
            f"told from the names in {checkpoint.path}; if the base was saved without its head, save it with that"
        )


def _settle_ties(structure: Structure, stored: Set[str], drafts: dict[str, _Draft]) -> set[str]:
    """Names of the tied tensors that must be stored one by one; of those that change alike, one draft remains."""
    groups = [structure.group(source) for source in set(structure.ties.values())]
    names = {name for group in groups for name in group}
    for group in groups:
        touched = not drafts.keys().isdisjoint(group)
        if touched and not all(_is_same(structure, drafts, group[0], name) for name in group):
            return names  # of all groups: the flag is one for all ties of a model
    for name in names - stored:
        drafts.pop(name, None)
    return set()


def _is_same(structure: Structure, drafts: Mapping[str, _Draft], source: str, member: str) -> bool:
    """Whether two tied tensors are still the same after all their changes."""
    one, other = (drafts.get(name, _Draft(structure.tensors[name])) for name in (source, member))
    is_read_alike = (one.entry.file, one.entry.start) == (other.entry.file, other.entry.start)
    if not is_read_alike and not (one.resized and other.resized and equal_bytes(one.entry, other.entry)):
        return False
    return len(one.terms) == len(other.terms) and all(
        mine.factor == theirs.factor and _equal(mine.delta, theirs.delta)
        for mine, theirs in zip(one.terms, other.terms, strict=True)
    )


def _equal(one: Delta, other: Delta) -> bool:
    """Whether two deltas are made of the same numbers, as PEFT saves them for layers that it keeps tied."""
    if one == other:
        return True
    if one.kind != other.kind or one.shape != other.shape or one.scale != other.scale:
        return False
    mine, theirs = one.low_rank(), other.low_rank()
    if mine is None or theirs is None:
        return isinstance(one, Replacement) and isinstance(other, Replacement) and equal_bytes(one.new, other.new)
    pairs = zip(mine.products, theirs.products, strict=True)
    return all(
        equal_bytes(a.left.entry, b.left.entry, flipped=a.left.flipped != b.left.flipped)
        and equal_bytes(a.right.entry, b.right.entry, flipped=a.right.flipped != b.right.flipped)
        for a, b in pairs
    )


# --------------------------------------------------------------------------------------------------- new layers


def _new_layers(
    structure: Structure, adapters: Sequence[tuple[Adapter, float]], heads: Sequence[Sequence[ModuleDelta]]
) -> list[Slot]:
    """Tensors that only an adapter has; one adapter must own them, at weight 1."""
    slots: dict[str, Slot] = {}
    for (adapter, weight), some in zip(adapters, heads, strict=True):
        for one in some:
            name = f"{one.module}.{one.parameter}"
            if weight * one.weight != 1:
                raise AdapterMismatch(
                    f"{adapter.path}: {one.tensors[0]!r} is a layer that the base lacks, so its weight must be 1, "
                    f"not {weight * one.weight:g}"
                )
            if not structure.takes_heads:
                raise AdapterMismatch(
                    f"{adapter.path}: {one.tensors[0]!r} is a layer that {structure.architecture} has not, and the "
                    "adapter's config has no task_type that would say which class has; name it with --architecture"
                )
            if name in slots and equal_bytes(slots[name].entry, one.delta.entries[0]):
                continue
            if name in slots:
                raise AdapterMismatch(f"{adapter.path}: {name!r} is a new layer of another adapter as well")
            slots[name] = Slot(name, one.delta.entries[0])
    return list(slots.values())
