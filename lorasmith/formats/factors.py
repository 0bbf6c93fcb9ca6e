"""One module's LoRA tensors, as PEFT stores them, and the Delta they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lorasmith.deltas import Delta
from lorasmith.deltas.dora import Dora
from lorasmith.deltas.low_rank import Factor, LowRank, Product, lora
from lorasmith.dtypes import FLOATS
from lorasmith.errors import AdapterMismatch, BadFile, Unsupported, listed
from lorasmith.formats.scales import Scales
from lorasmith.safefile import Reader, TensorEntry


@dataclass
class Parts:
    """The tensors of one module, by role."""

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    alpha: TensorEntry | None = None

    @property
    def names(self) -> tuple[str, ...]:
        entries = [*self.tensors.values(), *([self.alpha] if self.alpha else [])]
        return tuple(entry.name for entry in entries)


def is_embedding(parts: Parts) -> bool:
    """Whether the module is an embedding, whose factors PEFT stores under names of their own."""
    return "lora_embedding_A" in parts.tensors or "lora_embedding_B" in parts.tensors


def read_delta(file: str, module: str, parts: Parts, scales: Scales) -> Delta:
    """The delta that a module's tensors stand for.

    Raises AdapterMismatch when one is missing or does not fit the others, Unsupported for what cannot be merged yet.
    """
    embedding = is_embedding(parts)
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    a, b = (_factor(file, module, parts, name) for name in names)
    rank = a.shape[0]
    if b.shape[1] != rank:
        raise AdapterMismatch(
            f"{file}: {a.name!r} has rank {rank} and {b.name!r} has rank {b.shape[1]}; they are not of one adapter"
        )
    alpha = None if parts.alpha is None else _scalar(parts.alpha)
    scale = scales.of(module, rank, alpha)
    if embedding:
        if "lora_magnitude_vector" in parts.tensors:
            raise Unsupported(f"{file}: DoRA on the embedding {module!r} is not supported yet")
        return LowRank((Product(Factor(a, flipped=True), Factor(b, flipped=True), scale),))
    low_rank = lora(a, b, scale)
    magnitude = parts.tensors.get("lora_magnitude_vector")
    if magnitude is None:
        return low_rank
    if math.prod(magnitude.shape) != b.shape[0]:
        raise AdapterMismatch(
            f"{file}: {magnitude.name!r} has {math.prod(magnitude.shape)} magnitudes for {b.shape[0]} outputs"
        )
    return Dora(low_rank, magnitude)


def _factor(file: str, module: str, parts: Parts, name: str) -> TensorEntry:
    entry = parts.tensors.get(name)
    if entry is None:
        has = listed(sorted(parts.tensors) or ["alpha"])
        raise AdapterMismatch(f"{file}: module {module!r} has {has} but no {name}; the file is incomplete")
    if len(entry.shape) == 1 or 0 in entry.shape:
        raise AdapterMismatch(
            f"{file}: tensor {entry.name!r} has shape {list(entry.shape)}: an empty shell, as DeepSpeed ZeRO-3 leaves "
            "when the parameters were not gathered before saving; save the adapter again"
        )
    if len(entry.shape) != 2:
        raise Unsupported(
            f"{file}: tensor {entry.name!r} has {len(entry.shape)} dimensions (a convolution or experts), "
            "which is not supported yet"
        )
    return entry


def _scalar(entry: TensorEntry) -> float:
    """The value of a one-element tensor."""
    import numpy as np

    if math.prod(entry.shape) != 1 or entry.dtype not in (*FLOATS, "I64", "I32"):
        raise BadFile(
            f"{entry.file}: {entry.name!r} should be one number, not {entry.dtype} of shape {list(entry.shape)}"
        )
    raw = bytearray(entry.nbytes)
    reader = Reader(entry.file)
    try:
        reader.into(memoryview(raw), entry.start)
    finally:
        reader.close()
    if entry.dtype == "BF16":
        return float(np.frombuffer(bytes(2) + bytes(raw), "<f4")[0])
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}
    return float(np.frombuffer(raw, kinds[entry.dtype])[0])
