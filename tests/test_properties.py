"""Whatever model, adapters and options: every byte of a result comes from one step, and every number is what float64
says, to one rounding.

Examples are drawn by hypothesis: names, shapes, dtypes, shards, kinds of deltas, options. The numbers in the tensors
follow from a seed. Runs are the same each time.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from generate import SMALL, config, half_unit, raw_bytes, write_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tiling import require_tiled

import lorasmith

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "C64": 8,
    "F16": 2, "BF16": 2, "F32": 4, "F64": 8,
}  # fmt: skip
"""Bytes of an element of every dtype that a model which is not quantised may have."""

OPTIONS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

MEMORY = 512 << 20
"""What the widest matrix drawn takes with the highest rank, and more."""


# ------------------------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class Tensor:
    """A tensor of the base; ``module`` is its layer if adapters change it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    module: str | None = None


@dataclass(frozen=True)
class Change:
    """What an adapter has for a module: a kind, the dtype of its tensors, a rank, and tokens."""

    tensor: Tensor
    kind: str
    dtype: str
    rank: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Lora:
    """An adapter and its weight."""

    changes: tuple[Change, ...]
    weight: float
    alpha: float
    rslora: bool

    def scale(self, rank: int) -> float:
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class Case:
    """A model in files (one without a folder if ``bare``), adapters for it, options of a merge, and a seed."""

    files: tuple[tuple[Tensor, ...], ...]
    bare: bool
    adapters: tuple[Lora, ...]
    options: dict[str, Any]
    seed: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(one for file in self.files for one in file)


SIGNS = st.characters(exclude_categories=["Cs"], exclude_characters=".")
RESERVED = {"module", "base_model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
"""Words that stand for nothing in an adapter's names."""

WORDS = st.one_of(
    st.sampled_from(
        ["layers", "0", "12", "model", "q_proj", "weight", "bias", "é", "层", "a b", " ", "🙂", "\n", "x" * 400]
    ),
    st.text(SIGNS, min_size=1, max_size=12),
).filter(
    lambda word: word not in RESERVED and not word.startswith(("lora_", "ia3_", "hada_", "lokr_", "vera_", "oft_"))
)
MODULES = st.lists(WORDS, min_size=1, max_size=6).map(".".join)
NAMES = st.one_of(MODULES, st.text(st.characters(exclude_categories=["Cs"]), max_size=40)).filter(
    lambda name: name != "__metadata__"
)
FEW = st.sampled_from([1, 1, 2, 3, 5, 7, 8, 16, 17, 33])
SMALL_MATRICES = st.tuples(FEW, FEW)
LARGE_MATRICES = st.sampled_from([(641, 823), (1, 530_001), (530_001, 1)])
"""Each takes more than one block."""

MATRICES = st.sampled_from([SMALL_MATRICES] * 15 + [LARGE_MATRICES]).flatmap(lambda some: some)
SHAPES = st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 9]), max_size=4).map(tuple)
KINDS = ("LoRA", "LoRA", "LoRA", "LoRA", "transposed", "embedding", "DoRA", "replacement", "token rows")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    names = draw(st.lists(NAMES, max_size=6, unique=True))
    modules = draw(st.lists(MODULES, min_size=1, max_size=4, unique=True))
    tensors = [Tensor(name, draw(st.sampled_from(list(SIZES))), draw(SHAPES)) for name in names]
    layers = [
        Tensor(f"{module}.weight", draw(st.sampled_from(list(FLOATS))), draw(MATRICES), module) for module in modules
    ]
    taken = {layer.name for layer in layers}
    everything = draw(st.permutations([*layers, *(one for one in tensors if one.name not in taken)]))
    bare = draw(st.sampled_from([False, False, False, True]))
    count = 1 if bare else draw(st.integers(1, min(4, len(everything))))
    cuts = (
        sorted(draw(st.sets(st.integers(1, len(everything) - 1), min_size=count - 1, max_size=count - 1)))
        if count > 1
        else []
    )
    files = [tuple(everything[a:b]) for a, b in zip([0, *cuts], [*cuts, len(everything)], strict=True)]
    options: dict[str, Any] = {
        "dtype": draw(st.sampled_from(["keep", "keep", *OPTIONS])),
        "max_shard_size": None if bare else draw(st.sampled_from([None, None, 1, 100, 5_000, 10**9])),
    }
    adapters = tuple(draw(loras(layers)) for _ in range(draw(st.sampled_from([1, 1, 2, 3]))))
    return Case(tuple(files), bare, adapters, options, draw(st.integers(0, 2**32)))


