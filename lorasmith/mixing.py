"""Adapters in, one adapter out: sort out what they have, make every module's factors, write them, report."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorasmith import pushing
from lorasmith.adapter import Adapter
from lorasmith.adapterfile import digest_of, is_file, kept, open_spot, record_of
from lorasmith.arguments import AdapterArguments, Given, Path, Weighted, numbered, weigh_modules, weighted
from lorasmith.checkpoint import Checkpoint
from lorasmith.combining import LINEAR, choose
from lorasmith.combining.combined import read_factor
from lorasmith.deltas.dora import Dora
from lorasmith.deltas.low_rank import Factor
from lorasmith.dtypes import BY_OPTION, torch_dtype
from lorasmith.errors import BadOption, LorasmithError, listed
from lorasmith.execution import default_threads
from lorasmith.execution.destination import check_output, require_room
from lorasmith.execution.torchthreads import in_order
from lorasmith.hub.writing import Target, check_writable, require_valid
from lorasmith.lowrank import Criterion, allocate
from lorasmith.mixfile import Job, takes, write
from lorasmith.mixreport import report_mix
from lorasmith.mixture import Mixture, gather
from lorasmith.planning import refuse_residual
from lorasmith.recipe import origin_facts
from lorasmith.recompression import Request, folded, folds_left, singular_values
from lorasmith.records import Progress
from lorasmith.reports import Interference, MixReport
from lorasmith.sidefiles import tokenizer_along
from lorasmith.sources import Sources


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
    push: str | None = None,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    card: Path | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> MixReport:
    """Make one adapter of several: ``ΔW = Σ weightᵢ·ΔWᵢ``, module by module.

    ``adapters`` are PEFT folders or files, or ``Adapter``s: ``path``, ``"path:0.7"`` or ``(path, 0.7)``. The sum is
    exact, of rank Σrᵢ, unless one of ``rank``, ``energy`` (share of Σσ² that is kept), ``max_error`` (relative, in the
    Frobenius norm) or ``params`` (of the whole adapter) says how much of it is kept; what is cut off is the least there
    is. ``balance`` keeps every adapter's share of its own instead. ``weights`` are ``REGEX=FACTOR`` for modules' names,
    ``method`` another rule than the sum, with its ``density``, ``seed``, ``sign`` and ``space``
    (``lorasmith.combining``). Layers trained whole and tokenizers that differ are those of ``prefer``; adapters whose
    effect depends on the base, as DoRA's does, take a ``base``. ``dtype`` is that of the factors: ``keep`` is float32,
    or what they are stored in where nothing is lost by that.

    ``out`` becomes a PEFT folder, or one file if it ends in .safetensors; without it, the report's ``adapter`` is the
    result, in a file that goes when nobody has it any more. ``dry_run`` computes everything and keeps nothing. All
    inputs may be names on the Hub. ``push`` names a repository that the result, a folder, goes to as well, or alone if
    there is no ``out``; what goes with it is as with ``lorasmith.push``. Raises a ``LorasmithError``; nothing appears
    at ``out`` before all of it is written.
    """
    request = Request(
        choose(method, density=density, seed=seed, sign=sign, space=space),
        Criterion(rank=rank, energy=energy, max_error=max_error, params=params),
        balance,
    )
    _require_sense(request)
    sources = Sources(endpoint, token)

    def make(place: Path | None) -> MixReport:
        run = _Run(place, dtype, threads, overwrite, dry_run, progress)
        return _mix(weighted(adapters), request, run, sources, patterns=tuple(weights), prefer=prefer, base=base)

    if push is None:
        pushing.require_pushed(
            revision=revision, private=private, create_pr=create_pr, commit_message=commit_message, card=card
        )
        return make(out)
    to = pushing.target(push, revision=revision, private=private, create_pr=create_pr, commit_message=commit_message)
    if out is not None and is_file(os.fspath(out)):
        raise BadOption(f"a repository holds an adapter in a folder; give one as output, not the file {os.fspath(out)}")
    check_writable(sources.hub, to)
    if card is not None:
        require_valid(sources.hub, to, pushing.read_card(card))
    if dry_run:
        return make(out)
    with tempfile.TemporaryDirectory(prefix="lorasmith-") as folder:
        place = os.path.join(folder, "mixed") if out is None else os.fspath(out)
        report = make(place)
        message = f"Mix {len(report.adapters)} adapters"
        with contextlib.nullcontext() if out is None else _staying(place, to, card):
            pushed = pushing.send(sources.hub, to, place, card=card, message=message)
    return replace(report, out=f"hf://{to.repo}" if out is None else report.out, pushed=pushed)


@contextlib.contextmanager
def _staying(out: str, to: Target, card: Path | None) -> Iterator[None]:
    """Let an error of a push say that the result is there all the same, and the command that pushes it."""
    try:
        yield
    except LorasmithError as error:
        what = re.split(r"(?:;|,? and) run (?:the same command )?again", str(error))[0]
        command = shlex.join(["lorasmith", "push", out, to.repo, *pushing.options_of(to, card)])
        error.args = (*error.args[:-1], f"{what}; the mix is complete in {out}: {command}")
        raise


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
    token: str | None = None,
    endpoint: str | None = None,
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
    return _mix(weighted((adapter, 1.0)), Request(criterion=criterion), run, Sources(endpoint, token))


def interference(
    adapters: AdapterArguments, *, token: str | None = None, endpoint: str | None = None
) -> tuple[Interference, ...]:
    """What every two of several adapters are to each other, in the modules that both change.

    Only products count, of DoRA its direction; no base is needed. ``token`` and ``endpoint`` are for names on the Hub.
    """
    sources = Sources(endpoint, token)
    pairs = [(sources.read_adapter(one.given), one.weight) for one in weighted(adapters)]
    low = [
        (replace(adapter, deltas=tuple(one for one in adapter.deltas if one.delta.low_rank())), weight)
        for adapter, weight in _directions(pairs)
    ]
    run = _Run(None, "keep", None, overwrite=False, dry_run=True, progress=None)
    job = _job(gather(low, LINEAR), Request(), run, {}, verbatim=False)
    return report_mix(job, write(job, None)[1], None, time.monotonic()).interference


@dataclass(frozen=True)
class _Run:
    """Where a result goes, and how it is made."""

    out: Path | None
    dtype: str
    threads: int | None
    overwrite: bool
    dry_run: bool
    progress: Callable[[Progress], None] | None


def _is_alone(adapters: Sequence[tuple[Adapter, float]], request: Request, run: _Run) -> bool:
    """Whether a mix is one adapter as it is."""
    weights = [weight * one.weight for adapter, weight in adapters if weight != 0 for one in adapter.deltas]
    one = sum(weight != 0 for _, weight in adapters) == 1 and all(weight == 1 for weight in weights)
    return one and request.method.is_linear and not request.criterion and run.dtype == "keep"


def _directions(adapters: Sequence[tuple[Adapter, float]]) -> list[tuple[Adapter, float]]:
    """The adapters with DoRA's directions in its place: what is to be told of one that stays as it is."""
    return [
        (
            replace(
                adapter,
                deltas=tuple(
                    replace(one, delta=one.delta.direction) if isinstance(one.delta, Dora) else one
                    for one in adapter.deltas
                ),
            ),
            weight,
        )
        for adapter, weight in adapters
    ]


