"""The tensors of ``torch.save`` files (``.bin``, ``.pt``, ``.pth``) as byte ranges, without reading their data.

Since torch 1.6 such a file is an uncompressed zip archive:

    NAME/data.pkl     a pickle of the state dict; a tensor in it is (storage KEY, offset, shape, strides)
    NAME/byteorder    "little"; older files lack it
    NAME/data/KEY     the bytes of one storage, which several tensors may share

torch reads the pickle, with ``weights_only=True`` and on its "meta" device, which opens no storage and tells where each
begins. Every place that it tells is checked against the archive's own directory. Nothing in a pickle is ever called but
what torch allows for weights.

Two kinds of files are no set of ranges: what torch wrote before 1.6, and tensors that do not lie in order (transposed,
expanded).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import reprlib
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from lorasmith.errors import BadFile, IOFailed, LorasmithError, Unsupported, listed
from lorasmith.jsonfile import MAX_HEADER, open_regular, refuse_foreign
from lorasmith.safefile import Header, TensorEntry

if TYPE_CHECKING:
    import torch

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which trainers put a state dict beside their own data."""

ENDINGS = (".bin", ".pt", ".pth")
"""What ``torch.save`` files are called."""

_CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
"""torch dtypes by name and the safetensors codes of the same bytes."""

_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
"""The pickle of torch's magic number, with which every file of torch 0.4 to 1.5 begins."""

_ALIGNMENT = 64
"""torch.save starts every storage at a multiple of this; what repacked the archive hardly does."""

_FOLDER = 0x10
"""The attribute that makes a member of a zip archive a folder, whatever its name."""

_DEEPEST = 8
"""Dictionaries that may lie around a state dict."""


@dataclass(frozen=True)
class Pickle:
    """A checked ``torch.save`` file.

    ``header`` lists its tensors in file order, as if the file were safetensors, with ``data_start`` 0 since there is no
    header to take over. It is None where the tensors are no ranges: ``obstacle`` says why, and ``memory`` is what
    ``spool`` takes to make a file of ranges, in bytes. ``notes`` say what the file holds beside the tensors.
    """

    file: str
    header: Header | None
    obstacle: str | None
    memory: int
    notes: tuple[str, ...]


def is_pickle(file: str) -> bool:
    """Whether to read the file as one of ``torch.save``'s: by how it begins, and if that says nothing by its name.

    Raises MissingFile, BadFile and IOFailed where it cannot be opened.
    """
    with open_regular(file) as stream:
        beginning = stream.read(512)
    return _is_torchs(beginning) or (beginning[8:9] != b"{" and file.endswith(ENDINGS))


def read_pickle(file: str) -> Pickle:
    """Read which tensors a ``torch.save`` file holds, and where; tensor data is not touched.

    Raises MissingFile, BadFile for what is damaged or calls for more than weights, and Unsupported for what is sound
    but no state dict of dense tensors, and where torch is too old.
    """
    with open_regular(file) as stream:
        facts = os.fstat(stream.fileno())
        beginning = stream.read(512)
        _require_torchs(file, beginning, facts.st_size)
        _require_version(file)
        if beginning.startswith(_LEGACY):
            obstacle = "is in the format that torch wrote before 1.6, which cannot be read in parts"
            return Pickle(file, None, obstacle, facts.st_size, ())
        storages = _storages(file, stream, facts.st_size)
        tensors, notes = _state_dict(file, _load(file, stream, "meta"))
    entries = [_entry(file, name, tensor, storages) for name, tensor in tensors.items()]
    scattered = {name for name, tensor in tensors.items() if not _is_range(tensor)}
    for entry in entries:
        _require_plausible(entry, facts.st_size)
    if scattered:
        names = listed([repr(name) for name in tensors if name in scattered])
        obstacle = f"stores {names} out of order (transposed, expanded or conjugated)"
        return Pickle(file, None, obstacle, max(one.nbytes for one in entries if one.name in scattered), notes)
    entries.sort(key=lambda entry: entry.start)
    content = [facts.st_size, *([one.name, one.dtype, one.shape, one.start, one.nbytes] for one in entries)]
    sha256 = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    header = Header(file, tuple(entries), {"format": "pt"}, 0, facts.st_size, facts.st_mtime_ns, sha256)
    return Pickle(file, header, None, 0, notes)


