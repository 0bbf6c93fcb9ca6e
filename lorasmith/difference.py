"""Two models of one shape: which tensor of the one is which of the other, which differ, and by what.

Names are those of the running model, which an adapter is loaded into. A checkpoint may have others: what transformers
renames on loading, what stands before all names where one side was saved without its head, layers that repeat others.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasmith import rows
from lorasmith.checkpoint import Checkpoint
from lorasmith.dtypes import FLOATS, all_finite
from lorasmith.errors import AdapterMismatch, NotFinite, Unsupported, listed
from lorasmith.naming.conversions import Made, runtime_names, steps_of
from lorasmith.naming.ties import EMBEDDINGS, HEADS, gain, layer
from lorasmith.safefile import TensorEntry, equal_bytes
from lorasmith.structure import Structure, open_structure

if TYPE_CHECKING:
    import torch

_LEFT_OVER = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias|num_batches_tracked)$")
"""Buffers that transformers once saved with a model and makes anew on loading; counters that nothing computes with."""

_SPEAKING = (
    "vocab_size", "architectures", "tie_word_embeddings", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "id2label", "label2id", "problem_type", "task_specific_params", "auto_map", "scale_decoder_outputs",
)  # fmt: skip
"""Keys of a config that change nothing in what the model computes, or whose change an adapter carries."""


@dataclass(frozen=True)
class Pair:
    """One tensor of both models, by its ``name`` in the running model: the base's ``old``, the tuned one's ``new``."""

    name: str
    old: TensorEntry
    new: TensorEntry

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def resized(self) -> bool:
        return self.old.shape != self.new.shape

    @property
    def nbytes(self) -> int:
        """Of both, as stored."""
        return self.old.nbytes + self.new.nbytes


@dataclass(frozen=True)
class Paired:
    """All tensors of two models by name; ``groups`` are names of those that both of them hold to be one and the same.

    ``rows`` are the numbers of tokens before and after, where the vocabulary has changed its size.
    """

    pairs: Mapping[str, Pair]
    groups: tuple[tuple[str, ...], ...]
    rows: tuple[int, int] | None
    warnings: tuple[str, ...]


def pair_up(base: Checkpoint, tuned: Checkpoint) -> Paired:
    """Find every tensor of the base its counterpart.

    Raises AdapterMismatch where the models are not of one class, or one of them has tensors or shapes that the other
    has not; a vocabulary of another size is none of these.
    """
    one, other = open_structure(base, [], None), open_structure(tuned, [], None)
    _require_one_class(base, one, tuned, other)
    ours, theirs = _aligned(_named(base, one), _named(tuned, other))
    _require_same_names(base, ours, tuned, theirs)
    pairs = {name: Pair(name, entry, theirs[name]) for name, entry in ours.items() if name in theirs}
    rows = _changed_rows(pairs)
    for found in pairs.values():
        _require_shape(base, tuned, found, rows)
    return Paired(pairs, tuple(_groups(one, pairs)), rows, tuple(_warnings(base, tuned)))


def _require_one_class(base: Checkpoint, one: Structure, tuned: Checkpoint, other: Structure) -> None:
    """Refuse models of two classes, or of two ways to use the same tied weights."""
    kinds = [
        (model.config.get("model_type"), structure.architecture) for model, structure in ((base, one), (tuned, other))
    ]
    if any(mine and theirs and mine != theirs for mine, theirs in zip(*kinds, strict=True)):
        names = [architecture or kind for kind, architecture in kinds]
        raise AdapterMismatch(
            f"{base.path} is a {names[0]} and {tuned.path} a {names[1]}: an adapter changes weights, not a model's "
            "class. Give the model that was tuned as BASE, saved with the same class"
        )
    if gain(base.config) != gain(tuned.config):
        raise AdapterMismatch(
            f"{tuned.path} multiplies what its output head is given by {gain(tuned.config):g} and {base.path} by "
            f"{gain(base.config):g} (tie_word_embeddings), which no adapter can change; save both with the same config"
        )


def _named(model: Checkpoint, structure: Structure) -> dict[str, TensorEntry]:
    """All of a model's tensors as they are called when it runs, without left-over buffers.

    What a running model fuses or divides is called what the file calls it.
    """
    found = _running(model, structure)
    names = {stored: name for name, stored in found.items() if isinstance(stored, str)}
    named = {names.get(name, name): entry for name, entry in structure.tensors.items()}
    return {name: entry for name, entry in named.items() if not _is_left_over(name, entry)}


def _running(model: Checkpoint, structure: Structure) -> Mapping[str, str | Made]:
    """What the parameters of the running model are made of."""
    return runtime_names(steps_of(model.config, structure.architecture), list(structure.tensors))


def divided(model: Checkpoint) -> frozenset[str]:
    """Names of stored tensors that are several of the running model, so that no adapter has a name for them."""
    made = [one for one in _running(model, open_structure(model, [], None)).values() if isinstance(one, Made)]
    counts = Counter(name for one in made for group in one.sources for name in group)
    return frozenset(name for name, count in counts.items() if count > 1)


def _is_left_over(name: str, entry: TensorEntry) -> bool:
    mask = name.endswith(("attn.bias", "attention.bias")) and len(entry.shape) == 4
    return mask or bool(_LEFT_OVER.search(name))


Named = Mapping[str, TensorEntry]


def _aligned(ours: Named, theirs: Named) -> tuple[Named, Named]:
    """Both under the longer names where one lacks the first word of the other's, having been saved without a head."""
    if ours.keys() == theirs.keys():
        return ours, theirs
    for short, long in ((ours, theirs), (theirs, ours)):
        for word in {name.partition(".")[0] for name in long}:
            moved = {f"{word}.{name}" if f"{word}.{name}" in long else name: entry for name, entry in short.items()}
            if moved.keys() == long.keys():
                return (moved, theirs) if short is ours else (ours, moved)
    return ours, theirs


