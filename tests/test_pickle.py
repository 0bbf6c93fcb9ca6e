"""Files of torch.save as byte ranges: what the header says lies where torch.load finds it, and nothing is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generate import SMALL, bases, config, mixed, raw_bytes, tree, write_adapter, write_base
from safetensors.torch import load_file, save_file

import lorasmith
from lorasmith import BadFile, IOFailed, LorasmithError, MissingFile
from lorasmith import Unsupported as NotSupported
from lorasmith.picklefile import WRAPPERS, Pickle, is_pickle, read_pickle
from lorasmith.safefile import Header, read_header
from lorasmith.weightfile import read_weights, spool


def saved(folder: Path, value: object, **options: Any) -> Path:
    file = folder / "pytorch_model.bin"
    torch.save(value, file, **options)
    return file


def header_of(file: Path) -> Header:
    found = read_pickle(str(file))
    assert found.header is not None, found.obstacle
    return found.header


def require_ranges(file: Path, right: dict[str, torch.Tensor]) -> Header:
    """Every tensor is in the header, with the dtype, shape and bytes that torch gives it."""
    header, raw = header_of(file), file.read_bytes()
    assert {entry.name for entry in header.entries} == right.keys()
    assert len(header.entries) == len(right)
    codes = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
    codes |= {torch.uint8: "U8", torch.int16: "I16", torch.int64: "I64", torch.bool: "BOOL", torch.complex64: "C64"}
    for entry in header.entries:
        tensor = right[entry.name].detach()
        assert (entry.file, entry.dtype, entry.shape) == (str(file), codes[tensor.dtype], tuple(tensor.shape))
        assert raw[entry.start : entry.start + entry.nbytes] == raw_bytes(tensor), entry.name
    starts = [entry.start for entry in header.entries]
    assert starts == sorted(starts)
    assert (header.size, header.data_start) == (len(raw), 0)
    assert header.stamp == (str(file), len(raw), file.stat().st_mtime_ns)
    return header


def refused(file: Path, kind: type[LorasmithError], *named: str) -> str:
    """The message with which a file is refused: one line, that begins with its name."""
    with pytest.raises(LorasmithError) as caught:
        read_pickle(str(file))
    assert type(caught.value) is kind, caught.value
    message = str(caught.value)
    assert message.startswith(str(file))
    assert message.isprintable()
    assert len(message) < 1000
    for name in named:
        assert name in message, message
    return message


def repacked(file: Path, change: Callable[[dict[str, bytes]], None], method: int = zipfile.ZIP_STORED) -> Path:
    """The same archive, written by another program after ``change`` of its members."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file


# ------------------------------------------------------------------------------------------------------- ranges


def test_every_dtype_lies_where_the_header_says(tmp_path: Path) -> None:
    tensors = mixed()
    tensors["complex"] = torch.randn(3, dtype=torch.complex64)
    assert require_ranges(saved(tmp_path, tensors), tensors).metadata == {"format": "pt"}


def test_parameters_are_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.nn.Parameter(torch.randn(3, 4)), "b": torch.nn.Parameter(torch.ones(2), requires_grad=False)}
    require_ranges(saved(tmp_path, OrderedDict(tensors)), tensors)


def test_views_share_the_storage_they_were_saved_with(tmp_path: Path) -> None:
    whole = torch.arange(60.0).view(10, 6)
    tensors = {"rows": whole[3:7], "whole": whole, "one": whole[9, 5], "flat": whole.view(-1)[7:20], "none": whole[:0]}
    require_ranges(saved(tmp_path, tensors), tensors)


def test_tied_tensors_are_one_range_under_two_names(tmp_path: Path) -> None:
    weight = torch.randn(5, 7)
    tensors = {"model.embed_tokens.weight": weight, "other": torch.ones(3), "lm_head.weight": weight}
    header = require_ranges(saved(tmp_path, tensors), tensors)
    entries = {entry.name: entry for entry in header.entries}
    assert entries["lm_head.weight"].start == entries["model.embed_tokens.weight"].start


def test_dimensions_of_one_do_not_put_a_tensor_out_of_order(tmp_path: Path) -> None:
    tensors = {"position_ids": torch.arange(9).expand(1, -1), "column": torch.randn(6, 1).t()}
    require_ranges(saved(tmp_path, tensors), tensors)


