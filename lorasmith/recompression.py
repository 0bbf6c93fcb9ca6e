"""One module of a mix: from the factors of several adapters to those of one.

as they are       one beside the other, the weights multiplied in: rank Σrᵢ, and nothing is lost
recompressed      what a rule makes of the cores, cut off where a criterion says            (lowrank)
element by element, or against the base: a matrix that is walked over, then approximated    (combined, sketching)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorasmith import rows
from lorasmith.combining import LINEAR, Method
from lorasmith.combining.combined import Combined, Source, combined_core, factors, read_factor, shares_kept
from lorasmith.crosstalk import compare
from lorasmith.deltas.low_rank import Factor
from lorasmith.dtypes import all_finite, itemsize, torch_dtype
from lorasmith.errors import AdapterMismatch, NotFinite
from lorasmith.lowrank import ROUNDING, Criterion, Pair, Reduced, Spectrum, balanced_bases, share_kept, spectrum
from lorasmith.mixture import Module, Part
from lorasmith.reports import MixedModule, ModuleInterference
from lorasmith.safefile import TensorEntry
from lorasmith.sketching import approximate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Request:
    """What was asked of a mix: a rule, how much is kept, whether of every adapter alike, and the factors' dtype."""

    method: Method = field(default_factory=Method)
    criterion: Criterion = field(default_factory=Criterion)
    balance: bool = False
    code: str = "F32"


@dataclass(frozen=True)
class Made:
    """A module's new factors, (outputs, rank) and (rank, inputs), what was kept, and how its deltas interfere."""

    module: Module
    left: torch.Tensor
    right: torch.Tensor
    facts: MixedModule
    interference: tuple[ModuleInterference, ...] = ()


def make(module: Module, request: Request, adapters: int, rank: int | None = None) -> Made:
    """The module's factors as ``request`` wants them, or of the ``rank`` that a budget for all of them gave it.

    ``adapters`` is the number of all that are mixed.
    """
    if module.dense is not None:
        return _rounded(_approximated(module, module.dense, request, adapters), request.code)
    cuts = bool(request.criterion) or not request.method.is_additive
    reduced = _reduced(module, bases=cuts)
    core, floor = _core(module, reduced, request.method), _floor(module, reduced)
    is_summed = request.method.name == "peft-linear"
    meant = _core(module, reduced, LINEAR) if is_summed else core
    if cuts:
        left, right, error, kept = _recompressed(reduced, core, meant, request, floor, rank)
    elif is_summed:
        left, right = _summed(module)
        error = _apart(core, meant)
        kept = _shares(reduced.cores, spectrum(core, floor))
    else:
        left, right = _concatenated(module)
        error, kept = 0.0, [1.0 if one.any() else None for one in reduced.cores]
    norms = [float(one.norm()) for one in reduced.cores]
    facts = _facts(module, adapters, left.shape[1], float(meant.norm()), error, norms, kept)
    return _rounded(Made(module, left, right, facts, tuple(_interference(module, reduced))), request.code)


def _rounded(made: Made, code: str) -> Made:
    """The same with what rounding to a dtype of few bits adds to the error."""
    if itemsize(code) >= 4 or not made.facts.norm:
        return made
    left, right = made.left.double(), made.right.double()
    stored = left.to(torch_dtype(code)).double(), right.to(torch_dtype(code)).double()
    if stored[0].equal(left) and stored[1].equal(right):
        return made
    pairs = [
        Pair(made.facts.rank_out, one.__getitem__, other.t().__getitem__, sign)
        for (one, other), sign in (((left, right), 1.0), (stored, -1.0))
    ]
    meant, negated = Reduced([[pair] for pair in pairs], made.facts.shape, bases=False).cores
    lost = float((meant + negated).norm())
    error = math.hypot(made.facts.error, lost / made.facts.norm)
    return replace(made, facts=replace(made.facts, error=error, energy=max(0.0, 1 - error**2)))


def singular_values(module: Module, request: Request) -> tuple[float, ...]:
    """Of the module's combination, largest first, without what is only rounding."""
    reduced = _reduced(module)
    return spectrum(_core(module, reduced, request.method), _floor(module, reduced)).values


def _floor(module: Module, reduced: Reduced) -> float:
    return reduced.floor([part.weight for part in module.parts])


def _reduced(module: Module, *, bases: bool = False) -> Reduced:
    return Reduced([factors(((part.delta, 1.0),)) for part in module.parts], module.site.shape, bases=bases)


