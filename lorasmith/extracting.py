"""Two models in, an adapter out: find what tuning has changed, make every change's factors, write them, report."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorasmith.adapterfile import AdapterFile, Spot, digest_of, dumped, is_file, kept, open_spot, record_of, room
from lorasmith.arguments import Path
from lorasmith.checkpoint import TOKENIZER_FILES, Checkpoint
from lorasmith.difference import Paired, divided, is_changed, norm_of, pair_up, walk
from lorasmith.dtypes import BY_OPTION, NAMES, itemsize, torch_dtype
from lorasmith.errors import AdapterMismatch, BadOption, NotFinite, Unsupported
from lorasmith.execution import default_threads
from lorasmith.execution.destination import check_output, require_room
from lorasmith.execution.device import resolve
from lorasmith.execution.peak import peak_memory
from lorasmith.execution.torchthreads import in_order
from lorasmith.formats.writing import Site, config_of
from lorasmith.lowrank import Criterion
from lorasmith.records import Progress, SideFile
from lorasmith.reports import ExtractedModule, ExtractReport, StoredTensor
from lorasmith.sidefiles import copied
from lorasmith.sketching import approximate
from lorasmith.sources import Sources
from lorasmith.tuning import Low, Tuning, Whole, sort_out

if TYPE_CHECKING:
    import torch


def extract(
    base: Path,
    tuned: Path,
    out: Path | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    embeddings: str = "whole",
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> ExtractReport:
    """Make an adapter of what a fully tuned model has that its base has not.

    ``base`` and ``tuned`` are model folders or files of one class and shape; dtypes and shards may differ, and the
    vocabulary may have another size. The change of every linear layer's and convolution's weight becomes a LoRA of
    ``rank``, or of as little rank as keeps ``energy`` (share of Σσ²) or stays within ``max_error`` (relative, in the
    Frobenius norm): the best there is, by a randomised SVD in float64 that is iterated until it settles. Norms, biases
    and embeddings that have changed are stored as they are (``embeddings="lora"``: those of tokens as LoRA, too); what
    has not is left out. ``dtype`` is that of the factors, ``device`` (``cpu``, ``cuda``, ``cuda:N``, ``auto``) what
    computes the products.

    Both may be names on the Hub; ``token`` and ``endpoint`` are the client's own by default. ``out`` becomes a PEFT
    folder, or one file if it ends in .safetensors; without it, the report's ``adapter`` is the result, in a file that
    goes when nobody has it any more. ``dry_run`` computes everything and keeps nothing. Raises a ``LorasmithError``;
    nothing appears at ``out`` before all of it is written.
    """
    criterion = Criterion(rank=rank, energy=energy, max_error=max_error)
    _require_sense(criterion, embeddings, dtype)
    run = _Run(criterion, BY_OPTION[dtype], resolve(device), threads or default_threads(), progress, time.monotonic())
    sources = Sources(endpoint, token), Sources(endpoint, token)
    models = sources[0].open_base(os.fspath(base)), sources[1].open_base(os.fspath(tuned))
    place = None if out is None else os.fspath(out)
    if place is not None:
        inputs = [one.folder or one.files[0] for one in models]
        check_output(place, inputs, single_file=is_file(place), overwrite=overwrite)
    for source, model in zip(sources, models, strict=True):
        source.fetch([*model.files, *model.side_files.values()], progress)
    job = _job(*models, run, embeddings)
    if criterion.rank is not None and not (place is None and dry_run):
        takes = room(_most(job, run), _stored(job), run.code, biased=False)
        require_room(place or tempfile.gettempdir(), takes, at_most=True)
    if dry_run:
        return _report(job, run, [made.facts for made in _made(job, run)])
    stamps = [shard.stamp for model in models for shard in model.shards]
    beside = _tokenizer(*models)
    with open_spot(place, digest_of(job.record), stamps, overwrite=overwrite, beside=beside) as spot:
        size, facts = (0, [made.facts for made in _made(job, run)]) if spot is None else _write(job, run, spot)
    report = _report(job, run, facts, place, size)
    return replace(report, adapter=kept(spot.path, beside)) if place is None and spot is not None else report


@dataclass(frozen=True)
class _Run:
    """How an adapter is made; ``code`` is the format code of its factors."""

    criterion: Criterion
    code: str
    device: str
    threads: int
    progress: Callable[[Progress], None] | None
    started: float

    def tell(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(Progress(done, total, time.monotonic() - self.started))


@dataclass(frozen=True)
class _Job:
    """What is extracted, with all that was decided beforehand; ``compared`` are the bytes that were read for that."""

    base: Checkpoint
    tuned: Checkpoint
    paired: Paired
    changed: frozenset[str]
    tuning: Tuning
    record: Mapping[str, Any]
    compared: int


@dataclass(frozen=True)
class _Made:
    """The factors of one change, (outputs, rank) and (rank, inputs) as they are written, and what they hold."""

    low: Low
    left: torch.Tensor
    right: torch.Tensor
    facts: ExtractedModule


def _require_sense(criterion: Criterion, embeddings: str, dtype: str) -> None:
    if not criterion:
        raise BadOption("how much of the change is kept? Give --rank, --energy or --max-error")
    if embeddings not in ("whole", "lora"):
        raise BadOption(f"embeddings {embeddings!r} is neither whole nor lora")
    if dtype not in BY_OPTION:
        raise BadOption(f"dtype {dtype!r} is not one of {', '.join(BY_OPTION)}")


def _job(base: Checkpoint, tuned: Checkpoint, run: _Run, embeddings: str) -> _Job:
    paired = pair_up(base, tuned)
    compared = sum(pair.nbytes for pair in paired.pairs.values())
    changed = frozenset(_changed(paired, run, compared))
    if not changed:
        raise AdapterMismatch(
            f"{tuned.path} has the same values as {base.path} in all {len(paired.pairs)} tensors: there is nothing to "
            "extract. Was BASE given twice, or was the tuned model saved under another name?"
        )
    apart = sorted(divided(base) & {paired.pairs[name].old.name for name in changed})
    if apart:
        raise Unsupported(
            f"{apart[0]!r} is one tensor in the files and several layers in the running model, so that no adapter "
            "of it would be found; extract from models that were saved as they run"
        )
    tuning = sort_out(base, paired, changed, embeddings=embeddings)
    if not tuning.lows and tuning.idle is None:
        raise Unsupported(
            f"{tuned.path} has no linear layer or convolution for a LoRA to be on, and PEFT loads none without"
        )
    record = record_of(
        criterion=run.criterion.facts,
        dtype=NAMES[run.code],
        device=run.device,
        embeddings=embeddings,
        base=[shard.sha256 for shard in base.shards],
        tuned=[shard.sha256 for shard in tuned.shards],
    )
    return _Job(base, tuned, paired, changed, tuning, record, compared)


def _changed(paired: Paired, run: _Run, compared: int) -> Iterator[str]:
    """Names of the tensors that differ, having read all of both models."""
    done = 0
    pairs = list(paired.pairs.values())
    for pair, changed in zip(pairs, in_order(is_changed, pairs, run.threads), strict=True):
        done += pair.nbytes
        run.tell(done, 2 * compared)
        if changed:
            yield pair.name


# ------------------------------------------------------------------------------------------- making and writing


def _made(job: _Job, run: _Run) -> Iterator[_Made]:
    """The factors of every change, in the order of the model."""
    lows = job.tuning.lows
    total = 2 * job.compared
    done = total - sum(low.pair.nbytes for low in lows)
    run.tell(done, total)
    for made in in_order(lambda low: _factors(low, run), lows, run.threads):
        yield made
        done += made.low.pair.nbytes
        run.tell(done, total)


def _factors(low: Low, run: _Run) -> _Made:
    """Approximate one change, round the factors, and measure what they lack."""
    blocks = walk(low.pair, run.device)
    found = approximate(blocks, low.pair.old.matrix, run.criterion)
    if not found.norm2:
        raise NotFinite(
            f"{low.pair.name!r} has changed by less than float64 can square; no adapter can be made of that"
        )
    dtype = torch_dtype(run.code)
    left, right = found.left.to(dtype), found.right.to(dtype)
    error = math.sqrt(_missing(blocks(), left.double(), right.double()) / found.norm2)
    if low.turned:
        left, right = right.t(), left.t()
    norm, before = math.sqrt(found.norm2), norm_of(low.pair.old)
    facts = ExtractedModule(
        module=low.site.module,
        shape=low.site.shape,
        rank=found.rank,
        norm=norm,
        relative_norm=norm / before if before else None,
        error=error,
        energy=max(0.0, 1 - error**2),
    )
    return _Made(low, left, right, facts)


def _missing(blocks: Iterable[tuple[slice, torch.Tensor]], left: torch.Tensor, right: torch.Tensor) -> float:
    """``‖D − left · right‖²`` of a matrix that is walked over."""
    total = 0.0
    for rows, block in blocks:
        left, right = left.to(block.device), right.to(block.device)
        total += float((block - left[rows] @ right).square().sum())
    return total


def _write(job: _Job, run: _Run, spot: Spot) -> tuple[int, list[ExtractedModule]]:
    """Make all factors and write them; the file's size, and what is in it."""
    import torch

    tuning = job.tuning
    file = AdapterFile(
        spot.path,
        _most(job, run),
        _stored(job),
        lambda ranks: _config(job, ranks),
        code=run.code,
        biased=False,
        inside=spot.inside,
        metadata={"lorasmith": dumped(job.record)} if spot.inside else {},
    )
    try:
        by_size = sorted(tuning.wholes, key=lambda one: -itemsize(one.entry.dtype))
        wide = [whole for whole in by_size if itemsize(whole.entry.dtype) >= itemsize(run.code)]
        _copy(file, wide)
        facts = []
        for made in _made(job, run):
            file.add(made.low.site, made.left, made.right)
            facts.append(made.facts)
        if tuning.idle is not None:
            outputs, inputs = tuning.idle.site.shape
            file.add(tuning.idle.site, torch.zeros(outputs, 1), torch.zeros(1, inputs))
        _copy(file, by_size[len(wide) :])
        size, config = file.finish()
    finally:
        file.close()
    spot.finish(config, job.record)
    return size, facts


