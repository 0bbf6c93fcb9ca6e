"""A base model on disk: which files hold its weights, what is in them, and what lies beside them.

Opening one reads headers, the index and the config; no tensor data.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorasmith.errors import BadFile, LorasmithError, MissingFile, Unsupported, listed
from lorasmith.safefile import Header, TensorEntry, read_header, read_json

INDEX_SUFFIX = ".safetensors.index.json"

WEIGHT_ENDINGS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".ggml", ".onnx",
    ".onnx_data", ".tflite", ".mlmodel", ".mlpackage", ".npz", ".pkl", ".index.json",
)  # fmt: skip

FOREIGN_FOLDERS = ("original", "onnx", "openvino", "coreml", "metal", "gguf", "runs")
"""Sub-folders by which repositories carry the same model in other formats, or training logs."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "spiece.model", "sentencepiece.bpe.model", "spm.model", "bpe.codes", "tekken.json",
)  # fmt: skip

PACKED = re.compile(
    r"\.(qweight|qzeros|weight_packed|weight_scale_inv|SCB|absmax|quant_map|quant_state\.\w+|\w+_blocks)$"
)
"""Tensor names that only quantised checkpoints have."""


@dataclass(frozen=True)
class Checkpoint:
    """A base: shards in file order, its index and config as read, and its side files.

    ``folder`` is None for a bare file. ``side_files`` maps the relative name to the path of every file that
    belongs to the model without being weights. ``notes`` say what was passed over.
    """

    path: str
    folder: str | None
    shards: tuple[Header, ...]
    index: Mapping[str, Any] | None
    index_name: str | None
    config: Mapping[str, Any]
    config_file: str | None
    side_files: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def entries(self) -> Iterator[TensorEntry]:
        for shard in self.shards:
            yield from shard.entries

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(shard.file for shard in self.shards)


def open_checkpoint(path: str) -> Checkpoint:
    """Open a model folder or a bare ``.safetensors`` file by its headers.

    Raises MissingFile, BadFile, or Unsupported for pickled and quantised weights.
    """
    require_path(path)
    checkpoint = _open_folder(path) if os.path.isdir(path) else _open_file(path)
    _refuse_duplicates(checkpoint)
    _refuse_quantised(checkpoint)
    return checkpoint


def require_path(path: str) -> None:
    """Raise MissingFile, naming what is like it nearby, unless the path exists."""
    if os.path.exists(path):
        return
    parent, name = os.path.split(os.path.abspath(path))
    try:
        near = difflib.get_close_matches(name, os.listdir(parent), n=3)
    except OSError:
        raise MissingFile(f"{path} does not exist, nor does the folder {parent}") from None
    hint = f"; did you mean {listed([os.path.join(os.path.dirname(path), one) for one in near])}?" if near else ""
    raise MissingFile(f"{path} does not exist{hint}")


def _open_file(path: str) -> Checkpoint:
    header = read_header(path)
    beside = os.path.join(os.path.dirname(path), "config.json")
    config_file = beside if os.path.isfile(beside) else None
    config = read_json(beside) if config_file else {}
    return Checkpoint(path, None, (header,), None, None, config, config_file, {}, ())


def _open_folder(folder: str) -> Checkpoint:
    names = sorted(os.listdir(folder))
    config_file = os.path.join(folder, "config.json")
    config = read_json(config_file) if "config.json" in names else {}
    weights = _choose_weights(folder, names, config)
    index = None
    if weights.endswith(INDEX_SUFFIX):
        index = read_json(os.path.join(folder, weights))
        shards = _open_shards(folder, weights, index)
    else:
        shards = (read_header(os.path.join(folder, weights)),)
    used = {os.path.basename(shard.file) for shard in shards} | {weights}
    unused = [name for name in names if _is_weights(name) and name not in used]
    unused += [name + "/" for name in names if name in FOREIGN_FOLDERS and os.path.isdir(os.path.join(folder, name))]
    notes = (f"weights are read from {weights}; not used: {listed(unused)}",) if unused else ()
    return Checkpoint(
        path=folder,
        folder=folder,
        shards=shards,
        index=index,
        index_name=weights if index is not None else None,
        config=config,
        config_file=config_file if "config.json" in names else None,
        side_files=_side_files(folder),
        notes=notes,
    )


def _choose_weights(folder: str, names: list[str], config: Mapping[str, Any]) -> str:
    """The file transformers would load (``_get_resolved_checkpoint_files``), or the only one there is."""
    explicit = config.get("transformers_weights")
    if explicit is not None:
        if not isinstance(explicit, str) or explicit not in names:
            raise BadFile(
                f"{folder}: config.json names {explicit!r} as transformers_weights, which is not in the folder"
            )
        return explicit
    for name in ("model.safetensors", "model" + INDEX_SUFFIX):
        if name in names:
            return name
    for ending in (INDEX_SUFFIX, ".safetensors"):
        found = [name for name in names if name.endswith(ending) and not name.startswith("adapter_model.")]
        if len(found) == 1:
            return found[0]
        if found:
            raise BadFile(
                f"{folder} holds several sets of weights and no model.safetensors: {listed(found)}; "
                "give the path of the file you mean"
            )
    raise _no_weights(folder, names)


