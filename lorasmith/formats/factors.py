"""The LoRA tensors of an adapter's modules, as PEFT stores them, and the Deltas they stand for."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lorasmith.adapter import ModuleDelta
from lorasmith.deltas import Delta
from lorasmith.deltas.addition import Addition
from lorasmith.deltas.dora import Dora
from lorasmith.deltas.low_rank import Factor, LowRank, Product
from lorasmith.dtypes import FLOATS, torch_dtype
from lorasmith.errors import AdapterMismatch, BadFile, Unsupported, listed
from lorasmith.formats.bdlora import BlockDiagonal, read_block_diagonal
from lorasmith.formats.scales import Scales
from lorasmith.safefile import Reader, TensorEntry

BIAS = "lora_B.bias"
MAGNITUDE = "lora_magnitude_vector"


@dataclass
class Parts:
    """The tensors of one module, by role."""

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    alpha: TensorEntry | None = None

    @property
    def names(self) -> tuple[str, ...]:
        entries = [*self.tensors.values(), *([self.alpha] if self.alpha else [])]
        return tuple(entry.name for entry in entries)


@dataclass(frozen=True)
class _Place:
    """The base's parameters that a module's factors and bias are for, and how its scale is found.

    ``configured`` is the module whose rank and alpha it has; its product counts ``times`` over.
    """

    module: str
    weight: str
    bias: str
    configured: str
    times: int = 1


def read_modules(
    file: str, where: str, modules: Mapping[str, Parts], scales: Scales, config: Mapping[str, Any]
) -> Iterator[ModuleDelta]:
    """The deltas that the modules' tensors stand for: of a weight, and of a bias where one was trained with it.

    ``where`` is the file the LoraConfig is from. Raises AdapterMismatch when a tensor is missing or does not fit the
    others, Unsupported for what cannot be merged.
    """
    blocks = read_block_diagonal(where, config)
    for module, parts in modules.items():
        place = _place(file, module, modules)
        _require_bias(where, place.configured, parts, blocks, config.get("lora_bias"))
        yield from _read_module(file, place, parts, scales, blocks)


def _place(file: str, module: str, modules: Container[str]) -> _Place:
    """Where a module's deltas belong; of ``torch.nn.MultiheadAttention``, PEFT names its own wrapper's parts.

    It adds the output's product twice, in every forward pass and in merging (``lora.MultiheadAttention.merge``, and
    ``Linear.merge`` behind it), so that is what was trained; the output's bias it adds once.
    """
    if f"{module}.base_layer.out_proj" in modules:
        return _Place(module, "in_proj_weight", "in_proj_bias", module)
    attention, mark, _ = module.rpartition(".base_layer.out_proj")
    if not mark or attention not in modules:
        return _Place(module, "weight", "bias", module)
    output = f"{attention}.out_proj"
    if output in modules:
        raise Unsupported(
            f"{file}: the output of the attention {attention!r} has two sets of factors, {module!r} and {output!r}; "
            "PEFT leaves the latter out of what the model computes, so it is not known what was meant"
        )
    return _Place(output, "weight", "bias", attention, times=2)


def _require_bias(where: str, module: str, parts: Parts, blocks: BlockDiagonal, said: object) -> None:
    """Refuse an adapter whose config and tensors disagree about biases."""
    bias = parts.tensors.get(BIAS)
    if said and bias is None and blocks.of(module)[1] == 1:
        raise AdapterMismatch(f"{where} says lora_bias, but module {module!r} has no {BIAS}; the adapter is incomplete")
    if said is False and bias is not None:
        raise AdapterMismatch(
            f"{where} says lora_bias = false, but the adapter holds {bias.name!r}; "
            "the config belongs to another adapter"
        )


def _read_module(
    file: str, place: _Place, parts: Parts, scales: Scales, blocks: BlockDiagonal
) -> Iterator[ModuleDelta]:
    embedding = "lora_embedding_A" in parts.tensors or "lora_embedding_B" in parts.tensors
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    a, b = (_factor(file, place.module, parts, name) for name in names)
    product = _product(a, b, blocks.of(place.configured))
    alpha = None if parts.alpha is None else _scalar(parts.alpha)
    scale = scales.of(place.configured, a.shape[0], alpha)
    direction = LowRank((replace(product, coefficient=scale * place.times),))
    delta: Delta = _dora(direction, parts) if MAGNITUDE in parts.tensors else direction
    if embedding:
        delta = delta.transposed()
    bias = parts.tensors.get(BIAS)
    applied = bias is not None and _is_applied(place, bias, b)
    tensors = tuple(name for name in parts.names if bias is None or not applied or name != bias.name)
    yield ModuleDelta(place.module, place.weight, delta, tensors, embedding or len(a.shape) > 2)
    if bias is not None and applied:
        yield ModuleDelta(place.module, place.bias, Addition(Factor(bias), scale), (bias.name,), True)


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
    if len(entry.shape) not in ((2,) if "embedding" in name else (2, 3, 4, 5)):
        raise Unsupported(
            f"{file}: tensor {entry.name!r} has {len(entry.shape)} dimensions, which no factor that PEFT writes has"
        )
    return entry


def _product(a: TensorEntry, b: TensorEntry, blocks: tuple[int, int]) -> Product:
    """B·A, of a linear layer's matrices (with so many blocks in A and B) or of a convolution's kernels."""
    if len(a.shape) > 2 or len(b.shape) > 2:
        return _convolution(a, b)
    for entry, count in zip((a, b), blocks, strict=True):
        if entry.shape[0] % count:
            raise AdapterMismatch(
                f"{entry.file}: {entry.name!r} has {entry.shape[0]} rows, which are not {count} blocks, as the config "
                "says; it belongs to another adapter"
            )
    left, right = Factor(b, spread=blocks[1]), Factor(a, spread=blocks[0])
    if left.shape[1] != right.shape[0]:
        raise _of_two_ranks(a, b, left.shape[1])
    return Product(left, right, 1.0)


def _convolution(a: TensorEntry, b: TensorEntry) -> Product:
    """B·A for A of shape (rank, in, k…), a kernel like the base's, and B of shape (out, rank/groups, 1…).

    PEFT (``lora._ConvNd.update_layer``) gives B the base's groups, and A none.
    """
    rank, width = a.shape[0], b.shape[1]
    if len(a.shape) != len(b.shape) or math.prod(b.shape[2:]) != 1:
        raise AdapterMismatch(
            f"{a.file}: {a.name!r} has shape {list(a.shape)} and {b.name!r} {list(b.shape)}; of a convolution, the "
            "latter has a kernel of ones in as many dimensions"
        )
    groups = rank // width
    if width * groups != rank or a.shape[1] % groups or b.shape[0] % groups:
        raise _of_two_ranks(a, b, width)
    if groups > 1:
        _require_own_inputs(a, b, groups)
    return Product(Factor(b, spread=groups), Factor(a, diagonal=groups), 1.0)


def _of_two_ranks(a: TensorEntry, b: TensorEntry, rank: int) -> AdapterMismatch:
    return AdapterMismatch(
        f"{a.file}: {a.name!r} has rank {a.shape[0]} and {b.name!r} has rank {rank}; they are not of one adapter"
    )


def _require_own_inputs(a: TensorEntry, b: TensorEntry, groups: int) -> None:
    """Refuse an A through which outputs of a grouped convolution see inputs of other groups.

    The base's weight, (out, in/groups, k…), has no place for these, so the adapted layer can be written down as the
    base's kind of layer only where all of them are zero: in A, or in the column of B that reads that row of A.
    """
    rank, outputs, inputs = a.shape[0] // groups, b.shape[0] // groups, a.matrix[1] // groups
    reader = Reader(a.file)
    try:
        for group in range(groups):
            rows = Factor(a).read(reader, slice(group * rank, (group + 1) * rank), torch_dtype(a.dtype))
            columns = Factor(b).read(reader, slice(group * outputs, (group + 1) * outputs), torch_dtype(b.dtype))
            rows[:, group * inputs : (group + 1) * inputs] = 0
            if (rows.ne(0).any(dim=1) & columns.ne(0).any(dim=0)).any():
                raise Unsupported(
                    f"{a.file}: {a.name!r} is for a convolution in {groups} groups and takes from inputs of all of "
                    "them, as PEFT's factors do: with it, an output depends on inputs outside its group, for which "
                    "the base's weight has no place. It cannot be merged; leave such layers out of target_modules"
                )
    finally:
        reader.close()


def _dora(direction: LowRank, parts: Parts) -> Dora:
    magnitude, (product,) = parts.tensors[MAGNITUDE], direction.products
    if product.left.spread > 1 or product.right.spread > 1:
        raise Unsupported(
            f"{magnitude.file}: {magnitude.name!r} makes a DoRA of a grouped convolution or of block-diagonal factors. "
            "PEFT merges no such thing, and takes norms of another product than the layer computes"
        )
    if BIAS in parts.tensors:
        raise Unsupported(
            f"{magnitude.file}: {magnitude.name!r} comes with {parts.tensors[BIAS].name!r}, DoRA with lora_bias, which "
            "PEFT does not have"
        )
    if math.prod(magnitude.shape) != direction.shape[0]:
        raise AdapterMismatch(
            f"{magnitude.file}: {magnitude.name!r} has {math.prod(magnitude.shape)} magnitudes for "
            f"{direction.shape[0]} outputs"
        )
    return Dora(direction, magnitude)


def _is_applied(place: _Place, bias: TensorEntry, b: TensorEntry) -> bool:
    """Whether a bias changes the base's; PEFT has one for an attention's input too, and never uses it."""
    if bias.shape != b.shape[:1]:
        raise AdapterMismatch(
            f"{bias.file}: {bias.name!r} has shape {list(bias.shape)} and {b.name!r} has {b.shape[0]} outputs; "
            "they are not of one adapter"
        )
    if _is_zero(bias):
        return False
    if place.weight != "weight":
        raise Unsupported(
            f"{bias.file}: {bias.name!r} is not zero, as PEFT leaves it: what it trains for the input of a "
            "torch.nn.MultiheadAttention has no bias, so it is not known what was meant"
        )
    return True


def _is_zero(entry: TensorEntry) -> bool:
    reader = Reader(entry.file)
    try:
        return not bool(Factor(entry).read(reader, slice(0, entry.matrix[0]), torch_dtype(entry.dtype)).any())
    finally:
        reader.close()


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
