"""The bytes of safetensors files: check a header, read and write ranges.

    8 bytes    header length N, little endian
    N bytes    JSON: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}
    the rest   tensors, back to back, offsets counted from the end of the header

The format is https://huggingface.co/docs/safetensors. A header is trusted only after every size and
offset in it was checked against the file.

Writing bypasses the page cache where the system allows (``O_DIRECT``): a merged model is written once and
not read back, and the kernel's own copy of those bytes would cost more than all the arithmetic does.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import reprlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasmith.dtypes import BITS, itemsize
from lorasmith.errors import BadFile, InputChanged, IOFailed
from lorasmith.jsonfile import MAX_HEADER, open_regular, parse_json, refuse_foreign

_COMPARED = 8 << 20
"""Bytes of two tensors that are compared at once."""

PAGE = 4096
"""Alignment of direct writes, in bytes."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies, as its header says: ``start`` and ``nbytes`` are positions in ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape with all but the first dimension flattened; a vector is a column."""
        return (self.shape[0] if self.shape else 1), math.prod(self.shape[1:])


@dataclass(frozen=True)
class Header:
    """A checked header: entries in file order, ``data_start`` and ``size`` in bytes, and the SHA-256 of the header."""

    file: str
    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    data_start: int
    size: int
    mtime_ns: int
    sha256: str

    @property
    def stamp(self) -> tuple[str, int, int]:
        """Path, size in bytes, mtime in nanoseconds: it is the same file while these stay."""
        return self.file, self.size, self.mtime_ns


def read_header(file: str) -> Header:
    """Read and check a safetensors header; tensor data is not touched.

    Raises MissingFile when there is no such file and BadFile when it is not a whole, well-formed one.
    """
    with open_regular(file) as stream:
        facts = os.fstat(stream.fileno())
        return parse_header(file, stream.read, facts.st_size, facts.st_mtime_ns)


def parse_header(file: str, read: Callable[[int], bytes], size: int, mtime_ns: int) -> Header:
    """Check the header of a file of ``size`` bytes, whose next n bytes ``read(n)`` returns, from its first on.

    ``mtime_ns`` is 0 for a file that no change can befall. Raises BadFile.
    """
    prefix = read(8)
    if len(prefix) < 8:
        raise BadFile(
            f"{file} is {size} bytes long, too short for a safetensors file; "
            "probably an interrupted download: fetch it again"
        )
    (length,) = struct.unpack("<Q", prefix)
    raw = read(min(length, MAX_HEADER))
    if not raw.startswith(b"{"):
        refuse_foreign(file, prefix + raw)
    if length > MAX_HEADER:
        if prefix.lstrip().startswith(b"{"):
            raise BadFile(f"{file} is not a safetensors file but JSON; give the folder that it is in")
        raise BadFile(
            f"{file} is not a safetensors file: its first 8 bytes announce a header of {length:,} bytes "
            f"(at most {MAX_HEADER:,} are allowed)"
        )
    if len(raw) < length:
        raise BadFile(
            f"{file} is truncated: its header alone takes {8 + length:,} bytes and the file has {size:,}; "
            "fetch it again"
        )
    pairs = _parse(file, raw)
    metadata = _metadata(file, pairs.pop("__metadata__", None))
    entries = _entries(file, pairs, 8 + length, size)
    sha256 = hashlib.sha256(prefix + raw).hexdigest()
    return Header(file, entries, metadata, 8 + length, size, mtime_ns, sha256)


