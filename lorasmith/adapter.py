"""An adapter as read from disk: which module gets which delta, and where every tensor of the file went."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorasmith.deltas import Delta
from lorasmith.errors import NotFinite
from lorasmith.records import Origin
from lorasmith.safefile import Header, Reader, TensorEntry

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)}
_EXPONENTS["F64"] = ("<u8", 0x7FF0000000000000)

_BLOCK = 4 << 20


@dataclass(frozen=True)
class ModuleDelta:
    """The delta an adapter has for ``module``'s ``parameter`` (weight or bias), in the module's orientation.

    ``stored_as_base`` is True where the adapter stores the tensor the way the base does, so that it must not be
    transposed to fit (embeddings, replacements). ``shared`` says that the change is one of what layers tied to this one
    repeat, ``may_be_new`` that the base need not have the tensor. ``weight`` multiplies the adapter's own, for this
    module.
    """

    module: str
    parameter: str
    delta: Delta
    tensors: tuple[str, ...]
    stored_as_base: bool = False
    shared: bool = False
    may_be_new: bool = False
    weight: float = 1.0

    @property
    def path(self) -> str:
        """The parameter's whole name; of one that is the model's own, its module's is empty."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


@dataclass(frozen=True)
class Adapter:
    """One adapter: ``deltas`` in the order of its file (``stamp``: path, size, mtime).

    ``ignored`` are tensors that carry no change (copies of base weights in raw state dicts). ``names_base`` is the
    base its config names, ``residual`` the initialisation that has changed that base, if one has.
    ``fan_in_fan_out`` is the config's word on weights stored as (in, out), None without one.
    ``scale_assumed`` says that no alpha was found anywhere and the scale was taken to be 1. ``warnings`` are about
    what the files leave in doubt, ``notes`` about what is passed over. ``metadata`` is the file's header's.
    """

    path: str
    stamp: tuple[str, int, int]
    deltas: tuple[ModuleDelta, ...]
    ignored: tuple[str, ...]
    sha256: str
    config: Mapping[str, object]
    names_base: str | None
    fan_in_fan_out: bool | None
    scale_assumed: bool
    residual: str | None
    side_files: Mapping[str, str]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    origin: Origin | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        return self.stamp[0]

    @property
    def trained_class(self) -> str | None:
        """The class of the model that it was trained on, which PEFT notes where it is given no task."""
        auto = self.config.get("auto_mapping")
        name = auto.get("base_model_class") if isinstance(auto, Mapping) else None
        return name if isinstance(name, str) else None

    @property
    def tensor_count(self) -> int:
        """All tensors of the file: every one is in a delta or ignored."""
        return sum(len(one.tensors) for one in self.deltas) + len(self.ignored)


def spans(deltas: Sequence[Delta]) -> tuple[tuple[int, int], tuple[float, float]]:
    """The smallest and the largest rank and scale of deltas; of those that have a rank, if any have."""
    low = [delta for delta in deltas if delta.rank] or deltas
    ranks, scales = [delta.rank for delta in low], [delta.scale for delta in low]
    return (min(ranks), max(ranks)), (min(scales), max(scales))


def short(name: str) -> str:
    """What a model is called, without whose it is or where it lies."""
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()


def digest(header: Header) -> str:
    """The SHA-256 of the whole file, having checked that every float in it is finite.

    Of a pickle it is that of its tensors, with their names, shapes and places. Raises NotFinite with the first tensor
    that holds a NaN or an infinity.
    """
    import numpy as np

    reader = Reader(header.entries[0].file if header.entries else header.file)
    sha = hashlib.sha256()
    buffer = np.empty(_BLOCK, np.uint8)

    def blocks(start: int, stop: int) -> Iterator[npt.NDArray[np.uint8]]:
        for position in range(start, stop, _BLOCK):
            block = buffer[: min(_BLOCK, stop - position)]
            reader.into(block.data, position)
            sha.update(block.data)
            yield block

    try:
        if header.data_start:
            for _ in blocks(0, header.data_start):
                pass
        else:  # a pickle: what it says is all over the file
            sha.update(bytes.fromhex(header.sha256))
        for entry in header.entries:
            for block in blocks(entry.start, entry.start + entry.nbytes):
                _require_finite(entry, block)
    finally:
        reader.close()
    return sha.hexdigest()


def _require_finite(entry: TensorEntry, block: npt.NDArray[np.uint8]) -> None:
    if entry.dtype not in _EXPONENTS:
        return
    word, exponent = _EXPONENTS[entry.dtype]
    bits = block.view(word) & exponent
    if (bits == exponent).any():
        raise NotFinite(
            f"{entry.file}: tensor {entry.name!r} holds a NaN or an infinity; "
            "the training run diverged, or the file is damaged"
        )
