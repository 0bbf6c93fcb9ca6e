"""The journal of a run: JSON lines, each on the disk before what it says is relied on.

{"lorasmith": HASH, "base": [[path, size, mtime], ...]}     what is being made, and from which files
{"finished": NAME, "size": N, "samples": [...]}             a file of the result is on the disk
{"publishing": [device, inode]}                             the result is about to become the output
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lorasmith.records import Output, SideFile
from lorasmith.rounding import Sample


class Undertaking(Protocol):
    """What a result's folder has to know of how it is made: ``hash`` names what it will be.

    ``base_files`` are (path, size, mtime) of what it is made from, ``outputs`` the files of a known size.
    """

    @property
    def hash(self) -> str: ...

    @property
    def base_files(self) -> tuple[tuple[str, int, int], ...]: ...

    @property
    def single_file(self) -> bool: ...

    @property
    def outputs(self) -> tuple[Output, ...]: ...

    @property
    def side_files(self) -> tuple[SideFile, ...]: ...


@dataclass(frozen=True)
class Finished:
    """A file of the result that is on the disk, and what was sampled of its tensors."""

    name: str
    size: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Past:
    """What a journal tells: the heading it begins with, files finished, and the identity of what was published."""

    heading: dict[str, Any] | None
    finished: tuple[Finished, ...]
    publishing: tuple[int, ...] | None


def heading(plan: Undertaking) -> dict[str, Any]:
    """The first line of a journal: two runs with the same one make the same bytes."""
    return {"lorasmith": plan.hash, "base": [list(stamp) for stamp in plan.base_files]}


class Journal:
    """An open journal file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> Past:
        """What earlier runs have told; a line that a crash cut short, and all behind it, is dropped for good."""
        os.lseek(self._fd, 0, os.SEEK_SET)
        raw = bytearray()
        while block := os.read(self._fd, 1 << 20):
            raw += block
        past, whole = Past(None, (), None), 0
        for line in bytes(raw).splitlines(keepends=True):
            told = _tell(past, line)
            if told is None:
                break
            past, whole = told, whole + len(line)
        if whole < len(raw):
            os.ftruncate(self._fd, whole)
            os.fsync(self._fd)
        return past

    def begin(self, plan: Undertaking) -> None:
        """Forget what was told and tell what is being made."""
        os.ftruncate(self._fd, 0)
        self._append(heading(plan))

    def finish(self, output: Output, samples: Sequence[Sample]) -> None:
        """Tell that a file of the result is on the disk."""
        values = [list(dataclasses.astuple(one)) for one in samples]
        self._append({"finished": output.name, "size": output.size, "samples": values})

    def publish(self, identity: Sequence[int]) -> None:
        """Tell that the result is about to become the output."""
        self._append({"publishing": list(identity)})

    def _append(self, line: dict[str, Any]) -> None:
        os.write(self._fd, (json.dumps(line) + "\n").encode())
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file; once is enough."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _tell(past: Past, line: bytes) -> Past | None:
    """What is known with one line more; None for one that is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
        if past.heading is None:
            return dataclasses.replace(past, heading={"lorasmith": value["lorasmith"], "base": value["base"]})
        if "finished" in value:
            samples = tuple(Sample(*one) for one in value["samples"])
            one = Finished(str(value["finished"]), int(value["size"]), samples)
            return dataclasses.replace(past, finished=(*past.finished, one))
        return dataclasses.replace(past, publishing=tuple(value["publishing"]))
    except (ValueError, TypeError, KeyError):
        return None