@st.composite
def loras(draw: st.DrawFn, layers: list[Tensor]) -> Lora:
    chosen = draw(st.lists(st.sampled_from(layers), min_size=1, unique=True))
    changes = []
    # rows of one number may become zero, and PEFT's DoRA divides by their length
    use_dora = draw(st.sampled_from([False, False, False, True])) and all(layer.shape[1] > 1 for layer in chosen)
    for layer in chosen:
        rows = layer.shape[0]
        kind = draw(st.sampled_from(KINDS))
        square = layer.shape[0] == layer.shape[1]
        if kind == "transposed" and square:  # which way round it is could not be known
            kind = "LoRA"
        if use_dora != (kind == "DoRA") and kind in ("LoRA", "transposed", "embedding", "DoRA"):
            kind = "DoRA" if use_dora else "LoRA"
        tokens = (
            draw(st.sets(st.integers(0, rows - 1), min_size=1, max_size=min(rows, 5))) if kind == "token rows" else ()
        )
        dtype = draw(st.sampled_from(["F32", "BF16", "F16"]))
        changes.append(Change(layer, kind, dtype, draw(st.sampled_from([1, 2, 3, 8, 17])), tuple(tokens)))
    if sum(change.kind == "token rows" for change in changes) > 1:  # the config has one list of tokens
        first = next(change for change in changes if change.kind == "token rows")
        changes = [change for change in changes if change.kind != "token rows" or change is first]
    if all(change.kind in ("replacement", "token rows") for change in changes):  # PEFT makes no such adapter
        changes[0] = replace(changes[0], kind="DoRA" if use_dora else "LoRA", tokens=())
    weight = draw(st.sampled_from([1.0, 1.0, 1.0, 0.5, -0.7, 0.0, 1.3, -1.0]))
    return Lora(tuple(changes), weight, draw(st.sampled_from([1, 8, 16, 0.5, -4])), draw(st.booleans()))


# ------------------------------------------------------------------------------------------------- what is written


class Numbers:
    """Tensors made from a seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: tuple[int, ...], size: float, dtype: str) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).mul_(size).to(FLOATS[dtype])

    def raw(self, nbytes: int) -> bytes:
        return torch.randint(256, (nbytes,), generator=self._generator, dtype=torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Written:
    """A case on disk: the model's bytes by name, and every adapter's tensors by module and role."""

    base: Path
    adapters: list[Path]
    contents: dict[str, bytes]
    factors: list[dict[str, dict[str, torch.Tensor]]]


def write(case: Case, folder: Path) -> Written:
    numbers = Numbers(case.seed)
    base = folder / "base"
    base.mkdir()
    write_json(base / "config.json", {**config(SMALL), "architectures": ["LlamaModel"]})
    contents = {one.name: _content(case, one, numbers) for one in case.tensors}
    names = [
        "model.safetensors" if len(case.files) == 1 else f"model-{number:05d}-of-{len(case.files):05d}.safetensors"
        for number in range(1, len(case.files) + 1)
    ]
    for name, tensors in zip(names, case.files, strict=True):
        _write_file(base / name, tensors, contents)
    if len(case.files) > 1:
        placed = {one.name: name for name, tensors in zip(names, case.files, strict=True) for one in tensors}
        write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": placed})
    factors = [_factors(lora, numbers, contents) for lora in case.adapters]
    adapters = [folder / f"adapter {number}" for number in range(len(case.adapters))]
    for lora, path, some in zip(case.adapters, adapters, factors, strict=True):
        _write_adapter(path, lora, some)
    return Written(base / "model.safetensors" if case.bare else base, adapters, contents, factors)


def _content(case: Case, tensor: Tensor, numbers: Numbers) -> bytes:
    """Any bytes where they are only copied; numbers of a model's size where they are added to or converted."""
    if tensor.module is None and (case.options["dtype"] == "keep" or tensor.dtype not in FLOATS):
        return numbers.raw(math.prod(tensor.shape) * SIZES[tensor.dtype])
    return raw_bytes(numbers.normal(tensor.shape, 0.05, tensor.dtype))


