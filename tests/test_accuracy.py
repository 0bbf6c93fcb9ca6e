"""How exact a merge is: element by element against float64, and what the report says about what rounding took."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from generate import (
    LARGE,
    MODULES,
    SMALL,
    Lora,
    Sizes,
    Tensors,
    Term,
    bases,
    exact,
    half_unit,
    mixed,
    raw_bytes,
    tree,
    write_adapter,
    write_base,
    write_json,
    write_unaligned,
)
from safetensors.torch import load_file, save_file

import lorasmith

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}

RANKS = (4, 8, 16, 32, 64, 96, 128)
RATIOS = (0.001, 0.01, 0.1, 1.0)


def weighted(loras: Sequence[tuple[Lora, float]], name: str) -> list[tuple[Term, float]]:
    return [(lora.terms[name], weight) for lora, weight in loras if name in lora.terms]


def require_one_rounding(merged: Tensors, base: Tensors, loras: Sequence[tuple[Lora, float]]) -> None:
    """Every touched element is within half a unit in its last place and the error of a float32 sum."""
    touched = {name for lora, _ in loras for name in lora.terms}
    assert touched
    for name in touched:
        right, slack = exact(base[name], weighted(loras, name))
        off = (merged[name].double() - right).abs()
        assert (off <= half_unit(merged[name]) + slack).all(), (
            f"{name}: {(off / half_unit(merged[name])).max()} half ulp"
        )


def misrounded(merged: Tensors, base: Tensors, lora: Lora) -> tuple[int, int]:
    """Elements that are not the value nearest to the exact one, and all elements that changed."""
    wrong = total = 0
    for name, term in lora.terms.items():
        right, _ = exact(base[name], [(term, 1.0)])
        wrong += int((merged[name] != nearest(right, merged[name].dtype)).sum())
        total += right.numel()
    return wrong, total


def nearest(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 rounded once, to nearest, ties to even: of both neighbours the nearer."""
    near = values.to(dtype)
    unit = 2 * half_unit(near)
    low = torch.floor(values / unit) * unit
    high = low + unit
    even = torch.remainder(torch.floor(values / unit), 2) == 0
    take_low = (values - low < high - values) | ((values - low == high - values) & even)
    return torch.where(take_low, low, high).to(dtype)


def projection(merged: Tensors, base: Tensors, lora: Lora, names: Sequence[str] | None = None) -> float:
    """‹Ŵ−W0, ΔW›/‖ΔW‖² over whole tensors, in float64."""
    kept = size = 0.0
    for name in names or list(lora.terms):
        delta = exact(base[name], [(lora.terms[name], 1.0)])[0] - base[name].double()
        kept += float(((merged[name].double() - base[name].double()) * delta).sum())
        size += float(delta.square().sum())
    return kept / size


# ------------------------------------------------------------------------------------------------ one rounding


@pytest.fixture(scope="module")
def ranks_and_ratios() -> tuple[Sizes, dict[str, int], dict[str, float]]:
    """Every rank with every size of delta: one per kind of layer, the other per layer."""
    sizes = Sizes(hidden=160, inner=419, key=48, vocabulary=64, layers=len(RATIOS))
    ranks, ratios = {}, {}
    for layer, ratio in enumerate(RATIOS):
        for module, rank in zip(MODULES, RANKS, strict=True):
            ranks[f"model.layers.{layer}.{module}"] = rank
            ratios[f"model.layers.{layer}.{module}"] = ratio
    return sizes, ranks, ratios


@pytest.mark.parametrize("factors", FLOATS, ids=NAMES.get)
@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.get)
def test_every_element_is_rounded_once_at_every_rank_and_size_of_delta(
    tmp_path: Path,
    ranks_and_ratios: tuple[Sizes, dict[str, int], dict[str, float]],
    dtype: torch.dtype,
    factors: torch.dtype,
) -> None:
    sizes, ranks, ratios = ranks_and_ratios
    base = bases(sizes, dtype)
    folder = write_base(tmp_path / "base", base, sizes=sizes)
    lora = write_adapter(tmp_path / "adapter", base, ranks=ranks, ratios=ratios, dtype=factors)
    lorasmith.merge(folder, lora.folder, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert len(lora.terms) == len(RANKS) * len(RATIOS)
    require_one_rounding(merged, base, [(lora, 1.0)])


@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.get)
def test_weights_of_more_than_one_block_are_rounded_once_everywhere(tmp_path: Path, dtype: torch.dtype) -> None:
    base = bases(LARGE, dtype)
    folder = write_base(tmp_path / "base", base, sizes=LARGE, shards=2)
    lora = write_adapter(tmp_path / "adapter", base, rank=32, targets=("mlp.gate_proj", "mlp.down_proj", "lm_head"))
    lorasmith.merge(folder, lora.folder, tmp_path / "out")
    merged = _load(tmp_path / "out")
    assert max(merged[name].numel() for name in lora.terms) > 1 << 19
    require_one_rounding(merged, base, [(lora, 1.0)])


