"""Where every byte of the result lands: tensors into files, each byte of which gets exactly one step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lorasmith.checkpoint import INDEX_SUFFIX, Checkpoint
from lorasmith.deltas.replacement import Replacement
from lorasmith.dtypes import BITS, FLOATS
from lorasmith.errors import BadOption
from lorasmith.records import Convert, Copy, Merge, Output, SideFile, Step, Term, Write
from lorasmith.safefile import Header, TensorEntry, build_header
from lorasmith.sidefiles import copied, written

Terms = Mapping[str, tuple[Term, ...]]
"""The deltas of every base tensor that changes, by its name."""


@dataclass(frozen=True)
class Part:
    """One file of the result and its tensors in order; ``shard`` is the base's file of the same tensors, if any."""

    name: str
    entries: tuple[TensorEntry, ...]
    shard: Header | None


def split(checkpoint: Checkpoint, dtype: str | None, limit: int | None) -> list[Part]:
    """The files of the result: the base's own, or new ones of at most ``limit`` bytes of tensors."""
    if limit is not None:
        return _reshard(checkpoint, dtype, limit)
    return [Part(_file_name(checkpoint, shard), shard.entries, shard) for shard in checkpoint.shards]


def lay_out(checkpoint: Checkpoint, parts: Sequence[Part], terms: Terms, dtype: str | None) -> tuple[Output, ...]:
    """Give every byte of the parts a step; ``dtype`` is a format code, or None to keep each tensor's own."""
    return tuple(_output(checkpoint, part, terms, dtype) for part in parts)


def index(checkpoint: Checkpoint, parts: Sequence[Part], dtype: str | None) -> SideFile | None:
    """The index of a sharded result: the base's own where the shards are its own, else in transformers' form."""
    entries = [entry for part in parts for entry in part.entries]
    size = sum(nbytes(entry, kept(entry, dtype)) for entry in entries)
    if parts[0].shard is None:
        if len(parts) == 1:
            return None
        new = {
            "metadata": {"total_parameters": sum(math.prod(entry.shape) for entry in entries), "total_size": size},
            "weight_map": {entry.name: part.name for part in parts for entry in part.entries},
        }
        return written(_stem(checkpoint) + INDEX_SUFFIX, json.dumps(new, indent=2, sort_keys=True) + "\n")
    if checkpoint.index is None or checkpoint.index_name is None or checkpoint.folder is None:
        return None
    metadata = checkpoint.index.get("metadata")
    if dtype is None or not isinstance(metadata, Mapping) or "total_size" not in metadata:
        return copied(checkpoint.index_name, os.path.join(checkpoint.folder, checkpoint.index_name))
    changed = {**checkpoint.index, "metadata": {**metadata, "total_size": size}}
    return written(checkpoint.index_name, json.dumps(changed, indent=2) + "\n")


def replaces(terms: Sequence[Term]) -> bool:
    """Whether the result of these deltas is just the new tensor, bit for bit."""
    return len(terms) == 1 and isinstance(terms[0].delta, Replacement) and terms[0].factor == 1


def kept(entry: TensorEntry, dtype: str | None) -> str:
    """The dtype a tensor has in the result: only floating-point tensors are converted."""
    return dtype if dtype is not None and entry.dtype in FLOATS else entry.dtype


def nbytes(entry: TensorEntry, dtype: str) -> int:
    """Bytes a tensor takes in another dtype."""
    return math.prod(entry.shape) * BITS[dtype] // 8


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
    return os.path.relpath(shard.file, checkpoint.folder).replace(os.sep, "/")


def _output(checkpoint: Checkpoint, part: Part, terms: Terms, dtype: str | None) -> Output:
    """One file: its header, verbatim where it stays the same, then its tensors."""
    first: Step
    verbatim = checkpoint.folder is not None and all(kept(entry, dtype) == entry.dtype for entry in part.entries)
    if part.shard is not None and verbatim:
        first = Copy(part.shard.file, 0, 0, part.shard.data_start)
    else:
        metadata = (part.shard or checkpoint.shards[0]).metadata
        codes = [(entry, kept(entry, dtype)) for entry in part.entries]
        tensors = [(entry.name, code, entry.shape, nbytes(entry, code)) for entry, code in codes]
        first = Write(build_header(tensors, metadata), 0)
    steps: list[Step] = [first]
    position = first.nbytes
    for entry in part.entries:
        step = _step(entry, kept(entry, dtype), position, terms.get(entry.name, ()))
        position += step.nbytes
        last = steps[-1]
        if isinstance(step, Copy) and isinstance(last, Copy) and _continues(last, step):
            steps[-1] = replace(last, nbytes=last.nbytes + step.nbytes)
        elif step.nbytes:
            steps.append(step)
    return Output(part.name, position, tuple(steps))


def _step(entry: TensorEntry, dtype: str, offset: int, terms: tuple[Term, ...]) -> Step:
    if terms and not replaces(terms):
        return Merge(entry, dtype, offset, nbytes(entry, dtype), terms)
    if terms:
        entry = terms[0].delta.entries[0]
    if entry.dtype != dtype:
        return Convert(entry, dtype, offset, nbytes(entry, dtype))
    return Copy(entry.file, entry.start, offset, entry.nbytes)


def _continues(last: Copy, step: Copy) -> bool:
    return last.source == step.source and last.start + last.nbytes == step.start


def _reshard(checkpoint: Checkpoint, dtype: str | None, limit: int) -> list[Part]:
    """Tensors in the base's order, packed greedily as transformers' ``save_pretrained`` does."""
    if checkpoint.folder is None:
        raise BadOption("--max-shard-size is for model folders; the base is a single file, and so is the result")
    if limit <= 0:
        raise BadOption("--max-shard-size must be positive")
    shards: list[list[TensorEntry]] = [[]]
    filled = 0
    for entry in checkpoint.entries:
        size = nbytes(entry, kept(entry, dtype))
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    stem = _stem(checkpoint)
    if len(shards) == 1:
        return [Part(f"{stem}.safetensors", tuple(shards[0]), None)]
    return [
        Part(f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors", tuple(entries), None)
        for number, entries in enumerate(shards, start=1)
    ]


def _stem(checkpoint: Checkpoint) -> str:
    """``model`` of ``model.safetensors`` or ``model.safetensors.index.json``."""
    if checkpoint.index_name is not None:
        return checkpoint.index_name.removesuffix(INDEX_SUFFIX)
    return os.path.basename(checkpoint.shards[0].file).removesuffix(".safetensors")
