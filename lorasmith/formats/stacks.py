"""LoRA on parameters instead of layers (``target_parameters``): which factors are whose, as PEFT nests them.

Every targeted parameter of a module gets a wrapper around the one before, in the order in which the module has its
parameters: of n, the first has its factors below n−1 times ``base_layer`` (``lora.ParamWrapper``, and
``BaseTuner._inject_parameters``). Names of parameters stand in the config only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lorasmith.adapter import ModuleDelta
from lorasmith.deltas.experts import Stacked
from lorasmith.deltas.low_rank import Factor, LowRank, Product
from lorasmith.errors import AdapterMismatch, BadFile, Unsupported, listed
from lorasmith.formats.factors import Parts
from lorasmith.formats.scales import Scales
from lorasmith.safefile import TensorEntry

_LEVEL = ".base_layer"

_ORDER = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
"""Parameters of transformers' stacked experts, as their modules have them."""


def read_stacks(
    file: str, where: str, modules: dict[str, Parts], scales: Scales, config: Mapping[str, Any]
) -> list[ModuleDelta]:
    """The deltas of targeted parameters, whose tensors are taken out of ``modules``.

    Raises AdapterMismatch or BadFile where it cannot be told which factors belong to which parameter.
    """
    targets = config.get("target_parameters")
    if not targets:
        _require_no_levels(file, where, modules)
        return []
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        raise BadFile(f"{where}: target_parameters = {targets!r:.80} must list names of parameters")
    levels: dict[str, list[str]] = {}
    for module in modules:
        levels.setdefault(_root(module), []).append(module)
    found: list[ModuleDelta] = []
    for root, wrappers in levels.items():
        leaves = _leaves(root, targets)
        if len(wrappers) > 1 or leaves == ["weight"] or _is_wrapper(modules[wrappers[0]], root, leaves, scales):
            found += _read(file, where, root, sorted(wrappers, key=len, reverse=True), leaves, modules, scales)
    return found


def _root(module: str) -> str:
    while module.endswith(_LEVEL):
        module = module.removesuffix(_LEVEL)
    return module


def _leaves(root: str, targets: Iterable[str]) -> list[str]:
    """The targeted parameters that a module may have: the last words of those whose paths it ends like.

    One whose weight is named with its path has no others: layers and stacks of experts are different modules.
    """
    paths = [target.rpartition(".") for target in targets]
    mine = [(path, leaf) for path, _, leaf in paths if not path or root == path or root.endswith(f".{path}")]
    named = [leaf for path, leaf in mine if path and leaf == "weight"]
    return named[:1] or sorted({leaf for _, leaf in mine})


def _is_wrapper(parts: Parts, root: str, leaves: Iterable[str], scales: Scales) -> bool:
    """Whether a module's only factors are a stack, and not those of a layer beside it."""
    a = parts.tensors.get("lora_A")
    if a is None or not a.shape:
        return False
    ranks = [scales.rank(one, a.shape[0]) for one in (root, *(f"{root}.{leaf}" for leaf in leaves))]
    return a.shape[0] not in ranks


def _read(
    file: str,
    where: str,
    root: str,
    wrappers: list[str],
    leaves: list[str],
    modules: dict[str, Parts],
    scales: Scales,
) -> Iterator[ModuleDelta]:
    """One delta for each wrapper, from the innermost on."""
    if len(wrappers) != len(leaves):
        raise AdapterMismatch(
            f"{file}: module {root!r} has the factors of {len(wrappers)} parameters and target_parameters names "
            f"{listed(leaves)} for it; the file is incomplete, or the config belongs to another adapter"
        )
    depths = [root + _LEVEL * depth for depth in range(len(wrappers) - 1, -1, -1)]
    if wrappers != depths or not (len(leaves) == 1 or set(leaves) <= set(_ORDER)):
        raise AdapterMismatch(
            f"{file}: which factors of module {root!r} are for which of {listed(leaves)} (target_parameters) is not "
            "known; save an adapter for each of them"
        )
    if len(leaves) > 1:
        leaves = sorted(leaves, key=_ORDER.index)
    for wrapper, leaf in zip(wrappers, leaves, strict=True):
        parts = modules.pop(wrapper)
        a, b = _factors(file, wrapper, parts)
        rank = scales.rank(f"{root}.{leaf}", a.shape[0])
        count = _count(file, where, wrapper, a, b, rank)
        scale = scales.of(f"{root}.{leaf}", rank, None)
        if count == 1 and (leaf == "weight" or leaf.endswith("_bias")):
            yield ModuleDelta(root, leaf, LowRank((Product(Factor(b), Factor(a), scale),)), parts.names)
        else:
            yield ModuleDelta(root, leaf, Stacked(a, b, count, scale), parts.names, stored_as_base=True)


