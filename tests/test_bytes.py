"""Which bytes a merge writes: untouched ones are the base's, and equal runs write equal ones."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from generate import (
    LARGE,
    SIDE_FILES,
    Lora,
    Sizes,
    Tensors,
    bases,
    exact,
    half_unit,
    mixed,
    raw_bytes,
    sha256,
    tree,
    write_adapter,
    write_base,
    write_json,
    write_unaligned,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorasmith

GIB = 1 << 30


def header(file: Path) -> bytes:
    with open(file, "rb") as stream:
        length = stream.read(8)
        return length + stream.read(struct.unpack("<Q", length)[0])


def parsed(file: Path) -> dict[str, dict[str, object]]:
    return json.loads(header(file)[8:])


def stored(file: Path, name: str) -> bytes:
    """A tensor's bytes where the header says they are."""
    facts = parsed(file)[name]
    start, stop = facts["data_offsets"]  # type: ignore[misc]
    raw = file.read_bytes()[len(header(file)) :]
    return raw[start:stop]


def in_file_order(file: Path) -> list[str]:
    facts = {name: one for name, one in parsed(file).items() if name != "__metadata__"}
    return sorted(facts, key=lambda name: facts[name]["data_offsets"])  # type: ignore[arg-type,return-value]


def smallest_budget(base: Path, lora: Lora, out: Path) -> int:
    """The least memory that works, as the refusal of a single byte says."""
    with pytest.raises(lorasmith.BudgetTooSmall) as caught:
        lorasmith.merge(base, lora.folder, out, memory=1)
    match = re.search(r"smallest that works is ([\d,]+) bytes", str(caught.value))
    assert match is not None
    return int(match[1].replace(",", ""))


def load(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def require_merged(merged: Tensors, base: Tensors, lora: Lora) -> None:
    """Merged as float64 says, and nothing else changed."""
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        if name in lora.terms:
            right, slack = exact(weight, [(lora.terms[name], 1.0)])
            assert ((merged[name].double() - right).abs() <= half_unit(merged[name]) + slack).all()
            assert (merged[name] != weight).any()
        else:
            assert raw_bytes(merged[name]) == raw_bytes(weight), name


# --------------------------------------------------------------------------------------- untouched is untouched


@pytest.mark.parametrize("shards", [1, 4])
def test_untouched_tensors_headers_and_side_files_are_byte_identical(tmp_path: Path, shards: int) -> None:
    base = mixed(LARGE)
    folder = write_base(tmp_path / "base", base, sizes=LARGE, shards=shards)
    lora = write_adapter(tmp_path / "adapter", base, targets=("q_proj", "down_proj"))
    lorasmith.merge(folder, lora.folder, tmp_path / "out")
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(weights) == shards
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == weights
    untouched = 0
    for file in weights:
        before, after = folder / file, tmp_path / "out" / file
        assert header(after) == header(before)
        assert after.stat().st_size == before.stat().st_size
        for name in set(in_file_order(before)) - lora.terms.keys():
            assert stored(after, name) == stored(before, name), name
            untouched += 1
    assert untouched == len(base) - len(lora.terms)
    require_merged(load(tmp_path / "out"), base, lora)
    names = [*SIDE_FILES, "config.json"] + (["model.safetensors.index.json"] if shards > 1 else [])
    assert {name: sha256(tmp_path / "out" / name) for name in names} == {name: sha256(folder / name) for name in names}


@pytest.mark.parametrize("shards", [1, 3])
def test_a_merged_folder_holds_the_base_s_files_and_a_provenance_record_and_no_more(
    tmp_path: Path, shards: int
) -> None:
    base = bases()
    folder = write_base(tmp_path / "base", base, shards=shards)
    kept = set(tree(folder))
    for name in ("README.md", ".gitattributes", "training_args.bin", "trainer_state.json"):
        (folder / name).write_bytes(b"of the base's own run")
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "optimizer.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")
    lora = write_adapter(tmp_path / "adapter", base)
    lorasmith.merge(folder, lora.folder, tmp_path / "out")
    assert set(tree(tmp_path / "out")) == kept | {"lorasmith.json"}
    assert set(os.listdir(tmp_path)) == {"base", "adapter", "out"}


