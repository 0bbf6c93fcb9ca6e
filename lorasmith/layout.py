"""Where every byte of the result lands: tensors into files, each byte of which gets exactly one step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lorasmith.assembly import Assembly, Slot, is_stacked
from lorasmith.checkpoint import INDEX_SUFFIX, Checkpoint
from lorasmith.deltas.replacement import Replacement
from lorasmith.dtypes import BITS, FLOATS
from lorasmith.errors import BadOption
from lorasmith.records import Convert, Copy, Merge, Output, SideFile, Step, Write
from lorasmith.safefile import Header, build_header
from lorasmith.sidefiles import copied, written


@dataclass(frozen=True)
class Place:
    """A tensor of the result and the dtype it has there."""

    slot: Slot
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.slot.entry.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Part:
    """One file of the result and its tensors in order; ``shard`` is the base's file that it takes the place of."""

    name: str
    places: tuple[Place, ...]
    shard: Header | None


def split(checkpoint: Checkpoint, assembly: Assembly, dtype: str | None, limit: int | None) -> list[Part]:
    """The files of the result: the base's own, or new ones of at most ``limit`` bytes of tensors.

    ``dtype`` is a format code, or None to keep each tensor's own. New tensors come last.
    """
    shards = [list(_places(shard, assembly, dtype)) for shard in checkpoint.shards]
    main, files = _main_dtype(checkpoint), {entry.file for entry in checkpoint.entries}
    shards[-1] += [
        Place(slot, _kept(slot.entry.dtype, dtype or (None if slot.entry.file in files else main)))
        for slot in assembly.added
    ]
    if limit is not None:
        return _reshard(checkpoint, [place for places in shards for place in places], limit)
    pairs = zip(checkpoint.shards, shards, strict=True)
    return [Part(_file_name(checkpoint, shard), tuple(places), shard) for shard, places in pairs]


def _places(shard: Header, assembly: Assembly, dtype: str | None) -> Iterator[Place]:
    """The tensors of one of the base's files; a replaced one keeps the dtype of what it replaces."""
    for entry in shard.entries:
        if entry.name not in assembly.dropped:
            yield Place(assembly.changed.get(entry.name, Slot(entry.name, entry)), _kept(entry.dtype, dtype))


def _kept(own: str, dtype: str | None) -> str:
    """The dtype a tensor has in the result: only floating-point tensors are converted."""
    return dtype if dtype is not None and own in FLOATS else own


def _main_dtype(checkpoint: Checkpoint) -> str | None:
    """The floating-point dtype that most bytes of the base have."""
    sizes: dict[str, int] = {}
    for entry in checkpoint.entries:
        if entry.dtype in FLOATS:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return max(sizes, key=lambda code: sizes[code]) if sizes else None


def lay_out(checkpoint: Checkpoint, parts: Sequence[Part]) -> tuple[Output, ...]:
    """Give every byte of the parts a step."""
    return tuple(_output(checkpoint, part) for part in parts)


def index(checkpoint: Checkpoint, parts: Sequence[Part]) -> SideFile | None:
    """The index of a sharded result: the base's own where it stays true, else that or a new one with what it is now."""
    places = [(part.name, place) for part in parts for place in part.places]
    size = sum(place.nbytes for _, place in places)
    weight_map = {place.slot.name: name for name, place in places}
    count = sum(math.prod(place.slot.entry.shape) for _, place in places)
    if parts[0].shard is None:
        if len(parts) == 1:
            return None
        new = {"metadata": {"total_parameters": count, "total_size": size}, "weight_map": weight_map}
        return written(_stem(checkpoint) + INDEX_SUFFIX, json.dumps(new, indent=2, sort_keys=True) + "\n")
    if checkpoint.index is None or checkpoint.index_name is None or checkpoint.folder is None:
        return None
    metadata = checkpoint.index.get("metadata")
    now = dict(metadata) if isinstance(metadata, Mapping) else {}
    before = [(entry.name, entry.shape, entry.dtype) for entry in checkpoint.entries]
    name = _as_safetensors(checkpoint.index_name)
    after = [(place.slot.name, place.slot.entry.shape, place.dtype) for _, place in places]
    if name == checkpoint.index_name and before == after:
        return copied(checkpoint.index_name, os.path.join(checkpoint.folder, checkpoint.index_name))
    now |= {key: value for key, value in (("total_size", size), ("total_parameters", count)) if key in now}
    changed = {**checkpoint.index, "metadata": now, "weight_map": weight_map}
    return written(name, json.dumps(changed, indent=2) + "\n")


def replaces(slot: Slot) -> bool:
    """Whether the result of a tensor's deltas is just the new tensor, bit for bit."""
    one = slot.terms[0] if len(slot.terms) == 1 else None
    return one is not None and isinstance(one.delta, Replacement) and one.delta.taken is None and one.factor == 1


