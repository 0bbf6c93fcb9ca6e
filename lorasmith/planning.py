"""Headers and matched adapters in, a Plan out: everything is decided and refused here, before a byte is written.

    1. every delta finds its base tensor and is turned the way the base stores it      (_bind)
    2. deltas of one tensor are gathered; what cannot be right is refused              (_gather, _refuse_tied)
    3. tensors are laid out into output files, each byte of which gets one step        (_layout, _steps)
    4. side files, provenance and the hash                                             (_side_files, _recipe)

No tensor data of the base is read.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorasmith import naming
from lorasmith.adapter import Adapter
from lorasmith.checkpoint import INDEX_SUFFIX, TOKENIZER_FILES, Checkpoint
from lorasmith.deltas import Delta
from lorasmith.deltas.replacement import Replacement
from lorasmith.dtypes import BITS, BY_OPTION, FLOATS, NAMES
from lorasmith.errors import AdapterMismatch, BadOption, Unsupported, listed
from lorasmith.records import (
    AdapterUse,
    Convert,
    Copy,
    Merge,
    Output,
    Plan,
    SideFile,
    Step,
    TargetGroup,
    Term,
    Write,
)
from lorasmith.safefile import TensorEntry, build_header

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings")
HEADS = ("lm_head", "embed_out", "proj_out", "output_projection")

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
CONV1D_MODULES = ("c_attn", "q_attn", "c_proj", "c_fc")
"""transformers' ``Conv1D`` layers, which store their weight as (in, out)."""


@dataclass(frozen=True)
class Options:
    """What a merge was asked to do beyond its inputs; ``max_shard_size`` in bytes."""

    dtype: str = "keep"
    device: str = "cpu"
    max_shard_size: int | None = None
    tokenizer: str | None = None
    allow_unmatched: bool = False
    allow_overflow: bool = False


def build_plan(checkpoint: Checkpoint, adapters: Sequence[tuple[Adapter, float]], options: Options) -> Plan:
    """Plan the merge of weighted adapters into a base.

    Raises AdapterMismatch, Unsupported or BadOption for whatever cannot be done exactly as asked.
    """
    if not adapters:
        raise BadOption("no adapter was given: lorasmith merge BASE ADAPTER... -o OUT")
    if options.dtype != "keep" and options.dtype not in BY_OPTION:
        raise BadOption(f"dtype {options.dtype!r} is not one of keep, {', '.join(BY_OPTION)}")
    bound = [_bind(checkpoint, adapter, options) for adapter, _ in adapters]
    terms = _gather(checkpoint, adapters, bound)
    uses = tuple(_use(adapter, weight, one) for (adapter, weight), one in zip(adapters, bound, strict=True))
    outputs = tuple(_outputs(checkpoint, terms, options))
    recipe = _recipe(checkpoint, uses, options)
    digest = _hash(recipe, checkpoint, outputs)
    provenance = json.dumps({**recipe, "plan": digest}, indent=2, sort_keys=True)
    outputs = _with_provenance(checkpoint, outputs, provenance)
    side_files = () if checkpoint.folder is None else _side_files(checkpoint, adapters, outputs, options, provenance)
    steps = [step for output in outputs for step in output.steps]
    merges = [step for step in steps if isinstance(step, Merge)]
    converts = [step for step in steps if isinstance(step, Convert) and not isinstance(step, Merge)]
    replaced = sum(_replaces(one) for one in terms.values())
    total = sum(1 for _ in checkpoint.entries)
    plain_converts = sum(step.entry.name not in terms for step in converts)
    written = sum(output.size for output in outputs) + sum(_side_size(one) for one in side_files)
    return Plan(
        base=checkpoint.path,
        adapters=uses,
        outputs=outputs,
        side_files=side_files,
        single_file=checkpoint.folder is None,
        dtype=options.dtype,
        device=options.device,
        allow_overflow=options.allow_overflow,
        tensors_merged=len(merges),
        tensors_replaced=replaced,
        tensors_converted=plain_converts,
        tensors_copied=total - len(merges) - replaced - plain_converts,
        bytes_read=sum(shard.size for shard in checkpoint.shards) + sum(_size(one.file) for one, _ in adapters),
        bytes_written=written,
        targets=tuple(_targets(bound)),
        base_files=tuple((file, *_stat(file)) for file in checkpoint.files),
        notes=(*checkpoint.notes, *(note for adapter, _ in adapters for note in adapter.notes)),
        warnings=tuple(_warnings(checkpoint, adapters, uses)),
        hash=digest,
    )


