"""A base model on disk: which files hold its weights, what is in them, and what lies beside them.

Opening one reads headers, the index and the config; no tensor data.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorasmith.errors import BadFile, IOFailed, LorasmithError, MissingFile, Unsupported, listed
from lorasmith.folders import Folder, OnDisk
from lorasmith.jsonfile import load_json, read_json
from lorasmith.records import Origin
from lorasmith.safefile import Header, TensorEntry

INDEX_SUFFIX = ".safetensors.index.json"

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""Weights as transformers saved them before safetensors: one file, or the index of shards."""

WEIGHT_ENDINGS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".ggml", ".onnx",
    ".onnx_data", ".tflite", ".mlmodel", ".mlpackage", ".npz", ".pkl", ".index.json",
)  # fmt: skip

SHARD = re.compile(r"-\d{5}-of-(?!00001\.)\d{5}\.safetensors$")
"""How the name of a file ends that is one of several."""

FOREIGN_FOLDERS = ("original", "onnx", "openvino", "coreml", "metal", "gguf", "runs")
"""Sub-folders by which repositories carry the same model in other formats, or training logs."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "spiece.model", "sentencepiece.bpe.model", "spm.model", "bpe.codes", "tekken.json",
)  # fmt: skip

MAX_SIDE_FILES = 10_000
"""Files and folders beside the weights; a model has some dozens, a home folder more than these."""

PACKED = re.compile(
    r"\.(qweight|qzeros|weight_packed|weight_scale_inv|SCB|absmax|quant_map|quant_state\.\w+|\w+_blocks)$"
)
"""Tensor names that only quantised checkpoints have."""


@dataclass(frozen=True)
class Checkpoint:
    """A base: shards in file order, its index and config as read, and its side files.

    ``folder`` is None for a bare file. ``side_files`` maps the relative name to the path of every file that
    belongs to the model without being weights. ``notes`` say what was passed over. A base on the Hub has an
    ``origin``; its files need not be here yet, and ``known`` has size and digest of them by their paths.
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
    origin: Origin | None = None
    known: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def entries(self) -> Iterator[TensorEntry]:
        for shard in self.shards:
            yield from shard.entries

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(shard.file for shard in self.shards)

    @property
    def repo(self) -> str | None:
        """The repository on the Hub that it is of, if it is there or in a cache of the Hub's client."""
        if self.origin is not None:
            return self.origin.repo
        for path in (os.path.abspath(self.path), os.path.realpath(self.path)):
            cached = re.search(r"/models--([^/]+?)--([^/]+)/(?:snapshots|blobs)/", path.replace(os.sep, "/"))
            if cached:
                return f"{cached[1]}/{cached[2]}"
        return None


def open_checkpoint(path: str) -> Checkpoint:
    """Open a model folder or a bare ``.safetensors`` file by its headers.

    Raises MissingFile, BadFile, or Unsupported for pickled and quantised weights.
    """
    require_path(path)
    if os.path.isdir(path):
        return checked(open_folder(OnDisk(path)))
    return checked(open_file(OnDisk(os.path.dirname(path)), os.path.basename(path), path))


def checked(checkpoint: Checkpoint) -> Checkpoint:
    """The same, having refused tensors that stand in two files and quantised weights."""
    _refuse_duplicates(checkpoint)
    _refuse_quantised(checkpoint)
    return checkpoint


def require_path(path: str) -> None:
    """Raise MissingFile, naming what is like it nearby, unless the path exists; IOFailed where that cannot be seen."""
    if os.path.exists(path):
        return
    if not path:
        raise MissingFile("an empty path was given; is a variable of the script not set?")
    if os.path.islink(path):
        raise MissingFile(f"{path} is a link to nothing; what it was made for has been moved or removed")
    parent, name = os.path.split(os.path.abspath(path))
    try:
        near = difflib.get_close_matches(name, os.listdir(parent), n=3)
    except PermissionError:
        raise IOFailed(errno.EACCES, f"{path} cannot be looked for: the folder {parent} may not be read") from None
    except OSError:
        raise MissingFile(f"{path} does not exist, nor does the folder {parent}") from None
    folder = os.path.dirname(path.rstrip(os.sep))
    hint = f"; did you mean {listed([os.path.join(folder, one) for one in near])}?" if near else ""
    raise MissingFile(f"{path} does not exist{hint}")


def open_file(folder: Folder, name: str, called: str) -> Checkpoint:
    """Open a bare file of a folder, and the config beside it; ``checked`` is left to do."""
    header, notes = folder.weights(name)
    config_file = folder.here("config.json") if folder.is_file("config.json") else None
    config = read_json(config_file) if config_file else {}
    return Checkpoint(called, None, (header,), None, None, config, config_file, {}, notes)


