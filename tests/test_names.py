"""What an adapter may call the layers of a base, and what a base may be called: every generation of every name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import KINDS, SEEING, TEXT, Kind
from generate import Tensors, write_json
from safetensors.torch import load_file, save_file
from test_fused import close, delta, factors, write_adapter
from test_models import adapted, require_answers, tensors_of

import lorasmith
from lorasmith.naming import conversions

pytestmark = pytest.mark.filterwarnings("ignore")

Rules = tuple[tuple[str, str], ...]

LANGUAGE: Rules = ((r"^model\.language_model\.", "language_model.model."), (r"^lm_head\.", "language_model.lm_head."))
UP: Rules = ((r"^model\.(?=vision|multi_modal)", ""),)
INSIDE: Rules = ((r"^model\.vision_tower\.", "model.vision_tower.vision_model."),)
QWEN: Rules = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))

FORMS: dict[str, dict[str, Rules]] = {
    "llava": {"run": (), "stored": (*LANGUAGE, *UP), "stored before 5": (*INSIDE, *LANGUAGE, *UP), "4.52": INSIDE},
    "paligemma": {"run": (), "stored": (*LANGUAGE, *UP), "stored before 5": (*INSIDE, *LANGUAGE, *UP), "4.52": INSIDE},
    "gemma3": {"run": (), "stored": (*LANGUAGE, *UP), "stored before 5": (*INSIDE, *LANGUAGE, *UP), "4.52": INSIDE},
    "mistral3": {"run": (), "stored": (*LANGUAGE, *UP)},
    "internvl": {"run": (), "stored": (*LANGUAGE, *UP)},
    "mllama": {"run": (), "stored": (*LANGUAGE, *UP)},
    "qwen2_vl": {"run": (), "stored": QWEN},
    "qwen2_5_vl": {"run": (), "stored": QWEN},
}
"""What the running model's names are elsewhere: on disk, and in the models of older releases."""

PAIRS = [(kind, base, names) for kind, forms in FORMS.items() for base in forms for names in forms]


