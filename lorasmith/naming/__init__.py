"""Which base tensors an adapter's module means.

An adapter's names are the module paths of the model it was trained in; a checkpoint's names are what was saved. A
parameter of the one may be several tensors of the other, or a part of one:

    as stored     the checkpoint's own names
    as run        what transformers 5 makes of them on loading                          (conversions)
    by parts      experts and fused layers that one side has in one piece               (fusing)
    under stems   what stands before the layers, of language models and others          (stems)

One reading must fit a whole adapter: names are never matched one by one by likeness.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lorasmith.adapter import Adapter, ModuleDelta
from lorasmith.checkpoint import Checkpoint
from lorasmith.deltas.experts import Stacked
from lorasmith.deltas.replacement import Replacement
from lorasmith.errors import AdapterMismatch, BadOption, listed
from lorasmith.naming import stems
from lorasmith.naming.conversions import LONGEST, Made, path_of, runtime_names, steps_of
from lorasmith.naming.fusing import Names, divided, fused_or_split
from lorasmith.naming.tiles import CannotCompute, Facts, View, made, whole
from lorasmith.safefile import TensorEntry

_COMPARED = 5000
"""Names that a missing one is compared with, to tell the nearest."""


UNFIT = (CannotCompute, ValueError, IndexError)
"""What comes of rearranging tensors that have other dimensions than the rule is for."""


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, CannotCompute) else "its tensors have not the dimensions that they should"


@dataclass(frozen=True)
class Match:
    """One of an adapter's deltas, bound to what the base has for its parameter."""

    source: ModuleDelta
    view: View

    @property
    def target(self) -> TensorEntry:
        """The stored tensor, or the first of several."""
        return self.view.tiles[0].entry


@dataclass(frozen=True)
class _Naming:
    """The parameters of a model by the names that one reading of the checkpoint gives them."""

    checkpoint: Checkpoint
    tensors: Mapping[str, TensorEntry]
    known: Mapping[str, str | Made]
    views: dict[str, View | None] = field(default_factory=dict)
    obstacles: dict[str, str] = field(default_factory=dict)
    doubts: dict[str, list[str]] = field(default_factory=dict)

    @property
    def is_part(self) -> bool:
        """Whether the base is a part of a model by itself: a tower, an encoder or a decoder."""
        return (
            re.search(r"Vision|Visual|Image|Audio|Speech|Encoder|Decoder", _architecture(self.checkpoint) or "")
            is not None
        )

    def view(self, name: str) -> View | None:
        """What a parameter consists of; None where it is not known by this name."""
        if name not in self.views:
            self.views[name] = self._made(name)
        return self.views[name]

    def _made(self, name: str) -> View | None:
        source = self.known.get(name)
        if source is None:
            return None
        if isinstance(source, str):
            return whole(self.tensors[source])
        sources = {
            pattern: [whole(self.tensors[one]) for one in group]
            for pattern, group in zip(source.step.sources, source.sources, strict=True)
            if group
        }
        facts = Facts(self.checkpoint.config, functools.partial(divided, self.checkpoint.config))
        try:
            found = made(source.step.operations, sources, source.step.targets, facts)
        except UNFIT as error:
            self.obstacles[name] = _why(error)
            return None
        return found[source.step.targets[source.target]]

    @functools.cached_property
    def names(self) -> Names:
        return Names(self.view, self.known, self.checkpoint.config)

    def find(self, name: str) -> View | None:
        """What a parameter consists of, also where the base has it in other pieces."""
        view = self.view(name)
        if view is not None or len(name) > LONGEST:
            return view
        try:
            return fused_or_split(name, self.names)
        except UNFIT as error:
            self.obstacles[name] = _why(error)
            return None

    @functools.cached_property
    def stems(self) -> Sequence[str]:
        return list(stems.stems(self.known))


