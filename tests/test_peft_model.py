"""PEFT as the oracle for what changes a model as a whole: ties, vocabularies, heads, biases, rows, layers.

PEFT cannot merge most of these, or merges them wrongly, so the oracle is what the adapted model answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from generate import Tensors, raw_bytes, write_json
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from test_peft import FAMILIES, LLAMA_SIZES, Family, edit, load_base, make_case, outputs, tokens

import lorasmith

pytestmark = pytest.mark.filterwarnings("ignore")

ENCODER_DECODER = {
    "vocab_size": 61, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "max_position_embeddings": 40,
}  # fmt: skip
MORE = {
    "t5 without a head": replace(FAMILIES["t5"], model="T5Model"),
    "umt5": replace(FAMILIES["t5"], model="UMT5ForConditionalGeneration", config="UMT5Config"),
    "mt5": replace(FAMILIES["t5"], model="MT5ForConditionalGeneration", config="MT5Config"),
    "longt5": replace(FAMILIES["t5"], model="LongT5ForConditionalGeneration", config="LongT5Config"),
    "roberta": replace(FAMILIES["bert"], model="RobertaForMaskedLM", config="RobertaConfig"),
    "distilbert": Family(
        "DistilBertForMaskedLM", "DistilBertConfig",
        {"vocab_size": 61, "dim": 48, "hidden_dim": 80, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 32},
        ("q_lin",), tokens(),
    ),
    "bart": Family(
        "BartForConditionalGeneration", "BartConfig", ENCODER_DECODER, ("q_proj",),
        tokens(decoder_input_ids=torch.arange(4, 14).view(2, 5)),
    ),
    "bloom": Family(
        "BloomForCausalLM", "BloomConfig", {"vocab_size": 61, "hidden_size": 48, "n_layer": 1, "n_head": 4},
        ("query_key_value",), tokens(),
    ),
    "mamba": Family(
        "MambaForCausalLM", "MambaConfig",
        {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 1, "state_size": 4}, ("in_proj",), tokens(),
    ),
    "qwen3 with pictures": Family(
        "Qwen3VLForConditionalGeneration", "Qwen3VLConfig",
        {
            "tie_word_embeddings": True,
            "text_config": {**LLAMA_SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]}},
            "vision_config": {"depth": 1, "hidden_size": 24, "intermediate_size": 40, "num_heads": 2,
                              "out_hidden_size": 48, "patch_size": 8, "deepstack_visual_indexes": [0]},
        },
        ("q_proj",), tokens(),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _more_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, family in MORE.items():
        monkeypatch.setitem(FAMILIES, name, family)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def reload(merged: Path, model: str | None = None) -> transformers.PreTrainedModel:
    """The merged model as its own config says it is; everything in it must be loaded."""
    found = getattr(transformers, model or config_of(merged)["architectures"][0])
    loaded, info = found.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return loaded.eval()


def require_same(merged: Path, wanted: torch.Tensor, inputs: Tensors, *, unlike: torch.Tensor | None = None) -> None:
    got = outputs(reload(merged), inputs)
    assert got.shape == wanted.shape
    assert (got - wanted).norm() / wanted.norm() < 1e-4
    if unlike is not None:
        assert (unlike - wanted).norm() / wanted.norm() > 1e-2


def draw(model: torch.nn.Module, seed: int = 5) -> None:
    """Give every trainable parameter other values, those that are one keeping to be one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def carry(folder: Path, kind: str, prepare: Callable[[Any], Any] | None = None, **options: Any) -> torch.Tensor:
    """A base and an adapter with drawn parameters in ``folder``; what the adapted model answers."""
    family = FAMILIES[kind]
    model = family.build()
    model.save_pretrained(folder / "base")
    if prepare is not None:
        prepare(model)
    model.name_or_path = str(folder / "base")
    saved = {key: options.pop(key) for key in ("save_embedding_layers",) if key in options}
    adapted = get_peft_model(model, LoraConfig(**{"target_modules": list(family.targets), **options}))
    draw(adapted)
    adapted.save_pretrained(folder / "adapter", **saved)
    return outputs(adapted.eval(), family.inputs())