def test_inputs_stay_as_they_are(tmp_path: Path) -> None:
    base = bases()
    folder = write_base(tmp_path / "base", base, shards=2)
    lora = write_adapter(tmp_path / "adapter", base)
    before = tree(folder), tree(lora.folder)
    lorasmith.merge(folder, lora.folder, tmp_path / "out")
    assert (tree(folder), tree(lora.folder)) == before


def test_tensors_that_begin_off_every_border_keep_their_places_and_bytes(tmp_path: Path) -> None:
    small = mixed()
    base = {
        "model.odd": torch.arange(3, dtype=torch.uint8),
        **dict(sorted(small.items(), key=lambda one: one[0][::-1])),
    }
    file = write_unaligned(tmp_path / "base.safetensors", base)
    assert any(facts["data_offsets"][0] % 2 for name, facts in parsed(file).items() if name != "__metadata__")  # type: ignore[index]
    lora = write_adapter(tmp_path / "adapter", base)
    lorasmith.merge(file, lora.folder, tmp_path / "out.safetensors")
    assert in_file_order(tmp_path / "out.safetensors") == in_file_order(file)
    require_merged(load_file(tmp_path / "out.safetensors"), base, lora)


def test_a_base_whose_weights_are_links_is_read_through_them(tmp_path: Path) -> None:
    """As the Hub's cache lays out its snapshots."""
    base = bases()
    blobs = write_base(tmp_path / "blobs", base, shards=3)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in os.listdir(blobs):
        (snapshot / name).symlink_to(Path("..") / "blobs" / name)
    lora = write_adapter(tmp_path / "adapter", base)
    lorasmith.merge(blobs, lora.folder, tmp_path / "plain")
    lorasmith.merge(snapshot, lora.folder, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")


@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_a_dtype_keeps_names_shards_order_and_metadata(tmp_path: Path, dtype: str) -> None:
    base = mixed()
    folder = write_base(tmp_path / "base", base, shards=3)
    lora = write_adapter(tmp_path / "adapter", base)
    lorasmith.merge(folder, lora.folder, tmp_path / "out", dtype=dtype)
    for before in folder.glob("*.safetensors"):
        after = tmp_path / "out" / before.name
        assert in_file_order(after) == in_file_order(before)
        assert parsed(after)["__metadata__"] == parsed(before)["__metadata__"]
    name = "model.safetensors.index.json"
    ours, theirs = (json.loads((one / name).read_text()) for one in (tmp_path / "out", folder))
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["own"] == 1


# -------------------------------------------------------------------------------------------------- single file


@pytest.mark.parametrize("name", ["model.safetensors", "weights.st"])
def test_a_base_that_is_a_file_gives_a_file(tmp_path: Path, name: str) -> None:
    base = mixed()
    file = tmp_path / "in" / name
    file.parent.mkdir()
    save_file(base, file, {"format": "pt", "author": "né"})
    lora = write_adapter(tmp_path / "adapter", base)
    lorasmith.merge(file, lora.folder, tmp_path / "out" / "merged.st")
    assert os.listdir(tmp_path / "out") == ["merged.st"]
    out = tmp_path / "out" / "merged.st"
    require_merged(load_file(out), base, lora)
    assert in_file_order(out) == in_file_order(file)
    with safe_open(out, "pt") as stream:
        metadata = stream.metadata()
    assert json.loads(metadata.pop("lorasmith"))["adapters"]
    assert metadata == {"format": "pt", "author": "né"}


def test_merging_a_merged_file_again_keeps_one_provenance_record(tmp_path: Path) -> None:
    base = bases()
    save_file(base, tmp_path / "base.safetensors")
    lora = write_adapter(tmp_path / "adapter", base)
    lorasmith.merge(tmp_path / "base.safetensors", lora.folder, tmp_path / "once.safetensors")
    lorasmith.merge(tmp_path / "once.safetensors", (lora.folder, 0.5), tmp_path / "twice.safetensors")
    with safe_open(tmp_path / "twice.safetensors", "pt") as stream:
        assert json.loads(stream.metadata()["lorasmith"])["adapters"][0]["weight"] == 0.5
    require_merged(
        load_file(tmp_path / "twice.safetensors"),
        load_file(tmp_path / "once.safetensors"),
        Lora(lora.folder, {name: type(term)(term.b, term.a, term.scale / 2) for name, term in lora.terms.items()}),
    )


def test_a_file_is_never_written_over_a_folder(tmp_path: Path) -> None:
    base = bases()
    save_file(base, tmp_path / "base.safetensors")
    lora = write_adapter(tmp_path / "adapter", base)
    (tmp_path / "out").mkdir()
    for overwrite in (False, True):
        with pytest.raises(lorasmith.OutputExists, match=re.escape(os.path.join("out", "model.safetensors"))):
            lorasmith.merge(tmp_path / "base.safetensors", lora.folder, tmp_path / "out", overwrite=overwrite)
    assert os.listdir(tmp_path / "out") == []


# -------------------------------------------------------------------------------------------------- determinism


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Lora]:
    """Bases with tensors of several blocks in every dtype: a float32 sum shows the grid it was computed on."""
    folder = tmp_path_factory.mktemp("wide")
    base = mixed(Sizes(hidden=512, inner=1101, key=128, vocabulary=6007, layers=2), seed=3)
    base["lm_head.weight"] = base["lm_head.weight"].float()
    lora = write_adapter(folder / "adapter", base, targets=("_proj", "lm_head"), rank=12, ratio=0.1)
    return write_base(folder / "base", base, sizes=LARGE, shards=3), lora


