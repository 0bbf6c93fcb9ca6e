"""Writes lorasmith/naming/conversions.json: how the installed transformers renames and rearranges tensors on loading.

    python tests/make_conversions.py

Every entry of ``transformers.conversion_mapping`` is written down as data, its patterns as transformers uses them.
``parts`` says for each model class which parts it has that have entries of their own: where, and which part of the
config describes it. ``classes`` gives for model types the classes whose entries are by class. Models are built on the
meta device from the defaults of their configs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from make_ties import classes
from transformers import PreTrainedModel, conversion_mapping, core_model_loading

TABLE = Path(__file__).parents[1] / "lorasmith" / "naming" / "conversions.json"

_RESNET = {
    "use_timm_backbone": False,
    "backbone_config": {"model_type": "resnet", "out_features": ["stage1", "stage2", "stage3", "stage4"]},
}
_SIGLIP = {"vision_config": {"model_type": "siglip_vision_model", "model_args": {"embed_dim": 64}}}
BESIDE: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 12}},
    "beit": {"out_indices": [1, 2, 3, 4]},
    "conditional_detr": _RESNET,
    "detr": _RESNET,
    "emu3": {"vocabulary_map": {"<image>": 8}},
    "fast_vlm": _SIGLIP,
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[0, 0]]},
    "moshi": {"audio_encoder_config": {"model_type": "mimi"}},
    "omdet-turbo": {
        "use_timm_backbone": False,
        "backbone_config": {"model_type": "swin", "out_features": ["stage2", "stage3", "stage4"]},
    },
    "perception_lm": _SIGLIP,
    "qwen3_omni_moe": {
        "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 64}}
    },
}
"""What configs need beside their defaults for a model, by model type; parts that want other libraries are exchanged."""


def mapping() -> dict[str, list[Any]]:
    """All entries, by model type or class."""
    found: dict[str, list[Any]] = conversion_mapping._build_checkpoint_conversion_mapping()
    return found


def step(transform: Any) -> dict[str, Any]:
    """One transform as data."""
    facts: dict[str, Any] = {"from": list(transform.source_patterns), "to": list(transform.target_patterns)}
    if isinstance(transform, core_model_loading.WeightConverter):
        facts["operations"] = [[type(one).__name__, vars(one)] for one in transform.operations]
    elif isinstance(transform, core_model_loading.GroupWeightRename):
        facts["guarded"] = True
    elif isinstance(transform, core_model_loading.Inkling2IndexOffsetWeightRename):
        facts["offset"] = transform.offset
    elif type(transform) not in (core_model_loading.WeightRenaming, core_model_loading.PrefixChange):
        raise TypeError(f"{type(transform).__name__} is a new kind of transform")
    return facts


def entries() -> list[dict[str, Any]]:
    """Entries with the same steps, together."""
    groups: dict[str, dict[str, Any]] = {}
    for key, transforms in mapping().items():
        steps = [step(one) for one in transforms]
        groups.setdefault(json.dumps(steps), {"keys": [], "steps": steps})["keys"].append(key)
    return sorted(groups.values(), key=lambda group: group["keys"])


def config_path(config: Any, part: Any) -> list[str] | None:
    """The keys under which a config holds another one; None where it does not."""
    if config is part:
        return []
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig) and key != "_parent":
            rest = config_path(value, part)
            if rest is not None:
                return [key, *rest]
    return None


def parts_of(model_class: type[PreTrainedModel]) -> tuple[str, list[list[Any]]] | None:
    """The prefix of the model's body, and its parts: path of the module, path in the config, class and model type."""
    config_class = model_class.config_class
    try:
        with torch.device("meta"):
            model = model_class(config_class(**BESIDE.get(config_class.model_type, {})))
    except Exception:  # no defaults that make a model
        return None
    found = []
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and path:
            where = config_path(model.config, module.config)
            if where is not None:
                found.append([path, where, type(module).__name__, module.config.model_type])
    return model.base_model_prefix, found


def parts() -> list[dict[str, Any]]:
    """Classes with the same parts, together; those without any that matter are left out."""
    known = mapping().keys()
    groups: dict[str, dict[str, Any]] = {}
    for model_class in classes():
        found = parts_of(model_class)
        if found is None or not _matters(model_class, found[1], known):
            continue
        prefix, own = found
        group = groups.setdefault(json.dumps(found), {"classes": [], "prefix": prefix, "parts": own})
        group["classes"].append(model_class.__name__)
    return sorted(groups.values(), key=lambda group: group["classes"])


def _matters(model_class: type[PreTrainedModel], own: list[list[Any]], known: Any) -> bool:
    """Whether any part is, or may be chosen to be, one with an entry; parts of the body's own config are the body."""
    return any(where or name in known for _, where, name, _ in own) or model_class.__name__ in known


def types() -> dict[str, str]:
    """The classes that transformers makes of model types, where these have entries by class."""
    known = mapping().keys()
    return {
        model_type: name
        for model_type, names in transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES.items()
        for name in _listed(names)
        if name in known
    }


def _listed(names: Any) -> Iterator[str]:
    yield from [names] if isinstance(names, str) else list(names)[:1]


def table() -> dict[str, Any]:
    """All that the package needs to know, with the model types that it is known of."""
    return {
        "transformers": transformers.__version__,
        "entries": entries(),
        "parts": parts(),
        "classes": types(),
        "model_types": sorted(transformers.CONFIG_MAPPING.keys()),
    }


def lines(found: dict[str, Any]) -> str:
    """The table with one entry a line, so that a change of it can be read."""
    rows = []
    for key, value in found.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(one) for one in value) + "\n]"
        rows.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(rows) + "\n}\n"


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    found = table()
    TABLE.write_text(lines(found), encoding="utf-8")
    count = sum(len(one["keys"]) for one in found["entries"])
    print(f"{count} entries, {sum(len(one['classes']) for one in found['parts'])} classes with parts")