def test_storages_that_older_versions_of_torch_sorted_by_name_are_found(tmp_path: Path) -> None:
    """There data/10 stands before data/2, at no fixed distance; nothing marks the format, nor the order of bytes."""
    tensors = {f"layers.{number}.weight": torch.randn(4, 4) for number in range(12)}

    def as_before(members: dict[str, bytes]) -> None:
        kept = {name: data for name, data in members.items() if not name.rpartition("/")[2].startswith((".", "byteo"))}
        members.clear()
        members |= dict(sorted(kept.items()))

    file = repacked(saved(tmp_path, tensors), as_before)
    require_ranges(file, tensors)
    assert [entry.name for entry in header_of(file).entries] != list(tensors)


def test_a_large_alignment_of_storages_is_followed(tmp_path: Path) -> None:
    tensors = bases()
    serialization = torch.utils.serialization.config.save
    before = serialization.storage_alignment
    try:
        serialization.storage_alignment = 4096
        file = saved(tmp_path, tensors)
    finally:
        serialization.storage_alignment = before
    assert all(entry.start % 4096 == 0 for entry in require_ranges(file, tensors).entries)


def test_the_digest_is_of_names_dtypes_shapes_and_places_and_not_of_values(tmp_path: Path) -> None:
    def digest(tensors: dict[str, torch.Tensor]) -> str:
        return header_of(saved(tmp_path, tensors)).sha256

    first = digest({"a": torch.zeros(2, 6), "b": torch.zeros(12)})
    assert digest({"a": torch.ones(2, 6), "b": torch.ones(12)}) == first
    others = [
        digest({"a": torch.zeros(6, 2), "b": torch.zeros(12)}),
        digest({"a": torch.zeros(2, 6, dtype=torch.int32), "b": torch.zeros(12)}),
        digest({"c": torch.zeros(2, 6), "b": torch.zeros(12)}),
        digest({"b": torch.zeros(12), "a": torch.zeros(2, 6)}),
    ]
    assert len({first, *others}) == 5


def test_reading_leaves_files_and_warnings_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path, mixed())
    before = tree(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_pickle(str(file))
    assert tree(tmp_path) == before
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------- what is found in the wild


def tiny_llama(*, tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**config(SMALL), "tie_word_embeddings": tied}))


@pytest.mark.parametrize("tied", [True, False])
def test_the_state_dict_of_a_model_is_read_as_transformers_reads_it(tmp_path: Path, tied: bool) -> None:
    from transformers import LlamaForCausalLM

    model = tiny_llama(tied=tied).bfloat16()
    model.config.save_pretrained(tmp_path)
    header = require_ranges(saved(tmp_path, model.state_dict()), model.state_dict())
    places = {entry.name: entry.start for entry in header.entries}
    assert (places["lm_head.weight"] == places["model.embed_tokens.weight"]) is tied
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    raw = (tmp_path / "pytorch_model.bin").read_bytes()
    for entry in header.entries:
        assert raw[entry.start : entry.start + entry.nbytes] == raw_bytes(again[entry.name])