# ------------------------------------------------------------------------------------ 1. deltas to base tensors


@dataclass(frozen=True)
class _Bound:
    """An adapter's deltas, turned the way the base stores them, each with its tensor and module."""

    deltas: tuple[tuple[TensorEntry, str, Delta], ...]
    tensors_used: int
    unmatched: tuple[str, ...]


def _bind(checkpoint: Checkpoint, adapter: Adapter, options: Options) -> _Bound:
    matched, left = naming.match(adapter, checkpoint, allow_unmatched=options.allow_unmatched)
    deltas = []
    for one in matched:
        delta = one.source.delta
        if not one.source.stored_as_base and _is_flipped(checkpoint, adapter, one):
            delta = delta.transposed()
        _require_fit(adapter, one, delta)
        deltas.append((one.target, one.source.module, delta))
    return _Bound(
        tuple(deltas),
        sum(len(one.source.tensors) for one in matched) + len(adapter.ignored),
        tuple(name for one in left for name in one.tensors),
    )


def _is_flipped(checkpoint: Checkpoint, adapter: Adapter, match: naming.Match) -> bool:
    """Whether the base stores this weight as (in, out): by its shape, else by the layer's kind, else by the flag."""
    shape = match.target.matrix
    if shape[0] != shape[1]:
        return match.source.delta.shape == (shape[1], shape[0])
    if checkpoint.config.get("model_type") in CONV1D_MODELS:
        return match.source.module.rsplit(".", 1)[-1] in CONV1D_MODULES
    return bool(adapter.fan_in_fan_out)


def _require_fit(adapter: Adapter, match: naming.Match, delta: Delta) -> None:
    target = match.target
    if target.dtype not in FLOATS:
        raise Unsupported(f"the base stores {target.name!r} as {target.dtype}, to which no delta can be added")
    if len(target.shape) > 2 and not isinstance(delta, Replacement):
        raise Unsupported(
            f"the base tensor {target.name!r} has shape {list(target.shape)} (a convolution or experts); "
            "LoRA on it is not supported yet"
        )
    whole = isinstance(delta, Replacement)
    shape = delta.entries[0].shape if whole else delta.shape
    if shape != (target.shape if whole else target.matrix):
        raise AdapterMismatch(
            f"{adapter.path}: the delta for {target.name!r} has shape {list(shape)} and the base tensor "
            f"{list(target.shape)} ({match.source.tensors[0]}); the adapter was trained on another model or size"
        )


def _gather(
    checkpoint: Checkpoint, adapters: Sequence[tuple[Adapter, float]], bound: Sequence[_Bound]
) -> dict[str, tuple[Term, ...]]:
    """The terms of every base tensor that changes; an adapter at weight 0 has none."""
    terms: dict[str, list[Term]] = {}
    for position, ((_, weight), one) in enumerate(zip(adapters, bound, strict=True)):
        for target, _, delta in one.deltas:
            _refuse_tied(checkpoint, target)
            if weight != 0:
                terms.setdefault(target.name, []).append(Term(delta, weight, position))
    return {name: tuple(one) for name, one in terms.items()}


def _refuse_tied(checkpoint: Checkpoint, target: TensorEntry) -> None:
    """Refuse a change to a weight that a language model uses twice: as its embedding and as its head."""
    leaf = target.name.rsplit(".", 2)[-2] if target.name.count(".") else target.name
    if leaf not in EMBEDDINGS + HEADS:
        return
    config = checkpoint.config
    text = config.get("text_config")
    flag = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, Mapping) else None)
    names = config.get("architectures") or [""]
    headless = all(isinstance(name, str) and re.search(r"Model$|Classification$", name) for name in names)
    stored = any(entry.name.rsplit(".", 2)[-2:-1] == [head] for entry in checkpoint.entries for head in HEADS)
    if flag is False or (flag is None and stored) or headless:
        return
    raise Unsupported(
        f"the adapter changes {target.name!r}, which the base ties to its output head (tie_word_embeddings): "
        "a merged model would compute something else than the adapted one. Untying is not supported yet"
    )


# -------------------------------------------------------------------------------------------- 2. output files


def _replaces(terms: tuple[Term, ...]) -> bool:
    """Whether the result is just the new tensor."""
    return len(terms) == 1 and isinstance(terms[0].delta, Replacement) and terms[0].factor == 1


