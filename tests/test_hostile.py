"""Malformed and hostile files: each is refused by one error that names it, and nothing is written or changed."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from generate import Sizes, bases, tree, write_adapter, write_base, write_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import lorasmith
from lorasmith import AdapterMismatch, BadFile, IOFailed, LorasmithError, MissingFile, NotFinite, OutputExists
from lorasmith import Unsupported as NotSupported
from lorasmith.safefile import read_header

TINY = Sizes(hidden=32, inner=48, key=16, vocabulary=40, layers=1)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
HEADER_LIMIT = 100_000_000


@pytest.fixture(autouse=True)
def no_hanging() -> Iterator[None]:
    """A read that waits for ever (of a FIFO) fails the test instead."""

    def fail(*_: object) -> None:
        raise TimeoutError("still waiting after 30 s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in one file, the same in two shards, an adapter, and a model merged earlier."""
    room = tmp_path_factory.mktemp("sound")
    tensors = bases(TINY)
    write_base(room / "base", tensors, sizes=TINY)
    write_base(room / "sharded", tensors, sizes=TINY, shards=2)
    write_adapter(room / "adapter", tensors, rank=4)
    lorasmith.merge(room / "base", room / "adapter", room / "earlier")
    return room


@pytest.fixture
def room(sound: Path, tmp_path: Path) -> Path:
    """A copy of all that to spoil."""
    shutil.copytree(sound, tmp_path / "room")
    return tmp_path / "room"


def refusal(room: Path, kind: type[Exception], *named: str, base: str = "base", adapter: str = "adapter") -> str:
    """The message with which a merge is refused, as error ``kind``: one printable line that has all of ``named``.

    Whether it was to make a new output or to replace an earlier one, everything is afterwards as it was before.
    """
    before = tree(room)
    messages = []
    for out, overwrite in (("new/out", False), ("earlier", True)):
        with pytest.raises(LorasmithError) as caught:
            lorasmith.merge(room / base, room / adapter, room / out, overwrite=overwrite)
        assert type(caught.value) is kind, caught.value
        messages.append(str(caught.value))
        assert tree(room) == before
    (message,) = set(messages)
    assert message.isprintable()
    assert len(message) < 5000
    for name in named:
        assert name in message, message
    return message


# ----------------------------------------------------------------------------------------------------- headers