def load_tensors(file: str) -> dict[str, tuple[str, torch.Tensor]]:
    """The tensors of the file by name, each with its format code, in memory.

    Takes the memory that ``read_pickle`` tells. Raises what it raises, and Unsupported for a tensor that takes more
    than the whole file.
    """
    read_pickle(file)
    tensors, _ = _state_dict(file, _load(file, file, "cpu", mmap=zipfile.is_zipfile(file)))
    limit, coded = os.path.getsize(file), {}
    for name, tensor in tensors.items():
        code = _code(file, name, tensor)
        _require_plausible(TensorEntry(name, code, tuple(tensor.shape), file, 0, tensor.nbytes), limit)
        coded[name] = (code, tensor)
    return coded


# ------------------------------------------------------------------------------------------------ what file it is


def _is_torchs(beginning: bytes) -> bool:
    """The ninth byte of a safetensors file is a brace; its first eight are a number and may look like anything."""
    return beginning[8:9] != b"{" and (beginning.startswith((_ZIP, _LEGACY)) or beginning[257:262] == b"ustar")


def _require_torchs(file: str, beginning: bytes, size: int) -> None:
    if beginning[257:262] == b"ustar":
        raise Unsupported(
            f"{file} is a tar archive, as torch.save wrote before version 0.4, which cannot be read safely; "
            "load and save it again with the torch it was made with"
        )
    if _is_torchs(beginning):
        return
    if beginning[8:9] == b"{":
        raise BadFile(f"{file} is a safetensors file under another name; give it the ending .safetensors")
    refuse_foreign(file, beginning)
    raise BadFile(
        f"{file} ({size:,} bytes) is no file that torch.save wrote; is it damaged, or only partly downloaded?"
    )


def _require_version(file: str) -> None:
    """torch tells places on the meta device since 2.11; before 2.10 ``weights_only`` was unsafe (CVE-2026-24747)."""
    import torch

    probe = io.BytesIO()
    torch.save(torch.zeros(1), probe)
    probe.seek(0)
    storage = torch.load(probe, map_location="meta", weights_only=True).untyped_storage()
    if not hasattr(storage, "_checkpoint_offset"):
        raise Unsupported(
            f"{file} is a pickle, which torch {torch.__version__} can read neither safely nor in parts; "
            "install torch 2.11 or newer, or save the file as safetensors"
        )


# ---------------------------------------------------------------------------------------------------- the archive