def match(
    adapter: Adapter,
    tensors: Mapping[str, TensorEntry],
    checkpoint: Checkpoint,
    *,
    renames: Sequence[str] = (),
    allow_unmatched: bool,
) -> tuple[list[Match], list[ModuleDelta]]:
    """Bind every delta of the adapter to the model's tensors; also those left over, where that is allowed.

    ``renames`` (``REGEX=REPLACEMENT``) are applied to the adapter's names first. Raises AdapterMismatch when some find
    no tensor (unless ``allow_unmatched``), or when two readings fit equally; BadOption for a rename that does nothing.
    """
    wanted = _renamed([one.path for one in adapter.deltas], renames)
    pairs = list(zip(wanted, adapter.deltas, strict=True))  # several may be of one name
    deltas = dict(pairs)
    steps = steps_of(checkpoint.config, _architecture(checkpoint))
    running = functools.cache(lambda: _Naming(checkpoint, tensors, runtime_names(steps, list(tensors))))
    part = _part(adapter, checkpoint)
    if part is not None:
        views = {name: view for name in deltas if (view := running().find(part + name)) is not None}
        if views.keys() == deltas.keys():
            return [Match(one, views[name]) for name, one in pairs], []
    stored = _Naming(checkpoint, tensors, {name: name for name in tensors})
    namings = [stored]
    best = _plain(stored, deltas)
    if len(steps) > len(steps_of({}, None)) or len(best) < len(deltas):
        run = running()
        namings.append(run)
        if len(best) == len(deltas) and deltas.keys() <= run.known.keys():
            best = _agreed(adapter, deltas, best, {name: run.view(name) for name in deltas})
    for read in (_plain, _under_rule, _under_stems):
        if len(best) < len(deltas):
            best = max(best, *(read(naming, deltas) for naming in namings), key=len)
    matched = [Match(one, best[name]) for name, one in pairs if name in best]
    left = [one for name, one in pairs if name not in best]
    lost = [(name, one) for name, one in pairs if name not in best and not one.may_be_new]
    doubtful = next((naming for naming in namings if naming.doubts and (lost or _is_torn(naming, deltas))), None)
    if doubtful is not None:
        raise _in_doubt(adapter, doubtful)
    if lost and not (allow_unmatched and matched):
        raise AdapterMismatch(_describe(adapter, namings, lost, bool(matched)))
    return matched, left


def _architecture(checkpoint: Checkpoint) -> str | None:
    """The class that a checkpoint's config names."""
    names = checkpoint.config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _part(adapter: Adapter, checkpoint: Checkpoint) -> str | None:
    """What stands before the names of an adapter that was trained on a part of the base alone, by that part's class."""
    path = path_of(checkpoint.config, _architecture(checkpoint), adapter.trained_class)
    return None if path is None else f"{path}."


def _renamed(wanted: list[str], renames: Sequence[str]) -> list[str]:
    """The names after every ``REGEX=REPLACEMENT``."""
    for rename in renames:
        pattern, sign, replacement = rename.rpartition("=")
        try:
            now = [re.sub(pattern, replacement, name) for name in wanted]
        except (re.error, IndexError) as error:
            raise BadOption(f"--rename {rename!r}: {error}") from None
        if not sign or not pattern:
            raise BadOption(f"--rename {rename!r} is not REGEX=REPLACEMENT")
        if now == wanted:
            raise BadOption(f"--rename {rename!r} changes none of the adapter's names, which are like {wanted[0]!r}")
        wanted = now
    return wanted


def _agreed(
    adapter: Adapter, deltas: Mapping[str, ModuleDelta], stored: Mapping[str, View], run: Mapping[str, View | None]
) -> dict[str, View]:
    """What an adapter means that fits the checkpoint's own names and the running model's; refuse it where they differ.

    What is stored the other way round is told by the shape of what takes its place; factors fit it either way.
    """
    agreed = dict(stored)
    for name, delta in deltas.items():
        mine, theirs = stored[name], run[name]
        if theirs is None or mine == theirs or (isinstance(delta.delta, Stacked) and _same_tensors(mine, theirs)):
            continue
        new = delta.delta.new.shape if isinstance(delta.delta, Replacement) else None
        if mine.shape != theirs.shape and new in (mine.shape, theirs.shape):
            agreed[name] = mine if new == mine.shape else theirs
            continue
        ours, running = mine.tiles[0].entry.name, theirs.tiles[0].entry.name
        raise AdapterMismatch(
            f"{adapter.path}: {name!r} is {ours!r} by the checkpoint's names and {running!r} by those that "
            "transformers gives the running model; which one is meant cannot be known. Say it with "
            f"--rename '^{re.escape(name)}$=NAME'"
        )
    return agreed


def _same_tensors(one: View, other: View) -> bool:
    return {tile.entry.name for tile in one.tiles} == {tile.entry.name for tile in other.tiles}


def _plain(naming: _Naming, deltas: Mapping[str, ModuleDelta]) -> dict[str, View]:
    """The parameters that are found under their names."""
    return {name: view for name in deltas if (view := naming.find(name)) is not None}


def _under_rule(naming: _Naming, deltas: Mapping[str, ModuleDelta]) -> dict[str, View]:
    """The longest binding under one prefix rule; the plain names win over any rule that binds no more."""
    best = plain = _plain(naming, deltas)
    fits: list[tuple[str, str]] = []
    for strip, add in stems.prefix_rules(list(deltas), naming.known, parts=naming.is_part):
        moves = ((name, add + name.removeprefix(strip) if name.startswith(strip) else name) for name in deltas)
        found = {name: view for name, moved in moves if (view := naming.find(moved)) is not None}
        if len(found) > len(best):
            best, fits = found, [(strip, add)]
        elif fits and len(found) == len(best):
            fits.append((strip, add))
    if len(fits) > 1:
        first = fits[0][0]
        several = [add for strip, add in fits if strip == first]
        if len(several) > 1:
            naming.doubts[first] = several
        return plain
    return best