def _require_same_names(base: Checkpoint, ours: Named, tuned: Checkpoint, theirs: Named) -> None:
    lacking, extra = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if not ours.keys() & theirs.keys():
        raise AdapterMismatch(
            f"{base.path} and {tuned.path} have no tensor in common: the one has {listed(lacking)}, the other "
            f"{listed(extra)}; they are different models"
        )
    if lacking or extra:
        facts = [(tuned.path, lacking), (base.path, extra)]
        told = " and ".join(f"{path} lacks {listed(names)}" for path, names in facts if names)
        raise AdapterMismatch(
            f"{told}: an adapter neither adds nor removes tensors. Is BASE the model that was tuned, and were both "
            "saved whole and with the same class?"
        )


def _changed_rows(pairs: Mapping[str, Pair]) -> tuple[int, int] | None:
    """The sizes of the vocabulary before and after, if it has changed."""
    tokens = [
        one
        for one in pairs.values()
        if layer(one.name) in EMBEDDINGS + HEADS and len(one.old.shape) == 2 and one.old.shape[1:] == one.new.shape[1:]
    ]
    before = {one.old.shape[0] for one in tokens if one.resized}
    sizes = {(one.old.shape[0], one.new.shape[0]): one for one in tokens if one.old.shape[0] in before}
    if len(sizes) > 1:
        told = [f"{one.name!r} from {before} to {after} rows" for (before, after), one in sizes.items()]
        raise AdapterMismatch(
            f"the tuned model has vocabularies of different sizes: {listed(told)}; it cannot be loaded"
        )
    return next(iter(sizes), None)


def _require_shape(base: Checkpoint, tuned: Checkpoint, one: Pair, rows: tuple[int, int] | None) -> None:
    old, new = one.old.shape, one.new.shape
    counts_tokens = one.parameter == "bias" or layer(one.name) in EMBEDDINGS + HEADS
    grown = rows is not None and counts_tokens and (*old[:1], *new[:1]) == rows and old[1:] == new[1:]
    if old != new and not grown:
        raise AdapterMismatch(
            f"{one.name!r} has shape {list(old)} in {base.path} and {list(new)} in {tuned.path}: they are models of "
            "different sizes. Only the vocabulary may have another size; give the model that was tuned as BASE"
        )


