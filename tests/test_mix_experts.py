"""Mixing adapters of stacked experts (PEFT's ``target_parameters``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MIXTURES, Kind
from generate import Tensors, sha256
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_models import answers, draw, reloaded, tensors_of

import lorasmith
from lorasmith.combining.draws import drawn, key

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")


def pair(kind: Kind, folder: Path, **options: Any) -> list[tuple[Path, float]]:
    """A base in ``folder``, and two adapters of different ranks on it."""
    kind.build().save_pretrained(folder / "base")
    parts = []
    for number, (rank, weight) in enumerate(((3, 0.7), (2, -0.4))):
        model = kind.build()
        model.name_or_path = "base"
        given = {"r": rank, "lora_alpha": 2, "target_modules": ["q_proj"], "target_parameters": list(kind.parameters)}
        wrapped = get_peft_model(model, LoraConfig(**{**given, **options}))
        draw(wrapped, seed=number)
        wrapped.save_pretrained(folder / str(number))
        parts.append((folder / str(number), weight))
    return parts


def close(one: Tensors, other: Tensors, limit: float = 2e-6) -> bool:
    assert one.keys() == other.keys()
    return all(float((one[name] - other[name]).norm()) <= limit * float(one[name].norm()) for name in one)


@pytest.mark.parametrize("name", NAMES)
def test_a_mix_of_stacks_is_what_its_adapters_do_and_peft_loads_it(tmp_path: Path, name: str) -> None:
    kind = MIXTURES[name]
    parts = pair(kind, tmp_path)
    report = lorasmith.mix(parts, tmp_path / "mixed")
    assert {module.rank_out for module in report.modules} == {5}
    lorasmith.merge(tmp_path / "base", parts, tmp_path / "at-once")
    lorasmith.merge(tmp_path / "base", tmp_path / "mixed", tmp_path / "by-mix")
    assert close(tensors_of(tmp_path / "at-once"), tensors_of(tmp_path / "by-mix"))
    base = tensors_of(tmp_path / "base")
    assert sum(not torch.equal(one, base[key]) for key, one in tensors_of(tmp_path / "at-once").items()) >= 4
    loaded = PeftModel.from_pretrained(kind.build(), str(tmp_path / "mixed")).eval()
    stored = load_file(tmp_path / "mixed" / "adapter_model.safetensors")
    known = {key.replace(".default", "") for key in loaded.state_dict() if "lora_" in key}
    assert known == set(stored)
    wanted = answers(reloaded(tmp_path / "by-mix"), kind.inputs())
    assert (answers(loaded, kind.inputs()) - wanted).norm() / wanted.norm() < 1e-4
    assert (answers(kind.build(), kind.inputs()) - wanted).norm() / wanted.norm() > 1e-2


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.8}, {"method": "ties"},
                                     {"method": "dare", "space": "dense", "rank": 4}])  # fmt: skip
def test_every_expert_is_recompressed_for_itself(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    kind = MIXTURES[name]
    parts = pair(kind, tmp_path, target_modules=[])
    report = lorasmith.mix(parts, tmp_path / "mixed", **options)
    experts = [module for module in report.modules if "[" in module.module]
    assert len(experts) == 2 * 2 * 4
    PeftModel.from_pretrained(kind.build(), str(tmp_path / "mixed"))
    exact = [expert_deltas(path, weight) for path, weight in parts]
    got = expert_deltas(tmp_path / "mixed", 1.0)
    if "method" in options:
        require_rule(parts, exact, got, options)
        return
    for place, delta in got.items():
        want = exact[0][place] + exact[1][place]
        (module,) = (one for one in experts if one.module == f"{place[0]}[{place[1]}]")
        values = torch.linalg.svdvals(want)
        gap = float((delta - want).norm() / want.norm())
        assert module.error == pytest.approx(gap, rel=1e-4, abs=1e-6)
        assert gap == pytest.approx(float(values[module.rank_out :].norm() / values.norm()), rel=1e-4, abs=1e-6)


def require_rule(
    parts: list[tuple[Path, float]],
    exact: list[dict[tuple[str, int], torch.Tensor]],
    got: dict[tuple[str, int], torch.Tensor],
    options: dict[str, Any],
) -> None:
    """Of ``dare``, what is drawn of every expert's elements; of any rule, that experts stay apart."""
    digests = [sha256(path / "adapter_model.safetensors") for path, _ in parts]
    for (name, expert), delta in got.items():
        deltas = [one[name, expert] for one in exact]
        if options["method"] == "dare":
            names = [key(0, digest, f"{name}[{expert}]") for digest in digests]
            rows, columns = delta.shape
            keep = [drawn(one, slice(0, rows), slice(0, columns), columns, 0.5) for one in names]
            want = sum(2 * one.where(mask, 0.0) for one, mask in zip(deltas, keep, strict=True))
            values = torch.linalg.svdvals(want)
            gap = float((delta - want).norm() / want.norm())
            assert gap == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-3)
        else:
            inputs = torch.linalg.svd(torch.cat(deltas))[2][:5]
            assert float((delta - delta @ inputs.T @ inputs).norm()) < 1e-5 * float(delta.norm())
            assert float(delta.norm()) > 0


def expert_deltas(path: Path, weight: float) -> dict[tuple[str, int], torch.Tensor]:
    """s·B·A of every expert, by the parameter's path (PEFT, ``ParamWrapper.get_delta_weight``)."""
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if "experts" not in name or "lora_A" not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        root = module.removesuffix(".base_layer")
        parameter = f"{root}.{'gate_up_proj' if module != root else 'down_proj'}"
        rank = config["rank_pattern"].get(parameter, config["r"])
        alpha = config["alpha_pattern"].get(parameter, config["lora_alpha"])
        b = tensors[name.replace("lora_A", "lora_B")].double()
        count = len(a) // rank
        for expert in range(count):
            rows = a.double().reshape(count, rank, -1)[expert]
            found[parameter, expert] = weight * alpha / rank * b.reshape(len(b), rank, count)[:, :, expert] @ rows
    return found


