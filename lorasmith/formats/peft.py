"""PEFT's LoRA: ``adapter_config.json`` and ``adapter_model.safetensors``, or the latter alone.

Names are ``base_model.model.<module>.lora_A.weight`` and so on (PEFT, ``get_peft_model_state_dict``). In the wild
they come with the adapter's name inside (``lora_A.default.weight``), without the prefix, and with the marks that
torch.compile, DDP and FSDP leave in module paths; all of these mean the same module.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lorasmith.adapter import Adapter, ModuleDelta, digest
from lorasmith.checkpoint import TOKENIZER_FILES
from lorasmith.deltas.replacement import Replacement
from lorasmith.dtypes import FLOATS
from lorasmith.errors import AdapterMismatch, BadFile, Unsupported, listed
from lorasmith.formats.factors import Parts, is_embedding, read_delta
from lorasmith.formats.scales import Scales
from lorasmith.safefile import Header, TensorEntry, parse_json, read_json

ROLES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_ROLE = re.compile(rf"^(?P<module>.*?)\.?\b(?P<role>{'|'.join(ROLES)})(?P<rest>(?:\.[^.]+)*)$")

RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base: an unconverted adapter is relative to that changed base."""

REFUSED_OPTIONS = {
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "aLoRA (active only after its invocation tokens, so it cannot be merged)",
    "arrow_config": "Arrow routing (chosen per token, so it cannot be merged)",
    "kasa_config": "KaSA",
    "use_bdlora": "BD-LoRA",
    "layer_replication": "layer_replication",
    "target_parameters": "target_parameters (expert weights)",
    "trainable_token_indices": "trainable_token_indices",
    "modules_to_save": "modules_to_save",
    "lora_bias": "lora_bias",
    "megatron_config": "Megatron parallel layers",
    "lora_B_layout": "Unsloth's expert layout",
}
"""Options of a LoraConfig that change what the tensors mean and are not merged yet, by what to call them."""

KNOWN_OPTIONS = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
    "velora_config", "inner_lora_dropout", "train_mlp", "train_attn", "train_unembed", "merge_weights",
    "enable_lora",
)) | frozenset(REFUSED_OPTIONS)  # fmt: skip


def recognises(path: str, header: Header) -> bool:
    """Whether any tensor has one of PEFT's LoRA names, or the config names another of PEFT's tuners."""
    if any(_ROLE.match(entry.name) for entry in header.entries):
        return True
    config, where = _config(path, header, optional=True)
    return where is not None and config.get("peft_type", "LORA") != "LORA"


def read(path: str, header: Header) -> Adapter:
    """Read the adapter at ``path`` whose tensors ``header`` lists."""
    config, config_source = _config(path, header)
    where = config_source or header.file
    _refuse_options(where, config)
    modules, replacements, ignored = _sort_tensors(header)
    _require_magnitudes(where, config, modules)
    scales = Scales(where, config, known=config_source is not None)
    deltas = [
        ModuleDelta(module, "weight", read_delta(header.file, module, parts, scales), parts.names, is_embedding(parts))
        for module, parts in modules.items()
    ]
    deltas += replacements
    names_base = config.get("base_model_name_or_path")
    flag = config.get("fan_in_fan_out")
    return Adapter(
        path=path,
        stamp=header.stamp,
        deltas=tuple(deltas),
        ignored=tuple(ignored),
        sha256=digest(header),
        config=config,
        names_base=names_base if isinstance(names_base, str) and names_base else None,
        fan_in_fan_out=flag if isinstance(flag, bool) else None,
        scale_assumed=scales.assumed,
        side_files=_side_files(path),
        notes=_notes(where, config),
        warnings=scales.unsure,
    )


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """The names without PEFT's prefix and without wrappers' marks.

    What stands before the model's own path does so in every name of a file. So ``module`` is DDP's mark, and the
    prefix is ``base_model.model.``, only where all names have it; else these words belong to the model.
    """
    originals = list(names)
    paths = [[part for part in name.split(".") if part not in _WRAPPERS] for name in originals]
    while _all_begin(paths, "module"):
        paths = [parts[1:] for parts in paths]
    if _all_begin(paths, "base_model"):
        paths = [parts[1:] for parts in paths]
        if _all_begin(paths, "model"):
            paths = [parts[1:] for parts in paths]
    while _all_begin(paths, "module"):
        paths = [parts[1:] for parts in paths]
    return {name: ".".join(parts) for name, parts in zip(originals, paths, strict=True)}