def _outputs(
    checkpoint: Checkpoint, terms: Mapping[str, tuple[Term, ...]], options: Options
) -> Iterator[Output]:
    dtype = None if options.dtype == "keep" else BY_OPTION[options.dtype]
    if options.max_shard_size is not None:
        metadata = dict(checkpoint.shards[0].metadata)
        for name, entries in _reshard(checkpoint, dtype, options.max_shard_size):
            yield _layout(name, None, entries, metadata, terms, dtype)
        return
    for shard in checkpoint.shards:
        name = os.path.basename(shard.file)
        if checkpoint.folder is not None:
            name = os.path.relpath(shard.file, checkpoint.folder).replace(os.sep, "/")
        kept = checkpoint.folder is not None and all(_dtype(entry, dtype) == entry.dtype for entry in shard.entries)
        header = Copy(shard.file, 0, 0, shard.data_start) if kept else None
        yield _layout(name, header, shard.entries, shard.metadata, terms, dtype)


def _layout(
    name: str,
    header: Copy | None,
    entries: Sequence[TensorEntry],
    metadata: Mapping[str, str],
    terms: Mapping[str, tuple[Term, ...]],
    dtype: str | None,
) -> Output:
    """One output file: its header, verbatim where it stays the same, then its tensors in order."""
    first: Step = header or Write(_header(entries, metadata, dtype), 0)
    steps, position = [first], first.nbytes
    for entry in entries:
        step = _step(entry, _dtype(entry, dtype), position, terms.get(entry.name, ()))
        position += step.nbytes
        last = steps[-1]
        if isinstance(step, Copy) and isinstance(last, Copy) and _continues(last, step):
            steps[-1] = replace(last, nbytes=last.nbytes + step.nbytes)
        elif step.nbytes:
            steps.append(step)
    return Output(name, position, tuple(steps))


def _header(entries: Sequence[TensorEntry], metadata: Mapping[str, str], dtype: str | None) -> bytes:
    new = [(entry, _dtype(entry, dtype)) for entry in entries]
    return build_header([(entry.name, code, entry.shape, _nbytes(entry, code)) for entry, code in new], metadata)


def _step(entry: TensorEntry, dtype: str, offset: int, terms: tuple[Term, ...]) -> Step:
    if terms and not _replaces(terms):
        return Merge(entry, dtype, offset, _nbytes(entry, dtype), terms)
    if terms:
        entry = terms[0].delta.entries[0]
    if entry.dtype != dtype:
        return Convert(entry, dtype, offset, _nbytes(entry, dtype))
    return Copy(entry.file, entry.start, offset, entry.nbytes)


def _continues(last: Copy, step: Copy) -> bool:
    return last.source == step.source and last.start + last.nbytes == step.start


def _dtype(entry: TensorEntry, dtype: str | None) -> str:
    return dtype if dtype is not None and entry.dtype in FLOATS else entry.dtype


def _nbytes(entry: TensorEntry, dtype: str) -> int:
    return math.prod(entry.shape) * BITS[dtype] // 8