def _no_weights(folder: str, names: list[str]) -> LorasmithError:
    if "adapter_config.json" in names:
        return BadFile(f"{folder} is an adapter, not a base model; the base comes first: lorasmith merge BASE ADAPTER")
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return Unsupported(
            f"{folder} has its weights only as pickle files ({listed(pickles)}), which cannot be streamed safely yet; "
            "save the model once with safe_serialization=True"
        )
    return MissingFile(f"{folder} holds no *.safetensors file; is it a model folder, and was it downloaded completely?")


def _open_shards(folder: str, index_name: str, index: Mapping[str, Any]) -> tuple[Header, ...]:
    where = os.path.join(folder, index_name)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFile(f"{where} has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_inside(shard):
            raise BadFile(f"{where} places tensor {name!r} in {shard!r}, which is not a file of this folder")
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise MissingFile(
            f"{where} names {len(missing)} of {len(files)} shards that are not there: {listed(missing)}; "
            "the download is incomplete"
        )
    shards = tuple(read_header(os.path.join(folder, name)) for name in files)
    for file, header in zip(files, shards, strict=True):
        present = {entry.name for entry in header.entries}
        ghosts = [name for name, shard in weight_map.items() if shard == file and name not in present]
        if ghosts:
            raise BadFile(
                f"{where} places {listed(ghosts)} in {file}, which does not hold it; index and shards disagree"
            )
        strays = [name for name in present if weight_map.get(name, file) != file]
        if strays:
            raise BadFile(
                f"{where} places {listed(sorted(strays))} in another shard than {file}, which holds it as well"
            )
    return shards


def _is_inside(name: str) -> bool:
    plain = name.replace("\\", "/")
    parts = plain.split("/")
    return bool(name) and "\0" not in name and ":" not in name and all(part not in ("", ".", "..") for part in parts)


def _refuse_duplicates(checkpoint: Checkpoint) -> None:
    seen: dict[str, str] = {}
    for entry in checkpoint.entries:
        if entry.name in seen:
            raise BadFile(
                f"{checkpoint.path}: tensor {entry.name!r} stands in both {seen[entry.name]} and {entry.file}"
            )
        seen[entry.name] = entry.file


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    for config in (checkpoint.config, checkpoint.config.get("text_config")):
        for key in ("quantization_config", "compression_config", "quantization"):
            method = config.get(key) if isinstance(config, Mapping) else None
            if method:
                name = method.get("quant_method", key) if isinstance(method, Mapping) else method
                raise _quantised(checkpoint.path, f"its config.json says so ({key}: {name})")
    for entry in checkpoint.entries:
        if entry.dtype.startswith(("F8_", "F6_", "F4")):
            raise _quantised(checkpoint.path, f"tensor {entry.name!r} is stored as {entry.dtype}")
        if PACKED.search(entry.name):
            raise _quantised(checkpoint.path, f"tensor {entry.name!r} is part of a packed weight")


def _quantised(path: str, why: str) -> Unsupported:
    return Unsupported(
        f"{path} is quantised: {why}. Adding a delta to quantised codes gives garbage; "
        "merge into the 16-bit model that it was made from, then quantise the result"
    )


def _is_weights(name: str) -> bool:
    return name.endswith(WEIGHT_ENDINGS)


def _side_files(folder: str) -> dict[str, str]:
    """Everything that belongs to the model beside its weights; links are followed, loops are not."""
    found: dict[str, str] = {}
    modules = _sentence_modules(folder)

    def visit(relative: str, seen: frozenset[str]) -> None:
        here = os.path.join(folder, relative) if relative else folder
        for name in sorted(os.listdir(here)):
            path, inside = os.path.join(here, name), f"{relative}/{name}" if relative else name
            if os.path.isdir(path):
                real = os.path.realpath(path)
                if real not in seen and not _skipped_folder(name):
                    visit(inside, seen | {real})
            elif os.path.isfile(path) and not _skipped_file(name, whole=relative in modules):
                found[inside] = path

    visit("", frozenset({os.path.realpath(folder)}))
    return found


def _sentence_modules(folder: str) -> set[str]:
    """Sub-folders that a sentence-transformers ``modules.json`` makes part of the model, weights and all."""
    path = os.path.join(folder, "modules.json")
    try:
        with open(path, "rb") as stream:
            text = stream.read(1_000_000).decode("utf-8", "replace")
    except OSError:
        return set()
    return {name.strip("/") for name in re.findall(r'"path"\s*:\s*"([^"]+)"', text)}


def _skipped_folder(name: str) -> bool:
    return name.startswith((".", "checkpoint-", "global_step")) or name in FOREIGN_FOLDERS


def _skipped_file(name: str, *, whole: bool) -> bool:
    if name.startswith(".") or name.upper().startswith("README"):
        return True
    if name in ("adapter_config.json", "lorasmith.json", "trainer_state.json"):
        return True
    return _is_weights(name) and not whole
