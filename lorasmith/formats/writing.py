"""Writing PEFT's LoRA: what its tensors are called and shaped, and the LoraConfig that makes PEFT load them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasmith.adapter import Adapter, ModuleDelta
from lorasmith.deltas import Delta
from lorasmith.deltas.experts import Stacked
from lorasmith.errors import AdapterMismatch, Unsupported
from lorasmith.formats.peft import PREFIX
from lorasmith.formats.stacks import generation

if TYPE_CHECKING:
    import torch

_OUTPUT = ".base_layer.out_proj"
"""What PEFT calls the output of its own wrapper of ``torch.nn.MultiheadAttention``."""


@dataclass(frozen=True)
class Site:
    """Where PEFT keeps the factors for one weight: the ``module`` as it names it, and what kind of layer that is.

    ``shape`` is (outputs, inputs), and ``kernel`` what follows the inputs in a convolution's A. The product counts
    ``times`` over. Of a parameter that stacks ``experts``, whose path is ``parameter``, they are those of one expert.
    """

    module: str
    shape: tuple[int, int]
    embedding: bool = False
    kernel: tuple[int, ...] = ()
    times: int = 1
    experts: int = 0
    parameter: str = ""

    @property
    def path(self) -> str:
        """What patterns of a LoraConfig are matched with."""
        return self.parameter or self.module

    def a(self, rank: int) -> tuple[str, tuple[int, ...]]:
        """Name and shape of the A of that rank."""
        name = "lora_embedding_A" if self.embedding else "lora_A.weight"
        inputs = self.shape[1] // max(1, math.prod(self.kernel))
        return f"{PREFIX}{self.module}.{name}", (rank * max(1, self.experts), inputs, *self.kernel)

    def b(self, rank: int) -> tuple[str, tuple[int, ...]]:
        """Name and shape of the B of that rank."""
        name = "lora_embedding_B" if self.embedding else "lora_B.weight"
        return f"{PREFIX}{self.module}.{name}", (self.shape[0], rank * max(1, self.experts), *(1 for _ in self.kernel))

    def bias(self) -> str:
        """The name of a bias on B."""
        return f"{PREFIX}{self.module}.lora_B.bias"

    @property
    def is_attention(self) -> bool:
        """Whether it is the output of PEFT's wrapper of ``torch.nn.MultiheadAttention``, whose input has its rank."""
        return self.module.endswith(_OUTPUT)

    def turned(self, delta: Delta) -> Delta:
        """A delta as one of (outputs, inputs), which is not how an embedding's stands."""
        return delta.transposed() if self.embedding else delta


def stack_of(source: ModuleDelta, names: Mapping[str, str]) -> Site:
    """Where PEFT keeps the factors of every expert of a parameter; ``names`` are the file's as PEFT writes them."""
    delta = source.delta
    assert isinstance(delta, Stacked)
    module = names[delta.a.name].removeprefix(PREFIX).removesuffix(".lora_A.weight")
    shape = delta.b.shape[0], delta.a.matrix[1]
    return Site(module, shape, experts=delta.count, parameter=f"{source.module}.{source.parameter}")


def stacked(lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of experts, (outputs, rank) and (rank, inputs) of each, as PEFT stacks them (``lora.ParamWrapper``).

    The rows of one expert are together in A, (rank · experts, inputs), and column k·experts + e of B is the k-th of
    expert e.
    """
    import torch

    return torch.stack(list(lefts), dim=2).flatten(1), torch.cat(list(rights))


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
    path = f"{source.module}.{source.parameter}"
    parameter = path if _is_targeted(adapter, path) else ""
    shape = (columns, rows) if embedding else (rows, columns)
    return Site(module, shape, embedding, kernel, times, parameter=parameter)


def _is_targeted(adapter: Adapter, path: str) -> bool:
    """Whether a parameter was targeted by its own name, and not its module."""
    targets = adapter.config.get("target_parameters")
    names = [one for one in targets if isinstance(one, str)] if isinstance(targets, list) else []
    return any(path == name or path.endswith(f".{name}") for name in names)


def lora_config(
    adapters: Sequence[Adapter],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float] | None = None,
    *,
    every: bool,
    lora_bias: bool,
    saved: Sequence[str] = (),
    tokens: object = None,
    parameters: Collection[str] = (),
) -> dict[str, Any]:
    """The LoraConfig of an adapter made of several, whose modules have these ranks and alphas (by default the ranks).

    ``every`` says that its modules are all that the adapters had, ``saved`` which of ``modules_to_save`` are there, and
    ``tokens`` is what ``trainable_token_indices`` becomes. ``parameters`` are those paths that are of no modules.
    Raises AdapterMismatch where the adapters differ in what can
    only be one thing.
    """
    config = config_of(
        ranks,
        alphas or ranks,
        _targets(adapters, [module for module in ranks if module not in parameters], every=every),
        task_type=_common(adapters, "task_type"),
        names_base=next((one.names_base for one in adapters if one.names_base), None),
        bias=next((bias for one in adapters if (bias := one.config.get("bias") or "none") != "none"), "none"),
        fan_in_fan_out=any(one.fan_in_fan_out for one in adapters),
        layer_replication=_same(adapters, "layer_replication"),
        saved=saved,
    )
    revision = _common(adapters, "revision")
    if revision is not None:
        config["revision"] = revision
    if parameters:
        config |= _parameter_targets(adapters)
    if lora_bias:
        config["lora_bias"] = True
    if tokens is not None:
        config["trainable_token_indices"] = tokens
    return config


def _parameter_targets(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What finds stacked experts, and says which PEFT has laid their factors out."""
    found: dict[tuple[Any, str | None], Adapter] = {}
    for one in adapters:
        targets = one.config.get("target_parameters")
        if isinstance(targets, list) and targets:
            found.setdefault((tuple(sorted(targets)), generation(one.config)), one)
    owners = list(found.values())
    if len(owners) > 1:
        raise AdapterMismatch(
            f"{owners[0].path} and {owners[1].path} have factors of experts, and differ in target_parameters, or "
            "were written by versions of PEFT that store them differently; merge them into the model instead: "
            "lorasmith merge BASE ADAPTER:WEIGHT... -o OUT"
        )
    return {key: owners[0].config[key] for key in ("target_parameters", "peft_version") if owners[0].config.get(key)}


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
        "rank_pattern": _patterns(ranks, r),
        "alpha_pattern": _patterns(alphas, alpha),
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
    pattern = _patterns(ranks, None)
    most = max(ranks.values(), default=1)
    return {
        **config,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": max(config["target_modules"], sorted(ranks), key=lambda names: len(json.dumps(names))),
    }


def _patterns(values: Mapping[str, Any], usual: object) -> dict[str, Any]:
    """Modules whose value is not the usual one, by patterns that PEFT matches with these modules only.

    A pattern stands for the end of a path, and a dot in it for any character.
    """
    tails = Counter(tail for module in values for tail in _tails(re.sub(r"\W", ".", module)))
    found = {}
    for module, value in values.items():
        escaped = re.sub(r"([^\w.])", r"\\\1", module)
        if tails[re.sub(r"\W", ".", module)] > 1:
            escaped = "^" + escaped.replace(".", r"\.")
        if value != usual:
            found[escaped] = value
    return found


def _tails(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def _targets(adapters: Sequence[Adapter], ranks: Collection[str], *, every: bool) -> list[str]:
    """``target_modules``: the layers' own names where the adapters were given those, else every module's path."""
    named = [one.config.get("target_modules") for one in adapters]
    narrowed = any(
        one.config.get(key) for one in adapters for key in ("layers_to_transform", "layers_pattern", "exclude_modules")
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
