"""Adapters in, one adapter out: sort out what they have, make every module's factors, write them, report."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lorasmith import __version__
from lorasmith.adapter import Adapter
from lorasmith.adapterfile import AdapterFile, Spot, dumped, is_file, open_spot
from lorasmith.arguments import AdapterArguments, Given, Path, Weighted, weigh_modules, weighted
from lorasmith.checkpoint import Checkpoint, open_checkpoint, require_path
from lorasmith.combining import Method, choose
from lorasmith.combining.combined import Combined, Source, read_factor
from lorasmith.crosstalk import summed
from lorasmith.deltas.low_rank import Factor
from lorasmith.dtypes import BY_OPTION, NAMES, itemsize, torch_dtype
from lorasmith.errors import BadOption
from lorasmith.execution import default_threads
from lorasmith.execution.destination import check_output
from lorasmith.execution.peak import peak_memory
from lorasmith.execution.torchthreads import in_order
from lorasmith.formats import read_adapter
from lorasmith.formats.writing import lora_config
from lorasmith.lowrank import Criterion, allocate
from lorasmith.mixture import Mixture, Module, Whole, gather, saved_modules, trained_tokens
from lorasmith.recompression import Made, Request, folded, folds_left, make, singular_values, walk
from lorasmith.records import Interference, MixedAdapter, MixedModule, MixReport, Progress

if TYPE_CHECKING:
    import torch


def mix(
    adapters: AdapterArguments,
    out: Path | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    params: int | None = None,
    balance: bool = False,
    weights: Sequence[str] = (),
    method: str = "linear",
    density: float | None = None,
    seed: int | None = None,
    sign: str | None = None,
    space: str | None = None,
    prefer: str | None = None,
    base: Path | None = None,
    dtype: str = "keep",
    threads: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> MixReport:
    """Make one adapter of several: ``ΔW = Σ weightᵢ·ΔWᵢ``, module by module.

    ``adapters`` are PEFT folders or files, or ``Adapter``s: ``path``, ``"path:0.7"`` or ``(path, 0.7)``. The sum is
    exact, of rank Σrᵢ, unless one of ``rank``, ``energy`` (share of Σσ² that is kept), ``max_error`` (relative, in the
    Frobenius norm) or ``params`` (of the whole adapter) says how much of it is kept; what is cut off is the least there
    is. ``balance`` keeps every adapter's share of its own instead. ``weights`` are ``REGEX=FACTOR`` for modules' names,
    ``method`` another rule than the sum, with its ``density``, ``seed``, ``sign`` and ``space``
    (``lorasmith.combining``). Layers trained whole that differ are those of ``prefer``; adapters whose effect depends
    on the base, as DoRA's does, take a ``base``. ``dtype`` is that of the factors: ``keep`` is float32, or what they
    are stored in where nothing is lost by that.

    ``out`` becomes a PEFT folder, or one file if it ends in .safetensors; without it, the report's ``adapter`` is the
    result, in a file that goes when nobody has it any more. ``dry_run`` computes everything and keeps nothing. Raises a
    ``LorasmithError``; nothing appears at ``out`` before all of it is written.
    """
    request = Request(
        choose(method, density=density, seed=seed, sign=sign, space=space),
        Criterion(rank=rank, energy=energy, max_error=max_error, params=params),
        balance,
    )
    _require_sense(request)
    run = _Run(out, dtype, threads, overwrite, dry_run, progress)
    given = weighted(adapters)
    return _mix(given, request, run, patterns=tuple(weights), prefer=prefer, base=base)


def resize(
    adapter: Given,
    out: Path | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    params: int | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | None = None,
    sv_cumulative: float | None = None,
    dtype: str = "keep",
    threads: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> MixReport:
    """Give an adapter other ranks, with the least error there is: see ``mix`` for the arguments.

    The ``sv_`` criteria are those of sd-scripts' ``resize_lora.py``: singular values above σ₀/``sv_ratio`` stay, or a
    share ``sv_fro`` of the Frobenius norm, or ``sv_cumulative`` of Σσ; ``rank`` may limit them.
    """
    criterion = Criterion(rank, energy, max_error, params, sv_ratio, sv_fro, sv_cumulative)
    if not criterion:
        raise BadOption("how much of the adapter is kept? Give --rank, --energy, --max-error, --params or --sv-...")
    run = _Run(out, dtype, threads, overwrite, dry_run, progress)
    return _mix(weighted((adapter, 1.0)), Request(criterion=criterion), run)


def interference(adapters: AdapterArguments) -> tuple[Interference, ...]:
    """What every two of several adapters are to each other, in the modules that both change; takes no base."""
    return mix(adapters, dry_run=True).interference


@dataclass(frozen=True)
class _Run:
    """Where a result goes, and how it is made."""

    out: Path | None
    dtype: str
    threads: int | None
    overwrite: bool
    dry_run: bool
    progress: Callable[[Progress], None] | None


@dataclass(frozen=True)
class _Job:
    """A mix with all that was decided beforehand: the format code of its factors, the ranks that a budget gives."""

    mixture: Mixture
    request: Request
    code: str
    ranks: Mapping[str, int]
    record: Mapping[str, Any]


def _require_sense(request: Request) -> None:
    criterion, method = request.criterion, request.method
    if request.balance and not (criterion.rank or criterion.energy):
        raise BadOption("--balance shares out what --rank or --energy keep; give one of them")
    if method.space == "dense":
        _require_cut(request, f"--method {method.name} --space dense makes deltas of full rank")


def _require_cut(request: Request, why: str) -> None:
    if not (request.criterion.rank or request.criterion.energy or request.criterion.max_error) or request.balance:
        raise BadOption(f"{why}, so it takes --rank, --energy or --max-error (without --balance) to store them")


def _mix(
    given: Sequence[Weighted],
    request: Request,
    run: _Run,
    *,
    patterns: tuple[str, ...] = (),
    prefer: str | None = None,
    base: Path | None = None,
) -> MixReport:
    started = time.monotonic()
    if run.dtype != "keep" and run.dtype not in BY_OPTION:
        raise BadOption(f"dtype {run.dtype!r} is not one of keep, {', '.join(BY_OPTION)}")
    for one in given:
        require_path(one.path)
    checkpoint = None if base is None else open_checkpoint(os.fspath(base))
    out = None if run.out is None else os.fspath(run.out)
    if out is not None:
        inputs = [*(one.path for one in given), *([checkpoint.path] if checkpoint else [])]
        check_output(out, inputs, single_file=is_file(out), overwrite=run.overwrite)
    adapters = weigh_modules([one.read() for one in given], given, patterns)
    pairs = [(adapter, one.weight) for adapter, one in zip(adapters, given, strict=True)]
    mixture = gather(pairs, request.method, prefer=prefer, base=checkpoint)
    if any(module.entry is not None for module in mixture.modules):
        _require_cut(request, "what DoRA does is of full rank")
    if any(module.dense is not None for module in mixture.modules) and request.criterion.params:
        raise BadOption("--params shares out what can be computed beforehand, which this mix cannot; give --rank")
    job = _job(mixture, request, run, _record(mixture, request, patterns, checkpoint, run.dtype))
    stamps = [adapter.stamp for adapter in adapters] + [
        shard.stamp for shard in (checkpoint.shards if checkpoint else ())
    ]
    if run.dry_run:
        return _report(job, _write(job, run, None)[1], None, started)
    with open_spot(out, _digest(job.record), stamps, overwrite=run.overwrite) as spot:
        size, facts = _write(job, run, spot)
    report = _report(job, facts, out, started, size)
    return replace(report, adapter=_kept(spot.path)) if out is None and spot is not None else report


def _job(mixture: Mixture, request: Request, run: _Run, record: Mapping[str, Any]) -> _Job:
    ranks: Mapping[str, int] = {}
    if request.criterion.params is not None:
        jobs = mixture.modules
        found = in_order(lambda module: singular_values(module, request), jobs, run.threads or default_threads())
        spectra = {
            module.site.module: (values, sum(module.site.shape)) for module, values in zip(jobs, found, strict=True)
        }
        ranks = allocate(spectra, request.criterion.params)
    return _Job(mixture, request, _code(mixture, request, run.dtype), ranks, record)


def _code(mixture: Mixture, request: Request, dtype: str) -> str:
    """The format code of the factors: float32, unless all stay what they are in the dtype that they are stored in."""
    if dtype != "keep":
        return BY_OPTION[dtype]
    if request.criterion or not request.method.is_linear or any(module.biases for module in mixture.modules):
        return "F32"
    products = [(module.site.shape, one) for module in mixture.modules for one in folded(module.parts)]
    codes = {factor.entry.dtype for _, (left, right, _) in products for factor in (left, right)}
    if len(codes) != 1 or codes & {"F32", "F64"}:
        return "F32"
    exact = all(_is_exact(left if folds_left(shape) else right, value) for shape, (left, right, value) in products)
    return codes.pop() if exact else "F32"


def _is_exact(factor: Factor, coefficient: float) -> bool:
    """Whether a factor times a coefficient is exact in the dtype that it is stored in."""
    if abs(math.frexp(coefficient)[0]) != 0.5:
        return False
    scaled = read_factor(factor) * coefficient
    return bool((scaled.to(torch_dtype(factor.entry.dtype)).double() == scaled).all())


def _record(
    mixture: Mixture, request: Request, patterns: Sequence[str], base: Checkpoint | None, dtype: str
) -> dict[str, Any]:
    """What makes the result what it is: no paths, no times."""
    facts: dict[str, Any] = {
        "lorasmith": __version__,
        "torch": importlib.metadata.version("torch"),
        "method": asdict(request.method),
        "criterion": {name: getattr(request.criterion, name) for name in request.criterion.given},
        "balance": request.balance,
        "weights": list(patterns),
        "dtype": dtype,
        "adapters": [
            {"weight": weight, "sha256": adapter.sha256, "names_base": adapter.names_base}
            for adapter, weight in mixture.adapters
        ],
        "whole": {whole.name: whole.adapter for whole in mixture.wholes},
    }
    return facts if base is None else {**facts, "base": [shard.sha256 for shard in base.shards]}


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(dumped(record).encode()).hexdigest()


def _kept(path: str) -> Adapter:
    """The adapter in a temporary file, which goes when the adapter does."""
    adapter = read_adapter(path)
    weakref.finalize(adapter, shutil.rmtree, os.path.dirname(path), ignore_errors=True)
    return adapter


# ------------------------------------------------------------------------------------------- making and writing


def _made(job: _Job, run: _Run) -> Iterator[Made]:
    """Every module's new factors, in the order of the modules."""
    started = time.monotonic()
    modules = job.mixture.modules
    sizes = [sum(entry.nbytes for part in module.parts for entry in part.delta.entries) for module in modules]
    done = 0

    def work(module: Module) -> Made:
        return make(module, job.request, len(job.mixture.adapters), job.ranks.get(module.site.module))

    for made, size in zip(in_order(work, modules, run.threads or default_threads()), sizes, strict=True):
        yield made
        done += size
        if run.progress is not None:
            run.progress(Progress(done, sum(sizes), time.monotonic() - started))


