"""PEFT as the oracle for what is no plain linear layer: convolutions, attention in one piece, blocks, biases."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from generate import Tensors, raw_bytes, write_json
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import BdLoraConfig
from peft.tuners.lora.layer import MultiheadAttention
from safetensors.torch import load_file, save_file
from test_peft import BERT_SIZES, FAMILIES, Case, Family, load_base, merge, merged_by_peft, require_close, tokens

import lorasmith

pytestmark = pytest.mark.filterwarnings("ignore")


# ------------------------------------------------------------------------------------------------ models and inputs


def pixels(*shape: int) -> torch.Tensor:
    return torch.linspace(-20, 20, math.prod(shape)).view(shape).sin()


IMAGE = {"num_labels": 5, "image_size": 32}
LAYERS = {
    "resnet": Family(
        "ResNetForImageClassification", "ResNetConfig",
        {**IMAGE, "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2], "layer_type": "bottleneck"},
        ("convolution", "classifier.1"), lambda: {"pixel_values": pixels(2, 3, 32, 32)},
    ),
    "convnext": Family(
        "ConvNextForImageClassification", "ConvNextConfig",
        {**IMAGE, "hidden_sizes": [8, 12], "depths": [1, 2], "num_stages": 2, "layer_scale_init_value": 1.0},
        ("patch_embeddings", "downsampling_layer.1", "pwconv1", "pwconv2"),
        lambda: {"pixel_values": pixels(2, 3, 32, 32)},
    ),
    "vit": Family(
        "ViTForImageClassification", "ViTConfig", FAMILIES["vit"].sizes, ("projection", "q_proj"),
        FAMILIES["vit"].inputs,
    ),
    "videomae": Family(
        "VideoMAEForVideoClassification", "VideoMAEConfig",
        {**IMAGE, "patch_size": 8, "num_frames": 4, "tubelet_size": 2, "hidden_size": 24, "intermediate_size": 40,
         "num_hidden_layers": 1, "num_attention_heads": 4},
        ("projection", "value"), lambda: {"pixel_values": pixels(2, 4, 3, 32, 32)},
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration", "WhisperConfig", FAMILIES["whisper"].sizes, ("conv1", "conv2", "fc1"),
        FAMILIES["whisper"].inputs,
    ),
    "wav2vec2": Family(
        "Wav2Vec2ForCTC", "Wav2Vec2Config",
        {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
         "intermediate_size": 40, "conv_dim": [8, 12, 16], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 1],
         "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
        ("conv_layers.0.conv", "conv_layers.1.conv", "conv_layers.2.conv", "q_proj"),
        lambda: {"input_values": pixels(2, 400)},
    ),
    "mamba": Family(
        "MambaForCausalLM", "MambaConfig",
        {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0},
        ("in_proj", "x_proj", "dt_proj"), tokens(),
    ),
    "siglip": Family(
        "SiglipVisionModel", "SiglipVisionConfig",
        {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
         "image_size": 32, "patch_size": 8},
        ("head.attention", "patch_embedding", "v_proj"), lambda: {"pixel_values": pixels(2, 3, 32, 32)},
    ),
    "clip": Family(
        "CLIPModel", "CLIPConfig",
        {
            "text_config": {**BERT_SIZES, "eos_token_id": 60, "projection_dim": 20},
            "vision_config": {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
                              "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "projection_dim": 20},
            "projection_dim": 20,
        },
        ("q_proj", "out_proj", "fc1", "patch_embedding", "visual_projection"),
        tokens(pixel_values=pixels(2, 3, 32, 32)),
    ),
    "roberta": Family(
        "RobertaForSequenceClassification", "RobertaConfig", BERT_SIZES, ("query", "value", "dense"), tokens()
    ),
    "albert": Family(
        "AlbertForSequenceClassification", "AlbertConfig", {**BERT_SIZES, "embedding_size": 16},
        ("query", "key", "value", "dense", "ffn", "ffn_output", "embedding_hidden_mapping_in"), tokens(),
    ),
    "deberta": Family(
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        {**BERT_SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        ("query_proj", "key_proj", "value_proj", "dense"), tokens(),
    ),
    "bloom": Family(
        "BloomForCausalLM", "BloomConfig", {"vocab_size": 61, "hidden_size": 48, "n_layer": 2, "n_head": 4},
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), tokens(),
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", BERT_SIZES, ("query_key_value", "dense_h_to_4h", "embed_out"), tokens()
    ),
    "gptj": Family(
        "GPTJForCausalLM", "GPTJConfig",
        {"vocab_size": 61, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
        ("q_proj", "v_proj", "out_proj", "fc_in", "fc_out"), tokens(),
    ),
    "bart": Family(
        "BartForConditionalGeneration", "BartConfig",
        {"vocab_size": 61, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "max_position_embeddings": 32},
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), tokens(decoder_input_ids=torch.arange(10).view(2, 5)),
    ),
}  # fmt: skip
LAYERS["a basic resnet"] = Family(
    "ResNetForImageClassification", "ResNetConfig", {**LAYERS["resnet"].sizes, "layer_type": "basic"},
    ("convolution",), LAYERS["resnet"].inputs,
)  # fmt: skip

CASES: dict[str, tuple[Family, dict[str, Any]]] = {
    **{kind: (family, {}) for kind, family in LAYERS.items()},
    **{
        f"DoRA on {kind}": (LAYERS[kind], {"use_dora": True})
        for kind in ("resnet", "convnext", "vit", "videomae", "whisper", "wav2vec2", "albert")
    },
    **{
        f"biases on {kind}": (LAYERS[kind], {"lora_bias": True})
        for kind in ("convnext", "vit", "whisper", "roberta", "albert", "bloom")
    },
    "a bias on videomae": (LAYERS["videomae"], {"lora_bias": True, "target_modules": ["projection"]}),
    "biases on gpt2": (FAMILIES["gpt2"], {"lora_bias": True, "target_modules": ["c_attn", "c_fc"]}),
    "rsLoRA on resnet": (LAYERS["resnet"], {"use_rslora": True, "alpha_pattern": {"convolution": 3}}),
    "DoRA on a llama's embedding": (
        FAMILIES["llama"], {"use_dora": True, "target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    ),
    "DoRA on a bert's embeddings": (
        FAMILIES["bert"], {"use_dora": True, "target_modules": ["position_embeddings", "token_type_embeddings", "key"]},
    ),
    "DoRA on a gpt2's positions": (FAMILIES["gpt2"], {"use_dora": True, "target_modules": ["wpe", "c_fc"]}),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ adapters and merges


def adapt(model: torch.nn.Module, seed: int = 1, **options: Any) -> Any:
    """The model with an adapter drawn at random, ‖ΔW‖ being about 0.4·‖W0‖."""
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **options})).eval()
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(adapted):
        _draw(layer, generator)
    return adapted


def layers_of(model: torch.nn.Module) -> list[LoraLayer]:
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def _draw(layer: LoraLayer, generator: torch.Generator) -> None:
    base, scale = layer.get_base_layer(), layer.scaling["default"]
    weight = base.in_proj_weight if isinstance(layer, MultiheadAttention) else base.weight
    size = 0.4 * float(weight.detach().std()) / (scale * math.sqrt(layer.r["default"]))
    for name, parameter in layer.named_parameters():
        own = "base_layer" not in name
        if own and "magnitude" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=generator)
        elif own and ("lora_" in name):
            factor = size if "_B" in name else 1.0
            parameter.data = factor * torch.randn(parameter.shape, generator=generator)
        if isinstance(layer, MultiheadAttention) and name == "lora_B.default.bias":
            parameter.data.zero_()  # as PEFT leaves it: it is in no forward pass


def make_case(folder: Path, family: Family, **options: Any) -> Case:
    family.build().save_pretrained(folder / "base")
    case = Case(folder / "base", folder / "adapter", family)
    given = {"target_modules": list(family.targets), **family.options, **options}
    adapt(load_base(case), **given).save_pretrained(folder / "adapter")
    return case


def answer(model: torch.nn.Module, inputs: Tensors | torch.Tensor) -> torch.Tensor:
    """The model's first output, or what it pools, if it does."""
    with torch.no_grad():
        found = model(inputs) if isinstance(inputs, torch.Tensor) else model(**inputs)
    if isinstance(found, torch.Tensor):
        return found.double()
    pooled: torch.Tensor = found["pooler_output"] if "pooler_output" in found else found[0]
    return pooled.double()