@pytest.fixture(scope="module")
def undisturbed(wide: tuple[Path, Lora], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    lorasmith.merge(*_paths(wide), out)
    return out


def _paths(inputs: tuple[Path, Lora]) -> tuple[Path, Path]:
    return inputs[0], inputs[1].folder


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_threads_and_memory_change_no_byte(tmp_path: Path, wide: tuple[Path, Lora], dtype: str) -> None:
    smallest = smallest_budget(*wide, tmp_path / "none")
    digests = set()
    for threads in (1, 2, 4):
        for memory in (smallest, smallest + 777_777, 3 * smallest, 64 << 20, GIB):
            out = tmp_path / f"{threads}-{memory}"
            lorasmith.merge(*_paths(wide), out, threads=threads, memory=memory, dtype=dtype)
            digests.add(json.dumps(tree(out)))
            shutil.rmtree(out)
    assert len(digests) == 1


def test_the_smallest_budget_works_and_one_byte_less_does_not(tmp_path: Path, wide: tuple[Path, Lora]) -> None:
    smallest = smallest_budget(*wide, tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(lorasmith.BudgetTooSmall, match=f"{smallest:,}"):
        lorasmith.merge(*_paths(wide), tmp_path / "out", memory=smallest - 1, threads=3)
    assert tree(tmp_path) == before
    lorasmith.merge(*_paths(wide), tmp_path / "out", memory=smallest, threads=3)


def test_the_report_too_is_the_same_for_any_threads_and_memory(tmp_path: Path, wide: tuple[Path, Lora]) -> None:
    smallest = smallest_budget(*wide, tmp_path / "none")
    survivals = [
        lorasmith.merge(*_paths(wide), tmp_path / str(threads), threads=threads, memory=memory).survival
        for threads, memory in ((1, smallest), (2, 16 << 20), (4, GIB))
    ]
    assert survivals[0] is not None
    assert survivals.count(survivals[0]) == 3


def test_equal_runs_in_different_folders_write_equal_trees(tmp_path: Path, wide: tuple[Path, Lora]) -> None:
    """The provenance record names neither paths nor times."""
    base, lora = wide
    shutil.copytree(base, tmp_path / "elsewhere" / "a base")
    shutil.copytree(lora.folder, tmp_path / "elsewhere" / "an adapter")
    lorasmith.merge(base, lora.folder, tmp_path / "one")
    lorasmith.merge(
        tmp_path / "elsewhere" / "a base", tmp_path / "elsewhere" / "an adapter", tmp_path / "deep" / "er" / "two"
    )
    assert tree(tmp_path / "one") == tree(tmp_path / "deep" / "er" / "two")
    text = (tmp_path / "one" / "lorasmith.json").read_text()
    assert json.loads(text)["adapters"][0]["sha256"] == sha256(lora.folder / "adapter_model.safetensors")
    assert str(tmp_path) not in text
    assert str(base.parent) not in text


def test_merging_again_over_the_own_result_changes_no_byte(
    tmp_path: Path, wide: tuple[Path, Lora], undisturbed: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "out")
    lorasmith.merge(*_paths(wide), tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == tree(undisturbed)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"allow_overflow": True},
        {"max_shard_size": 10**6},
        {"tokenizer": "base"},
        {"adapters": "weight"},
        {"adapters": "content"},
        {"base": "header"},
    ],
    ids=lambda one: "-".join(map(str, *one.items())),
)
def test_whatever_changes_the_result_changes_the_plan_s_hash(tmp_path: Path, change: dict[str, object]) -> None:
    base = bases()
    folder, lora = write_base(tmp_path / "base", base), write_adapter(tmp_path / "adapter", base)
    (lora.folder / "tokenizer.json").write_text("{}")
    other = write_adapter(tmp_path / "other", base, seed=9)
    (other.folder / "tokenizer.json").write_text("{}")
    renamed = write_base(tmp_path / "renamed", {**base, "model.extra": torch.zeros(3)})
    plain = lorasmith.plan(folder, lora.folder)
    assert plain.hash == lorasmith.plan(folder, lora.folder, tmp_path / "out").hash
    adapters = {"weight": (lora.folder, 0.5), "content": other.folder}.get(str(change.get("adapters")), lora.folder)
    options = {key: value for key, value in change.items() if key not in ("adapters", "base")}
    changed = lorasmith.plan(renamed if "base" in change else folder, adapters, **options)
    assert changed.hash != plain.hash