@pytest.mark.parametrize("ratio", [0.001, 0.003, 0.01])
def test_a_small_delta_in_bfloat16_is_misrounded_in_at_most_2_of_100000_elements(tmp_path: Path, ratio: float) -> None:
    base = bases(LARGE, torch.bfloat16)
    folder = write_base(tmp_path / "base", base, sizes=LARGE)
    lora = write_adapter(tmp_path / "adapter", base, ratio=ratio)
    lorasmith.merge(folder, lora.folder, tmp_path / "out")
    wrong, total = misrounded(load_file(tmp_path / "out" / "model.safetensors"), base, lora)
    assert total > 4_000_000
    assert wrong <= 2 * total / 100_000


@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.get)
def test_several_adapters_are_summed_before_the_one_rounding(tmp_path: Path, dtype: torch.dtype) -> None:
    base = bases(SMALL, dtype)
    folder = write_base(tmp_path / "base", base)
    loras = [
        (write_adapter(tmp_path / "one", base, rank=4, ratio=0.3, seed=1), 0.7),
        (write_adapter(tmp_path / "two", base, rank=64, ratio=0.02, seed=2, dtype=torch.bfloat16), -1.5),
        (write_adapter(tmp_path / "three", base, targets=MODULES[:2], rank=8, rslora=True, seed=3), 0.25),
        (write_adapter(tmp_path / "four", base, targets=MODULES[3:], rank=16, dtype=torch.float16, seed=4), 1.0),
    ]
    lorasmith.merge(folder, [(lora.folder, weight) for lora, weight in loras], tmp_path / "out")
    require_one_rounding(load_file(tmp_path / "out" / "model.safetensors"), base, loras)


def test_adapters_that_cancel_each_other_give_the_base_back(tmp_path: Path) -> None:
    """Rounding after every adapter, instead of once, would leave traces in most elements."""
    base = bases(SMALL, torch.bfloat16)
    folder = write_base(tmp_path / "base", base)
    lora = write_adapter(tmp_path / "adapter", base, rank=16, ratio=0.5)
    lorasmith.merge(folder, [(lora.folder, 1.0), (lora.folder, -1.0)], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    require_one_rounding(merged, base, [(lora, 1.0), (lora, -1.0)])
    different = sum(int((merged[name] != base[name]).sum()) for name in lora.terms)
    assert different <= 2 * sum(base[name].numel() for name in lora.terms) / 1000


def test_weights_in_tensors_that_begin_off_every_border_are_rounded_once(tmp_path: Path) -> None:
    base = {"model.mask": torch.arange(13, dtype=torch.uint8), **mixed(LARGE)}
    file = write_unaligned(tmp_path / "base.safetensors", base)
    write_json(tmp_path / "config.json", {"tie_word_embeddings": False})
    lora = write_adapter(tmp_path / "adapter", base, targets=(*MODULES, "lm_head"), ratio=0.05)
    lorasmith.merge(file, lora.folder, tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert len(lora.terms) == 15
    require_one_rounding(merged, base, [(lora, 1.0)])
    for name in base.keys() - lora.terms.keys():
        assert raw_bytes(merged[name]) == raw_bytes(base[name])


# ------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("target", FLOATS, ids=NAMES.get)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_dtype_converts_every_float_and_nothing_else(tmp_path: Path, target: torch.dtype, shards: int) -> None:
    base = mixed(LARGE)
    folder = write_base(tmp_path / "base", base, sizes=LARGE, shards=shards, dtype="float64")
    lora = write_adapter(tmp_path / "adapter", base, targets=("q_proj", "gate_proj"))
    report = lorasmith.merge(folder, lora.folder, tmp_path / "out", dtype=NAMES[target])
    merged = _load(tmp_path / "out")
    assert sorted(merged) == sorted(base)
    require_one_rounding(merged, base, [(lora, 1.0)])
    converted = 0
    for name in base.keys() - lora.terms.keys():
        wanted = base[name].to(target) if base[name].is_floating_point() else base[name]
        converted += wanted.dtype != base[name].dtype and wanted.numel() > 0
        assert merged[name].dtype == wanted.dtype
        assert raw_bytes(merged[name]) == raw_bytes(wanted), name
    assert report.tensors_converted == converted > 0
    assert all(merged[name].dtype == target for name in lora.terms)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**json.loads((folder / "config.json").read_text()), "torch_dtype": NAMES[target]}
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())


