"""What computes: a GPU's worker run on a CPU writes the CPU's bytes, and a GPU writes the same but for a last place."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from generate import (
    Lora,
    Sizes,
    Tensors,
    bases,
    exact,
    half_unit,
    mixed,
    tree,
    write_adapter,
    write_base,
    write_json,
    write_unaligned,
)
from safetensors.torch import load_file, save_file

import lorasmith
from lorasmith.execution import execute
from lorasmith.execution.blocks import fit
from lorasmith.execution.device import choose
from lorasmith.execution.workplace import claim
from lorasmith.records import Plan
from lorasmith.rounding import Sample, survival

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

GIB = 1 << 30
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
WIDE = Sizes(hidden=512, inner=1101, key=128, vocabulary=6007, layers=2)
"""Tensors of several blocks, so that both slots of a worker are used, and used again."""


def merge_as_on_a_gpu(
    base: Path, adapters: object, out: Path, *, threads: int = 2, memory: int = 256 << 20, **options: object
) -> lorasmith.Survival | None:
    """Carry the plan for the CPU out by the worker for GPUs, on torch's CPU device; return the survival."""
    plan = lorasmith.plan(base, adapters, out, **options)  # type: ignore[arg-type]
    samples: list[Sample] = []
    with claim(str(out), overwrite=False) as place:
        place.begin(plan)
        on_device = dataclasses.replace(plan, device="cpu:0")
        execute(
            on_device,
            place,
            fit(on_device, memory, threads),
            lambda one, more: (samples.extend(more), place.finish(one, more)),
        )
        place.write_side_files(plan.side_files)
        place.publish()
    return survival(samples)


def require_same(tmp_path: Path, base: Path, adapters: object, **options: object) -> lorasmith.MergeReport:
    """Both workers write the same tree, for any memory and threads, and measure the same survival."""
    report = lorasmith.merge(base, adapters, tmp_path / "by the CPU", **options)  # type: ignore[arg-type]
    smallest = smallest_budget(lorasmith.plan(base, adapters, **options))  # type: ignore[arg-type]
    for threads, memory in ((1, smallest), (2, smallest + 3_000_000), (3, GIB)):
        out = tmp_path / f"{threads} threads"
        measured = merge_as_on_a_gpu(base, adapters, out, threads=threads, memory=memory, **options)
        assert tree(out) == tree(tmp_path / "by the CPU")
        assert measured == report.survival
    return report


def smallest_budget(plan: Plan) -> int:
    """The least memory that the worker for GPUs works with."""
    on_device = dataclasses.replace(plan, device="cpu:0")
    with pytest.raises(lorasmith.BudgetTooSmall) as caught:
        fit(on_device, 1, 1)
    return int(str(caught.value).split("works is ")[1].split(" bytes")[0].replace(",", ""))


def write_dora(folder: Path, base: Mapping[str, torch.Tensor], targets: tuple[str, ...], **options: object) -> Lora:
    """A DoRA adapter whose magnitudes are the norms of the adapted rows, a little changed."""
    lora = write_adapter(folder, base, targets=targets, ratio=0.05, **options)  # type: ignore[arg-type]
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for name, term in lora.terms.items():
        adapted = exact(base[name], [(term, 1.0)])[0]
        lengths = adapted.norm(dim=1) * (1 + 0.02 * torch.randn(len(adapted), generator=generator, dtype=torch.float64))
        module = name.removesuffix(".weight")
        tensors[f"base_model.model.{module}.lora_magnitude_vector"] = lengths.float()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    facts = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", {**facts, "use_dora": True})
    return lora