def test_a_tied_model_written_with_both_names_is_the_same_model_to_transformers(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = tiny_llama(tied=True).bfloat16()
    model.config.save_pretrained(tmp_path)
    file = Path(spool(str(saved(tmp_path, model.state_dict())), str(tmp_path)))
    os.unlink(tmp_path / "pytorch_model.bin")
    os.rename(file, tmp_path / "model.safetensors")
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_the_shards_of_a_model_hold_what_their_index_says(tmp_path: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    tensors = bases()
    save_torch_state_dict(tensors, tmp_path, safe_serialization=False, max_shard_size="200KB")
    index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    for shard in shards:
        names = [name for name, file in index["weight_map"].items() if file == shard]
        require_ranges(tmp_path / shard, {name: tensors[name] for name in names})


def test_an_adapter_that_peft_wrote_as_a_pickle_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    model = get_peft_model(tiny_llama(tied=False), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path, safe_serialization=False)
    require_ranges(tmp_path / "adapter_model.bin", get_peft_model_state_dict(model))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_state_dict_is_found_under_the_key_that_trainers_use(tmp_path: Path, wrapper: str) -> None:
    tensors = bases()
    file = saved(tmp_path, {wrapper: tensors, "epoch": 3, "optimizer": {"state": {}, "lr": [0.1]}})
    require_ranges(file, tensors)
    (note,) = read_pickle(str(file)).notes
    assert note.startswith(f"{file}: the weights are its {wrapper!r}")
    assert "'epoch', 'optimizer'" in note


def test_numbers_beside_tensors_are_left_out_and_named(tmp_path: Path) -> None:
    tensors = bases()
    file = saved(tmp_path, {"step": 12, **tensors, "name": "x", "flags": [True, None]})
    require_ranges(file, tensors)
    (note,) = read_pickle(str(file)).notes
    assert "'step', 'name', 'flags'" in note
    assert read_pickle(str(saved(tmp_path, tensors))).notes == ()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"state_dict": {"a": torch.ones(2)}, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}, "'optimizer'"),
        ({"a": torch.ones(2), "extra": [{"b": torch.ones(2)}]}, "'extra'"),
        ({"a": torch.ones(2), "bare": torch.ones(2).untyped_storage()}, "'bare'"),
        ({"ema": {"a": torch.ones(2)}}, "'ema'"),
        ([torch.ones(2)], "a list"),
        (torch.ones(2), "a Tensor"),
        ({"state_dict": {"model": [torch.ones(2)]}}, "under 'state_dict' under 'model'"),
        ({3: torch.ones(2)}, "3"),
        ({"__metadata__": torch.ones(2)}, "'__metadata__'"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is torch.sparse_coo"),
        ({"a": torch.ones(3, dtype=torch.complex128)}, "'a' is torch.complex128"),
        ({"a": torch.empty(3, device="meta")}, "'a' has no data"),
    ],
)
def test_what_would_lose_a_tensor_is_refused_by_name(tmp_path: Path, value: object, named: str) -> None:
    refused(saved(tmp_path, value), NotSupported, named)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_torch_quantised_are_refused(tmp_path: Path, zipped: bool) -> None:
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    file = saved(tmp_path, {"a": quantised}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(NotSupported, match=r"quantised|qint8"):
        spool(str(file), str(tmp_path))
    assert os.listdir(tmp_path) == [file.name]


def test_a_dictionary_that_holds_itself_is_refused(tmp_path: Path) -> None:
    value: dict[str, Any] = {}
    value["model"] = {"model": value, "module": {"a": torch.ones(2)}}
    refused(saved(tmp_path, value), NotSupported, "'model'")


# ------------------------------------------------------------------------------------------------------- spooling


def require_spooled(file: Path, right: dict[str, torch.Tensor], folder: Path) -> Pickle:
    """The file is no set of ranges, and becomes one."""
    found = read_pickle(str(file))
    assert found.header is None
    assert found.obstacle is not None
    folder.mkdir()
    path = spool(str(file), str(folder))
    assert path == str(folder / "pytorch_model.safetensors")
    assert os.listdir(folder) == ["pytorch_model.safetensors"]
    loaded = load_file(path)
    assert {name: (one.dtype, raw_bytes(one.resolve_conj())) for name, one in loaded.items()} == {
        name: (one.dtype, raw_bytes(one.resolve_conj())) for name, one in right.items()
    }
    assert {entry.name: entry.shape for entry in read_header(path).entries} == {
        name: tuple(one.shape) for name, one in right.items()
    }
    return found


@pytest.mark.parametrize(
    "scattered",
    [
        torch.randn(5, 64).t(),
        torch.randn(64, 64)[:, 3:9],
        torch.randn(1, 64).expand(3, 64),
        torch.randn(6, dtype=torch.complex64).conj(),
    ],
    ids=["transposed", "columns", "expanded", "conjugated"],
)
def test_tensors_out_of_order_are_named_and_spooled(tmp_path: Path, scattered: torch.Tensor) -> None:
    tensors = {**mixed(), "odd": scattered}
    found = require_spooled(saved(tmp_path, tensors), tensors, tmp_path / "room")
    assert "'odd'" in str(found.obstacle)
    assert found.memory == scattered.nbytes


def test_the_format_before_torch_1_6_is_told_and_spooled(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    tensors = {**mixed(), "tied": weight, "head": weight, "rows": weight[2:], "turned": weight.t()}
    file = saved(tmp_path, {"model": tensors}, _use_new_zipfile_serialization=False)
    found = require_spooled(file, tensors, tmp_path / "room")
    assert "1.6" in str(found.obstacle)
    assert found.memory == file.stat().st_size


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks /proc for open files")
def test_a_copy_that_was_made_goes_when_its_tensors_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path, mixed(), _use_new_zipfile_serialization=False)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = len(os.listdir("/proc/self/fd"))
    entry = read_weights(str(file))[0].entries[0]
    assert os.path.getsize(entry.file) > entry.nbytes
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del entry
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.setattr("lorasmith.weightfile.build_header", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_weights(str(file))
    assert os.listdir(tmp_path / "temporary") == []


def test_spooling_writes_equal_bytes_each_time_and_over_nothing(tmp_path: Path) -> None:
    file = saved(tmp_path, bases(), _use_new_zipfile_serialization=False)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (Path(spool(str(file), str(tmp_path / name))) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    before = tree(tmp_path)
    for folder in ("a", "missing"):
        with pytest.raises(IOFailed, match=folder):
            spool(str(file), str(tmp_path / folder))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_larger_than_its_file_is_not_spooled(tmp_path: Path, zipped: bool) -> None:
    file = saved(tmp_path, {"a": torch.ones(1).expand(1 << 40)}, _use_new_zipfile_serialization=zipped)
    before = tree(tmp_path)
    with pytest.raises(NotSupported, match=r"'a'.*4,398,046,511,104 bytes"):
        spool(str(file), str(tmp_path))
    assert tree(tmp_path) == before


# -------------------------------------------------------------------------------------------------------- hostile


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "named"), [(os.system, "posix.system"), (eval, "eval"), (subprocess.check_output, "check_output")]
)
def test_a_pickle_that_calls_functions_is_refused_and_calls_nothing(
    tmp_path: Path, zipped: bool, function: Callable[..., object], named: str
) -> None:
    mark = tmp_path / "executed"
    code = f"open({str(mark)!r}, 'w')" if function is eval else f"touch {mark}"
    value = {"a": torch.ones(2), "b": Call(function, code)}
    file = saved(tmp_path, value, _use_new_zipfile_serialization=zipped)
    if zipped:
        refused(file, BadFile, named)
    with pytest.raises(BadFile, match=named):
        spool(str(file), str(tmp_path))
    assert os.listdir(tmp_path) == [file.name]
    with zipfile.ZipFile(file) if zipped else open(file, "rb") as raw:
        data = raw.read("pytorch_model/data.pkl") if isinstance(raw, zipfile.ZipFile) else raw.read()
    assert code.encode() in data


def test_a_pickled_model_is_refused(tmp_path: Path) -> None:
    refused(saved(tmp_path, torch.nn.Linear(2, 2)), BadFile, "torch.nn.modules.linear.Linear", "state_dict()")


def with_pickle(file: Path, data: bytes) -> Path:
    """The archive with another data.pkl, and without the mark by which torch would reckon places."""

    def forge(members: dict[str, bytes]) -> None:
        del members["pytorch_model/.format_version"]
        members["pytorch_model/data.pkl"] = data

    return repacked(file, forge)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02}q\x00h\x07.",
        b"\x80\x02U\x01a}}s.",
        b"\x80\x02](K\x01u.",
        b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x07\x00\x00\x00\x00\x00\x00\x7f\x85R.",
        b"\x80\x02X\xff\xff\xff\xffa.",
        b"\x80\x02(U\x07storageK\x01tQ.",
    ],
)
def test_broken_pickles_are_refused(tmp_path: Path, data: bytes) -> None:
    file = with_pickle(saved(tmp_path, {"a": torch.ones(2)}), data)
    with pytest.raises((BadFile, NotSupported)) as caught:
        read_pickle(str(file))
    assert str(caught.value).startswith(str(file))
    assert str(caught.value).isprintable()


