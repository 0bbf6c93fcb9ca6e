"""Mixing adapters of every kind that PEFT saves: what PEFT loads must be the base plus each adapter's own effect."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import lorasmith

pytestmark = pytest.mark.filterwarnings("ignore")

LLAMA = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "attention_bias": True,
}  # fmt: skip


class Attention(torch.nn.Module):
    """torch's own attention between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "custom"}
        self.embedding = torch.nn.Embedding(61, 48)
        self.attn = torch.nn.MultiheadAttention(48, 4, batch_first=True)
        self.linear = torch.nn.Linear(48, 31)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        return self.linear(self.attn(hidden, hidden, hidden)[0])


def llama(*, tied: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


def attention() -> torch.nn.Module:
    torch.manual_seed(0)
    return Attention().eval()


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_embd=48, n_layer=2, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


Maker = Callable[[], torch.nn.Module]


def adapt(make: Maker, folder: Path, seed: int, **options: Any) -> Path:
    """An adapter that PEFT makes and saves, everything in it drawn anew."""
    base = make()
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                drawn = torch.randn_like(parameter) * 0.1
                parameter.copy_(drawn if "lora_" in name else parameter + drawn)
    model.save_pretrained(folder)
    return folder


def merged(make: Maker, folder: Path) -> dict[str, torch.Tensor]:
    state = PeftModel.from_pretrained(make(), str(folder)).merge_and_unload().state_dict()
    return {name: one.double() for name, one in state.items()}


def check(make: Maker, parts: Sequence[tuple[Path, float]], mixed: Path) -> None:
    """What PEFT makes of a mix is the base and every adapter's weighted change, and nothing stored is passed over."""
    before = {name: one.double() for name, one in make().state_dict().items()}
    want = {name: one.clone() for name, one in before.items()}
    for path, weight in parts:
        for name, one in merged(make, path).items():
            want[name] += weight * (one - before[name])
    loaded = PeftModel.from_pretrained(make(), str(mixed))
    known = {name.replace(".default", "").replace(".modules_to_save", "") for name in loaded.state_dict()}
    stored = set(load_file(mixed / "adapter_model.safetensors"))
    assert stored <= known
    assert {name for name in known if ".lora_" in name} <= stored  # nothing is left as PEFT drew it
    got = loaded.merge_and_unload().state_dict()
    changed = 0
    for name, one in want.items():
        size = float((one - before[name]).norm())
        changed += size > 0
        assert float((got[name].double() - one).norm()) <= 1e-4 * max(size, 1e-3 * float(before[name].norm())), name
    assert changed


Q = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]}
V = {"r": 2, "lora_alpha": 5, "target_modules": ["v_proj"]}
ATTN = {"r": 3, "lora_alpha": 6, "target_modules": ["attn", "linear"]}