def _parse(file: str, raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise BadFile(f"{file} is not a safetensors file: its header is not a JSON object")
    header = parse_json(file, raw)
    if not isinstance(header, dict):
        raise BadFile(f"{file} is not a safetensors file: its header is not a JSON object")
    return header


def _metadata(file: str, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise BadFile(f"{file}: __metadata__ in the header must map strings to strings")
    return value


def _entries(file: str, pairs: dict[str, Any], data_start: int, size: int) -> tuple[TensorEntry, ...]:
    entries = [_entry(file, name, facts, data_start) for name, facts in pairs.items()]
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    position, before = data_start, "the header"
    for entry in entries:
        if entry.start != position:
            kind = "overlaps" if entry.start < position else "leaves a gap after"
            raise BadFile(f"{file}: tensor {entry.name!r} {kind} {before}; the header is corrupt or forged")
        position, before = entry.start + entry.nbytes, repr(entry.name)
    if position > size:
        raise BadFile(
            f"{file} is truncated: {size:,} bytes of {position:,} (the header promises up to tensor "
            f"{entries[-1].name!r}); fetch it again"
        )
    if position < size:
        raise BadFile(f"{file}: {size - position:,} bytes follow the last tensor that its header knows")
    return tuple(entries)


def _entry(file: str, name: str, facts: Any, data_start: int) -> TensorEntry:
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        raise BadFile(f"{file}: tensor {name!r} must have dtype, shape and data_offsets in the header, no more")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise BadFile(f"{file}: tensor {name!r} has the unknown dtype {reprlib.repr(dtype)}")
    if not _naturals(shape) or len(shape) > 64:
        raise BadFile(f"{file}: tensor {name!r} has the impossible shape {reprlib.repr(shape)}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadFile(f"{file}: tensor {name!r} has the impossible data_offsets {reprlib.repr(offsets)}")
    begin, end = offsets
    if math.prod(shape) * BITS[dtype] != 8 * (end - begin):
        raise BadFile(
            f"{file}: tensor {name!r} of shape {list(shape)} and dtype {dtype} cannot take "
            f"{end - begin:,} bytes; the header is corrupt"
        )
    return TensorEntry(name, dtype, tuple(shape), file, data_start + begin, end - begin)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def build_header(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file whose tensors (name, dtype, shape, nbytes) follow in this order.

    Metadata keys are sorted, and the header is padded with spaces to a multiple of 8 bytes, as the
    safetensors library does.
    """
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    position = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def equal_bytes(one: TensorEntry, other: TensorEntry, *, flipped: bool = False) -> bool:
    """Whether two stored matrices hold the same bits, one of them transposed if ``flipped``."""
    import numpy as np

    if one.dtype != other.dtype or one.nbytes != other.nbytes:
        return False
    if one.nbytes == 0 or (one.file, one.start, flipped) == (other.file, other.start, False):
        return one.shape == other.shape
    width = itemsize(one.dtype)

    def words(entry: TensorEntry) -> Any:
        return np.memmap(entry.file, f"u{width}", "r", entry.start, entry.matrix)

    mine, theirs = words(one), words(other).T if flipped else words(other)
    step = max(1, _COMPARED // max(1, one.matrix[1] * width))
    return mine.shape == theirs.shape and all(
        bool((mine[start : start + step] == theirs[start : start + step]).all()) for start in range(0, len(mine), step)
    )


def require_unchanged(stamps: Iterable[tuple[str, int, int]]) -> None:
    """Raise InputChanged when a file (path, size, mtime in nanoseconds) is not what it was when it was opened first.

    One with the mtime 0 cannot change, and may have gone meanwhile.
    """
    for file, size, mtime in stamps:
        if mtime == 0:
            continue
        try:
            facts = os.stat(file)
        except OSError:
            facts = None
        if facts is None or (facts.st_size, facts.st_mtime_ns) != (size, mtime):
            raise InputChanged(f"{file} was changed while it was being read; run the same command again")


class Reader:
    """Reads ranges of one file into buffers; safe to share between threads."""

    def __init__(self, file: str) -> None:
        self.file = file
        try:
            self._fd = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise IOFailed(f"{file} cannot be opened: {error.strerror}") from error

    @property
    def fd(self) -> int:
        return self._fd

    def into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer with the bytes at ``offset``; IOFailed if the file ends before it is full."""
        done = 0
        try:
            while done < len(buffer):
                got = read_at(self._fd, buffer[done:], offset + done)
                if got == 0:
                    raise IOFailed(f"{self.file} has become shorter while it was being read")
                done += got
        except IOFailed:
            raise
        except OSError as error:
            raise IOFailed(f"reading {self.file} failed at byte {offset + done:,}: {error.strerror}") from error

    def close(self) -> None:
        os.close(self._fd)


class Writer:
    """Writes ranges of one new file of a known size; safe to share between threads."""

    def __init__(self, file: str, size: int) -> None:
        self.file = file
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        self._fd = os.open(file, flags, 0o666)
        self._direct = -1
        try:
            reserve(self._fd, size)
            if hasattr(os, "O_DIRECT"):
                with contextlib.suppress(OSError):  # the file system has no direct writes: buffered ones do
                    self._direct = os.open(file, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        return self._fd

    def write(self, buffer: AlignedBuffer, start: int, nbytes: int, offset: int) -> None:
        """Write ``nbytes`` of the buffer from ``start`` on to position ``offset`` of the file.

        Whole pages go past the page cache when ``start`` and ``offset`` agree modulo PAGE.
        """
        data = buffer.view[start : start + nbytes]
        head = min(-offset % PAGE, nbytes)
        body = (nbytes - head) // PAGE * PAGE
        if self._direct < 0 or body == 0 or (start - offset) % PAGE:
            self.write_bytes(data, offset)
            return
        self.write_bytes(data[:head], offset)
        self._write_pages(data[head : head + body], offset + head)
        self.write_bytes(data[head + body :], offset + head + body)

    def _write_pages(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data) and done % PAGE == 0:
            try:
                done += write_at(self._direct, data[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                break  # accepted at open, refused at write: some network file systems
        self.write_bytes(data[done:], offset + done)

    def write_bytes(self, data: memoryview | bytes, offset: int) -> None:
        """Write through the page cache, from any memory to any position."""
        view, done = memoryview(data), 0
        while done < len(view):
            done += write_at(self._fd, view[done:], offset + done)

    def sync(self) -> None:
        """Return once every byte is on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1


class AlignedBuffer:
    """Reusable memory that starts on a page, as direct writes need."""

    def __init__(self, nbytes: int) -> None:
        self.memory = mmap.mmap(-1, nbytes + PAGE)
        self.view = memoryview(self.memory)


def reserve(fd: int, size: int) -> None:
    """Give an empty file its final size, with disk blocks where the system can: a full disk shows at once."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
    os.ftruncate(fd, size)


if hasattr(os, "preadv"):

    def read_at(fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def write_at(fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

else:  # Windows has no positional reads: seek and read under one lock
    import threading

    _SEEK = threading.Lock()

    def read_at(fd: int, buffer: memoryview, offset: int) -> int:
        with _SEEK:
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write_at(fd: int, data: memoryview, offset: int) -> int:
        with _SEEK:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.write(fd, data)


_FICLONERANGE = 0x4020940D


def share_range(source: int, destination: int, offset: int, nbytes: int) -> bool:
    """Let two files share the blocks of one range at equal offsets (a reflink); False where that cannot be.

    Both ends must lie on block borders (ioctl_ficlonerange(2)).
    """
    try:
        import fcntl

        fcntl.ioctl(destination, _FICLONERANGE, struct.pack("qQQQ", source, offset, nbytes, offset))
        return True
    except (ImportError, OSError):
        return False