def _write(job: _Job, run: _Run, spot: Spot | None) -> tuple[int, list[Made]]:
    """Make all modules and write them, if there is a spot to; the file's size, and all without their factors."""
    if spot is None:
        return 0, [_without_factors(made) for made in _made(job, run)]
    mixture = job.mixture
    record = dumped(job.record)
    kept = mixture.adapters[0][0].metadata if len(mixture.adapters) == 1 else {}
    file = AdapterFile(
        spot.path,
        {module.site: max(1, _most(module, job)) for module in mixture.modules},
        [_shape(whole) for whole in mixture.wholes],
        lambda ranks: _config(mixture, ranks),
        code=job.code,
        biased=any(module.biases for module in mixture.modules),
        inside=spot.inside,
        metadata={**kept, **({"lorasmith": record} if spot.inside else {})},
    )
    try:
        wide = [whole for whole in mixture.wholes if itemsize(_shape(whole)[1]) >= itemsize(job.code)]
        _write_wholes(file, wide)
        found = _write_modules(file, job, run)
        _write_wholes(file, [whole for whole in mixture.wholes if whole not in wide])
        size, config = file.finish()
    finally:
        file.close()
    spot.finish(config, job.record)
    return size, found


def _write_modules(file: AdapterFile, job: _Job, run: _Run) -> list[Made]:
    """Modules of rank 0 are left out, unless all are: an adapter that does nothing has factors, too."""
    found = []
    for made in _made(job, run):
        if made.facts.rank_out:
            file.add(made.module.site, made.left, made.right, _bias(made.module))
        found.append(_without_factors(made))
    if not any(made.facts.rank_out for made in found):
        import torch

        for module in job.mixture.modules:
            rows, columns = module.site.shape
            file.add(module.site, torch.zeros(rows, 1), torch.zeros(1, columns), _bias(module))
    return found