def test_keep_gives_every_tensor_the_dtype_it_had(tmp_path: Path) -> None:
    base = mixed()
    lora = write_adapter(tmp_path / "adapter", base)
    lorasmith.merge(write_base(tmp_path / "base", base), lora.folder, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in merged.items()} == {
        name: tensor.dtype for name, tensor in base.items()
    }
    require_one_rounding(merged, base, [(lora, 1.0)])


def test_a_float64_weight_is_summed_in_float64(tmp_path: Path) -> None:
    base = {name: tensor.double() for name, tensor in bases(SMALL, torch.float32).items()}
    lora = write_adapter(tmp_path / "adapter", base)
    lorasmith.merge(write_base(tmp_path / "base", base), lora.folder, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, term in lora.terms.items():
        right, _ = exact(base[name], [(term, 1.0)])
        assert torch.allclose(merged[name], right, rtol=1e-13, atol=1e-16)


# ----------------------------------------------------------------------------------------------------- survival


@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.get)
@pytest.mark.parametrize("ratio", [0.0005, 0.001, 0.002, 0.005, 0.02])
def test_the_reported_survival_is_the_projection_in_float64(tmp_path: Path, dtype: torch.dtype, ratio: float) -> None:
    base = bases(LARGE, dtype)
    folder = write_base(tmp_path / "base", base, sizes=LARGE, shards=2)
    lora = write_adapter(tmp_path / "adapter", base, ratio=ratio)
    report = lorasmith.merge(folder, lora.folder, tmp_path / "out")
    right = projection(_load(tmp_path / "out"), base, lora)
    assert report.survival is not None
    assert report.survival.total == pytest.approx(right, abs=0.02)
    assert report.survival.relative_norm == pytest.approx(ratio, rel=0.1)
    assert report.survival.tensors == len(lora.terms)
    assert 100_000 < report.survival.elements < sum(base[name].numel() for name in lora.terms)
    warned = [text for text in report.warnings if "--dtype float32" in text]
    assert len(warned) == (right < 0.9)
    assert (dtype == torch.bfloat16 and ratio <= 0.001) <= bool(warned)


def test_bfloat16_keeps_about_half_of_a_delta_of_a_thousandth(tmp_path: Path) -> None:
    base = bases(LARGE, torch.bfloat16)
    folder = write_base(tmp_path / "base", base, sizes=LARGE)
    lora = write_adapter(tmp_path / "adapter", base, ratio=0.001)
    report = lorasmith.merge(folder, lora.folder, tmp_path / "out")
    assert report.survival is not None
    assert 0.4 < report.survival.total < 0.6
    (warning,) = [text for text in report.warnings if "--dtype" in text]
    assert f"{report.survival.total:.0%}" in warning
    finer = lorasmith.merge(folder, lora.folder, tmp_path / "finer", dtype="float32")
    assert finer.survival.total == pytest.approx(1, abs=1e-4)
    assert not finer.warnings