def load(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


# ------------------------------------------------------------------------------------- the GPU's worker on a CPU


@pytest.mark.parametrize("dtype", ["keep", "bfloat16", "float32"])
def test_bases_of_every_dtype_become_the_same_bytes(tmp_path: Path, dtype: str) -> None:
    base = mixed(WIDE, seed=3)
    base["model.layers.0.mlp.up_proj.weight"] = base["model.layers.0.mlp.up_proj.weight"].double()
    folder = write_base(tmp_path / "base", base, sizes=WIDE, shards=3)
    lora = write_adapter(tmp_path / "adapter", base, targets=("_proj", "lm_head"), rank=12)
    report = require_same(tmp_path, folder, lora.folder, dtype=dtype)
    assert report.tensors_merged == len(lora.terms)
    assert (report.tensors_converted > 0) == (dtype != "keep")


def test_adapters_that_are_summed_become_the_same_bytes(tmp_path: Path) -> None:
    base = bases(WIDE)
    folder = write_base(tmp_path / "base", base, sizes=WIDE)
    one = write_adapter(tmp_path / "one", base, rank=4, ratio=0.3, seed=1)
    two = write_adapter(tmp_path / "two", base, rank=64, ratio=0.02, seed=2, dtype=torch.bfloat16)
    dora = write_dora(tmp_path / "dora", base, ("q_proj", "up_proj"), rank=8)
    report = require_same(tmp_path, folder, [(one.folder, 0.7), (two.folder, -1.5), (dora.folder, 0.5)])
    assert report.survival is not None


def test_dora_becomes_the_same_bytes_whichever_way_the_weight_is_stored(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    straight = {"h.0.mlp.c_fc.weight": torch.randn(1600, 700, generator=generator).mul_(0.02).half()}
    lora = write_dora(tmp_path / "adapter", straight, ("c_fc",), rank=8)
    flipped = {name: weight.t().contiguous() for name, weight in straight.items()}
    for name, base in (("straight", straight), ("flipped", flipped)):
        (tmp_path / name).mkdir()
        file = write_unaligned(tmp_path / name / "base.safetensors", base)
        report = require_same_file(tmp_path / name, file, lora.folder)
        assert report.adapters[0].kinds == ("DoRA",)
    merged = [load_file(tmp_path / name / "cpu.safetensors")["h.0.mlp.c_fc.weight"] for name in ("straight", "flipped")]
    assert (merged[0].double() - merged[1].t().double()).abs().max() < 1e-4
    assert (merged[0] != straight["h.0.mlp.c_fc.weight"]).any()


def require_same_file(tmp_path: Path, base: Path, adapter: Path) -> lorasmith.MergeReport:
    report = lorasmith.merge(base, adapter, tmp_path / "cpu.safetensors")
    smallest = smallest_budget(lorasmith.plan(base, adapter))
    for threads, memory in ((1, smallest), (2, GIB)):
        out = tmp_path / f"{threads}.safetensors"
        assert merge_as_on_a_gpu(base, adapter, out, threads=threads, memory=memory) == report.survival
        assert out.read_bytes() == (tmp_path / "cpu.safetensors").read_bytes()
    return report


def test_what_was_trained_whole_becomes_the_same_bytes_at_any_weight(tmp_path: Path) -> None:
    base = bases(WIDE)
    folder = write_base(tmp_path / "base", base, sizes=WIDE)
    lora = write_adapter(tmp_path / "adapter", base, targets=("q_proj",))
    tensors = load_file(lora.folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(9)
    for name in ("lm_head.weight", "model.norm.weight"):
        tensors[f"base_model.model.{name}"] = torch.randn(base[name].shape, generator=generator).mul_(0.02)
    save_file(tensors, lora.folder / "adapter_model.safetensors", {"format": "pt"})
    facts = json.loads((lora.folder / "adapter_config.json").read_text())
    write_json(lora.folder / "adapter_config.json", {**facts, "modules_to_save": ["lm_head", "norm"]})
    report = require_same(tmp_path, folder, (lora.folder, 0.5))
    assert report.tensors_merged == len(lora.terms) + 2


@pytest.fixture
def overflowing(tmp_path: Path) -> tuple[Path, Path]:
    """A float16 base with infinities of its own, some of whose blocks a delta takes beyond the largest value."""
    base = bases(WIDE, torch.float16)
    weight = base["model.layers.1.mlp.up_proj.weight"]
    weight[7, 3] = weight[1050:, 3] = 65000.0  # among the rows that survival is measured on, and beyond them
    weight[100, 5] = float("inf")
    base["lm_head.weight"][0, 0] = float("-inf")
    folder = write_base(tmp_path / "base", base, sizes=WIDE)
    lora = write_adapter(tmp_path / "adapter", base, targets=("q_proj",), ranks={}, rank=4)
    tensors = load_file(lora.folder / "adapter_model.safetensors")
    for module in ("model.layers.1.mlp.up_proj", "lm_head"):
        rows, columns = base[f"{module}.weight"].shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.full((4, columns), 1.0)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.full((rows, 4), 40.0)
    save_file(tensors, lora.folder / "adapter_model.safetensors", {"format": "pt"})
    return folder, lora.folder


def test_an_overflow_is_refused_in_the_same_words_and_leaves_nothing(
    tmp_path: Path, overflowing: tuple[Path, Path]
) -> None:
    with pytest.raises(lorasmith.NotFinite, match="overflows float16") as by_cpu:
        lorasmith.merge(*overflowing, tmp_path / "out")
    with pytest.raises(lorasmith.NotFinite) as by_device:
        merge_as_on_a_gpu(*overflowing, tmp_path / "out")
    assert str(by_device.value) == str(by_cpu.value)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_overflow_that_is_allowed_is_clipped_to_the_same_bytes(
    tmp_path: Path, overflowing: tuple[Path, Path]
) -> None:
    require_same(tmp_path, *overflowing, allow_overflow=True)
    clipped = load(tmp_path / "by the CPU")["model.layers.1.mlp.up_proj.weight"]
    assert (clipped[1050:, 3] == 65504).all()
    assert clipped[7, 3] == 65504
    assert clipped[100, 5] == float("inf")


def test_factors_that_make_a_nan_are_refused(tmp_path: Path) -> None:
    base = bases(WIDE, torch.float32)
    folder, lora = write_base(tmp_path / "base", base, sizes=WIDE), write_adapter(tmp_path / "adapter", base)
    tensors = load_file(lora.folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.gate_proj.lora_{}.weight"
    tensors[name.format("A")][0], tensors[name.format("B")][-1] = 3e38, 3e38
    save_file(tensors, lora.folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(lorasmith.NotFinite, match=r"layers\.1\.mlp\.gate_proj"):
        merge_as_on_a_gpu(folder, lora.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_smallest_budget_counts_what_is_under_way(tmp_path: Path) -> None:
    base = bases(WIDE)
    folder, lora = write_base(tmp_path / "base", base, sizes=WIDE), write_adapter(tmp_path / "adapter", base)
    plan = lorasmith.plan(folder, lora.folder)
    largest = 2 * 512 * 1024  # bytes of a block of 512 columns in bfloat16, which is a power of two
    buffers = 2 * 2 * largest  # what is read and what is written, in each of two slots
    assert smallest_budget(plan) > buffers + largest
    on_device = dataclasses.replace(plan, device="cpu:0")
    assert fit(on_device, GIB, 3).nbytes > 3 * (buffers + largest)


# ----------------------------------------------------------------------------------------------- asking for a GPU


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    base = bases()
    return write_base(tmp_path / "base", base), write_adapter(tmp_path / "adapter", base).folder


@without_cuda
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_without_a_gpu_is_one_clear_error_and_writes_nothing(
    tmp_path: Path, small: tuple[Path, Path], device: str
) -> None:
    before = tree(tmp_path)
    with pytest.raises(lorasmith.Unsupported, match=f"'{device}' needs a GPU .* finds none; .* use cpu"):
        lorasmith.merge(*small, tmp_path / "out", device=device)
    script = Path(sys.executable).with_name("lorasmith")
    done = subprocess.run(
        [script, "merge", *small, "-o", tmp_path / "out", "--device", device], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "Error: device" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(tmp_path) == before


@without_cuda
def test_auto_without_a_gpu_is_the_cpu(tmp_path: Path, small: tuple[Path, Path]) -> None:
    plans = [lorasmith.plan(*small, device=device) for device in ("cpu", "auto")]
    assert plans[0] == plans[1]
    assert plans[0].device == "cpu"
    lorasmith.merge(*small, tmp_path / "cpu")
    lorasmith.merge(*small, tmp_path / "auto", device="auto")
    assert tree(tmp_path / "auto") == tree(tmp_path / "cpu")


@pytest.mark.parametrize("device", ["cuda:x", "cuda:", "cuda:-1", "cuda:1:2", "gpu", "mps", "cpu:0", "CUDA", ""])
def test_other_devices_are_refused_with_those_there_are(tmp_path: Path, small: tuple[Path, Path], device: str) -> None:
    with pytest.raises(lorasmith.BadOption, match=f"'{device}' is not known; use cpu, cuda, cuda:N .* or auto"):
        lorasmith.merge(*small, tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("device", "gpus", "chosen"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cuda", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
        ("cuda:01", 2, "cuda:1"),
    ],
)
def test_names_of_one_device_are_one_in_the_plan(device: str, gpus: int, chosen: str) -> None:
    assert choose(device, gpus) == chosen


@pytest.mark.parametrize(("gpus", "said"), [(1, "there is 1 GPU, cuda:0"), (4, "there are 4 GPUs, cuda:0 to cuda:3")])
def test_a_gpu_too_many_is_refused_with_how_many_there_are(gpus: int, said: str) -> None:
    with pytest.raises(lorasmith.BadOption, match=f"'cuda:7' does not exist: {said}"):
        choose("cuda:7", gpus)


# ---------------------------------------------------------------------------------------------------------- TF32

_SWITCH = """
import sys, threading, torch
from lorasmith.execution.device import full_precision
matmul = torch.backends.cuda.matmul
def state():
    found = []
    for ask in (lambda: matmul.allow_tf32, torch.get_float32_matmul_precision, lambda: matmul.fp32_precision,
                lambda: torch.backends.mkldnn.matmul.fp32_precision):
        try:
            found.append(ask())
        except (RuntimeError, AttributeError):
            found.append("no answer")
    return found
def is_off():
    return matmul.fp32_precision != "tf32" if hasattr(torch.backends, "fp32_precision") else not matmul.allow_tf32
exec(sys.argv[1])
before = state()
was_off = is_off()
inside, leave = threading.Event(), threading.Event()
def other():
    with full_precision():
        inside.set()
        leave.wait()
thread = threading.Thread(target=other)
with full_precision():
    thread.start()
    inside.wait()
    assert is_off()
assert is_off(), "another thread is still inside"
leave.set()
thread.join()
assert state() == before, (before, state())
try:
    with full_precision():
        1 / 0
except ZeroDivisionError:
    pass
assert state() == before, "after an error"
print("was off" if was_off else "was on")
"""


@pytest.mark.parametrize(
    ("setting", "was"),
    [
        ("pass", "was off"),
        ("torch.set_float32_matmul_precision('highest')", "was off"),
        ("torch.set_float32_matmul_precision('high')", "was on"),
        ("torch.set_float32_matmul_precision('medium')", "was on"),
        ("matmul.allow_tf32 = True", "was on"),
        ("matmul.fp32_precision = 'tf32'", "was on"),
        ("torch.backends.fp32_precision = 'tf32'", "was on"),
        ("torch.set_float32_matmul_precision('high'); matmul.fp32_precision = 'ieee'", "was off"),
    ],
)
def test_tf32_is_off_for_products_and_then_what_it_was_however_it_was_set(setting: str, was: str) -> None:
    if "fp32_precision" in setting and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("a torch with one interface to TF32")
    done = subprocess.run([sys.executable, "-c", _SWITCH, setting], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{was}\n", "")


# ------------------------------------------------------------------------------------------------------ on a GPU


def require_close(gpu: Tensors, cpu: Tensors, base: Tensors, lora: Lora) -> None:
    """At most 1 element in 10,000 differs, by one unit in the last place.

    Where a delta cancels a weight the unit may be smaller than what a float32 sum may be off; that is added.
    """
    different = total = 0
    assert gpu.keys() == cpu.keys() == base.keys()
    for name in base:
        if name not in lora.terms:
            assert torch.equal(gpu[name], cpu[name])
            continue
        unit = 2 * torch.maximum(half_unit(gpu[name]), half_unit(cpu[name]))
        off = (gpu[name].double() - cpu[name].double()).abs()
        assert (off <= unit + 2 * exact(base[name], [(lora.terms[name], 1.0)])[1]).all(), name
        different += int((off > 0).sum())
        total += off.numel()
    assert different <= total / 10_000


@needs_cuda
@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_writes_what_the_cpu_writes_but_for_1_in_10000(tmp_path: Path, dtype: torch.dtype, ratio: float) -> None:
    base = bases(WIDE, dtype)
    folder = write_base(tmp_path / "base", base, sizes=WIDE, shards=2)
    lora = write_adapter(tmp_path / "adapter", base, targets=("_proj", "lm_head"), rank=32, ratio=ratio)
    by_cpu = lorasmith.merge(folder, lora.folder, tmp_path / "cpu")
    by_gpu = lorasmith.merge(folder, lora.folder, tmp_path / "gpu", device="cuda")
    require_close(load(tmp_path / "gpu"), load(tmp_path / "cpu"), base, lora)
    assert by_cpu.survival is not None
    assert by_gpu.survival is not None
    assert by_gpu.survival.total == pytest.approx(by_cpu.survival.total, abs=1e-3)
    assert json.loads((tmp_path / "gpu" / "lorasmith.json").read_text())["device"] == "cuda:0"
    assert by_gpu.plan_hash != by_cpu.plan_hash


@needs_cuda
@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_a_gpu_rounds_once(tmp_path: Path, dtype: str) -> None:
    base = mixed(WIDE, seed=3)
    folder = write_base(tmp_path / "base", base, sizes=WIDE, shards=3)
    lora = write_adapter(tmp_path / "adapter", base, targets=("_proj", "lm_head"), rank=64, ratio=0.1)
    lorasmith.merge(folder, lora.folder, tmp_path / "out", device="cuda", dtype=dtype)
    merged = load(tmp_path / "out")
    for name, term in lora.terms.items():
        right, slack = exact(base[name], [(term, 1.0)])
        assert ((merged[name].double() - right).abs() <= half_unit(merged[name]) + slack).all(), name


@needs_cuda
def test_a_gpu_computes_dora_as_the_cpu_does(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    straight = {"h.0.mlp.c_fc.weight": torch.randn(1600, 700, generator=generator).mul_(0.02)}
    lora = write_dora(tmp_path / "adapter", straight, ("c_fc",), rank=8)
    for number, weight in enumerate((straight["h.0.mlp.c_fc.weight"], straight["h.0.mlp.c_fc.weight"].t())):
        base = tmp_path / f"{number}.safetensors"
        save_file({"h.0.mlp.c_fc.weight": weight.contiguous()}, base)
        merged = []
        for device in ("cpu", "cuda"):
            lorasmith.merge(base, lora.folder, tmp_path / f"{number} {device}.safetensors", device=device)
            merged.append(load_file(tmp_path / f"{number} {device}.safetensors")["h.0.mlp.c_fc.weight"])
        assert not torch.equal(merged[0], weight)
        assert torch.allclose(*merged, rtol=1e-5, atol=1e-7)


@needs_cuda
def test_a_gpu_writes_the_same_bytes_for_any_threads_memory_and_tf32(tmp_path: Path) -> None:
    base = mixed(WIDE, seed=3)
    folder = write_base(tmp_path / "base", base, sizes=WIDE, shards=3)
    loras = [write_adapter(tmp_path / "one", base, rank=64, ratio=0.1).folder]
    loras.append(write_dora(tmp_path / "dora", base, ("q_proj", "up_proj"), rank=8).folder)
    lorasmith.merge(folder, loras, tmp_path / "first", device="cuda")
    smallest = smallest_budget(lorasmith.plan(folder, loras))
    torch.set_float32_matmul_precision("high")
    try:
        for device, threads, memory in (("cuda", 1, smallest), ("auto", 3, GIB), ("cuda:0", 8, GIB)):
            out = tmp_path / f"{threads} threads"
            lorasmith.merge(folder, loras, out, device=device, threads=threads, memory=memory)
            assert tree(out) == tree(tmp_path / "first")
            assert torch.get_float32_matmul_precision() == "high"
            assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


@needs_cuda
def test_a_gpu_refuses_and_clips_an_overflow_as_the_cpu_does(tmp_path: Path, overflowing: tuple[Path, Path]) -> None:
    with pytest.raises(lorasmith.NotFinite, match="overflows float16"):
        lorasmith.merge(*overflowing, tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()
    merged = {}
    for device in ("cpu", "cuda"):
        lorasmith.merge(*overflowing, tmp_path / device, allow_overflow=True, device=device)
        merged[device] = load(tmp_path / device)["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(merged["cuda"], merged["cpu"])


@needs_cuda
def test_a_gpu_that_is_not_there_is_refused_with_how_many_there_are(tmp_path: Path, small: tuple[Path, Path]) -> None:
    gpus = torch.cuda.device_count()
    with pytest.raises(lorasmith.BadOption, match=rf"'cuda:{gpus}' does not exist: there (is|are) {gpus} GPU"):
        lorasmith.merge(*small, tmp_path / "out", device=f"cuda:{gpus}")