def test_a_lower_precision_that_the_host_program_chose_changes_no_byte_and_stays_chosen(tmp_path: Path) -> None:
    base = bases(LARGE, torch.float32)
    folder = write_base(tmp_path / "base", base, sizes=LARGE, dtype="float32")
    lora = write_adapter(tmp_path / "adapter", base, rank=512, ratio=1.0, targets=("up_proj",))
    lorasmith.merge(folder, lora.folder, tmp_path / "wanted")
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            lorasmith.merge(folder, lora.folder, tmp_path / precision)
            assert torch.get_float32_matmul_precision() == precision
            assert tree(tmp_path / precision) == tree(tmp_path / "wanted")
    finally:
        torch.set_float32_matmul_precision(before)


# ------------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_new_shards_load_in_transformers_and_hold_at_most_what_was_asked(
    tmp_path: Path, shards: int, dtype: str
) -> None:
    transformers = pytest.importorskip("transformers")
    base = bases()
    limit = 150_000
    folder = write_base(tmp_path / "base", base, shards=shards)
    lora = write_adapter(tmp_path / "adapter", base)
    lorasmith.merge(folder, lora.folder, tmp_path / "out", max_shard_size=limit, dtype=dtype)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {}
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        held |= dict.fromkeys(tensors, file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
        with safe_open(tmp_path / "out" / file, "pt") as stream:
            assert stream.metadata()["format"] == "pt"
    assert index["weight_map"] == held
    merged = load(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in merged.values())
    if dtype == "keep":
        require_merged(merged, base, lora)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, merged[name]) for name, value in model.state_dict().items())
    assert model.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)


