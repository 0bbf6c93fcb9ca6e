"""Models of many kinds, adapted by PEFT and merged: the result must answer what the adapted model answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import KINDS, Kind
from generate import Tensors
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import lorasmith

pytestmark = pytest.mark.filterwarnings("ignore")


def answers(model: torch.nn.Module, inputs: Tensors) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0].double()


def draw(model: torch.nn.Module, seed: int = 5) -> None:
    """Give every trainable parameter values that change what the model answers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def adapted(kind: Kind, folder: Path, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A base and an adapter in ``folder``; what the base answers, and what the adapted model does."""
    model = kind.build()
    model.save_pretrained(folder / "base")
    before = answers(model, kind.inputs())
    model.name_or_path = str(folder / "base")
    given = {"r": 3, "lora_alpha": 2, "target_modules": list(kind.modules), **options}
    given.setdefault("target_parameters", list(kind.parameters) or None)
    wrapped = get_peft_model(model, LoraConfig(**given))
    draw(wrapped)
    wrapped.save_pretrained(folder / "adapter")
    return before, answers(wrapped.eval(), kind.inputs())


def reloaded(merged: Path) -> transformers.PreTrainedModel:
    """The merged model as its own config says it is; everything in it must be loaded."""
    config = json.loads((merged / "config.json").read_text())
    found = getattr(transformers, config["architectures"][0])
    model, info = found.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def tensors_of(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def require_answers(folder: Path, kind: Kind, wanted: torch.Tensor, before: torch.Tensor) -> None:
    got = answers(reloaded(folder / "out"), kind.inputs())
    assert (got - wanted).norm() / wanted.norm() < 1e-4
    assert (before - wanted).norm() / wanted.norm() > 1e-2
    base, out = tensors_of(folder / "base"), tensors_of(folder / "out")
    assert {name: tensor.shape for name, tensor in out.items()} == {name: tensor.shape for name, tensor in base.items()}


@pytest.mark.parametrize("name", KINDS)
def test_a_merged_model_answers_what_the_adapted_one_does(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    before, wanted = adapted(kind, tmp_path)
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    require_answers(tmp_path, kind, wanted, before)


WITH_DORA = ("llava", "qwen2_vl", "gemma3", "gpt_neox", "phi3", "nomic_bert", "modernbert", "clip", "whisper")


@pytest.mark.parametrize("name", WITH_DORA)
@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}], ids=str)
def test_dora_and_trained_biases_follow_their_weights(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    kind = KINDS[name]
    before, wanted = adapted(kind, tmp_path, **options)
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    require_answers(tmp_path, kind, wanted, before)


BIASED = {"llava": ["fc1", "linear_1"], "qwen2_vl": ["qkv"], "gpt_neox": ["query_key_value"], "whisper": ["fc1"]}


@pytest.mark.parametrize("name", BIASED)
def test_a_bias_that_was_trained_on_a_factor_follows_its_layer(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    before, wanted = adapted(kind, tmp_path, target_modules=BIASED[name], lora_bias=True)
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    require_answers(tmp_path, kind, wanted, before)


SAVED = {
    "nomic_bert": ["layers.0.self_attn"], "gpt_neox": ["attention"], "qwen3_moe": ["experts"], "mixtral": ["experts"],
    "gpt_oss": ["experts"], "llava": ["multi_modal_projector"], "qwen2_vl": ["visual"], "granitemoe": ["experts"],
    "qwen3_vl_moe": ["experts"], "deepseek_v3": ["shared_experts", "gate"],
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_layers_trained_whole_take_the_place_of_what_is_stored_for_them(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    modules = [one for one in kind.modules if not any(one in part for part in SAVED[name])]
    modules = {"nomic_bert": ["down_proj"], "gpt_neox": ["dense_h_to_4h"], "qwen2_vl": ["q_proj"]}.get(name, modules)
    before, wanted = adapted(
        kind, tmp_path, target_modules=modules, target_parameters=None, modules_to_save=SAVED[name]
    )
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    require_answers(tmp_path, kind, wanted, before)


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_one_end_of_a_tie_inside_a_model_that_sees_is_untied(tmp_path: Path, name: str, target: str) -> None:
    kind = KINDS[name]
    before, wanted = adapted(kind, tmp_path, target_modules=[target])
    report = lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.tensors_added == 1
    got = answers(reloaded(tmp_path / "out"), kind.inputs())
    assert (got - wanted).norm() / wanted.norm() < 1e-4
    assert (before - wanted).norm() / wanted.norm() > 1e-2


def test_an_adapter_of_one_part_alone_is_that_part_s_by_its_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 28,
        "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    }  # fmt: skip
    text = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
        "intermediate_size": 48, "intermediate_size_mlp": 48, "num_local_experts": 2, "vocab_size": 64,
        "pad_token_id": 0,
    }  # fmt: skip
    config = transformers.Llama4Config(vision_config=vision, text_config=text)
    model = transformers.Llama4ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    before = load_file(tmp_path / "base" / "model.safetensors")
    for path, inside in (("vision_model", "vision_model.model"), ("language_model", "language_model.model")):
        adapted = get_peft_model(
            model.get_submodule(path), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        )
        adapted.save_pretrained(tmp_path / path)
        adapted.unload()
        names = load_file(tmp_path / path / "adapter_model.safetensors")
        assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names  # of either part
        for number, adapter in enumerate(
            (tmp_path / path, lorasmith.mix([tmp_path / path, (tmp_path / path, 0.5)], tmp_path / f"{path} mixed").out)
        ):
            out = tmp_path / f"{path} merged {number}"
            lorasmith.merge(tmp_path / "base", adapter, out)
            after = load_file(out / "model.safetensors")
            changed = {name for name in before if not torch.equal(before[name], after[name])}
            assert changed == {f"{inside}.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    parts = [tmp_path / "vision_model", tmp_path / "language_model"]
    (warning,) = lorasmith.mix(parts, tmp_path / "both").warnings
    assert "on a Llama4VisionModel and" in warning
    assert "with 'model.layers.0.self_attn.q_proj.weight' in both: if these are two parts" in warning
    with pytest.raises(lorasmith.AdapterMismatch, match="were trained on two parts of the model"):
        lorasmith.mix(parts, tmp_path / "both", base=tmp_path / "base", overwrite=True)
    for folder in parts:
        with pytest.raises(lorasmith.AdapterMismatch, match=r"both fit .* or --rename joins them"):
            lorasmith.merge(tmp_path / "base", folder, tmp_path / "joined", rename=[r"layers\.\d=layers.0"])