def _factors(file: str, wrapper: str, parts: Parts) -> tuple[TensorEntry, TensorEntry]:
    a, b = parts.tensors.get("lora_A"), parts.tensors.get("lora_B")
    if a is None or b is None or len(parts.tensors) > 2 or parts.alpha is not None:
        raise Unsupported(
            f"{file}: module {wrapper!r} is for a parameter (target_parameters) and has {listed(parts.names)}; "
            "PEFT trains lora_A and lora_B there, and nothing else"
        )
    if len(a.shape) != 2 or len(b.shape) != 2 or 0 in (*a.shape, *b.shape):
        raise AdapterMismatch(
            f"{file}: {a.name!r} has shape {list(a.shape)} and {b.name!r} {list(b.shape)}; factors of a parameter are "
            "matrices. Empty shells are what DeepSpeed ZeRO-3 leaves; save the adapter again"
        )
    return a, b


def _count(file: str, where: str, wrapper: str, a: TensorEntry, b: TensorEntry, rank: int) -> int:
    """How many experts the factors are for."""
    rows, columns = a.shape[0], b.shape[1]
    if rows != columns or rank < 1 or rows % rank:
        raise AdapterMismatch(
            f"{file}: the factors of {wrapper!r} have {rows} rows in A and {columns} columns in B, which are not those "
            f"of a whole number of experts of rank {rank} ({where}); the config belongs to another adapter"
        )
    return rows // rank


def _require_no_levels(file: str, where: str, modules: Iterable[str]) -> None:
    """Refuse factors around others in an adapter whose config names no parameters."""
    found = [module for module in modules if module.endswith(_LEVEL)]
    if found:
        raise AdapterMismatch(
            f"{file}: module {found[0]!r} has the factors of a parameter, as those of stacked experts, and "
            f"{where} does not say which (target_parameters); put the adapter_config.json of the training run there"
        )


def without_factors(where: str, config: Mapping[str, Any], deltas: Iterable[ModuleDelta]) -> tuple[str, ...]:
    """A warning of parameters that the config says were trained and the file has nothing for."""
    targets = [one for one in config.get("target_parameters") or () if isinstance(one, str)]
    names = [f".{one.module}.{one.parameter}" for one in deltas] if targets else []
    missing = sorted(target for target in targets if not any(name.endswith(f".{target}") for name in names))
    text = "there are no factors for them; PEFT found no such parameters when it trained, or the file is incomplete"
    return (f"{where} names {listed(missing)} (target_parameters), and {text}",) if missing else ()


def generation(config: Mapping[str, Any]) -> str | None:
    """Which PEFT has laid the factors of stacked experts out, by the version in the config; None without one."""
    said = config.get("peft_version")
    numbers = said.split(".")[:3] if isinstance(said, str) else []
    digits = ["".join(sign for sign in number if sign.isdigit()) for number in numbers]
    if len(digits) < 2 or not all(digits):
        return None
    version = tuple(int(number) for number in (*digits, "0", "0")[:3])
    if version < (0, 19, 0):
        return "peft-0.18"
    return "peft-0.19.0" if version == (0, 19, 0) else "peft"


def is_by_expert(config: Mapping[str, Any]) -> bool | None:
    """Whether the columns of B that belong to one expert are together; None where the config says something unknown.

    Unsloth wrote them so before it marked its files (``lora_B_layout``).
    """
    layout = config.get("lora_B_layout")
    if layout is not None:
        return {"rank_major": False, "grouped_by_expert": True}.get(layout) if isinstance(layout, str) else None
    auto = config.get("auto_mapping")
    return bool(isinstance(auto, Mapping) and auto.get("unsloth_fixed"))