def _write_file(file: Path, tensors: tuple[Tensor, ...], contents: dict[str, bytes]) -> None:
    """A safetensors file with its tensors in this order, wherever that puts their first bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for one in tensors:
        end = position + len(contents[one.name])
        header[one.name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, ensure_ascii=False).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(contents[one.name] for one in tensors))


def _factors(lora: Lora, numbers: Numbers, contents: dict[str, bytes]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors that an adapter has for each module, by what PEFT calls them."""
    found = {}
    for change in lora.changes:
        rows, columns = change.tensor.shape
        rank, dtype = change.rank, change.dtype
        assert change.tensor.module is not None
        if change.kind == "replacement":
            one = {"weight": numbers.normal((rows, columns), 0.05, dtype)}
        elif change.kind == "token rows":
            name = "token_adapter.trainable_tokens_delta"
            one = {name: numbers.normal((len(change.tokens), columns), 0.05, dtype)}
        elif change.kind == "embedding":
            one = {
                "lora_embedding_A": numbers.normal((rank, rows), 0.1, dtype),
                "lora_embedding_B": numbers.normal((columns, rank), 0.1, dtype),
            }
        else:
            out, into = (columns, rows) if change.kind == "transposed" else (rows, columns)
            a, b = numbers.normal((rank, into), 0.1, dtype), numbers.normal((out, rank), 0.1, dtype)
            one = {"lora_A.weight": a, "lora_B.weight": b}
            if change.kind == "DoRA":
                one["lora_magnitude_vector"] = numbers.normal((out,), 0.05, dtype).abs() + 0.2
        found[change.tensor.module] = one
    return found


def _write_adapter(path: Path, lora: Lora, factors: dict[str, dict[str, torch.Tensor]]) -> None:
    path.mkdir()
    tensors = {
        f"base_model.model.{module}.{role}": tensor for module, some in factors.items() for role, tensor in some.items()
    }
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    ranked = [change for change in lora.changes if change.kind not in ("replacement", "token rows")]
    facts = {
        "peft_type": "LORA",
        "r": ranked[0].rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "use_dora": any(change.kind == "DoRA" for change in lora.changes),
        "rank_pattern": {re.escape(change.tensor.module or ""): change.rank for change in ranked},
        "trainable_token_indices": next((list(one.tokens) for one in lora.changes if one.kind == "token rows"), None),
    }
    write_json(path / "adapter_config.json", facts)


# --------------------------------------------------------------------------------------------------- what is right


@dataclass
class Sum:
    """A sum in float64, how large its parts are, and how many roundings to float32 each of them may take."""

    total: torch.Tensor
    size: torch.Tensor
    roundings: int


def expected(case: Case, written: Written, tensor: Tensor) -> Sum | torch.Tensor | None:
    """What a tensor becomes: a sum, another tensor bit for bit, or (None) what it was."""
    terms = [
        (lora, change, written.factors[number][change.tensor.module or ""])
        for number, lora in enumerate(case.adapters)
        for change in lora.changes
        if change.tensor == tensor and lora.weight != 0
    ]
    if not terms:
        return None
    if len(terms) == 1 and terms[0][0].weight == 1 and terms[0][1].kind == "replacement":
        return terms[0][2]["weight"]
    w0 = stored(written.contents[tensor.name], tensor)
    whole = Sum(w0.clone(), w0.abs(), 4)
    for lora, change, factors in terms:
        _add(whole, w0, lora, change, factors)
    return whole


def stored(raw: bytes, tensor: Tensor) -> torch.Tensor:
    """A tensor's values in float64."""
    return torch.frombuffer(bytearray(raw), dtype=FLOATS[tensor.dtype]).view(tensor.shape).double()


def _add(whole: Sum, w0: torch.Tensor, lora: Lora, change: Change, factors: dict[str, torch.Tensor]) -> None:
    weight = abs(lora.weight)
    wide = {role: tensor.double() for role, tensor in factors.items()}
    if change.kind in ("replacement", "token rows"):
        new = w0.clone()
        new[list(change.tokens) if change.kind == "token rows" else slice(None)] = next(iter(wide.values()))
        whole.total += lora.weight * (new - w0)
        whole.size += weight * (new.abs() + w0.abs())
        whole.roundings += 3
        return
    a, b = (next(wide[role] for role in wide if f"_{letter}" in role) for letter in "AB")
    delta, size = (lora.scale(change.rank) * (b @ a), abs(lora.scale(change.rank)) * (b.abs() @ a.abs()))
    if change.kind in ("transposed", "embedding"):
        delta, size = delta.t(), size.t()
    whole.roundings += change.rank
    if change.kind != "DoRA":
        whole.total += lora.weight * delta
        whole.size += weight * size
        return
    adapted, parts = w0 + delta, w0.abs() + size
    norm = adapted.norm(dim=1, keepdim=True)
    ratio = wide["lora_magnitude_vector"].view(-1, 1) / norm
    # a norm of numbers that cancelled is off by as much as they are, and so is all that is divided by it
    condition = 1 + parts.norm(dim=1, keepdim=True) / norm
    whole.total += lora.weight * (ratio * adapted - w0)
    whole.size += weight * (ratio * parts * condition + w0.abs())
    whole.roundings += 8 + w0.shape[1].bit_length() * 8