def with_metadata(output: Output, metadata: Mapping[str, str]) -> Output:
    """The same file with more ``__metadata__`` in its header."""
    header = output.steps[0]
    assert isinstance(header, Write)
    known = json.loads(header.data[8:])
    merged = {**known.pop("__metadata__", {}), **metadata}
    tensors = [
        (name, facts["dtype"], facts["shape"], facts["data_offsets"][1] - facts["data_offsets"][0])
        for name, facts in known.items()
    ]
    data = build_header(tensors, merged)
    shift = len(data) - header.nbytes
    moved = tuple(replace(step, offset=step.offset + shift) for step in output.steps[1:])
    return Output(output.name, output.size + shift, (Write(data, 0), *moved))


def _file_name(checkpoint: Checkpoint, shard: Header) -> str:
    if checkpoint.folder is None:
        return os.path.basename(shard.file)
    return _as_safetensors(os.path.relpath(shard.file, checkpoint.folder).replace(os.sep, "/"))


def _as_safetensors(name: str) -> str:
    """The name that transformers gives the safetensors file (or index) in place of a pickled one."""
    folder, _, own = name.rpartition("/")
    stem, ending, rest = own.rpartition(".bin")
    if ending and rest in ("", ".index.json"):
        own = f"{stem.removeprefix('pytorch_') if stem.startswith('pytorch_model') else stem}.safetensors{rest}"
    return f"{folder}/{own}" if folder else own


def _output(checkpoint: Checkpoint, part: Part) -> Output:
    """One file: its header, verbatim where it stays the same, then its tensors."""
    first: Step
    own = part.shard if checkpoint.folder is not None else None
    if own is not None and own.data_start and _is_as_before(part, own):
        first = Copy(own.file, 0, 0, own.data_start)
    else:
        metadata = (part.shard or checkpoint.shards[0]).metadata
        tensors = [(one.slot.name, one.dtype, one.slot.entry.shape, one.nbytes) for one in part.places]
        first = Write(build_header(tensors, metadata), 0)
    steps: list[Step] = [first]
    position = first.nbytes
    for place in part.places:
        step = _step(place, position)
        position += step.nbytes
        last = steps[-1]
        if isinstance(step, Copy) and isinstance(last, Copy) and _continues(last, step):
            steps[-1] = replace(last, nbytes=last.nbytes + step.nbytes)
        elif step.nbytes:
            steps.append(step)
    return Output(part.name, position, tuple(steps))


def _is_as_before(part: Part, shard: Header) -> bool:
    now = [(one.slot.name, one.slot.entry.shape, one.dtype) for one in part.places]
    return now == [(entry.name, entry.shape, entry.dtype) for entry in shard.entries]


def _step(place: Place, offset: int) -> Step:
    slot, entry = place.slot, place.slot.entry
    if (slot.terms and not replaces(slot)) or slot.gain != 1:
        if slot.terms and is_stacked(slot.terms[0].delta.shape, entry):
            entry = replace(entry, shape=slot.terms[0].delta.shape)
        return Merge(slot.name, entry, place.dtype, offset, place.nbytes, slot.terms, slot.gain)
    if slot.terms:
        entry = slot.terms[0].delta.entries[0]
    if entry.dtype != place.dtype:
        return Convert(slot.name, entry, place.dtype, offset, place.nbytes)
    return Copy(entry.file, entry.start, offset, entry.nbytes)


def _continues(last: Copy, step: Copy) -> bool:
    return last.source == step.source and last.start + last.nbytes == step.start


def _reshard(checkpoint: Checkpoint, places: Sequence[Place], limit: int) -> list[Part]:
    """Tensors in the base's order, packed greedily as transformers' ``save_pretrained`` does."""
    if checkpoint.folder is None:
        raise BadOption("--max-shard-size is for model folders; the base is a single file, and so is the result")
    if limit <= 0:
        raise BadOption("--max-shard-size must be positive")
    shards: list[list[Place]] = [[]]
    filled = 0
    for place in places:
        if shards[-1] and filled + place.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(place)
        filled += place.nbytes
    stem = _stem(checkpoint)
    if len(shards) == 1:
        return [Part(f"{stem}.safetensors", tuple(shards[0]), None)]
    return [
        Part(f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors", tuple(some), None)
        for number, some in enumerate(shards, start=1)
    ]


def _stem(checkpoint: Checkpoint) -> str:
    """``model`` of ``model.safetensors`` or ``model.safetensors.index.json``."""
    if checkpoint.index_name is not None:
        return _as_safetensors(checkpoint.index_name).removesuffix(INDEX_SUFFIX)
    return _as_safetensors(os.path.basename(checkpoint.shards[0].file)).removesuffix(".safetensors")