def test_sizes_in_the_pickle_that_the_archive_does_not_have_are_refused(tmp_path: Path) -> None:
    """Four floats become 255 that end beyond the storage, or a view of them that does."""
    from torch._utils import _rebuild_tensor_v2

    file = saved(tmp_path, {"a": torch.ones(4)})
    with zipfile.ZipFile(file) as archive:
        data = archive.read("pytorch_model/data.pkl")
    assert data.count(b"K\x04") == 2
    refused(with_pickle(file, data.replace(b"K\x04", b"K\xff")), BadFile, "'a'", "1,020 bytes", "16 there")
    storage = torch.ones(4)
    typed = torch.storage.TypedStorage(wrap_storage=storage.untyped_storage(), dtype=torch.float32, _internal=True)
    beyond = Call(_rebuild_tensor_v2, typed, 2, (4,), (1,), False, OrderedDict())
    refused(saved(tmp_path, {"fine": storage, "beyond": beyond}), BadFile, "'beyond'")


def test_a_storage_that_reaches_beyond_the_file_is_refused(tmp_path: Path) -> None:
    """Pickle and directory agree on a size that the file does not have."""
    file = saved(tmp_path, {"a": torch.ones(4, dtype=torch.float64)})
    with zipfile.ZipFile(file) as archive:
        data = archive.read("pytorch_model/data.pkl")
    raw = bytearray(with_pickle(file, data.replace(b"K\x04", b"K\xff")).read_bytes())
    place = raw.rindex(b"pytorch_model/data/0") - 46
    assert raw[place : place + 4] == b"PK\x01\x02"
    struct.pack_into("<II", raw, place + 20, 2040, 2040)
    file.write_bytes(raw)
    assert len(raw) - raw.index(b"pytorch_model/data/0") < 2040
    refused(file, BadFile, "data/0", "beyond the end")