def framed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header (text, bytes, or a value to write as JSON), announced as ``length`` bytes."""
    raw = header if isinstance(header, bytes) else header.encode() if isinstance(header, str) else None
    raw = json.dumps(header).encode() if raw is None else raw
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def facts(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16), **more: object) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def one(*args: object, **more: object) -> bytes:
    """A file of 16 bytes of data and one tensor of these facts."""
    return framed({"weird": facts(*args, **more)}, bytes(16))


def pair(first: tuple[int, int], second: tuple[int, int], data: int) -> bytes:
    """A file of two tensors of bytes that lie at these offsets."""
    spans = {"alpha": first, "weird": second}
    return framed({name: facts("U8", [b - a], [a, b]) for name, (a, b) in spans.items()}, bytes(data))


@dataclass(frozen=True)
class Case:
    """A file, what the message must name, and why it is refused where the safetensors library accepts it."""

    data: bytes
    named: tuple[str, ...] = ()
    stricter_because: str = ""


def entry(data: bytes, stricter_because: str = "") -> Case:
    return Case(data, ("weird",), stricter_because)


SOUND = framed({"weird": facts()}, bytes(16))
DEEP = "[" * 900 + "]" * 900
HEADERS = {
    "no bytes": Case(b""),
    "seven bytes": Case(b"\0" * 7),
    "length 0": Case(framed(b"")),
    "length 1": Case(framed("{")),
    "length beyond the file": Case(framed("{}", length=50), ("truncated",)),
    "length of a terabyte": Case(framed("{}", length=1 << 40), ("1,099,511,627,776",)),
    "length of 64 ones": Case(framed("{}", length=2**64 - 1)),
    "length just above the limit": Case(framed("{}", length=HEADER_LIMIT + 1), ("100,000,001",)),
    "length at the limit": Case(framed("{}", length=HEADER_LIMIT), ("truncated",)),
    "a list": Case(framed("[]")),
    "a number": Case(framed("5")),
    "null": Case(framed("null")),
    "blank before": Case(
        framed(' {"weird": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'),
        (),
        "the format says that a header begins with {",
    ),
    "broken JSON": Case(framed('{"weird": ')),
    "two values": Case(framed("{} {}")),
    "not UTF-8": Case(framed(b'{"w\xff": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}')),
    "UTF-16": Case(framed("{}".encode("utf-16-le"))),
    "half a character": Case(framed(r'{"w\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}')),
    "NaN": Case(framed('{"weird": NaN}'), ("NaN",)),
    "Infinity": Case(framed('{"weird": {"dtype": "U8", "shape": [Infinity], "data_offsets": [0, 0]}}'), ("Infinity",)),
    "nested 900 deep": Case(framed(f'{{"weird": {DEEP}}}')),
    "nested a million deep": Case(framed('{"weird": ' + "[" * 1_000_000)),
    "nested 900 deep in a shape": Case(
        framed(f'{{"weird": {{"dtype": "U8", "shape": {DEEP}, "data_offsets": [0, 0]}}}}')
    ),
    "a number of 5000 digits": Case(framed(f'{{"weird": {{"dtype": "U8", "shape": [{"9" * 5000}]}}}}')),
    "the same tensor twice": entry(
        framed(b'{"weird": %s, "weird": %s}' % ((json.dumps(facts()).encode(),) * 2), bytes(16)),
        "the format disallows duplicate keys, which readers take differently",
    ),
    "the same fact twice": Case(
        framed('{"weird": {"dtype": "U8", "dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}', bytes(16)),
        ("dtype",),
    ),
    "metadata that is a number": Case(framed({"__metadata__": 5, "weird": facts()}, bytes(16)), ("__metadata__",)),
    "metadata of numbers": Case(framed({"__metadata__": {"a": 5}, "weird": facts()}, bytes(16)), ("__metadata__",)),
    "metadata of objects": Case(framed({"__metadata__": {"a": {}}, "weird": facts()}, bytes(16)), ("__metadata__",)),
    "a tensor that is null": entry(framed({"weird": None})),
    "a tensor that is a list": entry(
        framed({"weird": ["F32", [2, 2], [0, 16]]}, bytes(16)), "the format says that it is an object"
    ),
    "no dtype": entry(framed({"weird": {"shape": [2, 2], "data_offsets": [0, 16]}}, bytes(16))),
    "no shape": entry(framed({"weird": {"dtype": "F32", "data_offsets": [0, 16]}}, bytes(16))),
    "no offsets": entry(framed({"weird": {"dtype": "F32", "shape": [2, 2]}}, bytes(16))),
    "one fact more": entry(one(strides=[2, 1]), "what it means is unknown, and it may be how the bytes are laid out"),
    "an unknown dtype": entry(one("F33")),
    "a dtype in small letters": entry(one("f32")),
    "a dtype that is a number": entry(one(32)),
    "a dtype that is a list": entry(one(["F32"])),
    "a dtype of 100,000 letters": entry(one("F" * 100_000)),
    "a shape that is a number": entry(one(shape=4)),
    "a shape of text": entry(one(shape=["2", "2"])),
    "a shape of floats": entry(one(shape=[2.0, 2.0])),
    "a shape of bools": entry(one("U8", [True, 16])),
    "a negative shape": entry(one(shape=[-2, -2])),
    "a shape beyond 64 bits": entry(one(shape=[2**64, 0])),
    "a shape whose product is beyond 64 bits": entry(one("U8", [2**62, 2**62])),
    "a shape whose product is 16 modulo 2**64": entry(one("U8", [2**62, 4, 2**62, 4, 16])),
    "a shape that is too large": entry(one(shape=[2, 3])),
    "a shape that is too small": entry(one(shape=[2, 1])),
    "a scalar of too many bytes": entry(one(shape=[])),
    "a shape of 65 dimensions": entry(one(shape=[2, 2, *[1] * 63]), "torch has tensors of at most 64 dimensions"),
    "half a byte of F4": entry(framed({"weird": facts("F4", [3], [0, 1])}, bytes(1))),
    "offsets that are text": entry(one(offsets="0,16")),
    "offsets of floats": entry(one(offsets=[0.0, 16.0])),
    "offsets of bools": entry(framed('{"weird": {"dtype": "U8", "shape": [1], "data_offsets": [false, true]}}', b"0")),
    "negative offsets": entry(one(offsets=[-16, 0])),
    "three offsets": entry(one(offsets=[0, 16, 16])),
    "one offset": entry(one(offsets=[16])),
    "offsets that end before they begin": entry(one(offsets=[16, 0])),
    "offsets beyond 64 bits": entry(one(offsets=[2**64, 2**64 + 16])),
    "offsets that wrap around": entry(one("U8", [0], [2**64 - 1, 2**64 - 1])),
    "offsets out of the file": entry(one(shape=[4, 4], offsets=[0, 64])),
    "offsets that begin out of the file": entry(one("U8", [0], [100, 100])),
    "a gap before the first tensor": entry(one("U8", [8], [8, 16])),
    "a gap between tensors": entry(pair((0, 4), (8, 12), 12)),
    "overlapping tensors": entry(pair((0, 8), (4, 12), 12)),
    "one tensor inside another": entry(pair((0, 12), (4, 8), 12)),
    "two tensors on the same bytes": entry(pair((0, 8), (0, 8), 8)),
    "bytes after the last tensor": Case(SOUND + b"\0", ("1 bytes follow",)),
    "bytes and no tensors": Case(framed("{}", bytes(16)), ("16 bytes follow",)),
    "one byte missing": Case(SOUND[:-1], ("truncated", "weird")),
}


def accepted_by_the_library(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            opened.keys()
    except (SafetensorError, OSError):
        return False
    return True


@pytest.mark.parametrize("victim", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("case", HEADERS.values(), ids=HEADERS)
def test_a_malformed_header_is_refused(room: Path, victim: str, case: Case) -> None:
    file = room / victim
    file.write_bytes(case.data)
    refusal(room, BadFile, str(file), *case.named)
    assert accepted_by_the_library(file) == bool(case.stricter_because)


@pytest.mark.parametrize("length", [HEADER_LIMIT, HEADER_LIMIT + 1, 1 << 36])
def test_a_header_of_nothing_in_a_sparse_file_is_refused_at_once(room: Path, length: int) -> None:
    file = room / "base" / "model.safetensors"
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", length))
        stream.truncate(8 + length)
    with pytest.raises(BadFile, match=r"model\.safetensors"):
        lorasmith.plan(room / "base", room / "adapter")


def test_a_key_that_stands_twice_among_very_many_is_found_quickly(tmp_path: Path) -> None:
    keys = [f'"{number}": 0' for number in range(300_000)]
    (tmp_path / "base.safetensors").write_bytes(framed("{" + ",".join([*keys, '"last": 0', '"last": 0']) + "}"))
    with pytest.raises(BadFile, match="'last' stands twice"):
        lorasmith.plan(tmp_path / "base.safetensors", tmp_path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "base.safetensors"
    save_file({"a": torch.arange(3), "b": torch.ones(5, 2).half(), "empty": torch.empty(0)}, file, {"format": "pt"})
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(BadFile, match=r"base\.safetensors"):
            read_header(str(file))


def test_what_the_library_rejects_is_rejected_and_what_both_accept_is_read_alike(tmp_path: Path) -> None:
    """Bytes of sound headers exchanged at random, by ones that mean something in JSON more often than not."""
    generator = random.Random(0)
    file = tmp_path / "base.safetensors"
    save_file({"a": torch.arange(30, dtype=torch.uint8), "b": torch.ones(5, 2).half(), "c": torch.ones(4)}, file)
    whole = file.read_bytes()
    span = 8 + struct.unpack("<Q", whole[:8])[0]
    both, neither, stricter = 0, 0, set()
    for _ in range(2000):
        raw = bytearray(whole)
        for _ in range(generator.choice((1, 1, 2, 3))):
            raw[generator.randrange(span)] = generator.choice(b'0123456789[]{},:"\\ -.eUFI\x00\xff')
        file.write_bytes(raw)
        theirs = accepted_by_the_library(file)
        try:
            ours = read_header(str(file))
        except BadFile as error:
            neither += not theirs
            if theirs:
                stricter.add(str(error).removeprefix(str(file)).split("'")[0])
            continue
        assert theirs, bytes(raw[:span])
        both += 1
        with safe_open(file, "pt") as opened:
            assert [one.name for one in ours.entries] == opened.offset_keys()
            for one in ours.entries:
                view = opened.get_slice(one.name)
                assert (list(one.shape), one.dtype) == (view.get_shape(), view.get_dtype())
    assert both > 30
    assert neither > 500
    assert stricter <= {": tensor "}


def _foreign(file: Path, kind: str) -> None:
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("photo.jpg", b"\xff\xd8")
    elif kind == "pickle":
        file.write_bytes(pickle.dumps({"a": 3}, protocol=2))
    elif kind == "gguf":
        file.write_bytes(b"GGUF\x03\0\0\0" + bytes(200))
    elif kind == "web page":
        file.write_bytes(b"<!DOCTYPE html><html><body>404</body></html>")
    elif kind == "Git LFS pointer":
        file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4976698672\n")
    else:
        file.write_text('{"weights": "elsewhere"}')


@pytest.mark.parametrize("victim", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["zip", "pickle", "gguf", "web page", "Git LFS pointer", "JSON"])
def test_another_kind_of_file_is_told_apart(room: Path, victim: str, kind: str) -> None:
    _foreign(room / victim, kind)
    message = refusal(room, BadFile, str(room / victim))
    assert ("safetensors file" if kind == "JSON" else kind.lower()) in message.lower()
    assert ("git lfs pull" in message) == (kind == "Git LFS pointer")
    assert ("but JSON; give the folder" in message) == (kind == "JSON")


@pytest.mark.parametrize("victim", ["base/config.json", "adapter/adapter_config.json"])
def test_a_config_that_is_a_git_lfs_pointer_says_so(room: Path, victim: str) -> None:
    _foreign(room / victim, "Git LFS pointer")
    refusal(room, BadFile, str(room / victim), "git lfs pull")


# ----------------------------------------------------------------------------------------------- index, config

Change = Callable[[Path], None]


def index(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the index of a sharded base."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        value = json.loads(file.read_text())
        change(value)
        write_json(file, value)

    return apply


def place(shard: object, tensor: str = Q_PROJ) -> Change:
    """Make the index place a tensor elsewhere."""
    return index(lambda value: value["weight_map"].update({tensor: shard}))


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content) and None


def replaced(name: str, by: Callable[[Path], object]) -> Change:
    """Put something else where a file was."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        by(folder / name)

    return apply


