"""How deltas on the same weight get in each other's way, from their cores: exact, and without any base.

cosine      ‹ΔWᵢ, ΔWⱼ› / ‖ΔWᵢ‖‖ΔWⱼ‖: 1 where they do the same, −1 where they undo each other
overlap     the mean of cos² of the principal angles between two spans (Björck and Golub 1973): of the inputs that two
            deltas read (rows of A), of the outputs that they write (columns of B). 0 is none, 1 is one within the other
crosstalk   ‖ΔWᵢ Qⱼ‖ / ‖ΔWᵢ‖ with Qⱼ an orthonormal basis of the inputs of j: how much i answers to what j listens to
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from lorasmith.reports import Interference, ModuleInterference

if TYPE_CHECKING:
    import torch

    from lorasmith.lowrank import Reduced

_SPAN = 2.0**-40
"""Directions of a factor below this share of its largest singular value are none."""


def compare(
    module: str, adapters: Sequence[int], reduced: Reduced, weights: Sequence[float]
) -> list[ModuleInterference]:
    """What every two of a module's deltas are to each other; ``adapters`` are their positions."""
    norms = [float(core.norm()) for core in reduced.cores]
    inputs = [_span(one) for one in reduced.inputs]
    outputs = [_span(one) for one in reduced.outputs]
    found = []
    for i, j in combinations(range(len(adapters)), 2):
        if norms[i] == 0 or norms[j] == 0 or weights[i] == 0 or weights[j] == 0:
            continue
        sign = math.copysign(1, weights[i] * weights[j])
        product = float((reduced.cores[i] * reduced.cores[j]).sum())
        found.append(
            ModuleInterference(
                module=module,
                one=adapters[i],
                other=adapters[j],
                norms=(abs(weights[i]) * norms[i], abs(weights[j]) * norms[j]),
                cosine=sign * product / (norms[i] * norms[j]),
                input_angles=_angles(inputs[i], inputs[j]),
                output_angles=_angles(outputs[i], outputs[j]),
                crosstalk=(
                    float((reduced.cores[i] @ inputs[j]).norm()) / norms[i],
                    float((reduced.cores[j] @ inputs[i]).norm()) / norms[j],
                ),
            )
        )
    return found


def _span(factor: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of a factor's columns."""
    import torch

    u, values, _ = torch.linalg.svd(factor, full_matrices=False)
    basis: torch.Tensor = u[:, values > _SPAN * values.max()]
    return basis


def _angles(one: torch.Tensor, other: torch.Tensor) -> tuple[float, ...]:
    """The principal angles between two spans, in degrees, smallest first."""
    import torch

    cosines = torch.linalg.svdvals(one.t() @ other).clamp(max=1.0)
    return tuple(torch.rad2deg(cosines.acos()).tolist())


def summed(modules: Iterable[ModuleInterference]) -> tuple[Interference, ...]:
    """The same of whole adapters: deltas of all modules that two adapters share, seen as one."""
    pairs: dict[tuple[int, int], list[ModuleInterference]] = {}
    for one in modules:
        pairs.setdefault((one.one, one.other), []).append(one)
    return tuple(_sum(pair, some) for pair, some in sorted(pairs.items()))


def _sum(pair: tuple[int, int], modules: Sequence[ModuleInterference]) -> Interference:
    mine, theirs = (math.hypot(*(one.norms[side] for one in modules)) for side in (0, 1))
    return Interference(
        one=pair[0],
        other=pair[1],
        modules=len(modules),
        cosine=math.fsum(one.cosine * (one.norms[0] / mine) * (one.norms[1] / theirs) for one in modules),
        input_overlap=math.fsum(one.input_overlap for one in modules) / len(modules),
        output_overlap=math.fsum(one.output_overlap for one in modules) / len(modules),
        crosstalk=(
            math.hypot(*(one.crosstalk[0] * one.norms[0] for one in modules)) / mine,
            math.hypot(*(one.crosstalk[1] * one.norms[1] for one in modules)) / theirs,
        ),
        norm_ratio=theirs / mine,
    )