@pytest.mark.parametrize("stop", [0, 1, 40, 3000, -1, -22, -23, -400, -70_000])
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, stop: int) -> None:
    file = saved(tmp_path, bases())
    file.write_bytes(file.read_bytes()[:stop])
    refused(file, BadFile)


def test_compressed_archives_are_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    def inflate(members: dict[str, bytes]) -> None:
        members["pytorch_model/data.pkl"] = b"\x80\x02" + bytes(50_000_000)

    file = repacked(saved(tmp_path, {"a": torch.ones(2)}), inflate, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 1_000_000
    refused(file, BadFile, "compressed")


def test_archives_that_others_repacked_are_refused_where_places_would_be_guessed(tmp_path: Path) -> None:
    tensors = {f"{number}.weight": torch.full((4, 4), float(number)) for number in range(12)}

    def swap(members: dict[str, bytes]) -> None:
        ordered = dict(sorted(members.items()))
        members.clear()
        members |= ordered

    refused(repacked(saved(tmp_path, tensors), swap), NotSupported, "repacked")
    refused(repacked(saved(tmp_path, tensors), lambda members: None), NotSupported, "repacked")


def test_bytes_in_the_other_order_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, {"a": torch.ones(2)})
    refused(repacked(file, lambda members: members.update({"pytorch_model/byteorder": b"big"})), NotSupported, "endian")


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, {"a": torch.ones(2)})
    with zipfile.ZipFile(file, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("pytorch_model/data/0", bytes(8))
    refused(file, BadFile, "two members")


def test_another_pickle_protocol_is_refused_by_name(tmp_path: Path) -> None:
    refused(saved(tmp_path, {"a": torch.ones(2)}, pickle_protocol=4), NotSupported, "pickle_protocol")


def _tar(file: Path) -> None:
    with tarfile.open(file, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())


def _plain_zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")


def _script(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02}.")
        archive.writestr("model/constants.pkl", b"\x80\x02).")


@pytest.mark.parametrize(
    ("write", "kind", "named"),
    [
        (_tar, NotSupported, "tar"),
        (_plain_zip, BadFile, "zip"),
        (_script, NotSupported, "TorchScript"),
        (lambda file: file.write_bytes(b"<!DOCTYPE html><html>404</html>"), BadFile, "web page"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), BadFile, "git lfs pull"),
        (lambda file: file.write_bytes(pickle.dumps({"a": 1}, 2)), BadFile, "pickle"),
        (lambda file: save_file({"a": torch.ones(2)}, file), BadFile, "safetensors"),
        (lambda file: file.write_bytes(bytes(1000)), BadFile, "torch.save"),
        (lambda file: file.write_bytes(b""), BadFile, "0 bytes"),
        (lambda file: file.mkdir(), BadFile, "regular"),
    ],
)
def test_other_files_are_refused_by_what_they_are(
    tmp_path: Path, write: Callable[[Path], object], kind: type[LorasmithError], named: str
) -> None:
    file = tmp_path / "pytorch_model.bin"
    write(file)
    refused(file, kind, named)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "none.bin", MissingFile)


def test_damage_anywhere_is_refused_or_harmless(tmp_path: Path) -> None:
    """Every byte before the data, inverted: what is still read lies within the file."""
    file = saved(tmp_path, {"a": torch.ones(4), "b": torch.ones(4, dtype=torch.int64)})
    sound = file.read_bytes()
    outcomes = set()
    for position in range(0, len(sound), 3):
        file.write_bytes(sound[:position] + bytes([sound[position] ^ 0xFF]) + sound[position + 1 :])
        try:
            header = read_pickle(str(file)).header
        except LorasmithError as error:
            outcomes.add(type(error))
            continue
        outcomes.add(Header)
        for entry in header.entries if header else ():
            assert 0 <= entry.start <= entry.start + entry.nbytes <= len(sound)
    assert {Header, BadFile} <= outcomes


