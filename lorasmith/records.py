"""What is going to happen and what happened: plain frozen dataclasses that pickle, print and turn into JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasmith.safefile import TensorEntry

if TYPE_CHECKING:
    from lorasmith.deltas import Delta

REPORT_SCHEMA = 1
"""Version of the layout of ``MergeReport.to_dict()``; it grows when a key changes its meaning or goes."""


@dataclass(frozen=True)
class Origin:
    """A repository on the Hub at one commit, and the folder or file in it that is meant, if not all of it."""

    repo: str
    commit: str
    inside: str = ""

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}{'/' if self.inside else ''}{self.inside}"


@dataclass(frozen=True)
class Pushed:
    """What a push made: the commit, its address, and the pull request's if it is one."""

    repo: str
    commit: str
    url: str
    pull_request: str | None


# ------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Copy:
    """Bytes taken over as they are, from position ``start`` of ``source``."""

    source: str
    start: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Write:
    """Bytes known beforehand."""

    data: bytes
    offset: int

    @property
    def nbytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True)
class Term:
    """``factor · ΔW`` of one adapter (its position in the plan).

    ``name`` is what the adapter calls the weight; it has it the other way round if ``flipped``.
    """

    delta: Delta
    factor: float
    adapter: int
    name: str = ""
    flipped: bool = False


@dataclass(frozen=True)
class Convert:
    """A tensor whose elements are rounded to another ``dtype``; ``name`` is what the result calls it."""

    name: str
    entry: TensorEntry
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Merge(Convert):
    """A tensor to which deltas are added, and which is multiplied with ``gain``, before it is rounded to ``dtype``."""

    terms: tuple[Term, ...] = ()
    gain: float = 1.0


Step = Copy | Write | Convert | Merge


@dataclass(frozen=True)
class Output:
    """One file of the result that holds weights: its steps cover its ``size`` bytes exactly once."""

    name: str
    size: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class SideFile:
    """One file of the result that holds no merged weights: copied from ``source``, or written from ``text``.

    ``size`` in bytes and ``sha256`` are of its contents; for a file on the Hub it is the SHA-1 that Git knows it
    by.
    """

    name: str
    size: int
    sha256: str
    source: str | None = None
    text: str | None = None


# -------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class TargetGroup:
    """The modules of one kind (numbers in their names replaced by ``*``) and what an adapter does to them.

    ``placed`` says what the base has for them, where it is not a tensor of that name.
    """

    adapter: int
    target: str
    kind: str
    count: int
    rank: tuple[int, int]
    scale: tuple[float, float]
    placed: str = ""


@dataclass(frozen=True)
class AdapterUse:
    """One adapter in a merge. ``rank`` and ``scale`` are (smallest, largest) over its modules."""

    path: str
    weight: float
    sha256: str
    names_base: str | None
    kinds: tuple[str, ...]
    rank: tuple[int, int]
    scale: tuple[float, float]
    scale_assumed: bool
    modules: int
    tensors: int
    tensors_used: int
    unmatched: tuple[str, ...]
    origin: Origin | None = None


@dataclass(frozen=True)
class Plan:
    """Everything a merge will do. Sizes are in bytes; ``hash`` names the result: equal hash, equal bytes.

    ``bytes_read`` counts base and adapters, ``bytes_written`` the weights and side files of the result.
    ``base_files`` and ``adapter_files`` are (path, size, mtime in nanoseconds) as they were when the plan was made;
    the mtime is 0 for files of a commit on the Hub, which need not be here yet.
    """

    base: str
    adapters: tuple[AdapterUse, ...]
    outputs: tuple[Output, ...]
    side_files: tuple[SideFile, ...]
    single_file: bool
    dtype: str
    device: str
    allow_overflow: bool
    tensors_merged: int
    tensors_replaced: int
    tensors_added: int
    tensors_converted: int
    tensors_copied: int
    bytes_read: int
    bytes_written: int
    targets: tuple[TargetGroup, ...]
    base_files: tuple[tuple[str, int, int], ...]
    adapter_files: tuple[tuple[str, int, int], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    hash: str
    base_origin: Origin | None = None

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types, without its single steps."""
        skip = ("outputs", "side_files", "base_files", "adapter_files")
        facts = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name not in skip}
        facts["outputs"] = [{"name": one.name, "size": one.size} for one in self.outputs]
        facts["side_files"] = [one.name for one in self.side_files]
        return {"schema": REPORT_SCHEMA, **plain(facts)}


@dataclass(frozen=True)
class Resources:
    """What a run of a plan takes: threads, bytes of buffers, bytes of disk, the bytes there are, bytes to download."""

    threads: int
    memory: int
    disk: int
    disk_free: int
    download: int = 0


# ------------------------------------------------------------------------------------------ progress and report


@dataclass(frozen=True)
class Progress:
    """Where a run stands: bytes of the result ``done`` of ``total``, ``seconds`` since it began.

    ``resumed`` of the done bytes were there from an earlier run.
    """

    done: int
    total: int
    seconds: float
    resumed: int = 0

    @property
    def rate(self) -> float:
        """Bytes per second of this run."""
        return (self.done - self.resumed) / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate > 0 else None


@dataclass(frozen=True)
class TensorSurvival:
    """How much of one tensor's delta was left after rounding, and how large it was beside the base's norm, if any."""

    tensor: str
    survival: float
    relative_norm: float | None


@dataclass(frozen=True)
class Survival:
    """Delta survival, ‹Ŵ−W0, ΔW›/‖ΔW‖², over sampled rows: 1 is all of it, None where all deltas are zero.

    ``relative_norm`` is ‖ΔW‖/‖W0‖ on the sample, None where W0 is zero, ``elements`` its size, ``worst`` the tensors
    that lost most.
    """

    total: float | None
    relative_norm: float | None
    tensors: int
    elements: int
    worst: tuple[TensorSurvival, ...]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Times in seconds, sizes and ``peak_memory`` (of the process) in bytes, ``rate`` per second."""

    out: str
    base: str
    adapters: tuple[AdapterUse, ...]
    targets: tuple[TargetGroup, ...]
    dtype: str
    tensors_merged: int
    tensors_replaced: int
    tensors_added: int
    tensors_converted: int
    tensors_copied: int
    bytes_read: int
    bytes_written: int
    bytes_resumed: int
    survival: Survival | None
    seconds: float
    rate: float
    peak_memory: int
    threads: int
    plan_hash: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    base_origin: Origin | None = None
    pushed: Pushed | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types; ``schema`` is the version of this layout."""
        facts = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return {"schema": REPORT_SCHEMA, **plain(facts)}


def plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value