def _reshard(
    checkpoint: Checkpoint, dtype: str | None, limit: int
) -> list[tuple[str, list[TensorEntry]]]:
    """Tensors in the base's order, packed greedily as transformers' ``save_pretrained`` does."""
    if checkpoint.folder is None:
        raise BadOption("--max-shard-size is for model folders; the base is a single file, and so is the result")
    if limit <= 0:
        raise BadOption("--max-shard-size must be positive")
    shards: list[list[TensorEntry]] = [[]]
    filled = 0
    for entry in checkpoint.entries:
        nbytes = _nbytes(entry, _dtype(entry, dtype))
        if shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += nbytes
    stem = _stem(checkpoint)
    if len(shards) == 1:
        return [(f"{stem}.safetensors", shards[0])]
    return [
        (f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors", entries)
        for number, entries in enumerate(shards, start=1)
    ]


def _stem(checkpoint: Checkpoint) -> str:
    """``model`` of ``model.safetensors`` or ``model.safetensors.index.json``."""
    if checkpoint.index_name is not None:
        return checkpoint.index_name.removesuffix(INDEX_SUFFIX)
    return os.path.basename(checkpoint.shards[0].file).removesuffix(".safetensors")


def _with_provenance(checkpoint: Checkpoint, outputs: tuple[Output, ...], provenance: str) -> tuple[Output, ...]:
    """A single file carries its provenance in its own header."""
    if checkpoint.folder is not None:
        return outputs
    (output,) = outputs
    header = output.steps[0]
    assert isinstance(header, Write)
    known = json.loads(header.data[8:])
    metadata = {**known.pop("__metadata__", {}), "lorasmith": provenance}
    tensors = [
        (name, facts["dtype"], facts["shape"], facts["data_offsets"][1] - facts["data_offsets"][0])
        for name, facts in known.items()
    ]
    data = build_header(tensors, metadata)
    shift = len(data) - header.nbytes
    moved = tuple(replace(step, offset=step.offset + shift) for step in output.steps[1:])
    return (Output(output.name, output.size + shift, (Write(data, 0), *moved)),)


# ------------------------------------------------------------------------------------ 3. side files and recipe


def _side_files(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    outputs: Sequence[Output],
    options: Options,
    provenance: str,
) -> tuple[SideFile, ...]:
    files = {name: SideFile(name, source=path) for name, path in checkpoint.side_files.items()}
    for name, path in _tokenizer(files, adapters, options.tokenizer).items():
        files[name] = SideFile(name, source=path)
    if options.dtype != "keep" and checkpoint.config_file is not None:
        config, changed = _set_dtype(checkpoint.config, options.dtype)
        if changed:
            files["config.json"] = SideFile("config.json", text=json.dumps(config, indent=2) + "\n")
    index = _index(checkpoint, outputs, options)
    if index is not None:
        files[index.name] = index
    files["lorasmith.json"] = SideFile("lorasmith.json", text=provenance + "\n")
    return tuple(files[name] for name in sorted(files))


def _tokenizer(
    files: dict[str, SideFile], adapters: Sequence[tuple[Adapter, float]], wanted: str | None
) -> Mapping[str, str]:
    """The adapter's tokenizer files, which replace the base's as one set (taken out of ``files``)."""
    having = [adapter for adapter, _ in adapters if any(name.startswith("token") for name in adapter.side_files)]
    if wanted == "base":
        return {}
    if wanted not in (None, "adapter"):
        raise BadOption(f"tokenizer {wanted!r} is neither base nor adapter")
    if not having:
        if wanted == "adapter":
            raise BadOption("--tokenizer adapter was given, but no adapter folder holds a tokenizer")
        return {}
    contents = {tuple((name, _read(path)) for name, path in sorted(one.side_files.items())) for one in having}
    if len(contents) > 1:
        raise BadOption(
            f"{listed([one.path for one in having])} carry different tokenizers; use --tokenizer base, "
            "or take the tokenizer files out of all but one adapter folder"
        )
    for name in TOKENIZER_FILES:
        files.pop(name, None)
    return having[0].side_files


def _set_dtype(config: Mapping[str, Any], dtype: str) -> tuple[dict[str, Any], bool]:
    """The config with every entry that names the weights' dtype changed, and whether there was any."""
    changed = False
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value in NAMES.values():
            value, changed = dtype, True
        elif key.endswith("_config") and isinstance(value, Mapping):
            value, inner = _set_dtype(value, dtype)
            changed |= inner
        result[key] = value
    return result, changed


def _index(checkpoint: Checkpoint, outputs: Sequence[Output], options: Options) -> SideFile | None:
    """The index of a sharded result: the base's own where the shards are its own, else in transformers' form."""
    dtype = None if options.dtype == "keep" else BY_OPTION[options.dtype]
    entries = list(checkpoint.entries)
    size = sum(_nbytes(entry, _dtype(entry, dtype)) for entry in entries)
    if options.max_shard_size is not None:
        if len(outputs) == 1:
            return None
        weight_map = {
            entry.name: name
            for name, part in _reshard(checkpoint, dtype, options.max_shard_size)
            for entry in part
        }
        parameters = sum(math.prod(entry.shape) for entry in entries)
        new = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": weight_map}
        return SideFile(_stem(checkpoint) + INDEX_SUFFIX, text=json.dumps(new, indent=2, sort_keys=True) + "\n")
    if checkpoint.index is None or checkpoint.index_name is None or checkpoint.folder is None:
        return None
    metadata = checkpoint.index.get("metadata")
    if dtype is None or not isinstance(metadata, Mapping) or "total_size" not in metadata:
        return SideFile(checkpoint.index_name, source=os.path.join(checkpoint.folder, checkpoint.index_name))
    changed = {**checkpoint.index, "metadata": {**metadata, "total_size": size}}
    return SideFile(checkpoint.index_name, text=json.dumps(changed, indent=2) + "\n")


def _recipe(checkpoint: Checkpoint, uses: Sequence[AdapterUse], options: Options) -> dict[str, Any]:
    """What makes the result what it is, without paths: they differ from machine to machine."""
    return {
        "lorasmith": importlib.metadata.version("lorasmith"),
        "torch": importlib.metadata.version("torch"),
        "device": options.device,
        "dtype": options.dtype,
        "allow_overflow": options.allow_overflow,
        "max_shard_size": options.max_shard_size,
        "base": [
            {"file": os.path.basename(shard.file), "size": shard.size, "header_sha256": shard.sha256}
            for shard in checkpoint.shards
        ],
        "adapters": [
            {
                "weight": use.weight,
                "sha256": use.sha256,
                "kinds": list(use.kinds),
                "rank": list(use.rank),
                "scale": list(use.scale),
                "names_base": use.names_base,
            }
            for use in uses
        ],
    }


def _hash(recipe: Mapping[str, Any], checkpoint: Checkpoint, outputs: Sequence[Output]) -> str:
    sha = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for output in outputs:
        sha.update(f"{output.name} {output.size}\n".encode())
        for step in output.steps:
            if isinstance(step, Convert):
                sha.update(f"{step.entry.name} {step.dtype} {step.offset}\n".encode())
            for term in step.terms if isinstance(step, Merge) else ():
                names = [entry.name for entry in term.delta.entries]
                sha.update(f"{term.adapter} {term.factor!r} {term.delta.scale!r} {term.delta.kind} {names}\n".encode())
    return sha.hexdigest()


# ---------------------------------------------------------------------------------------------- 4. what to tell


def _use(adapter: Adapter, weight: float, bound: _Bound) -> AdapterUse:
    deltas = [delta for _, _, delta in bound.deltas]
    low = [delta for delta in deltas if delta.rank] or deltas
    return AdapterUse(
        path=adapter.path,
        weight=weight,
        sha256=adapter.sha256,
        names_base=adapter.names_base,
        kinds=tuple(sorted({delta.kind for delta in deltas})),
        rank=(min(delta.rank for delta in low), max(delta.rank for delta in low)),
        scale=(min(delta.scale for delta in low), max(delta.scale for delta in low)),
        scale_assumed=adapter.scale_assumed,
        modules=len({module for _, module, _ in bound.deltas}),
        tensors=adapter.tensor_count,
        tensors_used=bound.tensors_used,
        unmatched=bound.unmatched,
    )


def _targets(bound: Sequence[_Bound]) -> Iterator[TargetGroup]:
    for position, one in enumerate(bound):
        groups: dict[tuple[str, str], list[Delta]] = {}
        for _, module, delta in one.deltas:
            groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module), delta.kind), []).append(delta)
        for (target, kind), deltas in groups.items():
            ranks, scales = [delta.rank for delta in deltas], [delta.scale for delta in deltas]
            yield TargetGroup(
                position, target, kind, len(deltas), (min(ranks), max(ranks)), (min(scales), max(scales))
            )


