"""PEFT's LoRA: ``adapter_config.json`` and ``adapter_model.safetensors``, or the latter alone.

Names are ``base_model.model.<module>.lora_A.weight`` and so on (PEFT, ``get_peft_model_state_dict``). In the wild
they come with the adapter's name inside (``lora_A.default.weight``), without the prefix, and with the marks that
torch.compile, DDP and FSDP leave in module paths; all of these mean the same module.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorasmith.adapter import Adapter, ModuleDelta, digest
from lorasmith.checkpoint import TOKENIZER_FILES
from lorasmith.deltas.replacement import Replacement
from lorasmith.deltas.token_rows import TokenRows
from lorasmith.dtypes import FLOATS
from lorasmith.errors import AdapterMismatch, BadFile, Unsupported, listed
from lorasmith.formats.factors import BIAS, Parts, read_modules
from lorasmith.formats.scales import Scales
from lorasmith.jsonfile import parse_json, read_json
from lorasmith.safefile import Header, TensorEntry, equal_bytes

PREFIX = "base_model.model."
"""What stands before a module's path in every name that PEFT writes."""

ROLES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_ROLE = re.compile(rf"^(?P<module>.*?)\.?\b(?P<role>{'|'.join(ROLES)})(?P<rest>(?:\.[^.]+){{0,3}})\Z", re.DOTALL)

TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"

RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base: an unconverted adapter is relative to that changed base."""

REFUSED_OPTIONS = {
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "aLoRA (active only after its invocation tokens, so it cannot be merged)",
    "arrow_config": "Arrow routing (chosen per token, so it cannot be merged)",
    "kasa_config": "KaSA",
    "target_parameters": "target_parameters (expert weights)",
    "megatron_config": "Megatron parallel layers",
    "lora_B_layout": "Unsloth's expert layout",
}
"""Options of a LoraConfig that change what the tensors mean and are not merged yet, by what to call them."""

KNOWN_OPTIONS = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layer_replication",
    "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_dora",
    "use_rslora",
    "velora_config", "inner_lora_dropout", "train_mlp", "train_attn", "train_unembed", "merge_weights",
    "enable_lora", "lora_bias", "use_bdlora",
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
    modules, others, ignored = _sort_tensors(header)
    _require_magnitudes(where, config, modules)
    scales = Scales(where, config, known=config_source is not None)
    deltas = list(read_modules(header.file, where, modules, scales, config))
    rows = [name for name in others if name.endswith(TOKEN_ROWS)]
    whole = [_replacement(config, name, entry, rows) for name, entry in others.items()]
    deltas += _distinct(header.file, sorted(whole, key=lambda one: not one.shared))
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
        residual=_residual(config),
        side_files=_side_files(path),
        warnings=(*scales.unsure, *_unknown(where, config)),
        metadata=header.metadata,
    )


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """The names without PEFT's prefix and without wrappers' marks.

    What stands before the model's own path does so in every name of a file. So ``module`` is DDP's mark, and the
    prefix is ``base_model.model.``, only where all names have it; else these words belong to the model.
    """
    originals = list(names)
    paths = [[part for part in name.split(".") if part not in _WRAPPERS] for name in originals]
    first = 0
    while _all_have(paths, first, "module"):
        first += 1
    if _all_have(paths, first, "base_model"):
        first += 1
        if _all_have(paths, first, "model"):
            first += 1
    while _all_have(paths, first, "module"):
        first += 1
    return {name: ".".join(parts[first:]) for name, parts in zip(originals, paths, strict=True)}


def plain_names(header: Header) -> dict[str, str]:
    """Every tensor's name as PEFT writes it, whatever marks it has."""
    plain = {}
    for name, cleaned in clean_names(entry.name for entry in header.entries).items():
        match = _ROLE.match(cleaned)
        if match:
            bias = match["rest"].endswith(".bias")
            leaf = ".bias" if bias else ".weight" if match["role"] in ("lora_A", "lora_B") else ""
            cleaned = f"{match['module']}.{match['role']}{leaf}"
        plain[name] = PREFIX + cleaned
    return plain


def _all_have(paths: list[list[str]], at: int, word: str) -> bool:
    """Whether all paths have a word at a place and it isn't the end of the path of the layer that a factor is for."""
    return bool(paths) and all(
        len(parts) > at + 1 and parts[at] == word and parts[at + 1] not in ROLES for parts in paths
    )


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


def _residual(config: Mapping[str, Any]) -> str | None:
    """The initialisation that changes the base, if the adapter had one and was not converted since."""
    init = config.get("init_lora_weights")
    return init if isinstance(init, str) and init.lower().startswith(RESIDUAL_INITS) else None


