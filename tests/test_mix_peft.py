"""PEFT as the oracle of mixing: what it makes itself, and what it computes with what lorasmith wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapters import PREFIX, apart, config_of, dense, summed
from generate import sha256
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import lorasmith
from lorasmith.combining.draws import drawn, key

pytestmark = pytest.mark.filterwarnings("ignore")


# --------------------------------------------------------------------------------------------------------- PEFT


LLAMA = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": False,
}  # fmt: skip
TOKENS = torch.arange(3, 15).view(2, 6)


class Toy(torch.nn.Module):
    """Layers of the kinds that PEFT has a LoRA for."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "custom"}
        self.embedding = torch.nn.Embedding(61, 48)
        self.conv = torch.nn.Conv1d(48, 48, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.linear = torch.nn.Linear(48, 31)
        self.turned = transformers.pytorch_utils.Conv1D(48, 48)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.turned(self.embedding(input_ids))
        hidden = self.conv(hidden.transpose(1, 2)).transpose(1, 2)
        image = self.conv2(hidden.unsqueeze(1)).mean(dim=1)
        return self.linear(image)


def fresh(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    return Toy().eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result = model(input_ids=TOKENS)
    return (result.logits if hasattr(result, "logits") else result).double()


def adapt(model: torch.nn.Module, folder: Path, seed: int, **options: Any) -> Path:
    """An adapter that PEFT makes and saves, its factors drawn anew."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(folder)
    return folder


CASES: dict[str, tuple[str, Sequence[dict[str, Any]]]] = {
    "ranks and modules of their own": ("llama", [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    ]),
    "patterns": ("llama", [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 6},
         "alpha_pattern": {"layers.1.self_attn.k_proj": 3}},
        {"r": 2, "lora_alpha": 8, "target_modules": ["k_proj"], "layers_to_transform": [1]},
    ]),
    "embeddings and heads": ("llama", [
        {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head"]},
        {"r": 2, "lora_alpha": 8, "target_modules": ["embed_tokens", "o_proj"]},
    ]),
    "convolutions and Conv1D": ("toy", [
        {"r": 4, "lora_alpha": 8, "target_modules": ["conv", "conv2", "turned", "embedding"], "fan_in_fan_out": True},
        {"r": 3, "lora_alpha": 8, "target_modules": ["conv", "conv2", "turned", "linear"], "fan_in_fan_out": True},
    ]),
    "biases on B": ("toy", [
        {"r": 4, "lora_alpha": 8, "target_modules": ["linear", "conv"], "lora_bias": True},
        {"r": 3, "lora_alpha": 6, "target_modules": ["linear"]},
    ]),
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"rank": 5}, {"method": "ties"}], ids=["exact", "rank 5", "ties"])
@pytest.mark.parametrize("case", list(CASES))
def test_peft_loads_a_mix_and_computes_what_the_adapters_do_together(
    tmp_path: Path, case: str, options: dict[str, Any]
) -> None:
    kind, configs = CASES[case]
    parts = [(adapt(fresh(kind), tmp_path / str(number), number, **one), weight)
             for number, (one, weight) in enumerate(zip(configs, (0.7, -0.4), strict=True))]  # fmt: skip
    lorasmith.mix(parts, tmp_path / "mixed", **options)
    loaded = PeftModel.from_pretrained(fresh(kind), str(tmp_path / "mixed"))
    names = {name for name in loaded.state_dict() if "lora_" in name}
    stored = load_file(tmp_path / "mixed" / "adapter_model.safetensors")
    assert sum("lora_" in name for name in stored) == len(names)  # no factor of PEFT's own is left as it was drawn
    wanted = fresh(kind)
    if options:  # what the factors stand for: by the test's own reader, added to the weights
        config = config_of(tmp_path / "mixed")
        assert config["use_rslora"] is False
        deltas, biases = dense(tmp_path / "mixed"), {name: one for name, one in stored.items() if name.endswith("bias")}
    else:
        deltas, biases = {}, {}
        for path, weight in parts:
            for module, delta in dense_by_peft(path).items():
                deltas[module] = deltas.get(module, 0) + weight * delta
            biases |= weighted_biases(path, weight, biases)
    with torch.no_grad():
        for module, delta in deltas.items():
            layer = wanted.get_submodule(module)
            turned = delta.t() if isinstance(layer, (torch.nn.Embedding, transformers.pytorch_utils.Conv1D)) else delta
            layer.weight += turned.reshape(layer.weight.shape).float()
        for name, bias in biases.items():
            wanted.get_submodule(name.removeprefix(PREFIX).removesuffix(".lora_B.bias")).bias += bias
    assert not torch.allclose(logits(fresh(kind)), logits(wanted), atol=1e-3)
    assert torch.allclose(logits(loaded), logits(wanted), rtol=1e-4, atol=1e-5)


def dense_by_peft(path: Path) -> dict[str, torch.Tensor]:
    """What PEFT's own configuration rules make of an adapter that it saved."""
    config = LoraConfig.from_pretrained(path)
    tensors = load_file(path / "adapter_model.safetensors")
    deltas = {}
    for name, tensor in tensors.items():
        if "lora_A" not in name and "lora_embedding_A" not in name:
            continue
        module = name.removeprefix(PREFIX).split(".lora_")[0]
        patterns = peft.utils.other.get_pattern_key(config.alpha_pattern, module)
        alpha = config.alpha_pattern.get(patterns, config.lora_alpha)
        rank = len(tensor)
        product = tensors[name.replace("_A", "_B")].double().flatten(1) @ tensor.double().flatten(1)
        deltas[module] = alpha / (math.sqrt(rank) if config.use_rslora else rank) * product
    return deltas


def weighted_biases(path: Path, weight: float, so_far: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    config = LoraConfig.from_pretrained(path)
    tensors = load_file(path / "adapter_model.safetensors")
    return {
        name: so_far.get(name, 0) + weight * config.lora_alpha / config.r * one
        for name, one in tensors.items()
        if name.endswith("lora_B.bias")
    }


def added_by_peft(parts: Sequence[tuple[Path, float]], **options: Any) -> dict[str, torch.Tensor]:
    """The deltas of what PEFT's ``add_weighted_adapter`` makes."""
    model = PeftModel.from_pretrained(fresh("llama"), str(parts[0][0]), adapter_name="a0")
    for number, (path, _) in enumerate(parts[1:], 1):
        model.load_adapter(str(path), adapter_name=f"a{number}")
    names = [f"a{number}" for number in range(len(parts))]
    model.add_weighted_adapter(names, [weight for _, weight in parts], "both", **options)
    deltas = {}
    for name, layer in model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer) and "both" in layer.lora_A:
            a, b = layer.lora_A["both"].weight.double(), layer.lora_B["both"].weight.double()
            deltas[name.removeprefix(PREFIX)] = (layer.scaling["both"] * b @ a).detach()
    return deltas


def peft_pair(tmp_path: Path, alphas: Sequence[float] = (8, 6)) -> list[tuple[Path, float]]:
    options = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
    return [
        (adapt(fresh("llama"), tmp_path / f"p{number}", number, lora_alpha=alpha, **options), weight)
        for number, (alpha, weight) in enumerate(zip(alphas, (0.7, 0.4), strict=True))
    ]


def test_the_exact_sum_is_what_peft_makes_with_cat(tmp_path: Path) -> None:
    parts = peft_pair(tmp_path)
    lorasmith.mix(parts, tmp_path / "mixed")
    assert apart(dense(tmp_path / "mixed"), added_by_peft(parts, combination_type="cat")) < 1e-6


def test_a_recompressed_sum_is_what_peft_makes_with_svd(tmp_path: Path) -> None:
    parts = peft_pair(tmp_path)
    lorasmith.mix(parts, tmp_path / "mixed", rank=5)
    if Version(peft.__version__) < Version("0.21"):  # which applied each adapter's scale twice
        parts = [(path, weight / scale) for (path, weight), scale in zip(parts, (8 / 4, 6 / 4), strict=True)]
    assert apart(dense(tmp_path / "mixed"), added_by_peft(parts, combination_type="svd", svd_rank=5)) < 1e-5


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties", "magnitude-prune"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_rules_in_dense_space_are_what_peft_makes_with_the_same_masks(
    tmp_path: Path, method: str, sign: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = peft_pair(tmp_path, alphas=(4, 4))  # a scale of 1, so that PEFT's second one is none
    digests = [sha256(path / "adapter_model.safetensors") for path, _ in parts]
    modules: list[str] = []

    def same_masks(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        module, digest = order[len(modules) // 2], digests[len(modules) % 2]
        modules.append(module)
        mask = drawn(
            key(0, digest, module), slice(0, tensor.shape[0]), slice(0, tensor.shape[1]), tensor.shape[1], density
        )
        return tensor * mask / density

    order = [name for name, layer in fresh("llama").named_modules() if name.endswith(("q_proj", "up_proj"))]
    monkeypatch.setattr(peft.utils.merge_utils, "random_pruning", same_masks)
    theirs = {
        "ties": "ties_svd",
        "dare": "dare_linear_svd",
        "dare-ties": "dare_ties_svd",
        "magnitude-prune": "magnitude_prune_svd",
    }
    options = {"majority_sign_method": sign} if method.endswith("ties") else {}
    wanted = added_by_peft(parts, combination_type=theirs[method], svd_rank=48, density=0.4, **options)
    mine = {"sign": sign} if method.endswith("ties") else {}
    lorasmith.mix(parts, tmp_path / "mixed", method=method, density=0.4, space="dense", rank=48, **mine)
    assert len(modules) == (2 * len(order) if method.startswith("dare") else 0)
    assert apart(dense(tmp_path / "mixed"), wanted) < 1e-4


@pytest.mark.parametrize("weights_", [(0.7, 0.4), (0.7, -0.4)])
def test_peft_linear_reproduces_peft_s_numbers(tmp_path: Path, weights_: tuple[float, float]) -> None:
    parts = [(path, weight) for (path, _), weight in zip(peft_pair(tmp_path), weights_, strict=True)]
    report = lorasmith.mix(parts, tmp_path / "mixed", method="peft-linear")
    theirs = added_by_peft(parts, combination_type="linear")
    assert apart(dense(tmp_path / "mixed"), theirs) < 1e-6
    want = summed(parts)
    for one in report.modules:
        gap = float((theirs[one.module] - want[one.module]).norm() / want[one.module].norm())
        assert one.error == pytest.approx(gap, rel=1e-5)
        assert one.norm == pytest.approx(float(want[one.module].norm()), rel=1e-6)
        assert one.rank_out == 4
        u, _, vt = torch.linalg.svd(theirs[one.module])
        for (path, _), energy in zip(parts, one.energies, strict=True):
            delta = dense(path)[one.module]
            assert energy == pytest.approx(
                float((u[:, :4].t() @ delta @ vt[:4].t()).norm() / delta.norm()) ** 2, rel=1e-4
            )
    total = math.sqrt(sum(float((theirs[name] - one).norm()) ** 2 for name, one in want.items()))
    assert report.error == pytest.approx(total / math.hypot(*(float(one.norm()) for one in want.values())), rel=1e-5)

    report = lorasmith.mix(parts, tmp_path / "cut", method="peft-linear", rank=2)
    for one in report.modules:
        gap = float((dense(tmp_path / "cut")[one.module] - want[one.module]).norm() / want[one.module].norm())
        assert one.error == pytest.approx(gap, rel=1e-5)


# ------------------------------------------------------------------------------------------------- with a base


def test_dora_is_mixed_against_its_base(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "down_proj"], "r": 4}
    parts = [
        (adapt(fresh("llama"), tmp_path / "dora", 1, lora_alpha=8, use_dora=True, **options), 0.7),
        (adapt(fresh("llama"), tmp_path / "lora", 2, lora_alpha=4, **options), 0.5),
    ]
    model = fresh("llama")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(lorasmith.Unsupported, match=r"DoRA.*depends on the base.*--base BASE --rank N"):
        lorasmith.mix(parts, tmp_path / "mixed")
    with pytest.raises(lorasmith.BadOption, match="full rank"):
        lorasmith.mix(parts, tmp_path / "mixed", base=tmp_path / "base")
    before = {name: one.clone().double() for name, one in model.state_dict().items()}
    want: dict[str, torch.Tensor] = {}
    for path, weight in parts:
        merged = PeftModel.from_pretrained(fresh("llama"), str(path)).merge_and_unload().state_dict()
        for name, one in merged.items():
            want[name] = want.get(name, 0) + weight * (one.double() - before[name])
    for rank in (48, 7):
        report = lorasmith.mix(parts, tmp_path / f"mixed{rank}", base=tmp_path / "base", rank=rank)
        got = dense(tmp_path / f"mixed{rank}")
        assert len(got) == 4
        for one in report.modules:
            exact = want[f"{one.module}.weight"]
            values = torch.linalg.svdvals(exact)
            gap = float((got[one.module] - exact).norm() / exact.norm())
            assert gap == pytest.approx(float(values[rank:].norm() / values.norm()), rel=1e-3, abs=1e-5)
            assert one.error == pytest.approx(gap, rel=1e-3, abs=1e-5)
    loaded = PeftModel.from_pretrained(fresh("llama"), str(tmp_path / "mixed48"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += want[name].float()
    assert torch.allclose(logits(loaded), logits(model), rtol=1e-3, atol=1e-4)


def saved(tmp_path: Path, name: str, seed: int) -> Path:
    """An adapter with a head that was trained whole."""
    model = fresh("llama")
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / name)
    return tmp_path / name


def test_layers_trained_whole_pass_where_they_are_the_same_and_are_chosen_or_weighted_where_not(tmp_path: Path) -> None:
    one, two = saved(tmp_path, "one", 1), saved(tmp_path, "two", 2)
    plain = adapt(fresh("llama"), tmp_path / "plain", 3, r=2, target_modules=["q_proj"])
    head = f"{PREFIX}lm_head.weight"
    heads = [load_file(path / "adapter_model.safetensors")[head] for path in (one, two)]

    def mixed(name: str, parts: Sequence[Any], **options: Any) -> torch.Tensor:
        lorasmith.mix(parts, tmp_path / name, **options)
        config = config_of(tmp_path / name)
        assert config["modules_to_save"] == ["lm_head"]
        PeftModel.from_pretrained(fresh("llama"), str(tmp_path / name))
        return load_file(tmp_path / name / "adapter_model.safetensors")[head]

    assert torch.equal(mixed("m1", [one, (plain, 0.3)]), heads[0])
    assert torch.equal(mixed("m2", [(one, 0.25), (one, 0.75)]), heads[0])
    for parts in ([one, two], [(one, 0.5), plain], [(one, 0.5), (two, 0.5)]):
        with pytest.raises(lorasmith.AdapterMismatch, match=r"lm_head.weight.*--base BASE.*--prefer"):
            lorasmith.mix(parts, tmp_path / "no")
    assert torch.equal(mixed("m3", [one, two], prefer=str(two)), heads[1])
    fresh("llama").save_pretrained(tmp_path / "base")
    base = fresh("llama").lm_head.weight.detach().double()
    weighed = mixed("m4", [(one, 0.5), (two, 0.2)], base=tmp_path / "base")
    want = base + 0.5 * (heads[0].double() - base) + 0.2 * (heads[1].double() - base)
    assert weighed.dtype == torch.float32
    assert torch.allclose(weighed.double(), want, rtol=0, atol=1e-6)
    lorasmith.merge(tmp_path / "base", [(one, 0.5), (two, 0.2)], tmp_path / "merged")
    lorasmith.merge(tmp_path / "base", [tmp_path / "m4"], tmp_path / "merged-mix")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "merged-mix"))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
