"""The file of a mix: every module made and written, tensors that are stored whole, and the config."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorasmith.adapterfile import INSIDE, AdapterFile, Spot, dumped
from lorasmith.combining import Method
from lorasmith.combining.combined import Combined, Source, read_factor
from lorasmith.dtypes import itemsize
from lorasmith.execution.torchthreads import in_order
from lorasmith.formats.peft import plain_names
from lorasmith.formats.writing import lora_config
from lorasmith.growingfile import GrowingFile
from lorasmith.mixture import Mixture, Module, Whole, saved_modules, trained_tokens
from lorasmith.recompression import Made, Request, make, walk
from lorasmith.records import Progress
from lorasmith.weightfile import read_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Job:
    """A mix with all that was decided beforehand: the ranks that a budget gives, its record.

    ``verbatim`` says that it is one adapter as it is. ``progress`` is told how far it is.
    """

    mixture: Mixture
    request: Request
    ranks: Mapping[str, int]
    record: Mapping[str, Any]
    threads: int
    verbatim: bool = False
    progress: Callable[[Progress], None] | None = None


def _made(job: Job) -> Iterator[Made]:
    """Every module's new factors, in the order of the modules."""
    started = time.monotonic()
    modules = job.mixture.modules
    sizes = [sum(entry.nbytes for part in module.parts for entry in part.delta.entries) for module in modules]
    done = 0

    def work(module: Module) -> Made:
        return make(module, job.request, len(job.mixture.adapters), job.ranks.get(module.site.module))

    for made, size in zip(in_order(work, modules, job.threads), sizes, strict=True):
        yield made
        done += size
        if job.progress is not None:
            job.progress(Progress(done, sum(sizes), time.monotonic() - started))


def write(job: Job, spot: Spot | None) -> tuple[int, list[Made]]:
    """Make all modules and write them, if there is a spot to; the file's size, and all without their factors."""
    if spot is None:
        return 0, [_without_factors(made) for made in _made(job)]
    if job.verbatim:
        return _copy(job, spot), [_without_factors(made) for made in _made(job)]
    mixture = job.mixture
    record = dumped(job.record)
    kept = mixture.adapters[0][0].metadata if len(mixture.adapters) == 1 else {}
    file = AdapterFile(
        spot.path,
        {module.site: max(1, _most(module, job)) for module in mixture.modules},
        [_shape(whole) for whole in mixture.wholes],
        lambda ranks: _config(mixture, ranks),
        code=job.request.code,
        biased=any(module.biases for module in mixture.modules),
        inside=spot.inside,
        metadata={**kept, **({"lorasmith": record} if spot.inside else {})},
    )
    try:
        wide = [whole for whole in mixture.wholes if itemsize(_shape(whole)[1]) >= itemsize(job.request.code)]
        _write_wholes(file, wide)
        found = _write_modules(file, job)
        _write_wholes(file, [whole for whole in mixture.wholes if whole not in wide])
        size, config = file.finish()
    finally:
        file.close()
    spot.finish(config, job.record)
    return size, found


def _write_modules(file: AdapterFile, job: Job) -> list[Made]:
    """Modules of rank 0 are left out, unless all are: an adapter that does nothing has factors, too."""
    found = []
    for made in _made(job):
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
    return replace(made, left=made.left.new_empty(0), right=made.right.new_empty(0))


def _most(module: Module, job: Job) -> int:
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


def _config(mixture: Mixture, ranks: Mapping[str, int], alphas: Mapping[str, float] | None = None) -> dict[str, Any]:
    adapters = [adapter for adapter, weight in mixture.adapters if weight != 0]
    config = lora_config(
        adapters,
        ranks,
        alphas or ranks,
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


# ----------------------------------------------------------------------------------------- one adapter as it is


def _copy(job: Job, spot: Spot) -> int:
    """Write the only adapter's tensors as they are, by PEFT's names where a folder is made; the file's size."""
    (adapter,) = (adapter for adapter, weight in job.mixture.adapters if weight != 0)
    header, _ = read_weights(adapter.file)
    names = {entry.name: entry.name for entry in header.entries} if spot.inside else plain_names(header)
    metadata = {**header.metadata, "format": "pt"}
    if spot.inside:
        metadata["lorasmith"] = dumped(job.record)
        if adapter.config:
            metadata[INSIDE] = dumped(adapter.config)
    facts = [(names[one.name], one.dtype, one.shape, one.nbytes) for one in header.entries]
    file = GrowingFile(spot.path, facts, metadata)
    try:
        for entry in header.entries:
            file.copy(names[entry.name], entry)
        size = file.finish(metadata)
    finally:
        file.close()
    spot.finish(adapter.config or _config(job.mixture, _ranks(job.mixture), _scaled(job.mixture)), job.record)
    return size


def _ranks(mixture: Mixture) -> dict[str, int]:
    return {module.site.module: module.rank for module in mixture.modules}


def _scaled(mixture: Mixture) -> dict[str, float]:
    """The alpha of every module that gives its factors their own scale."""
    return {
        module.site.module: module.parts[0].delta.scale / module.site.times * module.rank for module in mixture.modules
    }