def _groups(structure: Structure, pairs: Mapping[str, Pair]) -> Iterator[tuple[str, ...]]:
    """Names of tied tensors that have the same values in the base, and the same in the tuned model."""
    by_entry = {one.old.name: name for name, one in pairs.items()}
    for source in dict.fromkeys(structure.ties.values()):
        names = [by_entry[name] for name in structure.group(source) if name in by_entry]
        same = [
            name
            for name in names
            if equal_bytes(pairs[names[0]].old, pairs[name].old) and equal_bytes(pairs[names[0]].new, pairs[name].new)
        ]
        if len(same) > 1:
            yield tuple(same)


def _warnings(base: Checkpoint, tuned: Checkpoint) -> Iterator[str]:
    """What the configs say of how the model computes must be the same, for no adapter carries it."""
    differing = [
        f"{key} ({base.config[key]!r:.40} and {tuned.config[key]!r:.40})"
        for key in sorted(base.config.keys() & tuned.config.keys())
        if base.config[key] != tuned.config[key]
        and not key.startswith("_")
        and not key.endswith(("_token_id", "_config"))
        if key not in _SPEAKING
    ]
    if differing:
        yield (
            f"the configs of {base.path} and {tuned.path} differ in {listed(differing)}; an adapter carries weights "
            "only, so set these in the base's config as well"
        )


# ----------------------------------------------------------------------------------------------------- the numbers


def is_changed(pair: Pair) -> bool:
    """Whether the tuned tensor is another than the base's, which may be rounded to its dtype.

    Reads both. Raises NotFinite for a NaN in either and for an infinity in one that has changed, Unsupported for a
    change in what is no float.
    """
    if pair.old.dtype not in FLOATS or pair.new.dtype not in FLOATS:
        return _is_other_integers(pair)
    if pair.resized:
        for entry in (pair.old, pair.new):
            if [block for _, (block,) in rows.walk(entry) if not _is_finite(entry, block)]:
                raise _not_finite(entry)
        return True
    changed = False
    infinite: list[TensorEntry] = []
    for _, (old, new) in rows.walk(pair.old, pair.new):
        changed = changed or not bool((new == old.to(new.dtype)).all())
        infinite += [entry for entry, block in ((pair.old, old), (pair.new, new)) if not _is_finite(entry, block)]
        if pair.new in infinite and not bool((new.isfinite() | ~old.isfinite()).all()):
            raise _not_finite(pair.new)  # the base's dtype holds what the tuned one's does not
    if changed and infinite:
        raise _not_finite(infinite[0])
    return changed


def _is_other_integers(pair: Pair) -> bool:
    if not equal_bytes(replace(pair.old, shape=pair.new.shape), pair.new):
        raise Unsupported(
            f"{pair.new.file}: {pair.new.name!r} is {pair.new.dtype} and has changed; an adapter holds changes of "
            "floating-point tensors only"
        )
    return False


def _is_finite(entry: TensorEntry, block: torch.Tensor) -> bool:
    """Whether a block holds no infinity; NotFinite if it holds a NaN."""
    finite = all_finite(block)
    if not finite and block.isnan().any():
        raise _not_finite(entry)
    return finite


def _not_finite(entry: TensorEntry) -> NotFinite:
    return NotFinite(
        f"{entry.file}: tensor {entry.name!r} holds a NaN or an infinity; the training run diverged, or the file is "
        "damaged. No adapter can be made of it"
    )


def walk(pair: Pair, device: str) -> Callable[[], Iterator[tuple[slice, torch.Tensor]]]:
    """What gives rows of TUNED − BASE in float64 on a device, block after block, each time it is called."""

    def blocks() -> Iterator[tuple[slice, torch.Tensor]]:
        for span, (old, new) in rows.walk(pair.old, pair.new):
            yield span, new.to(device).double().sub_(old.to(device).double())  # two dtypes at once are slow

    return blocks


def norm_of(entry: TensorEntry) -> float:
    """The Frobenius norm of a stored tensor."""
    return math.sqrt(math.fsum(float(block.double().square().sum()) for _, (block,) in rows.walk(entry)))
