"""Every entry of transformers' conversions: a checkpoint as it is on disk, adapted under the running model's names.

The oracle is transformers itself: what it makes of the merged checkpoint on loading must be what it makes of the base,
changed as the adapter says. A checkpoint for an entry has one tensor for every pattern, named after it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import make_conversions
import pytest
import torch
import transformers
from generate import Tensors, write_json
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping, core_model_loading
from transformers.core_model_loading import WeightConverter, WeightRenaming

import lorasmith
from lorasmith.naming.conversions import _table, runtime_names, steps_of

MAPPING = make_conversions.mapping()
CONFIG = {"hidden_size": 10, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
RANK, ALPHA = 2, 3

ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")

ALWAYS = "beside.weight"
"""A tensor that no entry is about; of every kind of adapter, this one has a LoRA."""

parser = re._parser  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------- names that patterns match


def example(pattern: str) -> str:
    """A text that a regular expression matches; of alternatives the first, of any sign a dot."""
    return "".join(_text(parser.parse(pattern)))


def _text(tokens: Any) -> Iterator[str]:
    for kind, value in tokens:
        name = str(kind)
        if name == "LITERAL":
            yield chr(value)
        elif name == "ANY":
            yield "."
        elif name == "IN":
            first, what = value[0]
            yield {"LITERAL": chr, "RANGE": lambda ends: chr(ends[0])}.get(str(first), lambda _: "1")(what)
        elif name == "MAX_REPEAT":
            low, _, inner = value
            some = "".join(_text(inner))
            yield "layers.1.proj" if some == "." and low == 1 else some * max(1, low)
        elif name == "SUBPATTERN":
            yield from _text(value[-1])
        elif name == "BRANCH":
            yield from _text(value[1][0])
        else:
            assert name in ("AT", "ASSERT", "ASSERT_NOT"), name


def names_for(transform: Any, number: int, count: int = 3) -> list[str]:
    """Names that a transform's pattern matches: several for experts."""
    source = transform.source_patterns[number]
    found = []
    for expert in range(count if "*." in source else 1):
        text = example(source.replace("*.", f"{expert}."))
        prefixes = ("model.layers.0.", "", "encoder.", "model.")
        names = [f"{prefix}{text.removeprefix('.')}{_ending(transform, text)}" for prefix in prefixes]
        if source.startswith("^"):
            names = [text + _ending(transform, text), f"{text}.proj.weight"]
        found.append(next(name for name in names if _renames(transform, name)))
    return found


def _renames(transform: Any, name: str) -> bool:
    own = copy.deepcopy(transform)
    if hasattr(own, "_active"):
        own._active = True  # as it is once the pattern that guards the others has matched
    return own.rename_source_key(name)[1] is not None


def _ending(transform: Any, text: str) -> str:
    if text.endswith("."):
        return "0.proj.weight"
    if re.search(r"(weight|bias|gamma|beta|scale|_g|_v|_1)$", text):
        return ""
    return "" if isinstance(transform, WeightConverter) and not _wants_leaf(transform) else ".weight"


def _wants_leaf(transform: Any) -> bool:
    """Whether a conversion is of layers, whose weights and biases both follow."""
    return isinstance(transform, WeightConverter) and all(
        one.endswith(("q_proj", "k_proj", "v_proj")) or one in ("mlp.up_proj", "mlp.gate_proj")
        for one in transform.target_patterns
    )


def checkpoint_names(key: str) -> list[str]:
    """One name or several for every pattern of an entry, of which no two mean the same parameter."""
    names: dict[str, None] = {}
    for transform in MAPPING[key]:
        for number in range(len(transform.source_patterns)):
            names |= dict.fromkeys(names_for(transform, number))
    return list(names)


# ----------------------------------------------------------------------------- what transformers makes of tensors


def shape_of(name: str, converter: Any | None) -> tuple[int, ...]:
    """A shape that a conversion can take."""
    if name.endswith(("bias", "_scale")) and (converter is None or "scale" not in name):
        return (24,)
    operations = [] if converter is None else [type(one).__name__ for one in converter.operations]
    dims = (
        [] if converter is None else [getattr(one, "dim", getattr(one, "dim0", None)) for one in converter.operations]
    )
    if "MergeModulelist" in operations or "ErnieFuseAndSplitTextVisionExperts" in operations:
        return (6, 10)
    if operations == ["Transpose"] and dims == [1]:
        return (3, 4, 10) if "down" in name else (3, 10, 8)
    if 1 in dims:
        return (3, 8, 10)
    if name.endswith("w2_weight"):
        return (3, 6, 10)
    if "conv1d" in name:
        return (8, 1, 4)
    return (16, 10) if "Split" in operations else (24, 10)


def expected_shape(name: str) -> tuple[int, ...]:
    """What the running model has for parameters that transformers asks it about."""
    if "experts" in name:
        return (3, 10, 4) if "down" in name else (3, 8, 10)
    return (8, 10) if "q_proj" in name else (4, 10)