def open_folder(folder: Folder) -> Checkpoint:
    """Open a model folder by its headers, wherever it is; ``checked`` is left to do."""
    names = folder.names()
    config_file = folder.here("config.json") if "config.json" in names else None
    config = read_json(config_file) if config_file else {}
    weights = choose_weights(folder.name, names, config)
    index = None
    if weights.endswith(".index.json"):
        index = read_json(folder.here(weights))
        shards, notes = _open_shards(folder, weights, index)
    else:
        header, notes = folder.weights(weights)
        shards = (header,)
    used = {os.path.basename(shard.file) for shard in shards} | {weights}
    unused = [name for name in names if _is_weights(name) and name not in used]
    unused += [name + "/" for name in names if name in FOREIGN_FOLDERS and folder.is_folder(name)]
    if unused:
        notes = (f"weights are read from {weights}; not used: {listed(unused)}", *notes)
    own = {os.path.relpath(shard.file, folder.path).replace(os.sep, "/") for shard in shards}
    return Checkpoint(
        path=folder.name,
        folder=folder.path,
        shards=shards,
        index=index,
        index_name=weights if index is not None else None,
        config=config,
        config_file=config_file,
        side_files=_side_files(folder, own),
        notes=notes,
    )


def choose_weights(folder: str, names: list[str], config: Mapping[str, Any]) -> str:
    """The file transformers would load (``_get_resolved_checkpoint_files``), or the only one there is."""
    explicit = config.get("transformers_weights")
    if explicit is not None:
        if not isinstance(explicit, str) or explicit not in names or not _is_readable(explicit):
            raise BadFile(
                f"{folder}: config.json names {explicit!r} as transformers_weights, which is no safetensors file or "
                "index in the folder"
            )
        return explicit
    for name in ("model.safetensors", "model" + INDEX_SUFFIX):
        if name in names:
            return name
    for name in PICKLES:
        if name in names:
            return name
    for ending in (INDEX_SUFFIX, ".safetensors"):
        found = [name for name in names if name.endswith(ending) and not name.startswith("adapter_model.")]
        if found and all(SHARD.search(name) for name in found):
            raise MissingFile(
                f"{folder} holds {listed(found)} and no {SHARD.sub(INDEX_SUFFIX, found[0])}, which says what belongs "
                "together; the download is incomplete"
            )
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
        return BadFile(
            f"{folder} is an adapter, not a base model; the base comes first: lorasmith merge BASE ADAPTER, or "
            "lorasmith extract BASE TUNED"
        )
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return Unsupported(
            f"{folder} holds no weights under a name that transformers knows, only {listed(pickles)}; "
            "give the path of the file you mean"
        )
    foreign = [name for name in names if _is_weights(name) and not name.startswith("adapter_model.")]
    if foreign:
        return Unsupported(
            f"{folder} holds weights only in formats that lorasmith does not read: {listed(foreign)}; "
            "give the safetensors model that they were made from"
        )
    return MissingFile(f"{folder} holds no *.safetensors file; is it a model folder, and was it downloaded completely?")


def model_files(folder: Folder) -> list[str]:
    """The names of the files that a model in a folder consists of: its weights, as transformers would load them, and
    what belongs to them. No weights are read. Raises MissingFile where shards are not there.
    """
    names = folder.names()
    config = read_json(folder.here("config.json")) if "config.json" in names else {}
    weights = choose_weights(folder.name, names, config)
    shards = [weights]
    if weights.endswith(".index.json"):
        shards = sorted(_placed(folder, weights, read_json(folder.here(weights))))
        _require_shards(folder, weights, shards)
    return [*dict.fromkeys([*shards, weights, *_side_files(folder, shards)])]


def _placed(folder: Folder, index_name: str, index: Mapping[str, Any]) -> dict[str, list[str]]:
    """The shards of an index, and the tensors that it places in each."""
    where = os.path.join(folder.path, index_name)
    ending = ".safetensors" if index_name.endswith(INDEX_SUFFIX) else ".bin"
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFile(f"{where} has no weight_map")
    placed: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_inside(shard) or not shard.endswith(ending):
            raise BadFile(f"{where} places tensor {name!r} in {shard!r}, which is no {ending} file of this folder")
        placed.setdefault(shard, []).append(name)
    return placed


