"""The main job, from paths to a published model: open, plan, execute, publish, report."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence

from lorasmith.arguments import AdapterArguments, Path, weigh_modules, weighted
from lorasmith.checkpoint import open_checkpoint, require_path
from lorasmith.combining import choose
from lorasmith.errors import BadOption, NoSpace
from lorasmith.execution import default_threads, execute
from lorasmith.execution.blocks import Budget, fit
from lorasmith.execution.destination import check_output, free_space
from lorasmith.execution.device import resolve
from lorasmith.execution.peak import peak_memory
from lorasmith.execution.workplace import claim
from lorasmith.planning import Options, build_plan
from lorasmith.records import MergeReport, Output, Plan, Progress, Resources, Survival
from lorasmith.rounding import SURVIVAL_LIMIT, Sample, survival
from lorasmith.safefile import require_unchanged

DEFAULT_MEMORY = 128 << 20
"""Bytes for buffers, beside the interpreter and torch themselves."""


def merge(
    base: Path,
    adapters: AdapterArguments,
    out: Path,
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
    planned: Callable[[Plan, Resources], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> MergeReport:
    """Merge adapters into a base model and write the result to ``out``: ``W0 + Σ weightᵢ·ΔWᵢ``, rounded once.

    ``base`` is a model folder or a ``.safetensors`` file, and ``out`` becomes the same kind of thing. ``adapters``
    are PEFT folders or files: ``path``, ``"path:0.7"`` or ``(path, 0.7)``. ``dtype`` is ``keep`` or the dtype of
    every floating-point tensor of the result: ``float32``, ``bfloat16``, ``float16``. ``device`` is what computes:
    ``cpu``, ``cuda`` (the first GPU), ``cuda:N``, or ``auto`` for a GPU if there is one. ``memory`` and
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

    Nothing appears at ``out`` before all of it is written; a run that was killed goes on when it is called again
    with the same arguments. Raises a ``LorasmithError`` (see ``lorasmith.errors``), most of them before anything
    is written. May be called from several threads at once, for different outputs.
    """
    started = time.monotonic()
    plan_ = plan(
        base,
        adapters,
        out,
        dtype=dtype,
        device=device,
        max_shard_size=max_shard_size,
        tokenizer=tokenizer,
        allow_unmatched=allow_unmatched,
        allow_overflow=allow_overflow,
        architecture=architecture,
        base_is_residual=base_is_residual,
        weights=weights,
        method=method,
        density=density,
        seed=seed,
        sign=sign,
        space=space,
        rename=rename,
        expert_layout=expert_layout,
        overwrite=overwrite,
    )
    budget = _budget(plan_, memory, threads)
    takes = _resources(plan_, budget, os.fspath(out))
    if planned is not None:
        planned(plan_, takes)
    with claim(os.fspath(out), overwrite=overwrite) as place:

        def finished(output: Output, samples: list[Sample]) -> None:
            # before it is noted: a later run takes up what is
            require_unchanged((*plan_.base_files, *plan_.adapter_files))
            place.finish(output, samples)

        place.begin(plan_)
        resumed = execute(plan_, place, budget, finished, progress)
        if not place.published:
            place.write_side_files(plan_.side_files)
        place.publish()
    return _report(plan_, os.fspath(out), takes.threads, resumed, survival(place.samples), time.monotonic() - started)


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
) -> Plan:
    """Everything ``merge`` would do with these arguments, having checked all that can be known before writing.

    Reads headers, configs and the adapters, no tensor of the base. Given ``out``, also checks that the result may
    be written there. Raises what ``merge`` would.
    """
    device = resolve(device)
    rule = choose(method, density=density, seed=seed, sign=sign, space=space)
    given = weighted(adapters)
    checkpoint = open_checkpoint(os.fspath(base))
    for one in given:
        require_path(one.path)
    if out is not None:
        inputs = [checkpoint.path, *(one.path for one in given)]
        check_output(os.fspath(out), inputs, single_file=checkpoint.folder is None, overwrite=overwrite)
    options = Options(
        dtype=dtype,
        device=device,
        max_shard_size=max_shard_size,
        tokenizer=tokenizer,
        allow_unmatched=allow_unmatched,
        allow_overflow=allow_overflow,
        architecture=architecture,
        base_is_residual=base_is_residual,
        method=rule,
        weights=tuple(weights),
        renames=(rename,) if isinstance(rename, str) else tuple(rename),
        expert_layout=expert_layout,
    )
    read = weigh_modules([one.read() for one in given], given, weights)
    return build_plan(checkpoint, [(adapter, one.weight) for adapter, one in zip(read, given, strict=True)], options)


def resources(plan: Plan, out: Path, *, memory: int = DEFAULT_MEMORY, threads: int | None = None) -> Resources:
    """Threads, memory and disk a plan takes.

    Raises BudgetTooSmall when ``memory`` (bytes) is not enough, NoSpace when the disk is not.
    """
    return _resources(plan, _budget(plan, memory, threads), os.fspath(out))


def _resources(plan: Plan, budget: Budget, out: str) -> Resources:
    free = free_space(out)
    if plan.bytes_written > free:
        raise NoSpace(
            errno.ENOSPC,
            f"the result takes {plan.bytes_written:,} bytes and the disk of {out} has {free:,} free; "
            "make room or choose another output",
        )
    return Resources(budget.threads, budget.nbytes, plan.bytes_written, free)


def _budget(plan: Plan, memory: int, threads: int | None) -> Budget:
    if threads is not None and threads < 1:
        raise BadOption(f"threads must be at least 1, not {threads}")
    if memory < 1:
        raise BadOption(f"memory must be a positive number of bytes, not {memory}")
    return fit(plan, memory, threads or default_threads(plan.device))


def _report(plan: Plan, out: str, threads: int, resumed: int, survival: Survival | None, seconds: float) -> MergeReport:
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
        warnings=(*plan.warnings, *_survival_warnings(survival)),
    )


def _survival_warnings(survival: Survival | None) -> list[str]:
    if survival is None:
        return []
    if survival.total is None:
        return ["every sampled row of every delta is zero: the adapter changes nothing; was it trained?"]
    if survival.total >= SURVIVAL_LIMIT:
        return []
    lost = f"rounding left {survival.total:.0%} of the delta, which is only {survival.relative_norm:.2%} of the weights"
    return [f"{lost}; write a finer dtype to keep it: --dtype float16 or --dtype float32"]
