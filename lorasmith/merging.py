"""The main job, from paths to a published model: open, plan, execute, push, publish, report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lorasmith.arguments import AdapterArguments, Path, Weighted, numbered, weigh_modules, weighted
from lorasmith.combining import choose
from lorasmith.delivery import Delivery
from lorasmith.errors import BadOption
from lorasmith.execution import default_threads, execute
from lorasmith.execution.blocks import Budget, fit
from lorasmith.execution.destination import check_output, require_room
from lorasmith.execution.device import resolve
from lorasmith.execution.peak import peak_memory
from lorasmith.execution.workplace import claim
from lorasmith.planning import Options, build_plan
from lorasmith.records import MergeReport, Output, Plan, Progress, Pushed, Resources, Survival
from lorasmith.rounding import SURVIVAL_LIMIT, Sample, survival
from lorasmith.safefile import require_unchanged
from lorasmith.sources import Sources

DEFAULT_MEMORY = 128 << 20
"""Bytes for buffers, beside the interpreter and torch themselves."""


def merge(
    base: Path,
    adapters: AdapterArguments,
    out: Path | None = None,
    *,
    dtype: str = "keep",
    device: str = "cpu",
    memory: int = DEFAULT_MEMORY,
    threads: int | None = None,
    max_shard_size: int | None = None,
    tokenizer: str | None = None,
    allow_unmatched: bool = False,
    allow_overflow: bool = False,
    architecture: str | None = None,
    base_is_residual: bool = False,
    weights: Sequence[str] = (),
    method: str = "linear",
    density: float | None = None,
    seed: int | None = None,
    sign: str | None = None,
    space: str | None = None,
    rename: Sequence[str] = (),
    expert_layout: str | None = None,
    overwrite: bool = False,
    push: str | None = None,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    card: Path | None = None,
    stream: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    planned: Callable[[Plan, Resources], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> MergeReport:
    """Merge adapters into a base model and write the result to ``out``: ``W0 + Σ weightᵢ·ΔWᵢ``, rounded once.

    ``base`` is a model folder or a ``.safetensors`` file, and ``out`` becomes the same kind of thing. ``adapters``
    are PEFT folders or files: ``path``, ``"path:0.7"`` or ``(path, 0.7)``. All of them may be names on the Hub,
    ``org/name``, ``org/name@revision`` or an address; a path that exists is that path. ``dtype`` is ``keep`` or the
    dtype of every floating-point tensor of the result: ``float32``, ``bfloat16``, ``float16``. ``device`` is what
    computes: ``cpu``, ``cuda`` (the first GPU), ``cuda:N``, or ``auto`` for a GPU if there is one. ``memory`` and
    ``max_shard_size`` are in bytes; ``memory`` bounds the buffers, whatever the size of the model. ``tokenizer``
    says whose is kept, ``base`` or ``adapter`` (by default the adapter's if it has one). ``architecture`` names the
    result's class where an adapter brings layers that the base's has not; ``base_is_residual`` says that the base is
    the one that the adapter's own initialisation (PiSSA and the like) has changed. ``rename`` are
    ``REGEX=REPLACEMENT`` for the adapters' parameter names, where the base calls the same layers otherwise.
    ``expert_layout`` says how factors of stacked experts are stored, against what the adapter's config says: ``peft``
    (0.19.1 and later), ``peft-0.19.0``, ``peft-0.18`` (and before) or ``unsloth`` (with the columns of B that belong to
    one expert together). ``weights`` are ``REGEX=FACTOR`` for modules' names, ``method`` and what goes with it a rule
    other than the sum (see ``lorasmith.combining``). ``planned`` is called once,
    before anything is written: raise in it to stop there. ``progress`` is called about ten times a second. Both are
    called from the calling thread.

    ``push`` names a repository that the result goes to as well, or alone if there is no ``out``; ``revision``,
    ``private``, ``create_pr``, ``commit_message`` and ``card`` are as with ``lorasmith.push``. With ``stream`` the
    shards of a base on the Hub are downloaded one after another, and removed once they are merged. ``token`` and
    ``endpoint`` are the client's own by default.

    Nothing appears at ``out`` before all of it is written; a run that was killed goes on when it is called again
    with the same arguments. Raises a ``LorasmithError`` (see ``lorasmith.errors``), most of them before anything
    is written. May be called from several threads at once, for different outputs.
    """
    started = time.monotonic()
    sources = Sources(endpoint, token, stream=stream)
    delivery = Delivery(
        sources,
        None if out is None else os.fspath(out),
        push,
        stream=stream,
        card=card,
        revision=revision,
        private=private,
        create_pr=create_pr,
        commit_message=commit_message,
    )
    options = Options(
        dtype=dtype,
        device=resolve(device),
        max_shard_size=max_shard_size,
        tokenizer=tokenizer,
        allow_unmatched=allow_unmatched,
        allow_overflow=allow_overflow,
        architecture=architecture,
        base_is_residual=base_is_residual,
        method=choose(method, density=density, seed=seed, sign=sign, space=space),
        weights=tuple(weights),
        renames=(rename,) if isinstance(rename, str) else tuple(rename),
        expert_layout=expert_layout,
    )
    given = weighted(adapters)  # held to the end: an adapter in memory goes with the last that has it
    plan_ = _plan(sources, base, given, out, options, overwrite=overwrite)
    budget = _budget(plan_, memory, threads)
    takes = _resources(plan_, budget, delivery)
    if planned is not None:
        planned(plan_, takes)
    with delivery.prepared(plan_, progress), claim(delivery.place, overwrite=overwrite) as place:

        def finished(output: Output, samples: list[Sample]) -> None:
            # before it is noted: a later run takes up what is
            require_unchanged((*plan_.base_files, *plan_.adapter_files))
            place.finish(output, samples)
            delivery.finished(output)

        work = delivery.begin(place)
        resumed = execute(work, place, budget, finished, progress, delivery.fetch)
        if not place.published:
            place.write_side_files(plan_.side_files)
        pushed = delivery.commit(survival(place.samples))
        delivery.settle(place)
    seconds = time.monotonic() - started
    return _report(plan_, delivery.name, takes.threads, resumed, survival(place.samples), seconds, pushed)


def plan(
    base: Path,
    adapters: AdapterArguments,
    out: Path | None = None,
    *,
    dtype: str = "keep",
    device: str = "cpu",
    max_shard_size: int | None = None,
    tokenizer: str | None = None,
    allow_unmatched: bool = False,
    allow_overflow: bool = False,
    architecture: str | None = None,
    base_is_residual: bool = False,
    weights: Sequence[str] = (),
    method: str = "linear",
    density: float | None = None,
    seed: int | None = None,
    sign: str | None = None,
    space: str | None = None,
    rename: Sequence[str] = (),
    expert_layout: str | None = None,
    overwrite: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> Plan:
    """Everything ``merge`` would do with these arguments, having checked all that can be known before writing.

    Reads headers, configs and the adapters, no tensor of the base; one on the Hub is not downloaded. Given ``out``,
    also checks that the result may be written there. Raises what ``merge`` would.
    """
    options = Options(
        dtype=dtype,
        device=resolve(device),
        max_shard_size=max_shard_size,
        tokenizer=tokenizer,
        allow_unmatched=allow_unmatched,
        allow_overflow=allow_overflow,
        architecture=architecture,
        base_is_residual=base_is_residual,
        method=choose(method, density=density, seed=seed, sign=sign, space=space),
        weights=tuple(weights),
        renames=(rename,) if isinstance(rename, str) else tuple(rename),
        expert_layout=expert_layout,
    )
    return _plan(Sources(endpoint, token), base, weighted(adapters), out, options, overwrite=overwrite)


def _plan(
    sources: Sources,
    base: Path,
    given: Sequence[Weighted],
    out: Path | None,
    options: Options,
    *,
    overwrite: bool,
) -> Plan:
    checkpoint = sources.open_base(os.fspath(base))
    for one in given:
        sources.require(one.path)
    if out is not None:
        here = [one.path for one in given if sources.reference(one.path) is None]
        inputs = [checkpoint.folder or checkpoint.files[0], *here]
        check_output(os.fspath(out), inputs, single_file=checkpoint.folder is None, overwrite=overwrite)
    read = weigh_modules([sources.read_adapter(one.given) for one in given], given, options.weights)
    options = replace(options, weights=tuple(numbered(options.weights, given)))
    return build_plan(checkpoint, [(adapter, one.weight) for adapter, one in zip(read, given, strict=True)], options)


def resources(
    plan: Plan,
    out: Path | None,
    *,
    memory: int = DEFAULT_MEMORY,
    threads: int | None = None,
    push: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    **options: Any,
) -> Resources:
    """Threads, memory and disk a plan takes; also checks that ``push`` may be pushed to, and makes nothing.

    ``options`` are those of ``merge`` that say where things come from and go to. Raises BudgetTooSmall when ``memory``
    (bytes) is not enough, NoSpace when the disk is not, HubRefused.
    """
    delivery = Delivery(Sources(endpoint, token), None if out is None else os.fspath(out), push, **options)
    delivery.check(plan)
    return _resources(plan, _budget(plan, memory, threads), delivery)


def _resources(plan: Plan, budget: Budget, delivery: Delivery) -> Resources:
    takes = delivery.room(plan)
    free = require_room(delivery.place, takes)
    return Resources(budget.threads, budget.nbytes, takes, free, delivery.download(plan))


def _budget(plan: Plan, memory: int, threads: int | None) -> Budget:
    if threads is not None and threads < 1:
        raise BadOption(f"threads must be at least 1, not {threads}")
    if memory < 1:
        raise BadOption(f"memory must be a positive number of bytes, not {memory}")
    return fit(plan, memory, threads or default_threads(plan.device))


def _report(
    plan: Plan,
    out: str,
    threads: int,
    resumed: int,
    survival: Survival | None,
    seconds: float,
    pushed: Pushed | None,
) -> MergeReport:
    return MergeReport(
        out=out,
        base=plan.base,
        adapters=plan.adapters,
        targets=plan.targets,
        dtype=plan.dtype,
        tensors_merged=plan.tensors_merged,
        tensors_replaced=plan.tensors_replaced,
        tensors_added=plan.tensors_added,
        tensors_converted=plan.tensors_converted,
        tensors_copied=plan.tensors_copied,
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        bytes_resumed=resumed,
        survival=survival,
        seconds=seconds,
        rate=(plan.bytes_written - resumed) / seconds if seconds > 0 else 0.0,
        peak_memory=peak_memory(),
        threads=threads,
        plan_hash=plan.hash,
        notes=plan.notes,
        warnings=(*plan.warnings, *_survival_warnings(plan, survival)),
        base_origin=plan.base_origin,
        pushed=pushed,
    )


def _survival_warnings(plan: Plan, survival: Survival | None) -> list[str]:
    if survival is None and plan.tensors_merged:
        return ["what rounding left of the delta is too large a number to be measured: are weights and scales right?"]
    if survival is None:
        return []
    if survival.total is None:
        what = "what is low-rank" if plan.tensors_replaced else "the adapter"
        return [f"every sampled row of every delta is zero: {what} changes nothing; was it trained?"]
    if survival.total >= SURVIVAL_LIMIT:
        return []
    size = survival.relative_norm
    beside = "" if size is None else f", which is only {size:.2%} of the weights"
    lost = f"rounding left {survival.total:.0%} of the delta{beside}"
    return [f"{lost}; write a finer dtype to keep it: --dtype float16 or --dtype float32"]