def _repeat(folder: Path) -> None:
    """Store a tensor of the first shard in the second too, which the index does not say."""
    second = folder / "model-00002-of-00002.safetensors"
    save_file({**load_file(second), "model.embed_tokens.weight": torch.ones(40, 32).bfloat16()}, second)


def _repeat_unlisted(folder: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        save_file({**load_file(file), "unlisted": torch.ones(2)}, file)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
INDEXES: dict[str, tuple[Change, type[Exception], tuple[str, ...]]] = {
    "up and out": (place(f"../sharded/{FIRST}"), BadFile, (INDEX, Q_PROJ)),
    "up, further inside": (place(f"a/../../{FIRST}"), BadFile, (INDEX, Q_PROJ)),
    "up, in Windows' way": (place(f"..\\{FIRST}"), BadFile, (INDEX, Q_PROJ)),
    "absolute": (place("/etc/passwd"), BadFile, (INDEX, Q_PROJ, "/etc/passwd")),
    "absolute, in Windows' way": (place(f"C:\\{FIRST}"), BadFile, (INDEX, Q_PROJ)),
    "itself": (place("."), BadFile, (INDEX, Q_PROJ)),
    "with NUL": (place(f"{FIRST}\0"), BadFile, (INDEX, Q_PROJ)),
    "with a line break": (place("a\n.safetensors"), MissingFile, (INDEX, r"a\n.safetensors")),
    "empty name": (place(""), BadFile, (INDEX, Q_PROJ)),
    "number": (place(5), BadFile, (INDEX, Q_PROJ)),
    "null": (place(None), BadFile, (INDEX, Q_PROJ)),
    "list": (place([FIRST]), BadFile, (INDEX, Q_PROJ)),
    "config as a shard": (place("config.json"), BadFile, (INDEX, Q_PROJ, "config.json")),
    "no map": (index(lambda value: value.pop("weight_map")), BadFile, (INDEX, "weight_map")),
    "empty map": (index(lambda value: value["weight_map"].clear()), BadFile, (INDEX, "weight_map")),
    "list for a map": (index(lambda value: value.update(weight_map=[Q_PROJ])), BadFile, (INDEX, "weight_map")),
    "ghost": (place(FIRST, "model.ghost"), BadFile, (INDEX, "model.ghost", FIRST)),
    "in the other shard": (place(SECOND, "model.embed_tokens.weight"), BadFile, (INDEX, "model.embed_tokens.weight")),
    "in both shards": (_repeat, BadFile, (INDEX, "model.embed_tokens.weight", SECOND)),
    "unlisted in both shards": (_repeat_unlisted, BadFile, ("unlisted", FIRST, SECOND)),
    "missing shard": (lambda folder: (folder / SECOND).unlink(), MissingFile, (INDEX, SECOND)),
    "shard that does not exist": (place("model-3.safetensors"), MissingFile, (INDEX, "model-3.safetensors")),
    "shard that is a folder": (replaced(SECOND, Path.mkdir), BadFile, (SECOND, "regular file")),
    "shard that is a FIFO": (replaced(SECOND, os.mkfifo), BadFile, (SECOND, "regular file")),
    "shard that is a link to itself": (
        replaced(SECOND, lambda file: file.symlink_to(file.name)), MissingFile, (INDEX, SECOND),
    ),
    "shard that is a link to nothing": (
        replaced(SECOND, lambda file: file.symlink_to("nowhere")), MissingFile, (INDEX, SECOND),
    ),
    "not JSON": (text(INDEX, "weight_map"), BadFile, (INDEX, "JSON")),
    "cut short": (text(INDEX, '{"weight_map": {"a": '), BadFile, (INDEX, "cut short")),
    "JSON list": (text(INDEX, "[]"), BadFile, (INDEX, "JSON object")),
    "no JSON at all": (text(INDEX, ""), BadFile, (INDEX,)),
    "key twice": (text(INDEX, '{"weight_map": {"a": "b", "a": "b"}}'), BadFile, (INDEX, "'a'")),
    "FIFO": (replaced(INDEX, os.mkfifo), BadFile, (INDEX, "regular file")),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "kind", "named"), INDEXES.values(), ids=INDEXES)