def require_same_answers(merged: torch.Tensor, adapted: torch.Tensor, plain: torch.Tensor) -> None:
    off = (merged - adapted).norm() / adapted.norm()
    assert off < 1e-4
    assert (plain - adapted).norm() / adapted.norm() > max(1e-3, 1000 * off)


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_what_peft_merges_and_the_model_answers_like_the_adapted_one(tmp_path: Path, name: str) -> None:
    family, options = CASES[name]
    case = make_case(tmp_path, family, **options)
    ours, base = merge(case, tmp_path / "out"), load_file(case.base / "model.safetensors")
    changed = require_close(ours, merged_by_peft(case, tmp_path / "peft"), base)
    model = load_base(case)
    plain = answer(model, family.inputs())
    adapted = PeftModel.from_pretrained(model, case.adapter).eval()
    kinds = layers_of(adapted)
    if "whisper" in name:  # its forward pass asks a convolution for its stride, which PEFT's wrapper does not know
        adapted = adapted.merge_and_unload()
    assert len(changed) == len(kinds) * (2 if options.get("lora_bias") else 1)
    loaded, info = getattr(transformers, family.model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    require_same_answers(answer(loaded.eval(), family.inputs()), answer(adapted, family.inputs()), plain)


# -------------------------------------------------------------------------------------------- modules of torch alone


class Attention(torch.nn.Module):
    """Two blocks as OpenCLIP has them, around a torch.nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(16, 4), "c_fc": torch.nn.Linear(16, 16)})
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["attn"](x, x, x, need_weights=False)[0]
            x = x + block["c_fc"](x).tanh()
        return x


class Single(torch.nn.Module):
    """One layer, called ``layer``."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(x)
        return found


class Perceptron(torch.nn.Module):
    """Projections of different sizes, with dimensions that 2 and 3 divide."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = torch.nn.Linear(12, 18), torch.nn.Linear(18, 12)
        self.down = torch.nn.ModuleDict({"o_proj": torch.nn.Linear(12, 12), "plain": torch.nn.Linear(12, 6)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.o_proj(self.q_proj(x).tanh()).tanh()
        found: torch.Tensor = self.down["plain"](self.down["o_proj"](x).tanh())
        return found


def save(folder: Path, model: torch.nn.Module, **options: Any) -> Any:
    """Save the model as ``base.safetensors`` and an adapter of it as ``adapter``; the adapted model."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    save_file({name: one.clone() for name, one in model.state_dict().items()}, folder / "base.safetensors")
    adapted = adapt(copy.deepcopy(model), **options)
    adapted.save_pretrained(folder / "adapter")
    return adapted


def merge_file(folder: Path) -> tuple[Tensors, Tensors]:
    """The tensors of the base and of the merged model."""
    lorasmith.merge(folder / "base.safetensors", folder / "adapter", folder / "out.safetensors")
    return load_file(folder / "base.safetensors"), load_file(folder / "out.safetensors")


def require_merge(folder: Path, model: torch.nn.Module, adapted: Any, inputs: torch.Tensor) -> set[str]:
    """The merged model is PEFT's and answers as the adapted one; the names of the tensors that changed."""
    base, ours = merge_file(folder)
    answers = [answer(adapted, inputs), answer(model, inputs)]
    changed = require_close(ours, adapted.merge_and_unload().state_dict(), base)
    model.load_state_dict(ours)
    require_same_answers(answer(model, inputs), *answers)
    return changed


def require_refusal(folder: Path, error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        lorasmith.merge(folder / "base.safetensors", folder / "adapter", folder / "out.safetensors")
    for word in words:
        assert word in str(caught.value)
    assert not (folder / "out.safetensors").exists()


ATTENTIONS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "patterns, of which the output follows its attention's": {
        "rank_pattern": {r"blocks\.0\.attn": 2, "out_proj": 3}, "alpha_pattern": {r"1\.attn": 5, "out_proj": 50},
    },
    "biases": {"lora_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)
def test_an_attention_in_one_piece_is_merged_as_peft_runs_it(tmp_path: Path, options: dict[str, Any]) -> None:
    model = Attention()
    adapted = save(tmp_path, model, target_modules=["attn", "c_fc"], **options)
    changed = require_merge(tmp_path, model, adapted, pixels(5, 2, 16))
    parameters = ["attn.in_proj_weight", "attn.out_proj.weight", "c_fc.weight"]
    parameters += ["attn.out_proj.bias", "c_fc.bias"] if options.get("lora_bias") else []
    assert changed == {f"blocks.{block}.{parameter}" for block in range(2) for parameter in parameters}


def test_an_attention_whose_input_has_a_trained_bias_or_whose_output_has_two_loras_is_refused(tmp_path: Path) -> None:
    save(tmp_path, Attention(), target_modules=["attn"], lora_bias=True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.blocks.1.attn.lora_B.bias"
    save_file({**tensors, name: torch.full_like(tensors[name], 1e-30)}, file)
    require_refusal(tmp_path, lorasmith.Unsupported, name, "MultiheadAttention")
    twice = {key.replace(".base_layer.", "."): one.clone() for key, one in tensors.items() if "base_layer" in key}
    save_file({**tensors, **twice}, file)
    require_refusal(tmp_path, lorasmith.Unsupported, "blocks.0.attn.out_proj", "two sets")


BLOCKS: dict[str, dict[str, Any]] = {
    "in A and in B": {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 3},
    "in A": {"target_modules_bd_a": ["proj"], "nblocks": 2},
    "in B": {"target_modules_bd_b": ["q_pro", "down.o"], "nblocks": 6},
    "one block": {"target_modules_bd_b": ["o_proj"], "nblocks": 1},
}  # fmt: skip


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_block_diagonal_factors_are_merged_as_peft_does(tmp_path: Path, blocks: dict[str, Any]) -> None:
    model = Perceptron()
    said = BdLoraConfig(match_strict=False, **blocks)
    adapted = save(tmp_path, model, target_modules=["q_proj", "o_proj", "plain"], r=6, use_bdlora=said)
    assert len(require_merge(tmp_path, model, adapted, pixels(7, 12))) == 4


def test_blocks_and_biases_go_together_where_peft_can_run_but_not_merge_them(tmp_path: Path) -> None:
    """PEFT asks a block-diagonal B for its bias when it merges, and fails; in the forward pass it has none."""
    model, inputs = Perceptron(), pixels(7, 12)
    said = BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=3)
    adapted = save(tmp_path, model, target_modules=["q_proj", "o_proj"], r=6, use_bdlora=said, lora_bias=True)
    base, ours = merge_file(tmp_path)
    plain = answer(model, inputs)
    model.load_state_dict(ours)
    require_same_answers(answer(model, inputs), answer(adapted, inputs), plain)
    changed = {name for name in base if not torch.equal(base[name], ours[name])}
    assert changed == {"q_proj.weight", "o_proj.weight", "o_proj.bias", "down.o_proj.weight", "down.o_proj.bias"}
    with pytest.raises(AttributeError, match="bias"):
        adapted.merge_and_unload()


SAID = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 3, "match_strict": True}


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (None, lorasmith.AdapterMismatch, ("q_proj", "rank 6", "rank 2")),
        ({**SAID, "nblocks": 2}, lorasmith.AdapterMismatch, ("q_proj", "rank 4")),
        ({**SAID, "nblocks": 5}, lorasmith.AdapterMismatch, ("lora_A.weight", "5 blocks")),
        ({**SAID, "nblocks": 0}, lorasmith.BadFile, ("nblocks",)),
        ({**SAID, "nblocks": True}, lorasmith.BadFile, ("nblocks",)),
        ({**SAID, "target_modules_bd_a": "o_proj"}, lorasmith.BadFile, ("use_bdlora",)),
        ({**SAID, "target_modules_bd_a": ["proj"]}, lorasmith.AdapterMismatch, ("q_proj", "both")),
        ({**SAID, "target_modules_bd_b": []}, lorasmith.AdapterMismatch, ("q_proj", "no factor")),
        (True, lorasmith.BadFile, ("use_bdlora",)),
    ],
    ids=str,
)
def test_a_config_whose_blocks_are_not_the_tensors_is_refused(
    tmp_path: Path, said: object, error: type[Exception], words: Sequence[str]
) -> None:
    given = BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=3)
    save(tmp_path, Perceptron(), target_modules=["q_proj", "o_proj"], r=6, use_bdlora=given)
    edit_config(tmp_path, use_bdlora=said)
    require_refusal(tmp_path, error, *words)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "adapter" / "adapter_config.json"
    write_json(file, {**json.loads(file.read_text()), **changes})


