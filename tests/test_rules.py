"""Rules that combine adapters element by element, against the published formulas in numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import PREFIX, Facts, apart, config_of, dense, summed, write
from generate import LARGE, bases, sha256, write_adapter, write_base, write_json
from safetensors.torch import load_file, save_file

import lorasmith
from lorasmith.combining.draws import drawn as drawn_from
from lorasmith.combining.draws import key

pytestmark = pytest.mark.filterwarnings("ignore")


# -------------------------------------------------------------------------------------------------------- rules


def drawn(key: bytes, rows: slice, columns: int, density: float) -> torch.Tensor:
    return drawn_from(key, rows, slice(0, columns), columns, density)


def mask_of(digest: str, module: str, shape: tuple[int, int], density: float) -> torch.Tensor:
    """What is drawn of a weight as its adapter has it; an embedding's rows are its tokens, which are inputs here."""
    if module == "embed":
        return drawn(key(0, digest, module), slice(0, shape[1]), shape[0], density).t()
    return drawn(key(0, digest, module), slice(0, shape[0]), shape[1], density)


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
    count = max(1, int(density * delta.numel()))
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[delta.abs().flatten().sort(descending=True).indices[:count]] = True
    return mask.view(delta.shape)


METHODS = ("ties", "dare", "dare-ties", "magnitude-prune")


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
            keep = [mask_of(digest, one.module, one.shape, density) for digest in digests]
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
            keep = [mask_of(digest, module, (u.shape[1], v.shape[1]), density) for digest in digests]
        else:
            keep = [largest(core, density) for core in cores]
        want = u @ by_rule(method, cores, [weight for _, weight in pair], keep, "total", density).numpy() @ v.T
        assert np.linalg.norm(got[module].numpy() - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_adapters_changes_no_rule(
    tmp_path: Path, pair: list[tuple[Path, float]], method: str, sign: str
) -> None:
    options = {"sign": sign} if method.endswith("ties") else {}
    for space in ({}, {"space": "dense", "rank": 7}):
        one = lorasmith.mix(pair, tmp_path / f"{len(space)}", method=method, **space, **options)
        other = lorasmith.mix(pair[::-1], tmp_path / f"{len(space)}r", method=method, **space, **options)
        assert apart(dense(Path(one.out or "")), dense(Path(other.out or ""))) < 2e-6


@pytest.mark.parametrize("method", ["ties", "magnitude-prune"])
def test_rules_in_core_space_depend_on_deltas_and_not_on_the_ranks_they_are_stored_with(
    tmp_path: Path, pair: list[tuple[Path, float]], method: str
) -> None:
    (path, weight), other = pair
    tensors = load_file(path / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        axis = int("lora_B" in name or "lora_embedding_B" in name)
        more = torch.zeros_like(tensor) if axis else torch.randn(tensor.shape)
        tensors[name] = torch.cat([tensor, more.to(tensor.dtype)], dim=axis)
    config = config_of(path)
    patterns = {module: 2 * rank for module, rank in config["rank_pattern"].items()}
    wide = tmp_path / "wide"
    wide.mkdir()
    save_file(tensors, wide / "adapter_model.safetensors")
    factor = math.sqrt(2) if config["use_rslora"] else 2
    more_config = {"r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"], "rank_pattern": patterns}
    write_json(wide / "adapter_config.json", {**config, **more_config})
    lorasmith.mix([(path, weight), other], tmp_path / "one", method=method)
    lorasmith.mix([(wide, weight), other], tmp_path / "other", method=method)
    assert apart(dense(tmp_path / "one"), dense(tmp_path / "other")) < 2e-6


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_deltas_that_share_no_output_are_in_nobody_s_way(tmp_path: Path, sign: str) -> None:
    parts = []
    for number, rows in enumerate(torch.randperm(33, generator=torch.Generator().manual_seed(5)).split(11)):
        path = write(tmp_path / str(number), Facts({"tall": 2}, 4.0, False, torch.float32, number))
        tensors = load_file(path / "adapter_model.safetensors")
        b = tensors[f"{PREFIX}tall.lora_B.weight"]
        tensors[f"{PREFIX}tall.lora_B.weight"] = torch.zeros_like(b).index_copy(0, rows, b[rows])
        save_file(tensors, path / "adapter_model.safetensors")
        parts.append((path, 1.0))
    lorasmith.mix(parts, tmp_path / "out", method="ties", density=1.0, sign=sign)
    assert apart(dense(tmp_path / "out"), summed(parts)) < 1e-6


def test_a_delta_and_its_opposite_elect_nothing(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    path, _ = pair[0]
    report = lorasmith.mix([(path, 1.0), (path, -1.0)], tmp_path / "out", method="ties", sign="frequency")
    assert all(one.norm == 0 for one in report.modules)


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
        pieces = [drawn_from(name, slice(3, 9), slice(first, min(columns, first + 5)), columns, 0.4)
                  for first in range(0, columns, 5)]  # fmt: skip
        assert torch.equal(torch.cat(pieces, dim=1), whole[3:9])
    share = drawn(name, slice(0, 1000), 1000, 0.4).double().mean()
    assert abs(float(share) - 0.4) < 0.003
    assert not torch.equal(drawn(key(6, "digest", "tensor"), slice(0, 50), 33, 0.4), whole)
