"""Llama-shaped models and PEFT adapters made on the spot, and what merging them must give, in float64.

tensors = bases(LARGE, torch.bfloat16)                    name -> tensor, in the model's order
base    = write_base(folder / "base", tensors, shards=3)  a folder that transformers loads
adapter = write_adapter(folder / "adapter", tensors, rank=16, ratio=0.01)
exact(tensors[name], [adapter.terms[name]])               W0 + s·B·A, and how far a float32 sum may be off
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """The dimensions of a Llama; ``key`` is the width of its keys and values. Heads are 16 wide."""

    hidden: int = 96
    inner: int = 257
    key: int = 32
    vocabulary: int = 211
    layers: int = 2


SMALL = Sizes()
LARGE = Sizes(hidden=512, inner=1101, key=128, vocabulary=1103, layers=2)
"""Its widest layers have more than 2**19 elements, and most of its tensors begin off every border."""

MODULES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip

SIDE_FILES = {
    "generation_config.json": b'{"do_sample": false,\n  "eos_token_id": 2}',
    "tokenizer.json": b'{"version": "1.0"}\n',
    "tokenizer_config.json": '{"chat_template": "ü"}\r\n'.encode(),
    "LICENSE": b"As you like.\n",
    "modeling_own.py": b"raise SystemExit\n",
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "empty.txt": b"",
}


def config(sizes: Sizes, dtype: str = "bfloat16") -> dict[str, object]:
    """A LlamaConfig of these sizes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_attention_heads": sizes.hidden // 16,
        "num_key_value_heads": sizes.key // 16,
        "head_dim": 16,
        "num_hidden_layers": sizes.layers,
        "vocab_size": sizes.vocabulary,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def bases(sizes: Sizes = SMALL, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensors:
    """The weights of a Llama, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).mul_(0.02).to(dtype) for name, shape in _shapes(sizes).items()
    }


def mixed(sizes: Sizes = SMALL, seed: int = 0) -> Tensors:
    """Weights of every float dtype, and what else a checkpoint may hold: integers, odd sizes, scalars, nothing."""
    tensors = bases(sizes, torch.float32, seed)
    for position, name in enumerate(tensors):
        tensors[name] = tensors[name].to((torch.bfloat16, torch.float32, torch.float16)[position % 3])
    tensors |= {
        "model.positions": torch.arange(7),
        "model.mask": torch.arange(13, dtype=torch.uint8),
        "model.flags": torch.tensor([True, False, True]),
        "model.counts": torch.arange(5, dtype=torch.int16).view(5, 1),
        "model.step": torch.tensor(3.0, dtype=torch.float16),
        "model.wide": torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)).double(),
        "model.nothing": torch.empty(0, 5),
    }
    return tensors


def _shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocabulary, sizes.hidden)}
    for layer in range(sizes.layers):
        for module in MODULES:
            shapes[f"model.layers.{layer}.{module}.weight"] = _shape(sizes, module)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (sizes.hidden,)
    return {**shapes, "model.norm.weight": (sizes.hidden,), "lm_head.weight": (sizes.vocabulary, sizes.hidden)}


def _shape(sizes: Sizes, module: str) -> tuple[int, int]:
    if module.startswith("mlp"):
        return (sizes.hidden, sizes.inner) if module.endswith("down_proj") else (sizes.inner, sizes.hidden)
    return (sizes.key if module.endswith(("k_proj", "v_proj")) else sizes.hidden), sizes.hidden


# ------------------------------------------------------------------------------------------------------- bases


def write_base(
    folder: Path, tensors: Tensors, *, sizes: Sizes = SMALL, shards: int = 1, dtype: str = "bfloat16"
) -> Path:
    """A model folder: shards with an index (or one file), config and side files."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config(sizes, dtype))
    for name, data in SIDE_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt", "part": str(number)})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total, "own": 1}, "weight_map": weight_map}
    )
    return folder