def renamed(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def rewrite(file: Path, rules: Rules, prefix: str = "") -> None:
    """Rename a file's tensors."""
    tensors = load_file(file)
    now = {prefix + renamed(name.removeprefix(prefix), rules): tensor for name, tensor in tensors.items()}
    assert len(now) == len(tensors)
    save_file(now, file, {"format": "pt"})


def run_names(kind: Kind, base: Path) -> None:
    """Store a base under the names of the running model."""
    model = kind.build()
    tied = {name for name in model.state_dict() if name not in {key for key, _ in model.named_parameters()}}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(state, base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("name", "base", "names"), PAIRS)
def test_an_adapter_of_any_release_fits_a_base_of_any_release(tmp_path: Path, name: str, base: str, names: str) -> None:
    kind = SEEING[name]
    before, wanted = adapted(kind, tmp_path)
    run_names(kind, tmp_path / "base")
    rewrite(tmp_path / "base" / "model.safetensors", FORMS[name][base])
    if FORMS[name][names]:
        rewrite(tmp_path / "adapter" / "adapter_model.safetensors", FORMS[name][names], "base_model.model.")
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    require_answers(tmp_path, kind, wanted, before)


ALONE: dict[str, tuple[str, str]] = {
    "llava": ("LlamaForCausalLM", "LlamaConfig"),
    "qwen2_vl": ("Qwen2VLTextModel", "Qwen2VLTextConfig"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig"),
    "mistral3": ("MistralForCausalLM", "MistralConfig"),
}


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("stem", ["model.", ""], ids=["with its head", "headless"])
def test_an_adapter_of_the_language_model_alone_fits_the_whole(tmp_path: Path, name: str, stem: str) -> None:
    kind = SEEING[name]
    kind.build().save_pretrained(tmp_path / "base")
    base = tensors_of(tmp_path / "base")
    module = f"{stem}layers.1.self_attn.q_proj"
    places = [one for one in base if one.endswith("layers.1.self_attn.q_proj.weight") and "vision" not in one]
    (place,) = places
    tensors = factors(module, *base[place].shape)
    write_adapter(tmp_path / "adapter", tensors)
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    assert [one for one in base if not torch.equal(base[one], merged[one])] == [place]
    assert close(merged[place].double(), base[place].double() + delta(tensors, module))


def test_an_adapter_of_the_language_model_alone_need_not_change_a_tower(tmp_path: Path) -> None:
    SEEING["llava"].build().save_pretrained(tmp_path / "base")
    shape = next(one.shape for name, one in tensors_of(tmp_path / "base").items() if name.endswith("q_proj.weight"))
    write_adapter(tmp_path / "adapter", factors("model.layers.1.self_attn.q_proj", *shape))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for targets, warnings in ((["q_proj", "out_proj", "fc1"], 0), (["q_proj", "out_proj", "up_proj"], 1)):
        write_json(tmp_path / "adapter" / "adapter_config.json", {**config, "target_modules": targets})
        found = lorasmith.plan(tmp_path / "base", tmp_path / "adapter").warnings
        assert [" names up_proj (target_modules)" in text for text in found] == [True] * warnings


@pytest.mark.parametrize("module", ["layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"])
def test_a_language_model_taken_out_takes_an_adapter_of_the_whole(tmp_path: Path, module: str) -> None:
    """As an adapter of Qwen2-VL or LLaVA on the language model that it was built around."""
    Kind("LlamaForCausalLM", "LlamaConfig", TEXT).build().save_pretrained(tmp_path / "base")
    base = tensors_of(tmp_path / "base")
    place = f"model.{module.removeprefix('model.')}.weight"
    own = f"model.language_model.{module.removeprefix('model.')}"
    tensors = factors(own, *base[place].shape)
    write_adapter(tmp_path / "adapter", tensors)
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert close(tensors_of(tmp_path / "out")[place].double(), base[place].double() + delta(tensors, own))


TOWERS = {
    "clip, text": ("clip", "CLIPTextModel", "text_model.", "text_config"),
    "clip, pictures": ("clip", "CLIPVisionModel", "vision_model.", "vision_config"),
    "siglip, pictures": ("siglip", "SiglipVisionModel", "vision_model.", "vision_config"),
}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("whose", ["the whole", "the tower alone, old", "the tower alone"])
def test_a_tower_takes_adapters_of_either(tmp_path: Path, tower: str, whose: str) -> None:
    """A tower saved by itself has its prefix in older releases, and none since."""
    name, model, prefix, key = TOWERS[tower]
    config = getattr(KINDS[name].build().config, key)
    torch.manual_seed(0)
    getattr(transformers, model)(config).save_pretrained(tmp_path / "base")
    base = tensors_of(tmp_path / "base")
    for stored in (prefix, ""):
        folder = tmp_path / f"base{bool(stored)}"
        folder.mkdir()
        named = {stored + one.removeprefix(prefix): tensor for one, tensor in base.items()}
        save_file(named, folder / "model.safetensors")
        (folder / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
        module = ("" if whose == "the tower alone" else prefix) + "encoder.layers.1.self_attn.q_proj"
        place = f"{stored}encoder.layers.1.self_attn.q_proj.weight"
        tensors = factors(module, *named[place].shape)
        write_adapter(tmp_path / f"adapter{bool(stored)}", tensors)
        lorasmith.merge(folder, tmp_path / f"adapter{bool(stored)}", tmp_path / f"out{bool(stored)}")
        before, after = tensors_of(folder)[place].double(), tensors_of(tmp_path / f"out{bool(stored)}")[place].double()
        assert close(after, before + delta(tensors, module))


def test_a_tower_s_adapter_on_a_model_with_two_of_its_shape_is_refused(tmp_path: Path) -> None:
    KINDS["siglip"].build().save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", factors("encoder.layers.1.self_attn.q_proj", 24, 24))
    with pytest.raises(lorasmith.AdapterMismatch, match=r"2 ways.*--rename '\^"):
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    lorasmith.merge(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rename=[r"^encoder\.=text_model.encoder."]
    )
    base, merged = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    assert [one for one in base if not torch.equal(base[one], merged[one])] == [
        "text_model.encoder.layers.1.self_attn.q_proj.weight"
    ]


def test_towers_of_different_shape_are_told_apart_by_it(tmp_path: Path) -> None:
    KINDS["clip"].build().save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", factors("encoder.layers.1.self_attn.q_proj", 24, 24))
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    base, merged = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    assert [one for one in base if not torch.equal(base[one], merged[one])] == [
        "vision_model.encoder.layers.1.self_attn.q_proj.weight"
    ]


STEMS = [
    ("gpt_neox", "embed_out.weight", "embed_out"), ("gpt_neox", "embed_out.weight", "lm_head"),
    ("phi3", "lm_head.weight", "embed_out"), ("phi3", "lm_head.weight", "language_model.lm_head"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "place", "module"), STEMS)
def test_an_output_head_is_found_by_either_name(tmp_path: Path, name: str, place: str, module: str) -> None:
    KINDS[name].build().save_pretrained(tmp_path / "base")
    base = tensors_of(tmp_path / "base")
    tensors = factors(module, *base[place].shape)
    write_adapter(tmp_path / "adapter", tensors)
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert close(tensors_of(tmp_path / "out")[place].double(), base[place].double() + delta(tensors, module))


def test_a_body_that_was_called_backbone_takes_either_name(tmp_path: Path) -> None:
    base = {f"backbone.layers.{layer}.mixer.in_proj.weight": torch.randn(8, 6) for layer in range(2)}
    base["backbone.embeddings.weight"] = torch.randn(9, 6)
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    write_json(tmp_path / "base" / "config.json", {"model_type": "nemotron_h", "tie_word_embeddings": False})
    for stem in ("model.", "backbone."):
        tensors = factors(f"{stem}layers.1.mixer.in_proj", 8, 6)
        write_adapter(tmp_path / stem, tensors)
        lorasmith.merge(tmp_path / "base", tmp_path / stem, tmp_path / f"{stem}out")
        place = "backbone.layers.1.mixer.in_proj.weight"
        wanted = base[place].double() + delta(tensors, f"{stem}layers.1.mixer.in_proj")
        assert close(tensors_of(tmp_path / f"{stem}out")[place].double(), wanted)


# --------------------------------------------------------------------------------------------- said, or refused


def plain_base(folder: Path, names: dict[str, tuple[int, ...]], **config: Any) -> Tensors:
    folder.mkdir()
    tensors = {name: torch.randn(shape) for name, shape in names.items()}
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", {"tie_word_embeddings": False, **config})
    return tensors


def test_a_name_with_two_meanings_is_refused_until_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On disk norm0 and norm1 are what runs as norm1 and norm2, and an adapter has norm1 only."""
    steps = [{"from": ["norm0", "norm1"], "to": ["norm1", "norm2"], "guarded": True}]
    monkeypatch.setattr(conversions, "_entries", lambda: {"moved": steps, "legacy": []})
    base = plain_base(tmp_path / "base", {f"blocks.0.norm{one}.weight": (4, 6) for one in (0, 1)}, model_type="moved")
    tensors = factors("blocks.0.norm1", 4, 6)
    write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(lorasmith.AdapterMismatch, match=r"norm1.*norm0.*--rename"):
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rename=r"\.norm1\.=.norm2.")
    wanted = base["blocks.0.norm1.weight"].double() + delta(tensors, "blocks.0.norm1")
    assert close(tensors_of(tmp_path / "out")["blocks.0.norm1.weight"].double(), wanted)


def test_a_module_of_no_name_that_is_known_is_refused_with_the_nearest_and_found_once_renamed(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", {"model.layers.0.attn.query.weight": (8, 6)}, model_type="own")
    tensors = factors("model.layers.0.attention.q", 8, 6)
    write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(lorasmith.AdapterMismatch, match=r"Nearest.*attn\.query\.weight.*--rename"):
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    rename = [r"attention\.=attn.", r"\.q\b=.query"]
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rename=rename)
    place = "model.layers.0.attn.query.weight"
    wanted = base[place].double() + delta(tensors, "model.layers.0.attention.q")
    assert close(tensors_of(tmp_path / "out")[place].double(), wanted)


RENAMES = {
    "broken": ("(=x", r"unterminated|missing"),
    "without a sign": ("attention", r"not REGEX=REPLACEMENT"),
    "for nothing": ("mlp=ffn", r"changes none.*attention\.q\.weight"),
    "to a group that is not there": (r"attention=\9", r"invalid group"),
    "of nothing": ("=x", r"not REGEX=REPLACEMENT"),
}


@pytest.mark.parametrize("rename", RENAMES)
def test_a_rename_that_makes_no_sense_is_a_wrong_option(tmp_path: Path, rename: str) -> None:
    text, says = RENAMES[rename]
    plain_base(tmp_path / "base", {"model.layers.0.attn.query.weight": (8, 6)}, model_type="own")
    write_adapter(tmp_path / "adapter", factors("model.layers.0.attention.q", 8, 6))
    with pytest.raises(lorasmith.BadOption, match=says):
        lorasmith.plan(tmp_path / "base", tmp_path / "adapter", rename=[text])


def test_an_adapter_that_fits_by_half_is_refused_whole(tmp_path: Path) -> None:
    kind = SEEING["llava"]
    adapted(kind, tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    more = {f"base_model.model.model.audio_tower.layers.0.fc1.lora_{one}.weight": torch.ones(3, 3) for one in "AB"}
    save_file({**tensors, **more}, file)
    with pytest.raises(lorasmith.AdapterMismatch, match=r"2 of \d+ tensors have no weight.*audio_tower"):
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    report = lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_unmatched=True)
    assert report.adapters[0].tensors_used == len(tensors)


ODD_CONFIGS: list[dict[str, Any]] = [
    {"num_attention_heads": "four"}, {"num_attention_heads": 0}, {"num_attention_heads": -3}, {"head_dim": 10**9},
    {"num_key_value_heads": 7}, {"text_config": [1, 2]}, {"text_config": {"text_config": {"model_type": 3}}},
    {"architectures": {"LlamaModel": 1}}, {"architectures": [["x"]]}, {"model_type": ["phi3"]}, {"model_type": None},
    {"hidden_size": None, "model_type": "falcon", "num_kv_heads": "x"}, {"vision_config": "none"},
    {"model_type": "kimi_k25", "vision_config": {"num_attention_heads": 10**12}},
    {"model_type": "qwen3_vl_moe"}, {"model_type": "mixtral"}, {"model_type": "ernie4_5_vl_moe"},
]  # fmt: skip
ODD_BASES: list[dict[str, tuple[int, ...]]] = [
    {"m.layers.0.attn.qkv_proj.weight": (12, 4)}, {"m.layers.0.attn.query_key_value.weight": (12, 4)},
    {"m.layers.0.attn.qkv_proj.weight": (0, 4)}, {"m.layers.0.attn.qkv_proj.weight": (12,)},
    {"m.layers.0.mlp.experts.gate_up_proj": (2, 4), "m.layers.0.mlp.experts.down_proj": (4,)},
    {"m.layers.0.mlp.experts.gate_up_proj": (2, 0, 4), "m.layers.0.mlp.experts.down_proj": (2, 4, 0)},
    {"m.layers.0.mlp.experts.0.gate_proj.weight": (4,), "m.layers.0.mlp.experts.0.up_proj.weight": (4, 2)},
    {"m.layers.0.mlp.experts.0.w1.weight": (4, 2), "m.layers.0.mlp.experts.7.w3.weight": (4, 2)},
    {"m.layers.0.attn.wqkv.weight": (12, 4)}, {"m.layers.0.attn.wqkv.weight": (11, 4)},
]  # fmt: skip


@pytest.mark.parametrize("config", ODD_CONFIGS, ids=str)
def test_a_config_or_a_base_that_makes_no_sense_is_refused_in_one_sentence(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    for number, names in enumerate(ODD_BASES):
        plain_base(tmp_path / f"base{number}", names, **config)
    wanted = ("attn.k_proj", "attn.q_proj", "mlp.experts.1.gate_proj", "mlp.experts.0.w2", "attn.qkv_proj")
    for number, module in enumerate(wanted):
        write_adapter(tmp_path / f"adapter{number}", factors(f"m.layers.0.{module}", 5, 3))
        for base in range(len(ODD_BASES)):
            with pytest.raises(lorasmith.LorasmithError):
                lorasmith.plan(tmp_path / f"base{base}", tmp_path / f"adapter{number}")


@pytest.mark.parametrize("name", ["a." * 40_000 + "weight", "experts." * 20_000 + "0.w1.weight", "layers.1." * 9000])
def test_a_name_of_any_length_takes_no_time(tmp_path: Path, name: str) -> None:
    plain_base(tmp_path / "base", {name: (4, 6), "model.layers.0.q_proj.weight": (4, 6)}, model_type="mixtral")
    write_adapter(tmp_path / "adapter", {**factors(name.removesuffix(".weight"), 4, 6), **factors("model.x", 4, 6)})
    with pytest.raises(lorasmith.AdapterMismatch):
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_the_plan_says_where_each_kind_of_target_goes(tmp_path: Path) -> None:
    adapted(KINDS["qwen3_moe"], tmp_path)
    placed = {one.target: one.placed for one in lorasmith.plan(tmp_path / "base", tmp_path / "adapter").targets}
    stem = "model.layers.*"
    assert placed[f"{stem}.mlp.experts.gate_up_proj"] == (
        "fused gate_up_proj → 4 experts × 2 tensors, rows 0:24 and 24:48"
    )
    assert placed[f"{stem}.self_attn.q_proj"] == ""


def test_the_plan_says_which_rows_of_a_fused_layer_a_part_has(tmp_path: Path) -> None:
    KINDS["phi3"].build().save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", factors("model.layers.0.self_attn.k_proj", 16, 32))
    (target,) = lorasmith.plan(tmp_path / "base", tmp_path / "adapter").targets
    assert target.placed == "k_proj → rows 32:48 of model.layers.*.self_attn.qkv_proj.weight"


def small_llama(folder: Path, name: str) -> Path:
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    transformers.LlamaModel(transformers.LlamaConfig(**sizes)).save_pretrained(folder / name)
    return folder / name


def square_adapter(folder: Path, *stems: str) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"base_model.model.{stem}layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.randn(
            shape, generator=generator
        )
        for stem in stems for layer in (0, 1) for side, shape in (("A", (2, 32)), ("B", (32, 2)))
    }  # fmt: skip
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "stem", ["model.vision_tower.vision_model.encoder.", "vision_model.encoder.", "model.encoder."]
)
def test_a_tower_s_adapter_does_not_fit_a_language_model_saved_without_its_head(tmp_path: Path, stem: str) -> None:
    base, adapter = small_llama(tmp_path, "base"), square_adapter(tmp_path / "adapter", stem)
    with pytest.raises(lorasmith.AdapterMismatch, match="have no weight in"):
        lorasmith.merge(base, adapter, tmp_path / "out")
    lorasmith.merge(base, square_adapter(tmp_path / "own", "model."), tmp_path / "out")


def test_two_modules_that_fit_one_tensor_are_refused(tmp_path: Path) -> None:
    base = small_llama(tmp_path, "base")
    both = square_adapter(tmp_path / "both", "model.", "model.language_model.")
    with pytest.raises(lorasmith.AdapterMismatch, match=r"both fit 'layers\.0"):
        lorasmith.merge(base, both, tmp_path / "out")
    one = square_adapter(tmp_path / "one", "model.")
    with pytest.raises(lorasmith.AdapterMismatch, match=r"both fit 'layers\.0"):
        lorasmith.merge(base, one, tmp_path / "out", rename=[r"layers\.1=layers.0"])
    assert not (tmp_path / "out").exists()


def test_names_of_two_kinds_in_one_adapter_are_refused_as_that(tmp_path: Path) -> None:
    config = transformers.ViTConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    transformers.ViTModel(config).save_pretrained(tmp_path / "base")
    tensors: Tensors = {}
    for name in ("encoder.layer.0.attention.attention.query", "layers.0.attention.k_proj", "layers.1.attention.q_proj"):
        tensors |= factors(name, 8, 8)
    write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(lorasmith.AdapterMismatch, match=r"The base has encoder.*one reading must fit all") as failed:
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "Nearest" not in str(failed.value)
    rename = [r"^encoder\.layer\.0\.attention\.attention\.query=layers.0.attention.q_proj"]
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rename=rename)


def test_what_fits_nothing_beside_two_models_of_the_same_layers_is_named(tmp_path: Path) -> None:
    base = small_llama(tmp_path, "base")
    tensors = {**factors("one.layers.0.self_attn.q_proj", 32, 32), **factors("other.layers.1.self_attn.q_proj", 32, 32)}
    both = write_adapter(tmp_path / "both", {**tensors, **factors("one.layers.0.self_attn.new", 32, 32)})
    with pytest.raises(lorasmith.AdapterMismatch) as failed:
        lorasmith.merge(base, both, tmp_path / "out")
    assert "one.layers.0.self_attn.new.lora_A.weight" in str(failed.value)
    assert "cannot be known" not in str(failed.value)


def two_parts(folder: Path, tower_width: int, **config: Any) -> Path:
    """A language model and a tower whose layers have the same names."""
    shapes = {
        f"{stem}.layers.{layer}.self_attn.q_proj.weight": (width, width)
        for stem, width in (("language_model.model", 32), ("audio_tower", tower_width)) for layer in (0, 1)
    }  # fmt: skip
    plain_base(folder, shapes, **config)
    return folder


def test_layers_of_one_part_that_nothing_stands_before_are_told_by_their_shape(tmp_path: Path) -> None:
    adapter = square_adapter(tmp_path / "adapter", "")
    base = two_parts(tmp_path / "base", 24)
    lorasmith.merge(base, adapter, tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"language_model.model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    adapter = write_adapter(tmp_path / "tower", factors("layers.0.self_attn.q_proj", 24, 24))
    lorasmith.merge(base, adapter, tmp_path / "out2")
    after = tensors_of(tmp_path / "out2")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"audio_tower.layers.0.self_attn.q_proj.weight"}


@pytest.mark.parametrize("model_type", ["own", "qwen2_audio"])
def test_layers_of_one_part_that_might_be_another_s_are_refused(tmp_path: Path, model_type: str) -> None:
    adapter, base = square_adapter(tmp_path / "adapter", ""), two_parts(tmp_path / "base", 32, model_type=model_type)
    with pytest.raises(lorasmith.AdapterMismatch, match=r"fit the base in 2 ways.*--rename '\^="):
        lorasmith.merge(base, adapter, tmp_path / "out")
    lorasmith.merge(base, adapter, tmp_path / "out", rename=["^=audio_tower."])


def test_a_part_that_has_other_names_on_disk_is_no_less_meant(tmp_path: Path) -> None:
    shapes = {f"{stem}.layers.0.self_attn.q_proj.weight": (32, 32) for stem in ("model", "vit")}
    plain_base(tmp_path / "base", shapes, model_type="hunyuan_vl", architectures=["HunYuanVLForConditionalGeneration"])
    adapter = write_adapter(tmp_path / "adapter", factors("layers.0.self_attn.q_proj", 32, 32))
    with pytest.raises(lorasmith.AdapterMismatch, match="fit the base in 2 ways"):
        lorasmith.merge(tmp_path / "base", adapter, tmp_path / "out")
