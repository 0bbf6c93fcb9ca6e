"""Which base tensor an adapter's module means.

An adapter's names are the module paths of the model it was trained in; a checkpoint's names are what was saved.
They are equal for most models. They differ by a prefix where a head was put on or taken off (``bert.encoder…`` and
``encoder…``), and by a renaming where transformers renames modules on loading (``renamings``). One such rule must
fit a whole adapter: names are never matched one by one by likeness.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorasmith.adapter import Adapter, ModuleDelta
from lorasmith.checkpoint import Checkpoint
from lorasmith.errors import AdapterMismatch, listed
from lorasmith.naming.renamings import runtime_name
from lorasmith.safefile import TensorEntry

_COMPARED = 5000
"""Names that a missing one is compared with, to tell the nearest."""


@dataclass(frozen=True)
class Match:
    """One of an adapter's deltas, bound to the base tensor it changes."""

    target: TensorEntry
    source: ModuleDelta


def match(
    adapter: Adapter, tensors: Mapping[str, TensorEntry], checkpoint: Checkpoint, *, allow_unmatched: bool
) -> tuple[list[Match], list[ModuleDelta]]:
    """Bind every delta of the adapter to one of the model's tensors; also those left over, where that is allowed.

    Raises AdapterMismatch when some find no tensor (unless ``allow_unmatched``), or when two rules fit equally.
    """
    best: dict[str, TensorEntry] = {}
    wanted = [one.path for one in adapter.deltas]
    for names in _namings(tensors, checkpoint):
        found = _bind(adapter, wanted, names)
        if len(found) > len(best):
            best = found
        if len(best) == len(set(wanted)):
            break
    matched = [Match(best[name], one) for name, one in zip(wanted, adapter.deltas, strict=True) if name in best]
    left = [one for name, one in zip(wanted, adapter.deltas, strict=True) if name not in best]
    lost = [one for one in left if not one.may_be_new]
    if lost and not (allow_unmatched and matched):
        raise AdapterMismatch(_describe(adapter, checkpoint, lost, bool(matched)))
    return matched, left


def _namings(tensors: Mapping[str, TensorEntry], checkpoint: Checkpoint) -> Iterator[Mapping[str, TensorEntry]]:
    """The model's tensors by the names an adapter may know them by: as stored, then as transformers runs them."""
    yield tensors
    runtime = {runtime_name(checkpoint.config, name): entry for name, entry in tensors.items()}
    if len(runtime) == len(tensors) and runtime.keys() != tensors.keys():
        yield runtime


def _bind(adapter: Adapter, wanted: Sequence[str], names: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The longest binding under one prefix rule; the plain names win over any rule that binds no more."""
    best = {name: names[name] for name in wanted if name in names}
    if len(best) == len(set(wanted)):
        return best
    fits: list[tuple[str, str]] = []
    for strip, add in _prefix_rules(wanted, names):
        moves = ((name, _move(name, strip, add)) for name in wanted)
        found = {name: names[moved] for name, moved in moves if moved in names}
        if len(found) > len(best):
            best, fits = found, [(strip, add)]
        elif fits and len(found) == len(best):
            fits.append((strip, add))
    if len(fits) > 1:
        rules = [f"{strip or '(nothing)'} → {add or '(nothing)'}" for strip, add in fits]
        raise AdapterMismatch(
            f"{adapter.path}: its module names fit the base in {len(fits)} ways ({listed(rules)}); "
            "which one is meant cannot be known"
        )
    return best


def _move(name: str, strip: str, add: str) -> str:
    """The name under a rule; what does not have the prefix stands outside of it, as a head does."""
    return add + name.removeprefix(strip) if name.startswith(strip) else name


def _prefix_rules(wanted: Sequence[str], names: Iterable[str]) -> list[tuple[str, str]]:
    """Prefixes to take off and put on, read off the base tensors that end like some of the wanted names."""
    rules: dict[tuple[str, str], None] = {}
    by_tail: dict[str, list[str]] = {}
    for name in names:
        by_tail.setdefault(_tail(name), []).append(name)
    for name in wanted[:: max(1, len(wanted) // 8)]:
        for candidate in by_tail.get(_tail(name), []):
            if name.endswith("." + candidate):
                rules[name.removesuffix(candidate), ""] = None
            elif candidate.endswith("." + name):
                rules["", candidate.removesuffix(name)] = None
    return list(rules)


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _describe(adapter: Adapter, checkpoint: Checkpoint, left: list[ModuleDelta], some: bool) -> str:
    missing = [name for one in left for name in one.tensors]
    wanted = left[0].path
    alike = [entry.name for entry in checkpoint.entries if _tail(entry.name) == _tail(wanted)]
    names = alike or [entry.name for entry in checkpoint.entries]
    near = difflib.get_close_matches(wanted, names[:_COMPARED], n=2, cutoff=0.5)
    total = adapter.tensor_count
    text = f"{adapter.path}: {len(missing)} of {total} tensors have no weight in {checkpoint.path}: {listed(missing)}. "
    if near:
        text += f"Nearest to {wanted} {'are' if len(near) > 1 else 'is'} {listed(near)}. "
    if not some:
        text += "The adapter was probably trained on another model. "
    if some:
        text += "Use --allow-unmatched to merge only what fits."
    return text.strip()