def _storages(file: str, stream: IO[bytes], size: int) -> dict[int, int]:
    """The size of every storage by the position of its first byte, as the archive's directory has them.

    Raises BadFile and Unsupported for archives that torch.save does not write.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            members = {one.filename: one for one in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise BadFile(f"{file} holds two members of one name; the archive is corrupt or forged")
            root = _root(file, members)
            for one in members.values():
                if one.compress_type != zipfile.ZIP_STORED or one.file_size != one.compress_size or one.flag_bits & 1:
                    raise BadFile(f"{file}: its member {one.filename!r} is compressed, which torch.save never does")
                if one.is_dir() or one.external_attr & _FOLDER:  # torch returns what is in its memory by chance
                    raise BadFile(f"{file}: its member {one.filename!r} is a folder, which torch.save never writes")
            _require_readable(file, archive, members, root)
            keys = {
                name.removeprefix(f"{root}/data/"): one
                for name, one in members.items()
                if name.startswith(f"{root}/data/")
            }
            places = [(_data_start(file, stream, one, size), key) for key, one in keys.items()]
    except LorasmithError:
        raise
    except Exception as error:  # zipfile seeks wherever a damaged directory points, and fails in as many ways
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise IOFailed(f"{file} cannot be read: {error.strerror}") from error
        raise BadFile(f"{file} is truncated or damaged ({error or type(error).__name__}); fetch it again") from None
    if f"{root}/.format_version" in members:
        _require_order(file, sorted(places))
    return {start: keys[key].file_size for start, key in places}


def _root(file: str, members: Mapping[str, zipfile.ZipInfo]) -> str:
    """The one folder in the archive that everything lies in."""
    if any(name.rsplit("/", 1)[-1] == "constants.pkl" for name in members):
        raise Unsupported(
            f"{file} is a TorchScript archive, a program and not only weights; save the model's state_dict() instead"
        )
    roots = {name.split("/", 1)[0] for name in members}
    if len(roots) != 1 or f"{min(roots)}/data.pkl" not in members:
        raise BadFile(f"{file} is a zip archive, but not one that torch.save wrote: it has no data.pkl in one folder")
    return min(roots)


def _require_readable(file: str, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], root: str) -> None:
    order = members.get(f"{root}/byteorder")
    if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
        raise Unsupported(f"{file} was written on a big-endian machine; load and save it again on another")
    pickled = members[f"{root}/data.pkl"]
    if pickled.file_size > MAX_HEADER:
        raise BadFile(f"{file}: its data.pkl takes {pickled.file_size:,} bytes (at most {MAX_HEADER:,} are allowed)")
    with archive.open(pickled) as stream:
        if stream.read(2) != b"\x80\x02":
            raise Unsupported(
                f"{file} was saved with a pickle_protocol other than 2, which torch does not read safely; "
                "save it again without that option"
            )


def _data_start(file: str, stream: IO[bytes], member: zipfile.ZipInfo, size: int) -> int:
    """Where a member's bytes begin: behind a header of its own, whose length is not in the directory."""
    stream.seek(member.header_offset)
    raw = stream.read(30)
    if len(raw) < 30 or not raw.startswith(_ZIP):
        raise BadFile(f"{file} is damaged: its member {member.filename!r} is not where the directory says")
    name, extra = struct.unpack("<HH", raw[26:])
    start = member.header_offset + 30 + int(name) + int(extra)
    if start + member.file_size > size:
        raise BadFile(f"{file} is truncated: its member {member.filename!r} reaches beyond the end; fetch it again")
    return start


def _require_order(file: str, places: list[tuple[int, str]]) -> None:
    """In archives with a .format_version (torch 2.7) torch looks up the first place alone and reckons the others on."""
    if [key for _, key in places] != [str(number) for number in range(len(places))] or any(
        start % _ALIGNMENT for start, _ in places
    ):
        raise Unsupported(
            f"{file} was repacked: its storages are not laid out as torch.save does it; "
            "load it with torch.load and save it again"
        )


# ------------------------------------------------------------------------------------------------------ the pickle


