"""What stands beside the weights in a merged folder: config, tokenizer, index, provenance and the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lorasmith.adapter import Adapter
from lorasmith.checkpoint import TOKENIZER_FILES, Checkpoint
from lorasmith.dtypes import NAMES
from lorasmith.errors import BadOption, listed
from lorasmith.jsonfile import open_regular
from lorasmith.records import SideFile

PROVENANCE = "lorasmith.json"

_BLOCK = 1 << 20


def side_files(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    *,
    index: SideFile | None,
    config: Mapping[str, Any],
    dtype: str | None,
    tokenizer: str | None,
) -> tuple[SideFile, ...]:
    """The base's side files with those keys and files changed that must.

    ``config`` holds the keys of the config that change, ``dtype`` is a format code or None.
    """
    files = {name: copied(name, path, checkpoint.known) for name, path in checkpoint.side_files.items()}
    theirs = _adapters_tokenizer(adapters, tokenizer)
    if theirs:
        files = {name: file for name, file in files.items() if name not in TOKENIZER_FILES}
        files |= {name: copied(name, path) for name, path in theirs.items()}
    changed = {**checkpoint.config, **config}
    if dtype is not None:
        changed = _with_dtype(changed, NAMES[dtype])
    if changed != checkpoint.config:
        files["config.json"] = written("config.json", json.dumps(changed, indent=2, ensure_ascii=False) + "\n")
    if index is not None:
        files[index.name] = index
    return tuple(files[name] for name in sorted(files))


def copied(name: str, path: str, known: Mapping[str, tuple[int, str]] = MappingProxyType({})) -> SideFile:
    """A side file taken over as it is; ``known`` may have its size and digest, by its path."""
    if path in known:
        return SideFile(name, *known[path], source=path)
    sha, size = hashlib.sha256(), 0
    with open_regular(path) as stream:
        while block := stream.read(_BLOCK):
            sha.update(block)
            size += len(block)
    return SideFile(name, size, sha.hexdigest(), source=path)


def written(name: str, text: str) -> SideFile:
    """A side file of this text."""
    raw = text.encode()
    return SideFile(name, len(raw), hashlib.sha256(raw).hexdigest(), text=text)


def _adapters_tokenizer(adapters: Sequence[Adapter], wanted: str | None) -> Mapping[str, str]:
    """The tokenizer files that replace the base's as one set; none where the base's stay."""
    if wanted not in (None, "base", "adapter"):
        raise BadOption(f"tokenizer {wanted!r} is neither base nor adapter")
    having = [] if wanted == "base" else _with_tokenizer(adapters)
    if wanted == "adapter" and not having:
        raise BadOption("--tokenizer adapter was given, but no adapter folder holds a tokenizer")
    if not _is_one_tokenizer(having):
        raise BadOption(
            f"{listed([one.path for one in having])} carry different tokenizers; use --tokenizer base, "
            "or take the tokenizer files out of all but one adapter folder"
        )
    return having[0].side_files if having else {}


def tokenizer_along(
    adapters: Sequence[tuple[Adapter, float]], preferred: int | None, *, inside: bool
) -> tuple[Sequence[SideFile], Sequence[str]]:
    """The tokenizer that goes with a mix, not into a single file (``inside``), and what is to be said of it."""
    having = _with_tokenizer([adapter for adapter, weight in adapters if weight])
    if preferred is not None:
        having = _with_tokenizer([adapters[preferred][0]]) or having
    if not having:
        return (), ()
    whose = listed([one.path for one in having])
    if inside:
        return (), [f"a single file has no tokenizer beside it: that of {whose} stays behind; a folder would have it"]
    if not _is_one_tokenizer(having):
        return (), [f"the tokenizers of {whose} differ, and none goes along; --prefer ADAPTER says whose does"]
    return [copied(name, path) for name, path in sorted(having[0].side_files.items())], ()


def _with_tokenizer(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Those that have a tokenizer, and not only a part of one, beside them."""
    return [one for one in adapters if any(name.startswith("token") for name in one.side_files)]


def _is_one_tokenizer(adapters: Sequence[Adapter]) -> bool:
    """Whether the tokenizer files beside adapters are the same ones."""
    return len({tuple((name, _read(path)) for name, path in sorted(one.side_files.items())) for one in adapters}) < 2


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config with every entry that names the weights' dtype changed."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value in NAMES.values():
            changed[key] = dtype
        elif key.endswith("_config") and isinstance(value, Mapping):
            changed[key] = _with_dtype(value, dtype)
        else:
            changed[key] = value
    return changed


def _read(file: str) -> bytes:
    with open_regular(file) as stream:
        content: bytes = stream.read()
    return content