def _most(job: _Job, run: _Run) -> dict[Site, int]:
    """The largest rank that each LoRA can get."""
    lows = job.tuning.lows if job.tuning.idle is None else [job.tuning.idle]
    return {low.site: min(run.criterion.rank or low.site.shape[0], *low.site.shape) for low in lows}


def _stored(job: _Job) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, format code and shape of what is stored as it is."""
    return [(whole.name, whole.entry.dtype, whole.entry.shape) for whole in job.tuning.wholes]


def _copy(file: AdapterFile, wholes: Iterable[Whole]) -> None:
    for whole in wholes:
        file.copy(whole.name, whole.entry)


def _config(job: _Job, ranks: Mapping[str, int]) -> dict[str, Any]:
    names = job.base.config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    return config_of(
        ranks,
        ranks,
        job.tuning.targets(ranks.keys()),
        # of other tasks, PEFT takes the head for one of modules_to_save, whether it has changed or not
        task_type="CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None,
        names_base=_name_of(job.base),
        bias=job.tuning.bias,
        fan_in_fan_out=job.tuning.fan_in_fan_out,
        saved=job.tuning.saved,
    )


def _name_of(base: Checkpoint) -> str:
    """What PEFT is to load a base by: its repository, what its config says, or its folder's name."""
    if base.repo is not None:
        return base.repo
    said = base.config.get("_name_or_path")
    return said if isinstance(said, str) and said else os.path.basename(os.path.abspath(base.path))


