"""Mixing adapters: identities, and other people's arithmetic as the oracle: float64 sums and decompositions, PEFT."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from generate import LARGE, bases, raw_bytes, sha256, tree, write_adapter, write_base, write_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorasmith
from lorasmith.combining.draws import drawn, key

pytestmark = pytest.mark.filterwarnings("ignore")

PREFIX = "base_model.model."
KINDS = {"linear": (9, 14), "wide": (7, 40), "tall": (33, 6), "embed": (21, 8), "conv": (5, 4, 3, 3)}
"""Shapes of weights: of linear layers (outputs, inputs), of an embedding, of a convolution's kernel."""


# ------------------------------------------------------------------------------------------ adapters and oracles


def factors(kind: str, rank: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random A and B of a kind of layer, by the names and in the shapes that PEFT has for it."""
    shape = KINDS[kind]

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    if kind == "embed":
        names = ("lora_embedding_A", "lora_embedding_B")
        return {names[0]: draw(rank, shape[0]), names[1]: draw(shape[1], rank)}
    if kind == "conv":
        return {"lora_A.weight": draw(rank, *shape[1:]), "lora_B.weight": draw(shape[0], rank, 1, 1)}
    return {"lora_A.weight": draw(rank, shape[1]), "lora_B.weight": draw(shape[0], rank)}


@dataclass(frozen=True)
class Facts:
    """What a drawn adapter is: its modules' kinds and ranks, alpha, how it is scaled and stored."""

    ranks: Mapping[str, int]
    alpha: float
    rslora: bool
    dtype: torch.dtype
    seed: int


def write(folder: Path, facts: Facts) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(facts.seed)
    tensors = {
        f"{PREFIX}{kind}.{name}": tensor
        for kind, rank in facts.ranks.items()
        for name, tensor in factors(kind, rank, generator, facts.dtype).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    first = next(iter(facts.ranks.values()))
    others = {f"{kind}": rank for kind, rank in facts.ranks.items() if rank != first}
    config = {
        "peft_type": "LORA", "r": first, "lora_alpha": facts.alpha, "use_rslora": facts.rslora, "rank_pattern": others,
        "base_model_name_or_path": "base", "target_modules": list(facts.ranks),
    }  # fmt: skip
    write_json(folder / "adapter_config.json", config)
    return folder


def config_of(path: Path) -> Any:
    if path.is_dir():
        return json.loads((path / "adapter_config.json").read_text())
    with safe_open(str(path), "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


def dense(path: Path) -> dict[str, torch.Tensor]:
    """Every module's delta, (outputs, inputs) in float64, as PEFT computes it from these files."""
    tensors = load_file(path / "adapter_model.safetensors" if path.is_dir() else path)
    config = config_of(path)
    deltas = {}
    for name, tensor in tensors.items():
        if "lora_A" not in name and "lora_embedding_A" not in name:
            continue
        module = name.removeprefix(PREFIX).split(".lora_")[0]
        a = tensor.double().flatten(1)
        b = tensors[name.replace("_A", "_B")].double().flatten(1)
        rank = config["rank_pattern"].get(module, config["r"])
        alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
        assert rank == len(a) == b.shape[1], module
        deltas[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * b @ a
    return deltas


def summed(parts: Sequence[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for path, weight in parts:
        for module, delta in dense(path).items():
            total[module] = total.get(module, 0) + weight * delta
    return total


def apart(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], beside: float = 0.0) -> float:
    """The largest relative difference of two adapters' deltas; a module that is missing is zero."""
    worst = 0.0
    for module in {*mine, *theirs}:
        one, other = mine.get(module), theirs.get(module)
        known = one if one is not None else other
        assert known is not None
        zero = torch.zeros_like(known)
        gap = float(((zero if one is None else one) - (zero if other is None else other)).norm())
        worst = max(worst, gap / max(float((zero if other is None else other).norm()), beside, 1e-30))
    return worst


some_facts = st.builds(
    Facts,
    st.dictionaries(st.sampled_from(list(KINDS)), st.integers(1, 5), min_size=1),
    st.sampled_from([1.0, 8.0, 12.5]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 10**6),
)
weights = st.floats(-2, 2).map(lambda value: round(value, 3))
mixes = st.lists(st.tuples(some_facts, weights), min_size=1, max_size=3).filter(
    lambda some: any(weight for _, weight in some)
)
hypothetical = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A fresh folder each time it is asked for one."""
    return lambda: tmp_path_factory.mktemp("mix")


def written(folder: Path, mix: Sequence[tuple[Facts, float]]) -> list[tuple[Path, float]]:
    return [(write(folder / f"a{number}", facts), weight) for number, (facts, weight) in enumerate(mix)]


# ---------------------------------------------------------------------------------------------------- identities


@hypothetical
@given(mix=mixes, file=st.booleans())
def test_a_mix_is_the_weighted_sum_of_what_its_adapters_do(place: Any, mix: Any, file: bool) -> None:
    folder = place()
    parts = written(folder, mix)
    out = folder / ("mixed.safetensors" if file else "mixed")
    report = lorasmith.mix(parts, out)
    sizes: dict[str, float] = {}
    for path, weight in parts:
        for module, delta in dense(path).items():
            sizes[module] = max(sizes.get(module, 0.0), abs(weight) * float(delta.norm()))
    got, want = dense(out), summed(parts)
    for module in want:
        gap = (got.get(module, torch.zeros_like(want[module])) - want[module]).norm()
        assert float(gap) <= 3e-7 * sizes[module]
    assert report.error == 0
    counted = [one for one in parts if one[1]]
    if len(counted) > 1 or counted[0][1] != 1:
        for one in report.modules:
            ranks = [facts.ranks.get(one.module, 0) for facts, weight in mix if weight]
            assert one.rank_in == sum(ranks)
            assert one.rank_out == sum(ranks)


@hypothetical
@given(facts=some_facts, file=st.booleans())
def test_one_adapter_alone_keeps_its_factors_and_alpha_bit_for_bit(place: Any, facts: Facts, file: bool) -> None:
    folder = place()
    path = write(folder / "a", facts)
    out = folder / ("mixed.safetensors" if file else "mixed")
    lorasmith.mix(path, out)
    before = load_file(path / "adapter_model.safetensors")
    after = load_file(out if file else out / "adapter_model.safetensors")
    assert {name: raw_bytes(one) for name, one in after.items()} == {
        name: raw_bytes(one) for name, one in before.items()
    }
    assert config_of(out) == config_of(path)
    zero = write(folder / "zero", Facts({"linear": 2}, 1.0, False, torch.float32, 1))
    lorasmith.mix([path, (zero, 0.0)], folder / "same")
    assert load_file(folder / "same" / "adapter_model.safetensors").keys() == before.keys()
    if not file:
        assert sha256(folder / "same" / "adapter_model.safetensors") == sha256(out / "adapter_model.safetensors")


@hypothetical
@given(facts=some_facts)
def test_an_adapter_minus_itself_is_zero(place: Any, facts: Facts) -> None:
    folder = place()
    path = write(folder / "a", facts)
    other = write(folder / "copy", facts)
    for number, parts in enumerate([[path, (path, -1.0)], [path, (other, -1.0)]]):
        for options in ({}, {"rank": 3}):
            out = folder / f"zero{number}{len(options)}"
            report = lorasmith.mix(parts, out, **options)
            assert all(float(delta.norm()) <= 1e-6 for delta in dense(out).values())
            if number == 0 or options:
                assert "undo each other" in report.warnings[-1]
                assert all(not delta.any() for delta in dense(out).values())


@hypothetical
@given(facts=some_facts)
def test_an_adapter_in_two_halves_is_itself_at_its_own_rank(place: Any, facts: Facts) -> None:
    folder = place()
    path, other = write(folder / "a", facts), write(folder / "copy", facts)
    report = lorasmith.mix([(path, 0.5), (other, 0.5)], folder / "whole", energy=1.0)
    assert apart(dense(folder / "whole"), dense(path)) < 1e-6
    for one in report.modules:
        rows, columns = one.shape
        assert one.rank_out == min(facts.ranks[one.module], rows, columns)
    same = lorasmith.mix([(path, 0.5), (path, 0.5)], folder / "same")
    assert [one.rank_out for one in same.modules] == [facts.ranks[one.module] for one in same.modules]
    assert apart(dense(folder / "same"), dense(path)) < 1e-6


@settings(hypothetical, max_examples=15)
@given(mix=mixes, weight=weights.filter(bool))
def test_a_mix_of_mixes_is_the_flat_mix(place: Any, mix: Any, weight: float) -> None:
    folder = place()
    parts = written(folder, mix)
    inner = lorasmith.mix(parts)
    assert inner.adapter is not None
    last = write(folder / "last", Facts({"linear": 2, "embed": 1}, 4.0, False, torch.float32, 7))
    lorasmith.mix([(inner.adapter, weight), (last, 0.3)], folder / "nested")
    flat = [*((path, own * weight) for path, own in parts), (last, 0.3)]
    lorasmith.mix(flat, folder / "flat")
    scale = max(float(delta.norm()) for path, _ in parts for delta in dense(path).values())
    assert apart(dense(folder / "nested"), dense(folder / "flat"), beside=scale) < 1e-6


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"method": "ties", "density": 0.4},
        {"method": "dare", "seed": 3},
        {"method": "dare-ties"},
        {"method": "magnitude-prune", "density": 0.2},
    ],
)
@pytest.mark.parametrize("patterns", [(), ("self_attn=0.5", r"layers\.1\.=-2")])
def test_merging_a_mix_is_merging_its_adapters(
    tmp_path: Path, method: dict[str, Any], patterns: tuple[str, ...]
) -> None:
    tensors = bases(dtype=torch.float32)
    write_base(tmp_path / "base", tensors, dtype="float32")
    one = write_adapter(tmp_path / "one", tensors, rank=5, ratio=0.1).folder
    two = write_adapter(tmp_path / "two", tensors, rank=3, ratio=0.1, seed=2, rslora=True).folder
    given = [(one, 0.7), (two, -0.4)]
    mixed = lorasmith.mix(given, weights=patterns, **method)
    lorasmith.merge(tmp_path / "base", [mixed.adapter], tmp_path / "by-mix")
    lorasmith.merge(tmp_path / "base", given, tmp_path / "at-once", weights=patterns, **method)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("by-mix", "at-once"))
    assert any(not torch.equal(first[name], tensors[name]) for name in tensors)
    for name in tensors:
        assert float((first[name] - second[name]).norm()) <= 1e-6 * float(tensors[name].norm())


# ------------------------------------------------------------------------------------------------ recompression


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, float]]:
    """Two adapters of every kind of layer, with spectra that fall off."""
    folder = tmp_path_factory.mktemp("pair")
    parts = []
    for number, (rank, weight) in enumerate(((4, 0.8), (3, -1.1))):
        facts = Facts(dict.fromkeys(KINDS, rank), 6.0, False, torch.float32, number)
        path = write(folder / f"a{number}", facts)
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if "_B" in name:
                falling = 2.0 ** -torch.arange(rank).float()
                tensors[name] = (tensor.flatten(1) * falling).reshape(tensor.shape)
        save_file(tensors, file)
        parts.append((path, weight))
    return parts


def ranks_by(values: torch.Tensor, **criterion: float) -> int:
    """How many singular values a criterion keeps, from its definition."""
    squares = values**2
    inside = squares.cumsum(0) / squares.sum()
    ((name, value),) = criterion.items()
    real = int((values > 1e-12 * values[0]).sum())
    if name == "rank":
        return min(int(value), real)
    if name == "sv_ratio":
        return int((values > values[0] / value).sum())
    share = {
        "energy": inside,
        "max_error": 1 - (1 - inside).clamp(min=0).sqrt(),
        "sv_fro": inside.sqrt(),
        "sv_cumulative": values.cumsum(0) / values.sum(),
    }[name]
    target = 1 - value if name == "max_error" else value
    return min(real, int((share < target - 1e-12).sum()) + 1)


@pytest.mark.parametrize(
    "criterion",
    [
        *({"rank": rank} for rank in (1, 4, 100)),
        *({"energy": share} for share in (0.5, 0.999, 1.0)),
        *({"max_error": error} for error in (0.3, 0.01, 0.0)),
    ],
)
def test_what_is_cut_off_is_the_least_there_is(
    tmp_path: Path, pair: list[tuple[Path, float]], criterion: dict[str, float]
) -> None:
    report = lorasmith.mix(pair, tmp_path / "out", **criterion)
    want, got = summed(pair), dense(tmp_path / "out")
    for one in report.modules:
        values = torch.linalg.svdvals(want[one.module])
        assert one.rank_out == ranks_by(values, **criterion)
        best = float(values[one.rank_out :].norm() / values.norm())
        measured = float((got[one.module] - want[one.module]).norm() / want[one.module].norm())
        assert one.error == pytest.approx(best, rel=1e-9, abs=1e-13)
        assert one.error == pytest.approx(measured, rel=1e-6, abs=3e-7)
        assert one.energy == pytest.approx(1 - best**2, abs=1e-12)
        assert one.norm == pytest.approx(float(want[one.module].norm()), rel=1e-12)
    whole = math.sqrt(sum(float((got[name] - want[name]).norm()) ** 2 for name in want))
    norm = math.sqrt(sum(float(delta.norm()) ** 2 for delta in want.values()))
    assert report.error == pytest.approx(whole / norm, rel=1e-5, abs=3e-7)
    noted = [note for note in report.notes if "was asked for" in note]
    assert bool(noted) == (criterion == {"rank": 100})


@pytest.mark.parametrize("budget", [1, 50, 200, 400, 10**6])
def test_one_budget_is_spent_where_it_keeps_most_per_parameter(
    tmp_path: Path, pair: list[tuple[Path, float]], budget: int
) -> None:
    report = lorasmith.mix(pair, tmp_path / "out", params=budget)
    spent = {one.module: one.rank_out for one in report.modules}
    want = summed(pair)
    offers = []
    for module, delta in want.items():
        values = torch.linalg.svdvals(delta)
        real = int((values > 1e-12 * values[0]).sum())
        offers += [(float(value) ** 2 / sum(delta.shape), module) for value in values[:real]]
    expected = dict.fromkeys(want, 0)
    left, closed = budget, set()
    for _, module in sorted(offers, reverse=True):
        cost = sum(want[module].shape)
        if module in closed or cost > left:
            closed.add(module)
            continue
        expected[module] += 1
        left -= cost
    assert spent == expected
    assert report.params == budget - left


def test_factors_share_the_singular_values_between_them(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    lorasmith.mix(pair, tmp_path / "out.safetensors", rank=3)
    tensors = load_file(tmp_path / "out.safetensors")
    a = tensors[f"{PREFIX}linear.lora_A.weight"].double()
    b = tensors[f"{PREFIX}linear.lora_B.weight"].double()
    values = torch.linalg.svdvals(summed(pair)["linear"])[:3]
    for gram in (a @ a.t(), b.t() @ b):
        assert torch.allclose(gram, torch.diag(values), atol=1e-5)


@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": 5}, {"energy": 0.9}, {"energy": 0.6}])
def test_balance_keeps_what_each_adapter_has_and_not_the_loudest_s(tmp_path: Path, options: dict[str, Any]) -> None:
    loud = write(tmp_path / "loud", Facts({"linear": 4, "wide": 4}, 400.0, False, torch.float32, 1))
    quiet = write(tmp_path / "quiet", Facts({"linear": 3, "wide": 3}, 3.0, False, torch.float32, 2))
    plain = lorasmith.mix([loud, quiet], tmp_path / "plain", **options)
    fair = lorasmith.mix([loud, quiet], tmp_path / "fair", balance=True, **options)
    assert fair.adapters[1].energy > plain.adapters[1].energy
    want, got = summed([(loud, 1), (quiet, 1)]), dense(tmp_path / "fair")
    deltas = [dense(loud), dense(quiet)]
    for one in fair.modules:
        measured = float((got[one.module] - want[one.module]).norm() / want[one.module].norm())
        assert one.error == pytest.approx(measured, rel=1e-5, abs=3e-7)
        u, _, vt = torch.linalg.svd(got[one.module])
        shares = [float((u[:, : one.rank_out].t() @ each[one.module] @ vt[: one.rank_out].t()).norm() ** 2
                        / each[one.module].norm() ** 2) for each in deltas]  # fmt: skip
        assert one.energies == pytest.approx(shares, rel=1e-4)
        if "rank" in options:
            assert one.rank_out == options["rank"]
        else:
            assert min(shares) >= options["energy"] - 1e-5


def test_energies_are_what_the_kept_part_has_of_every_adapter(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    report = lorasmith.mix(pair, tmp_path / "out", rank=3)
    got = dense(tmp_path / "out")
    kept, whole = [0.0, 0.0], [0.0, 0.0]
    for one in report.modules:
        u, _, vt = torch.linalg.svd(got[one.module])
        for position, (path, _) in enumerate(pair):
            delta = dense(path)[one.module]
            part = float((u[:, :3].t() @ delta @ vt[:3].t()).norm()) ** 2
            assert one.energies[position] == pytest.approx(part / float(delta.norm()) ** 2, rel=1e-4)
            assert one.norms[position] == pytest.approx(float(delta.norm()), rel=1e-9)
            kept[position] += part
            whole[position] += float(delta.norm()) ** 2
    assert [one.energy for one in report.adapters] == pytest.approx(
        [part / all_ for part, all_ in zip(kept, whole, strict=True)], rel=1e-4
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_error_counts_what_the_dtype_of_the_factors_loses(
    tmp_path: Path, pair: list[tuple[Path, float]], dtype: str
) -> None:
    for options in ({"rank": 3}, {}):
        out = tmp_path / f"out{len(options)}"
        report = lorasmith.mix(pair, out, dtype=dtype, **options)
        assert {tensor.dtype for tensor in load_file(out / "adapter_model.safetensors").values()} == {
            getattr(torch, dtype)
        }
        want, got = summed(pair), dense(out)
        for one in report.modules:
            measured = float((got[one.module] - want[one.module]).norm() / want[one.module].norm())
            assert one.error == pytest.approx(measured, rel=0.02, abs=3e-7)


# ------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(
    ("weights_", "alphas", "kept"),
    [((0.5, -2.0), (8, 4), True), ((1.0, 1.0), (2, 2), True), ((0.7, 1.0), (2, 2), False), ((1.0, 1.0), (3, 2), False)],
)
def test_factors_stay_in_sixteen_bits_where_every_fold_is_a_power_of_two(
    tmp_path: Path, weights_: tuple[float, float], alphas: tuple[float, float], kept: bool
) -> None:
    parts = [
        (write(tmp_path / str(number), Facts({"linear": 2, "tall": 2}, alpha, False, torch.bfloat16, number)), weight)
        for number, (weight, alpha) in enumerate(zip(weights_, alphas, strict=True))
    ]
    report = lorasmith.mix(parts, tmp_path / "out")
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values()}
    assert dtypes == {torch.bfloat16 if kept else torch.float32}
    assert report.dtype == ("bfloat16" if kept else "float32")
    assert apart(dense(tmp_path / "out"), summed(parts)) < (1e-15 if kept else 1e-7)


def test_a_power_of_two_that_would_lose_bits_in_float16_is_folded_in_float32(tmp_path: Path) -> None:
    facts = Facts({"linear": 2}, 2.0**-13, False, torch.float16, 1)
    parts = [
        (write(tmp_path / "a", facts), 1.0),
        (write(tmp_path / "b", Facts({"tall": 2}, 2, False, torch.float16, 2)), 1.0),
    ]
    report = lorasmith.mix(parts, tmp_path / "out")
    assert report.dtype == "float32"
    assert apart(dense(tmp_path / "out"), summed(parts)) < 1e-7


# -------------------------------------------------------------------------------------------------------- rules


def by_rule(
    method: str,
    deltas: Sequence[torch.Tensor],
    factors_: Sequence[float],
    masks: Sequence[torch.Tensor],
    sign: str,
    density: float,
) -> torch.Tensor:
    """The published rules, element by element, in numpy."""
    scale = 1 / density if method.startswith("dare") else 1.0
    parts = [
        np.where(mask, delta, 0.0) * scale * np.sign(weight)
        for delta, mask, weight in zip(deltas, masks, factors_, strict=True)
    ]
    sizes = [abs(weight) for weight in factors_]
    total = sum(size * part for size, part in zip(sizes, parts, strict=True))
    if not method.endswith("ties"):
        return torch.tensor(np.asarray(total))
    votes = sum(parts) if sign == "total" else sum(np.sign(part) for part in parts)
    elected = np.where(np.asarray(votes) >= 0, 1.0, -1.0)
    agree = [np.sign(part) == elected for part in parts]
    kept = sum(size * part * one for size, part, one in zip(sizes, parts, agree, strict=True))
    return torch.tensor(np.asarray(kept) / np.maximum(sum(one.astype(int) for one in agree), 1))


def largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    count = int(density * delta.numel())
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[delta.abs().flatten().sort(descending=True).indices[:count]] = True
    return mask.view(delta.shape)


METHODS = ["ties", "dare", "dare-ties", "magnitude-prune"]


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", [0.3, 0.75, 1.0, 0.001])
def test_rules_in_dense_space_are_the_published_ones(
    tmp_path: Path, pair: list[tuple[Path, float]], method: str, sign: str, density: float
) -> None:
    options = {"sign": sign} if method.endswith("ties") else {}
    report = lorasmith.mix(pair, tmp_path / "out", method=method, density=density, space="dense", rank=40, **options)
    got = dense(tmp_path / "out")
    digests = [sha256(path / "adapter_model.safetensors") for path, _ in pair]
    assert [one.sha256 for one in report.adapters] == digests
    for one in report.modules:
        # float32, in which the elements are compared
        deltas = [dense(path)[one.module].float().double() for path, _ in pair]
        turned = [delta.t() for delta in deltas] if one.module == "embed" else deltas
        if method.startswith("dare"):
            keep = [
                drawn(key(0, digest, one.module), slice(0, one.shape[0]), one.shape[1], density) for digest in digests
            ]
        else:
            keep = [largest(delta, density) for delta in deltas]
        want = by_rule(method, deltas, [weight for _, weight in pair], keep, sign, density)
        gap = float((got.get(one.module, torch.zeros_like(want)) - want).norm())
        assert gap <= 2e-5 * float(max(delta.norm() for delta in turned))
        assert one.norm == pytest.approx(float(want.norm()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_rules_in_core_space_are_the_published_ones_in_the_bases_that_the_deltas_share(
    tmp_path: Path, pair: list[tuple[Path, float]], method: str
) -> None:
    density = 0.4
    lorasmith.mix(pair, tmp_path / "out", method=method, density=density)
    got = dense(tmp_path / "out")
    digests = [sha256(path / "adapter_model.safetensors") for path, _ in pair]
    for module in got:
        deltas = [dense(path)[module].numpy() for path, _ in pair]
        u = np.linalg.svd(np.hstack(deltas))[0][:, :7]
        v = np.linalg.svd(np.vstack(deltas))[2][:7].T
        cores = [torch.tensor(u.T @ delta @ v) for delta in deltas]
        if method.startswith("dare"):
            keep = [drawn(key(0, digest, module), slice(0, u.shape[1]), v.shape[1], density) for digest in digests]
        else:
            keep = [largest(core, density) for core in cores]
        want = u @ by_rule(method, cores, [weight for _, weight in pair], keep, "total", density).numpy() @ v.T
        assert np.linalg.norm(got[module].numpy() - want) <= 1e-5 * np.linalg.norm(want)


def test_the_order_of_adapters_changes_no_rule(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    for method in METHODS:
        for space in ({}, {"space": "dense", "rank": 7}):
            one = lorasmith.mix(pair, tmp_path / f"{method}{len(space)}", method=method, **space)
            other = lorasmith.mix(pair[::-1], tmp_path / f"{method}{len(space)}r", method=method, **space)
            assert apart(dense(Path(one.out or "")), dense(Path(other.out or ""))) < 2e-6


def test_merging_with_a_rule_in_dense_space_applies_it_to_the_weights(tmp_path: Path) -> None:
    tensors = bases(LARGE, torch.float32)
    write_base(tmp_path / "base", tensors, sizes=LARGE, dtype="float32", shards=2)
    loras = [write_adapter(tmp_path / str(seed), tensors, rank=4, ratio=0.3, seed=seed, targets=("q_proj", "up_proj"))
             for seed in (1, 2)]  # fmt: skip
    given = [(lora.folder, weight) for lora, weight in zip(loras, (0.9, 0.5), strict=True)]
    digests = [sha256(lora.folder / "adapter_model.safetensors") for lora in loras]
    for method in METHODS:
        out = tmp_path / method
        lorasmith.merge(tmp_path / "base", given, out, method=method, density=0.3, space="dense", threads=2)
        merged: dict[str, torch.Tensor] = {}
        for file in out.glob("*.safetensors"):
            merged |= load_file(file)
        for name in loras[0].terms:
            deltas = [
                lora.terms[name].scale * lora.terms[name].b.double() @ lora.terms[name].a.double() for lora in loras
            ]
            rows, columns = deltas[0].shape
            if method.startswith("dare"):
                keep = [
                    drawn(key(0, one, name.removesuffix(".weight")), slice(0, rows), columns, 0.3) for one in digests
                ]
            else:
                keep = [largest(delta, 0.3) for delta in deltas]
            want = by_rule(method, deltas, (0.9, 0.5), keep, "total", 0.3)
            gap = (merged[name].double() - tensors[name].double() - want).abs()
            # an element whose magnitude is the threshold's to the last bit may fall on either side
            assert float((gap > 1e-6).double().mean()) < 2e-5


def test_what_is_drawn_depends_on_the_seed_and_on_no_other_choice(tmp_path: Path) -> None:
    tensors = bases(dtype=torch.float32)
    write_base(tmp_path / "base", tensors, dtype="float32")
    given = [write_adapter(tmp_path / str(seed), tensors, rank=4, ratio=0.3, seed=seed).folder for seed in (1, 2)]

    def merged(name: str, **options: Any) -> str:
        lorasmith.merge(tmp_path / "base", given, tmp_path / name, method="dare", space="dense", **options)
        return sha256(tmp_path / name / "model.safetensors")

    assert merged("one", threads=1) == merged("two", threads=2, memory=1 << 23) == merged("three", seed=0)
    assert merged("four", seed=1) != merged("five", seed=2)


def test_a_row_s_draws_do_not_depend_on_the_rows_drawn_with_it() -> None:
    name = key(5, "digest", "tensor")
    for columns in (1, 7, 8, 33):
        whole = drawn(name, slice(0, 50), columns, 0.4)
        parts = torch.cat([drawn(name, slice(start, min(50, start + 7)), columns, 0.4) for start in range(0, 50, 7)])
        assert torch.equal(whole, parts)
    share = drawn(name, slice(0, 1000), 1000, 0.4).double().mean()
    assert abs(float(share) - 0.4) < 0.003
    assert not torch.equal(drawn(key(6, "digest", "tensor"), slice(0, 50), 33, 0.4), whole)


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


@pytest.mark.parametrize("method", METHODS)
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
        mask = drawn(key(0, digest, module), slice(0, tensor.shape[0]), tensor.shape[1], density)
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
        assert one.rank_out == 4


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


# ------------------------------------------------------------------------------------------------- interference


def test_interference_is_what_the_dense_deltas_show(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    third = write(tmp_path / "third", Facts({"linear": 2, "embed": 1}, 3.0, True, torch.float32, 9))
    report = lorasmith.mix([*pair, third], tmp_path / "out")
    assert len(report.interference) == 3
    assert len(report.module_interference) == len(KINDS) + 2 * 2
    paths = [*pair, (third, 1.0)]
    for one in report.module_interference:
        deltas = [(weight * dense(path)[one.module]).numpy() for path, weight in (paths[one.one], paths[one.other])]
        norms = [np.linalg.norm(delta) for delta in deltas]
        assert one.norms == pytest.approx(norms)
        assert one.cosine == pytest.approx((deltas[0] * deltas[1]).sum() / norms[0] / norms[1], abs=1e-9)
        spans = []
        for delta in deltas:
            u, values, vt = np.linalg.svd(delta)
            rank = int((values > 1e-9 * values[0]).sum())
            spans.append((u[:, :rank], vt[:rank].T))
        for side, angles in ((0, one.output_angles), (1, one.input_angles)):
            cosines = np.linalg.svd(spans[0][side].T @ spans[1][side], compute_uv=False)
            assert np.cos(np.radians(angles)) == pytest.approx(cosines, abs=1e-7)
        inputs = [span[1] for span in spans]
        assert one.crosstalk[0] == pytest.approx(np.linalg.norm(deltas[0] @ inputs[1]) / norms[0], abs=1e-9)
        assert one.crosstalk[1] == pytest.approx(np.linalg.norm(deltas[1] @ inputs[0]) / norms[1], abs=1e-9)
    first = report.interference[0]
    flat = [np.concatenate([(weight * dense(path)[name]).numpy().ravel() for name in KINDS]) for path, weight in pair]
    assert first.cosine == pytest.approx(
        flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]), abs=1e-9
    )
    assert first.norm_ratio == pytest.approx(np.linalg.norm(flat[1]) / np.linalg.norm(flat[0]))
    assert [(one.one, one.other) for one in report.interference] == [(0, 1), (0, 2), (1, 2)]
    alone = lorasmith.interference([*pair, third])
    assert alone == report.interference


def test_an_adapter_beside_itself_overlaps_wholly_and_beside_an_independent_one_hardly(tmp_path: Path) -> None:
    tensors = bases(LARGE)
    one, two = (write_adapter(tmp_path / str(seed), tensors, rank=4, seed=seed).folder for seed in (1, 2))
    same, apart_ = lorasmith.interference([one, (one, 0.5)]), lorasmith.interference([one, two])
    assert same[0].cosine == pytest.approx(1)
    assert (same[0].input_overlap, same[0].output_overlap) == pytest.approx((1, 1))
    assert same[0].crosstalk == pytest.approx((1, 1))
    assert same[0].norm_ratio == pytest.approx(0.5)
    assert abs(apart_[0].cosine) < 0.02
    assert apart_[0].input_overlap < 0.05


# ------------------------------------------------------------------------------------------------------- resize


@pytest.mark.parametrize("criterion", [{"rank": 2}, {"energy": 0.9}, {"max_error": 0.2}, {"sv_ratio": 3.0},
                                       {"sv_fro": 0.95}, {"sv_cumulative": 0.7}])  # fmt: skip
@pytest.mark.parametrize("file", [False, True])
def test_resizing_keeps_what_its_criterion_says(
    tmp_path: Path, pair: list[tuple[Path, float]], criterion: dict[str, Any], file: bool
) -> None:
    source = pair[0][0]
    if file:  # as a bare file, whose header has the config and notes of its own
        bare = tmp_path / "bare.safetensors"
        metadata = {"lora_adapter_metadata": json.dumps(config_of(source)), "ss_note": "mine", "format": "pt"}
        save_file(load_file(source / "adapter_model.safetensors"), bare, metadata)
        source = bare
    out = tmp_path / ("out.safetensors" if file else "out")
    report = lorasmith.resize(source, out, **criterion)
    want, got = dense(source), dense(out)
    for one in report.modules:
        values = torch.linalg.svdvals(want[one.module])
        assert one.rank_out == ranks_by(values, **criterion)
        gap = float((got[one.module] - want[one.module]).norm() / want[one.module].norm())
        assert one.error == pytest.approx(gap, rel=1e-5, abs=3e-7)
    before, after = config_of(source), config_of(out)
    assert after["base_model_name_or_path"] == before["base_model_name_or_path"]
    if file:
        with safe_open(str(out), "pt") as opened:
            assert opened.metadata()["ss_note"] == "mine"


def test_a_rank_limits_sd_scripts_criteria(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    report = lorasmith.resize(pair[0][0], tmp_path / "out", sv_fro=0.999, rank=2)
    assert {one.rank_out for one in report.modules} == {2}


# -------------------------------------------------------------------------------------------- outputs and errors


def test_the_same_mix_gives_the_same_bytes_whatever_the_threads(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    for name, options in (
        ("exact", {}),
        ("cut", {"rank": 3}),
        ("dense", {"method": "ties", "space": "dense", "rank": 3}),
    ):
        trees = []
        for threads in (1, 2, 3):
            out = tmp_path / f"{name}{threads}"
            lorasmith.mix(pair, out, threads=threads, **options)
            trees.append(tree(out))
        assert trees[0] == trees[1] == trees[2]
    record = json.loads((tmp_path / "cut1" / "lorasmith.json").read_text())
    assert record["criterion"] == {"rank": 3}
    assert str(tmp_path) not in json.dumps(record)


def test_an_output_that_is_there_is_replaced_only_when_asked(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    for name in ("out", "out.safetensors"):
        lorasmith.mix(pair, tmp_path / name)
        before = tree(tmp_path / name)
        with pytest.raises(lorasmith.OutputExists, match="--overwrite"):
            lorasmith.mix(pair, tmp_path / name, rank=2)
        assert tree(tmp_path / name) == before
        lorasmith.mix(pair, tmp_path / name, rank=2, overwrite=True)
        assert tree(tmp_path / name) != before
    with pytest.raises(lorasmith.OutputExists, match="is the input"):
        lorasmith.mix(pair, pair[0][0], overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["out", "out.safetensors"]


def test_an_adapter_in_memory_goes_when_nobody_has_it_any_more(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    report = lorasmith.mix(pair, rank=2)
    assert isinstance(report.adapter, lorasmith.Adapter)
    assert "adapter" not in report.to_dict()
    file = report.adapter.file
    assert os.path.isfile(file)
    lorasmith.mix([report.adapter, pair[0][0]], tmp_path / "again")
    del report
    gc.collect()
    assert not os.path.exists(os.path.dirname(file))


def test_a_dry_run_reports_everything_and_writes_nothing(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    dry = lorasmith.mix(pair, tmp_path / "out", rank=3, dry_run=True)
    assert os.listdir(tmp_path) == []
    done = lorasmith.mix(pair, tmp_path / "out", rank=3)
    assert (dry.modules, dry.interference, dry.error) == (done.modules, done.interference, done.error)


def nan(tmp_path: Path) -> Path:
    path = write(tmp_path / "nan", Facts({"linear": 2}, 1.0, False, torch.float32, 1))
    tensors = load_file(path / "adapter_model.safetensors")
    tensors[f"{PREFIX}linear.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def other_shape(tmp_path: Path) -> Path:
    path = write(tmp_path / "shape", Facts({"linear": 2}, 1.0, False, torch.float32, 1))
    tensors = load_file(path / "adapter_model.safetensors")
    tensors[f"{PREFIX}linear.lora_A.weight"] = torch.ones(2, 15)
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def other_base(tmp_path: Path) -> Path:
    path = write(tmp_path / "other", Facts({"linear": 2}, 1.0, False, torch.float32, 1))
    write_json(path / "adapter_config.json", {**config_of(path), "base_model_name_or_path": "mistralai/Other-7B"})
    return path


REFUSED: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (nan, {}, lorasmith.NotFinite, r"linear.lora_A.weight' holds a NaN"),
    (other_shape, {}, lorasmith.AdapterMismatch, r"shape \[9, 14\] for 'linear' and .* one of \[9, 15\]"),
    (other_base, {}, lorasmith.AdapterMismatch, r"trained on 'base' and .* on 'mistralai/Other-7B'.*--base BASE"),
    (None, {"method": "median"}, lorasmith.BadOption, "'median' is not one of linear, ties"),
    (None, {"method": "ties", "density": 0.0}, lorasmith.BadOption, "density must be above 0"),
    (None, {"method": "ties", "density": 1.5}, lorasmith.BadOption, "density must be above 0"),
    (None, {"method": "ties", "density": float("nan")}, lorasmith.BadOption, "density must be above 0"),
    (None, {"density": 0.5}, lorasmith.BadOption, "--density has no effect with --method linear"),
    (None, {"method": "ties", "seed": 3}, lorasmith.BadOption, "--seed has no effect"),
    (None, {"method": "ties", "space": "flat"}, lorasmith.BadOption, "'flat' is neither core nor dense"),
    (None, {"method": "ties", "sign": "loud"}, lorasmith.BadOption, "'loud' is neither total nor frequency"),
    (None, {"method": "ties", "space": "dense"}, lorasmith.BadOption, "takes --rank, --energy or --max-error"),
    (None, {"method": "dare", "seed": -1}, lorasmith.BadOption, "seed must be between"),
    (None, {"weights": ["nothing_like_it=2"]}, lorasmith.BadOption, "found in no module's name; they are like"),
    (None, {"weights": ["linear"]}, lorasmith.BadOption, "not REGEX=FACTOR"),
    (None, {"weights": ["linear=inf"]}, lorasmith.BadOption, "not REGEX=FACTOR"),
    (None, {"weights": ["(=2"]}, lorasmith.BadOption, "no regular expression"),
    (None, {"rank": 0}, lorasmith.BadOption, "--rank must be at least 1"),
    (None, {"rank": 3, "energy": 0.5}, lorasmith.BadOption, "--rank and --energy exclude each other"),
    (None, {"energy": 1.5}, lorasmith.BadOption, "--energy must be between 0 and 1"),
    (None, {"energy": float("nan")}, lorasmith.BadOption, "--energy must be between 0 and 1"),
    (None, {"max_error": -0.1}, lorasmith.BadOption, "--max-error must be between"),
    (None, {"balance": True}, lorasmith.BadOption, "--balance"),
    (None, {"balance": True, "params": 100}, lorasmith.BadOption, "--balance"),
    (None, {"prefer": "nobody"}, lorasmith.BadOption, "--prefer nobody is none of the adapters"),
    (None, {"dtype": "int8"}, lorasmith.BadOption, "dtype 'int8' is not one of"),
    (None, {"base": "/nowhere"}, lorasmith.MissingFile, "/nowhere"),
]


@pytest.mark.parametrize(("bad", "options", "error", "message"), REFUSED)
def test_bad_input_gets_one_clear_error_and_leaves_nothing(
    tmp_path: Path,
    pair: list[tuple[Path, float]],
    bad: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    parts: list[Any] = [pair[0], *([(bad(made), 1.0)] if bad else [pair[1]])]
    for out in ("out", "out.safetensors"):
        with pytest.raises(error, match=message):
            lorasmith.mix(parts, tmp_path / "results" / out, **options)
    assert os.listdir(tmp_path) == ["made"]


def test_no_adapters_or_none_that_counts_is_an_error(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    with pytest.raises(lorasmith.BadOption, match="no adapter was given"):
        lorasmith.mix([], tmp_path / "out")
    with pytest.raises(lorasmith.BadOption, match="weight 0"):
        lorasmith.mix([(pair[0][0], 0.0)], tmp_path / "out")
    with pytest.raises(lorasmith.BadOption, match="how much of the adapter"):
        lorasmith.resize(pair[0][0], tmp_path / "out")
    with pytest.raises(lorasmith.MissingFile, match="nowhere"):
        lorasmith.mix([pair[0], "nowhere:0.5"], tmp_path / "out")


def test_weights_may_be_for_one_adapter_and_multiply(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    (one, _), (two, _) = pair
    lorasmith.mix([f"{one}:0.5", str(two)], tmp_path / "out", weights=["(linear|tall)=2", "tall=3", f"{two}:linear=0"])
    first, second = dense(one), dense(two)
    own = {"linear": (1.0, 0.0), "tall": (3.0, 6.0)}
    want = {
        name: own.get(name, (0.5, 1.0))[0] * first[name] + own.get(name, (0.5, 1.0))[1] * second[name] for name in first
    }
    assert apart(dense(tmp_path / "out"), want) < 1e-6


def test_a_mix_whose_inputs_change_under_way_does_not_appear(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    path = write(tmp_path / "mine", Facts(dict.fromkeys(KINDS, 2), 1.0, False, torch.float32, 1))

    def touch(_: lorasmith.Progress) -> None:
        os.utime(path / "adapter_model.safetensors", (1, 1))

    for out in ("out", "out.safetensors"):
        with pytest.raises(lorasmith.InputChanged, match=r"adapter_model\.safetensors was changed"):
            lorasmith.mix([path, pair[0]], tmp_path / out, progress=touch)
        os.utime(path / "adapter_model.safetensors")
    assert os.listdir(tmp_path) == ["mine"]


# ------------------------------------------------------------------------------------------------------ command


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from lorasmith.cli import main; main()", *arguments],
        capture_output=True, text=True, cwd=cwd, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_command_mixes_and_tells_what_it_did(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    (one, _), (two, _) = pair
    done = run("mix", f"{one}:0.8", f"{two}:-1.1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["mixed.safetensors"]
    assert apart(dense(tmp_path / "mixed.safetensors"), summed(pair)) < 1e-6
    for text in ("Mixed into mixed.safetensors", f"[1] {one} × 0.8", "crosstalk", "[1] [2]", "all of it"):
        assert text in done.stdout
    again = run("mix", f"{one}:0.8", f"{two}:-1.1", cwd=tmp_path)
    assert again.returncode == 1
    assert "--overwrite" in again.stderr
    told = run("mix", f"{one}:0.8", f"{two}:-1.1", "-o", "new", "--rank", "2", "--dry-run", "--json", cwd=tmp_path)
    facts = json.loads(told.stdout)
    assert facts["rank"] == [2, 2]
    assert len(facts["module_interference"]) == len(KINDS)
    assert os.listdir(tmp_path) == ["mixed.safetensors"]
    for criterion in (["--params", "0.2K"], ["--energy", "0.9"], ["--max-error", "0.1"], ["--rank", "2", "--balance"]):
        assert run("mix", str(one), str(two), "-o", "x", "--overwrite", *criterion, cwd=tmp_path).returncode == 0
    wrong = run("mix", str(one), "--energy", "2", cwd=tmp_path)
    assert wrong.returncode == 2


def test_the_command_resizes(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    done = run("resize", str(pair[0][0]), "-o", "small", "--sv_ratio", "3", "--rank", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert config_of(tmp_path / "small")["r"] <= 2
    lost = run("resize", str(pair[0][0]), "-o", "none", cwd=tmp_path)
    assert lost.returncode == 2
    assert "--rank, --energy" in lost.stderr