def test_shards_as_large_as_the_model_make_one_file_without_an_index(tmp_path: Path) -> None:
    base = bases()
    folder = write_base(tmp_path / "base", base, shards=3)
    lora = write_adapter(tmp_path / "adapter", base)
    lorasmith.merge(folder, lora.folder, tmp_path / "out", max_shard_size=GIB)
    assert [file.name for file in (tmp_path / "out").glob("model*.safetensors*")] == ["model.safetensors"]
    require_merged(load(tmp_path / "out"), base, lora)


# ----------------------------------------------------------------------------------------------- sets of weights


@pytest.mark.parametrize("shards", [1, 3])
def test_of_several_sets_of_weights_the_one_transformers_loads_is_merged_and_the_rest_is_noted(
    tmp_path: Path, shards: int
) -> None:
    transformers = pytest.importorskip("transformers")
    base, decoy = bases(seed=0), bases(seed=5)
    folder = write_base(tmp_path / "base", base, shards=shards)
    save_file(decoy, folder / "consolidated.safetensors")
    torch.save(decoy, folder / "pytorch_model.bin")
    (folder / "original").mkdir()
    torch.save(decoy, folder / "original" / "consolidated.00.pth")
    (folder / "original" / "params.json").write_text("{}")
    if shards == 1:  # an index that a single file wins over
        save_file(decoy, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {}, "weight_map": dict.fromkeys(decoy, "model-00001-of-00001.safetensors")},
        )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], base[name]) for name in base)
    lora = write_adapter(tmp_path / "adapter", base)
    report = lorasmith.merge(folder, lora.folder, tmp_path / "out")
    require_merged(load(tmp_path / "out"), base, lora)
    assert not {"consolidated.safetensors", "pytorch_model.bin", "original"} & set(os.listdir(tmp_path / "out"))
    (note,) = [text for text in report.notes if "not used" in text]
    assert "consolidated.safetensors" in note
    unnamed = re.search(r"and (\d+) more", note)
    named = sum(name in note for name in ("pytorch_model.bin", "original", "model-00001-of-00001.safetensors"))
    assert named + int(unnamed[1] if unnamed else 0) >= 2
    assert report.to_dict()["notes"] == list(report.notes)


def test_a_folder_with_one_set_of_weights_needs_no_note(tmp_path: Path) -> None:
    base = bases()
    lora = write_adapter(tmp_path / "adapter", base)
    assert lorasmith.merge(write_base(tmp_path / "base", base, shards=2), lora.folder, tmp_path / "out").notes == ()


# -------------------------------------------------------------------------------------------------- as a citizen


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask_and_not_the_base_s_files(tmp_path: Path, mask: int) -> None:
    base = bases()
    folder = write_base(tmp_path / "base", base, shards=2)
    save_file(base, tmp_path / "base.safetensors")
    for one in folder.rglob("*"):
        one.chmod(0o700 if one.is_dir() else 0o600)
    lora = write_adapter(tmp_path / "adapter", base)
    with umask(mask):
        lorasmith.merge(folder, lora.folder, tmp_path / "new" / "out")
        lorasmith.merge(tmp_path / "base.safetensors", lora.folder, tmp_path / "new" / "out.safetensors")
    for one in [tmp_path / "new", *(tmp_path / "new").rglob("*")]:
        assert one.stat().st_mode & 0o777 == (0o777 if one.is_dir() else 0o666) & ~mask, one