def _require_sense(request: Request) -> None:
    criterion, method = request.criterion, request.method
    if request.balance and criterion.rank is None and criterion.energy is None:
        raise BadOption("--balance shares out what --rank or --energy keep; give one of them")
    if method.space == "dense":
        _require_cut(request, f"--method {method.name} --space dense makes deltas of full rank")


def _require_cut(request: Request, why: str) -> None:
    if not {"rank", "energy", "max_error"} & set(request.criterion.given) or request.balance:
        raise BadOption(f"{why}, so it takes --rank, --energy or --max-error (without --balance) to store them")


def _mix(
    given: Sequence[Weighted],
    request: Request,
    run: _Run,
    sources: Sources,
    *,
    patterns: tuple[str, ...] = (),
    prefer: str | None = None,
    base: Path | None = None,
) -> MixReport:
    started = time.monotonic()
    _require_valid(run)
    preferred = _preferred(given, prefer)
    for one in given:
        sources.require(one.path)
    checkpoint = None if base is None else sources.open_base(os.fspath(base))
    out = None if run.out is None else os.fspath(run.out)
    if out is not None:
        inputs = [one.path for one in given if sources.reference(one.path) is None]
        inputs += [checkpoint.folder or checkpoint.files[0]] if checkpoint else []
        check_output(out, inputs, single_file=is_file(out), overwrite=run.overwrite)
    adapters = weigh_modules([sources.read_adapter(one.given) for one in given], given, patterns)
    if checkpoint is not None:
        sources.fetch(checkpoint.files, run.progress)
    pairs = [(adapter, one.weight) for adapter, one in zip(adapters, given, strict=True)]
    verbatim = _is_alone(pairs, request, run)
    if not verbatim:
        refuse_residual(adapters)
    mixture = gather(_directions(pairs) if verbatim else pairs, request.method, prefer=preferred, base=checkpoint)
    _require_possible(mixture, request)
    beside, notes = tokenizer_along(pairs, preferred, inside=out is not None and is_file(out))
    mixture = replace(mixture, notes=(*mixture.notes, *notes))
    request = replace(request, code="F32" if verbatim else _code(mixture, request, run.dtype))
    job = _job(
        mixture,
        request,
        run,
        _record(mixture, request, numbered(patterns, given), checkpoint, run.dtype),
        verbatim=verbatim,
    )
    stamps = [adapter.stamp for adapter in adapters] + [
        shard.stamp for shard in (checkpoint.shards if checkpoint else ())
    ]
    size = takes(job)
    if size is not None and not (out is None and run.dry_run):
        require_room(out or tempfile.gettempdir(), size, at_most=not verbatim)
    if run.dry_run:
        return report_mix(job, write(job, None)[1], None, started)
    with open_spot(out, digest_of(job.record), stamps, overwrite=run.overwrite, beside=beside) as spot:
        size, made = write(job, spot)
    report = report_mix(job, made, out, started, size)
    return replace(report, adapter=kept(spot.path, beside)) if out is None and spot is not None else report