def _all_begin(paths: list[list[str]], word: str) -> bool:
    """Whether all paths begin with a word that isn't the whole path of the layer that a factor is for."""
    return bool(paths) and all(parts[:1] == [word] and parts[1:] and parts[1] not in ROLES for parts in paths)


# ---------------------------------------------------------------------------------------------- configuration


def _config(path: str, header: Header, *, optional: bool = False) -> tuple[dict[str, Any], str | None]:
    """The LoraConfig and where it was found: beside the tensors, or in the file's own metadata."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    beside = os.path.join(folder, "adapter_config.json")
    own = os.path.isdir(path) or os.path.basename(path).startswith("adapter_model.")
    inside = _metadata_config(header)
    if own and os.path.isfile(beside):
        config = read_json(beside)
        for key in ("r", "lora_alpha", "use_rslora"):
            if inside is not None and key in inside and key in config and inside[key] != config[key]:
                raise BadFile(
                    f"{beside} says {key} = {config[key]!r} and the metadata in {header.file} says {inside[key]!r}; "
                    "the two files are not of one adapter"
                )
        return config, beside
    if os.path.isdir(path) and not optional:
        raise BadFile(
            f"{path} has no adapter_config.json, so the scale of its deltas is unknown; copy it from the training run"
        )
    if inside is not None:
        return inside, header.file
    return {}, None


def _metadata_config(header: Header) -> dict[str, Any] | None:
    text = header.metadata.get("lora_adapter_metadata")
    if text is None:
        return None
    config = parse_json(f"{header.file} (lora_adapter_metadata)", text.encode())
    if not isinstance(config, dict):
        raise BadFile(f"{header.file}: lora_adapter_metadata in the header is not a JSON object")
    return config


def _refuse_options(where: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise Unsupported(f"{where} is a {kind} adapter; lorasmith merges LORA (with rsLoRA and DoRA) so far")
    for option, name in REFUSED_OPTIONS.items():
        if config.get(option):
            raise Unsupported(f"{where} uses {name} ({option} = {config[option]!r:.80}), which is not supported")
    if config.get("bias", "none") != "none":
        raise Unsupported(f"{where} trained the base's biases (bias = {config['bias']!r}), which is not supported yet")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(RESIDUAL_INITS):
        raise Unsupported(
            f"{where} was initialised with {init}, which changes the base: its delta is against that changed base, "
            "not against the one you have. Save it again with PEFT's path_initial_model_for_weight_conversion"
        )


def _notes(where: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    unknown = sorted(key for key, value in config.items() if key not in KNOWN_OPTIONS and value not in (None, False))
    return (f"{where} sets options that lorasmith does not know and ignores: {listed(unknown)}",) if unknown else ()


def _side_files(path: str) -> dict[str, str]:
    """The tokenizer files beside an adapter that is a folder."""
    if not os.path.isdir(path):
        return {}
    found = {name: os.path.join(path, name) for name in TOKENIZER_FILES}
    return {name: file for name, file in found.items() if os.path.isfile(file)}


# ---------------------------------------------------------------------------------------------- tensors


def _sort_tensors(header: Header) -> tuple[dict[str, Parts], list[ModuleDelta], list[str]]:
    modules: dict[str, Parts] = {}
    replacements: list[ModuleDelta] = []
    ignored: list[str] = []
    adapters: set[str] = set()
    unknown: list[str] = []
    names = clean_names(entry.name for entry in header.entries)
    for entry in header.entries:
        name = names[entry.name]
        match = _ROLE.match(name)
        if match:
            role = _role(entry, match, adapters)
            _put(modules.setdefault(match["module"], Parts()), role, entry)
        elif name.endswith(".alpha"):
            parts = modules.setdefault(name.removesuffix(".alpha"), Parts())
            if parts.alpha is not None:
                raise BadFile(f"{header.file}: {entry.name!r} and {parts.alpha.name!r} name one alpha")
            parts.alpha = entry
        elif ".original_module." in name:
            ignored.append(entry.name)
        elif name.endswith((".base_layer.weight", ".base_layer.bias")):
            module, _, parameter = name.rpartition(".base_layer.")
            replacement = Replacement(_float(entry))
            replacements.append(ModuleDelta(module, parameter, replacement, (entry.name,), True))
        else:
            unknown.append(entry.name)
    if len(adapters) > 1:
        raise BadFile(f"{header.file} holds several adapters ({listed(sorted(adapters))}); save them one by one")
    if unknown:
        raise Unsupported(_describe_unknown(header.file, unknown))
    return modules, replacements, ignored


def _role(entry: TensorEntry, match: re.Match[str], adapters: set[str]) -> str:
    """The role of a tensor; the adapter's name, if one is in the tensor's, goes into ``adapters``."""
    rest = [part for part in match["rest"].split(".") if part]
    leaf = rest.pop() if rest and rest[-1] in ("weight", "bias") else "weight"
    if leaf == "bias":
        raise Unsupported(
            f"{entry.file}: tensor {entry.name!r} is a bias on the adapter (lora_bias), which is not supported yet"
        )
    if len(rest) > 1:
        raise Unsupported(f"{entry.file}: the name {entry.name!r} is not one that PEFT writes")
    adapters.update(rest)
    return match["role"]


def _put(parts: Parts, role: str, entry: TensorEntry) -> None:
    if role in parts.tensors:
        raise BadFile(
            f"{entry.file}: {entry.name!r} and {parts.tensors[role].name!r} are two names for the same tensor; "
            "the file mixes two adapters"
        )
    parts.tensors[role] = _float(entry)


def _float(entry: TensorEntry) -> TensorEntry:
    if entry.dtype not in FLOATS:
        raise Unsupported(
            f"{entry.file}: tensor {entry.name!r} is stored as {entry.dtype}; factors must be floating point"
        )
    return entry


def _describe_unknown(file: str, names: list[str]) -> str:
    kinds = {
        ".modules_to_save.": "modules trained whole (modules_to_save)",
        ".trainable_tokens_delta": "trained token rows (trainable_token_indices)",
        ".lora_E": "AdaLoRA",
        "lora_": "another kind of adapter",
        ".weight": "modules trained whole (modules_to_save)",
        ".bias": "trained biases",
    }
    what = next((kind for mark, kind in kinds.items() if any(mark in name for name in names)), None)
    hint = f" ({what}, not supported yet)" if what else "; they would be lost, so nothing was merged"
    return f"{file} holds {len(names)} tensors that are not LoRA factors: {listed(names)}{hint}"


def _require_magnitudes(where: str, config: Mapping[str, Any], modules: Mapping[str, Parts]) -> None:
    """Refuse an adapter whose config and tensors disagree about DoRA."""
    said = config.get("use_dora")
    for module, parts in modules.items():
        magnitude = parts.tensors.get("lora_magnitude_vector")
        if said and magnitude is None:
            raise AdapterMismatch(
                f"{where} says use_dora, but module {module!r} has no lora_magnitude_vector; the adapter is incomplete"
            )
        if said is False and magnitude is not None:
            raise AdapterMismatch(
                f"{where} says use_dora = false, but the adapter holds {magnitude.name!r}; "
                "the config belongs to another adapter"
            )