def _without_factors(made: Made) -> Made:
    return replace(made, left=made.left[:, :0], right=made.right[:0])


def _most(module: Module, job: _Job) -> int:
    """The largest rank that a module can get."""
    criterion = job.request.criterion
    if not criterion and job.request.method.is_additive:
        return module.rank
    most = min(module.site.shape) if module.dense else min(module.rank, *module.site.shape)
    return min(most, criterion.rank or most)


def _bias(module: Module) -> torch.Tensor | None:
    import torch

    if not module.biases:
        return None
    return torch.stack([read_factor(one.stored)[:, 0] * (one.scale * weight) for one, weight in module.biases]).sum(0)


def _shape(whole: Whole) -> tuple[str, str, tuple[int, ...]]:
    return whole.name, "F32" if whole.parts else whole.stored.dtype, whole.stored.shape


def _write_wholes(file: AdapterFile, wholes: Iterable[Whole]) -> None:
    for whole in sorted(wholes, key=lambda one: -itemsize(_shape(one)[1])):
        if not whole.parts:
            file.copy(whole.name, whole.stored)
            continue
        file.begin(_shape(whole))
        for block in _weighed(whole):
            file.write(block)


def _weighed(whole: Whole) -> Iterator[memoryview]:
    """``W0 + Σ wᵢ(newᵢ − W0)`` in float32, some rows at a time."""
    import torch

    combined = Combined(
        Method(), tuple(Source(((delta, 1.0),), weight, "") for delta, weight in whole.parts), whole.name
    )
    opened = combined.open(torch.float32, lambda: walk(combined, whole.entry))
    for rows, w0 in walk(combined, whole.entry):
        total = w0.clone()
        opened.add_to(total, w0, rows, 1.0)
        yield total.view(-1).view(torch.uint8).numpy().data