def write_unaligned(file: Path, tensors: Tensors) -> Path:
    """One safetensors file with the tensors in exactly this order, wherever that puts their first bytes.

    The safetensors library sorts by dtype when it saves, so that every tensor of its own files is aligned; it reads
    files of any order.
    """
    codes = {
        torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64",
        torch.uint8: "U8", torch.int16: "I16", torch.int64: "I64", torch.bool: "BOOL",
    }  # fmt: skip
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        for tensor in tensors.values():
            stream.write(raw_bytes(tensor))
    return file


# ---------------------------------------------------------------------------------------------------- adapters


@dataclass(frozen=True)
class Term:
    """B, A and the scale of one delta, as stored."""

    b: torch.Tensor
    a: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Lora:
    """An adapter folder, and its deltas by the base's tensor names."""

    folder: Path
    terms: Mapping[str, Term]


def write_adapter(
    folder: Path,
    base: Mapping[str, torch.Tensor],
    *,
    targets: Sequence[str] = MODULES,
    rank: int = 16,
    ranks: Mapping[str, int] | None = None,
    ratio: float = 0.01,
    ratios: Mapping[str, float] | None = None,
    alpha: float = 32,
    rslora: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> Lora:
    """A PEFT folder with a delta of ‖ΔW‖ = ``ratio``·‖W0‖ for every weight whose module ends like a target.

    ``ranks`` and ``ratios`` give single modules, by their full path, others than ``rank`` and ``ratio``.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks, ratios = ranks or {}, ratios or {}
    tensors: Tensors = {}
    terms = {}
    for module in (name.removesuffix(".weight") for name in base):
        if not module.endswith(tuple(targets)):
            continue
        weight = base[f"{module}.weight"].double()
        own = ranks.get(module, rank)
        scale = alpha / (math.sqrt(own) if rslora else own)
        a = torch.randn(own, weight.shape[1], generator=generator, dtype=torch.float64)
        b = torch.randn(weight.shape[0], own, generator=generator, dtype=torch.float64)
        a /= math.sqrt(weight.shape[1])
        b *= ratios.get(module, ratio) * weight.norm() / (scale * (b @ a).norm())
        terms[f"{module}.weight"] = Term(b.to(dtype), a.to(dtype), scale)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.to(dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    facts = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "rank_pattern": dict(ranks),
        "target_modules": sorted({target.rsplit(".", 1)[-1] for target in targets}),
    }
    write_json(folder / "adapter_config.json", facts)
    return Lora(folder, terms)


# ------------------------------------------------------------------------------------------------ what is right


def exact(weight: torch.Tensor, terms: Iterable[tuple[Term, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """``W0 + Σ w·s·B·A`` in float64, and how far a float32 sum of it may be off.

    The latter is (R+4)·2⁻²³·(|W0| + Σ|w·s|·|B||A|) with R the total rank.
    """
    total, size, rank = weight.double(), weight.double().abs(), 0
    for term, factor in terms:
        total = total + factor * term.scale * (term.b.double() @ term.a.double())
        size = size + abs(factor * term.scale) * (term.b.double().abs() @ term.a.double().abs())
        rank += len(term.a)
    return total, (rank + 4) * 2.0**-23 * size


def half_unit(values: torch.Tensor) -> torch.Tensor:
    """Half a unit in the last place of each value, in float64."""
    facts = torch.finfo(values.dtype)
    exponents = torch.frexp(values.double()).exponent - 1
    lowest = math.frexp(facts.smallest_normal)[1] - 1
    return torch.ldexp(torch.full_like(values, facts.eps / 2, dtype=torch.float64), exponents.clamp(min=lowest))


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes as safetensors stores them."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def tree(path: Path) -> dict[str, str]:
    """Relative path, kind and mode of everything below ``path`` (or of the file it is), with digests of files."""
    found = {}
    for one in [path, *sorted(path.rglob("*"))]:
        facts = os.lstat(one)
        content = sha256(one) if stat.S_ISREG(facts.st_mode) else ""
        found[str(one.relative_to(path))] = f"{stat.filemode(facts.st_mode)} {content}"
    return found


def write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2), encoding="utf-8")
