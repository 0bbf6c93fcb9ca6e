"""Rules that make one delta of several, element by element.

    linear           Σ wᵢdᵢ
    magnitude-prune  the same of the largest ``density`` of each delta's elements; the others are zero
    dare             the same of elements drawn with probability ``density``, divided by it (Yu et al. 2023,
                     arXiv:2311.03099)
    ties             of the largest, the mean of those that agree with the elected sign (Yadav et al. 2023,
                     arXiv:2306.01708)
    dare-ties        of those drawn, likewise

The formulas are PEFT's (``peft.utils.merge_utils``): a sign is elected by the sum of the elements (``total``) or by
their number (``frequency``), zero counting as plus, and the weighted sum of those that agree is divided by their
number. A negative weight turns its delta round before the election.

Only ``linear`` means the same in every basis. The others are applied in one of two *spaces*: ``dense``, to the elements
of the weight itself, as published; or ``core``, to the elements of the deltas' cores in the bases they share
(``lowrank.shared_bases``; the idea is that of Panariello et al. 2025, arXiv:2509.17786), where what comes out is of low
rank again. Which way round a vector of these bases points means nothing, and so does plus there: equal numbers are
decided by the sum, and where that is zero as well, so is what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasmith.errors import BadOption

if TYPE_CHECKING:
    import torch

METHODS = ("linear", "ties", "dare", "dare-ties", "magnitude-prune", "peft-linear")
SPACES = ("core", "dense")
SIGNS = ("total", "frequency")

DENSITY = 0.5
"""What ``density`` is unless it is given."""

DUST = 2.0**-32
"""Of cores, what is below this share of what it is made of is what rounding left of zero: float32 tells no less."""


@dataclass(frozen=True)
class Method:
    """A rule and how it is applied; ``density`` in (0, 1], ``seed`` for what is drawn.

    ``peft-linear`` is none for elements: it adds factors, as PEFT's ``linear`` does.
    """

    name: str = "linear"
    density: float = 1.0
    seed: int = 0
    sign: str = "total"
    space: str = "core"

    @property
    def is_linear(self) -> bool:
        return self.name == "linear"

    @property
    def is_additive(self) -> bool:
        """Whether it puts factors together that are of no higher rank than all of them."""
        return self.name in ("linear", "peft-linear")

    @property
    def draws(self) -> bool:
        return self.name.startswith("dare")

    @property
    def elects(self) -> bool:
        return self.name.endswith("ties")


LINEAR = Method()
"""The weighted sum."""


def choose(
    name: str = "linear",
    *,
    density: float | None = None,
    seed: int | None = None,
    sign: str | None = None,
    space: str | None = None,
) -> Method:
    """The method that options name; BadOption for what is unknown, out of range or without effect."""
    if name not in METHODS:
        raise BadOption(f"method {name!r} is not one of {', '.join(METHODS)}")
    prunes = name not in ("linear", "peft-linear")
    effects = (
        ("density", density, prunes),
        ("seed", seed, name.startswith("dare")),
        ("sign", sign, name.endswith("ties")),
        ("space", space, prunes),
    )
    for option, value, has_effect in effects:
        if value is not None and not has_effect:
            raise BadOption(f"--{option} has no effect with --method {name}; leave it out or choose another method")
    if density is not None and not 0 < density <= 1:
        raise BadOption(f"density must be above 0 and at most 1, not {density:g}")
    if seed is not None and not 0 <= seed < 2**64:
        raise BadOption(f"seed must be between 0 and 2**64 - 1, not {seed}")
    if sign is not None and sign not in SIGNS:
        raise BadOption(f"sign {sign!r} is neither total nor frequency")
    if space is not None and space not in SPACES:
        raise BadOption(f"space {space!r} is neither core nor dense")
    return Method(
        name,
        (DENSITY if density is None else density) if prunes else 1.0,
        seed or 0,
        sign or "total",
        space or "core",
    )


def kept_count(method: Method, elements: int) -> int:
    """How many of so many elements are the largest: PEFT's ``int(density · numel)``, but one at least."""
    return max(1, int(method.density * elements))


def combine(
    method: Method, deltas: Sequence[torch.Tensor], weights: Sequence[float], keep: Sequence[torch.Tensor] | None
) -> torch.Tensor:
    """The combination of deltas of one shape; what ``keep`` (a boolean mask for each) leaves out counts as zero."""
    import torch

    scale = 1 / method.density if method.draws else 1.0
    masks: Sequence[torch.Tensor | None] = keep or [None] * len(deltas)
    turned = [
        (delta if mask is None else delta.where(mask, 0.0)) * math.copysign(scale, weight)
        for delta, mask, weight in zip(deltas, masks, weights, strict=True)
    ]
    if not method.elects:
        return torch.stack([delta * abs(weight) for delta, weight in zip(turned, weights, strict=True)]).sum(dim=0)
    stacked = torch.stack(turned)
    agree = stacked.sign() == _elected(method, stacked)
    factors = torch.tensor([abs(weight) for weight in weights], dtype=stacked.dtype, device=stacked.device)
    kept = (stacked * agree * factors.view(-1, *[1] * (stacked.dim() - 1))).sum(dim=0)
    return kept / agree.sum(dim=0).clamp(min=1)


def _elected(method: Method, stacked: torch.Tensor) -> torch.Tensor:
    """The sign that the deltas elect for each element; 0 for none, in core space."""
    import torch

    total = stacked.sum(dim=0)
    if method.space == "core":
        total = total.where(total.abs() > DUST * stacked.abs().sum(dim=0), 0.0)
    votes = total if method.sign == "total" else stacked.sign().sum(dim=0)
    if method.space == "core":
        return votes.where(votes != 0, total).sign()
    return torch.where(votes >= 0, 1.0, -1.0)