def test_an_index_that_cannot_be_trusted_is_refused(
    room: Path, spoil: Change, kind: type[Exception], named: tuple[str, ...]
) -> None:
    spoil(room / "sharded")
    refusal(room, kind, *named, base="sharded")


def test_a_tensor_that_the_index_does_not_list_is_kept_as_it_is(room: Path) -> None:
    extra = torch.randn(3, 5)
    save_file({**load_file(room / "sharded" / FIRST), "unlisted": extra}, room / "sharded" / FIRST)
    lorasmith.merge(room / "sharded", room / "adapter", room / "out")
    assert torch.equal(load_file(room / "out" / FIRST)["unlisted"], extra)


QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
BASES: dict[str, tuple[Change, type[Exception], tuple[str, ...]]] = {
    "config cut short": (text("config.json", '{"model_type": "ll'), BadFile, ("config.json", "cut short")),
    "config that is a list": (text("config.json", "[]"), BadFile, ("config.json", "list")),
    "config that is text": (text("config.json", '"llama"'), BadFile, ("config.json", "str")),
    "config with NaN": (text("config.json", '{"eps": NaN}'), BadFile, ("config.json", "NaN")),
    "config in UTF-16": (
        lambda folder: (folder / "config.json").write_text("{}", "utf-16") and None, BadFile, ("config.json",),
    ),
    "config nested too deeply": (text("config.json", f'{{"a": {DEEP}}}'), BadFile, ("config.json", "deep")),
    "config with half a character": (text("config.json", r'{"a": "\udc00"}'), BadFile, ("config.json",)),
    "config that is a FIFO": (replaced("config.json", os.mkfifo), BadFile, ("config.json", "regular file")),
    "config that is a folder": (replaced("config.json", Path.mkdir), BadFile, ("config.json", "regular file")),
    "config that is a link to itself": (
        replaced("config.json", lambda file: file.symlink_to(file.name)), IOFailed, ("config.json",),
    ),
    "weights named that are not there": (
        text("config.json", '{"transformers_weights": "other.safetensors"}'), BadFile, ("other.safetensors",),
    ),
    "weights named outside": (
        text("config.json", '{"transformers_weights": "../base/model.safetensors"}'),
        BadFile, ("transformers_weights",),
    ),
    "weights named that are no weights": (
        text("config.json", '{"transformers_weights": "LICENSE"}'), BadFile, ("transformers_weights", "LICENSE"),
    ),
    "weights named by a number": (text("config.json", '{"transformers_weights": 5}'), BadFile, ("5",)),
    "weights that are a folder": (replaced("model.safetensors", Path.mkdir), BadFile, ("model.safetensors",)),
    "weights that are a FIFO": (replaced("model.safetensors", os.mkfifo), BadFile, ("model.safetensors",)),
    "weights that are a link to nothing": (
        replaced("model.safetensors", lambda file: file.symlink_to("nowhere")), MissingFile, ("model.safetensors",),
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), MissingFile, ("base",)),
    "pickled weights that are empty": (
        replaced("model.safetensors", lambda file: (file.parent / "pytorch_model.bin").write_bytes(b"")),
        BadFile, ("pytorch_model.bin", "partly downloaded"),
    ),
    "pickled weights of no known name": (
        replaced("model.safetensors", lambda file: (file.parent / "weights.pt").write_bytes(b"")),
        NotSupported, ("weights.pt", "path of the file"),
    ),
    "several sets of weights": (
        replaced("model.safetensors", lambda file: [
            save_file({"a": torch.ones(1)}, file.parent / f"{name}.safetensors") for name in ("one", "two")
        ]),
        BadFile, ("one.safetensors", "two.safetensors"),
    ),
    "a shard without its index": (
        replaced("model.safetensors", lambda file: save_file({"a": torch.ones(1)}, file.parent / FIRST)),
        MissingFile, (FIRST, "model.safetensors.index.json", "incomplete"),
    ),
    "weights in other formats alone": (
        replaced("model.safetensors", lambda file: (file.parent / "model-Q4.gguf").write_bytes(b"GGUF")),
        NotSupported, ("model-Q4.gguf", "safetensors model"),
    ),
    "modules.json that is broken": (text("modules.json", "["), BadFile, ("modules.json",)),
    "quantisation in the config": (
        text("config.json", json.dumps({"quantization_config": QUANTISED})), NotSupported, ("base", "bitsandbytes"),
    ),
    "quantisation by mlx": (
        text("config.json", json.dumps({"quantization": {"bits": 4}})), NotSupported, ("base", "quantization"),
    ),
    "quantisation in a nested config": (
        text("config.json", json.dumps({"text_config": {"quantization_config": QUANTISED}})),
        NotSupported, ("base", "bitsandbytes"),
    ),
    "quantisation in a config nested twice": (
        text("config.json", json.dumps({"thinker_config": {"text_config": {"quantization_config": QUANTISED}}})),
        NotSupported, ("base", "bitsandbytes"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "kind", "named"), BASES.values(), ids=BASES)
