"""The example behind ``lorasmith demo``: a Llama-shaped model, two adapters, and an exact check of their merge."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasmith.errors import BadFile

if TYPE_CHECKING:
    import torch

HIDDEN, HEADS, KEY_HEADS, INNER, LAYERS, VOCABULARY = 512, 8, 2, 1408, 8, 32000
SHARDS = 3

LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // HEADS * KEY_HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN // HEADS * KEY_HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
"""Shape (out, in) of every linear layer of a block."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KEY_HEADS,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
}


@dataclass(frozen=True)
class Example:
    """Paths of a base and an output, and adapters with their weights."""

    base: str
    adapters: tuple[tuple[str, float], ...]
    out: str


@dataclass(frozen=True)
class Check:
    """How many merged elements were looked at, and how many are not the value nearest to the exact one."""

    elements: int
    misrounded: int
    dtype: str


def make(folder: str) -> Example:
    """Write a base of about 110 MB in three bfloat16 shards and two adapters."""
    import torch

    generator = torch.Generator().manual_seed(20)
    base, all_linear, attention = (os.path.join(folder, name) for name in ("base", "all-linear", "attention"))
    _write_base(base, generator)
    _write_adapter(all_linear, generator, list(LINEAR), rank=8, use_rslora=False)
    _write_adapter(attention, generator, ["self_attn.q_proj", "self_attn.v_proj"], rank=16, use_rslora=True)
    return Example(base, ((all_linear, 0.7), (attention, 0.3)), os.path.join(folder, "merged"))


def check(example: Example) -> Check:
    """Compare every merged weight with ``W0 + Σ weight·scale·B·A`` in float64.

    Raises BadFile when one is off by more than one rounding: half a unit in the last place, and the error of the
    float32 sum, (rank + 4)·2⁻²³·(|W0| + Σ|weight·scale|·|B||A|).
    """
    import torch
    from safetensors import safe_open

    deltas = [_deltas(folder, weight) for folder, weight in example.adapters]
    elements = misrounded = 0
    for shard in sorted(name for name in os.listdir(example.base) if name.endswith(".safetensors")):
        paths = [os.path.join(folder, shard) for folder in (example.base, example.out)]
        with safe_open(paths[0], "pt") as base, safe_open(paths[1], "pt") as merged:
            for name in base.keys():  # noqa: SIM118 - not a mapping
                before, after = base.get_tensor(name), merged.get_tensor(name)
                own = [delta[name] for delta in deltas if name in delta]
                exact, size, rank = before.to(torch.float64), before.to(torch.float64).abs(), 0
                for b, a, factor in own:
                    exact += factor * (b.to(torch.float64) @ a.to(torch.float64))
                    size += abs(factor) * (b.to(torch.float64).abs() @ a.to(torch.float64).abs())
                    rank += len(a)
                allowed = _half_unit(after) + (rank + 4) * 2.0**-23 * size if own else torch.zeros_like(size)
                if ((after.to(torch.float64) - exact).abs() > allowed).any():
                    raise BadFile(f"{paths[1]}: tensor {name!r} is not what was asked for")
                misrounded += int((after != exact.to(after.dtype)).sum())
                elements += after.numel() if own else 0
    return Check(elements, misrounded, CONFIG["torch_dtype"])  # type: ignore[arg-type]


def _half_unit(values: torch.Tensor) -> torch.Tensor:
    """Half a unit in the last place of bfloat16 values: 8 bits of precision."""
    import torch

    exponents = torch.frexp(values.to(torch.float64)).exponent
    return torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponents - 9)


def _deltas(folder: str, weight: float) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """B, A and the factor of every tensor an adapter changes."""
    from safetensors.torch import load_file

    with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as stream:
        config = json.load(stream)
    scale = config["lora_alpha"] / (config["r"] ** (0.5 if config["use_rslora"] else 1))
    tensors = load_file(os.path.join(folder, "adapter_model.safetensors"))
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        f"{module.removeprefix('base_model.model.')}.weight": (
            tensors[f"{module}.lora_B.weight"],
            tensors[f"{module}.lora_A.weight"],
            weight * scale,
        )
        for module in modules
    }


def _base_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        for module, shape in LINEAR.items():
            yield f"model.layers.{layer}.{module}.weight", shape
        yield f"model.layers.{layer}.input_layernorm.weight", (HIDDEN,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _write_base(folder: str, generator: torch.Generator) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        name: torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16) for name, shape in _base_shapes()
    }
    os.makedirs(folder)
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(SHARDS):
        shard = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = names[number * len(names) // SHARDS : (number + 1) * len(names) // SHARDS]
        save_file({name: tensors[name] for name in part}, os.path.join(folder, shard), {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(os.path.join(folder, "config.json"), CONFIG)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(os.path.join(folder, "model.safetensors.index.json"), index)


def _write_adapter(folder: str, generator: torch.Generator, modules: list[str], *, rank: int, use_rslora: bool) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for layer in range(LAYERS):
        for module in modules:
            out, inputs = LINEAR[module]
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator).mul_(inputs**-0.5)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, rank, generator=generator).mul_(0.001)
    os.makedirs(folder)
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": 16,
        "use_rslora": use_rslora,
        "target_modules": sorted({module.split(".")[1] for module in modules}),
    }
    _write_json(os.path.join(folder, "adapter_config.json"), config)


def _write_json(path: str, value: object) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2)