KINDS: dict[str, tuple[Maker, list[dict[str, Any]], tuple[float, float], dict[str, Any]]] = {
    "biases of layers that another adapter targets": (llama, [{**Q, "bias": "all"}, V], (1.0, 0.5), {}),
    "biases of what is targeted": (llama, [{**Q, "bias": "lora_only"}, V], (1.0, -0.5), {}),
    "biases weighted against the base": (llama, [{**Q, "bias": "all"}, V], (0.4, 0.5), {"base": True}),
    "biases of a layer whose product goes": (llama, [{**Q, "bias": "lora_only"}, V], (1.0, 0.0), {"params": 100}),
    "biases on B of layers whose products go": (llama, [{**Q, "lora_bias": True}, V], (1.0, 0.0), {"params": 100}),
    "torch's attention": (attention, [ATTN, {**ATTN, "r": 2}], (0.7, 0.5), {}),
    "torch's attention, by energy": (attention, [ATTN, {**ATTN, "r": 2}], (0.7, 0.5), {"energy": 0.6}),
    "torch's attention, by rank": (attention, [ATTN, {**ATTN, "r": 2}], (0.7, 0.5), {"rank": 2}),
    "token rows of two layers": (
        llama,
        [
            {**Q, "trainable_token_indices": {"embed_tokens": [1, 5]}},
            {**V, "trainable_token_indices": {"lm_head": [7]}},
        ],
        (1.0, 1.0), {},
    ),
    "DoRA on Conv1D": (
        gpt2, [{"r": 2, "target_modules": ["c_attn", "wte"], "use_dora": True}, {"r": 2, "target_modules": ["c_attn"]}],
        (0.6, 0.5), {"base": True, "rank": 48},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(KINDS))
def test_peft_makes_of_a_mix_what_its_adapters_do(tmp_path: Path, kind: str) -> None:
    make, configs, weights, options = KINDS[kind]
    parts = [
        (adapt(make, tmp_path / str(number), number, **config), weight)
        for number, (config, weight) in enumerate(zip(configs, weights, strict=True))
    ]
    given = dict(options)
    if given.pop("base", False):
        make().save_pretrained(tmp_path / "base")
        given["base"] = tmp_path / "base"
    report = lorasmith.mix(parts, tmp_path / "mixed", **given)
    if report.error < 1e-4:
        check(make, parts, tmp_path / "mixed")
        return
    products = {one.module for one in report.modules}  # cut down, so that only the rest is comparable
    before, got = make().state_dict(), merged(make, tmp_path / "mixed")
    for path, weight in parts[:1]:
        for name, one in merged(make, path).items():
            if not any(name.startswith(f"{module}.") and not name.endswith(".bias") for module in products):
                want = before[name].double() + weight * (one - before[name].double())
                assert torch.allclose(got[name], want, atol=1e-6), name
    loaded = PeftModel.from_pretrained(make(), str(tmp_path / "mixed"))
    known = {name.replace(".default", "") for name in loaded.state_dict()}
    assert set(load_file(tmp_path / "mixed" / "adapter_model.safetensors")) <= known


@pytest.mark.parametrize("order", [1, -1])
def test_embeddings_saved_along_are_found_whichever_adapter_comes_first(tmp_path: Path, order: int) -> None:
    whole = adapt(llama, tmp_path / "whole", 1, **Q)
    tensors = load_file(whole / "adapter_model.safetensors")
    embeddings = llama().get_input_embeddings().weight.detach().clone()
    save_file(
        {**tensors, "base_model.model.model.embed_tokens.weight": embeddings}, whole / "adapter_model.safetensors"
    )
    product = adapt(llama, tmp_path / "product", 2, r=2, target_modules=["embed_tokens"])
    parts = [(whole, 0.5), (product, 0.5)][::order]
    lorasmith.mix(parts, tmp_path / "mixed")
    stored = load_file(tmp_path / "mixed" / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in stored
    check(llama, parts, tmp_path / "mixed")


@pytest.mark.parametrize("method", ["dare", "dare-ties", "ties", "magnitude-prune"])
@pytest.mark.parametrize("space", ["core", "dense"])
@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_merging_with_a_rule_is_merging_the_mix_whichever_way_round_a_weight_is_stored(
    tmp_path: Path, make: Maker, space: str, method: str
) -> None:
    targets = ["c_attn", "c_fc", "wte"] if make is gpt2 else ["q_proj", "embed_tokens", "lm_head"]
    make().save_pretrained(tmp_path / "base")
    parts = [(adapt(make, tmp_path / str(seed), seed, r=3, target_modules=targets), weight)
             for seed, weight in ((1, 0.7), (2, 0.4))]  # fmt: skip
    options: dict[str, Any] = {"method": method, "space": space, "density": 0.4}
    lorasmith.mix(parts, tmp_path / "mixed", **options, **({"rank": 48} if space == "dense" else {}))
    lorasmith.merge(tmp_path / "base", tmp_path / "mixed", tmp_path / "by-mix")
    lorasmith.merge(tmp_path / "base", parts, tmp_path / "at-once", **options)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("by-mix", "at-once"))
    assert one.keys() == other.keys()
    for name in one:
        assert float((one[name] - other[name]).norm()) <= 2e-6 * float(one[name].norm()), name


def test_equal_layers_trained_whole_count_once_in_mixing_and_in_merging(tmp_path: Path) -> None:
    one = adapt(llama, tmp_path / "one", 1, **Q, modules_to_save=["lm_head"])
    other = shutil.copytree(one, tmp_path / "other")
    llama().save_pretrained(tmp_path / "base")
    lorasmith.mix([one, other], tmp_path / "mixed")
    lorasmith.merge(tmp_path / "base", tmp_path / "mixed", tmp_path / "by-mix")
    lorasmith.merge(tmp_path / "base", [one, other], tmp_path / "at-once")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("by-mix", "at-once"))
    head = load_file(one / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(first["lm_head.weight"], head)
    assert torch.equal(second["lm_head.weight"], head)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


REFUSED: dict[str, tuple[Maker, list[dict[str, Any]], dict[str, Any], str]] = {
    "a LoRA on a layer trained whole": (
        llama, [{**Q, "modules_to_save": ["lm_head"]}, {"r": 2, "target_modules": ["lm_head"]}], {"prefer": "0"},
        r"trains all of 'lm_head'.*another adapter has a LoRA on it.*lorasmith merge",
    ),
    "a LoRA on an embedding with token rows": (
        llama, [{**Q, "trainable_token_indices": [1, 2]}, {"r": 2, "target_modules": ["embed_tokens"]}], {},
        r"single rows of 'model.embed_tokens'.*lorasmith merge",
    ),
    "a bias on B beside a LoRA on an embedding": (
        llama, [{**Q, "lora_bias": True}, {"r": 2, "target_modules": ["embed_tokens"]}], {},
        r"'model.embed_tokens' is an",
    ),
    "a layer and the parameter in it": (
        llama, [Q, {**V, "target_parameters": ["self_attn.q_proj.weight"]}], {},
        r"adapt 'model.layers.0.self_attn.q_proj' in two ways.*target_parameters.*lorasmith merge",
    ),
    "token rows that differ": (
        llama, [{**Q, "trainable_token_indices": [1, 2]}, {**V, "trainable_token_indices": [2, 3]}], {},
        r"trained whole in .* and differs, and rows of tokens are not weighted; take one as it is with --prefer",
    ),
    "an unconverted PiSSA": (llama, [{**Q, "init_lora_weights": "pissa"}, V], {}, "was initialised with pissa"),
    "a rule on DoRA's core": (
        llama, [{**Q, "use_dora": True}, Q], {"base": True, "rank": 8, "method": "ties"},
        "DoRA.*no core.*--space dense",
    ),
    "a budget for torch's attention": (attention, [ATTN, ATTN], {"params": 1000}, "--params cannot be kept to"),
    "a budget below the least": (llama, [Q, V], {"params": 5}, "--params 5 is less than the 72"),
    "nothing but a layer trained whole": (
        llama, [{**Q, "modules_to_save": ["lm_head"]}], {"weights": ["q_proj=0"]}, "leave no LoRA to mix",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_no_lora_config_can_express_is_refused_with_a_way_out(tmp_path: Path, kind: str) -> None:
    make, configs, options, message = REFUSED[kind]
    made = tmp_path / "made"
    parts = [adapt(make, made / str(number), number, **config) for number, config in enumerate(configs)]
    given = dict(options)
    if "prefer" in given:
        given["prefer"] = str(made / given["prefer"]) + "/"
    if given.pop("base", False):
        make().save_pretrained(made / "base")
        given["base"] = made / "base"
    with pytest.raises(lorasmith.LorasmithError, match=message):
        lorasmith.mix(parts, tmp_path / "mixed", **given)
    assert [one.name for one in tmp_path.iterdir()] == ["made"]


def test_a_module_without_factors_is_no_obstacle_to_balance(tmp_path: Path) -> None:
    one = adapt(llama, tmp_path / "one", 1, **Q)
    file = one / "adapter_model.safetensors"
    save_file(
        {name: one_ * 0 if "layers.0" in name and "_B" in name else one_ for name, one_ in load_file(file).items()},
        file,
    )
    report = lorasmith.mix([one, (one, 0.5)], rank=2, balance=True)
    assert sorted(module.rank_out for module in report.modules) == [0, 2]


def test_small_weights_lose_nothing(tmp_path: Path) -> None:
    one, two = adapt(llama, tmp_path / "one", 1, **Q), adapt(llama, tmp_path / "two", 2, **Q)
    for weight in (1e-14, 1e-30):
        report = lorasmith.mix([(one, weight), (two, weight)], rank=6)
        assert {module.rank_out for module in report.modules} == {6}
        assert not report.warnings
    assert lorasmith.mix([(one, 1e-170), (two, 1e-170)], dry_run=True).interference[0].norm_ratio > 0


def test_a_result_can_be_mixed_again_whatever_it_came_from_and_goes_to(tmp_path: Path) -> None:
    one, two = adapt(llama, tmp_path / "one", 1, **Q), adapt(llama, tmp_path / "two", 2, **Q)
    lorasmith.mix([(one, 0.5), two], tmp_path / "file.safetensors")
    lorasmith.resize(tmp_path / "file.safetensors", tmp_path / "folder", rank=2)
    lorasmith.mix([(tmp_path / "folder", 0.5), one], tmp_path / "again.safetensors")
    lorasmith.mix(tmp_path / "again.safetensors", tmp_path / "copy")
    assert lorasmith.mix(tmp_path / "copy", dry_run=True).rank == (5, 5)
    tensors = {
        name.removeprefix("base_model.model."): one_
        for name, one_ in load_file(one / "adapter_model.safetensors").items()
    }
    tensors |= {name.replace("lora_A.weight", "alpha"): torch.tensor(29.0) for name in [*tensors] if "lora_A" in name}
    save_file(tensors, tmp_path / "bare.safetensors")
    lorasmith.mix(tmp_path / "bare.safetensors", tmp_path / "with-config")
    config = json.loads((tmp_path / "with-config" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == pytest.approx(29)
    assert lorasmith.mix(tmp_path / "with-config", dry_run=True).adapters[0].scale == pytest.approx((29 / 3, 29 / 3))


def test_a_config_longer_than_the_modules_has_room_in_the_header(tmp_path: Path) -> None:
    one = adapt(llama, tmp_path / "one", 1, **Q)
    config = json.loads((one / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", *(f"a_layer_that_is_not_there_{number}" for number in range(100))]
    (one / "adapter_config.json").write_text(json.dumps(config))
    lorasmith.resize(one, tmp_path / "small.safetensors", rank=1)
    lorasmith.mix([(one, 0.5)], tmp_path / "part.safetensors", weights=[r"layers\.1=0"])
    assert len(load_file(tmp_path / "part.safetensors")) == 2


def test_interference_takes_adapters_with_different_heads_and_dora(tmp_path: Path) -> None:
    one = adapt(llama, tmp_path / "one", 1, **Q, modules_to_save=["lm_head"], use_dora=True)
    two = adapt(llama, tmp_path / "two", 2, **Q, modules_to_save=["lm_head"])
    (pair,) = lorasmith.interference([one, two])
    assert pair.modules == 2


def test_adapters_that_call_one_layer_differently_are_told_apart(tmp_path: Path) -> None:
    one = adapt(llama, tmp_path / "one", 1, **Q)
    other = adapt(llama, tmp_path / "other", 2, **Q)
    file = other / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("model.model.layers", "model.layers"): tensors[name] for name in tensors}, file)
    with pytest.raises(lorasmith.AdapterMismatch, match="a mix has one name for a layer"):
        lorasmith.mix([one, other], tmp_path / "mixed")
    llama().save_pretrained(tmp_path / "base")
    with pytest.raises(lorasmith.AdapterMismatch, match="can have only one name for it"):
        lorasmith.mix([one, other], tmp_path / "mixed", base=tmp_path / "base")
    save_file({name.replace("model.model.layers", "model.some.layers"): tensors[name] for name in tensors}, file)
    report = lorasmith.mix([one, other], tmp_path / "mixed")
    assert "end alike" in report.warnings[-1]


def test_the_record_changes_with_the_scale(tmp_path: Path) -> None:
    one, two = adapt(llama, tmp_path / "one", 1, **Q), adapt(llama, tmp_path / "two", 2, **Q)
    lorasmith.mix([one, two], tmp_path / "a")
    config = json.loads((one / "adapter_config.json").read_text())
    (one / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 50}))
    lorasmith.mix([one, two], tmp_path / "b")
    assert (tmp_path / "a" / "lorasmith.json").read_text() != (tmp_path / "b" / "lorasmith.json").read_text()


def test_a_base_with_a_nan_is_named(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "base")
    one = adapt(llama, tmp_path / "one", 1, **Q, use_dora=True)
    with pytest.raises(lorasmith.NotFinite, match=r"layers\.1\.self_attn\.q_proj.*base's values"):
        lorasmith.mix([(one, 0.5)], tmp_path / "out", base=tmp_path / "base", rank=4)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_weight_0_has_no_say_in_what_layers_are_called(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    one, other = adapt(llama, tmp_path / "one", 1, **Q), adapt(llama, tmp_path / "other", 2, **Q)
    file = other / "adapter_model.safetensors"
    save_file({name.replace("model.model.layers", "model.layers"): t for name, t in load_file(file).items()}, file)
    lorasmith.mix([one, (other, 0.0)], tmp_path / "mixed", base=tmp_path / "base")
