"""PEFT as the oracle: models by transformers, adapters by PEFT, and what PEFT itself makes of them."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from generate import Tensors, Term, exact, half_unit, raw_bytes, tree, write_json
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Embedding, LoraLayer
from peft.tuners.lora.config import KasaConfig
from safetensors.torch import load_file, save_file

import lorasmith

pytestmark = pytest.mark.filterwarnings("ignore")

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# --------------------------------------------------------------------------------------------- models and inputs


@dataclass(frozen=True)
class Family:
    """A class of transformers, a tiny config for it, the layers that get a LoRA, and what the model is fed."""

    model: str
    config: str
    sizes: Mapping[str, Any]
    targets: tuple[str, ...]
    inputs: Callable[[], Tensors]
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, model: str | None = None) -> transformers.PreTrainedModel:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.sizes)
        return getattr(transformers, model or self.model)(config).eval()


def tokens(**more: torch.Tensor) -> Callable[[], Tensors]:
    return lambda: {"input_ids": torch.arange(3, 15).view(2, 6), **more}


LLAMA_SIZES = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
BERT_SIZES = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
GPT2_SIZES = {"vocab_size": 61, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 1}
GPT2_SIZES |= {"eos_token_id": 2}

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", "LlamaConfig", {**LLAMA_SIZES, "tie_word_embeddings": False},
        (*ATTENTION, *MLP, "embed_tokens", "lm_head"), tokens(),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", "Qwen2Config", {**LLAMA_SIZES, "tie_word_embeddings": True}, (*ATTENTION, *MLP), tokens()
    ),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig", LLAMA_SIZES, (*ATTENTION, *MLP), tokens()),
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2Config", GPT2_SIZES, ("c_attn", "c_proj", "c_fc", "wpe"), tokens(),
        {"fan_in_fan_out": True},
    ),
    "bert": Family(
        "BertForMaskedLM", "BertConfig", BERT_SIZES,
        ("query", "key", "value", "dense", "position_embeddings", "token_type_embeddings"), tokens(),
    ),
    "t5": Family(
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 61, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4},
        ("q", "k", "v", "o", "wi", "wo", "relative_attention_bias"),
        tokens(decoder_input_ids=torch.arange(4, 14).view(2, 5)),
    ),
    "opt": Family(
        "OPTForCausalLM", "OPTConfig",
        {"vocab_size": 61, "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 32, "word_embed_proj_dim": 24, "pad_token_id": 0},
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"), tokens(),
    ),
    "phi3": Family(
        "Phi3ForCausalLM", "Phi3Config", {**LLAMA_SIZES, "max_position_embeddings": 64},
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"), tokens(),
    ),
    "vit": Family(
        "ViTForImageClassification", "ViTConfig",
        {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
         "image_size": 32, "patch_size": 8, "num_labels": 5},
        (*ATTENTION, "fc1", "fc2", "classifier"),
        lambda: {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()},
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration", "WhisperConfig",
        {"vocab_size": 61, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "num_mel_bins": 20,
         "max_source_positions": 30, "max_target_positions": 30, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        lambda: {
            "input_features": torch.linspace(-1, 1, 2 * 20 * 60).view(2, 20, 60).cos(),
            "decoder_input_ids": torch.arange(4, 14).view(2, 5),
        },
    ),
}  # fmt: skip


def outputs(model: torch.nn.Module, inputs: Tensors) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0].double()


# -------------------------------------------------------------------------------------------- adapters and merges


def adapt(
    model: torch.nn.Module,
    *,
    name: str = "default",
    ratio: Callable[[int], float] = lambda _: 0.2,
    seed: int = 1,
    **options: Any,
) -> Any:
    """The model with an adapter whose factors are drawn so that ‖ΔW‖ = ``ratio``·‖W0‖ for the weight of each place."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, **options})
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    adapted = [one for one in model.modules() if isinstance(one, LoraLayer) and name in one.scaling]
    for position, layer in enumerate(adapted):
        _draw(layer, name, ratio(position), generator)
    return model.eval()


def _draw(layer: LoraLayer, name: str, ratio: float, generator: torch.Generator) -> None:
    a, b = _factors(layer, name)
    for factor in (a, b):
        factor.data = torch.randn(factor.shape, generator=generator) / math.sqrt(factor.shape[-1])
    size = layer.get_delta_weight(name).norm()
    if size > 0:
        b.data *= ratio * layer.get_base_layer().weight.float().norm() / size
    if name in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[name].weight
        magnitude.data *= 0.5 + torch.rand(magnitude.shape, generator=generator)