class Model:
    """The little that transformers' operations ask of a model."""

    def get_parameter(self, name: str) -> Any:
        return SimpleNamespace(shape=torch.Size(expected_shape(name)))


def loaded(key: str, tensors: Tensors) -> Tensors:
    """The parameters that transformers makes of a checkpoint (``convert_and_load_state_dict_in_model``)."""
    transforms = copy.deepcopy(MAPPING[key])
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    collected: dict[str, Any] = {}
    out: Tensors = {}
    for name in sorted(tensors, key=core_model_loading.dot_natural_key):
        renamed, pattern = core_model_loading.rename_source_key(name, renamings, converters)
        if pattern is None:
            assert renamed not in out
            out[renamed] = tensors[name]
        else:
            one = collected.setdefault(renamed, copy.deepcopy(by_pattern[pattern]))
            one.add_tensor(renamed, name, pattern, tensors[name])
    vision = SimpleNamespace(num_attention_heads=2)
    config = SimpleNamespace(**CONFIG, vision_config=vision, split_ngram_parts=3)
    for renamed, one in collected.items():
        for name, value in one.convert(renamed, model=Model(), config=config).items():
            out[name] = value[0] if isinstance(value, list) else value
    return out


def distinct(key: str) -> list[str]:
    """The names of an entry's checkpoint, without those that come to mean what another one means."""
    transforms = copy.deepcopy(MAPPING[key])
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    taken: dict[tuple[str, str | None], str] = {}
    for name in sorted(checkpoint_names(key), key=core_model_loading.dot_natural_key):
        meaning = core_model_loading.rename_source_key(name, renamings, converters)
        many = meaning[1] is not None and "*." in meaning[1]
        taken.setdefault((name, None) if many else meaning, name)
    return list(taken.values())


def checkpoint(key: str) -> Tensors:
    """A checkpoint for an entry, with values that are all different."""
    transforms = copy.deepcopy(MAPPING[key])
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    generator = torch.Generator().manual_seed(2)
    tensors: Tensors = {}
    for name in distinct(key):
        _, pattern = core_model_loading.rename_source_key(name, renamings, converters)
        shape = shape_of(name, by_pattern.get(pattern or ""))
        tensors[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {**tensors, ALWAYS: torch.randn(4, 6, generator=generator, dtype=torch.float64)}


def config(key: str) -> dict[str, Any]:
    return {"model_type": key, **CONFIG, "vision_config": {"num_attention_heads": 2}, "tie_word_embeddings": False}


# ------------------------------------------------------------------------------------------------------- tests


def test_the_table_is_that_of_the_installed_transformers() -> None:
    """Else run tests/make_conversions.py, and see what has come or gone."""
    assert make_conversions.entries() == _table()["entries"]


@pytest.mark.slow
def test_the_parts_of_models_are_those_of_the_installed_transformers() -> None:
    found = make_conversions.table()
    assert {key: found[key] for key in ("parts", "classes", "model_types")} == {
        key: _table()[key] for key in ("parts", "classes", "model_types")
    }


@pytest.mark.parametrize("key", MAPPING)
def test_every_name_becomes_what_transformers_makes_of_it(key: str) -> None:
    transforms = copy.deepcopy(MAPPING[key])
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    names = sorted(checkpoint_names(key), key=core_model_loading.dot_natural_key)
    ours = runtime_names(steps_of({"model_type": key}, None), names)
    met = set()
    seen: dict[str, list[tuple[str, str | None]]] = {}
    for name in names:
        renamed, pattern = core_model_loading.rename_source_key(name, renamings, converters)
        met.add(pattern)
        seen.setdefault(renamed, []).append((name, pattern))
    for renamed, sources in seen.items():
        made = ours.get(renamed)
        if made is None or isinstance(made, str):
            assert [made, None] in ([*one] for one in sources) if len(sources) == 1 else made is None
        else:
            assert sorted(one for group in made.sources for one in group) == sorted(one for one, _ in sources)
    assert {pattern for one in converters for pattern in one.source_patterns} <= met


def adapter_for(parameters: Tensors, kind: str) -> tuple[Tensors, dict[str, Any], Tensors]:
    """An adapter on every parameter, its config, and what each parameter becomes."""
    generator = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors: Tensors = {}
    wanted: Tensors = {}
    stacked: set[str] = set()
    for name, value in parameters.items():
        module, _, leaf = name.rpartition(".")
        if value.ndim == 3 and leaf in ORDER and kind == "LoRA":
            count, rows, columns = value.shape
            a, b = drawn(count * RANK, columns), drawn(rows, RANK * count)
            inner = [
                one for one in ORDER if f"{module}.{one}" in parameters and parameters[f"{module}.{one}"].ndim == 3
            ]
            depth = ".base_layer" * (len(inner) - 1 - inner.index(leaf))
            tensors |= {f"{module}{depth}.lora_A.weight": a, f"{module}{depth}.lora_B.weight": b}
            factors = b.reshape(rows, RANK, count), a.reshape(count, RANK, columns)
            wanted[name] = value + ALPHA / RANK * torch.einsum("ore,eri->eoi", *factors)
            stacked.add(name)
        elif leaf == "weight" and value.ndim == 2 and (kind != "replacement" or name.endswith(ALWAYS)):
            a, b = drawn(RANK, value.shape[1]), drawn(value.shape[0], RANK)
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            wanted[name] = value + ALPHA / RANK * b @ a
            if kind == "DoRA":
                magnitude = 0.5 + drawn(value.shape[0]).abs()
                tensors[f"{module}.lora_magnitude_vector"] = magnitude
                wanted[name] = magnitude[:, None] * wanted[name] / wanted[name].norm(dim=1, keepdim=True)
        else:
            tensors[name] = wanted[name] = drawn(*value.shape)
    facts = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": kind == "DoRA"}
    return tensors, {**facts, "peft_version": "0.21.2", "target_parameters": sorted(stacked)}, wanted


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "replacement"])
@pytest.mark.parametrize("key", [key for key in MAPPING if key != "legacy"])
def test_an_adapter_on_the_running_model_s_names_reaches_what_transformers_loads_there(
    tmp_path: Path, key: str, kind: str
) -> None:
    base = checkpoint(key)
    parameters = loaded(key, base)
    tensors, said, wanted = adapter_for(parameters, kind)
    for name, contents, facts in (("base", base, config(key)), ("adapter", tensors, said)):
        (tmp_path / name).mkdir()
        file = {"base": "model", "adapter": "adapter_model"}[name] + ".safetensors"
        save_file({one: tensor.contiguous() for one, tensor in contents.items()}, tmp_path / name / file)
        write_json(tmp_path / name / {"base": "config.json", "adapter": "adapter_config.json"}[name], facts)
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = loaded(key, load_file(tmp_path / "out" / "model.safetensors"))
    assert merged.keys() == wanted.keys()
    for name, value in merged.items():
        assert torch.allclose(value, wanted[name], rtol=1e-9, atol=1e-9), name


