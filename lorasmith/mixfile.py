"""The file of a mix: every module made and written, tensors that are stored whole, and the config."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorasmith.adapter import Adapter
from lorasmith.adapterfile import INSIDE, AdapterFile, Spot, dumped, room
from lorasmith.combining import LINEAR
from lorasmith.combining.combined import Combined, Source, read_factor
from lorasmith.dtypes import itemsize
from lorasmith.execution.torchthreads import in_order
from lorasmith.formats.peft import plain_names
from lorasmith.formats.writing import Site, lora_config, stacked
from lorasmith.growingfile import GrowingFile
from lorasmith.mixture import Mixture, Module
from lorasmith.recompression import Made, Request, make, walk
from lorasmith.records import Progress
from lorasmith.weightfile import read_weights
from lorasmith.wholes import Whole, saved_modules, trained_tokens

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Job:
    """A mix with all that was decided beforehand: the ranks that a budget gives, its record, its factors' dtype.

    ``verbatim`` says that it is one adapter as it is. ``progress`` is told how far it is.
    """

    mixture: Mixture
    request: Request
    ranks: Mapping[str, int]
    record: Mapping[str, Any]
    threads: int
    code: str
    verbatim: bool = False
    progress: Callable[[Progress], None] | None = None


def _made(job: Job) -> Iterator[Made]:
    """Every module's new factors, in the order of the modules."""
    started = time.monotonic()
    modules = job.mixture.modules
    sizes = [sum(entry.nbytes for part in module.parts for entry in part.delta.entries) for module in modules]
    done = 0

    def work(module: Module) -> Made:
        return make(module, job.request, len(job.mixture.adapters), job.ranks.get(module.name))

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
    kept = _foreign(mixture.adapters[0][0].metadata) if len(mixture.adapters) == 1 else {}
    file = AdapterFile(
        spot.path,
        _most_of_all(job),
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


def _foreign(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a header says that neither names the adapter's config nor how it was made."""
    return {key: value for key, value in metadata.items() if key not in (INSIDE, "lorasmith")}


def _write_modules(file: AdapterFile, job: Job) -> list[Made]:
    """Modules of rank 0 are left out, unless all are: an adapter that does nothing has factors, too.

    They get factors of zeros also where something else of theirs is stored, which PEFT finds only beside factors.
    """
    attention = {site.module for site in _attention(job.mixture)}
    held = {whole.source.module for whole in job.mixture.wholes}
    found = []
    stack: list[Made] = []
    for made in _made(job):
        module, rank = made.module, made.facts.rank_out
        if module.expert >= 0:
            stack.append(made)
            if len(stack) == module.site.experts:
                _write_stack(file, stack)
                stack = []
            found.append(_without_factors(made))
            continue
        if module.site.module in attention:
            rank = _attention_rank(module, job)
        elif not rank and (module.biases or module.site.module in held):
            rank = 1
        if rank:
            file.add(module.site, _wide(made.left, rank), _wide(made.right.t(), rank).t(), _bias(module))
        found.append(_without_factors(made))
    if not any(made.facts.rank_out for made in found) and not file.ranks:
        import torch

        for module in job.mixture.modules:
            rows, columns = module.site.shape
            file.add(module.site, torch.zeros(rows, 1), torch.zeros(1, columns), _bias(module))
    return found


def _write_stack(file: AdapterFile, experts: Sequence[Made]) -> None:
    """The factors of all experts of a stack, which have one rank: the largest that any of them needs."""
    rank = max(1, *(made.facts.rank_out for made in experts))
    lefts = [_wide(made.left.float(), rank) for made in experts]
    rights = [_wide(made.right.t().float(), rank).t() for made in experts]
    file.add(experts[0].module.site, *stacked(lefts, rights))


def _most_of_all(job: Job) -> dict[Site, int]:
    """The largest rank that each site can get."""
    most: dict[Site, int] = {}
    for module in job.mixture.modules:
        most[module.site] = max(most.get(module.site, 1), module.rank, _most(module, job))
    return most


def takes(job: Job) -> int | None:
    """The bytes that the result takes at most; None where they depend on what is found."""
    if job.verbatim:
        return sum(entry.nbytes for entry in read_weights(_alone(job.mixture).file)[0].entries)
    if job.request.criterion and job.request.criterion.rank is None and not job.ranks:
        return None
    attention = {site.module for site in _attention(job.mixture)}
    ranks: dict[Site, int] = {}
    for module in job.mixture.modules:
        most = _attention_rank(module, job) if module.site.module in attention else _most(module, job)
        ranks[module.site] = max(ranks.get(module.site, 0), job.ranks.get(module.name, most))
    biased = any(module.biases for module in job.mixture.modules)
    return room(ranks, [_shape(whole) for whole in job.mixture.wholes], job.request.code, biased=biased)


def _attention(mixture: Mixture) -> list[Site]:
    """The sites of ``torch.nn.MultiheadAttention``, for whose input and output PEFT has one rank."""
    outputs = {
        module.site.module.rpartition(".base_layer.")[0] for module in mixture.modules if module.site.is_attention
    }
    return [one.site for one in mixture.modules if one.site.is_attention or one.site.module in outputs]


def _attention_rank(module: Module, job: Job) -> int:
    """One rank for both, whatever their deltas need: what is not needed is zero."""
    return min(module.rank, job.request.criterion.rank or module.rank)


def _wide(factor: torch.Tensor, rank: int) -> torch.Tensor:
    """A factor with columns of zeros to the right."""
    import torch

    return torch.nn.functional.pad(factor, (0, rank - factor.shape[1])) if factor.shape[1] < rank else factor


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

    combined = Combined(LINEAR, tuple(Source(((delta, 1.0),), weight) for delta, weight in whole.parts))
    opened = combined.open(torch.float32, lambda: walk(combined, whole.entry))
    for rows, w0 in walk(combined, whole.entry):
        total = w0.clone()
        opened.add_to(total, w0, rows, 1.0)
        yield total.view(-1).view(torch.uint8).numpy().data


_CHANGED = ("use_bdlora", "lora_bias", "lora_B_layout")
"""Keys that say how factors are stored, which new ones are not."""


def _config(mixture: Mixture, ranks: Mapping[str, int], alphas: Mapping[str, float] | None = None) -> dict[str, Any]:
    adapters = [adapter for adapter, weight in mixture.adapters if weight != 0]
    config = lora_config(
        adapters,
        ranks,
        alphas or ranks,
        every=len(ranks) == len({module.site for module in mixture.modules}) and not mixture.dropped,
        lora_bias=any(module.biases for module in mixture.modules),
        saved=saved_modules(mixture.adapters, mixture.wholes),
        tokens=trained_tokens(mixture.adapters, mixture.wholes),
        parameters={module.site.path for module in mixture.modules if module.site.parameter},
    )
    trained, *others = map(_auto_mapping, adapters)
    if trained is not None and all(other == trained for other in others):
        config["auto_mapping"] = trained
    if others:
        return config
    own = {key: value for key, value in adapters[0].config.items() if key not in _CHANGED}
    return {**own, **config}


def _auto_mapping(adapter: Adapter) -> dict[str, Any] | None:
    """What PEFT notes of the class that an adapter without a task was trained on."""
    mapping = adapter.config.get("auto_mapping")
    if not isinstance(mapping, Mapping):
        return None
    return {key: value for key, value in mapping.items() if key != "unsloth_fixed"}  # how Unsloth stores experts


# ----------------------------------------------------------------------------------------- one adapter as it is


def _copy(job: Job, spot: Spot) -> int:
    """Write the only adapter's tensors as they are, by PEFT's names where a folder is made; the file's size."""
    adapter = _alone(job.mixture)
    header, _ = read_weights(adapter.file)
    names = {entry.name: entry.name for entry in header.entries} if spot.inside else plain_names(header)
    entries = [entry for entry in header.entries if spot.inside or adapter.config or not entry.name.endswith(".alpha")]
    metadata = {**_foreign(header.metadata), "format": "pt"}
    if spot.inside:
        metadata["lorasmith"] = dumped(job.record)
        if adapter.config:
            metadata[INSIDE] = dumped(adapter.config)
    facts = [(names[one.name], one.dtype, one.shape, one.nbytes) for one in entries]
    file = GrowingFile(spot.path, facts, metadata)
    try:
        for entry in entries:
            file.copy(names[entry.name], entry)
        size = file.finish(metadata)
    finally:
        file.close()
    spot.finish(adapter.config or _config(job.mixture, _ranks(job.mixture), _scaled(job.mixture)), job.record)
    return size


def _alone(mixture: Mixture) -> Adapter:
    (adapter,) = (adapter for adapter, weight in mixture.adapters if weight != 0)
    return adapter


def _ranks(mixture: Mixture) -> dict[str, int]:
    return {module.site.path: module.rank for module in mixture.modules}


def _scaled(mixture: Mixture) -> dict[str, float]:
    """The alpha of every module that gives its factors their own scale."""
    return {
        module.site.path: module.parts[0].delta.scale / module.site.times * module.rank for module in mixture.modules
    }