def _unknown(where: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    unknown = sorted(key for key, value in config.items() if key not in KNOWN_OPTIONS and value)
    text = f"{where} sets options that lorasmith does not know; what they change is not in the result"
    return (f"{text}: {listed(unknown)}",) if unknown else ()


def _side_files(path: str) -> dict[str, str]:
    """The tokenizer files beside an adapter that is a folder."""
    if not os.path.isdir(path):
        return {}
    found = {name: os.path.join(path, name) for name in TOKENIZER_FILES}
    return {name: file for name, file in found.items() if os.path.isfile(file)}


# ---------------------------------------------------------------------------------------------- tensors


def _sort_tensors(header: Header) -> tuple[dict[str, Parts], dict[str, TensorEntry], list[str]]:
    """LoRA's tensors by module, the others by their names without marks, and the names of those to be ignored."""
    modules: dict[str, Parts] = {}
    others: dict[str, TensorEntry] = {}
    ignored: list[str] = []
    adapters: set[str] = set()
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
        elif name in others:
            raise BadFile(f"{header.file}: {entry.name!r} and {others[name].name!r} are two names for the same tensor")
        else:
            others[name] = _float(entry)
    if len(adapters) > 1:
        raise BadFile(f"{header.file} holds several adapters ({listed(sorted(adapters))}); save them one by one")
    return modules, others, ignored


def _replacement(config: Mapping[str, Any], name: str, entry: TensorEntry, rows: Sequence[str]) -> ModuleDelta:
    """What a tensor that is stored whole stands for; those named in ``rows`` hold rows of tokens.

    Its name is the parameter's (``modules_to_save``, ``bias``, grown embeddings), perhaps with a mark in it:
    ``base_layer`` of a layer that has a LoRA as well, ``modules_to_save`` in state dicts, ``token_adapter`` of rows.
    """
    if name in rows:
        module = name.removesuffix(TOKEN_ROWS)
        delta = TokenRows(entry, _tokens(config, module, entry, rows), (0, math.prod(entry.shape[1:])))
        return ModuleDelta(module, "weight", delta, (entry.name,), True, shared=True)
    name = name.replace(".token_adapter.base_layer.", ".base_layer.")
    if re.search(r"(^|\.)(lora_|ia3_|hada_|lokr_|vera_|oft_|boft_|prompt_)", name) or ".token_adapter." in name:
        raise Unsupported(
            f"{entry.file}: tensor {entry.name!r} is of no kind that is known; it would be lost, so nothing was merged"
        )
    plain = re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.[^.]+$)", "", name)
    module, _, parameter = plain.replace(".base_layer.", ".").rpartition(".")
    saved = config.get("modules_to_save")
    named = [one for one in saved if isinstance(one, str)] if isinstance(saved, list) else []
    new = any(one in module.split(".") or module.endswith(one) for one in named)
    # what stands under its own name and was not to be saved as a module is the base's, as save_embedding_layers has it
    shared = ".base_layer." in plain or bool(config and not new and plain == name)
    return ModuleDelta(module, parameter, Replacement(entry), (entry.name,), True, shared=shared, may_be_new=new)


def _distinct(file: str, deltas: Sequence[ModuleDelta]) -> list[ModuleDelta]:
    """The deltas without those that say again what another has said, as ``bias="all"`` does of saved modules."""
    distinct: list[ModuleDelta] = []
    places: dict[tuple[str, str], int] = {}
    for one in deltas:
        place = places.setdefault((one.module, one.parameter), len(distinct))
        first = distinct[place] if place < len(distinct) else None
        if first is None or not (isinstance(one.delta, Replacement) and isinstance(first.delta, Replacement)):
            distinct.append(one)
        elif equal_bytes(one.delta.new, first.delta.new):
            distinct[place] = replace(first, tensors=(*first.tensors, *one.tensors))
        else:
            raise BadFile(f"{file}: {first.tensors[0]!r} and {one.tensors[0]!r} are for one parameter, and differ")
    return distinct


def _tokens(config: Mapping[str, Any], module: str, entry: TensorEntry, rows: Sequence[str]) -> tuple[int, ...]:
    """The tokens whose rows a tensor holds, in its order; ``rows`` are all tensors that hold such."""
    wanted = config.get("trainable_token_indices")
    if isinstance(wanted, Mapping):
        fits = [key for key in wanted if module == key or module.endswith(f".{key}")]
        if not fits and len(wanted) == 1 and len(rows) > 1:  # of a tied layer's rows, the config names the other end
            fits = [*wanted]
        wanted = wanted[max(fits, key=len)] if fits else None
    if not isinstance(wanted, list) or not all(type(one) is int and one >= 0 for one in wanted):
        raise BadFile(
            f"{entry.file}: which tokens the rows of {entry.name!r} are for is not in the config "
            "(trainable_token_indices); copy adapter_config.json from the training run"
        )
    if len(wanted) != entry.matrix[0] or len(set(wanted)) != len(wanted):
        raise AdapterMismatch(
            f"{entry.file}: {entry.name!r} has {entry.matrix[0]} rows for the {len(wanted)} tokens that the config "
            "names (trainable_token_indices); the config belongs to another adapter, or names a token twice"
        )
    return tuple(wanted)


def _role(entry: TensorEntry, match: re.Match[str], adapters: set[str]) -> str:
    """The role of a tensor; the adapter's name, if one is in the tensor's, goes into ``adapters``."""
    rest = [part for part in match["rest"].split(".") if part]
    leaf = rest.pop() if rest and rest[-1] in ("weight", "bias") else "weight"
    if len(rest) > 1 or (leaf == "bias" and match["role"] != "lora_B"):
        raise Unsupported(f"{entry.file}: the name {entry.name!r} is not one that PEFT writes")
    adapters.update(rest)
    return BIAS if leaf == "bias" else match["role"]


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