def _tokenizer(base: Checkpoint, tuned: Checkpoint) -> Sequence[SideFile]:
    """The tuned model's tokenizer files, if they are others than the base's."""
    ours, theirs = (
        [copied(name, path) for name, path in sorted(one.side_files.items()) if name in TOKENIZER_FILES]
        for one in (base, tuned)
    )
    same = [(one.name, one.sha256) for one in ours] == [(one.name, one.sha256) for one in theirs]
    return () if same else theirs


# ------------------------------------------------------------------------------------------------------- report


def _report(
    job: _Job, run: _Run, facts: Sequence[ExtractedModule], out: str | None = None, size: int = 0
) -> ExtractReport:
    total = math.fsum(one.norm**2 for one in facts)
    lost = math.fsum((one.error * one.norm) ** 2 for one in facts)
    ranks = [one.rank for one in facts]
    return ExtractReport(
        out=out,
        base=job.base.path,
        tuned=job.tuned.path,
        criterion=run.criterion.facts,
        dtype=NAMES[run.code],
        device=run.device,
        rank=(min(ranks, default=0), max(ranks, default=0)),
        params=sum(one.rank * sum(one.shape) for one in facts),
        error=math.sqrt(lost / total) if total else 0.0,
        energy=max(0.0, 1 - lost / total) if total else 1.0,
        modules=tuple(facts),
        whole=tuple(
            StoredTensor(one.name, one.entry.shape, NAMES[one.entry.dtype], one.entry.nbytes)
            for one in job.tuning.wholes
        ),
        unchanged=tuple(name for name in job.paired.pairs if name not in job.changed),
        vocabulary=job.paired.rows,
        bytes_written=size,
        seconds=time.monotonic() - run.started,
        peak_memory=peak_memory(),
        notes=(*job.base.notes, *job.tuned.notes, *_notes(job, facts)),
        warnings=(*job.paired.warnings, *_warnings(job, run, facts)),
    )


