"""Layers that the base has in one piece and the adapter in several, and the other way round.

The oracle is W0 + s·B·A in float64, put where the model's own code takes q, k and v from.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import KINDS, TEXT, Kind
from generate import Tensors, write_json
from safetensors.torch import load_file, save_file
from test_models import tensors_of

import lorasmith

pytestmark = pytest.mark.filterwarnings("ignore")

RANK, ALPHA = 3, 2


def write_adapter(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir(parents=True)
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **config})
    return folder


def factors(module: str, rows: int, columns: int, seed: int = 1) -> Tensors:
    generator = torch.Generator().manual_seed(seed + rows + columns)
    return {
        f"{module}.lora_A.weight": torch.randn(RANK, columns, generator=generator),
        f"{module}.lora_B.weight": torch.randn(rows, RANK, generator=generator),
    }


def delta(tensors: Tensors, module: str) -> torch.Tensor:
    b, a = (tensors[f"{module}.lora_{one}.weight"].double() for one in "BA")
    return ALPHA / RANK * b @ a


def split(kind: Kind, folder: Path, module: str, parts: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """Merge an adapter on parts (by path, with their rows) of a fused module: its weight before and after."""
    kind.build().save_pretrained(folder / "base")
    before = tensors_of(folder / "base")[f"{module}.weight"]
    tensors: Tensors = {}
    for place, (part, rows) in enumerate(parts.items()):
        tensors |= factors(part, rows, before.shape[1], seed=place)
    write_adapter(folder / "adapter", tensors)
    lorasmith.merge(folder / "base", folder / "adapter", folder / "out")
    base, merged = tensors_of(folder / "base"), tensors_of(folder / "out")
    changed = [name for name in base if not torch.equal(base[name], merged[name])]
    assert changed == [f"{module}.weight"]
    return before.double(), merged[f"{module}.weight"].double(), tensors


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_q_k_and_v_go_into_one_layer_with_fewer_keys_than_queries(tmp_path: Path) -> None:
    stem = "model.layers.1.self_attn"
    parts = {f"{stem}.q_proj": 32, f"{stem}.k_proj": 16, f"{stem}.v_proj": 16}
    before, after, tensors = split(KINDS["phi3"], tmp_path, f"{stem}.qkv_proj", parts)
    assert close(after, before + torch.cat([delta(tensors, part) for part in parts]))


def test_one_part_alone_leaves_the_others_bit_for_bit(tmp_path: Path) -> None:
    stem = "model.layers.0.self_attn"
    before, after, tensors = split(KINDS["phi3"], tmp_path, f"{stem}.qkv_proj", {f"{stem}.v_proj": 16})
    assert torch.equal(after[:48], before[:48])
    assert close(after[48:], before[48:] + delta(tensors, f"{stem}.v_proj"))


def test_gate_and_up_go_into_one_layer(tmp_path: Path) -> None:
    stem = "model.layers.0.mlp"
    parts = {f"{stem}.up_proj": 40, f"{stem}.gate_proj": 40}
    before, after, tensors = split(KINDS["phi3"], tmp_path, f"{stem}.gate_up_proj", parts)
    gate, up = delta(tensors, f"{stem}.gate_proj"), delta(tensors, f"{stem}.up_proj")
    assert close(after, before + torch.cat([gate, up]))


def test_heads_that_follow_each_other_get_their_own_rows(tmp_path: Path) -> None:
    """GPT-NeoX takes q, k and v out of every head (``GPTNeoXAttention.forward``)."""
    stem = "gpt_neox.layers.0.attention"
    parts = {f"{stem}.{one}_proj": 32 for one in "qkv"}
    before, after, tensors = split(KINDS["gpt_neox"], tmp_path, f"{stem}.query_key_value", parts)
    taken = [weight.view(4, 24, 32).chunk(3, dim=1) for weight in (before, after)]
    for place, part in enumerate(parts):
        assert close(taken[1][place], taken[0][place] + delta(tensors, part).view(4, 8, 32))


FALCONS = {
    "in groups": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "with one key": {"new_decoder_architecture": False, "multi_query": True},
    "head by head": {"new_decoder_architecture": False, "multi_query": False},
}


@pytest.mark.parametrize("how", FALCONS)
def test_falcon_s_layer_is_divided_as_its_own_code_divides_it(tmp_path: Path, how: str) -> None:
    kind = Kind("FalconForCausalLM", "FalconConfig", {**KINDS["falcon"].sizes, **FALCONS[how]})
    stem = "transformer.h.1.self_attention"
    pairs = {"in groups": 2, "with one key": 1, "head by head": 4}[how]
    parts = {f"{stem}.q_proj": 32, f"{stem}.k_proj": 8 * pairs, f"{stem}.v_proj": 8 * pairs}
    before, after, tensors = split(kind, tmp_path, f"{stem}.query_key_value", parts)
    heads = kind.build().transformer.h[1].self_attention._split_heads
    taken = [[one[0].permute(1, 2, 0) for one in heads(weight.T[None])] for weight in (before, after)]
    for place, part in enumerate(parts):
        wanted = delta(tensors, part).view(-1, 8, 32)
        each = taken[0][place].shape[0] // wanted.shape[0]  # a key serves several queries
        assert close(taken[1][place], taken[0][place] + wanted.repeat_interleave(each, dim=0))


def test_a_layer_in_three_blocks_is_divided_in_three(tmp_path: Path) -> None:
    """ModernBERT, whose own code views the output as (3, heads, width)."""
    stem = "model.layers.1.attn"
    parts = {f"{stem}.{one}_proj": 32 for one in "qkv"}
    before, after, tensors = split(KINDS["modernbert"], tmp_path, f"{stem}.Wqkv", parts)
    assert close(after, before + torch.cat([delta(tensors, part) for part in parts]))


def test_heads_of_bloom_follow_each_other_as_well(tmp_path: Path) -> None:
    sizes = {"vocab_size": 61, "hidden_size": 32, "n_layer": 1, "n_head": 4, "tie_word_embeddings": False}
    kind = Kind("BloomForCausalLM", "BloomConfig", sizes)
    stem = "transformer.h.0.self_attention"
    parts = {f"{stem}.{one}": 32 for one in ("query", "key", "value")}
    before, after, tensors = split(kind, tmp_path, f"{stem}.query_key_value", parts)
    heads = kind.build().transformer.h[0].self_attention._reshape
    taken = [[one[0].permute(0, 2, 1) for one in heads(weight.T[None])] for weight in (before, after)]
    for place, part in enumerate(parts):
        wanted = delta(tensors, part).view(4, 8, 32)
        assert close(_by_head(taken[1][place]), _by_head(taken[0][place]) + wanted)


def _by_head(taken: torch.Tensor) -> torch.Tensor:
    """What a model has taken out of a weight's rows as (heads, width, inputs), whichever way round it has them."""
    return taken if taken.shape == (4, 8, 32) else taken.transpose(1, 2)


