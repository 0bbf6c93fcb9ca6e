"""What is going to happen and what happened: plain frozen dataclasses that pickle, print and turn into JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasmith.safefile import TensorEntry

if TYPE_CHECKING:
    from lorasmith.adapter import Adapter
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
    """How much of one tensor's delta was left after rounding, and how large it was beside the base's norm."""

    tensor: str
    survival: float
    relative_norm: float


@dataclass(frozen=True)
class Survival:
    """Delta survival, ‹Ŵ−W0, ΔW›/‖ΔW‖², over sampled rows: 1 is all of it, None where all deltas are zero.

    ``relative_norm`` is ‖ΔW‖/‖W0‖ on the sample, ``elements`` its size, ``worst`` the tensors that lost most.
    """

    total: float | None
    relative_norm: float
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


# ------------------------------------------------------------------------------------------- mixing adapters


@dataclass(frozen=True)
class ModuleInterference:
    """What the deltas of two adapters (``one`` and ``other``, their positions) on one module are to each other.

    ``norms`` are ‖w·ΔW‖, ``crosstalk`` is how much of the one's delta answers to the other's inputs, and the reverse.
    Angles are in degrees, smallest first. See ``lorasmith.crosstalk`` for what the figures mean.
    """

    module: str
    one: int
    other: int
    norms: tuple[float, float]
    cosine: float
    input_angles: tuple[float, ...]
    output_angles: tuple[float, ...]
    crosstalk: tuple[float, float]

    @property
    def input_overlap(self) -> float:
        return _mean_cosine2(self.input_angles)

    @property
    def output_overlap(self) -> float:
        return _mean_cosine2(self.output_angles)


def _mean_cosine2(angles: tuple[float, ...]) -> float:
    return math.fsum(math.cos(math.radians(angle)) ** 2 for angle in angles) / len(angles)


@dataclass(frozen=True)
class Interference:
    """What two adapters are to each other over all ``modules`` that both change.

    Overlaps are means over the modules; ``norm_ratio`` is the other's norm over the one's.
    """

    one: int
    other: int
    modules: int
    cosine: float
    input_overlap: float
    output_overlap: float
    crosstalk: tuple[float, float]
    norm_ratio: float


@dataclass(frozen=True)
class MixedAdapter:
    """One adapter of a mix; ``rank`` and ``scale`` are (smallest, largest) over its modules.

    ``energy`` is the share of its own Σσ² that lies in what was kept, None where it has none.
    """

    path: str
    weight: float
    sha256: str
    names_base: str | None
    kinds: tuple[str, ...]
    rank: tuple[int, int]
    scale: tuple[float, float]
    scale_assumed: bool
    modules: int
    energy: float | None


@dataclass(frozen=True)
class MixedModule:
    """One module of a mix: ranks before and after, ‖ΔW‖ before, and what was kept of it.

    ``error`` is ‖ΔW − ΔW_kept‖/‖ΔW‖ and ``energy`` the kept share of Σσ²; ``norms`` and ``energies`` are those of each
    adapter's own delta, without its weight, None for those that have none here.
    """

    module: str
    shape: tuple[int, int]
    rank_in: int
    rank_out: int
    norm: float
    error: float
    energy: float
    norms: tuple[float | None, ...]
    energies: tuple[float | None, ...]


@dataclass(frozen=True)
class MixReport:
    """What became of adapters that were mixed. ``rank`` is (smallest, largest); times in seconds, sizes in bytes.

    ``tensors_passed`` counts what was taken over whole; ``out`` is None where nothing was written to a place of its
    own.
    """

    out: str | None
    adapters: tuple[MixedAdapter, ...]
    method: Mapping[str, Any]
    dtype: str
    rank_in: tuple[int, int]
    rank: tuple[int, int]
    params: int
    tensors_passed: int
    error: float
    energy: float
    modules: tuple[MixedModule, ...]
    interference: tuple[Interference, ...]
    module_interference: tuple[ModuleInterference, ...]
    bytes_written: int
    seconds: float
    peak_memory: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    adapter: Adapter | None = None
    pushed: Pushed | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types; ``schema`` is the version of this layout."""
        facts = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "adapter"}
        return {"schema": REPORT_SCHEMA, **plain(facts)}


# --------------------------------------------------------------------------------------- extracting an adapter


@dataclass(frozen=True)
class ExtractedModule:
    """What became of one weight that tuning has changed, of ``shape`` (outputs, inputs).

    ``norm`` is ‖TUNED − BASE‖ and ``relative_norm`` that over the base's; ``error`` is what the adapter lacks of the
    change, as it is written, ‖TUNED − BASE − ΔW‖/‖TUNED − BASE‖, and ``energy`` = 1 − error² the share that it has.
    """

    module: str
    shape: tuple[int, int]
    rank: int
    norm: float
    relative_norm: float
    error: float
    energy: float


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the tuned model that the adapter has as it is."""

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class ExtractReport:
    """What became of two models. ``rank`` is (smallest, largest); times in seconds, sizes in bytes.

    ``error`` and ``energy`` are those of all ``modules`` together. ``whole`` are the tensors that are stored as they
    are, ``unchanged`` the names of those left out. ``vocabulary`` is its size before and after, if that has changed;
    ``out`` is None where nothing was written to a place of its own.
    """

    out: str | None
    base: str
    tuned: str
    criterion: Mapping[str, float]
    dtype: str
    device: str
    rank: tuple[int, int]
    params: int
    error: float
    energy: float
    modules: tuple[ExtractedModule, ...]
    whole: tuple[StoredTensor, ...]
    unchanged: tuple[str, ...]
    vocabulary: tuple[int, int] | None
    bytes_written: int
    seconds: float
    peak_memory: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    adapter: Adapter | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types; ``schema`` is the version of this layout."""
        facts = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "adapter"}
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
