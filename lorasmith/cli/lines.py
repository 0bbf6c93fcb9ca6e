"""What commands say to people, line by line: plans, reports, tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lorasmith.errors import listed

if TYPE_CHECKING:
    from lorasmith.records import AdapterUse, MergeReport, Plan, Resources, Survival, TargetGroup
    from lorasmith.reports import ExtractedModule, ExtractReport, Interference, MixedModule, MixReport


def size(nbytes: float) -> str:
    """Bytes for people, in powers of 1000: ``2.47 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 999.5 or unit == "TB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"


def plan_lines(plan: Plan, takes: Resources, out: str) -> Iterator[str]:
    """What a merge would do."""
    yield f"base     {plan.base} ({count(len(plan.base_files), 'file')})"
    yield from _adapter_lines(plan.adapters)
    yield ""
    yield from _target_lines(plan.targets, several=len(plan.adapters) > 1)
    yield ""
    yield f"tensors  {_tensors(plan)}"
    yield f"read     {size(plan.bytes_read)}"
    if takes.download:
        yield f"download {size(takes.download)}"
    yield f"write    {size(plan.bytes_written)} to {out} ({size(takes.disk_free)} free)"
    yield f"memory   {size(takes.memory)} of buffers for {takes.threads} threads, beside Python and torch"
    yield from (f"note     {note}" for note in plan.notes)


def report_lines(report: MergeReport) -> Iterator[str]:
    """What a merge did."""
    yield f"Merged into {report.out}"
    yield f"base     {report.base}"
    yield from _adapter_lines(report.adapters)
    yield f"tensors  {_tensors(report)}"
    yield from _survival_lines(report.survival)
    resumed = f" ({size(report.bytes_resumed)} of it by an earlier run)" if report.bytes_resumed else ""
    yield f"written  {size(report.bytes_written)}{resumed} in {report.seconds:.1f} s, {size(report.rate)}/s"
    if report.pushed is not None:
        yield f"pushed   {report.pushed.url} (commit {report.pushed.commit})"
    yield from _ending(report)


def _adapter_lines(uses: Sequence[AdapterUse]) -> Iterator[str]:
    for use in uses:
        used = f"{use.tensors_used} of {use.tensors}" if use.unmatched else f"all {use.tensors}"
        facts = f"{', '.join(use.kinds)}, rank {_span(use.rank)}, scale {_span(use.scale)}, {used} tensors used"
        yield f"adapter  {use.path}{f' × {use.weight:g}' if use.weight != 1 else ''}: {facts}"


def _target_lines(targets: Sequence[TargetGroup], *, several: bool) -> Iterator[str]:
    rows = [("target", "kind", "modules", "rank", "scale", "")]
    for one in targets:
        name = f"[{one.adapter + 1}] {one.target}" if several else one.target
        rows.append((name, one.kind, str(one.count), _span(one.rank), _span(one.scale), one.placed))
    yield from _table(rows, left=(0, 1, 5))


def _table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> Iterator[str]:
    """Cells in columns, those of some to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells).rstrip()


def _tensors(facts: Plan | MergeReport) -> str:
    counts = [
        (facts.tensors_merged, "merged"),
        (facts.tensors_replaced, "replaced"),
        (facts.tensors_added, "added"),
        (facts.tensors_converted, f"converted to {facts.dtype}"),
        (facts.tensors_copied, "copied"),
    ]
    return ", ".join(f"{count} {what}" for count, what in counts if count)


def _survival_lines(survival: Survival | None) -> Iterator[str]:
    if survival is None or survival.total is None:
        return
    sampled = f"{survival.elements:,} elements of {count(survival.tensors, 'tensor')} sampled"
    size = survival.relative_norm
    weights = "the weights are zero" if size is None else f"the delta is {size:.2%} of the weights' norm"
    yield f"survival {survival.total:.2%} of the delta is left after rounding ({weights}; {sampled})"
    if survival.worst and survival.worst[0].survival < min(0.99, survival.total):
        worst = survival.worst[0]
        beside = "" if worst.relative_norm is None else f" (delta {worst.relative_norm:.2%})"
        yield f"         least in {worst.tensor}: {worst.survival:.2%}{beside}"


def _span(pair: tuple[float, float]) -> str:
    low, high = (f"{value:g}" for value in pair)
    return low if low == high else f"{low}–{high}"


def count(number: int, noun: str) -> str:
    """A number and what is counted: ``3 files``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def extract_lines(report: ExtractReport) -> Iterator[str]:
    """What was extracted, or would be."""
    yield f"Extracted into {report.out}" if report.out else "Nothing was written (--dry-run)."
    yield f"base     {report.base}"
    yield f"tuned    {report.tuned}"
    yield ""
    yield from _extracted_modules(report.modules)
    yield ""
    facts = f"rank {_span(report.rank)}, {report.params:,} parameters in {report.dtype}"
    yield f"LoRA     {count(len(report.modules), 'module')}, {facts}"
    yield f"kept     {report.energy:.4%} of the energy of their changes, error {report.error:.3g}"
    if report.whole:
        stored = sum(one.nbytes for one in report.whole)
        yield f"whole    {count(len(report.whole), 'tensor')}, {size(stored)}: {listed(_names(report))}"
    yield f"left out {count(len(report.unchanged), 'tensor')} that did not change"
    if report.out:
        yield f"written  {size(report.bytes_written)} in {report.seconds:.1f} s"
    yield from _ending(report)