def _notes(job: _Job, facts: Sequence[ExtractedModule]) -> Iterator[str]:
    rows = job.paired.rows
    if rows is not None:
        yield (
            f"the vocabulary goes from {rows[0]} to {rows[1]} tokens: lorasmith merge follows; for PEFT, call "
            f"model.resize_token_embeddings({rows[1]}) before loading the adapter"
        )
    sizes = [(one.rank * sum(one.shape), math.prod(one.shape), one.module) for one in facts]
    if job.tuning.idle is not None:
        idle = job.tuning.idle.site.module
        yield f"no weight of a linear layer has changed; {idle} has a LoRA of zeros, since PEFT wants one"
    large = [module for params, elements, module in sizes if params >= elements]
    if large:
        yield f"{len(large)} of {len(facts)} LoRAs are no smaller than the weight that they change: {large[0]} first"


def _warnings(job: _Job, run: _Run, facts: Sequence[ExtractedModule]) -> Iterator[str]:
    """What may be taken otherwise than it is meant, or is not what was asked for."""
    stacked = any(".experts." in name for name in job.paired.pairs)
    leaves = tuple(f".{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))
    lost = [one.module for one in facts if stacked and one.module.endswith(leaves)]
    if lost:
        yield (
            f"PEFT with transformers 5 does not find {len(lost)} modules of this mixture of experts, or takes them for "
            f"stacked ones, like {lost[0]}, and then computes something else; lorasmith merge takes them all"
        )
    gated = {name.rpartition(".gru_rel_pos_")[0] for name in job.paired.pairs if ".gru_rel_pos_" in name}
    past = [one.module for one in facts if one.module.rpartition(".")[0] in gated]
    if past:
        yield f"the model reads the weights of {past[0]} past PEFT's LoRA; merge the adapter instead of loading it"
    criterion = run.criterion
    wanted = criterion.max_error if criterion.energy is None else math.sqrt(1 - criterion.energy)
    missed = [one for one in facts if wanted is not None and one.error > 1.001 * wanted + 1e-6]
    if missed:
        worst = max(missed, key=lambda one: one.error)
        yield (
            f"{len(missed)} modules have larger errors than was asked for, up to {worst.error:.3g} in {worst.module}: "
            f"their factors were rounded to {NAMES[run.code]}"
        )