def _core(module: Module, reduced: Reduced, method: Method) -> torch.Tensor:
    """What the rule makes of the deltas' cores."""
    if method.name == "peft-linear":
        return _sums(module, reduced.outputs) @ _sums(module, reduced.inputs, signed=True).t()
    sources = [
        Source(((part.delta, 1.0),), part.weight, part.digest, part.name, module.site.embedding)
        for part in module.parts
    ]
    return combined_core(method, sources, reduced.cores)


def _interference(module: Module, reduced: Reduced) -> list[ModuleInterference]:
    positions, weights = [part.adapter for part in module.parts], [part.weight for part in module.parts]
    return compare(module.name, positions, reduced, weights)


def _facts(
    module: Module,
    adapters: int,
    rank: int,
    norm: float,
    error: float,
    norms: Sequence[float | None],
    energies: Sequence[float | None],
) -> MixedModule:
    return MixedModule(
        module=module.name,
        shape=module.site.shape,
        rank_in=module.rank,
        rank_out=rank,
        norm=norm,
        error=error,
        energy=max(0.0, 1 - error**2),
        norms=_placed(module, norms, adapters),
        energies=_placed(module, energies, adapters),
    )


def _placed(module: Module, values: Sequence[float | None], adapters: int) -> tuple[float | None, ...]:
    """Values of a module's parts at the positions of their adapters."""
    placed: list[float | None] = [None] * adapters
    for part, value in zip(module.parts, values, strict=True):
        placed[part.adapter] = value
    return tuple(placed)


# ------------------------------------------------------------------------------------------ nothing is lost


def folded(parts: Sequence[Part]) -> list[tuple[Factor, Factor, float]]:
    """The products of all parts with their coefficients; the same factors given twice are one product."""
    products: dict[tuple[Factor, Factor], float] = {}
    for part in parts:
        low = part.delta.low_rank()
        assert low is not None, "only low-rank deltas have factors"
        for one in low.products:
            key = (one.left, one.right)
            products[key] = products.get(key, 0.0) + part.weight * one.coefficient
    return [(left, right, coefficient) for (left, right), coefficient in products.items() if coefficient]


def folds_left(shape: tuple[int, int]) -> bool:
    """Whether coefficients go into B, because it is the smaller of the two."""
    return shape[0] <= shape[1]


def _concatenated(module: Module) -> tuple[torch.Tensor, torch.Tensor]:
    """All products beside one another: the exact sum, but for one rounding to float32 where a coefficient goes in."""
    import torch

    height, width = module.site.shape
    on_left = folds_left(module.site.shape)
    products = folded(module.parts)
    rank, first = sum(right.shape[0] for _, right, _ in products), 0
    left, right = torch.empty(height, rank), torch.empty(rank, width)
    for one, other, coefficient in products:
        last = first + other.shape[0]
        left[:, first:last] = read_factor(one) * (coefficient if on_left else 1.0)
        right[first:last] = read_factor(other) * (1.0 if on_left else coefficient)
        first = last
    return left, right