# -------------------------------------------------------------------------------------------------- kinds and memory


def test_pickles_are_told_from_safetensors_by_their_contents(tmp_path: Path) -> None:
    """Lengths of a safetensors header that look like the beginning of a zip archive or a pickle are no matter."""
    file = tmp_path / "model"
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save({"a": torch.ones(2)}, file, **options)
        assert is_pickle(str(file))
    for length in (0x280, 0x04034B50):
        file.write_bytes(struct.pack("<Q", length) + b"{}".ljust(length))
        assert read_header(str(file)).entries == ()
        assert not is_pickle(str(file))
    for content in (b"", b"<!DOCTYPE html>"):
        (tmp_path / "model.bin").write_bytes(content)
        assert is_pickle(str(tmp_path / "model.bin"))
    save_file({"a": torch.ones(2)}, tmp_path / "model.bin")
    assert not is_pickle(str(tmp_path / "model.bin"))


def test_weights_are_read_from_either_kind_of_file(tmp_path: Path) -> None:
    tensors = bases()
    save_file(tensors, tmp_path / "model.safetensors")
    assert read_weights(str(tmp_path / "model.safetensors")) == (read_header(str(tmp_path / "model.safetensors")), ())
    header, notes = read_weights(str(saved(tmp_path, {"epoch": 1, **tensors})))
    assert header == require_ranges(tmp_path / "pytorch_model.bin", tensors)
    assert ["epoch" in note for note in notes] == [True]
    for value, options in (
        ({"a": torch.ones(4, 2).t()}, {}),
        (tensors, {"_use_new_zipfile_serialization": False}),
    ):
        file = saved(tmp_path, value, **options)
        header, notes = read_weights(str(file))
        facts = file.stat()
        assert header.stamp == (str(file), facts.st_size, facts.st_mtime_ns)
        assert any("bytes of memory" in note for note in notes)
        for entry in header.entries:
            with open(entry.file, "rb") as stream:
                stream.seek(entry.start)
                assert stream.read(entry.nbytes) == raw_bytes(value[entry.name])


@pytest.mark.parametrize("kind", ["before 1.6", "out of order"])
def test_a_base_that_cannot_be_streamed_is_merged_from_memory(tmp_path: Path, kind: str) -> None:
    base = bases()
    folder = write_base(tmp_path / "plain", base)
    lora = write_adapter(tmp_path / "adapter", base)
    lorasmith.merge(folder, lora.folder, tmp_path / "wanted")
    old = write_base(tmp_path / "old", base)
    (old / "model.safetensors").unlink()
    if kind == "before 1.6":
        saved(old, base, _use_new_zipfile_serialization=False)
    else:
        saved(old, {name: one.t().contiguous().t() if one.dim() == 2 else one for name, one in base.items()})
    before = set(os.listdir(tempfile.gettempdir()))
    report = lorasmith.merge(old, lora.folder, tmp_path / "out")
    assert {name for name in set(os.listdir(tempfile.gettempdir())) - before if name.startswith("lorasmith-")} == set()
    assert any("bytes of memory" in note for note in report.notes)
    wanted, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("wanted", "out"))
    assert merged.keys() == wanted.keys()
    assert all(raw_bytes(merged[name]) == raw_bytes(wanted[name]) for name in wanted)
    lorasmith.merge(old, lora.folder, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "out")


_GROWTH = """
import sys, torch
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
import lorasmith.picklefile
before = peak()
header = lorasmith.picklefile.read_pickle(sys.argv[1]).header
print(peak() - before, sum(entry.nbytes for entry in header.entries))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks /proc for the peak")
def test_reading_a_header_does_not_load_the_tensors(tmp_path: Path) -> None:
    tensors = {"whole": torch.zeros(100_000_000), "small": torch.ones(5)}
    file = saved(tmp_path, tensors)
    result = subprocess.run([sys.executable, "-c", _GROWTH, file], check=True, capture_output=True, text=True)
    grown, told = map(int, result.stdout.split())
    assert told == 400_000_020
    assert grown < 30 << 20


def test_importing_the_module_does_not_import_torch() -> None:
    command = "import sys, lorasmith.picklefile; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0


def test_adapters_are_the_same_from_either_format(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", bases()).folder
    tensors = load_file(folder / "adapter_model.safetensors")
    require_ranges(saved(tmp_path, tensors), tensors)
