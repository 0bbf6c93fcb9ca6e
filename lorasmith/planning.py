"""Headers and matched adapters in, a Plan out: everything is decided and refused here, before a byte is written.

    1. every delta finds its tensor and is turned the way that is stored               (structure, binding)
    2. deltas of one tensor are gathered; what cannot be right is refused              (assembly)
    3. tensors are laid out into files, each byte of which gets one step               (layout)
    4. side files, provenance and the hash                                             (sidefiles, recipe)

No tensor data of the base is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorasmith import layout
from lorasmith.adapter import Adapter, short, spans
from lorasmith.assembly import Assembly, Slot, assemble
from lorasmith.binding import Binding, bind
from lorasmith.checkpoint import Checkpoint
from lorasmith.combining import LINEAR, Method
from lorasmith.combining.combined import combine_terms
from lorasmith.deltas import Delta
from lorasmith.dtypes import BY_OPTION
from lorasmith.errors import BadOption, Unsupported, listed
from lorasmith.naming.stems import stem_of, stems
from lorasmith.placing import LAYOUTS
from lorasmith.recipe import plan_hash, recipe
from lorasmith.records import AdapterUse, Convert, Merge, Output, Plan, SideFile, TargetGroup
from lorasmith.sidefiles import PROVENANCE, side_files, written
from lorasmith.structure import Structure, open_structure


@dataclass(frozen=True)
class Options:
    """What a merge was asked to do beyond its inputs; ``max_shard_size`` in bytes."""

    dtype: str = "keep"
    device: str = "cpu"
    max_shard_size: int | None = None
    tokenizer: str | None = None
    allow_unmatched: bool = False
    allow_overflow: bool = False
    architecture: str | None = None
    base_is_residual: bool = False
    method: Method = LINEAR
    weights: tuple[str, ...] = ()
    renames: tuple[str, ...] = ()
    expert_layout: str | None = None


def build_plan(checkpoint: Checkpoint, adapters: Sequence[tuple[Adapter, float]], options: Options) -> Plan:
    """Plan the merge of weighted adapters into a base.

    Raises AdapterMismatch, Unsupported or BadOption for whatever cannot be done exactly as asked.
    """
    if not adapters:
        raise BadOption("no adapter was given: lorasmith merge BASE ADAPTER... -o OUT")
    if options.dtype != "keep" and options.dtype not in BY_OPTION:
        raise BadOption(f"dtype {options.dtype!r} is not one of keep, {', '.join(BY_OPTION)}")
    if options.expert_layout is not None and options.expert_layout not in LAYOUTS:
        raise BadOption(f"expert layout {options.expert_layout!r} is not one of {', '.join(LAYOUTS)}")
    dtype = BY_OPTION.get(options.dtype)
    if not options.base_is_residual:
        refuse_residual(
            [adapter for adapter, _ in adapters], ", or use --base-is-residual if the base is the changed one"
        )
    structure = open_structure(checkpoint, [adapter for adapter, _ in adapters], options.architecture)
    bindings = [_bound(checkpoint, structure, adapter, options) for adapter, _ in adapters]
    assembly = assemble(
        checkpoint, structure, adapters, [one.bound for one in bindings], [one.heads for one in bindings]
    )
    assembly = _combined(assembly, adapters, options.method)
    uses = tuple(_use(adapter, weight, one) for (adapter, weight), one in zip(adapters, bindings, strict=True))
    parts = layout.split(checkpoint, assembly, dtype, options.max_shard_size)
    outputs = layout.lay_out(checkpoint, parts)
    record = recipe(
        checkpoint,
        uses,
        device=options.device,
        dtype=options.dtype,
        allow_overflow=options.allow_overflow,
        max_shard_size=options.max_shard_size,
        **_asked(options),
    )
    beside: tuple[SideFile, ...] = ()
    if checkpoint.folder is not None:
        beside = side_files(
            checkpoint,
            [adapter for adapter, _ in adapters],
            index=layout.index(checkpoint, parts),
            config=assembly.config,
            dtype=dtype,
            tokenizer=options.tokenizer,
        )
    digest = plan_hash(record, outputs, beside)
    provenance = json.dumps({**record, "plan": digest}, indent=2, sort_keys=True)
    if checkpoint.folder is None:
        outputs = (layout.with_metadata(outputs[0], {PROVENANCE.removesuffix(".json"): provenance}),)
    else:
        beside = (*beside, written(PROVENANCE, provenance + "\n"))
    counts = _count(checkpoint, assembly, outputs)
    return Plan(
        base=checkpoint.path,
        adapters=uses,
        outputs=outputs,
        side_files=beside,
        single_file=checkpoint.folder is None,
        dtype=options.dtype,
        device=options.device,
        allow_overflow=options.allow_overflow,
        tensors_merged=counts["merged"],
        tensors_replaced=counts["replaced"],
        tensors_added=len(assembly.added),
        tensors_converted=counts["converted"],
        tensors_copied=counts["copied"],
        bytes_read=sum(shard.size for shard in checkpoint.shards) + sum(adapter.stamp[1] for adapter, _ in adapters),
        bytes_written=sum(output.size for output in outputs) + sum(one.size for one in beside),
        targets=tuple(_targets(bindings)),
        base_files=tuple(shard.stamp for shard in checkpoint.shards),
        adapter_files=tuple(adapter.stamp for adapter, _ in adapters),
        notes=(
            *checkpoint.notes,
            *(note for adapter, _ in adapters for note in adapter.notes),
            *_rule_notes(options),
            *_notes(structure, bindings),
        ),
        warnings=tuple(_warnings(checkpoint, adapters, bindings, uses)),
        hash=digest,
        base_origin=checkpoint.origin,
    )


def _bound(checkpoint: Checkpoint, structure: Structure, adapter: Adapter, options: Options) -> Binding:
    return bind(
        checkpoint,
        structure,
        adapter,
        renames=options.renames,
        expert_layout=options.expert_layout,
        allow_unmatched=options.allow_unmatched,
    )


def _combined(assembly: Assembly, adapters: Sequence[tuple[Adapter, float]], method: Method) -> Assembly:
    """The assembly with low-rank changes of one tensor by several adapters made one by a method that is no sum."""
    if method.is_linear:
        return assembly
    if method.name == "peft-linear":
        raise BadOption(
            "--method peft-linear makes an adapter, for comparison with PEFT's own: lorasmith mix --method peft-linear"
        )
    digests = [adapter.sha256 for adapter, _ in adapters]

    def combined(slot: Slot) -> Slot:
        return replace(slot, terms=combine_terms(slot.terms, method, digests, slot.name))

    return replace(
        assembly,
        changed={name: combined(slot) for name, slot in assembly.changed.items()},
        added=tuple(combined(slot) for slot in assembly.added),
    )


def _asked(options: Options) -> dict[str, Any]:
    """What a record says of options that a merge does not take of itself."""
    given: dict[str, Any] = {
        "weights": list(options.weights),
        "rename": list(options.renames),
        "expert_layout": options.expert_layout,
        "architecture": options.architecture,
        "tokenizer": options.tokenizer,
        "base_is_residual": options.base_is_residual,
        "allow_unmatched": options.allow_unmatched,
    }
    method = {} if options.method.is_linear else {"method": dataclasses.asdict(options.method)}
    return {**method, **{name: value for name, value in given.items() if value}}


def _rule_notes(options: Options) -> Iterator[str]:
    method = options.method
    if not method.is_linear:
        facts = f"density {method.density:g}, space {method.space}"
        yield f"adapters that change one weight are combined by {method.name} ({facts})"
    if options.weights:
        yield f"weights of modules are multiplied by {', '.join(options.weights)}"


def refuse_residual(adapters: Sequence[Adapter], way_out: str = "") -> None:
    """Refuse deltas against a base that the adapter's own initialisation has changed."""
    for adapter in adapters:
        if adapter.residual is not None:
            raise Unsupported(
                f"{adapter.path} was initialised with {adapter.residual} (init_lora_weights in adapter_config.json), "
                "which changes the base: its delta is against that changed base. Save it again with PEFT's "
                f"path_initial_model_for_weight_conversion{way_out}"
            )