def tensors_of(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


# --------------------------------------------------------------------------------------------------------- ties


TIED = [
    ("qwen2", "embed_tokens"), ("qwen2", "lm_head"), ("gpt2", "wte"), ("gpt2", "lm_head"), ("gemma", "lm_head"),
    ("bert", "word_embeddings"), ("bert", "decoder"), ("roberta", "word_embeddings"), ("roberta", "decoder"),
    ("distilbert", "vocab_projector"), ("t5", "lm_head"), ("t5", "shared"), ("t5 without a head", "shared"),
    ("mt5", "lm_head"), ("longt5", "lm_head"), ("bart", "lm_head"), ("bart", "embed_tokens"),
    ("whisper", "proj_out"), ("whisper", "embed_tokens"), ("opt", "embed_tokens"), ("bloom", "word_embeddings"),
    ("mamba", "lm_head"), ("qwen3 with pictures", "lm_head"), ("qwen3 with pictures", "embed_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "target"), TIED)
@pytest.mark.parametrize("said", [True, False], ids=["said by the config", "left to the class"])
def test_one_end_of_a_tie_is_changed_as_the_adapted_model_has_it(
    tmp_path: Path, kind: str, target: str, said: bool
) -> None:
    case = make_case(tmp_path, kind, target_modules=[target])
    config = config_of(case.base)
    flag = config.pop("tie_word_embeddings", None)
    default = getattr(transformers, case.family.config)().tie_word_embeddings
    if not said and not default:
        pytest.skip("the class does not tie unless its config says so")
    assert flag in (True, None)
    write_json(case.base / "config.json", {**config, "tie_word_embeddings": True} if said else config)
    wanted = outputs(PeftModel.from_pretrained(load_base(case), case.adapter).eval(), case.family.inputs())
    report = lorasmith.merge(case.base, case.adapter, tmp_path / "out")
    assert report.tensors_added >= 1
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    require_same(tmp_path / "out", wanted, case.family.inputs())


@pytest.mark.parametrize("part", ["the top", "text_config"])
def test_the_flag_is_cleared_wherever_the_config_holds_it(tmp_path: Path, part: str) -> None:
    case = make_case(tmp_path, "qwen3 with pictures", target_modules=["lm_head"])
    config = config_of(case.base)
    config.pop("tie_word_embeddings", None)
    config["text_config"].pop("tie_word_embeddings", None)
    holder = config if part == "the top" else config["text_config"]
    holder["tie_word_embeddings"] = True
    write_json(case.base / "config.json", config)
    wanted = outputs(PeftModel.from_pretrained(load_base(case), case.adapter).eval(), case.family.inputs())
    lorasmith.merge(case.base, case.adapter, tmp_path / "out")
    now = config_of(tmp_path / "out")
    assert now["tie_word_embeddings"] is False
    assert now["text_config"].get("tie_word_embeddings", False) is False
    require_same(tmp_path / "out", wanted, case.family.inputs())


def test_a_tie_that_is_not_touched_stays(tmp_path: Path) -> None:
    case = make_case(tmp_path, "qwen2")
    report = lorasmith.merge(case.base, case.adapter, tmp_path / "out")
    assert report.tensors_added == 0
    assert (tmp_path / "out" / "config.json").read_bytes() == (case.base / "config.json").read_bytes()
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")


def test_a_head_written_for_a_tied_model_stands_in_the_last_shard_and_in_the_index(tmp_path: Path) -> None:
    case = make_case(tmp_path, "qwen2", target_modules=["lm_head", "q_proj"])
    model = load_base(case)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    before = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    wanted = outputs(PeftModel.from_pretrained(model, case.adapter).eval(), case.family.inputs())
    lorasmith.merge(tmp_path / "sharded", case.adapter, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    last = max(before["weight_map"].values())
    assert after["weight_map"] == {**before["weight_map"], "lm_head.weight": last}
    merged = tensors_of(tmp_path / "out")
    assert after["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())
    assert "lm_head.weight" in load_file(tmp_path / "out" / last)
    require_same(tmp_path / "out", wanted, case.family.inputs())


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -0.25)])
def test_adapters_on_both_ends_of_a_tie_are_summed_each_on_its_own(
    tmp_path: Path, weights: tuple[float, float]
) -> None:
    base = make_case(tmp_path / "one", "qwen2", target_modules=["lm_head"])
    other = make_case(tmp_path / "two", "qwen2", target_modules=["embed_tokens", "q_proj"])
    model = PeftModel.from_pretrained(load_base(base), base.adapter, adapter_name="one")
    model.load_adapter(other.adapter, adapter_name="two")
    for module in model.modules():
        for name, weight in zip(("one", "two"), weights, strict=True):
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] *= weight
    model.base_model.set_adapter(["one", "two"])
    wanted = outputs(model.eval(), base.family.inputs())
    pairs = [(base.adapter, weights[0]), (other.adapter, weights[1])]
    lorasmith.merge(base.base, pairs, tmp_path / "out")
    require_same(tmp_path / "out", wanted, base.family.inputs())


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_model_trained_with_its_tie_kept_keeps_it(tmp_path: Path, target: str) -> None:
    wanted = carry(tmp_path, "qwen2", target_modules=["q_proj"], modules_to_save=[target], ensure_weight_tying=True)
    report = lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.tensors_added == 0
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    require_same(tmp_path / "out", wanted, FAMILIES["qwen2"].inputs())


def test_a_lora_trained_on_both_ends_of_a_tie_at_once_keeps_it(tmp_path: Path) -> None:
    wanted = carry(tmp_path, "qwen2", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    assert any("lm_head.lora_A" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    report = lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.tensors_added == 0
    assert config_of(tmp_path / "out") == config_of(tmp_path / "base")
    require_same(tmp_path / "out", wanted, FAMILIES["qwen2"].inputs())


@pytest.mark.parametrize(("kind", "target"), [("t5", "lm_head"), ("qwen2", "embed_tokens"), ("bart", "lm_head")])
def test_a_base_that_stores_both_ends_of_a_tie_is_untied_like_one_that_stores_one(
    tmp_path: Path, kind: str, target: str
) -> None:
    """As pickled checkpoints do."""
    case = make_case(tmp_path, kind, target_modules=[target])
    model = load_base(case)
    torch.save(model.state_dict(), case.base / "pytorch_model.bin")
    (case.base / "model.safetensors").unlink()
    wanted = outputs(PeftModel.from_pretrained(model, case.adapter).eval(), case.family.inputs())
    report = lorasmith.merge(case.base, case.adapter, tmp_path / "out")
    assert report.tensors_added == 0
    require_same(tmp_path / "out", wanted, case.family.inputs())


def test_a_bare_file_whose_tie_could_not_be_told_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path, "qwen2", target_modules=["embed_tokens"])
    (tmp_path / "alone").mkdir()
    base = tmp_path / "alone" / "base.safetensors"
    base.write_bytes((case.base / "model.safetensors").read_bytes())
    with pytest.raises(lorasmith.Unsupported, match=r"config\.json"):
        lorasmith.merge(base, case.adapter, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


STRIPPED = [
    ("gpt2", "wte", "transformer."), ("gpt2", "lm_head", "transformer."), ("bloom", "word_embeddings", "transformer."),
    ("opt", "embed_tokens", "model."), ("bart", "lm_head", "model."), ("bert", "word_embeddings", "bert."),
    ("qwen2", "lm_head", "model."),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "target", "stem"), STRIPPED)
def test_a_base_saved_without_its_head_is_tied_like_one_saved_with_it(
    tmp_path: Path, kind: str, target: str, stem: str
) -> None:
    """As the first models of the Hub are stored: wte.weight, not transformer.wte.weight."""
    case = make_case(tmp_path, kind, target_modules=[target])
    wanted = outputs(PeftModel.from_pretrained(load_base(case), case.adapter).eval(), case.family.inputs())
    file = case.base / "model.safetensors"
    save_file({name.removeprefix(stem): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    lorasmith.merge(case.base, case.adapter, tmp_path / "out")
    require_same(tmp_path / "out", wanted, case.family.inputs())


@pytest.mark.parametrize("change", ["rows", "grown", "kept tied", "lora kept tied"])
@pytest.mark.parametrize("stored", ["pickle", "safetensors"])
def test_both_stored_ends_of_a_tie_follow_what_changes_both(tmp_path: Path, change: str, stored: str) -> None:
    options = {
        "rows": {"trainable_token_indices": [1, 5]},
        "grown": {"save_embedding_layers": True},
        "kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "lora kept tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    }[change]
    wanted = carry(tmp_path, "qwen2", resized(64) if change == "grown" else None, **options)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if stored == "pickle":
        file.unlink()
        torch.save(tensors, tmp_path / "base" / "pytorch_model.bin")
    else:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt"})
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    require_same(tmp_path / "out", wanted, FAMILIES["qwen2"].inputs())


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5", "longt5"])
@pytest.mark.parametrize("change", ["lm_head", "shared", "rows", "head saved"])
@pytest.mark.parametrize("head", ["stored", "tied"])
def test_a_t5_that_does_not_rescale_is_changed_as_the_adapted_model_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, change: str, head: str
) -> None:
    """Version 1.1 and flan: the config says untied, which means not rescaled, and transformers ties all the same."""
    sizes = {**FAMILIES["t5"].sizes, "tie_word_embeddings": False}
    monkeypatch.setitem(FAMILIES, "one", replace(FAMILIES[kind], sizes=sizes))
    options = {
        "rows": {"trainable_token_indices": [1, 5], "target_modules": ["q"]},
        "head saved": {"modules_to_save": ["lm_head"], "target_modules": ["q"]},
    }.get(change, {"target_modules": [change, "q"]})
    wanted = carry(tmp_path, "one", own_head if head == "stored" else None, **options)
    if head == "stored":
        model = FAMILIES["one"].build()
        own_head(model)
        model.save_pretrained(tmp_path / "base")
    config = config_of(tmp_path / "base")
    write_json(tmp_path / "base" / "config.json", {**config, "tie_word_embeddings": False})
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    require_same(tmp_path / "out", wanted, FAMILIES["one"].inputs())


def own_head(model: Any) -> None:
    """Give a tied model a head of its own."""
    generator = torch.Generator().manual_seed(9)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape, generator=generator) * 0.1)


def test_which_layers_a_composite_model_ties_is_not_guessed(tmp_path: Path) -> None:
    encoder, decoder = (transformers.BertConfig(**FAMILIES["bert"].sizes) for _ in range(2))
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = transformers.EncoderDecoderModel(config)
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules=["word_embeddings"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(lorasmith.Unsupported, match=r"word_embeddings.*ties"):
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_norms_stored_under_their_old_names_are_replaced_where_they_are(tmp_path: Path) -> None:
    wanted = carry(tmp_path, "bert", modules_to_save=["LayerNorm"], target_modules=["query"], task_type="TOKEN_CLS")
    file = tmp_path / "base" / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in load_file(file).items():
        tail = ".".join(name.split(".")[-2:])
        renamed[name.removesuffix(tail) + old.get(tail, tail)] = tensor
    save_file(renamed, file, {"format": "pt"})
    report = lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.tensors_added == 0
    require_same(tmp_path / "out", wanted, FAMILIES["bert"].inputs())


# ------------------------------------------------------------------------------------------- trained whole


WHOLE = {
    "an untied head": ("llama", {"modules_to_save": ["lm_head"]}),
    "a tied head": ("qwen2", {"modules_to_save": ["lm_head"]}),
    "tied embeddings": ("qwen2", {"modules_to_save": ["embed_tokens"]}),
    "both ends of a tie": ("qwen2", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "a tied head that rescales": ("t5", {"modules_to_save": ["lm_head"]}),
    "norms": ("llama", {"modules_to_save": ["norm", "input_layernorm"]}),
    "a layer": ("llama", {"modules_to_save": ["mlp"]}),
    "a classifier": ("vit", {"modules_to_save": ["classifier"], "target_modules": ["q_proj"]}),
    "all biases": ("opt", {"bias": "all"}),
    "all biases of a tied head": ("bert", {"bias": "all", "target_modules": ["query"]}),
    "all biases, and one end of a tie": ("bert", {"bias": "all", "target_modules": ["query", "word_embeddings"]}),
    "biases of adapted layers": ("opt", {"bias": "lora_only"}),
    "biases of some layers": ("qwen2", {"bias": "lora_only"}),
    "rows of tied embeddings": ("qwen2", {"trainable_token_indices": [1, 5, 60]}),
    "rows of untied embeddings": ("llama", {"trainable_token_indices": [7, 0], "target_modules": ["q_proj"]}),
    "rows of both ends": (
        "llama", {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}, "target_modules": ["q_proj"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WHOLE)
def test_what_was_trained_whole_takes_the_place_of_what_was_there(tmp_path: Path, what: str) -> None:
    kind, options = WHOLE[what]
    wanted = carry(tmp_path, kind, **options)
    base = outputs(FAMILIES[kind].build(), FAMILIES[kind].inputs())
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    require_same(tmp_path / "out", wanted, FAMILIES[kind].inputs(), unlike=base)


def test_a_replacement_alone_is_copied_bit_for_bit_and_cast_to_the_dtype_of_what_it_replaces(tmp_path: Path) -> None:
    carry(tmp_path, "llama", modules_to_save=["lm_head"], target_modules=["q_proj"])
    new = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    report = lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.tensors_replaced == 1
    assert raw_bytes(tensors_of(tmp_path / "out")["lm_head.weight"]) == raw_bytes(new)
    FAMILIES["llama"].build().bfloat16().save_pretrained(tmp_path / "base16")
    lorasmith.merge(tmp_path / "base16", tmp_path / "adapter", tmp_path / "out16")
    assert raw_bytes(tensors_of(tmp_path / "out16")["lm_head.weight"]) == raw_bytes(new.bfloat16())


def test_rows_trained_whole_are_the_trained_ones_bit_for_bit_and_the_others_the_base_s(tmp_path: Path) -> None:
    carry(tmp_path, "llama", trainable_token_indices=[7, 3], target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    new = load_file(file)["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    before, after = (tensors_of(tmp_path / name)["model.embed_tokens.weight"] for name in ("base", "out"))
    before[[7, 3]] = new
    assert raw_bytes(after) == raw_bytes(before)


def test_other_tokens_for_the_same_rows_are_another_plan(tmp_path: Path) -> None:
    carry(tmp_path, "llama", trainable_token_indices=[7, 3], target_modules=["q_proj"])
    plans = [lorasmith.plan(tmp_path / "base", tmp_path / "adapter")]
    edit(tmp_path / "adapter", trainable_token_indices=[3, 7])
    plans.append(lorasmith.plan(tmp_path / "base", tmp_path / "adapter"))
    assert plans[0].hash != plans[1].hash


@pytest.mark.parametrize("weight", [0.25, -1.5])
def test_a_weighted_replacement_goes_part_of_the_way(tmp_path: Path, weight: float) -> None:
    carry(tmp_path, "llama", modules_to_save=["lm_head"], trainable_token_indices=[1, 5], target_modules=["q_proj"])
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    lorasmith.merge(tmp_path / "base", (tmp_path / "adapter", weight), tmp_path / "out")
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    head, rows = before["lm_head.weight"].double(), before["model.embed_tokens.weight"].double()
    head += weight * (trained["base_model.model.lm_head.weight"].double() - head)
    new = trained["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"].double()
    rows[[1, 5]] += weight * (new - rows[[1, 5]])
    assert torch.allclose(after["lm_head.weight"].double(), head, rtol=1e-6, atol=1e-7)
    assert torch.allclose(after["model.embed_tokens.weight"].double(), rows, rtol=1e-6, atol=1e-7)


def test_a_replacement_and_another_adapter_s_delta_meet_on_one_weight(tmp_path: Path) -> None:
    carry(tmp_path, "llama", modules_to_save=["lm_head"], target_modules=["q_proj"])
    other = make_case(tmp_path / "other", "llama", target_modules=["lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    new = load_file(file)["base_model.model.lm_head.weight"].double()
    tensors = load_file(other.adapter / "adapter_model.safetensors")
    name = "base_model.model.lm_head.lora_{}.weight"
    delta = 2 * tensors[name.format("B")].double() @ tensors[name.format("A")].double()
    lorasmith.merge(tmp_path / "base", [tmp_path / "adapter", (other.adapter, 0.5)], tmp_path / "out")
    wanted = new + 0.5 * delta
    got = tensors_of(tmp_path / "out")["lm_head.weight"].double()
    assert (got - wanted).norm() / wanted.norm() < 1e-6


def test_names_as_state_dicts_have_them_mean_the_same(tmp_path: Path) -> None:
    carry(tmp_path, "llama", modules_to_save=["lm_head"], target_modules=["q_proj"])
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "plain")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    plain = load_file(file)
    for mark in (".modules_to_save.", ".modules_to_save.default."):
        tensors = {name.replace("lm_head.", "lm_head" + mark): tensor for name, tensor in plain.items()}
        tensors["base_model.model.lm_head.original_module.weight"] = torch.zeros(61, 48)
        save_file(tensors, file, {"format": "pt"})
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / mark)
        assert raw_bytes(tensors_of(tmp_path / mark)["lm_head.weight"]) == raw_bytes(
            plain["base_model.model.lm_head.weight"]
        )


TOKENS = {
    "no indices": ({"trainable_token_indices": ...}, lorasmith.BadFile, "trainable_token_indices"),
    "too few indices": ({"trainable_token_indices": [1]}, lorasmith.AdapterMismatch, "2 rows"),
    "a token twice": ({"trainable_token_indices": [5, 5]}, lorasmith.AdapterMismatch, "twice"),
    "a token beyond the vocabulary": ({"trainable_token_indices": [1, 61]}, lorasmith.AdapterMismatch, "token 61"),
    "another module's": ({"trainable_token_indices": {"lm_head": [1, 5]}}, lorasmith.BadFile, "embed_tokens"),
}


@pytest.mark.parametrize("what", TOKENS)
def test_rows_of_tokens_that_cannot_be_known_are_refused(tmp_path: Path, what: str) -> None:
    carry(tmp_path, "llama", trainable_token_indices=[1, 5], target_modules=["q_proj"])
    changes, error, words = TOKENS[what]
    edit(tmp_path / "adapter", **changes)
    with pytest.raises(error, match=words):
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- vocabulary


def resized(rows: int) -> Callable[[Any], Any]:
    return lambda model: model.resize_token_embeddings(rows)


GROWN = {
    "tied, saved with its embeddings": ("qwen2", {"save_embedding_layers": True}),
    "untied, saved with its embeddings": (
        "llama", {"save_embedding_layers": True, "target_modules": ["q_proj"]},
    ),
    "untied, both ends adapted": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied, the head adapted": ("qwen2", {"target_modules": ["q_proj", "lm_head"], "save_embedding_layers": True}),
    "tied, both ends trained whole": ("qwen2", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "a head with a bias": ("bert", {"target_modules": ["query"], "save_embedding_layers": True, "bias": "all"}),
}  # fmt: skip


@pytest.mark.parametrize("rows", [64, 57])
@pytest.mark.parametrize("what", GROWN)
def test_a_grown_or_shrunk_vocabulary_is_the_adapted_model_s(tmp_path: Path, what: str, rows: int) -> None:
    kind, options = GROWN[what]
    wanted = carry(tmp_path, kind, resized(rows), **options)
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert config_of(tmp_path / "out")["vocab_size"] == rows
    require_same(tmp_path / "out", wanted, FAMILIES[kind].inputs())


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_tokens_that_were_added_and_trained_by_rows_are_those_of_the_adapted_model(tmp_path: Path, kind: str) -> None:
    options = {"trainable_token_indices": [61, 62, 63], "target_modules": ["q_proj"], "save_embedding_layers": True}
    wanted = carry(tmp_path, kind, resized(64), **options)
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert config_of(tmp_path / "out")["vocab_size"] == 64
    require_same(tmp_path / "out", wanted, FAMILIES[kind].inputs())


@pytest.mark.parametrize("kind", ["t5", "mt5", "bert", "roberta"])
def test_what_repeats_a_grown_embedding_grows_with_it(tmp_path: Path, kind: str) -> None:
    wanted = carry(tmp_path, kind, resized(64), save_embedding_layers=True, target_modules=["q", "query"])
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    require_same(tmp_path / "out", wanted, FAMILIES[kind].inputs())


def test_a_vocabulary_grown_at_one_end_only_is_refused(tmp_path: Path) -> None:
    carry(tmp_path, "llama", resized(64), modules_to_save=["embed_tokens"], target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop("base_model.model.lm_head.weight", None)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(lorasmith.AdapterMismatch, match=r"lm_head.*61"):
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_grown_by_half_or_by_two_adapters_is_refused(tmp_path: Path) -> None:
    carry(tmp_path, "llama", resized(64), save_embedding_layers=True, target_modules=["q_proj"])
    with pytest.raises(lorasmith.AdapterMismatch, match="weight 1"):
        lorasmith.merge(tmp_path / "base", (tmp_path / "adapter", 0.5), tmp_path / "out")
    with pytest.raises(lorasmith.AdapterMismatch, match="one by one"):
        lorasmith.merge(tmp_path / "base", [tmp_path / "adapter", tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- heads


NEW_HEADS = {
    "Llama, sequences": ("llama", "LlamaForSequenceClassification", "SEQ_CLS", 3),
    "tied Qwen2, tokens": ("qwen2", "Qwen2ForTokenClassification", "TOKEN_CLS", 5),
    "Llama, two labels": ("llama", "LlamaForSequenceClassification", "SEQ_CLS", 2),
    "GPT-2, sequences": ("gpt2", "GPT2ForSequenceClassification", "SEQ_CLS", 4),
    "BERT without a head, questions": ("bert body", "BertForQuestionAnswering", "QUESTION_ANS", 2),
    "DistilBERT, with a layer before its last": ("distilbert", "DistilBertForSequenceClassification", "SEQ_CLS", 3),
    "BERT without a head": ("bert body", "BertForSequenceClassification", "SEQ_CLS", 3),
    "BERT without a head, tokens": ("bert body", "BertForTokenClassification", "TOKEN_CLS", 7),
}


@pytest.mark.parametrize("what", NEW_HEADS)
def test_a_head_that_the_base_lacks_is_added_and_the_config_names_the_class_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    kind, model, task, labels = NEW_HEADS[what]
    monkeypatch.setitem(FAMILIES, "bert body", replace(FAMILIES["bert"], model="BertModel"))
    family = FAMILIES[kind]
    family.build().save_pretrained(tmp_path / "base")
    found = getattr(transformers, model).from_pretrained(tmp_path / "base", num_labels=labels, pad_token_id=0)
    targets = [one for one in family.targets if one not in ("embed_tokens", "lm_head", "dense")]
    adapted = get_peft_model(found, LoraConfig(task_type=task, target_modules=targets))
    draw(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = {"input_ids": family.inputs()["input_ids"][:1]}
    wanted = outputs(adapted.eval(), inputs)
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert config_of(tmp_path / "out")["architectures"] == [model]
    require_same(tmp_path / "out", wanted, inputs)


def test_a_classifier_retrained_for_other_labels_takes_the_place_of_the_old(tmp_path: Path) -> None:
    family = FAMILIES["vit"]
    family.build().save_pretrained(tmp_path / "base")
    found = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "base", num_labels=7, ignore_mismatched_sizes=True
    )
    adapted = get_peft_model(found, LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"]))
    draw(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = outputs(adapted.eval(), family.inputs())
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert len(config_of(tmp_path / "out")["id2label"]) == 7
    require_same(tmp_path / "out", wanted, family.inputs())


def test_a_new_layer_of_no_known_task_needs_the_name_of_its_class(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    family.build().save_pretrained(tmp_path / "base")
    found = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, pad_token_id=0)
    adapted = get_peft_model(found, LoraConfig(target_modules=["q_proj"], modules_to_save=["score"]))
    draw(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = outputs(adapted.eval(), {"input_ids": family.inputs()["input_ids"][:1]})
    with pytest.raises(lorasmith.AdapterMismatch, match=r"score\.weight.*--architecture"):
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    name = "LlamaForSequenceClassification"
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", architecture=name)
    assert config_of(tmp_path / "out")["architectures"] == [name]
    require_same(tmp_path / "out", wanted, {"input_ids": family.inputs()["input_ids"][:1]})


def test_a_head_must_have_the_weight_one_and_one_owner(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    family.build().save_pretrained(tmp_path / "base")
    found = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, pad_token_id=0)
    adapted = get_peft_model(found, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    draw(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        next(one for name, one in adapted.named_parameters() if "score" in name and one.requires_grad).add_(1)
    adapted.save_pretrained(tmp_path / "other")
    both = [tmp_path / "adapter", tmp_path / "other"]
    for adapters, words in (([(tmp_path / "adapter", 0.5)], "weight"), (both, "another adapter")):
        with pytest.raises(lorasmith.AdapterMismatch, match=words):
            lorasmith.merge(tmp_path / "base", adapters, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lorasmith.merge(tmp_path / "base", [tmp_path / "adapter"] * 2, tmp_path / "out")  # the same head is no other one
    head = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["score.weight"], head)


# -------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("ranges", [[(0, 2), (1, 2)], [(0, 2), (0, 2)], [(1, 2), (0, 1), (0, 2)], [(0, 1)]])
def test_replicated_layers_have_each_its_own_weights(tmp_path: Path, ranges: list[tuple[int, int]]) -> None:
    wanted = carry(tmp_path, "llama", layer_replication=ranges, target_modules=["q_proj", "down_proj"])
    report = lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    count = sum(stop - start for start, stop in ranges)
    assert config_of(tmp_path / "out")["num_hidden_layers"] == count
    assert report.tensors_added == 9 * max(0, count - 2)
    require_same(tmp_path / "out", wanted, FAMILIES["llama"].inputs())
    merged = tensors_of(tmp_path / "out")
    assert {name.split(".")[2] for name in merged if ".layers." in name} == {str(number) for number in range(count)}


def test_layers_replicated_otherwise_or_not_there_are_refused(tmp_path: Path) -> None:
    carry(tmp_path, "llama", layer_replication=[(0, 2), (1, 2)], target_modules=["q_proj"])
    other = make_case(tmp_path / "other", "llama", target_modules=["q_proj"])
    with pytest.raises(lorasmith.AdapterMismatch, match="layer_replication"):
        lorasmith.merge(tmp_path / "base", [tmp_path / "adapter", other.adapter], tmp_path / "out")
    edit(tmp_path / "adapter", layer_replication=[[0, 3], [1, 2]])
    with pytest.raises(lorasmith.AdapterMismatch, match="no layer 2"):
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- relative to another base


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_delta_against_a_changed_base_is_merged_into_that_base_only(tmp_path: Path, init: str) -> None:
    family = FAMILIES["llama"]
    family.build().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(family.build(), LoraConfig(target_modules=["q_proj"], init_lora_weights=init))
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.unload().save_pretrained(tmp_path / "residual")
    with pytest.raises(lorasmith.Unsupported, match="--base-is-residual"):
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    lorasmith.merge(tmp_path / "residual", tmp_path / "adapter", tmp_path / "out", base_is_residual=True)
    plain = outputs(family.build(), family.inputs())
    require_same(tmp_path / "out", plain, family.inputs())


def _has_defaults(name: str) -> bool:
    try:
        getattr(transformers, name).config_class()
    except Exception:
        return False
    return True


def test_the_table_of_ties_knows_every_class_of_the_installed_transformers() -> None:
    """``python tests/make_ties.py`` writes it anew."""
    facts = json.loads((Path(lorasmith.__file__).parent / "naming" / "ties.json").read_text())
    known = {name for group in facts["tied"] for name in group["classes"]} | set(facts["untied"])
    auto = transformers.models.auto.modeling_auto
    named = {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()}
    missing = {name for name in named if isinstance(name, str) and hasattr(transformers, name)} - known
    assert not {name for name in missing if _has_defaults(name)}
    assert {"LlamaForCausalLM", "T5ForConditionalGeneration", "BertForMaskedLM", "BertModel"} <= known
    assert {"BertGenerationEncoder", "CLIPTextModelWithProjection", "NemotronH_Omni_Reasoning_V3"} <= known


def test_ties_are_those_that_transformers_has() -> None:
    facts = json.loads((Path(lorasmith.__file__).parent / "naming" / "ties.json").read_text())
    by_class = {name: group["ties"] for group in facts["tied"] for name in group["classes"]}
    for family in [*FAMILIES.values(), *MORE.values()]:
        config = getattr(transformers, family.config)(**{**family.sizes, "tie_word_embeddings": True})
        with torch.device("meta"):
            model = getattr(transformers, family.model)(config)
        assert by_class.get(family.model, {}) == model.get_expanded_tied_weights_keys(all_submodels=True), family.model