# -------------------------------------------------------------------------------------------------- convolutions


CONVOLUTIONS: dict[str, tuple[torch.nn.Module, tuple[int, ...]]] = {
    "1d": (torch.nn.Conv1d(6, 10, 3, stride=2, padding=1), (2, 6, 21)),
    "1d pointwise": (torch.nn.Conv1d(6, 10, 1), (2, 6, 21)),
    "1d as wide as high": (torch.nn.Conv1d(6, 18, 3), (2, 6, 21)),
    "1d without bias": (torch.nn.Conv1d(6, 10, 4, bias=False), (2, 6, 21)),
    "2d": (torch.nn.Conv2d(6, 10, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 6, 9, 9)),
    "2d pointwise": (torch.nn.Conv2d(6, 10, 1), (2, 6, 9, 9)),
    "2d in a line": (torch.nn.Conv2d(6, 10, (1, 5)), (2, 6, 9, 9)),
    "2d pointwise and dilated": (torch.nn.Conv2d(6, 10, 1, dilation=2), (2, 6, 9, 9)),
    "2d as padded as it needs": (torch.nn.Conv2d(6, 10, 3, padding="same"), (2, 6, 9, 9)),
    "3d": (torch.nn.Conv3d(6, 10, (2, 3, 1), padding=1), (2, 6, 5, 5, 5)),
}


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_are_merged_as_peft_does(tmp_path: Path, kind: str, dora: bool) -> None:
    layer, shape = CONVOLUTIONS[kind]
    model = Single(copy.deepcopy(layer))
    adapted = save(tmp_path, model, target_modules=["layer"], use_dora=dora)
    edit_config(tmp_path, fan_in_fan_out=True)  # means nothing to a convolution, be it as wide as high
    assert require_merge(tmp_path, model, adapted, pixels(*shape)) == {"layer.weight"}