def _count(checkpoint: Checkpoint, assembly: Assembly, outputs: Sequence[Output]) -> Counter[str]:
    """How many of the base's tensors are merged, replaced, converted and copied."""
    steps = {step.name: step for output in outputs for step in output.steps if isinstance(step, Convert)}
    own = {entry.file for entry in checkpoint.entries}

    def kind(name: str) -> str:
        slot, step = assembly.changed.get(name), steps.get(name)
        if isinstance(step, Merge):
            return "merged"
        if slot is not None and (layout.replaces(slot) or slot.entry.file not in own):
            return "replaced"
        return "copied" if step is None else "converted"

    return Counter(kind(entry.name) for entry in checkpoint.entries if entry.name not in assembly.dropped)


# ------------------------------------------------------------------------------------------------ what to tell


def _use(adapter: Adapter, weight: float, binding: Binding) -> AdapterUse:
    deltas = [*(one.delta for one in binding.bound), *(one.delta for one in binding.heads)]
    rank, scale = spans(deltas)
    return AdapterUse(
        path=adapter.path,
        weight=weight,
        sha256=adapter.sha256,
        names_base=adapter.names_base,
        kinds=tuple(sorted({delta.kind for delta in deltas})),
        rank=rank,
        scale=scale,
        scale_assumed=adapter.scale_assumed,
        modules=len({one.source.module for one in binding.bound} | {one.module for one in binding.heads}),
        tensors=adapter.tensor_count,
        tensors_used=binding.tensors_used,
        unmatched=binding.unmatched,
        origin=adapter.origin,
    )


