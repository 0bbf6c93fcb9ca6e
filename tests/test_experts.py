"""Adapters of mixtures of experts: expert by expert or stacked, on bases that store them either way.

Adapters in other layouts are rewritten from one that PEFT has made; what they must give is W0 + s·B·A in float64.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import KINDS, MIXTURES, Kind
from generate import Tensors, write_json
from safetensors.torch import load_file, save_file
from test_models import adapted, require_answers, tensors_of

import lorasmith
from lorasmith import placing
from lorasmith.cli.merge import LAYOUTS as OFFERED

pytestmark = pytest.mark.filterwarnings("ignore")

RANK, SCALE = 3, 2 / 3


def edit(folder: Path, **changes: Any) -> Path:
    """Change keys of an adapter's config; ``...`` takes one out."""
    file = folder / "adapter_config.json"
    config = {**json.loads(file.read_text()), **changes}
    write_json(file, {key: value for key, value in config.items() if value is not ...})
    return folder


def copied(source: Path, folder: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """An adapter with other tensors and another config."""
    folder.mkdir(parents=True)
    save_file(
        {
            name: tensor.clone().contiguous()
            for name, tensor in change(load_file(source / "adapter_model.safetensors")).items()
        },
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    return edit(folder, **config)


@dataclass(frozen=True)
class Stack:
    """The factors of one stacked parameter in PEFT's own layout."""

    module: str
    parameter: str
    a: torch.Tensor
    b: torch.Tensor
    count: int

    def factors(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A of (r, m) and B of (n, r) of one expert (PEFT, ``ParamWrapper.get_delta_weight``)."""
        a = self.a.reshape(self.count, RANK, -1)[expert]
        return a, self.b.reshape(len(self.b), RANK, self.count)[:, :, expert]


def stacks(kind: Kind, tensors: Tensors, count: int = 4) -> Iterator[Stack]:
    first, last = (name for name in kind.parameters if "." not in name)
    for name, a in tensors.items():
        match = re.fullmatch(r"(base_model\.model\..*experts)(\.base_layer)?\.lora_A\.weight", name)
        if match is not None:
            b = tensors[name.replace("lora_A", "lora_B")]
            yield Stack(match[1], first if match[2] else last, a, b, count)


def one_by_one(kind: Kind, names: tuple[str, str, str], stem: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    """An adapter's tensors with those of stacks replaced by factors of every expert's layers, each as (out, in)."""

    def change(tensors: Tensors) -> Tensors:
        out = {name: tensor for name, tensor in tensors.items() if "experts." not in name}
        for one in stacks(kind, tensors):
            for expert in range(one.count):
                a, b = one.factors(expert)
                if kind.config == "Llama4TextConfig":  # the product is the transpose of the layer's weight
                    a, b = b.T, a.T
                half = len(b) // 2
                rows = {"down_proj": {names[2]: b}, "up_proj": {names[1]: b}}.get(one.parameter)
                if rows is None:
                    pairs = (b[::2], b[1::2]) if kind.config == "GptOssConfig" else (b[:half], b[half:])
                    rows = dict(zip(names[:2], pairs, strict=True))
                for layer, part in rows.items():
                    place = f"{stem(one.module)}.{expert}.{layer}"
                    out |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": part}
        return out

    return change


def same(one: Path, other: Path) -> bool:
    """Whether two merged models have the same tensors, to a rounding."""
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    return all(torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6) for name in ours)


GATED = [name for name, kind in MIXTURES.items() if kind.parameters[:2] == ("gate_up_proj", "down_proj")]


@pytest.mark.parametrize("name", GATED)
def test_an_adapter_made_expert_by_expert_gives_what_the_stacked_one_gives(tmp_path: Path, name: str) -> None:
    kind = MIXTURES[name]
    before, wanted = adapted(kind, tmp_path)
    names = kind.apart or ("gate_proj", "up_proj", "down_proj")
    disk = {"mixtral": "block_sparse_moe", "phimoe": "block_sparse_moe"}.get(name, "mlp")
    change = one_by_one(kind, names, lambda module: module.replace(".mlp.", f".{disk}."))
    copied(tmp_path / "adapter", tmp_path / "apart", change, target_parameters=..., target_modules=["gate_proj"])
    lorasmith.merge(tmp_path / "base", tmp_path / "apart", tmp_path / "out")
    require_answers(tmp_path, kind, wanted, before)
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "stacked")
    assert same(tmp_path / "out", tmp_path / "stacked")


def stacked_on_disk(base: Path, folder: Path) -> Path:
    """The same model with its experts stored as transformers runs them."""
    tensors = load_file(base / "model.safetensors")
    groups: dict[str, dict[int, torch.Tensor]] = {}
    for name in [name for name in tensors if ".experts." in name]:
        stem, number, layer = re.fullmatch(r"(.*)\.(\d+)\.(\w+)\.weight", name).groups()  # type: ignore[union-attr]
        groups.setdefault(f"{stem}.{layer}", {})[int(number)] = tensors.pop(name)
    whole = {name: torch.stack([group[at] for at in range(len(group))]) for name, group in groups.items()}
    for name in [name for name in whole if name.endswith("gate_proj")]:
        stem = name.removesuffix("gate_proj")
        tensors[f"{stem}gate_up_proj"] = torch.cat([whole[name], whole[f"{stem}up_proj"]], dim=1)
        tensors[f"{stem}down_proj"] = whole[f"{stem}down_proj"]
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((base / "config.json").read_text())
    return folder


@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "expert by expert"])
def test_a_base_whose_experts_are_stacked_takes_adapters_of_either_kind(tmp_path: Path, apart: bool) -> None:
    kind = MIXTURES["qwen3_moe"]
    before, wanted = adapted(kind, tmp_path)
    adapter = tmp_path / "adapter"
    if apart:
        change = one_by_one(kind, ("gate_proj", "up_proj", "down_proj"), lambda module: module)
        adapter = copied(adapter, tmp_path / "apart", change, target_parameters=...)
    (tmp_path / "base").rename(tmp_path / "first")
    stacked_on_disk(tmp_path / "first", tmp_path / "base")
    lorasmith.merge(tmp_path / "base", adapter, tmp_path / "out")
    require_answers(tmp_path, kind, wanted, before)


@pytest.mark.parametrize("adapter", ["stacked", "expert by expert", "trained whole"])
def test_experts_that_transformers_turns_on_loading_are_turned_back(tmp_path: Path, adapter: str) -> None:
    """As the Hub has Qwen3-VL-MoE: (experts, in, out) on disk, and (experts, out, in) in the model."""
    kind = MIXTURES["qwen3_vl_moe"]
    options = {"target_parameters": None, "modules_to_save": ["experts"]} if adapter == "trained whole" else {}
    before, wanted = adapted(kind, tmp_path, **options)
    file = tmp_path / "base" / "model.safetensors"
    turned = {
        name: tensor.transpose(1, 2).contiguous() if "mlp.experts" in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(turned, file, {"format": "pt"})
    if adapter == "expert by expert":
        change = one_by_one(kind, ("gate_proj", "up_proj", "down_proj"), lambda module: module)
        copied(tmp_path / "adapter", tmp_path / "apart", change, target_parameters=...)
        (tmp_path / "adapter").rename(tmp_path / "stacked")
        (tmp_path / "apart").rename(tmp_path / "adapter")
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    require_answers(tmp_path, kind, wanted, before)


def test_dora_on_experts_stored_the_other_way_walks_over_each_of_them(tmp_path: Path) -> None:
    """Its norms run over the rows of what is stored, which take several blocks."""
    generator = torch.Generator().manual_seed(1)
    stem = "model.layers.0.mlp.experts"
    base = {
        f"{stem}.gate_up_proj": torch.randn(3, 700, 1000, generator=generator),
        f"{stem}.down_proj": torch.randn(3, 500, 700, generator=generator),
    }
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    write_json(tmp_path / "base" / "config.json", {"model_type": "gpt_oss", "tie_word_embeddings": False})
    wanted = {name: tensor.double().clone() for name, tensor in base.items()}
    factors: Tensors = {}
    for expert, layer in ((0, "up_proj"), (2, "gate_proj"), (2, "down_proj"), (1, "down_proj")):
        stored = wanted[f"{stem}.{'down_proj' if layer == 'down_proj' else 'gate_up_proj'}"][expert]
        place = stored.T[{"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}.get(layer, slice(None))]
        rows, columns = place.shape
        a, b = torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator)
        magnitude = torch.rand(rows, generator=generator) * 30 + 1
        adapted = place + SCALE * b.double() @ a.double()
        place.copy_(magnitude.double()[:, None] * adapted / adapted.norm(dim=1, keepdim=True))
        module = f"base_model.model.{stem}.{expert}.{layer}"
        factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        factors[f"{module}.lora_magnitude_vector"] = magnitude
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2, "use_dora": True}
    write_json(tmp_path / "adapter" / "adapter_config.json", said)
    report = lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", threads=2)
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert torch.allclose(tensor.double(), wanted[name], rtol=1e-5, atol=1e-5)
    assert report.survival is not None
    assert report.survival.total == pytest.approx(1, abs=1e-6)


def test_a_bias_of_one_expert_goes_into_the_row_of_all(tmp_path: Path) -> None:
    """As gpt-oss has them: (experts, outputs), gate and up in turn."""
    MIXTURES["gpt_oss"].build().save_pretrained(tmp_path / "base")
    base = tensors_of(tmp_path / "base")
    stem = "model.layers.1.mlp.experts"
    factors: Tensors = {}
    wanted = {name: base[f"{stem}.{name}"].double().clone() for name in ("gate_up_proj_bias", "down_proj_bias")}
    for layer, rows, columns in (("gate_proj", 24, 32), ("up_proj", 24, 32), ("down_proj", 32, 24)):
        module = f"base_model.model.{stem}.2.{layer}"
        factors[f"{module}.lora_A.weight"] = torch.randn(RANK, columns)
        factors[f"{module}.lora_B.weight"] = torch.zeros(rows, RANK)
        bias = factors[f"{module}.lora_B.bias"] = torch.randn(rows)
        place = wanted["down_proj_bias" if layer == "down_proj" else "gate_up_proj_bias"][2]
        place[{"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}.get(layer, slice(None))] += SCALE * bias
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2, "lora_bias": True}
    write_json(tmp_path / "adapter" / "adapter_config.json", said)
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    for name, tensor in wanted.items():
        assert torch.allclose(merged[f"{stem}.{name}"].double(), tensor, rtol=1e-6, atol=1e-6)
        assert not torch.equal(merged[f"{stem}.{name}"], base[f"{stem}.{name}"])


# ----------------------------------------------------------------------------------------- layouts of the factors


def regrouped(tensors: Tensors) -> Tensors:
    """B as Unsloth wrote it: the columns of one expert together."""
    return {
        name: tensor.reshape(len(tensor), RANK, 4).transpose(1, 2).reshape(tensor.shape)
        if "experts" in name and "lora_B" in name
        else tensor
        for name, tensor in tensors.items()
    }


def turned(tensors: Tensors) -> Tensors:
    """Factors as PEFT 0.18 has them for (experts, out, in): A over the rows of the weight, B over its columns."""
    out = dict(tensors)
    for name in [name for name in tensors if "experts" in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name].reshape(4, RANK, -1), tensors[other].reshape(len(tensors[other]), RANK, 4)
        out[name] = b.permute(2, 1, 0).reshape(4 * RANK, -1)
        out[other] = a.permute(2, 1, 0).reshape(a.shape[2], -1)
    return out


LAYOUTS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any]]] = {
    "PEFT 0.18": (turned, {"peft_version": "0.18.1"}),
    "PEFT 0.19.0": (turned, {"peft_version": "0.19.0"}),
    "Unsloth, marked": (regrouped, {"lora_B_layout": "grouped_by_expert"}),
    "Unsloth, marked as PEFT": (lambda tensors: tensors, {"lora_B_layout": "rank_major"}),
    "Unsloth before it marked": (regrouped, {"auto_mapping": {"unsloth_fixed": True}}),
    "Unsloth since, unmarked elsewhere": (
        lambda tensors: tensors, {"auto_mapping": {"unsloth_fixed": True}, "lora_B_layout": "rank_major"}
    ),
}  # fmt: skip


SQUARE = Kind(
    "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**MIXTURES["qwen3_moe"].sizes, "moe_intermediate_size": 16},
    parameters=("gate_up_proj",),
)  # fmt: skip
"""Gate and up together are as tall as they are wide, and there is nothing else to tell which way round they are."""

IN_OUT = Kind(
    "GptOssForCausalLM", "GptOssConfig", {**MIXTURES["gpt_oss"].sizes, "intermediate_size": 32},
    parameters=("gate_up_proj", "down_proj"),
)  # fmt: skip
"""As gpt-oss itself is: what goes down is square, and what goes up is not."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [MIXTURES["qwen3_moe"], SQUARE], ids=["told by shape", "told by the config"])
def test_every_layout_of_stacked_factors_is_read_as_it_was_written(tmp_path: Path, layout: str, kind: Kind) -> None:
    before, wanted = adapted(kind, tmp_path)
    change, config = LAYOUTS[layout]
    copied(tmp_path / "adapter", tmp_path / "other", change, **config)
    lorasmith.merge(tmp_path / "base", tmp_path / "other", tmp_path / "out")
    require_answers(tmp_path, kind, wanted, before)


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", "0.21.2", ...], ids=str)
@pytest.mark.parametrize("change", [dict, turned], ids=["turned", "straight"])
def test_a_square_stack_is_the_way_round_that_the_one_beside_it_is(
    tmp_path: Path, change: Callable[[Tensors], Tensors], version: Any
) -> None:
    before, wanted = adapted(IN_OUT, tmp_path)
    copied(tmp_path / "adapter", tmp_path / "other", change, peft_version=version)
    lorasmith.merge(tmp_path / "base", tmp_path / "other", tmp_path / "out")
    require_answers(tmp_path, IN_OUT, wanted, before)


@pytest.mark.parametrize("version", ["0.19.0", "0.21.2", ...], ids=str)
@pytest.mark.parametrize("layout", ["peft", "peft-0.19.0"])
def test_a_square_stack_stored_as_in_out_is_refused_until_its_layout_is_said(
    tmp_path: Path, version: Any, layout: str
) -> None:
    """Which way round PEFT had it depends on whether transformers said so at that time."""
    kind = Kind(IN_OUT.model, IN_OUT.config, IN_OUT.sizes, parameters=("down_proj",))
    before, wanted = adapted(kind, tmp_path)
    copied(tmp_path / "adapter", tmp_path / "other", turned if layout == "peft-0.19.0" else dict, peft_version=version)
    with pytest.raises(lorasmith.AdapterMismatch, match=r"square.*--expert-layout"):
        lorasmith.merge(tmp_path / "base", tmp_path / "other", tmp_path / "out")
    lorasmith.merge(tmp_path / "base", tmp_path / "other", tmp_path / "out", expert_layout=layout)
    require_answers(tmp_path, kind, wanted, before)


def test_a_square_stack_of_an_old_release_needs_no_saying(tmp_path: Path) -> None:
    kind = Kind(IN_OUT.model, IN_OUT.config, IN_OUT.sizes, parameters=("down_proj",))
    before, wanted = adapted(kind, tmp_path)
    edit(tmp_path / "adapter", peft_version="0.17.1")
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    require_answers(tmp_path, kind, wanted, before)


@pytest.mark.parametrize("layout", ["peft", "peft-0.19.0", "peft-0.18", "unsloth"])
def test_a_layout_that_nothing_tells_is_refused_until_it_is_said(tmp_path: Path, layout: str) -> None:
    before, wanted = adapted(SQUARE, tmp_path)
    change = {"peft": dict, "unsloth": regrouped}.get(layout, turned)
    version = "0.21.2" if layout == "unsloth" else ...
    copied(tmp_path / "adapter", tmp_path / "other", change, peft_version=version)
    if layout != "unsloth":
        with pytest.raises(lorasmith.AdapterMismatch, match=r"square.*--expert-layout"):
            lorasmith.merge(tmp_path / "base", tmp_path / "other", tmp_path / "out")
    lorasmith.merge(tmp_path / "base", tmp_path / "other", tmp_path / "out", expert_layout=layout)
    require_answers(tmp_path, SQUARE, wanted, before)


def test_an_unknown_layout_of_b_is_refused(tmp_path: Path) -> None:
    adapted(MIXTURES["qwen3_moe"], tmp_path)
    edit(tmp_path / "adapter", lora_B_layout="woven")
    with pytest.raises(lorasmith.AdapterMismatch, match=r"woven.*--expert-layout"):
        lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_the_command_line_offers_the_layouts_that_there_are() -> None:
    assert tuple(OFFERED) == placing.LAYOUTS


def test_an_unknown_name_of_a_layout_is_a_wrong_option(tmp_path: Path) -> None:
    adapted(MIXTURES["qwen3_moe"], tmp_path)
    with pytest.raises(lorasmith.BadOption, match="woven"):
        lorasmith.plan(tmp_path / "base", tmp_path / "adapter", expert_layout="woven")


# ------------------------------------------------------------------------------- only some, spread out, or damaged


def test_only_the_experts_that_an_adapter_names_change(tmp_path: Path) -> None:
    kind = MIXTURES["qwen3_moe"]
    adapted(kind, tmp_path)
    whole = one_by_one(kind, ("gate_proj", "up_proj", "down_proj"), lambda module: module)

    def some(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in whole(tensors).items() if "experts.2.gate_proj" in name}

    copied(tmp_path / "adapter", tmp_path / "some", some, target_parameters=...)
    stacked_on_disk(tmp_path / "base", tmp_path / "stacked")
    factors = load_file(tmp_path / "some" / "adapter_model.safetensors")
    for base in ("base", "stacked"):
        lorasmith.merge(tmp_path / base, tmp_path / "some", tmp_path / f"{base} out")
        before, after = tensors_of(tmp_path / base), tensors_of(tmp_path / f"{base} out")
        for name, tensor in before.items():
            wanted = tensor.double()
            stem = name.partition(".experts.")[0] + ".experts.2.gate_proj"
            b = factors.get(f"base_model.model.{stem}.lora_B.weight")
            if b is not None and (name == f"{stem}.weight" or name.endswith("gate_up_proj")):
                delta = SCALE * b.double() @ factors[f"base_model.model.{stem}.lora_A.weight"].double()
                (wanted if wanted.ndim == 2 else wanted[2, :24]).add_(delta)
                assert not torch.equal(after[name], tensor)
            assert torch.allclose(after[name].double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_experts_of_one_layer_may_be_in_several_shards(tmp_path: Path) -> None:
    kind = MIXTURES["mixtral"]
    before, wanted = adapted(kind, tmp_path)
    model = kind.build()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 4
    lorasmith.merge(tmp_path / "shards", tmp_path / "adapter", tmp_path / "out")
    require_answers(tmp_path, kind, wanted, before)


def test_a_layer_beside_the_experts_is_not_taken_for_one_of_them(tmp_path: Path) -> None:
    """Shared experts and the router of DeepSeek, under their own names."""
    kind = MIXTURES["deepseek_v3"]
    kind.build().save_pretrained(tmp_path / "base")
    base = tensors_of(tmp_path / "base")
    modules = [f"model.layers.1.mlp.{one}" for one in ("shared_experts.gate_proj", "shared_experts.down_proj", "gate")]
    generator = torch.Generator().manual_seed(1)
    factors: Tensors = {}
    for module in modules:
        rows, columns = base[f"{module}.weight"].shape
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    write_json(tmp_path / "adapter" / "adapter_config.json", {"peft_type": "LORA", "r": RANK, "lora_alpha": 2})
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    for name, after in tensors_of(tmp_path / "out").items():
        wanted = base[name].double()
        module = name.removesuffix(".weight")
        if module in modules:
            b, a = (factors[f"base_model.model.{module}.lora_{one}.weight"].double() for one in "BA")
            wanted = wanted + SCALE * b @ a
        assert torch.allclose(after.double(), wanted, rtol=1e-6, atol=1e-6)


def test_tensors_that_transformers_leaves_aside_are_kept(tmp_path: Path) -> None:
    """The layer for predicting several tokens at once (MTP), behind the model's last."""
    adapted(MIXTURES["glm4_moe"], tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    more = {f"model.layers.92.{name}": torch.randn(4, 4) for name in ("eh_proj.weight", "mlp.experts.0.up_proj.weight")}
    save_file({**tensors, **more}, file, {"format": "pt"})
    lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    assert all(torch.equal(merged[name], tensor) for name, tensor in more.items())


DAMAGE: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "other experts": (
        lambda tensors: {name: _fewer(name, tensor) for name, tensor in tensors.items()}, {}, r"3 experts.* 4 at"
    ),
    "half an expert": (
        lambda tensors: {name: tensor[:-1] if "experts.lora_A" in name else tensor for name, tensor in tensors.items()},
        {}, r"11 rows in A",
    ),
    "one wrapper missing": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "base_layer" not in name},
        {}, r"1 parameters.*target_parameters",
    ),
    "no names": (dict, {"target_parameters": ...}, r"base_layer.*target_parameters"),
    "other names": (dict, {"target_parameters": ["gate_up_proj", "gates"]}, r"gates"),
    "only B": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "experts.lora_A" not in name}, {},
        r"lora_B",
    ),
    "another width": (
        lambda tensors: {
            name: tensor[:, :-2] if "experts.lora_A" in name else tensor for name, tensor in tensors.items()
        },
        {}, r"do not fit experts of shape \[32, 24\]",
    ),
    "not a list": (dict, {"target_parameters": {"gate_up_proj": 1}}, r"target_parameters"),
}  # fmt: skip