def _summed(module: Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What PEFT's ``add_weighted_adapter`` makes with ``linear``: sums of factors, not of their products."""
    height, width = module.site.shape
    pairs = [pair for part in module.parts for pair in factors(((part.delta, 1.0),))]
    left = _sums(module, [pair.left(slice(0, height)) for pair in pairs])
    right = _sums(module, [pair.right(slice(0, width)) for pair in pairs], signed=True)
    return left.float(), right.t().float()


def _sums(module: Module, stacks: Sequence[torch.Tensor], *, signed: bool = False) -> torch.Tensor:
    """``Σ ±√|wᵢsᵢ| · stackᵢ``, the sign on one side only (PEFT, ``_generalized_task_arithmetic_weighted_adapter``)."""
    import torch

    if len({stack.shape[1] for stack in stacks}) > 1:
        raise AdapterMismatch(
            f"module {module.name!r} has the ranks {', '.join(str(stack.shape[1]) for stack in stacks)}, and "
            "peft-linear adds factors, which must have one; --method linear takes any"
        )
    scales = [part.weight * part.delta.scale for part in module.parts]
    roots = [math.copysign(math.sqrt(abs(scale)), scale if signed else 1.0) for scale in scales]
    return torch.stack([stack * root for stack, root in zip(stacks, roots, strict=True)]).sum(dim=0)


# --------------------------------------------------------------------------------------------- recompressed


def _recompressed(
    reduced: Reduced, core: torch.Tensor, meant: torch.Tensor, request: Request, floor: float, rank: int | None
) -> tuple[torch.Tensor, torch.Tensor, float, list[float | None]]:
    """New factors, what they lack of what is ``meant``, and how much of each delta's energy is in what they span."""
    if request.balance:
        u, v = _balanced_spans(reduced.cores, request.criterion)
        found = spectrum(u.t() @ core @ v, floor)
        found = replace(found, u=u @ found.u, v=v @ found.v)
        kept = len(found.values)
    else:
        found = spectrum(core, floor)
        kept = request.criterion.keep(found.values) if rank is None else rank
    left, right = found.halves(kept)
    if request.balance or meant is not core:
        error = _apart(left @ right.t(), meant)
    else:
        error = math.sqrt(math.fsum(value * value for value in found.values[kept:])) / (float(core.norm()) or 1.0)
    return *reduced.expand(left, right), error, _shares(reduced.cores, replace(found, values=found.values[:kept]))


def _apart(core: torch.Tensor, meant: torch.Tensor) -> float:
    """The relative error of a core."""
    return float((core - meant).norm() / meant.norm()) if meant.any() else 0.0


def _shares(cores: Sequence[torch.Tensor], found: Spectrum) -> list[float | None]:
    """How much of each core's energy is in the spans of what was found."""
    kept = len(found.values)
    return [share_kept(one, found.u[:, :kept], found.v[:, :kept]) for one in cores]


def _balanced_spans(cores: Sequence[torch.Tensor], criterion: Criterion) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs and inputs in which every delta has as much of its energy as the criterion wants (or rank allows)."""
    import torch

    if not any(core.any() for core in cores):
        return cores[0].new_empty(cores[0].shape[0], 0), cores[0].new_empty(cores[0].shape[1], 0)
    u, v = balanced_bases(cores)
    most = min(u.shape[1], v.shape[1])
    count = min(most, criterion.rank or most)
    if criterion.energy is not None:
        shares = [(u.t() @ core @ v).square() for core in cores if core.any()]
        inside = torch.stack([one[:most, :most].cumsum(0).cumsum(1).diagonal() / one.sum() for one in shares])
        enough = inside.min(dim=0).values >= criterion.energy * (1 - ROUNDING)
        count = int(enough.nonzero()[0]) + 1 if enough.any() else most
    # all of the smaller span limits the rank, so that nothing need be left out of the other
    return (u, v) if count == most else (u[:, :count], v[:, :count])


# ------------------------------------------------------------------------------------ all elements, row by row


def _approximated(module: Module, combined: Combined, request: Request, adapters: int) -> Made:
    """Factors of a matrix that is none of low rank by itself."""
    import torch

    opened = combined.open(torch.float32, lambda: walk(combined, module.entry))

    def blocks() -> Iterator[tuple[slice, torch.Tensor]]:
        for span, w0 in walk(combined, module.entry):
            block = torch.zeros(w0.shape)
            opened.add_to(block, w0, span, 1.0)
            if not all_finite(block):
                raise NotFinite(
                    f"the change of {module.name} has a NaN or a number too large for float32; "
                    + ("are the base's values what they should be?" if module.entry else "the weights are too large")
                )
            yield span, block

    found = approximate(blocks, combined.shape, request.criterion)
    norms, kept = shares_kept(combined, lambda: walk(combined, module.entry), found.left, found.right)
    left, right = (found.right.t(), found.left.t()) if module.turned else (found.left, found.right)
    error = math.sqrt(max(0.0, found.norm2 - found.kept2) / found.norm2) if found.norm2 else 0.0
    facts = _facts(module, adapters, found.rank, math.sqrt(found.norm2), error, norms, kept)
    low = all(part.delta.low_rank() is not None for part in module.parts)
    return Made(module, left, right, facts, tuple(_interference(module, _reduced(module))) if low else ())


def walk(combined: Combined, entry: TensorEntry | None) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of the tensor that a combination is on, in float32; zeros where it reads none."""
    import torch

    if entry is None:
        for span in rows.spans(combined.shape):
            yield span, torch.zeros(1, 1).expand(span.stop - span.start, combined.shape[1])
        return
    for span, (stored,) in rows.walk(entry):
        yield span, stored.float()