def test_a_base_that_is_broken_or_quantised_is_refused(
    room: Path, spoil: Change, kind: type[Exception], named: tuple[str, ...]
) -> None:
    spoil(room / "base")
    refusal(room, kind, *named)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.self_attn.q_proj.weight", torch.ones(32, 32).to(torch.float8_e4m3fn)),
        ("model.layers.0.self_attn.q_proj.weight", torch.ones(32, 32).to(torch.float8_e5m2)),
        ("model.layers.0.self_attn.q_proj.qweight", torch.ones(4, 32, dtype=torch.int32)),
        ("model.layers.0.self_attn.q_proj.weight.absmax", torch.ones(4)),
        ("model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4", torch.ones(4, dtype=torch.uint8)),
        ("model.layers.0.self_attn.q_proj.SCB", torch.ones(32)),
        ("model.layers.0.self_attn.q_proj.weight_packed", torch.ones(4, 32, dtype=torch.int32)),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", torch.ones(1)),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", torch.ones(4, 32, dtype=torch.uint8)),
    ],
)
@pytest.mark.parametrize("base", ["base", "base/model.safetensors"])
def test_quantised_tensors_are_refused_with_and_without_a_config(
    room: Path, base: str, name: str, tensor: torch.Tensor
) -> None:
    file = room / "base" / "model.safetensors"
    save_file({**load_file(file), name: tensor}, file)
    with pytest.raises(NotSupported) as caught:
        lorasmith.plan(room / base, room / "adapter")
    assert name in str(caught.value)
    assert "quantised" in str(caught.value)


def test_a_target_stored_as_integers_is_refused(room: Path) -> None:
    file = room / "base" / "model.safetensors"
    save_file({**load_file(file), Q_PROJ: torch.ones(32, 32, dtype=torch.int8)}, file)
    refusal(room, NotSupported, Q_PROJ, "I8")


# ------------------------------------------------------------------------------------------ folders and links


def test_an_empty_folder_is_no_base_and_no_adapter(room: Path) -> None:
    (room / "empty").mkdir()
    refusal(room, MissingFile, str(room / "empty"), base="empty")
    refusal(room, MissingFile, str(room / "empty"), adapter="empty")


def test_base_and_adapter_in_each_other_s_place_are_recognised(room: Path) -> None:
    refusal(room, BadFile, "is an adapter", "lorasmith merge BASE ADAPTER", base="adapter")
    refusal(room, MissingFile, "looks like a model", "lorasmith merge BASE ADAPTER", adapter="base")
    refusal(room, AdapterMismatch, "model rather than an adapter", adapter="base/model.safetensors")
    with pytest.raises(LorasmithError, match="adapter_model"):
        lorasmith.plan(room / "adapter" / "adapter_model.safetensors", room / "adapter")


def test_fifos_beside_a_model_are_left_where_they_are(room: Path) -> None:
    for name in ("base/pipe", "base/modules.json", "base/1_Pooling/pipe", "adapter/tokenizer.json"):
        (room / name).unlink(missing_ok=True)
        os.mkfifo(room / name)
    lorasmith.merge(room / "base", room / "adapter", room / "out")
    assert not list((room / "out").rglob("pipe"))
    assert not (room / "out" / "modules.json").exists()