def _load(file: str, source: str | IO[bytes], device: str, mmap: bool = False) -> Any:
    """What ``torch.load`` makes of the file; every failure is one of ours."""
    import torch

    try:
        if not isinstance(source, str):
            source.seek(0)
        return torch.load(source, map_location=device, weights_only=True, mmap=mmap)
    except MemoryError:
        raise BadFile(f"{file} asks for more memory than there is") from None
    except OSError as error:
        raise IOFailed(f"{file} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a forged pickle may hand anything to the functions that it may call
        raise _refusal(file, str(error)) from None


def _refusal(file: str, text: str) -> LorasmithError:
    called = re.search(r"GLOBAL (\S+)", text)
    if called:
        return BadFile(
            f"{file} is refused: its pickle calls for {called[1]}, which no state dict needs. It may be malicious, or "
            "hold whole Python objects: save the model's state_dict() alone"
        )
    if "affine_quantized" in text:
        return Unsupported(f"{file} holds tensors that torch quantised; merge into the model that it was made from")
    reason = text.split("WeightsUnpickler error:")[-1].strip().split("\n")[0][:200]
    return BadFile(f"{file} is no state dict that torch can load with weights_only=True ({reason}); is it damaged?")


def _state_dict(file: str, value: Any) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The one dictionary of tensors in what was loaded, and notes on what lay beside it.

    Raises Unsupported where taking it would lose other tensors.
    """
    import torch

    notes: list[str] = []
    where = ""
    for _ in range(_DEEPEST):
        if not isinstance(value, dict):
            raise Unsupported(
                f"{file} holds a {type(value).__name__}{where}, not a state dict; save the model's state_dict()"
            )
        tensors = {name: one for name, one in value.items() if isinstance(one, torch.Tensor)}
        holders = [name for name, one in value.items() if name not in tensors and _holds_data(one)]
        others = [reprlib.repr(name) for name in value if name not in tensors and name not in holders]
        if not tensors and len(holders) == 1 and holders[0] in WRAPPERS:
            notes.append(f"{file}: the weights are its {holders[0]!r}" + _left_out(others))
            where, value = f"{where} under {holders[0]!r}", value[holders[0]]
            continue
        if holders:
            raise Unsupported(
                f"{file} holds tensors{where} under {listed([reprlib.repr(name) for name in holders])}"
                f"{' beside those of the model' if tensors else ''}; it is a training checkpoint or a nested one: "
                "save the state dict alone"
            )
        if others and tensors:
            notes.append(f"{file}: the weights stand{where} among other data" + _left_out(others))
        for name in tensors:
            _require_name(file, name)
        return tensors, tuple(notes)
    raise Unsupported(f"{file} nests dictionaries too deeply to be a state dict")


def _left_out(others: list[str]) -> str:
    return f"; not tensors, and left out: {listed(others)}" if others else ""


def _holds_data(value: Any) -> bool:
    """Whether there is a tensor or a bare storage anywhere in nested containers."""
    import torch

    kinds = (torch.Tensor, torch.UntypedStorage, torch.TypedStorage)
    todo, seen = [value], set()
    while todo:
        one = todo.pop()
        if isinstance(one, kinds):
            return True
        if id(one) not in seen and isinstance(one, (dict, list, tuple, set)):
            seen.add(id(one))
            todo.extend(one.values() if isinstance(one, dict) else one)
    return False


def _require_name(file: str, name: Any) -> None:
    if not isinstance(name, str) or name == "__metadata__":
        raise Unsupported(f"{file} has a tensor called {reprlib.repr(name)}, which no safetensors file can hold")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise BadFile(
            f"{file} has a tensor called {name!r}, with half of a character (a lone surrogate) in it"
        ) from None


# ----------------------------------------------------------------------------------------------------- one tensor


def _entry(file: str, name: str, tensor: torch.Tensor, storages: Mapping[int, int]) -> TensorEntry:
    """Where a tensor on the meta device lies in the file; its storage must be one of the archive's."""
    code = _code(file, name, tensor)
    storage = tensor.untyped_storage()
    place = getattr(storage, "_checkpoint_offset", None)
    if place is None:
        raise Unsupported(f"{file}: tensor {name!r} has no data in the file; it was on the meta device when saved")
    if storages.get(place) != storage.nbytes():
        raise BadFile(
            f"{file}: tensor {name!r} should lie in {storage.nbytes():,} bytes at {place:,}, and the archive has "
            f"{storages.get(place, 0):,} there; the file is corrupt or forged"
        )
    first = tensor.storage_offset() * tensor.itemsize
    if _is_range(tensor) and first + tensor.nbytes > storage.nbytes():
        raise BadFile(f"{file}: tensor {name!r} reaches beyond its storage; the file is corrupt or forged")
    return TensorEntry(name, code, tuple(tensor.shape), file, place + first, tensor.nbytes)


def _code(file: str, name: str, tensor: torch.Tensor) -> str:
    import torch

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    code = _CODES.get(str(tensor.dtype).removeprefix("torch."))
    if not plain or code is None:
        kind = str(tensor.dtype if plain else tensor.layout if type(tensor) is torch.Tensor else type(tensor).__name__)
        raise Unsupported(
            f"{file}: tensor {name!r} is {kind}, which safetensors cannot hold; save it as a plain dense one"
        )
    return code


def _is_range(tensor: torch.Tensor) -> bool:
    """Whether the tensor's bytes lie in the file one after another, as safetensors has them."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _require_plausible(entry: TensorEntry, limit: int) -> None:
    """An expanded tensor repeats few stored numbers as often as it likes, up to more than any disk holds."""
    if entry.nbytes > limit:
        raise Unsupported(
            f"{entry.file}: tensor {entry.name!r} of shape {list(entry.shape)} takes {entry.nbytes:,} bytes, more than "
            "the whole file; it is an expanded one: save it contiguous"
        )
