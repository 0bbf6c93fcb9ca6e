"""What a mix did, module by module and adapter by adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from lorasmith.adapter import spans
from lorasmith.crosstalk import summed
from lorasmith.dtypes import NAMES
from lorasmith.execution.peak import peak_memory
from lorasmith.mixfile import Job
from lorasmith.mixture import Mixture
from lorasmith.recompression import Made
from lorasmith.reports import MixedAdapter, MixedModule, MixReport


def report_mix(job: Job, made: Sequence[Made], out: str | None, started: float, size: int = 0) -> MixReport:
    """The report of what was ``made`` by a run that ``started`` (``time.monotonic``) and wrote ``size`` bytes."""
    mixture, facts = job.mixture, [one.facts for one in made]
    total = math.fsum(one.norm**2 for one in facts)
    lost = math.fsum((one.error * one.norm) ** 2 for one in facts)
    ranks_in, ranks = [one.rank_in for one in facts], [one.rank_out for one in facts]
    details = tuple(pair for one in made for pair in one.interference)
    return MixReport(
        out=out,
        adapters=tuple(_use(mixture, position, facts) for position in range(len(mixture.adapters))),
        method=asdict(job.request.method),
        dtype=NAMES[job.code],
        rank_in=(min(ranks_in, default=0), max(ranks_in, default=0)),
        rank=(min(ranks, default=0), max(ranks, default=0)),
        params=sum(one.rank_out * sum(one.shape) for one in facts),
        tensors_passed=len(mixture.wholes),
        error=math.sqrt(lost / total) if total else 0.0,
        energy=max(0.0, 1 - lost / total) if total else 1.0,
        modules=tuple(facts),
        interference=summed(details),
        module_interference=details,
        bytes_written=size,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
        notes=(*mixture.notes, *_notes(job, facts)),
        warnings=(*mixture.warnings, *_cancelled(facts)),
    )


def _use(mixture: Mixture, position: int, facts: Sequence[MixedModule]) -> MixedAdapter:
    adapter, weight = mixture.adapters[position]
    deltas = [one.delta for one in adapter.deltas]
    rank, scale = spans(deltas)
    own = [(one.norms[position], one.energies[position]) for one in facts]
    squares = [(norm**2, energy) for norm, energy in own if norm is not None and energy is not None]
    total = math.fsum(square for square, _ in squares)
    return MixedAdapter(
        path=adapter.path,
        weight=weight,
        sha256=adapter.sha256,
        names_base=adapter.names_base,
        kinds=tuple(sorted({delta.kind for delta in deltas})),
        rank=rank,
        scale=scale,
        scale_assumed=adapter.scale_assumed,
        modules=len({one.module for one in adapter.deltas}),
        energy=math.fsum(square * energy for square, energy in squares) / total if total else None,
    )


def _notes(job: Job, facts: Sequence[MixedModule]) -> Iterator[str]:
    rank = job.request.criterion.rank
    if rank is not None and facts and all(one.rank_out < rank for one in facts):
        yield f"rank {rank} was asked for, and there is no more than rank {max(one.rank_out for one in facts)} to keep"


def _cancelled(facts: Sequence[MixedModule]) -> Iterator[str]:
    if facts and not any(one.rank_out for one in facts):
        yield "the deltas undo each other (or are zero): the mix changes nothing"