@pytest.mark.parametrize("path", ["base", "adapter"])
def test_a_path_that_is_a_fifo_or_a_loop_is_refused(room: Path, path: str) -> None:
    os.mkfifo(room / "pipe")
    (room / "loop").symlink_to("loop")
    refusal(room, BadFile, "pipe", "regular file", **{path: "pipe"})
    refusal(room, MissingFile, "loop", **{path: "loop"})


def test_links_to_folders_are_followed_but_never_out_of_the_model_and_back(room: Path) -> None:
    (room / "elsewhere").mkdir()
    (room / "elsewhere" / "kept.txt").write_text("kept")
    (room / "elsewhere" / "again").symlink_to(room / "elsewhere")
    (room / "secret.txt").write_text("not of the model")
    for name, target in (
        ("here", "."),
        ("above", ".."),
        ("root", "/"),
        ("1_Pooling/up", ".."),
        ("real", "../elsewhere"),
    ):
        (room / "base" / name).symlink_to(target)
    lorasmith.merge(room / "base", room / "adapter", room / "out")
    made = {str(file.relative_to(room / "out")) for file in (room / "out").rglob("*")}
    assert {name for name in made if "kept" in name} == {"real/kept.txt"}
    assert not {name for name in made if name.startswith(("here", "above", "root", "1_Pooling/up"))}


def test_a_web_of_linked_folders_ends(room: Path) -> None:
    """Nine folders that each link to all others can be walked in a million orders."""
    for name in "abcdefghi":
        (room / "base" / name).mkdir()
        for other in "abcdefghi":
            (room / "base" / name / other).symlink_to(f"../{other}")
    refusal(room, BadFile, str(room / "base"), "10,000")


@pytest.mark.parametrize("path", ["", "/", ".", "1_Pooling/..", "../base"])
def test_no_modules_json_makes_the_base_s_weights_side_files(room: Path, path: str) -> None:
    write_json(room / "base" / "modules.json", [{"idx": 0, "name": "0", "path": path, "type": "x"}])
    lorasmith.merge(room / "base", room / "adapter", room / "out")
    merged, right = (load_file(room / name / "model.safetensors") for name in ("out", "earlier"))
    assert all(torch.equal(merged[name], right[name]) for name in right)


def test_shards_in_a_sentence_transformers_module_are_merged_and_not_copied_over(room: Path) -> None:
    base = room / "sharded"
    (base / "0_Transformer").mkdir()
    (base / FIRST).rename(base / "0_Transformer" / FIRST)
    first = [name for name, shard in json.loads((base / INDEX).read_text())["weight_map"].items() if shard == FIRST]
    index(lambda value: value["weight_map"].update(dict.fromkeys(first, f"0_Transformer/{FIRST}")))(base)
    write_json(base / "modules.json", [{"idx": 0, "name": "0", "path": "0_Transformer", "type": "x"}])
    lorasmith.merge(base, room / "adapter", room / "out")
    merged = load_file(room / "out" / "0_Transformer" / FIRST) | load_file(room / "out" / SECOND)
    right = load_file(room / "earlier" / "model.safetensors")
    assert all(torch.equal(merged[name], right[name]) for name in right)


@pytest.mark.parametrize("missing", ["base", "adapter"])
def test_a_path_that_is_a_link_to_nothing_says_so(room: Path, missing: str) -> None:
    (room / "link").symlink_to("nowhere")
    refusal(room, MissingFile, f"{room / 'link'} is a link to nothing", **{missing: "link"})


