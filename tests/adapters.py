"""Adapters of every kind of layer, made on the spot, and what they do, in float64.

path = write(folder / "a", Facts({"linear": 4, "conv": 2}, alpha=8, ...))   a PEFT folder
dense(path)                                                                  module -> ΔW, as PEFT computes it
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from generate import write_json
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
KINDS = {"linear": (9, 14), "wide": (7, 40), "tall": (33, 6), "embed": (21, 8), "conv": (5, 4, 3, 3)}
"""Shapes of weights: of linear layers (outputs, inputs), of an embedding, of a convolution's kernel."""


def factors(kind: str, rank: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random A and B of a kind of layer, by the names and in the shapes that PEFT has for it."""
    shape = KINDS[kind]

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    if kind == "embed":
        names = ("lora_embedding_A", "lora_embedding_B")
        return {names[0]: draw(rank, shape[0]), names[1]: draw(shape[1], rank)}
    if kind == "conv":
        return {"lora_A.weight": draw(rank, *shape[1:]), "lora_B.weight": draw(shape[0], rank, 1, 1)}
    return {"lora_A.weight": draw(rank, shape[1]), "lora_B.weight": draw(shape[0], rank)}


@dataclass(frozen=True)
class Facts:
    """What a drawn adapter is: its modules' kinds and ranks, alpha, how it is scaled and stored."""

    ranks: Mapping[str, int]
    alpha: float
    rslora: bool
    dtype: torch.dtype
    seed: int


def write(folder: Path, facts: Facts) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(facts.seed)
    tensors = {
        f"{PREFIX}{kind}.{name}": tensor
        for kind, rank in facts.ranks.items()
        for name, tensor in factors(kind, rank, generator, facts.dtype).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    first = next(iter(facts.ranks.values()))
    others = {f"{kind}": rank for kind, rank in facts.ranks.items() if rank != first}
    config = {
        "peft_type": "LORA", "r": first, "lora_alpha": facts.alpha, "use_rslora": facts.rslora, "rank_pattern": others,
        "base_model_name_or_path": "base", "target_modules": list(facts.ranks),
    }  # fmt: skip
    write_json(folder / "adapter_config.json", config)
    return folder


def config_of(path: Path) -> Any:
    if path.is_dir():
        return json.loads((path / "adapter_config.json").read_text())
    with safe_open(str(path), "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


def dense(path: Path) -> dict[str, torch.Tensor]:
    """Every module's delta, (outputs, inputs) in float64, as PEFT computes it from these files."""
    tensors = load_file(path / "adapter_model.safetensors" if path.is_dir() else path)
    config = config_of(path)
    deltas = {}
    for name, tensor in tensors.items():
        if "lora_A" not in name and "lora_embedding_A" not in name:
            continue
        module = name.removeprefix(PREFIX).split(".lora_")[0]
        a = tensor.double().flatten(1)
        b = tensors[name.replace("_A", "_B")].double().flatten(1)
        rank = config["rank_pattern"].get(module, config["r"])
        alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
        assert rank == len(a) == b.shape[1], module
        deltas[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * b @ a
    return deltas


def summed(parts: Sequence[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for path, weight in parts:
        for module, delta in dense(path).items():
            total[module] = total.get(module, 0) + weight * delta
    return total


def apart(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], beside: float = 0.0) -> float:
    """The largest relative difference of two adapters' deltas; a module that is missing is zero."""
    worst = 0.0
    for module in {*mine, *theirs}:
        one, other = mine.get(module), theirs.get(module)
        known = one if one is not None else other
        assert known is not None
        zero = torch.zeros_like(known)
        gap = float(((zero if one is None else one) - (zero if other is None else other)).norm())
        worst = max(worst, gap / max(float((zero if other is None else other).norm()), beside, 1e-30))
    return worst


def write_pair(folder: Path) -> list[tuple[Path, float]]:
    """Two adapters of every kind of layer, with spectra that fall off."""
    parts = []
    for number, (rank, weight) in enumerate(((4, 0.8), (3, -1.1))):
        facts = Facts(dict.fromkeys(KINDS, rank), 6.0, False, torch.float32, number)
        path = write(folder / f"a{number}", facts)
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if "_B" in name:
                falling = 2.0 ** -torch.arange(rank).float()
                tensors[name] = (tensor.flatten(1) * falling).reshape(tensor.shape)
        save_file(tensors, file)
        parts.append((path, weight))
    return parts