def test_torch_s_number_of_threads_is_restored_in_every_thread(tmp_path: Path) -> None:
    base = bases()
    folder, lora = write_base(tmp_path / "base", base), write_adapter(tmp_path / "adapter", base)
    before = torch.get_num_threads()
    try:
        for wanted in (3, 1, 2):
            torch.set_num_threads(wanted)
            lorasmith.merge(folder, lora.folder, tmp_path / str(wanted), threads=2)
            assert torch.get_num_threads() == wanted
            assert _in_new_thread(torch.get_num_threads) == wanted
        torch.set_num_threads(3)
        (lora.folder / "adapter_config.json").write_text("{")
        with pytest.raises(lorasmith.BadFile):
            lorasmith.merge(folder, lora.folder, tmp_path / "failed")
        with pytest.raises(ZeroDivisionError):
            lorasmith.merge(*_paths((folder, write_adapter(tmp_path / "b", base))), tmp_path / "x", progress=_divide)
        assert torch.get_num_threads() == _in_new_thread(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(before)


def _divide(progress: lorasmith.Progress) -> None:
    _ = 1 / 0


def _in_new_thread(ask):  # type: ignore[no-untyped-def]
    found = []
    thread = threading.Thread(target=lambda: found.append(ask()))
    thread.start()
    thread.join()
    return found[0]


def test_merges_from_several_threads_at_once_write_what_each_would_alone(
    tmp_path: Path, wide: tuple[Path, Lora], undisturbed: Path
) -> None:
    base, lora = wide
    half = tmp_path / "half alone"
    lorasmith.merge(base, (lora.folder, 0.5), half)
    threads_before = torch.get_num_threads()
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            lorasmith.merge(base, (lora.folder, 1 - number % 2 / 2), tmp_path / f"out{number}", threads=2)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    wanted = tree(undisturbed), tree(half)
    assert wanted[0] != wanted[1]
    assert all(tree(tmp_path / f"out{number}") == wanted[number % 2] for number in range(4))
    assert torch.get_num_threads() == _in_new_thread(torch.get_num_threads) == threads_before


def test_progress_grows_to_the_whole_and_is_told_in_the_caller_s_thread(
    tmp_path: Path, wide: tuple[Path, Lora]
) -> None:
    seen: list[tuple[lorasmith.Progress, int]] = []
    report = lorasmith.merge(
        *_paths(wide), tmp_path / "out", progress=lambda one: seen.append((one, threading.get_ident()))
    )
    events = [event for event, _ in seen]
    assert {thread for _, thread in seen} == {threading.get_ident()}
    assert events
    sizes = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert {event.total for event in events} == {sizes}
    assert events[-1].done == sizes
    assert sorted(event.done for event in events) == [event.done for event in events]
    assert sorted(event.seconds for event in events) == [event.seconds for event in events]
    assert all(event.resumed == 0 for event in events)
    assert events[-1].rate == pytest.approx(sizes / events[-1].seconds)
    assert events[-1].seconds_left == 0
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert report.bytes_written == written


def test_an_error_in_the_progress_callback_ends_the_run_and_leaves_nothing(
    tmp_path: Path, wide: tuple[Path, Lora]
) -> None:
    with pytest.raises(ZeroDivisionError):
        lorasmith.merge(*_paths(wide), tmp_path / "out", progress=_divide)
    assert os.listdir(tmp_path) == []


def test_raising_in_planned_stops_before_anything_is_written(tmp_path: Path, wide: tuple[Path, Lora]) -> None:
    def stop(plan: lorasmith.Plan, resources: object) -> None:
        raise KeyError(plan.hash)

    with pytest.raises(KeyError):
        lorasmith.merge(*_paths(wide), tmp_path / "deep" / "out", planned=stop)
    assert os.listdir(tmp_path) == []


def test_the_library_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = bases()
    folder, lora = write_base(tmp_path / "base", base), write_adapter(tmp_path / "adapter", base, ratio=0.0005)
    report = lorasmith.merge(folder, lora.folder, tmp_path / "out", progress=lambda one: None)
    assert report.warnings
    with pytest.raises(lorasmith.OutputExists):
        lorasmith.merge(folder, lora.folder, tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_a_plan_survives_pickling_and_prints_and_becomes_json(tmp_path: Path, wide: tuple[Path, Lora]) -> None:
    plan = lorasmith.plan(*_paths(wide), tmp_path / "out")
    assert os.listdir(tmp_path) == []
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert again.hash in repr(again)
    assert json.loads(json.dumps(plan.to_dict()))["tensors_merged"] == len(wide[1].terms)


def test_a_report_survives_pickling_and_counts_every_tensor(tmp_path: Path, wide: tuple[Path, Lora]) -> None:
    report = lorasmith.merge(*_paths(wide), tmp_path / "out")
    assert pickle.loads(pickle.dumps(report)) == report
    tensors = load(tmp_path / "out")
    assert report.tensors_merged == len(wide[1].terms)
    assert report.tensors_copied == len(tensors) - len(wide[1].terms)
    assert (report.tensors_replaced, report.tensors_converted, report.bytes_resumed) == (0, 0, 0)
    (use,) = report.adapters
    assert (use.rank, use.scale) == ((12, 12), (32 / 12, 32 / 12))
    assert use.tensors == use.tensors_used == 2 * len(wide[1].terms)
    assert json.loads(json.dumps(report.to_dict()))["schema"] == 1


# ------------------------------------------------------------------------------------------------------- memory

_PEAK = """
import sys, torch
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.ones(64, 64, dtype=torch.bfloat16).float().addmm_(torch.ones(64, 8), torch.ones(8, 64))
import lorasmith, lorasmith.merging
before = peak()
lorasmith.merge(sys.argv[1], sys.argv[2], sys.argv[3], memory=int(sys.argv[4]), threads=2)
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks /proc for the peak")
@pytest.mark.parametrize(("memory", "rank"), [(12 << 20, 16), (12 << 20, 128), (48 << 20, 16)])
def test_a_run_takes_the_memory_it_was_given_however_large_a_tensor_is(tmp_path: Path, memory: int, rank: int) -> None:
    """Beside the budget: modules imported on the way, stacks, and what malloc keeps for each thread."""
    base = {"model.up_proj.weight": torch.full((40_001, 1024), 0.5, dtype=torch.float16)}
    base["model.embed_tokens.weight"] = torch.full((42_000, 1024), 0.5, dtype=torch.float16)
    save_file(base, tmp_path / "base.safetensors")
    factors = {"lora_A": torch.ones(rank, 1024), "lora_B": torch.ones(40_001, rank)}
    save_file({f"model.up_proj.{name}.weight": one for name, one in factors.items()}, tmp_path / "lora.safetensors")
    besides = 24 << 20
    assert min(tensor.nbytes for tensor in base.values()) > memory + besides
    command = [sys.executable, "-c", _PEAK, *(f"{tmp_path}/{name}.safetensors" for name in ("base", "lora", "out"))]
    grown = int(subprocess.run([*command, str(memory)], check=True, capture_output=True, text=True).stdout)
    assert grown < memory + besides
    assert (load_file(tmp_path / "out.safetensors")["model.up_proj.weight"] == rank + 0.5).all()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """A sparse base larger than any disk: its header promises what its blocks do not hold."""
    shape = (1 << 22, 1 << 20)
    size = 2 * shape[0] * shape[1]
    free = shutil.disk_usage(tmp_path).free
    if free > size:
        pytest.skip("a disk of more than 8 TiB")
    facts = {"model.up_proj.weight": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}
    raw = json.dumps(facts).encode()
    try:
        with open(tmp_path / "base.safetensors", "wb") as stream:
            stream.write(struct.pack("<Q", len(raw)) + raw)
            stream.truncate(8 + len(raw) + size)
    except OSError:
        pytest.skip("a file system without files this large")
    lora = tmp_path / "lora.safetensors"
    factors = {"lora_A": torch.ones(1, shape[1]).half(), "lora_B": torch.ones(shape[0], 1).half()}
    save_file({f"model.up_proj.{name}.weight": factor for name, factor in factors.items()}, lora)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(lorasmith.NoSpace, match="free"):
        lorasmith.merge(tmp_path / "base.safetensors", lora, tmp_path / "out.safetensors")
    assert sorted(os.listdir(tmp_path)) == before