@pytest.mark.parametrize("missing", ["base", "adapter"])
def test_what_is_in_a_folder_that_may_not_be_read_is_not_said_to_be_missing(
    room: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def listdir(folder: str, real: Callable[[str], list[str]] = os.listdir) -> list[str]:
        if folder == str(room / "locked"):  # root may read everything
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return real(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    refusal(room, IOFailed, f"the folder {room / 'locked'} may not be read", **{missing: "locked/model"})


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
@pytest.mark.parametrize("name", ["base", "base/model.safetensors", "base/config.json", "adapter"])
def test_what_may_not_be_read_is_named(room: Path, name: str) -> None:
    mode = (room / name).stat().st_mode
    (room / name).chmod(0)
    try:
        with pytest.raises(LorasmithError, match=name):
            lorasmith.plan(room / "base", room / "adapter")
    finally:
        (room / name).chmod(mode)


# ---------------------------------------------------------------------------------------------------- adapters


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Change the tensors of an adapter."""

    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        value = load_file(file)
        change(value)
        save_file(value, file)

    return apply


def settings(**changes: object) -> Change:
    """Change the config of an adapter."""

    def apply(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return apply


def renamed(old: str, new: str) -> Change:
    def change(value: dict[str, torch.Tensor]) -> None:
        for name in list(value):
            value[name.replace(old, new)] = value.pop(name)

    return tensors(change)


CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
NAN = torch.full((4, 32), math.nan)
ADAPTERS: dict[str, tuple[Change, type[Exception], tuple[str, ...]]] = {
    "another model's names": (
        renamed("model.layers.0", "transformer.h.0"), AdapterMismatch, ("transformer.h.0", "another model"),
    ),
    "one layer more": (
        tensors(lambda all_: all_.update({Q_A.replace(".0.", ".7."): torch.ones(4, 32),
                                          Q_B.replace(".0.", ".7."): torch.ones(32, 4)})),
        AdapterMismatch, ("layers.7", "--allow-unmatched"),
    ),
    "another model's shapes": (
        tensors(lambda all_: all_.update({Q_B: torch.ones(64, 4)})), AdapterMismatch, (Q_PROJ, "[64, 32]", "[32, 32]"),
    ),
    "transposed shapes": (
        tensors(lambda all_: all_.update({Q_A: torch.ones(32, 4), Q_B: torch.ones(4, 32)})), AdapterMismatch, (CONFIG,),
    ),
    "no lora_A": (tensors(lambda all_: all_.pop(Q_A)), AdapterMismatch, (FILE, "q_proj", "no lora_A")),
    "no lora_B": (tensors(lambda all_: all_.pop(Q_B)), AdapterMismatch, (FILE, "q_proj", "no lora_B")),
    "ranks that disagree": (
        tensors(lambda all_: all_.update({Q_A: torch.ones(5, 32)})), AdapterMismatch, (FILE, Q_A, Q_B),
    ),
    "another rank than the config's": (
        tensors(lambda all_: all_.update({Q_A: torch.ones(5, 32), Q_B: torch.ones(32, 5)})),
        AdapterMismatch, (CONFIG, "q_proj", "rank 5"),
    ),
    "rank 0": (
        tensors(lambda all_: all_.update({Q_A: torch.ones(0, 32), Q_B: torch.ones(32, 0)})),
        AdapterMismatch, (FILE, "q_proj"),
    ),
    "a vector": (tensors(lambda all_: all_.update({Q_A: torch.ones(128)})), AdapterMismatch, (FILE, Q_A)),
    "a scalar": (tensors(lambda all_: all_.update({Q_A: torch.tensor(1.0)})), NotSupported, (FILE, Q_A)),
    "a convolution": (tensors(lambda all_: all_.update({Q_A: torch.ones(4, 32, 1, 1)})), AdapterMismatch, (FILE, Q_A)),
    "integers": (
        tensors(lambda all_: all_.update({Q_A: torch.ones(4, 32, dtype=torch.int8)})), NotSupported, (FILE, Q_A, "I8"),
    ),
    "fp8": (
        tensors(lambda all_: all_.update({Q_A: torch.ones(4, 32).to(torch.float8_e4m3fn)})),
        NotSupported, (FILE, Q_A, "F8_E4M3"),
    ),
    "NaN in float32": (tensors(lambda all_: all_.update({Q_A: NAN})), NotFinite, (FILE, Q_A)),
    "NaN in float16": (tensors(lambda all_: all_.update({Q_A: NAN.half()})), NotFinite, (FILE, Q_A)),
    "NaN in bfloat16": (tensors(lambda all_: all_.update({Q_A: NAN.bfloat16()})), NotFinite, (FILE, Q_A)),
    "NaN in float64": (tensors(lambda all_: all_.update({Q_A: NAN.double()})), NotFinite, (FILE, Q_A)),
    "one infinity at the end": (
        tensors(lambda all_: all_[Q_B].view(-1)[-1].fill_(-math.inf)), NotFinite, (FILE, Q_B),
    ),
    "two names for one tensor": (
        tensors(lambda all_: all_.update({Q_A.replace(".weight", ".default.weight"): torch.ones(4, 32)})),
        BadFile, (FILE, Q_A, "two names"),
    ),
    "two adapters in one file": (
        tensors(lambda all_: all_.update({Q_A.replace(".weight", ".default.weight"): torch.ones(4, 32),
                                          Q_B.replace(".weight", ".other.weight"): torch.ones(32, 4)})),
        BadFile, (FILE,),
    ),
    "a tensor of another kind": (
        tensors(lambda all_: all_.update({"base_model.model.score.weight": torch.ones(2, 2)})),
        AdapterMismatch, ("base_model.model.score.weight",),
    ),
    "names with terminal codes": (
        tensors(lambda all_: all_.update({"\x1b[2Jgone\nError: \u202e": torch.ones(2)})),
        AdapterMismatch, (r"\x1b[2Jgone\n",),
    ),
    "a name of 100,000 letters": (
        tensors(lambda all_: all_.update({"x" * 100_000: torch.ones(2)})), AdapterMismatch, ("xxx", "[…]"),
    ),
    "no tensors": (lambda folder: save_file({}, folder / FILE), BadFile, (FILE, "no tensors")),
    "only an empty pickle": (
        replaced(FILE, lambda file: file.with_suffix(".bin").write_bytes(b"")), BadFile, ("adapter_model.bin",),
    ),
    "no weights": (lambda folder: (folder / FILE).unlink(), MissingFile, (FILE,)),
    "no config": (lambda folder: (folder / CONFIG).unlink(), BadFile, (CONFIG,)),
    "broken config": (text(CONFIG, '{"r": 4,'), BadFile, (CONFIG, "cut short")),
    "config that is a list": (text(CONFIG, "[1]"), BadFile, (CONFIG, "list")),
    "config that is a folder": (replaced(CONFIG, Path.mkdir), BadFile, (CONFIG,)),
    "config that is a FIFO": (replaced(CONFIG, os.mkfifo), BadFile, (CONFIG,)),
    "r that is text": (settings(r="4"), BadFile, (CONFIG, "r = '4'")),
    "r that is true": (settings(r=True), BadFile, (CONFIG, "r = True")),
    "r that is a list": (settings(r=[4]), BadFile, (CONFIG, "r = [4]")),
    "r = 0": (settings(r=0), AdapterMismatch, (CONFIG, "r = 0")),
    "r = -1": (settings(r=-1), AdapterMismatch, (CONFIG, "r = -1")),
    "r = 1e999": (text(CONFIG, '{"r": 1e999}'), BadFile, (CONFIG, "r = inf")),
    "no alpha": (settings(lora_alpha=None), BadFile, (CONFIG, "lora_alpha = None")),
    "alpha that is text": (settings(lora_alpha="16"), BadFile, (CONFIG, "lora_alpha = '16'")),
    "alpha that is NaN": (settings(lora_alpha=math.nan), BadFile, (CONFIG, "NaN")),
    "alpha of 400 digits": (text(CONFIG, f'{{"r": 4, "lora_alpha": {"9" * 400}}}'), BadFile, (CONFIG, "lora_alpha")),
    "rank_pattern that is a list": (settings(rank_pattern=["q_proj"]), BadFile, (CONFIG, "rank_pattern")),
    "rank_pattern that is a number": (settings(rank_pattern=4), BadFile, (CONFIG, "rank_pattern")),
    "rank_pattern of text": (settings(rank_pattern={"q_proj": "4"}), BadFile, (CONFIG, "q_proj")),
    "rank_pattern that is no pattern": (settings(rank_pattern={"q_(proj": 4}), BadFile, (CONFIG, "q_(proj")),
    "alpha_pattern that is no pattern": (settings(alpha_pattern={"*": 4}), BadFile, (CONFIG, "'*'")),
    "another kind of adapter": (settings(peft_type="LOHA"), NotSupported, (CONFIG, "LOHA")),
    "a kind that is a list": (settings(peft_type=["LORA"]), NotSupported, (CONFIG, "LORA")),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "kind", "named"), ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_that_is_broken_or_does_not_fit_is_refused(
    room: Path, spoil: Change, kind: type[Exception], named: tuple[str, ...]
) -> None:
    spoil(room / "adapter")
    refusal(room, kind, *named)


def test_layers_that_an_adapter_should_have_and_lacks_are_named(room: Path) -> None:
    whole = lorasmith.plan(room / "base", room / "adapter").warnings
    settings(modules_to_save=["embed_tokens", "score"], target_modules=["q_proj", "k_proj", "absent"])(room / "adapter")
    tensors(lambda all_: [all_.pop(name) for name in list(all_) if "k_proj" in name])(room / "adapter")
    saved, adapted = (text for text in lorasmith.plan(room / "base", room / "adapter").warnings if text not in whole)
    assert "names embed_tokens (modules_to_save)" in saved
    assert "names k_proj (target_modules)" in adapted
    settings(exclude_modules=".*k_proj", modules_to_save=None)(room / "adapter")
    assert lorasmith.plan(room / "base", room / "adapter").warnings == whole


def test_layers_that_were_renamed_are_not_lacking(room: Path) -> None:
    settings(target_modules=["q_proj"])(room / "adapter")
    tensors(lambda all_: [all_.pop(name) for name in list(all_) if "q_proj" not in name])(room / "adapter")
    whole = lorasmith.plan(room / "base", room / "adapter").warnings
    moved = lorasmith.plan(room / "base", room / "adapter", rename="q_proj=o_proj")
    assert (moved.warnings, moved.tensors_merged > 0) == (whole, True)


# ------------------------------------------------------------------------------------------------------ output


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_no_place_for_a_model_is_refused(room: Path, overwrite: bool) -> None:
    os.mkfifo(room / "pipe")
    (room / "notes.txt").write_text("mine")
    (room / "papers").mkdir()
    (room / "papers" / "thesis.tex").write_text("mine")
    before = tree(room)
    for out in ("base", "adapter", "base/inside", ".", "notes.txt", "papers", "pipe", "notes.txt/below"):
        with pytest.raises(LorasmithError) as caught:
            lorasmith.merge(room / "base", room / "adapter", room / out, overwrite=overwrite)
        assert isinstance(caught.value, (OutputExists, IOFailed)), caught.value
        assert str(room / out) in str(caught.value)
        assert tree(room) == before


@pytest.mark.parametrize("out", ["/proc/lorasmith", "/proc/self/lorasmith/deep", "/dev/null/below", "x" * 300])
def test_an_output_that_cannot_be_made_is_refused(room: Path, out: str) -> None:
    before = tree(room)
    with pytest.raises(LorasmithError) as caught:
        lorasmith.merge(room / "base", room / "adapter", room / out)
    assert str(room / out) in str(caught.value)
    assert tree(room) == before


# ------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("where", "spoil", "named"),
    [
        ("base", lambda folder: (folder / "model.safetensors").write_bytes(SOUND[:-1]), "truncated"),
        ("base", text("config.json", "{"), "config.json"),
        ("base", replaced("model.safetensors", os.mkfifo), "regular file"),
        ("adapter", tensors(lambda all_: all_.pop(Q_A)), "lora_A"),
        ("adapter", tensors(lambda all_: all_.update({Q_A: NAN})), "NaN"),
        ("adapter", tensors(lambda all_: all_.update({"\x1b[2J\nTraceback": torch.ones(2)})), r"\x1b[2J\nTraceback"),
    ],
    ids=["truncated", "broken config", "FIFO", "missing factor", "NaN", "terminal codes"],
)
def test_the_command_says_it_in_one_line_and_exits_with_1(room: Path, where: str, spoil: Change, named: str) -> None:
    spoil(room / where)
    before = tree(room)
    command = [sys.executable, "-c", "from lorasmith.cli import main; main()", "merge", "base", "adapter", "-o", "out"]
    done = subprocess.run(command, cwd=room, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert named in line
    assert tree(room) == before