def test_the_worst_tensors_are_named_with_their_own_survival(tmp_path: Path) -> None:
    base = bases(LARGE, torch.bfloat16)
    folder = write_base(tmp_path / "base", base, sizes=LARGE)
    faint = {"model.layers.1.mlp.up_proj": 0.0004, "model.layers.0.self_attn.o_proj": 0.0008}
    lora = write_adapter(tmp_path / "adapter", base, ratio=0.02, ratios=faint)
    report = lorasmith.merge(folder, lora.folder, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert report.survival.total > 0.9
    for found, (module, ratio) in zip(report.survival.worst, faint.items(), strict=False):
        assert found.tensor == f"{module}.weight"
        assert found.survival == pytest.approx(projection(merged, base, lora, [found.tensor]), abs=0.1)
        assert found.survival < 0.6
        assert found.relative_norm == pytest.approx(ratio, rel=0.1)


def test_the_survival_counts_all_adapters_together(tmp_path: Path) -> None:
    """Two deltas of a thousandth that add up to one of a hundredth of that leave less than either alone."""
    base = bases(LARGE, torch.bfloat16)
    folder = write_base(tmp_path / "base", base, sizes=LARGE)
    lora = write_adapter(tmp_path / "adapter", base, ratio=0.01)
    report = lorasmith.merge(folder, [(lora.folder, 1.0), (lora.folder, -0.95)], tmp_path / "out")
    assert report.survival.relative_norm == pytest.approx(0.0005, rel=0.1)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert report.survival.total == pytest.approx(20 * projection(merged, base, lora), abs=0.02)


def test_a_delta_on_a_base_of_zeros_is_of_no_share_of_it(tmp_path: Path) -> None:
    base = bases()
    lora = write_adapter(tmp_path / "adapter", base, targets=("q_proj",))
    folder = write_base(tmp_path / "base", {name: torch.zeros_like(weight) for name, weight in base.items()})
    report = lorasmith.merge(folder, lora.folder, tmp_path / "out")
    assert report.survival.relative_norm is None
    assert {one.relative_norm for one in report.survival.worst} == {None}
    json.loads(json.dumps(report.to_dict(), allow_nan=False))


def test_a_delta_too_large_to_be_measured_is_reported(tmp_path: Path) -> None:
    base = bases(dtype=torch.float32)
    folder, lora = write_base(tmp_path / "base", base), write_adapter(tmp_path / "adapter", base, ratio=1.0)
    report = lorasmith.merge(folder, (lora.folder, 1e30), tmp_path / "out")
    assert report.survival is None
    assert any("too large a number to be measured" in text for text in report.warnings)


def test_an_adapter_that_was_never_trained_is_reported(tmp_path: Path) -> None:
    base = bases()
    lora = write_adapter(tmp_path / "adapter", base, ratio=0.0)
    report = lorasmith.merge(write_base(tmp_path / "base", base), lora.folder, tmp_path / "out")
    assert any("changes nothing" in text for text in report.warnings)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(raw_bytes(merged[name]) == raw_bytes(base[name]) for name in base)


# --------------------------------------------------------------------------------------------------- not finite


def _nothing_but(folder: Path, before: Mapping[str, str]) -> None:
    assert tree(folder) == before


@pytest.mark.parametrize("touched", [True, False], ids=["touched", "converted only"])
def test_an_overflow_of_float16_names_the_tensor_and_publishes_nothing(tmp_path: Path, touched: bool) -> None:
    base = bases(SMALL, torch.float32)
    name = "model.layers.1.mlp.up_proj.weight" if touched else "model.norm.weight"
    base[name].view(-1)[40] = -70_000.0
    folder = write_base(tmp_path / "base", base)
    lora = write_adapter(tmp_path / "adapter", bases(SMALL, torch.float32))
    before = tree(tmp_path)
    with pytest.raises(lorasmith.NotFinite, match="float16") as caught:
        lorasmith.merge(folder, lora.folder, tmp_path / "out", dtype="float16")
    assert name in str(caught.value)
    assert "--allow-overflow" in str(caught.value)
    _nothing_but(tmp_path, before)


def test_a_sum_that_overflows_the_base_s_own_float16_is_refused(tmp_path: Path) -> None:
    base = bases(SMALL, torch.float16)
    name = "model.layers.0.self_attn.v_proj.weight"
    folder = write_base(tmp_path / "base", base)
    lora = write_adapter(tmp_path / "adapter", base, ratios={name.removesuffix(".weight"): 3e7})
    before = tree(tmp_path)
    with pytest.raises(lorasmith.NotFinite, match=name):
        lorasmith.merge(folder, lora.folder, tmp_path / "new" / "out")
    _nothing_but(tmp_path, before)


def test_allow_overflow_saturates_and_changes_nothing_else(tmp_path: Path) -> None:
    base = bases(SMALL, torch.float32)
    high, low, untouched = "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight", "lm_head.weight"
    folder = write_base(tmp_path / "base", base)
    lora = write_adapter(tmp_path / "adapter", base, ratio=0.01)
    lorasmith.merge(folder, lora.folder, tmp_path / "tame", dtype="float16")
    base[high].view(-1)[40], base[low].view(-1)[1], base[untouched].view(-1)[2] = 70_000.0, -1e30, 1e9
    folder = write_base(tmp_path / "wild base", base)
    lorasmith.merge(folder, lora.folder, tmp_path / "out", dtype="float16", allow_overflow=True)
    wanted = load_file(tmp_path / "tame" / "model.safetensors")
    wanted[high].view(-1)[40], wanted[low].view(-1)[1], wanted[untouched].view(-1)[2] = 65504.0, -65504.0, 65504.0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(raw_bytes(merged[name]) == raw_bytes(wanted[name]) for name in base)


@pytest.mark.parametrize("allow_overflow", [True, False])
def test_a_delta_too_large_for_float32_is_refused_or_saturated(tmp_path: Path, allow_overflow: bool) -> None:
    base = bases(SMALL, torch.bfloat16)
    folder = write_base(tmp_path / "base", base)
    lora = write_adapter(tmp_path / "adapter", base, targets=("q_proj",), rank=1, alpha=1, ratio=1e4)
    adapter = (lora.folder, 3e38)
    if not allow_overflow:
        with pytest.raises(lorasmith.NotFinite, match="q_proj"):
            lorasmith.merge(folder, [adapter, adapter], tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    lorasmith.merge(folder, [adapter, adapter], tmp_path / "out", allow_overflow=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in lora.terms:
        right, _ = exact(base[name], [(lora.terms[name], 6e38)])
        largest = torch.finfo(torch.bfloat16).max
        outside = right.abs() > largest
        assert outside.sum() > right.numel() / 4
        assert merged[name].isfinite().all()
        assert (merged[name][outside].double() == right[outside].sign() * largest).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.get)
def test_an_adapter_that_is_not_finite_is_refused_before_anything_is_written(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    base = bases()
    lora = write_adapter(tmp_path / "adapter", base, dtype=dtype)
    file = lora.folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    tensors[name][-1, -1] = value
    save_file(tensors, file)
    folder = write_base(tmp_path / "base", base)
    before = tree(tmp_path)
    begun = []
    with pytest.raises(lorasmith.NotFinite, match=name):
        lorasmith.merge(folder, lora.folder, tmp_path / "out", planned=lambda *one: begun.append(one))
    assert not begun
    _nothing_but(tmp_path, before)


@pytest.mark.parametrize("dtype", ["keep", "float16", "float32"])
@pytest.mark.parametrize("allow_overflow", [True, False])
def test_a_base_that_already_holds_infinities_and_nans_keeps_them(
    tmp_path: Path, dtype: str, allow_overflow: bool
) -> None:
    base = bases(SMALL, torch.bfloat16)
    touched, untouched = "model.layers.0.mlp.down_proj.weight", "model.norm.weight"
    for name in (touched, untouched):
        base[name].view(-1)[3], base[name].view(-1)[7], base[name].view(-1)[11] = math.inf, -math.inf, math.nan
    clean = bases(SMALL, torch.bfloat16)
    lora = write_adapter(tmp_path / "adapter", clean)
    folder = write_base(tmp_path / "base", base)
    lorasmith.merge(folder, lora.folder, tmp_path / "out", dtype=dtype, allow_overflow=allow_overflow)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in (touched, untouched):
        flat = merged[name].double().view(-1)
        assert flat[3] == math.inf
        assert flat[7] == -math.inf
        assert flat[11].isnan()
        assert int((~flat.isfinite()).sum()) == 3
    if dtype == "keep":
        assert raw_bytes(merged[untouched]) == raw_bytes(base[untouched])
    finite = {name: tensor.clone() for name, tensor in merged.items()}
    for position in (3, 7, 11):
        right, _ = exact(clean[touched], [(lora.terms[touched], 1.0)])
        finite[touched].view(-1)[position] = right.view(-1)[position]
    require_one_rounding(finite, clean, [(lora, 1.0)])


def _load(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors
