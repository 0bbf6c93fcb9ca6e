"""From float32 sums to the output dtype, and how much of a delta that leaves.

Rounding is torch's: to nearest, ties to even. *Survival* is the projection ‹Ŵ−W0, ΔW›/‖ΔW‖² of what the weight
really moved by onto what it should have moved by. bfloat16 keeps 8 bits: deltas below about 0.2 % of the weight they
are added to mostly vanish, and the projection falls below 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasmith.dtypes import LARGEST, NAMES
from lorasmith.errors import NotFinite
from lorasmith.records import Survival, TensorSurvival

if TYPE_CHECKING:
    import torch

SAMPLED_ROWS = 16
"""Rows of a sampled block that are measured."""

SAMPLE_EVERY = 8
"""One block in this many is sampled; a tensor's first always is."""

SURVIVAL_LIMIT = 0.9
"""Below this survival a merge is reported with a warning."""


def round_into(
    out: torch.Tensor, acc: torch.Tensor, w0: torch.Tensor, tensor: str, dtype: str, *, saturate: bool
) -> None:
    """Round the sums ``acc`` into ``out`` (whose format code is ``dtype``); ``w0`` is the base's block.

    Raises NotFinite when an element that is finite in the base is not in the result; with ``saturate`` it becomes
    the dtype's largest value instead, unless the sum itself is a NaN.
    """
    out.copy_(acc)
    if harmless(squares(acc).item(), dtype):
        return
    if saturate:
        out.copy_(acc.clamp(-LARGEST[dtype], LARGEST[dtype]).where(w0.isfinite(), acc))
    bad = w0.isfinite() & ~out.isfinite()
    if not bad.any():
        return
    value = acc[bad][0].item()
    if math.isfinite(value):
        raise NotFinite(
            f"tensor {tensor!r} overflows {NAMES[dtype]}: it has a value of {value:.6g} and the largest that fits is "
            f"{LARGEST[dtype]:.6g}; use --dtype bfloat16 or float32, or --allow-overflow to clip"
        )
    raise NotFinite(
        f"tensor {tensor!r} becomes {value} where the base is finite; the adapter's values are far too large, "
        "or it was trained on another model"
    )


def squares(acc: torch.Tensor) -> torch.Tensor:
    """The sum of a block's squares."""
    return acc.view(-1).dot(acc.view(-1))


def harmless(squares: float, dtype: str) -> bool:
    """Whether no element of a block with this sum of squares can be a NaN or too large for a dtype.

    That is cheaper to see from their squares than one by one.
    """
    return squares < 0.5 * LARGEST[dtype] * LARGEST[dtype]


@dataclass(frozen=True)
class Sample:
    """Sums over sampled rows of a tensor: ‹Ŵ−W0, ΔW›, ‖ΔW‖², ‖W0‖², and the number of elements.

    ``block`` is the one that the rows are from; 0 where several were summed up.
    """

    tensor: str
    block: int
    projection: float
    delta: float
    base: float
    elements: int


def measure(out: torch.Tensor, w0: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The three sums of a sample, given sampled rows of the result, the base and the exact delta.

    In the dtype of the sums: float64 copies of the rows would cost thirty times as much, most of it for fresh memory.
    """
    import torch

    base, exact = w0.reshape(-1), delta.reshape(-1)
    moved = (out.to(w0.dtype) - w0).reshape(-1)
    return torch.stack([moved.dot(exact), exact.dot(exact), base.dot(base)]).to(torch.float64)


def summed(samples: Iterable[Sample]) -> list[Sample]:
    """One sample per tensor, in the order of their names, whatever the order they come in.

    Blocks whose sums are not finite, as those of a base that holds infinities, are left out.
    """
    sums: dict[str, Sample] = {}
    for one in sorted(samples, key=lambda one: (one.tensor, one.block)):
        if not all(map(math.isfinite, (one.projection, one.delta, one.base))):
            continue
        so_far = sums.get(one.tensor, Sample(one.tensor, 0, 0.0, 0.0, 0.0, 0))
        sums[one.tensor] = Sample(
            one.tensor,
            0,
            so_far.projection + one.projection,
            so_far.delta + one.delta,
            so_far.base + one.base,
            so_far.elements + one.elements,
        )
    return list(sums.values())


def survival(samples: Iterable[Sample], worst: int = 5) -> Survival | None:
    """The survival that samples show, in total and of the ``worst`` tensors; None when nothing was sampled."""
    tensors = summed(samples)
    if not tensors:
        return None
    delta, base = math.fsum(one.delta for one in tensors), math.fsum(one.base for one in tensors)
    single = [
        TensorSurvival(one.tensor, one.projection / one.delta, _relative(one.delta, one.base))
        for one in tensors
        if one.delta
    ]
    return Survival(
        total=math.fsum(one.projection for one in tensors) / delta if delta else None,
        relative_norm=_relative(delta, base),
        tensors=len(tensors),
        elements=sum(one.elements for one in tensors),
        worst=tuple(sorted(single, key=lambda one: (one.survival, one.tensor))[:worst]),
    )


def _relative(delta: float, base: float) -> float | None:
    """‖ΔW‖/‖W0‖ from their squares."""
    return math.sqrt(delta / base) if base else None
