"""Mixing adapters: identities, and float64 sums and decompositions as the oracle."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import KINDS, PREFIX, Facts, apart, config_of, dense, summed, write
from generate import LARGE, bases, raw_bytes, sha256, tree, write_adapter, write_base, write_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorasmith

pytestmark = pytest.mark.filterwarnings("ignore")


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
    assert lorasmith.mix(path, dry_run=True).error == 0
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


@pytest.mark.parametrize("budget", [23, 50, 200, 400, 10**6])
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


@pytest.mark.parametrize("options", [{"energy": 0.999}, {"rank": 7}])
def test_balance_leaves_out_nothing_where_a_side_is_shorter_than_all_ranks(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    parts = [
        (write(tmp_path / str(seed), Facts({"wide": 5, "tall": 4}, 3.0, False, torch.float32, seed)), 1)
        for seed in (1, 2)
    ]
    report = lorasmith.mix(parts, tmp_path / "fair", balance=True, **options)
    assert report.error < 1e-12
    assert [one.rank_out for one in report.modules] == [6, 7]
    assert apart(dense(tmp_path / "fair"), summed(parts)) < 1e-6


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
    report = lorasmith.resize(pair[0][0], tmp_path / "one", sv_ratio=1)
    assert {one.rank_out for one in report.modules} == {1}
    assert not report.warnings


# -------------------------------------------------------------------------------------------- outputs and errors


def test_a_tokenizer_goes_along_into_a_folder(tmp_path: Path) -> None:
    one, other = (write(tmp_path / str(seed), Facts({"linear": 3}, 3.0, False, torch.float32, seed)) for seed in (1, 2))
    pair = [one, (other, 0.5)]
    (one / "tokenizer.json").write_text('{"added": 1}')
    (one / "tokenizer_config.json").write_text("{}")
    for number, made in enumerate(
        (
            lorasmith.mix(pair, tmp_path / "mixed"),
            lorasmith.resize(one, tmp_path / "resized", rank=2),
            lorasmith.mix(one, tmp_path / "copied"),
            lorasmith.mix([lorasmith.mix(pair).adapter, other], tmp_path / "again"),
        )
    ):
        assert (Path(made.out) / "tokenizer.json").read_text() == '{"added": 1}', number
        assert (Path(made.out) / "tokenizer_config.json").read_text() == "{}", number
    report = lorasmith.mix(pair, tmp_path / "mixed.safetensors")
    assert any(f"that of {one} stays behind" in note for note in report.notes)

    (other / "tokenizer.json").write_text('{"added": 2}')
    report = lorasmith.mix(pair, tmp_path / "neither")
    assert any("differ, and none goes along; --prefer ADAPTER says whose" in note for note in report.notes)
    assert not (tmp_path / "neither" / "tokenizer.json").exists()
    lorasmith.mix(pair, tmp_path / "both", prefer=str(other))
    assert (tmp_path / "both" / "tokenizer.json").read_text() == '{"added": 2}'
    assert not (tmp_path / "both" / "tokenizer_config.json").exists()
    lorasmith.mix([one, (other, 0.0)], tmp_path / "first")
    assert (tmp_path / "first" / "tokenizer.json").read_text() == '{"added": 1}'


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


@pytest.mark.parametrize("make", [lorasmith.mix, lambda path: lorasmith.resize(path, rank=1)])
def test_an_adapter_in_memory_needs_no_tokenizer_of_those_it_was_made_of(tmp_path: Path, make: Any) -> None:
    path = write(tmp_path / "adapter", Facts({"linear": 3}, 3.0, False, torch.float32, 1))
    (path / "tokenizer.json").write_text('{"added": 1}')
    adapter = make(path).adapter
    shutil.rmtree(path)
    lorasmith.mix(adapter, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"added": 1}'


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_child_that_was_forked_leaves_the_adapter_to_its_parent(pair: list[tuple[Path, float]]) -> None:
    code = (
        "import lorasmith, os, sys\n"
        "adapter = lorasmith.mix(sys.argv[1:], rank=1).adapter\n"
        "if os.fork() == 0: sys.exit()\n"
        "os.wait()\n"
        "print(os.path.isfile(adapter.file))\n"
    )
    paths = [str(path) for path, _ in pair]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


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
    (None, {"rank": 0}, lorasmith.BadOption, "--rank must be a whole number from 1 on, not 0"),
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


def test_an_output_where_nothing_can_be_made_is_one_clear_error(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs a file system without new folders")
    done = run("mix", str(pair[0][0]), str(pair[1][0]), "-o", "/proc/lorasmith-mix", cwd=tmp_path)
    assert done.returncode == 1
    assert "cannot write beside /proc/lorasmith-mix" in done.stderr


def test_a_mix_that_was_stopped_or_had_no_room_leaves_nothing(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    for failure, wanted in (
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "full"), lorasmith.NoSpace),
    ):

        def fail(_: lorasmith.Progress, failure: BaseException = failure) -> None:
            raise failure

        for out in ("out", "out.safetensors"):
            with pytest.raises(wanted) as raised:
                lorasmith.mix(pair, tmp_path / out, progress=fail)
            assert os.listdir(tmp_path) == []
    assert str(raised.value).endswith("make room and run the same command again")


def test_a_disk_without_room_for_a_mix_is_told_of_before_anything_is_computed(
    tmp_path: Path, pair: list[tuple[Path, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(_: lorasmith.Progress) -> None:
        raise AssertionError("computed first")

    for options in ({}, {"rank": 2}, {"params": 300}, {"method": "ties"}, {"dtype": "bfloat16", "rank": 3}):
        out = tmp_path / "out.safetensors"
        lorasmith.mix(pair, out, **options)
        size = sum(tensor.nbytes for tensor in load_file(out).values())
        out.unlink()
        monkeypatch.setattr("lorasmith.execution.destination.free_space", lambda _, free=size - 1: free)
        for place in (out, tmp_path / "out", None):
            with pytest.raises(lorasmith.NoSpace, match=rf"takes up to [\d,]+ bytes.* has {size - 1:,} free"):
                lorasmith.mix(pair, place, progress=told, **options)
            assert os.listdir(tmp_path) == []
        monkeypatch.setattr("lorasmith.execution.destination.free_space", lambda _, free=size * 5 // 4: free)
        lorasmith.mix(pair, out, **options)
        out.unlink()
        monkeypatch.undo()
    monkeypatch.setattr("lorasmith.execution.destination.free_space", lambda _: 100)
    with pytest.raises(lorasmith.NoSpace, match=r"the result takes [\d,]+ bytes"):
        lorasmith.mix(pair[0][0], tmp_path / "out")
    with pytest.raises(lorasmith.NoSpace, match="make room or choose another output"):
        lorasmith.resize(pair[0][0], tmp_path / "out", rank=2, dry_run=True)
    assert os.listdir(tmp_path) == []


def test_adapters_that_call_the_same_layers_by_different_names_are_not_mixed(tmp_path: Path) -> None:
    base = bases()
    folder = write_base(tmp_path / "base", base)
    one, other = (write_adapter(tmp_path / name, base, targets=("q_proj",)).folder for name in ("one", "other"))
    file = other / "adapter_model.safetensors"
    names = load_file(file)
    save_file({name.replace("model.layers", "model.language_model.layers"): names[name] for name in names}, file)
    with pytest.raises(
        lorasmith.AdapterMismatch, match=r"has 'model\.layers\.0\..*has 'model\.language_model\.layers\.0"
    ):
        lorasmith.mix([one, other], tmp_path / "mixed")
    lorasmith.merge(folder, [one, other], tmp_path / "merged")  # as the error says
    lorasmith.mix([one, (other, 0.0)], tmp_path / "mixed")


def test_an_adapter_in_memory_stays_as_long_as_it_is_merged(tmp_path: Path) -> None:
    base = bases()
    folder = write_base(tmp_path / "base", base)
    one = write_adapter(tmp_path / "one", base).folder
    lorasmith.merge(folder, (one for one in [lorasmith.mix((one, 0.5)).adapter]), tmp_path / "merged")  # type: ignore
    lorasmith.merge(folder, (one, 0.5), tmp_path / "right")
    assert sha256(tmp_path / "merged" / "model.safetensors") == sha256(tmp_path / "right" / "model.safetensors")


def test_a_record_has_an_adapter_s_number_and_no_path(tmp_path: Path, pair: list[tuple[Path, float]]) -> None:
    (one, _), (two, _) = pair[:2]
    shutil.copytree(one, tmp_path / "elsewhere")
    for out, first in (("here", one), ("there", tmp_path / "elsewhere")):
        lorasmith.mix([first, two], tmp_path / out, weights=[f"{first}:linear=0.5", "tall=2"])
    record = (tmp_path / "here" / "lorasmith.json").read_text()
    assert json.loads(record)["weights"] == ["[1]:linear=0.5", "tall=2"]
    assert record == (tmp_path / "there" / "lorasmith.json").read_text()