def _fewer(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if "experts" not in name:
        return tensor
    return tensor[: 3 * RANK] if "lora_A" in name else tensor[:, : 3 * RANK]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_stack_that_does_not_fit_is_refused(tmp_path: Path, damage: str) -> None:
    change, config, says = DAMAGE[damage]
    kind = Kind(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", MIXTURES["qwen3_moe"].sizes, parameters=("gate_up_proj", "down_proj")
    )
    adapted(kind, tmp_path)
    copied(tmp_path / "adapter", tmp_path / "damaged", change, **config)
    with pytest.raises(lorasmith.LorasmithError, match=says):
        lorasmith.merge(tmp_path / "base", tmp_path / "damaged", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_parameter_that_was_to_be_trained_and_has_no_factors_is_told(tmp_path: Path) -> None:
    kind = Kind(MIXTURES["qwen3_moe"].model, MIXTURES["qwen3_moe"].config, MIXTURES["qwen3_moe"].sizes)
    before, wanted = adapted(kind, tmp_path)
    edit(tmp_path / "adapter", target_parameters=["mlp.experts.gate_up_proj"])
    report = lorasmith.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert any("mlp.experts.gate_up_proj" in warning for warning in report.warnings)
    require_answers(tmp_path, kind, wanted, before)


def test_one_expert_too_many_is_refused(tmp_path: Path) -> None:
    kind = MIXTURES["gpt_oss"]
    adapted(kind, tmp_path)

    def change(tensors: Tensors) -> Tensors:
        names = ("gate_proj", "up_proj", "down_proj")
        whole = one_by_one(kind, names, lambda module: module)(tensors)
        return {name.replace("experts.3.", "experts.4."): tensor for name, tensor in whole.items()}

    copied(tmp_path / "adapter", tmp_path / "other", change, target_parameters=...)
    with pytest.raises(lorasmith.AdapterMismatch, match=r"experts\.4.*only 4 experts"):
        lorasmith.merge(tmp_path / "base", tmp_path / "other", tmp_path / "out")


def test_stacked_experts_of_a_model_that_nobody_knows_are_not_taken_apart(tmp_path: Path) -> None:
    kind = MIXTURES["qwen3_moe"]
    adapted(kind, tmp_path)
    change = one_by_one(kind, ("gate_proj", "up_proj", "down_proj"), lambda module: module)
    copied(tmp_path / "adapter", tmp_path / "apart", change, target_parameters=...)
    base = stacked_on_disk(tmp_path / "base", tmp_path / "stacked")
    config = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", {**config, "model_type": "own_moe", "architectures": ["OwnForCausalLM"]})
    with pytest.raises(lorasmith.AdapterMismatch, match=r"own_moe arranges gate and up"):
        lorasmith.merge(base, tmp_path / "apart", tmp_path / "out")


def test_two_modules_for_the_same_rows_are_refused(tmp_path: Path) -> None:
    """An adapter that was put together of a stacked and an expert's own factors."""
    kind = KINDS["gpt_oss"]
    adapted(kind, tmp_path)
    change = one_by_one(kind, ("gate_proj", "up_proj", "down_proj"), lambda module: module)

    def both(tensors: Tensors) -> Tensors:
        return {**tensors, **{name: one for name, one in change(tensors).items() if "experts.1.up_proj" in name}}

    copied(tmp_path / "adapter", tmp_path / "both", both)
    with pytest.raises(lorasmith.AdapterMismatch, match=r"two of its modules.*gate_up_proj"):
        lorasmith.merge(tmp_path / "base", tmp_path / "both", tmp_path / "out")