def _factors(layer: LoraLayer, name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    if isinstance(layer, Embedding):
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


@dataclass(frozen=True)
class Case:
    """A base and an adapter on disk."""

    base: Path
    adapter: Path
    family: Family


def make_case(folder: Path, kind: str, *, dtype: str = "float32", factors: str = "float32", **options: Any) -> Case:
    """A base and an adapter in ``folder``, the factors stored as ``factors``."""
    family = FAMILIES[kind]
    model = family.build().to(FLOATS[dtype])
    model.save_pretrained(folder / "base")
    given = {"target_modules": list(family.targets), **family.options, **options}
    model.name_or_path = str(folder / "base")
    adapt(model, **given).save_pretrained(folder / "adapter")
    recast(folder / "adapter", FLOATS[factors])
    return Case(folder / "base", folder / "adapter", family)


def recast(adapter: Path, dtype: torch.dtype) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def rewrite(source: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    """A copy of an adapter with other tensor names."""
    folder.mkdir(parents=True)
    tensors = load_file(source / "adapter_model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    return folder


def edit(adapter: Path, **changes: Any) -> Path:
    """Change keys of an adapter's config; ``...`` takes one out."""
    file = adapter / "adapter_config.json"
    config = {**json.loads(file.read_text()), **changes}
    write_json(file, {key: value for key, value in config.items() if value is not ...})
    return adapter


def load_base(case: Case, model: str | None = None) -> transformers.PreTrainedModel:
    return getattr(transformers, model or case.family.model).from_pretrained(case.base).eval()


def merged_by_peft(case: Case, folder: Path) -> Tensors:
    """What PEFT writes when it merges: the tensors of its saved model, by the names on disk."""
    PeftModel.from_pretrained(load_base(case), case.adapter).merge_and_unload().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def merge(case: Case, folder: Path) -> Tensors:
    lorasmith.merge(case.base, case.adapter, folder)
    return load_file(folder / "model.safetensors")


def require_close(ours: Tensors, theirs: Tensors, base: Tensors) -> set[str]:
    """All tensors within 1e-6, norm-wise; the names of those that changed."""
    assert ours.keys() == theirs.keys() == base.keys()
    changed = set()
    for name, right in theirs.items():
        if torch.equal(right, base[name]):
            assert raw_bytes(ours[name]) == raw_bytes(right), name
            continue
        changed.add(name)
        off = (ours[name].double() - right.double()).norm() / right.double().norm()
        assert off < 1e-6, f"{name} is off by {off:.1e}"
        assert (right - base[name]).norm() > 1e-3 * base[name].norm(), name
    return changed


def weights_of(case: Case, *kinds: type) -> int:
    """How many weights of the adapted model have an adapter."""
    model = PeftModel.from_pretrained(load_base(case), case.adapter)
    return sum(isinstance(layer, kinds or LoraLayer) for layer in model.modules())


# -------------------------------------------------------------------------------------------------- as PEFT merges


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_tensor_is_what_peft_merges_and_the_model_answers_like_the_adapted_one(tmp_path: Path, kind: str) -> None:
    case = make_case(tmp_path, kind)
    ours = merge(case, tmp_path / "out")
    changed = require_close(ours, merged_by_peft(case, tmp_path / "peft"), load_file(case.base / "model.safetensors"))
    assert len(changed) == weights_of(case)
    _require_same_answers(case, tmp_path / "out")


def _require_same_answers(case: Case, merged: Path, model: str | None = None) -> None:
    base = load_base(case, model)
    plain = outputs(base, case.family.inputs())
    adapted = outputs(PeftModel.from_pretrained(base, case.adapter).eval(), case.family.inputs())
    loaded, info = getattr(transformers, model or case.family.model).from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    off = (outputs(loaded.eval(), case.family.inputs()) - adapted).norm() / adapted.norm()
    assert off < 1e-4
    assert (plain - adapted).norm() / adapted.norm() > max(1e-2, 1000 * off)


PATTERNS = {
    "alpha over r": {"r": 6, "lora_alpha": 20},
    "rsLoRA": {"r": 6, "lora_alpha": 5, "use_rslora": True},
    "alpha is a fraction": {"r": 4, "lora_alpha": 0.3},
    "rank one": {"r": 1},
    "rank pattern": {"rank_pattern": {r"layers\.1\..*_proj": 7, "q_proj": 2}},
    "the first pattern wins": {
        "rank_pattern": {r"layers\.0\..*": 3, r"layers\.\d+\.self_attn\.q_proj": 9, "q_proj": 5},
        "alpha_pattern": {r".*\.1\..*": 11, r"self_attn\.v_proj": 29, "v_proj": 3},
    },
    "a pattern must reach the end and begin at a dot": {
        "rank_pattern": {"proj": 9, "0": 9, "self_attn": 9, "layers": 9, "_proj": 9, "up_proj": 2},
        "alpha_pattern": {"k_pro": 90, "roj": 90, "[ko]_proj": 3},
    },
    "alternatives": {"alpha_pattern": {"q_proj|k_proj": 3}, "rank_pattern": {"(up|down)_proj": 6, "x|o_proj": 2}},
    "anchored": {
        "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 2, "^q_proj": 9, r"^layers\.0\..*": 9},
        "alpha_pattern": {r"^.*\.down_proj$": 3, r"model\.layers\.1\.mlp\.up_proj": 50},
    },
    "rsLoRA with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"k_proj": 3}},
    "alpha is zero for some": {"alpha_pattern": {"down_proj": 0}},
    "a regular expression of targets": {"target_modules": r"(?:model\.)?.*\.[01]\.(self_attn|mlp)\.(?!k_|up)\w+_proj$"},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "DoRA": {"use_dora": True, "target_modules": [*ATTENTION, *MLP]},
    "DoRA with rsLoRA and patterns": {
        "use_dora": True, "use_rslora": True, "target_modules": [*ATTENTION, *MLP], "rank_pattern": {"v_proj": 9},
    },
    "initialised by eva": {"init_lora_weights": "eva"},
    "initialised as orthogonal": {"init_lora_weights": "orthogonal"},
}  # fmt: skip


@pytest.mark.parametrize("factors", FLOATS)
@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
def test_options_scale_every_weight_as_peft_does(tmp_path: Path, options: dict[str, Any], factors: str) -> None:
    case = make_case(tmp_path, "llama", factors=factors, **options)
    ours = merge(case, tmp_path / "out")
    assert require_close(ours, merged_by_peft(case, tmp_path / "peft"), load_file(case.base / "model.safetensors"))


SQUARE = {**GPT2_SIZES, "n_inner": 48}
"""A GPT-2 whose c_fc and c_proj are square, so that nothing but the kind of the layer says how they are stored."""


@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("sizes", [GPT2_SIZES, SQUARE], ids=["as usual", "square"])
def test_conv1d_layers_are_merged_the_way_they_are_stored_whatever_the_flag_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: bool | None, dora: bool, sizes: Mapping[str, Any]
) -> None:
    family = FAMILIES["gpt2"]
    monkeypatch.setitem(
        FAMILIES, "gpt2", replace(family, sizes=sizes, targets=("c_attn", "c_proj", "c_fc"), options={})
    )
    case = make_case(tmp_path, "gpt2", use_dora=dora)
    right = merged_by_peft(case, tmp_path / "peft")
    edit(case.adapter, fan_in_fan_out=... if flag is None else flag)
    changed = require_close(merge(case, tmp_path / "out"), right, load_file(case.base / "model.safetensors"))
    assert len(changed) == 8


def test_linear_layers_are_merged_as_they_are_whatever_the_flag_says(tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama", target_modules=["q_proj", "o_proj", "down_proj"])
    right = merged_by_peft(case, tmp_path / "peft")
    edit(case.adapter, fan_in_fan_out=True)
    assert require_close(merge(case, tmp_path / "out"), right, load_file(case.base / "model.safetensors"))


@pytest.mark.parametrize("wrapped", ["VisionEncoderDecoderModel", "a bare file"])
def test_square_conv1d_layers_are_known_inside_another_model(tmp_path: Path, wrapped: str) -> None:
    """GPT-2's attention output is square; the flag PEFT saved is False, as the last layer it wrapped was linear."""
    decoder = transformers.GPT2Config(**GPT2_SIZES, add_cross_attention=True)
    encoder = transformers.ViTConfig(**FAMILIES["vit"].sizes)
    torch.manual_seed(0)
    model = transformers.VisionEncoderDecoderModel(
        transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    )
    model.save_pretrained(tmp_path / "base")
    adapted = adapt(model, target_modules=["c_proj", "o_proj"])
    adapted.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", fan_in_fan_out=wrapped == "a bare file")
    names = {f"{name}.weight": layer for name, layer in layers(adapted).items() if "c_proj" in name}
    base = tmp_path / "base"
    if wrapped == "a bare file":
        base = (base / "model.safetensors").rename(tmp_path / "alone.safetensors")
    tensors = load_file(base / "model.safetensors" if base.is_dir() else base)
    if wrapped == "a bare file":
        _keep_only(tmp_path / "adapter", "c_proj")
    lorasmith.merge(base, tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors" if base.is_dir() else tmp_path / "out")
    assert len(names) == 6
    for name, layer in names.items():
        right = tensors[name] + layer.get_delta_weight("default")
        assert (merged[name] - right).norm() < 1e-6 * right.norm()


def _keep_only(adapter: Path, part: str) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: one for name, one in load_file(file).items() if part in name}, file, {"format": "pt"})


def test_a_rank_is_the_tensors_where_saving_sorted_the_patterns(tmp_path: Path) -> None:
    """PEFT writes its patterns sorted and can't load this adapter itself any more; the ranks are in the tensors."""
    model = FAMILIES["llama"].build()
    model.save_pretrained(tmp_path / "base")
    pattern = {"q_proj": 5, r"layers\.\d+\.self_attn\.q_proj": 9, r"layers\.0\..*": 3}
    adapted = adapt(model, target_modules=["q_proj", "v_proj"], rank_pattern=pattern)
    adapted.save_pretrained(tmp_path / "adapter")
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    right = dict(adapted.merge_and_unload().state_dict())
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert len(require_close(load_file(tmp_path / "out" / "model.safetensors"), right, base)) == 4


@pytest.mark.parametrize(("pattern", "doubtful"), [({"v_proj": 3, "[qv]_proj": 5}, True), ({"v_proj": 3}, False)])
def test_an_alpha_that_two_patterns_give_is_the_one_peft_loads_with_a_warning(
    tmp_path: Path, pattern: dict[str, int], doubtful: bool
) -> None:
    case = make_case(tmp_path, "llama", target_modules=["q_proj", "v_proj"], alpha_pattern=pattern)
    report = lorasmith.merge(case.base, case.adapter, tmp_path / "out")
    ours, right = load_file(tmp_path / "out" / "model.safetensors"), merged_by_peft(case, tmp_path / "peft")
    assert require_close(ours, right, load_file(case.base / "model.safetensors"))
    assert any("alpha_pattern" in text and "'v_proj': 3" in text for text in report.warnings) == doubtful


# --------------------------------------------------------------------------------------------- several adapters


def layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by their own module paths."""
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {name.removeprefix("base_model.model."): layer for name, layer in found.items()}


WEIGHTS = {"default": 0.7, "second": -1.5, "a-third_one": 0.25}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Any]:
    """A model with three adapters of different kinds on some of the same layers, saved by PEFT."""
    folder, family = tmp_path_factory.mktemp("several"), FAMILIES[request.param]
    model = family.build()
    model.save_pretrained(folder / "base")
    targets = list(family.targets)
    kinds = ({"r": 4}, {"r": 8, "use_rslora": True}, {"rank_pattern": {targets[0]: 2}, "lora_alpha": 1})
    adapted: Any = model
    for position, (name, kind) in enumerate(zip(WEIGHTS, kinds, strict=True)):
        own = targets[: len(targets) - position]
        adapted = adapt(adapted, name=name, seed=position, target_modules=own, **family.options, **kind)
    adapted.save_pretrained(folder / "adapters")
    return Case(folder / "base", folder / "adapters", family), adapted


def _folder(case: Case, name: str) -> Path:
    return case.adapter if name == "default" else case.adapter / name


def test_several_adapters_are_summed_with_their_weights(tmp_path: Path, several: tuple[Case, Any]) -> None:
    case, model = several
    lorasmith.merge(case.base, [(_folder(case, name), weight) for name, weight in WEIGHTS.items()], tmp_path / "out")
    ours, base = load_file(tmp_path / "out" / "model.safetensors"), load_file(case.base / "model.safetensors")
    right = {name: tensor.double() for name, tensor in base.items()}
    for module, layer in layers(model).items():
        for name in layer.scaling:
            right[f"{module}.weight"] += WEIGHTS[name] * layer.get_delta_weight(name).double()
    assert len(require_close(ours, {name: one.float() for name, one in right.items()}, base)) == len(layers(model))


def test_several_adapters_at_weight_one_are_what_peft_merges_at_once(tmp_path: Path, several: tuple[Case, Any]) -> None:
    case, model = several
    copied = copy.deepcopy(model)
    copied.merge_and_unload(adapter_names=list(WEIGHTS)).save_pretrained(tmp_path / "peft")
    lorasmith.merge(case.base, [_folder(case, name) for name in WEIGHTS], tmp_path / "out")
    base = load_file(case.base / "model.safetensors")
    ours, right = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "peft" / "model.safetensors")
    assert len(require_close(ours, right, base)) == len(layers(model))


def test_a_weighted_dora_goes_part_of_the_way_and_adds_to_a_lora(tmp_path: Path) -> None:
    dora = make_case(tmp_path / "dora", "llama", use_dora=True, target_modules=["q_proj", "down_proj"])
    lora = make_case(tmp_path / "lora", "llama", target_modules=["q_proj", "up_proj"])
    base = load_file(dora.base / "model.safetensors")
    ways = [(0.6, merged_by_peft(dora, tmp_path / "one")), (-0.5, merged_by_peft(lora, tmp_path / "two"))]
    right = {
        name: (tensor.double() + sum(weight * (end[name].double() - tensor) for weight, end in ways)).float()
        for name, tensor in base.items()
    }
    lorasmith.merge(dora.base, [(dora.adapter, 0.6), (lora.adapter, -0.5)], tmp_path / "out")
    assert len(require_close(load_file(tmp_path / "out" / "model.safetensors"), right, base)) == 6


# ------------------------------------------------------------------------------------------------- one rounding


RANKS = (4, 8, 16, 32, 64, 96, 128)
RATIOS = (0.001, 0.01, 0.1, 1.0)


def term(layer: LoraLayer, name: str = "default") -> Term:
    """The layer's delta as factors of the stored weight."""
    a, b = (factor.detach() for factor in _factors(layer, name))
    turned = isinstance(layer, Embedding) or getattr(layer, "fan_in_fan_out", False)
    return Term(a.t(), b.t(), layer.scaling[name]) if turned else Term(b, a, layer.scaling[name])


@pytest.mark.parametrize("factors", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_16_bit_models_are_rounded_once_at_every_rank_and_size_of_delta(
    tmp_path: Path, kind: str, dtype: str, factors: str
) -> None:
    deep = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 96} if kind == "qwen2" else {"n_layer": 4}
    family = FAMILIES[kind]
    family = replace(family, sizes={**family.sizes, **deep})
    model = family.build().to(FLOATS[dtype])
    model.save_pretrained(tmp_path / "base")
    adapted = adapt(
        model,
        ratio=lambda position: RATIOS[position % len(RATIOS)],
        target_modules=list(family.targets),
        rank_pattern=_ranks(model, family.targets),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    recast(tmp_path / "adapter", FLOATS[factors])
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged, base = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    loaded = PeftModel.from_pretrained(family.build().to(FLOATS[dtype]), tmp_path / "adapter")
    seen = set()
    for module, layer in layers(loaded).items():
        ours = merged[f"{module}.weight"]
        assert ours.dtype == FLOATS[dtype]
        right, slack = exact(base[f"{module}.weight"], [(term(layer), 1.0)])
        assert ((ours.double() - right).abs() <= half_unit(ours) + slack).all(), module
        seen.add(layer.r["default"])
    assert seen >= set(RANKS) or kind == "gpt2"
    assert len(seen) > 3


def _ranks(model: torch.nn.Module, targets: tuple[str, ...]) -> dict[str, int]:
    modules = [name for name, _ in model.named_modules() if name.endswith(targets)]
    return {name.replace(".", r"\."): RANKS[position * 3 % len(RANKS)] for position, name in enumerate(modules)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_dora_on_a_16_bit_model_is_rounded_once(tmp_path: Path, kind: str, dtype: str) -> None:
    targets = ("q_proj", "down_proj", "c_attn", "c_fc")
    case = make_case(tmp_path, kind, dtype=dtype, use_dora=True, target_modules=list(targets))
    merged, base = merge(case, tmp_path / "out"), load_file(case.base / "model.safetensors")
    model = PeftModel.from_pretrained(load_base(case), case.adapter)
    assert len(layers(model)) == 4
    for module, layer in layers(model).items():
        ours = merged[f"{module}.weight"]
        adapted, slack = exact(base[f"{module}.weight"], [(term(layer), 1.0)])
        axis = 0 if kind == "gpt2" else 1
        ratio = layer.lora_magnitude_vector["default"].weight.detach().double() / adapted.norm(dim=axis)
        ratio = ratio.unsqueeze(axis)
        off = (ours.double() - ratio * adapted).abs()
        assert (off <= half_unit(ours) + 2 * (1 + ratio) * slack).all(), module


# ------------------------------------------------------------------------------------------------------ dialects


def _middle(mark: str) -> Callable[[str], str]:
    return lambda name: name.replace("layers.1.", f"layers.1.{mark}.").replace("q_proj.", f"q_proj.{mark}.", 1)


def _infix(adapter: str, tail: str = "") -> Callable[[str], str]:
    def rename(name: str) -> str:
        if name.endswith(".base_layer.weight"):
            return name
        if name.endswith(".weight"):
            return name.removesuffix("weight") + f"{adapter}.weight"
        return f"{name}.{adapter}{tail if 'magnitude' in name else ''}"

    return rename


DIALECTS: dict[str, Callable[[str], str]] = {
    "adapter's name inside": _infix("default"),
    "another adapter's name inside": _infix("my-adapter"),
    "an adapter called weight": _infix("weight"),
    "magnitudes are a module's weight": _infix("default", ".weight"),
    "magnitudes end in weight": lambda name: name + ".weight" if name.endswith("magnitude_vector") else name,
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "base_model alone": lambda name: name.replace("base_model.model.", "base_model.", 1),
    "compiled": lambda name: "_orig_mod." + name,
    "compiled inside PEFT": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "compiled layers": _middle("_orig_mod"),
    "DDP": lambda name: "module." + name,
    "DDP of a compiled model": lambda name: "module._orig_mod." + name,
    "compiled DDP": lambda name: "_orig_mod.module." + name,
    "DDP inside PEFT": lambda name: name.replace("base_model.model.", "base_model.model.module.", 1),
    "DDP without a prefix": lambda name: name.replace("base_model.model.", "module.", 1),
    "FSDP": _middle("_fsdp_wrapped_module"),
    "FSDP at the top": lambda name: "_fsdp_wrapped_module." + name,
    "FSDP with checkpoints": _middle("_fsdp_wrapped_module._checkpoint_wrapped_module"),
    "checkpoints": _middle("_checkpoint_wrapped_module"),
    "factors wrapped by FSDP": lambda name: name.replace("lora_A.", "lora_A._fsdp_wrapped_module."),
    "everything": lambda name: "module._orig_mod." + _middle("_checkpoint_wrapped_module")(_infix("default")(name)),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Case, Tensors, Tensors]:
    """A LoRA with embeddings and patterns and a DoRA, and what they merge to."""
    folder = tmp_path_factory.mktemp("plain")
    patterns = {"rank_pattern": {r"^model\.layers\.0\..*": 3}, "alpha_pattern": {r"^model\.layers\.1\..*": 3}}
    lora = make_case(folder / "lora", "llama", **patterns)
    dora = make_case(folder / "dora", "llama", use_dora=True, target_modules=["q_proj", "up_proj", "lm_head"])
    return lora, dora, merge(lora, folder / "merged lora"), merge(dora, folder / "merged dora")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_name_written_in_another_way_means_the_same_bytes(
    tmp_path: Path, plain: tuple[Case, Case, Tensors, Tensors], dialect: str
) -> None:
    lora, dora, *rights = plain
    for case, right in zip((lora, dora), rights, strict=True):
        if case is lora and dialect.startswith("magnitudes end"):
            continue
        adapter = rewrite(case.adapter, tmp_path / str(case is lora), DIALECTS[dialect])
        lorasmith.merge(case.base, adapter, tmp_path / f"out {case is lora}")
        merged = load_file(tmp_path / f"out {case is lora}" / "model.safetensors")
        assert {name: raw_bytes(one) for name, one in merged.items()} == {
            name: raw_bytes(one) for name, one in right.items()
        }


def test_two_names_for_one_tensor_are_refused(tmp_path: Path, plain: tuple[Case, Case, Tensors, Tensors]) -> None:
    case = plain[0]
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    rewrite(case.adapter, tmp_path / "adapter", DIALECTS["compiled"])
    save_file(
        tensors | {f"_orig_mod.{name}": tensors[name].clone()}, tmp_path / "adapter" / "adapter_model.safetensors"
    )
    require_refusal(tmp_path, case.base, lorasmith.BadFile, "two names", name)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path, plain: tuple[Case, Case, Tensors, Tensors]) -> None:
    case = plain[0]
    rewrite(case.adapter, tmp_path / "adapter", lambda name: _infix("a" if "layers.0" in name else "b")(name))
    require_refusal(tmp_path, case.base, lorasmith.BadFile, "several adapters (a, b)")


def require_refusal(folder: Path, base: Path, error: type[Exception], *words: str) -> None:
    """Merging ``folder``/adapter is refused with these words, and nothing is written in ``folder``."""
    before = tree(folder)
    with pytest.raises(error) as caught:
        lorasmith.merge(base, folder / "adapter", folder / "out")
    for word in words:
        assert word in str(caught.value)
    assert tree(folder) == before


# ------------------------------------------------------------------------- another head than it was trained with


HEADS = [
    ("bert", "BertModel", "BertForMaskedLM", ["query", "value", "intermediate.dense"]),
    ("bert", "BertModel", "BertForSequenceClassification", ["query", "pooler.dense"]),
    ("bert", "BertForSequenceClassification", "BertModel", ["key", "pooler.dense"]),
    ("bert", "BertForTokenClassification", "BertForMaskedLM", ["key", "position_embeddings"]),
    ("gpt2", "GPT2Model", "GPT2LMHeadModel", ["c_attn", "c_proj", "wpe"]),
    ("gpt2", "GPT2LMHeadModel", "GPT2Model", ["c_attn", "c_proj", "wpe"]),
    ("llama", "LlamaModel", "LlamaForCausalLM", ["q_proj", "up_proj", "embed_tokens"]),
    ("llama", "LlamaForCausalLM", "LlamaModel", ["q_proj", "up_proj"]),
    ("vit", "ViTModel", "ViTForImageClassification", ["q_proj", "fc1"]),
    ("vit", "ViTForImageClassification", "ViTModel", ["v_proj", "o_proj", "fc2"]),
    ("t5", "T5EncoderModel", "T5ForConditionalGeneration", ["q", "wo"]),
]


@pytest.mark.parametrize(("kind", "trained", "base", "targets"), HEADS, ids=[f"{one[1]}-{one[2]}" for one in HEADS])
def test_an_adapter_fits_the_same_model_with_another_head(
    tmp_path: Path, kind: str, trained: str, base: str, targets: list[str]
) -> None:
    family = FAMILIES[kind]
    family.build(base).save_pretrained(tmp_path / "base")
    source = getattr(transformers, trained).from_pretrained(tmp_path / "base")
    adapted = adapt(source, target_modules=r".*\.(" + "|".join(targets) + ")")
    adapted.save_pretrained(tmp_path / "adapter")
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    right = getattr(transformers, base).from_pretrained(tmp_path / "base")
    inside = {
        name.split(".", 1)[-1] if name.split(".")[0] in PREFIXES else name: p for name, p in right.named_parameters()
    }
    assert len(layers(adapted)) > 1
    for module, layer in layers(adapted).items():
        module = module.split(".", 1)[-1] if module.split(".")[0] in PREFIXES else module
        inside[f"{module}.weight"].data += layer.get_delta_weight("default").detach()
    merged, info = getattr(transformers, base).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    wanted = right.state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(tensor, wanted[name], rtol=1e-6, atol=1e-7), name
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(not torch.equal(before[name], after[name]) for name in before) == len(layers(adapted))


V4_NAMES = {
    "layers.": "encoder.layer.", "q_proj": "attention.query", "v_proj": "attention.value",
    "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip
"""What transformers 4 called the layers of a ViT, as they are still called on disk."""


def test_an_adapter_of_transformers_4_means_the_same_bytes_as_one_of_transformers_5(tmp_path: Path) -> None:
    case = make_case(tmp_path, "vit", target_modules=["q_proj", "v_proj", "o_proj", "fc1", "fc2"])

    def rename(name: str) -> str:
        for new, old in V4_NAMES.items():
            name = name.replace(new, old)
        return name

    new = merge(case, tmp_path / "new")
    old = merge(replace(case, adapter=rewrite(case.adapter, tmp_path / "old adapter", rename)), tmp_path / "old")
    assert {name: raw_bytes(one) for name, one in new.items()} == {name: raw_bytes(one) for name, one in old.items()}


PREFIXES = ("bert", "transformer", "model", "vit")


def test_an_adapter_that_fits_in_part_names_the_rest_and_merges_only_if_told_to(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    family.build().save_pretrained(tmp_path / "base")
    adapted = adapt(family.build("BertModel"), target_modules=["query", "pooler.dense"])
    adapted.save_pretrained(tmp_path / "adapter")
    missing = "base_model.model.pooler.dense.lora_A.weight"
    require_refusal(tmp_path, tmp_path / "base", lorasmith.AdapterMismatch, missing, "2 of 6", "--allow-unmatched")
    report = lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_unmatched=True)
    assert report.tensors_merged == 2
    assert missing in report.adapters[0].unmatched
    assert any(missing in text for text in report.warnings)


# ------------------------------------------------------------------------------------------------------- refusals


CARRIED: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "alora_invocation_tokens": ("llama", {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"}, ()),
    "kasa_config": ("llama", {"kasa_config": KasaConfig()}, ("lora_diag",)),
    "pissa": ("llama", {"init_lora_weights": "pissa"}, ()),
    "pissa_niter_4": ("llama", {"init_lora_weights": "pissa_niter_4"}, ()),
    "olora": ("llama", {"init_lora_weights": "olora"}, ()),
}  # fmt: skip
"""What an adapter made by PEFT carries, by the option's name, and which tensors give it away without its config."""


@pytest.mark.parametrize("option", CARRIED)
def test_what_cannot_be_merged_yet_is_refused_by_the_name_of_the_option(tmp_path: Path, option: str) -> None:
    kind, options, marks = CARRIED[option]
    case = _carrying(tmp_path, kind, options)
    require_refusal(tmp_path, case.base, lorasmith.Unsupported, option)
    if marks:
        edit(case.adapter, **dict.fromkeys(options, ...))
        require_refusal(tmp_path, case.base, lorasmith.LorasmithError, *marks)


def _carrying(folder: Path, kind: str, options: Mapping[str, Any]) -> Case:
    family = FAMILIES[kind]
    model = family.build()
    model.save_pretrained(folder / "base")
    config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **options})
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return Case(folder / "base", folder / "adapter", family)


SAID: dict[str, Any] = {
    "use_qalora": True,
    "arrow_config": {"top_k": 3},
    "megatron_config": {"hidden_size": 8},
    **{f"init_lora_weights {name}": name for name in ("corda", "loftq", "lora_ga", "PiSSA")},
}
"""What needs a quantised model, other adapters, calibration data or a cluster to make, as configs say it."""


@pytest.mark.parametrize("option", SAID)
def test_an_option_that_a_config_names_is_refused(tmp_path: Path, option: str) -> None:
    case = make_case(tmp_path, "llama", target_modules=["q_proj"])
    key, _, value = option.partition(" ")
    edit(case.adapter, **{key: SAID[option]})
    require_refusal(tmp_path, case.base, lorasmith.Unsupported, value or key, "adapter_config.json")


def test_lora_on_stacked_experts_is_refused_where_the_config_does_not_name_them(tmp_path: Path) -> None:
    sizes = {**LLAMA_SIZES, "num_local_experts": 3, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", target_parameters=...)
    require_refusal(tmp_path, tmp_path / "base", lorasmith.AdapterMismatch, "layers.0.mlp.experts", "rank")


OTHERS = {
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LOHA": lambda: peft.LoHaConfig(target_modules=["q_proj"]),
    "LOKR": lambda: peft.LoKrConfig(target_modules=["q_proj"]),
    "ADALORA": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj"], r=4, oft_block_size=0),
    "BOFT": lambda: peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4),
    "HRA": lambda: peft.HRAConfig(target_modules=["q_proj"]),
    "VERA": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4),
    "MISS": lambda: peft.MissConfig(target_modules=["q_proj"], r=4),
    "FOURIERFT": lambda: peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=10),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"]),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P_TUNING": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_an_adapter_of_another_tuner_is_refused_by_the_tuner_s_name(tmp_path: Path, kind: str) -> None:
    model = FAMILIES["llama"].build()
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, OTHERS[kind]()).save_pretrained(tmp_path / "adapter")
    require_refusal(tmp_path, tmp_path / "base", lorasmith.Unsupported, f"{kind} adapter", "adapter_config.json")


def test_a_mixture_of_adapters_is_refused_by_its_name(tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama", target_modules=["q_proj"])
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=48, xlora_depth=2, adapters={"one": str(case.adapter)})
    model = load_base(case)
    model.config.use_cache = False
    get_peft_model(model, config).save_pretrained(tmp_path / "mixture")
    case.adapter.rename(tmp_path / "one")
    (tmp_path / "mixture").rename(tmp_path / "adapter")
    require_refusal(tmp_path, case.base, lorasmith.Unsupported, "XLORA")


@pytest.mark.parametrize("shape", [(0,), (0, 48), (4, 0), (192,)])
def test_the_empty_shells_of_an_ungathered_save_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    case = make_case(tmp_path, "llama", target_modules=["q_proj"])
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    change_tensors(case.adapter, {name: torch.zeros(shape)})
    require_refusal(tmp_path, case.base, lorasmith.AdapterMismatch, name, "ZeRO-3")


def change_tensors(adapter: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Replace or add tensors of an adapter; None takes one out."""
    file = adapter / "adapter_model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: one for name, one in tensors.items() if one is not None}, file, {"format": "pt"})


@pytest.mark.parametrize("pickled", [False, True])
def test_a_folder_of_several_adapters_lists_them_in_the_order_of_their_numbers(tmp_path: Path, pickled: bool) -> None:
    case = make_case(tmp_path, "llama", target_modules=["q_proj"])
    for step in (100, 1000, 500):
        one = tmp_path / "run" / f"checkpoint-{step}"
        rewrite(case.adapter, one, lambda name: name.replace("base_model.model.", ""))
        if pickled:
            torch.save(load_file(one / "adapter_model.safetensors"), one / "adapter_model.bin")
            (one / "adapter_model.safetensors").unlink()
    with pytest.raises(lorasmith.MissingFile, match=r"holds 3.*checkpoint-100, .*checkpoint-500, .*checkpoint-1000;"):
        lorasmith.merge(case.base, tmp_path / "run", tmp_path / "out")
    lorasmith.merge(case.base, tmp_path / "run" / "checkpoint-500", tmp_path / "out")


def test_a_pickled_adapter_means_the_same_bytes(tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama")
    plain = merge(case, tmp_path / "plain")
    torch.save(load_file(case.adapter / "adapter_model.safetensors"), case.adapter / "adapter_model.bin")
    (case.adapter / "adapter_model.safetensors").unlink()
    pickled = merge(case, tmp_path / "pickled")
    assert pickled.keys() == plain.keys()
    assert all(raw_bytes(pickled[name]) == raw_bytes(plain[name]) for name in plain)


# ---------------------------------------------------------------------------------------- configs and odd adapters


Q = "base_model.model.model.layers.0.self_attn.q_proj"

WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "the rank is another": ({}, {"r": 16}, lorasmith.AdapterMismatch, ("q_proj", "rank 4", "r = 16")),
    "a rank pattern is lost": (
        {"rank_pattern": {"q_proj": 2}}, {"rank_pattern": ...}, lorasmith.AdapterMismatch, ("q_proj", "rank 2"),
    ),
    "a rank pattern is another's": (
        {}, {"rank_pattern": {"v_proj": 9}}, lorasmith.AdapterMismatch, ("v_proj", "r = 9"),
    ),
    "magnitudes without DoRA": ({"use_dora": True}, {"use_dora": False}, lorasmith.AdapterMismatch, ("use_dora",)),
    "DoRA without magnitudes": ({}, {"use_dora": True}, lorasmith.AdapterMismatch, ("lora_magnitude_vector", "q_proj")),
    "alpha is a word": ({}, {"lora_alpha": "16"}, lorasmith.BadFile, ("lora_alpha = '16'",)),
    "alpha is nothing": ({}, {"lora_alpha": None}, lorasmith.BadFile, ("lora_alpha",)),
    "alpha is endless": ({}, {"lora_alpha": math.inf}, lorasmith.BadFile, ("Infinity",)),
    "alpha has 400 digits": ({}, {"lora_alpha": 10**399}, lorasmith.BadFile, ("lora_alpha",)),
    "rank is a truth": ({}, {"r": True}, lorasmith.BadFile, ("r = True",)),
    "a pattern is a list": ({}, {"alpha_pattern": ["q_proj"]}, lorasmith.BadFile, ("alpha_pattern",)),
    "a pattern is broken": ({}, {"alpha_pattern": {"q_(proj": 3}}, lorasmith.BadFile, ("q_(proj",)),
    "a pattern gives a word": ({}, {"rank_pattern": {"q_proj": "4"}}, lorasmith.BadFile, ("q_proj",)),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_config_that_contradicts_the_tensors_or_makes_no_sense_is_refused(tmp_path: Path, what: str) -> None:
    options, changes, error, words = WRONG[what]
    case = make_case(tmp_path, "llama", **{"target_modules": ["q_proj", "v_proj"], **options})
    edit(case.adapter, **changes)
    require_refusal(tmp_path, case.base, error, *words)


INCOMPLETE: dict[str, tuple[dict[str, torch.Tensor | None], tuple[str, ...]]] = {
    "a factor is missing": ({f"{Q}.lora_B.weight": None}, ("self_attn.q_proj", "no lora_B")),
    "both factors are missing": ({f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}, ("no lora_A",)),
    "factors of two ranks": ({f"{Q}.lora_B.weight": torch.ones(48, 3)}, (f"{Q}.lora_B.weight", "rank 3")),
    "another width": ({f"{Q}.lora_A.weight": torch.ones(4, 47)}, ("[48, 47]", "[48, 48]")),
    "too few magnitudes": ({f"{Q}.lora_magnitude_vector": torch.ones(47)}, ("47 magnitudes", "48 outputs")),
    "a module of another model": (
        {f"{Q}x.lora_A.weight": torch.ones(4, 48), f"{Q}x.lora_B.weight": torch.ones(48, 4),
         f"{Q}x.lora_magnitude_vector": torch.ones(48)},
        (f"{Q}x.lora_A.weight", "Nearest", "q_proj.weight"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", INCOMPLETE)
def test_an_incomplete_adapter_is_refused_by_the_tensor_s_name(tmp_path: Path, what: str) -> None:
    changes, words = INCOMPLETE[what]
    case = make_case(tmp_path, "llama", use_dora=True, target_modules=["q_proj", "v_proj"])
    change_tensors(case.adapter, changes)
    require_refusal(tmp_path, case.base, lorasmith.AdapterMismatch, *words)


@pytest.mark.parametrize(
    "tensor",
    ["base_model.model.model.norm.weight", f"{Q}.lora_C.weight", f"{Q}.lora_A.default.more.weight", "step",
     f"{Q}.lora_B.bias", f"{Q}.bias"],
)  # fmt: skip
def test_a_tensor_that_no_lora_has_is_refused_by_its_name(tmp_path: Path, tensor: str) -> None:
    case = make_case(tmp_path, "llama", target_modules=["q_proj"])
    change_tensors(case.adapter, {tensor: torch.ones(4)})
    require_refusal(tmp_path, case.base, lorasmith.LorasmithError, tensor)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 8.0, "r": 4.0},
        {"rank_pattern": None, "alpha_pattern": None, "use_dora": None, "use_rslora": None, "bias": "none"},
        {"peft_version": "0.3.0", "enable_lora": None, "merge_weights": False, "use_rslora": ..., "rank_pattern": ...},
        {"an_option_of_tomorrow": False},
    ],
    ids=["floats", "nulls", "old", "new"],
)
def test_configs_of_other_versions_mean_what_they_mean_to_peft(tmp_path: Path, changes: dict[str, Any]) -> None:
    case = make_case(tmp_path, "llama", target_modules=["q_proj"])
    right = merged_by_peft(case, tmp_path / "peft")
    edit(case.adapter, **changes)
    assert require_close(merge(case, tmp_path / "out"), right, load_file(case.base / "model.safetensors"))


def test_a_config_that_says_only_what_it_is_has_peft_s_defaults(tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama", target_modules=["q_proj"], r=8, lora_alpha=8)
    write_json(case.adapter / "adapter_config.json", {"peft_type": "LORA", "target_modules": ["q_proj"]})
    base = load_file(case.base / "model.safetensors")
    assert require_close(merge(case, tmp_path / "out"), merged_by_peft(case, tmp_path / "peft"), base)


def test_alpha_zero_changes_nothing_and_says_so(tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama", target_modules=["q_proj"], lora_alpha=0)
    report = lorasmith.merge(case.base, case.adapter, tmp_path / "out")
    base, ours = load_file(case.base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(base[name], ours[name]) for name in base)
    assert any("changes nothing" in text for text in report.warnings)


class Odd(torch.nn.Module):
    """Modules called by numbers, and by what PEFT calls its own tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 6))
        self.lora_A_net = torch.nn.ModuleDict({"0": torch.nn.Linear(6, 6), "x-y+z": torch.nn.Linear(6, 5)})
        self.module = torch.nn.Linear(5, 7)
        self.alpha = torch.nn.Linear(7, 3)