def test_a_pointwise_convolution_in_space_is_merged_where_peft_fails_to(tmp_path: Path) -> None:
    """PEFT merges a Conv3d whose kernel begins with ones as if it had two dimensions; the adapted model runs."""
    model, inputs = Single(torch.nn.Conv3d(6, 10, 1)), pixels(2, 6, 4, 4, 4)
    adapted = save(tmp_path, model, target_modules=["layer"])
    _, ours = merge_file(tmp_path)
    plain = answer(model, inputs)
    model.load_state_dict(ours)
    require_same_answers(answer(model, inputs), answer(adapted, inputs), plain)
    with pytest.raises(RuntimeError):
        adapted.merge_and_unload()


@pytest.mark.parametrize("turned", [(3, 1), (1, 3), (3,)], ids=str)
def test_a_kernel_of_another_shape_is_refused_by_the_weight_s_name(tmp_path: Path, turned: tuple[int, ...]) -> None:
    save(tmp_path, Single(torch.nn.Conv2d(6, 10, (1, 3))), target_modules=["layer"])
    save_file({"layer.weight": torch.ones(10, 6, *turned)}, tmp_path / "base.safetensors")
    if turned == (1, 3):
        assert merge_file(tmp_path)
        return
    require_refusal(tmp_path, lorasmith.AdapterMismatch, "layer.weight", "[10, 6, 1, 3]", str([10, 6, *turned]))