def _require_valid(run: _Run) -> None:
    if run.dtype != "keep" and run.dtype not in BY_OPTION:
        raise BadOption(f"dtype {run.dtype!r} is not one of keep, {', '.join(BY_OPTION)}")
    if run.threads is not None and run.threads < 1:
        raise BadOption(f"threads must be at least 1, not {run.threads}")


def _preferred(given: Sequence[Weighted], prefer: str | None) -> int | None:
    """The position of the adapter that is preferred, by its path or as it was given."""
    if prefer is None:
        return None
    wanted = os.path.normpath(prefer)
    for position, one in enumerate(given):
        if wanted in (os.path.normpath(one.path), os.path.normpath(one.text)):
            return position
    raise BadOption(f"--prefer {prefer} is none of the adapters: {listed([one.path for one in given], 8)}")


def _require_possible(mixture: Mixture, request: Request) -> None:
    if any(module.entry is not None for module in mixture.modules):
        _require_cut(request, "what DoRA does is of full rank")
    if request.criterion.params is None:
        return
    if any(module.dense is not None for module in mixture.modules):
        raise BadOption("--params shares out what can be computed beforehand, which this mix cannot; give --rank")
    if any(module.site.is_attention or module.expert >= 0 for module in mixture.modules):
        what = (
            "stacked experts"
            if any(module.expert >= 0 for module in mixture.modules)
            else "torch.nn.MultiheadAttention"
        )
        raise BadOption(f"--params cannot be kept to with {what}, several of which have one rank; give --rank")
    least = min(sum(module.site.shape) for module in mixture.modules)
    if request.criterion.params < least:
        raise BadOption(
            f"--params {request.criterion.params} is less than the {least} of the smallest module at rank 1"
        )


def _job(mixture: Mixture, request: Request, run: _Run, record: Mapping[str, Any], *, verbatim: bool) -> Job:
    ranks: Mapping[str, int] = {}
    threads = run.threads or default_threads()
    if request.criterion.params is not None:
        jobs = mixture.modules
        found = in_order(lambda module: singular_values(module, request), jobs, threads)
        spectra = {module.name: (values, sum(module.site.shape)) for module, values in zip(jobs, found, strict=True)}
        ranks = allocate(spectra, request.criterion.params)
    code = _stored_code(mixture) if verbatim else request.code
    return Job(mixture, request, ranks, record, threads, code, verbatim, run.progress)


def _stored_code(mixture: Mixture) -> str:
    """The format code that the factors have already."""
    return next(entry.dtype for module in mixture.modules for entry in module.parts[0].delta.entries)


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
    facts = record_of(
        method=asdict(request.method),
        criterion=request.criterion.facts,
        balance=request.balance,
        weights=patterns,
        dtype=dtype,
        adapters=[
            {
                "weight": weight,
                "sha256": adapter.sha256,
                "config": digest_of(adapter.config),
                **origin_facts("", adapter.origin),
            }
            for adapter, weight in mixture.adapters
        ],
        whole={whole.name: whole.adapter for whole in mixture.wholes},
    )
    return facts if base is None else {**facts, "base": [shard.sha256 for shard in base.shards]}