def require_right(case: Case, written: Written, out: Path) -> None:
    """The result has the base's tensors, each of them as it must be, in files that the safetensors library reads."""
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    files = [out] if case.bare else sorted(out.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as stream:
            shapes = {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
        some = {name: (facts["dtype"], tuple(facts["shape"]), bytes(facts["data"])) for name, facts in _raw(file)}
        assert {name: shape for name, (_, shape, _) in some.items()} == shapes
        assert not some.keys() & found.keys()
        found |= some
    assert found.keys() == {tensor.name for tensor in case.tensors}
    for tensor in case.tensors:
        dtype, shape, raw = found[tensor.name]
        wanted = OPTIONS.get(case.options["dtype"], tensor.dtype) if tensor.dtype in FLOATS else tensor.dtype
        assert (dtype, shape) == (wanted, tensor.shape), tensor
        _require_values(case, written, tensor, dtype, raw)


def _raw(file: Path) -> list[tuple[str, dict[str, Any]]]:
    return safetensors.deserialize(file.read_bytes())


def _require_values(case: Case, written: Written, tensor: Tensor, dtype: str, raw: bytes) -> None:
    value = expected(case, written, tensor)
    if value is None:
        before = written.contents[tensor.name]
        if dtype != tensor.dtype:
            before = raw_bytes(
                torch.frombuffer(bytearray(before), dtype=FLOATS[tensor.dtype]).to(FLOATS[dtype])
                if before
                else torch.empty(0)
            )
        assert raw == before, tensor
    elif isinstance(value, torch.Tensor):
        assert raw == raw_bytes(value.to(FLOATS[dtype])), tensor
    else:
        merged = torch.frombuffer(bytearray(raw), dtype=FLOATS[dtype]).view(tensor.shape)
        off = (merged.double() - value.total).abs()
        limit = half_unit(merged) + value.roundings * 2.0**-23 * value.size
        assert (off <= limit).all(), (tensor, (off / limit).max())


# ------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A folder in memory where the system has one."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="lorasmith-properties-", dir=where) as folder:
        yield Path(folder)


def in_folder(scratch: Path, case: Case) -> tuple[Written, Path]:
    shutil.rmtree(scratch / "case", ignore_errors=True)
    (scratch / "case").mkdir()
    return write(case, scratch / "case"), scratch / "case" / ("out.safetensors" if case.bare else "out")


def require_plan(scratch: Path, case: Case) -> None:
    written, out = in_folder(scratch, case)
    adapters = [(path, lora.weight) for path, lora in zip(written.adapters, case.adapters, strict=True)]
    plan = lorasmith.plan(written.base, adapters, out, **case.options)
    require_tiled(plan)
    changed = [expected(case, written, tensor) for tensor in case.tensors]
    replaced = sum(isinstance(one, torch.Tensor) for one in changed)
    assert (plan.tensors_replaced, plan.tensors_merged) == (replaced, sum(isinstance(one, Sum) for one in changed))
    kept = plan.tensors_copied + plan.tensors_converted
    assert kept == len(case.tensors) - plan.tensors_merged - plan.tensors_replaced


def require_merge(scratch: Path, case: Case) -> None:
    written, out = in_folder(scratch, case)
    adapters = [(path, lora.weight) for path, lora in zip(written.adapters, case.adapters, strict=True)]
    lorasmith.merge(written.base, adapters, out, threads=2, memory=MEMORY, **case.options)
    require_right(case, written, out)


def examples(count: int) -> settings:
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


@examples(300)
@given(case=cases())
def test_a_plan_covers_every_byte_of_the_result_once(scratch: Path, case: Case) -> None:
    require_plan(scratch, case)


@examples(250)
@given(case=cases())
def test_a_merge_gives_what_float64_gives_to_one_rounding_and_copies_the_rest(scratch: Path, case: Case) -> None:
    require_merge(scratch, case)


@pytest.mark.slow
@examples(3000)
@given(case=cases())
def test_very_many_plans_cover_every_byte_of_the_result_once(scratch: Path, case: Case) -> None:
    require_plan(scratch, case)


@pytest.mark.slow
@examples(3000)
@given(case=cases())
def test_very_many_merges_give_what_float64_gives_to_one_rounding_and_copy_the_rest(scratch: Path, case: Case) -> None:
    require_merge(scratch, case)
