"""What making adapters did: mixing, resizing and extracting them. Plain frozen dataclasses, as in ``records``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasmith.records import REPORT_SCHEMA, Pushed, plain

if TYPE_CHECKING:
    from lorasmith.adapter import Adapter

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

    ΔW is what the rule makes of the deltas; with peft-linear, which is to be compared, their exact sum. ``error`` is
    ‖ΔW − ΔW_kept‖/‖ΔW‖ and ``energy`` the kept share of Σσ²; ``norms`` and ``energies`` are those of each adapter's own
    delta, without its weight, None for those that have none here.
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

    ``norm`` is ‖TUNED − BASE‖ and ``relative_norm`` that over the base's, None where the base is zero; ``error`` is
    what the adapter lacks of the change, as it is written, ‖TUNED − BASE − ΔW‖/‖TUNED − BASE‖, and ``energy`` =
    1 − error² the share that it has.
    """

    module: str
    shape: tuple[int, int]
    rank: int
    norm: float
    relative_norm: float | None
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
