"""What makes a result what it is: the provenance record, and the hash that names the result.

Neither knows a path or a time: equal runs on different machines write equal bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from typing import Any

from lorasmith import __version__
from lorasmith.checkpoint import Checkpoint
from lorasmith.records import AdapterUse, Convert, Copy, Origin, Output, SideFile
from lorasmith.safefile import TensorEntry


def recipe(checkpoint: Checkpoint, uses: Sequence[AdapterUse], **options: Any) -> dict[str, Any]:
    """Versions, inputs with their digests, and the options that bear on the result, as JSON types."""
    return {
        "lorasmith": __version__,
        "torch": importlib.metadata.version("torch"),
        **options,
        "base": [
            {"file": os.path.basename(shard.file), "size": shard.size, "header_sha256": shard.sha256}
            for shard in checkpoint.shards
        ],
        **origin_facts("base_", checkpoint.origin),
        "adapters": [
            {
                "weight": use.weight,
                "sha256": use.sha256,
                "kinds": list(use.kinds),
                "rank": list(use.rank),
                "scale": list(use.scale),
                "names_base": use.names_base,
                **origin_facts("", use.origin),
            }
            for use in uses
        ],
    }


def origin_facts(prefix: str, origin: Origin | None) -> dict[str, str]:
    """The repository on the Hub that an input is from, and the commit; nothing for one that is from a disk."""
    if origin is None:
        return {}
    facts = {"repo": origin.repo, "commit": origin.commit, **({"inside": origin.inside} if origin.inside else {})}
    return {prefix + key: value for key, value in facts.items()}


def plan_hash(record: dict[str, Any], outputs: Sequence[Output], side_files: Sequence[SideFile]) -> str:
    """SHA-256 of the recipe, of every step and of every side file."""
    sha = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for output in outputs:
        sha.update(_raw(f"{output.name} {output.size}\n"))
        for step in output.steps:
            sha.update(f"{type(step).__name__} {step.offset} {step.nbytes} ".encode())
            if isinstance(step, Copy):
                sha.update(_raw(f"{_file(step.source)} {step.start}\n"))
            elif isinstance(step, Convert):
                sha.update(_raw(json.dumps(_facts(step))))
    for file in side_files:
        sha.update(_raw(f"{file.name} {file.sha256}\n"))
    return sha.hexdigest()


def _facts(value: Any) -> Any:
    """Steps, their deltas and tensors as JSON types, without the folders that files are in."""
    if isinstance(value, TensorEntry):
        return [_file(value.file), value.name, value.dtype, value.shape, value.start]
    if isinstance(value, tuple):
        return [_facts(one) for one in value]
    kind: type = type(value)
    names = _field_names(kind)
    return value if names is None else [type(value).__name__, *(_facts(getattr(value, name)) for name in names)]


@functools.cache
def _field_names(kind: type) -> tuple[str, ...] | None:
    """The fields of a dataclass; None for any other type."""
    return tuple(one.name for one in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else None


def _file(path: str) -> str:
    """A file's name, without its folder; none for what is only an open descriptor."""
    return "" if path.startswith("/proc/self/fd/") else os.path.basename(path)


def _raw(text: str) -> bytes:
    """Bytes of a text with file names in it, which need not be UTF-8."""
    return text.encode("utf-8", "surrogateescape")