def test_stacks_are_resized_and_taken_over_as_they_are(tmp_path: Path) -> None:
    kind = MIXTURES["qwen3_moe"]
    (one, _), _ = pair(kind, tmp_path)
    lorasmith.mix(one, tmp_path / "same")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (one, tmp_path / "same"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    report = lorasmith.resize(one, tmp_path / "small", rank=1)
    assert {module.rank_out for module in report.modules} == {1}
    PeftModel.from_pretrained(kind.build(), str(tmp_path / "small"))
    lorasmith.merge(tmp_path / "base", tmp_path / "small", tmp_path / "out")
    assert (answers(reloaded(tmp_path / "out"), kind.inputs()) - answers(kind.build(), kind.inputs())).norm() > 0


def test_columns_grouped_by_expert_are_read_as_such(tmp_path: Path) -> None:
    kind = MIXTURES["qwen3_moe"]
    parts = pair(kind, tmp_path)
    (one, weight), other = parts
    file = one / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "experts" in name and "lora_B" in name:
            tensors[name] = tensor.reshape(len(tensor), 3, 4).transpose(1, 2).flatten(1).contiguous()
    grouped = tmp_path / "grouped"
    grouped.mkdir()
    save_file(tensors, grouped / "adapter_model.safetensors")
    config = json.loads((one / "adapter_config.json").read_text())
    (grouped / "adapter_config.json").write_text(json.dumps({**config, "lora_B_layout": "grouped_by_expert"}))
    lorasmith.mix([(one, weight), other], tmp_path / "mixed")
    lorasmith.mix([(grouped, weight), other], tmp_path / "mixed-grouped")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("mixed", "mixed-grouped"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    lorasmith.resize(grouped, tmp_path / "resized", rank=3)
    assert "lora_B_layout" not in json.loads((tmp_path / "resized" / "adapter_config.json").read_text())


def test_stacks_of_other_parameters_or_of_another_layout_are_not_mixed(tmp_path: Path) -> None:
    kind = MIXTURES["qwen3_moe"]
    (one, _), _ = pair(kind, tmp_path)
    model = kind.build()
    model.name_or_path = "base"
    options = {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["down_proj"]}
    get_peft_model(model, LoraConfig(**options)).save_pretrained(tmp_path / "few")
    with pytest.raises(lorasmith.AdapterMismatch, match=r"factors of experts.*lorasmith merge"):
        lorasmith.mix([one, tmp_path / "few"], tmp_path / "mixed")
    old = tmp_path / "1"
    config = json.loads((old / "adapter_config.json").read_text())
    (old / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.18.0"}))
    with pytest.raises(lorasmith.AdapterMismatch, match=r"versions of PEFT"):
        lorasmith.mix([one, old], tmp_path / "mixed")
    with pytest.raises(lorasmith.BadOption, match="--params cannot be kept to with stacked experts"):
        lorasmith.resize(one, tmp_path / "mixed", params=10**6)
    assert not (tmp_path / "mixed").exists()


def test_a_layer_of_another_rank_beside_stacks_is_no_stack(tmp_path: Path) -> None:
    kind = MIXTURES["qwen3_moe"]
    options = {"rank_pattern": {"q_proj": 6, "mlp.gate.weight": 5}, "target_parameters": [*kind.parameters]}
    parts = pair(kind, tmp_path, **options)
    report = lorasmith.mix(parts, tmp_path / "mixed", energy=0.8)
    assert not any("q_proj[" in module.module or "q_proj." in module.module for module in report.modules)
    lorasmith.mix(parts, tmp_path / "exact")
    lorasmith.merge(tmp_path / "base", parts, tmp_path / "at-once")
    lorasmith.merge(tmp_path / "base", tmp_path / "exact", tmp_path / "by-mix")
    assert close(tensors_of(tmp_path / "at-once"), tensors_of(tmp_path / "by-mix"))
    lorasmith.merge(tmp_path / "base", tmp_path / "mixed", tmp_path / "by-cut-mix")


def test_an_adapter_without_stacks_is_mixed_with_one_that_has_some(tmp_path: Path) -> None:
    kind = MIXTURES["gpt_oss"]
    (one, weight), _ = pair(kind, tmp_path)
    model = kind.build()
    model.name_or_path = "base"
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    draw(wrapped, seed=9)
    wrapped.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    (tmp_path / "plain" / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": []}))
    parts = [(one, weight), (tmp_path / "plain", 0.5)]
    lorasmith.mix(parts, tmp_path / "mixed")
    lorasmith.merge(tmp_path / "base", parts, tmp_path / "at-once")
    lorasmith.merge(tmp_path / "base", tmp_path / "mixed", tmp_path / "by-mix")
    assert close(tensors_of(tmp_path / "at-once"), tensors_of(tmp_path / "by-mix"))


def test_weights_reach_a_parameter_by_its_own_name(tmp_path: Path) -> None:
    kind = MIXTURES["qwen3_moe"]
    (one, _), _ = pair(kind, tmp_path)
    report = lorasmith.mix([(one, 1.0)], dry_run=True, weights=["gate_up_proj=0"])
    assert not any("gate_up_proj" in module.module for module in report.modules)
    assert any("down_proj" in module.module for module in report.modules)