def _targets(bindings: Sequence[Binding]) -> Iterator[TargetGroup]:
    for position, binding in enumerate(bindings):
        groups: dict[tuple[str, str], dict[tuple[str, str], Delta]] = {}
        found = [(one.source, one.delta) for one in binding.bound]
        for source, delta in [*found, *((one, one.delta) for one in binding.heads)]:
            name = source.module if source.parameter in ("weight", "bias") else f"{source.module}.{source.parameter}"
            group = groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), delta.kind), {})
            group.setdefault((source.module, source.parameter), delta)
        for (target, kind), members in groups.items():
            ranks, scales = [one.rank for one in members.values()], [one.scale for one in members.values()]
            placed = next((text for key in members if (text := binding.placed.get(key, ""))), "")
            spans = (min(ranks), max(ranks)), (min(scales), max(scales))
            yield TargetGroup(position, target, kind, len(members), *spans, placed)


def _notes(structure: Structure, bindings: Sequence[Binding]) -> Iterator[str]:
    heads = [f"{head.module}.{head.parameter}" for binding in bindings for head in binding.heads]
    if heads:
        yield (
            f"the result is a {structure.architecture} with the adapter's {listed(heads)}; if that class has yet other "
            "layers, as a pooler, neither base nor adapter holds them"
        )


def _warnings(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    bindings: Sequence[Binding],
    uses: Sequence[AdapterUse],
) -> Iterator[str]:
    known = _base_names(checkpoint)
    for (adapter, weight), binding, use in zip(adapters, bindings, uses, strict=True):
        yield from adapter.warnings
        yield from _lacking(checkpoint, adapter, binding)
        if use.unmatched:
            yield f"{adapter.path}: {len(use.unmatched)} tensors fit nothing and were left out: {listed(use.unmatched)}"
        if adapter.scale_assumed:
            yield f"{adapter.path} says nothing about alpha: its scale was taken to be 1"
        if weight == 0:
            yield f"{adapter.path} has weight 0 and changes nothing"
        if adapter.names_base is not None and short(adapter.names_base) not in known:
            yield (
                f"{adapter.path} says it was trained on {adapter.names_base!r}; this base is "
                f"{known[0]!r}. If that is the same model under another name, all is well"
            )


def _lacking(checkpoint: Checkpoint, adapter: Adapter, binding: Binding) -> Iterator[str]:
    """A warning of layers of the base that the adapter's config says were trained, and that it changes nothing of.

    Numbered layers count where it changes others beside them: an adapter of a language model alone has none in a tower.
    What it has something for is not missed, wherever ``--rename`` puts that.
    """
    changed = {one.target.name for one in binding.bound}
    parts = stems(changed).keys()
    for key in ("modules_to_save", "target_modules"):
        named = adapter.config.get(key)
        if not isinstance(named, list) or (key == "target_modules" and adapter.config.get("exclude_modules")):
            continue
        layers: dict[str, list[str]] = {name: [] for name in named if isinstance(name, str)}
        for entry in checkpoint.entries:
            numbered = stem_of(entry.name)
            if numbered is not None and parts and numbered[0] not in parts:
                continue
            module = entry.name.removesuffix(".weight")
            while module and module != entry.name:  # by its whole name, and by all that it ends in
                if module in layers:
                    layers[module].append(entry.name)
                module = module.partition(".")[2]
        unchanged = [name for name, found in layers.items() if found and changed.isdisjoint(found)]
        own = [f".{one.module}" for one in adapter.deltas] if unchanged else []
        missing = [name for name in unchanged if not any(module.endswith(f".{name}") for module in own)]
        if missing:
            yield (
                f"{adapter.path}: its config names {listed(missing)} ({key}), which the base has, and it holds nothing "
                "for that; the file is incomplete, or PEFT found no such layer"
            )


def _base_names(checkpoint: Checkpoint) -> list[str]:
    """The names this base goes by: its folder's, its Hub cache's, its config's; a bare file's own first."""
    path = os.path.realpath(checkpoint.path)
    paths = [os.path.abspath(checkpoint.path), path]
    if checkpoint.folder is None:
        paths += [*(os.path.splitext(one)[0] for one in paths), *map(os.path.dirname, paths)]
    names = list(map(short, paths))
    repo = checkpoint.repo
    if repo is not None:
        names = [short(repo)]
    own = checkpoint.config.get("_name_or_path")
    return [*names, short(own)] if isinstance(own, str) and own else names