def _extracted_modules(modules: Sequence[ExtractedModule]) -> Iterator[str]:
    """Modules of one kind in one line, numbers in their names replaced by ``*``."""
    groups: dict[str, list[ExtractedModule]] = {}
    for one in modules:
        groups.setdefault(_alike(one.module), []).append(one)
    rows = [("target", "modules", "rank", "change", "of base", "energy kept", "largest error")]
    for name, some in groups.items():
        norms = [one.norm for one in some]
        total = sum(norm**2 for norm in norms)
        energy = sum(one.energy * one.norm**2 for one in some) / total
        ranks, shares = [one.rank for one in some], [one.relative_norm for one in some if one.relative_norm is not None]
        of_base = f"{max(shares):.2%}" if shares else ""
        figures = (f"{total**0.5:.3g}", of_base, f"{energy:.4%}", f"{max(one.error for one in some):.3g}")
        rows.append((name, str(len(some)), _span((min(ranks), max(ranks))), *figures))
    yield from _table(rows)


def _names(report: ExtractReport) -> list[str]:
    """The tensors stored whole, layers that differ in their numbers only once."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", one.tensor) for one in report.whole))


def mix_lines(report: MixReport, done: str) -> Iterator[str]:
    """What a mix made, or would make; ``done`` is what was done to its adapters."""
    yield "Nothing was written (--dry-run)" if report.out is None else f"{done} into {report.out}"
    if report.pushed is not None:
        yield f"pushed   {report.pushed.url} (commit {report.pushed.commit})"
    yield from _mixed_adapters(report)
    yield ""
    yield from _mixed_modules(report.modules)
    if report.interference:
        yield ""
        yield from _interference_lines(report.interference)
    yield ""
    kept = f"{report.energy:.4%} of its energy, a relative error of {report.error:.3g}" if report.error else "all of it"
    method = "sum" if report.method["name"].endswith("linear") else f"result of {report.method['name']}"
    yield f"kept     of the exact {method}, {kept}"
    yield f"rank     {_span(report.rank)}, of {_span(report.rank_in)} put together; {report.params:,} parameters"
    if report.tensors_passed:
        yield f"whole    {count(report.tensors_passed, 'tensor')} beside the factors"
    if report.out is not None:
        yield f"written  {size(report.bytes_written)} as {report.dtype} in {report.seconds:.1f} s"
    yield from _ending(report)


def _mixed_adapters(report: MixReport) -> Iterator[str]:
    for number, one in enumerate(report.adapters, 1):
        facts = (
            f"{', '.join(one.kinds)}, rank {_span(one.rank)}, scale {_span(one.scale)}, {count(one.modules, 'module')}"
        )
        kept = "" if one.energy is None else f", {one.energy:.2%} of its energy kept"
        yield f"adapter  [{number}] {one.path} × {one.weight:g}: {facts}{kept}"


def _mixed_modules(modules: Sequence[MixedModule]) -> Iterator[str]:
    """Modules of one kind in one line, numbers in their names replaced by ``*``."""
    groups: dict[str, list[MixedModule]] = {}
    for one in modules:
        groups.setdefault(_alike(one.module), []).append(one)
    rows = [("target", "modules", "rank in", "rank out", "energy kept", "largest error")]
    for name, some in groups.items():
        into, out = ([one.rank_in for one in some], [one.rank_out for one in some])
        total = sum(one.norm**2 for one in some)
        energy = sum(one.energy * one.norm**2 for one in some) / total if total else 1.0
        rows.append(
            (
                name,
                str(len(some)),
                _span((min(into), max(into))),
                _span((min(out), max(out))),
                f"{energy:.2%}",
                f"{max(one.error for one in some):.3g}",
            )
        )
    yield from _table(rows)


def _interference_lines(pairs: Sequence[Interference]) -> Iterator[str]:
    rows = [("pair", "modules", "cosine", "inputs overlap", "outputs overlap", "crosstalk", "norms")]
    for one in pairs:
        rows.append(
            (
                f"[{one.one + 1}] [{one.other + 1}]",
                str(one.modules),
                f"{one.cosine:.3f}",
                f"{one.input_overlap:.1%}",
                f"{one.output_overlap:.1%}",
                f"{one.crosstalk[0]:.1%} / {one.crosstalk[1]:.1%}",
                f"1 : {one.norm_ratio:.3g}",
            )
        )
    yield from _table(rows)


def _ending(report: MergeReport | MixReport | ExtractReport) -> Iterator[str]:
    yield f"memory   {size(report.peak_memory)} at most"
    yield from (f"note     {note}" for note in report.notes)


def _alike(module: str) -> str:
    """A module's name with ``*`` for the numbers in it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)
