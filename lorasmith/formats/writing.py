"""Writing PEFT's LoRA: what its tensors are called and shaped, and the LoraConfig that makes PEFT load them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasmith.adapter import Adapter, ModuleDelta
from lorasmith.deltas import Delta
from lorasmith.errors import AdapterMismatch, Unsupported
from lorasmith.formats.peft import PREFIX

_OUTPUT = ".base_layer.out_proj"
"""What PEFT calls the output of its own wrapper of ``torch.nn.MultiheadAttention``."""


@dataclass(frozen=True)
class Site:
    """Where PEFT keeps the factors for one weight: the ``module`` as it names it, and what kind of layer that is.

    ``shape`` is (outputs, inputs), and ``kernel`` what follows the inputs in a convolution's A. The product counts
    ``times`` over.
    """

    module: str
    shape: tuple[int, int]
    embedding: bool = False
    kernel: tuple[int, ...] = ()
    times: int = 1

    def a(self, rank: int) -> tuple[str, tuple[int, ...]]:
        """Name and shape of the A of that rank."""
        name = "lora_embedding_A" if self.embedding else "lora_A.weight"
        inputs = self.shape[1] // max(1, math.prod(self.kernel))
        return f"{PREFIX}{self.module}.{name}", (rank, inputs, *self.kernel)

    def b(self, rank: int) -> tuple[str, tuple[int, ...]]:
        """Name and shape of the B of that rank."""
        name = "lora_embedding_B" if self.embedding else "lora_B.weight"
        return f"{PREFIX}{self.module}.{name}", (self.shape[0], rank, *(1 for _ in self.kernel))

    def bias(self) -> str:
        """The name of a bias on B."""
        return f"{PREFIX}{self.module}.lora_B.bias"

    def turned(self, delta: Delta) -> Delta:
        """A delta as one of (outputs, inputs), which is not how an embedding's stands."""
        return delta.transposed() if self.embedding else delta


def site_of(adapter: Adapter, source: ModuleDelta) -> Site:
    """Where PEFT keeps the factors of a module's delta.

    Raises Unsupported for factors of a grouped convolution, which cannot be put beside others'.
    """
    a = source.delta.entries[0]  # where it is B, of an embedding, there is no kernel
    kernel = a.shape[2:]
    embedding = source.stored_as_base and not kernel
    low = source.delta.low_rank()
    if kernel and low is not None and any(one.left.spread > 1 for one in low.products):
        raise Unsupported(
            f"{adapter.path}: {a.name!r} is for a convolution in groups, whose factors cannot be mixed; "
            "merge the adapters instead: lorasmith merge BASE ADAPTER:WEIGHT... -o OUT"
        )
    rows, columns = source.delta.shape
    module, times = source.module, 1
    if any(f"{_OUTPUT}." in name for name in source.tensors):
        module, times = module.removesuffix(".out_proj") + _OUTPUT, 2
    return Site(module, (columns, rows) if embedding else (rows, columns), embedding, kernel, times)


def lora_config(
    adapters: Sequence[Adapter],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float] | None = None,
    *,
    every: bool,
    lora_bias: bool,
    saved: Sequence[str] = (),
    tokens: object = None,
) -> dict[str, Any]:
    """The LoraConfig of an adapter made of several, whose modules have these ranks and alphas (by default the ranks).

    ``every`` says that its modules are all that the adapters had, ``saved`` which of ``modules_to_save`` are there, and
    ``tokens`` is what ``trainable_token_indices`` becomes. Raises AdapterMismatch where the adapters differ in what can
    only be one thing.
    """
    config = config_of(
        ranks,
        alphas or ranks,
        _targets(adapters, ranks, every=every),
        task_type=_common(adapters, "task_type"),
        names_base=next((one.names_base for one in adapters if one.names_base), None),
        bias=next((bias for one in adapters if (bias := one.config.get("bias") or "none") != "none"), "none"),
        fan_in_fan_out=any(one.fan_in_fan_out for one in adapters),
        layer_replication=_same(adapters, "layer_replication"),
        saved=saved,
    )
    if lora_bias:
        config["lora_bias"] = True
    if tokens is not None:
        config["trainable_token_indices"] = tokens
    return config


def config_of(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    targets: Sequence[str],
    *,
    task_type: str | None,
    names_base: str | None,
    bias: object,
    fan_in_fan_out: bool,
    saved: Sequence[str],
    layer_replication: object = None,
) -> dict[str, Any]:
    """The LoraConfig of modules with these ranks and alphas, in which PEFT finds them by ``targets``."""
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    alpha = Counter(alphas.values()).most_common(1)[0][0] if ranks else 1
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": names_base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(module, ranks): rank for module, rank in ranks.items() if rank != r},
        "alpha_pattern": {_pattern(module, ranks): value for module, value in alphas.items() if value != alpha},
        "target_modules": list(targets),
        "lora_dropout": 0.0,
        "bias": bias,
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "layer_replication": layer_replication,
        "modules_to_save": list(saved) or None,
    }


def longest_config(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """A config at least as long, written down, as any that ``lora_config`` makes with ranks up to these."""
    pattern = {_pattern(module, ranks): rank for module, rank in ranks.items()}
    most = max(ranks.values(), default=1)
    return {
        **config,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
    }


def _pattern(module: str, modules: Iterable[str]) -> str:
    """A pattern that PEFT matches with this module only; it takes one for the end of a path."""
    escaped = re.sub(r"([^\w.])", r"\\\1", module)
    return f"^{escaped}" if any(other.endswith(f".{module}") for other in modules) else escaped


def _targets(adapters: Sequence[Adapter], ranks: Mapping[str, int], *, every: bool) -> list[str]:
    """``target_modules``: the layers' own names where the adapters were given those, else every module's path."""
    named = [one.config.get("target_modules") for one in adapters]
    narrowed = any(
        one.config.get(key)
        for one in adapters
        for key in ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")
    )
    modules = sorted(ranks)
    if narrowed or not every or not all(isinstance(names, list) for names in named):
        return modules
    short = sorted({str(name) for names in named if isinstance(names, list) for name in names})
    plain = [module for module in modules if not module.endswith(_OUTPUT)]
    found = all(any(module == name or module.endswith(f".{name}") for name in short) for module in plain)
    return short if found else modules


def _common(adapters: Sequence[Adapter], key: str) -> Any:
    """What all configs that say something say alike; None where they differ."""
    values = [value for one in adapters if (value := one.config.get(key)) is not None]
    return values[0] if values and all(value == values[0] for value in values) else None


def _same(adapters: Sequence[Adapter], key: str) -> Any:
    """What all configs say; they must not differ."""
    first, *others = adapters
    for other in others:
        if (other.config.get(key) or None) != (first.config.get(key) or None):
            raise AdapterMismatch(
                f"{first.path} has {key} = {first.config.get(key)!r:.80} and {other.path} "
                f"{other.config.get(key)!r:.80}: their modules are not the same layers, so they cannot be mixed"
            )
    return first.config.get(key) or None