GROUPED: dict[str, tuple[torch.nn.Module, tuple[int, ...]]] = {
    "two groups": (torch.nn.Conv1d(8, 4, 3, padding=1, groups=2), (2, 8, 20)),
    "four groups in a plane": (torch.nn.Conv2d(8, 12, 3, groups=4), (2, 8, 9, 9)),
    "depthwise": (torch.nn.Conv1d(8, 8, 3, padding=1, groups=8), (2, 8, 20)),
}


@pytest.mark.parametrize("kind", GROUPED)
def test_a_grouped_convolution_is_refused_since_its_factors_mix_the_groups(tmp_path: Path, kind: str) -> None:
    """What the adapted layer adds is a change of the dense layer, and of no grouped one."""
    layer, shape = GROUPED[kind]
    model = Single(copy.deepcopy(layer))
    adapted = save(tmp_path, model, target_modules=["layer"], r=8)
    require_refusal(tmp_path, lorasmith.Unsupported, "layer.lora_A.weight", f"{layer.groups} groups")
    inputs = torch.zeros(shape)
    inputs[:, -1] = 1  # an input of the last group, seen by an output of the first
    assert torch.equal(model(inputs)[:, 0], model(0 * inputs)[:, 0])
    assert not torch.allclose(adapted(inputs)[:, 0], adapted(0 * inputs)[:, 0], atol=1e-3)
    with pytest.raises(NotImplementedError):
        adapted.merge_and_unload()