def _under_stems(naming: _Naming, deltas: Mapping[str, ModuleDelta]) -> dict[str, View]:
    """The binding with each of the adapter's stems mapped to one of the base's."""

    def fits(stem: str, rests: Sequence[str]) -> bool:
        return all(naming.find(stem + rest) is not None for rest in rests)

    mapping, doubtful = stems.settle(list(deltas), naming.stems, fits, parts=naming.is_part)
    for stem, several in doubtful:
        one = _by_shape(stem, several, naming, deltas)
        if isinstance(one, str):
            mapping[stem] = one
            naming.doubts.pop(stem, None)
        else:
            naming.doubts[stem] = one
    found = _plain(naming, deltas)
    for name in deltas:
        parts = stems.stem_of(name)
        if parts is not None and parts[0] in mapping:
            moved = [mapping[parts[0]] + parts[1]]
        else:
            moved = [name] if name in found else list(stems.moves(name, mapping, naming.stems))
        views = [view for one in moved if (view := naming.find(one)) is not None]
        if len({view.tiles[0].entry.name for view in views}) == 1:
            found[name] = views[0]
    return found


def _by_shape(stem: str, several: Sequence[str], naming: _Naming, deltas: Mapping[str, ModuleDelta]) -> str | list[str]:
    """The one of several stems whose weights have the shapes of the adapter's deltas; else those left."""
    mine = [(name, name.removeprefix(stem)) for name in deltas if (parts := stems.stem_of(name)) and parts[0] == stem]
    fit = [
        one
        for one in several
        if all(_has_shape(naming.find(one + rest), deltas[name].delta.shape) for name, rest in mine)
    ]
    return fit[0] if len(fit) == 1 else fit or list(several)


def _is_torn(naming: _Naming, deltas: Mapping[str, ModuleDelta]) -> bool:
    """Whether layers that nothing stands before are those of several parts of the base, whatever else fits them."""
    is_bare = any((stems.stem_of(name) or ("?", ""))[0] == "" for name in deltas)
    return "" in naming.doubts and is_bare and not isinstance(_by_shape("", naming.doubts[""], naming, deltas), str)


def _in_doubt(adapter: Adapter, naming: _Naming) -> AdapterMismatch:
    stem, fit = next(iter(naming.doubts.items()))
    ways = [f"--rename '^{re.escape(stem)}={one}'" for one in fit[:3]]
    return AdapterMismatch(
        f"{adapter.path}: its module names under {stem or 'no prefix'!r} fit the base in {len(fit)} ways "
        f"({listed([one or '(nothing)' for one in fit])}); which one is meant cannot be known. Say it with "
        f"{' or '.join(ways)}"
    )


def _has_shape(view: View | None, shape: tuple[int, int]) -> bool:
    if view is None:
        return False
    rows, columns = (view.shape[0] if view.shape else 1), 1
    for length in view.shape[1:]:
        columns *= length
    return shape in ((rows, columns), (columns, rows)) or len(view.shape) > 2


def _describe(adapter: Adapter, namings: Sequence[_Naming], lost: Sequence[tuple[str, ModuleDelta]], some: bool) -> str:
    missing = [name for _, one in lost for name in one.tensors]
    wanted = lost[0][0]
    checkpoint, obstacles = namings[0].checkpoint, [one.obstacles[wanted] for one in namings if wanted in one.obstacles]
    is_mixed = any(one.find(wanted) is not None for one in namings)
    near = [] if is_mixed else _nearest(wanted, [entry.name for entry in checkpoint.entries])
    total = adapter.tensor_count
    text = f"{adapter.path}: {len(missing)} of {total} tensors have no weight in {checkpoint.path}: "
    text += f"{listed(missing)}. "
    if obstacles:
        text += f"{obstacles[0]}. "
    if is_mixed:
        text += (
            f"The base has {wanted}, but more of the adapter's names fit when they are read as the checkpoint's own, "
            "as the running model's or under another beginning, and one reading must fit all. "
        )
    if near:
        text += f"Nearest to {wanted} {'are' if len(near) > 1 else 'is'} {listed(near)}. "
    if not some:
        text += "The adapter was probably trained on another model. "
    text += "If these are the same layers under other names, say so with --rename 'REGEX=REPLACEMENT'."
    if some:
        text += " Use --allow-unmatched to merge only what fits."
    return text


def _nearest(wanted: str, names: Iterable[str]) -> list[str]:
    everything = list(names)
    alike = [name for name in everything if stems.tail(name) == stems.tail(wanted)]
    return difflib.get_close_matches(wanted, (alike or everything)[:_COMPARED], n=2, cutoff=0.5)