# ------------------------------------------------------------------------------------- models made of other models


def steps_by_transformers(model: Any) -> list[tuple[Any, ...]]:
    """What transformers collects for a model and its parts, with the beginnings of names that each is for."""
    found: list[tuple[Any, ...]] = []
    for one in conversion_mapping.get_model_conversion_mapping(model):
        scopes: tuple[str, ...] = ("",)
        if one.scope_prefix is not None:
            below = f"{one.scope_prefix}." if one.scope_prefix else ""
            body = f"{one.base_model_prefix}." if one.base_model_prefix else ""
            scopes = (body + below, below)
        found.append((tuple(one.source_patterns), tuple(one.target_patterns), scopes))
    return found


def steps_by_us(model: Any) -> list[tuple[Any, ...]]:
    config = json.loads(model.config.to_json_string(use_diff=False))
    return [(one.sources, one.targets, one.scopes) for one in steps_of(config, type(model).__name__)]


COMPOSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava of qwen3_moe and siglip": (
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"text_config": {"model_type": "qwen3_moe"}, "vision_config": {"model_type": "siglip_vision_model"}},
    ),
    "llava of mixtral and pixtral": (
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"text_config": {"model_type": "mixtral"}, "vision_config": {"model_type": "pixtral"}},
    ),
    "gemma3": ("Gemma3ForConditionalGeneration", "Gemma3Config", {}),
    "internvl of gpt_oss": (
        "InternVLForConditionalGeneration", "InternVLConfig", {"text_config": {"model_type": "gpt_oss"}}
    ),
    "clip": ("CLIPModel", "CLIPConfig", {}),
    "siglip": ("SiglipModel", "SiglipConfig", {}),
    "mllama": ("MllamaForConditionalGeneration", "MllamaConfig", {}),
    "qwen2 omni": ("Qwen2_5OmniThinkerForConditionalGeneration", "Qwen2_5OmniThinkerConfig", {}),
    "colqwen": ("ColQwen2ForRetrieval", "ColQwen2Config", {}),
    "nemotron omni": ("NemotronH_Omni_Reasoning_V3", "NemotronH_Omni_Reasoning_V3_Config", {}),
    "qwen3 omni": (
        "Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeConfig", make_conversions.BESIDE["qwen3_omni_moe"]
    ),
    "aya": ("AyaVisionForConditionalGeneration", "AyaVisionConfig", make_conversions.BESIDE["aya_vision"]),
    "detr": ("DetrForObjectDetection", "DetrConfig", make_conversions.BESIDE["detr"]),
    "backbone": ("BeitBackbone", "BeitConfig", {}),
    "projection": ("CLIPTextModelWithProjection", "CLIPTextConfig", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSED)
def test_parts_have_the_steps_that_transformers_gives_them(name: str) -> None:
    model_class, config_class, options = COMPOSED[name]
    with torch.device("meta"):
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
    assert steps_by_us(model) == steps_by_transformers(model)