def test_three_blocks_of_mpt_are_q_k_and_v(tmp_path: Path) -> None:
    """As its own code cuts them (``MptAttention.forward``)."""
    sizes = {"vocab_size": 61, "d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 64}
    stem = "transformer.blocks.0.attn"
    parts = {f"{stem}.{one}_proj": 32 for one in "qkv"}
    kind = Kind("MptForCausalLM", "MptConfig", sizes)
    before, after, tensors = split(kind, tmp_path, f"{stem}.Wqkv", parts)
    for mine, base, part in zip(after.chunk(3), before.chunk(3), parts, strict=True):
        assert close(mine, base + delta(tensors, part))


def test_a_tower_s_layer_is_divided_by_the_tower_s_own_heads(tmp_path: Path) -> None:
    parts = {f"visual.blocks.0.attn.{one}_proj": 24 for one in "qkv"}
    before, after, tensors = split(KINDS["qwen2_vl"], tmp_path, "visual.blocks.0.attn.qkv", parts)
    assert close(after, before + torch.cat([delta(tensors, part) for part in parts]))


def test_an_unknown_arrangement_is_refused_with_the_fused_layer_named(tmp_path: Path) -> None:
    KINDS["gpt_neox"].build().save_pretrained(tmp_path / "base")
    config = (tmp_path / "base" / "config.json").read_text()
    (tmp_path / "base" / "config.json").write_text(config.replace('"gpt_neox"', '"own_neox"'))
    write_adapter(tmp_path / "adapter", factors("gpt_neox.layers.0.attention.q_proj", 32, 32))
    with pytest.raises(lorasmith.AdapterMismatch, match=r"own_neox arranges .*query_key_value .*--rename"):
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


# ------------------------------------------------------------------------------------------- the other way round

LLAMA = Kind("LlamaForCausalLM", "LlamaConfig", {**TEXT, "attention_bias": True})
STEM = "model.layers.1"
FUSED = {
    f"{STEM}.self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    f"{STEM}.mlp.gate_up_proj": ("gate_proj", "up_proj"),
}


def parts_of(module: str, base: Tensors) -> dict[str, slice]:
    """The rows of a fused module that each of its stored parts has."""
    start, found = 0, {}
    for part in FUSED[module]:
        name = f"{module.rpartition('.')[0]}.{part}"
        rows = len(base[f"{name}.weight"])
        found[name] = slice(start, start + rows)
        start += rows
    return found


ON_THE_WHOLE = [
    *((f"{STEM}.self_attn.qkv_proj", what) for what in ("LoRA", "DoRA", "LoRA with a bias", "weight", "bias")),
    *((f"{STEM}.mlp.gate_up_proj", what) for what in ("LoRA", "DoRA", "weight")),
]


@pytest.mark.parametrize(("module", "what"), ON_THE_WHOLE)
def test_what_was_trained_on_one_layer_goes_into_several(tmp_path: Path, module: str, what: str) -> None:
    LLAMA.build().save_pretrained(tmp_path / "base")
    base = tensors_of(tmp_path / "base")
    parts = parts_of(module, base)
    rows = sum(part.stop - part.start for part in parts.values())
    tensors = factors(module, rows, 32)
    weight = torch.cat([base[f"{part}.weight"].double() for part in parts])
    adapted = weight + delta(tensors, module)
    config: dict[str, Any] = {}
    wanted = {f"{part}.weight": adapted[cut] for part, cut in parts.items()}
    if what == "DoRA":
        tensors[f"{module}.lora_magnitude_vector"] = torch.rand(rows) + 0.5
        magnitude = tensors[f"{module}.lora_magnitude_vector"].double()[:, None]
        wanted = {
            f"{part}.weight": (magnitude * adapted / adapted.norm(dim=1, keepdim=True))[cut]
            for part, cut in parts.items()
        }
        config = {"use_dora": True}
    elif what == "LoRA with a bias":
        tensors[f"{module}.lora_B.bias"] = torch.randn(rows)
        added = ALPHA / RANK * tensors[f"{module}.lora_B.bias"].double()
        wanted |= {f"{part}.bias": base[f"{part}.bias"].double() + added[cut] for part, cut in parts.items()}
        config = {"lora_bias": True}
    elif what in ("weight", "bias"):
        new = torch.randn((rows, 32) if what == "weight" else (rows,))
        beside = "model.layers.0.self_attn.o_proj"
        tensors = {f"{module}.{what}": new, **factors(beside, 32, 32)}
        wanted = {f"{part}.{what}": new[cut].double() for part, cut in parts.items()}
        wanted[f"{beside}.weight"] = base[f"{beside}.weight"].double() + delta(tensors, beside)
    write_adapter(tmp_path / "adapter", tensors, **config)
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    for name, tensor in base.items():
        assert close(merged[name].double(), wanted.get(name, tensor.double())), name
        assert torch.equal(merged[name], tensor) == (name not in wanted)


@pytest.mark.parametrize("what", ["DoRA", "LoRA with a bias", "weight", "bias"])
def test_what_was_trained_on_several_layers_goes_into_one(tmp_path: Path, what: str) -> None:
    """q and v of GPT-NeoX, whose rows lie apart in every head."""
    module = "gpt_neox.layers.0.attention"
    KINDS["gpt_neox"].build().save_pretrained(tmp_path / "base")
    base = tensors_of(tmp_path / "base")
    fused = {leaf: base[f"{module}.query_key_value.{leaf}"].double() for leaf in ("weight", "bias")}
    wanted = {leaf: tensor.clone() for leaf, tensor in fused.items()}
    tensors: Tensors = {}
    config: dict[str, Any] = {"DoRA": {"use_dora": True}, "LoRA with a bias": {"lora_bias": True}}.get(what, {})
    for place, part in ((0, f"{module}.q_proj"), (2, f"{module}.v_proj")):
        mine = {leaf: tensor.view(4, 3, 8, -1)[:, place].reshape(32, -1) for leaf, tensor in fused.items()}
        into = {leaf: tensor.view(4, 3, 8, -1)[:, place] for leaf, tensor in wanted.items()}
        own = factors(part, 32, 32, seed=place)
        adapted = mine["weight"] + delta(own, part)
        if what == "DoRA":
            own[f"{part}.lora_magnitude_vector"] = torch.rand(32) + 0.5
            adapted *= (own[f"{part}.lora_magnitude_vector"].double() / adapted.norm(dim=1))[:, None]
        elif what == "LoRA with a bias":
            own[f"{part}.lora_B.bias"] = torch.randn(32)
            into["bias"].copy_((mine["bias"][:, 0] + ALPHA / RANK * own[f"{part}.lora_B.bias"]).view(4, 8, 1))
        elif what == "bias":
            own[f"{part}.bias"] = torch.randn(32)
            into["bias"].copy_(own[f"{part}.bias"].view(4, 8, 1))
        elif part.endswith("v_proj"):
            own = {f"{part}.weight": torch.randn(32, 32)}
            adapted = own[f"{part}.weight"].double()
        into["weight"].copy_(adapted.view(4, 8, 32))
        tensors |= own
    write_adapter(tmp_path / "adapter", tensors, **config)
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    for leaf, tensor in wanted.items():
        assert close(merged[f"{module}.query_key_value.{leaf}"].double(), tensor)


def test_two_adapters_of_different_versions_are_summed(tmp_path: Path) -> None:
    """One trained on the fused layer, one on its parts, at weights of their own."""
    KINDS["phi3"].build().save_pretrained(tmp_path / "base")
    stem = "model.layers.0.self_attn"
    one = factors(f"{stem}.qkv_proj", 64, 32)
    other = factors(f"{stem}.k_proj", 16, 32, seed=7)
    write_adapter(tmp_path / "one", one)
    write_adapter(tmp_path / "other", other)
    lorasmith.merge(tmp_path / "base", [(tmp_path / "one", 0.5), (tmp_path / "other", -2.0)], tmp_path / "out")
    base, merged = (tensors_of(tmp_path / name)[f"{stem}.qkv_proj.weight"].double() for name in ("base", "out"))
    wanted = base + 0.5 * delta(one, f"{stem}.qkv_proj")
    wanted[32:48] -= 2.0 * delta(other, f"{stem}.k_proj")
    assert close(merged, wanted)


def test_a_delta_of_the_whole_that_is_too_short_is_refused(tmp_path: Path) -> None:
    LLAMA.build().save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", factors(f"{STEM}.self_attn.qkv_proj", 63, 32))
    with pytest.raises(lorasmith.AdapterMismatch, match=r"\[63, 32\].*\[64, 32\].*another model or size"):
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_rope_s_rows_are_put_where_they_are_stored(tmp_path: Path) -> None:
    """Mistral Large 4's tower: stored in pairs, run in halves (``PermuteForRope``)."""
    base = {"vision.attention.wq.weight": torch.randn(32, 10), "beside.weight": torch.randn(4, 4)}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    write_json(
        tmp_path / "base" / "config.json", {"model_type": "mistral_large4", "vision_config": {"num_attention_heads": 4}}
    )
    tensors = factors("vision.attention.q_proj", 32, 10)
    write_adapter(tmp_path / "adapter", tensors)
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["vision.attention.wq.weight"].double()
    run = delta(tensors, "vision.attention.q_proj").view(4, 2, 4, 10)
    assert close(merged, base["vision.attention.wq.weight"].double() + run.transpose(1, 2).reshape(32, 10))


def test_a_layer_stored_as_in_out_is_not_taken_apart(tmp_path: Path) -> None:
    """Its q, k and v would be columns: refused, as long as nobody has trained such a thing."""
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", factors("transformer.h.0.attn.q_proj", 32, 32))
    with pytest.raises(lorasmith.AdapterMismatch, match=r"q_proj"):
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("patterns", [["q_proj=0.25"], ["k_proj=0.25", r"\bup_proj=0.5"], ["q_proj=0"]], ids=str)
def test_weights_of_modules_hold_for_their_part_of_a_fused_layer(tmp_path: Path, patterns: list[str]) -> None:
    base = bases_of_phi3(tmp_path)
    generator = torch.Generator().manual_seed(3)
    modules = {
        "self_attn.q_proj": 32,
        "self_attn.k_proj": 16,
        "self_attn.v_proj": 16,
        "mlp.gate_proj": 40,
        "mlp.up_proj": 40,
    }
    tensors, wanted = {}, {"qkv_proj": [], "gate_up_proj": []}
    for module, rows in modules.items():
        a, b = torch.randn(2, 32, generator=generator), torch.randn(rows, 2, generator=generator)
        tensors[f"base_model.model.model.layers.0.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.model.layers.0.{module}.lora_B.weight"] = b
        factor = math.prod(
            float(one.rpartition("=")[2]) for one in patterns if re.search(one.rpartition("=")[0], module)
        )
        wanted["qkv_proj" if "attn" in module else "gate_up_proj"].append(factor * b.double() @ a.double())
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", weights=patterns)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for layer, parts in wanted.items():
        (name,) = (one for one in merged if f"layers.0.{'self_attn' if layer == 'qkv_proj' else 'mlp'}.{layer}" in one)
        change = merged[name].double() - base[name].double()
        assert float((change - torch.cat(parts)).norm()) <= 1e-5 * float(torch.cat(parts).norm())


def bases_of_phi3(folder: Path) -> dict[str, torch.Tensor]:
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    config = transformers.Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    transformers.Phi3ForCausalLM(config).save_pretrained(folder / "base")
    return load_file(folder / "base" / "model.safetensors")


@pytest.mark.parametrize("order", [1, -1])
def test_parts_of_a_layer_are_mixed_neither_with_the_layer_nor_by_what_depends_on_it(
    tmp_path: Path, order: int
) -> None:
    KINDS["phi3"].build().save_pretrained(tmp_path / "base")
    stem = "model.layers.1.self_attn"
    width = tensors_of(tmp_path / "base")[f"{stem}.qkv_proj.weight"].shape[1]
    parts = {part: factors(f"{stem}.{part}_proj", rows, width) for part, rows in (("q", 32), ("qkv", 64))}
    plain, whole = (write_adapter(tmp_path / part, tensors) for part, tensors in parts.items())
    magnitude = {f"{stem}.q_proj.lora_magnitude_vector": torch.ones(32)}
    dora = write_adapter(tmp_path / "dora", parts["q"] | magnitude, use_dora=True)
    options: dict[str, Any] = {"base": tmp_path / "base", "rank": 4}
    for one in (plain, dora):
        with pytest.raises(lorasmith.AdapterMismatch, match="an adapter can have only one name for it"):
            lorasmith.mix([one, whole][::order], tmp_path / "mixed", **options)
    with pytest.raises(lorasmith.Unsupported, match=r"q_proj' is no whole tensor of the base.*lorasmith merge"):
        lorasmith.mix([plain, dora][::order], tmp_path / "mixed", **options)
    assert not (tmp_path / "mixed").exists()
    lorasmith.merge(tmp_path / "base", [plain, whole, dora][::order], tmp_path / "merged")