def _warnings(
    checkpoint: Checkpoint, adapters: Sequence[tuple[Adapter, float]], uses: Sequence[AdapterUse]
) -> Iterator[str]:
    known = _base_names(checkpoint)
    for (adapter, weight), use in zip(adapters, uses, strict=True):
        if use.unmatched:
            yield f"{adapter.path}: {len(use.unmatched)} tensors fit nothing and were left out: {listed(use.unmatched)}"
        if adapter.scale_assumed:
            yield f"{adapter.path} says nothing about alpha: its scale was taken to be 1"
        if weight == 0:
            yield f"{adapter.path} has weight 0 and changes nothing"
        if adapter.names_base is not None and _short(adapter.names_base) not in known:
            yield (
                f"{adapter.path} says it was trained on {adapter.names_base!r}; this base is "
                f"{sorted(known)[0]!r}. If that is the same model under another name, all is well"
            )


def _base_names(checkpoint: Checkpoint) -> set[str]:
    """The names this base goes by: its folder's, its Hub cache's, its config's."""
    path = os.path.realpath(checkpoint.path)
    names = {_short(os.path.abspath(checkpoint.path)), _short(path)}
    cached = re.search(r"models--[^/]*--([^/]+)/snapshots/", path.replace(os.sep, "/") + "/")
    if cached:
        names = {_short(cached[1])}
    own = checkpoint.config.get("_name_or_path")
    return names | ({_short(own)} if isinstance(own, str) and own else set())


def _short(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()


def _side_size(file: SideFile) -> int:
    return len((file.text or "").encode()) if file.source is None else _size(file.source)


def _size(file: str) -> int:
    return os.stat(file).st_size


def _stat(file: str) -> tuple[int, int]:
    facts = os.stat(file)
    return facts.st_size, facts.st_mtime_ns


def _read(file: str) -> bytes:
    with open(file, "rb") as stream:
        return stream.read()