@pytest.mark.parametrize(
    "targets",
    [["0", "2"], ["net.0"], r"(net|lora_A_net)\.[02]", r".*\.x-y\+z|module", ["module"], ["alpha", "module"],
     ["0", "2", "x-y+z", "module", "alpha"]],
    ids=str,
)  # fmt: skip
def test_modules_with_odd_names_are_merged_like_others(tmp_path: Path, targets: list[str] | str) -> None:
    torch.manual_seed(0)
    model = Odd()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    adapted = adapt(model, target_modules=targets, rank_pattern={"0": 2, "x-y\\+z": 3})
    adapted.save_pretrained(tmp_path / "adapter")
    lorasmith.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
    count = len(layers(adapted))
    right = adapted.merge_and_unload().state_dict()
    assert len(require_close(load_file(tmp_path / "out.safetensors"), right, base)) == count > 0


def test_two_towers_that_fit_equally_are_refused(tmp_path: Path) -> None:
    """An adapter of one tower alone says nothing about which of two it was trained in."""
    tower = {"layers.0.q_proj.weight": torch.randn(6, 6), "layers.1.q_proj.weight": torch.randn(6, 6)}
    base = {
        f"{name}.{key}": one + position for position, name in enumerate(("text", "image")) for key, one in tower.items()
    }
    save_file(base, tmp_path / "base.safetensors")
    model = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 6)}) for _ in range(2))}
    )
    adapt(model, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    require_refusal(tmp_path, tmp_path / "base.safetensors", lorasmith.AdapterMismatch, "2 ways", "text.", "image.")


# ---------------------------------------------------------------------------------------------------- single files


def test_a_file_called_as_peft_calls_it_has_the_config_beside_it(tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama", target_modules=["q_proj"], r=4, lora_alpha=24)
    right = merge(case, tmp_path / "out")
    ours = merge(replace(case, adapter=case.adapter / "adapter_model.safetensors"), tmp_path / "from file")
    assert {name: raw_bytes(one) for name, one in ours.items()} == {name: raw_bytes(one) for name, one in right.items()}


@pytest.mark.parametrize("alpha", [None, 24.0], ids=["without alpha", "with alpha in its tensors"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_file_on_its_own_has_the_alpha_of_its_tensors_or_the_scale_1(
    tmp_path: Path, alpha: float | None, dtype: str
) -> None:
    case = make_case(tmp_path, "llama", target_modules=["q_proj", "v_proj"], r=4, lora_alpha=alpha or 4)
    right = merged_by_peft(case, tmp_path / "peft")
    alone = case.adapter / "my lora.safetensors"
    (case.adapter / "adapter_model.safetensors").rename(alone)
    tensors = load_file(alone)
    if alpha is not None:
        modules = {name.partition(".lora_")[0] for name in tensors}
        tensors |= {f"{module}.alpha": torch.tensor(alpha, dtype=FLOATS[dtype]) for module in modules}
    save_file(tensors, alone)
    report = lorasmith.merge(case.base, alone, tmp_path / "out")
    ours, base = load_file(tmp_path / "out" / "model.safetensors"), load_file(case.base / "model.safetensors")
    assert len(require_close(ours, right, base)) == 4
    assert any("scale" in text for text in report.warnings) == (alpha is None)


def test_an_alpha_in_the_tensors_must_be_the_config_s(tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama", target_modules=["q_proj"], lora_alpha=8)
    change_tensors(case.adapter, {f"{Q}.alpha": torch.tensor(9.0)})
    require_refusal(tmp_path, case.base, lorasmith.AdapterMismatch, "q_proj", "alpha 9", "8 in the config")