def _open_shards(
    folder: Folder, index_name: str, index: Mapping[str, Any]
) -> tuple[tuple[Header, ...], tuple[str, ...]]:
    where = os.path.join(folder.path, index_name)
    placed = _placed(folder, index_name, index)
    weight_map = index["weight_map"]
    files = sorted(placed)
    _require_shards(folder, index_name, files)
    read = folder.all_weights(files)
    shards = tuple(header for header, _ in read)
    for file, header in zip(files, shards, strict=True):
        present = {entry.name for entry in header.entries}
        ghosts = [name for name in placed[file] if name not in present]
        if ghosts:
            raise BadFile(
                f"{where} places {listed(ghosts)} in {file}, which does not hold it; index and shards disagree"
            )
        strays = [name for name in present if weight_map.get(name, file) != file]
        if strays:
            raise BadFile(
                f"{where} places {listed(sorted(strays))} in another shard than {file}, which holds it as well"
            )
    return shards, tuple(note for _, notes in read for note in notes)


def _require_shards(folder: Folder, index_name: str, files: Sequence[str]) -> None:
    missing = [name for name in files if not folder.has(name)]
    if missing:
        where = os.path.join(folder.name, index_name)
        raise MissingFile(
            f"{where} names {len(missing)} of {len(files)} shards that are not there: {listed(missing)}; "
            "the model was not downloaded, or not uploaded, completely"
        )


def _is_readable(name: str) -> bool:
    return name.endswith((".safetensors", INDEX_SUFFIX))


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
    for config in _configs(checkpoint.config):
        for key in ("quantization_config", "compression_config", "quantization"):
            method = config.get(key)
            if method:
                name = method.get("quant_method", key) if isinstance(method, Mapping) else method
                raise _quantised(checkpoint.path, f"its config.json says so ({key}: {name})")
    for entry in checkpoint.entries:
        if entry.dtype.startswith(("F8_", "F6_", "F4")):
            raise _quantised(checkpoint.path, f"tensor {entry.name!r} is stored as {entry.dtype}")
        if PACKED.search(entry.name):
            raise _quantised(checkpoint.path, f"tensor {entry.name!r} is part of a packed weight")


def _configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config and those of the model's parts (``text_config`` and the like) in it."""
    yield config
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            yield from _configs(value)


def _quantised(path: str, why: str) -> Unsupported:
    return Unsupported(
        f"{path} is quantised: {why}. Adding a delta to quantised codes gives garbage; "
        "merge into the 16-bit model that it was made from, then quantise the result"
    )


def _is_weights(name: str) -> bool:
    return name.endswith(WEIGHT_ENDINGS)


def _side_files(folder: Folder, shards: Collection[str]) -> dict[str, str]:
    """Everything that belongs to the model beside its weights.

    Links are followed, but not those to a folder that the model is in. Raises BadFile where there is far more than
    a model has.
    """
    found: dict[str, str] = {}
    modules = _sentence_modules(folder)
    visited = 0

    def visit(relative: str, above: frozenset[str]) -> None:
        nonlocal visited
        for name in folder.names(relative):
            visited += 1
            if visited > MAX_SIDE_FILES:
                raise BadFile(f"{folder.name} holds more than {MAX_SIDE_FILES:,} files; is it only a model's folder?")
            inside = f"{relative}/{name}" if relative else name
            path = os.path.join(folder.path, inside)
            if folder.is_folder(inside):
                real = os.path.realpath(path)
                if real not in above and not _skipped_folder(name):
                    visit(inside, above | {real})
            elif folder.is_file(inside) and inside not in shards and not _skipped_file(name, whole=relative in modules):
                found[inside] = path

    visit("", frozenset(_folder_and_those_above(os.path.realpath(folder.path))))
    return found


def _folder_and_those_above(path: str) -> Iterator[str]:
    yield path
    while os.path.dirname(path) != path:
        path = os.path.dirname(path)
        yield path


def _sentence_modules(folder: Folder) -> set[str]:
    """Sub-folders that a sentence-transformers ``modules.json`` makes part of the model, weights and all."""
    modules = load_json(folder.here("modules.json")) if folder.is_file("modules.json") else []
    paths = [one.get("path") for one in modules if isinstance(one, dict)] if isinstance(modules, list) else []
    inside = {path.strip("/") for path in paths if isinstance(path, str)}
    return {path for path in inside if _is_inside(path)}


def _skipped_folder(name: str) -> bool:
    return name.startswith((".", "checkpoint-", "global_step")) or name in FOREIGN_FOLDERS


def _skipped_file(name: str, *, whole: bool) -> bool:
    if name.startswith(".") or name.upper().startswith("README"):
        return True
    if name in ("adapter_config.json", "lorasmith.json", "trainer_state.json"):
        return True
    return _is_weights(name) and not whole