def _config(mixture: Mixture, ranks: Mapping[str, int]) -> dict[str, Any]:
    adapters = [adapter for adapter, weight in mixture.adapters if weight != 0]
    config = lora_config(
        adapters,
        ranks,
        every=len(ranks) == len(mixture.modules),
        lora_bias=any(module.biases for module in mixture.modules),
        saved=saved_modules(mixture),
        tokens=trained_tokens(mixture),
    )
    if len(adapters) > 1:
        return config
    return {
        **{key: value for key, value in adapters[0].config.items() if key not in ("use_bdlora", "lora_bias")},
        **config,
    }


# ------------------------------------------------------------------------------------------------------- report


def _report(job: _Job, found: Sequence[Made], out: str | None, started: float, size: int = 0) -> MixReport:
    mixture, facts = job.mixture, [made.facts for made in found]
    total = math.fsum(one.norm**2 for one in facts)
    lost = math.fsum((one.error * one.norm) ** 2 for one in facts)
    ranks_in, ranks = [one.rank_in for one in facts], [one.rank_out for one in facts]
    details = tuple(pair for made in found for pair in made.interference)
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
        energy=1 - lost / total if total else 1.0,
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
    low = [delta for delta in deltas if delta.rank] or deltas
    own = [(one.norms[position], one.energies[position]) for one in facts]
    squares = [(norm**2, energy) for norm, energy in own if norm is not None and energy is not None]
    total = math.fsum(square for square, _ in squares)
    return MixedAdapter(
        path=adapter.path,
        weight=weight,
        sha256=adapter.sha256,
        names_base=adapter.names_base,
        kinds=tuple(sorted({delta.kind for delta in deltas})),
        rank=(min(delta.rank for delta in low), max(delta.rank for delta in low)),
        scale=(min(delta.scale for delta in low), max(delta.scale for delta in low)),
        scale_assumed=adapter.scale_assumed,
        modules=len({one.module for one in adapter.deltas}),
        energy=math.fsum(square * energy for square, energy in squares) / total if total else None,
    )


def _notes(job: _Job, facts: Sequence[MixedModule]) -> Iterator[str]:
    rank = job.request.criterion.rank
    if rank is not None and facts and all(one.rank_out < rank for one in facts):
        yield f"rank {rank} was asked for, and there is no more than rank {max(one.rank_out for one in facts)} to keep"


def _cancelled(facts: Sequence[MixedModule]) -> Iterator[str]:
    if facts and not any(one.rank_out for one in facts):
        yield "the deltas undo each other (or are zero): the mix changes nothing"