@pytest.mark.parametrize("kind", GROUPED)
def test_a_grouped_convolution_is_merged_where_no_factor_leaves_its_group(tmp_path: Path, kind: str) -> None:
    layer, shape = GROUPED[kind]
    model = Single(copy.deepcopy(layer))
    adapted = save(tmp_path, model, target_modules=["layer"], r=8)
    a, b = (part["default"].weight.data for part in (layers_of(adapted)[0].lora_A, layers_of(adapted)[0].lora_B))
    size, inputs = 8 // layer.groups, a.shape[1] // layer.groups
    for group in range(layer.groups):
        own = a[group * size : (group + 1) * size, group * inputs : (group + 1) * inputs].clone()
        a[group * size : (group + 1) * size] = 0
        a[group * size : (group + 1) * size, group * inputs : (group + 1) * inputs] = own
    a[0], b[: b.shape[0] // layer.groups, 0] = 1.0, 0.0  # a row that leaves its group, but that nothing reads
    adapted.save_pretrained(tmp_path / "adapter")
    base, ours = merge_file(tmp_path)
    assert not torch.equal(base["layer.weight"], ours["layer.weight"])
    plain = answer(model, pixels(*shape))
    model.load_state_dict(ours)
    require_same_answers(answer(model, pixels(*shape)), answer(adapted, pixels(*shape)), plain)


def test_a_dora_on_a_grouped_convolution_is_refused_by_the_magnitude_s_name(tmp_path: Path) -> None:
    adapted = save(tmp_path, Single(torch.nn.Conv1d(8, 4, 3, groups=2)), target_modules=["layer"], use_dora=True)
    layers_of(adapted)[0].lora_A["default"].weight.data.zero_()
    adapted.save_pretrained(tmp_path / "adapter")
    require_refusal(tmp_path, lorasmith.Unsupported, "layer.lora_magnitude_vector", "grouped convolution")


@pytest.mark.parametrize(
    ("kind", "target"), [("convnext", "dwconv"), ("wav2vec2", "pos_conv_embed.conv")], ids=["ConvNeXt", "wav2vec2"]
)
def test_the_grouped_convolutions_of_known_models_are_refused_by_the_factor_s_name(
    tmp_path: Path, kind: str, target: str
) -> None:
    targets = ["encoder.stages.0.layers.0.dwconv" if target == "dwconv" else target]
    case = make_case(tmp_path, LAYERS[kind], target_modules=targets, r=8)
    with pytest.raises(lorasmith.Unsupported, match=r"lora_A\.weight.* groups"):
        lorasmith.merge(case.base, case.adapter, tmp_path / "out")


def test_an_adapter_on_a_transposed_or_on_a_mamba_s_convolution_is_one_that_peft_does_not_make(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ConvTranspose1d"):
        adapt(Single(torch.nn.ConvTranspose1d(8, 4, 3)), target_modules=["layer"])
    with pytest.raises(ValueError, match="conv1d"):
        adapt(LAYERS["mamba"].build(), target_modules=["conv1d"], r=48)


# --------------------------------------------------------------------------------------------------------- biases


def test_a_bias_for_a_layer_that_has_none_is_refused_by_its_name(tmp_path: Path) -> None:
    adapted = save(tmp_path, Single(torch.nn.Linear(6, 10, bias=False)), target_modules=["layer"], lora_bias=True)
    require_refusal(tmp_path, lorasmith.AdapterMismatch, "layer.lora_B.bias")
    with pytest.raises(RuntimeError, match="no bias"):
        adapted.merge_and_unload()


BIAS = "base_model.model.layer.lora_B.bias"


@pytest.mark.parametrize(
    ("options", "changes", "config", "error", "words"),
    [
        ({}, {BIAS: torch.ones(10)}, {}, lorasmith.AdapterMismatch, (BIAS, "lora_bias = false")),
        ({"lora_bias": True}, {BIAS: None}, {}, lorasmith.AdapterMismatch, ("'layer'", "no lora_B.bias")),
        ({"lora_bias": True}, {BIAS: torch.ones(9)}, {}, lorasmith.AdapterMismatch, (BIAS, "10 outputs")),
        ({"lora_bias": True}, {BIAS: torch.ones(10, 1)}, {}, lorasmith.AdapterMismatch, (BIAS, "[10, 1]")),
        ({"use_dora": True}, {BIAS: torch.ones(10)}, {"lora_bias": True}, lorasmith.Unsupported, (BIAS, "DoRA")),
        ({}, {BIAS.replace("_B", "_A"): torch.ones(4)}, {}, lorasmith.Unsupported, ("lora_A.bias",)),
    ],
    ids=["not said", "missing", "too short", "no vector", "beside a magnitude", "on A"],
)
def test_a_bias_that_contradicts_the_adapter_is_refused_by_its_name(
    tmp_path: Path,
    options: dict[str, Any],
    changes: Mapping[str, torch.Tensor | None],
    config: dict[str, Any],
    error: type[Exception],
    words: Sequence[str],
) -> None:
    save(tmp_path, Single(torch.nn.Linear(6, 10)), target_modules=["layer"], **options)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: one for name, one in tensors.items() if one is not None}, file)
    edit_config(tmp_path, **config)
    require_refusal(tmp_path, error, *words)


def test_a_dora_with_biases_is_one_that_peft_does_not_make() -> None:
    with pytest.raises(ValueError, match="lora_bias"):
        adapt(Single(torch.nn.Linear(6, 10)), target_modules=["layer"], use_dora=True, lora_bias=True)


def test_weights_apply_to_biases_too(tmp_path: Path) -> None:
    adapted = save(tmp_path, Single(torch.nn.Conv1d(6, 10, 3)), target_modules=["layer"], lora_bias=True)
    lorasmith.merge(tmp_path / "base.safetensors", (tmp_path / "adapter", -0.5), tmp_path / "out.safetensors")
    base, ours = (load_file(tmp_path / f"{name}.safetensors") for name in ("base", "out"))
    layer = layers_of(adapted)[0]
    right = base["layer.bias"] - 0.5 * layer.scaling["default"] * layer.lora_B["default"].bias.detach()
    assert torch.allclose(ours["layer.bias"], right, rtol=1e-6, atol=1e-7)
    assert raw_bytes(ours["layer.bias"]) != raw_bytes(base["layer.bias"])
