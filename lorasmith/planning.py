"""Headers and matched adapters in, a Plan out: everything is decided and refused here, before a byte is written.

    1. every delta finds its base tensor and is turned the way the base stores it      (_bind)
    2. deltas of one tensor are gathered; what cannot be right is refused              (_gather, _refuse_tied)
    3. tensors are laid out into files, each byte of which gets one step               (layout)
    4. side files, provenance and the hash                                             (sidefiles, recipe)

No tensor data of the base is read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorasmith import layout, naming
from lorasmith.adapter import Adapter
from lorasmith.checkpoint import Checkpoint
from lorasmith.deltas import Delta
from lorasmith.deltas.replacement import Replacement
from lorasmith.dtypes import BY_OPTION, FLOATS
from lorasmith.errors import AdapterMismatch, BadOption, Unsupported, listed
from lorasmith.recipe import plan_hash, recipe
from lorasmith.records import AdapterUse, Convert, Merge, Plan, SideFile, TargetGroup, Term
from lorasmith.safefile import TensorEntry
from lorasmith.sidefiles import PROVENANCE, side_files, written

EMBEDDINGS = (
    "embed_tokens", "wte", "word_embeddings", "word_embedding", "shared", "embed_in", "tok_embeddings", "tokens_embed",
    "embeddings", "embedding",
)  # fmt: skip

_HEADLESS = re.compile(r"(?<!MT)Model$|(Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction)$")
_HEADED = re.compile(r"Head|EncoderDecoder|^Bark")
"""Of the classes of transformers: those without an output head over the vocabulary, and exceptions to it."""

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
CONV1D_MODULES = ("c_attn", "q_attn", "c_proj", "c_fc")
"""transformers' ``Conv1D`` layers, which store their weight as (in, out)."""


@dataclass(frozen=True)
class Options:
    """What a merge was asked to do beyond its inputs; ``max_shard_size`` in bytes."""

    dtype: str = "keep"
    device: str = "cpu"
    max_shard_size: int | None = None
    tokenizer: str | None = None
    allow_unmatched: bool = False
    allow_overflow: bool = False


def build_plan(checkpoint: Checkpoint, adapters: Sequence[tuple[Adapter, float]], options: Options) -> Plan:
    """Plan the merge of weighted adapters into a base.

    Raises AdapterMismatch, Unsupported or BadOption for whatever cannot be done exactly as asked.
    """
    if not adapters:
        raise BadOption("no adapter was given: lorasmith merge BASE ADAPTER... -o OUT")
    if options.dtype != "keep" and options.dtype not in BY_OPTION:
        raise BadOption(f"dtype {options.dtype!r} is not one of keep, {', '.join(BY_OPTION)}")
    dtype = BY_OPTION.get(options.dtype)
    bound = [_bind(checkpoint, adapter, options) for adapter, _ in adapters]
    terms = _gather(checkpoint, adapters, bound)
    uses = tuple(_use(adapter, weight, one) for (adapter, weight), one in zip(adapters, bound, strict=True))
    parts = layout.split(checkpoint, dtype, options.max_shard_size)
    outputs = layout.lay_out(checkpoint, parts, terms, dtype)
    record = recipe(
        checkpoint,
        uses,
        device=options.device,
        dtype=options.dtype,
        allow_overflow=options.allow_overflow,
        max_shard_size=options.max_shard_size,
    )
    beside: tuple[SideFile, ...] = ()
    if checkpoint.folder is not None:
        beside = side_files(
            checkpoint,
            [adapter for adapter, _ in adapters],
            index=layout.index(checkpoint, parts, dtype),
            dtype=dtype,
            tokenizer=options.tokenizer,
        )
    digest = plan_hash(record, outputs, beside)
    provenance = json.dumps({**record, "plan": digest}, indent=2, sort_keys=True)
    if checkpoint.folder is None:
        outputs = (layout.with_metadata(outputs[0], {PROVENANCE.removesuffix(".json"): provenance}),)
    else:
        beside = (*beside, written(PROVENANCE, provenance + "\n"))
    steps = [step for output in outputs for step in output.steps]
    merged = sum(isinstance(step, Merge) for step in steps)
    converted = sum(type(step) is Convert and step.entry.name not in terms for step in steps)
    replaced = sum(layout.replaces(one) for one in terms.values())
    return Plan(
        base=checkpoint.path,
        adapters=uses,
        outputs=outputs,
        side_files=beside,
        single_file=checkpoint.folder is None,
        dtype=options.dtype,
        device=options.device,
        allow_overflow=options.allow_overflow,
        tensors_merged=merged,
        tensors_replaced=replaced,
        tensors_converted=converted,
        tensors_copied=sum(1 for _ in checkpoint.entries) - merged - replaced - converted,
        bytes_read=sum(shard.size for shard in checkpoint.shards) + sum(adapter.stamp[1] for adapter, _ in adapters),
        bytes_written=sum(output.size for output in outputs) + sum(one.size for one in beside),
        targets=tuple(_targets(bound)),
        base_files=tuple(shard.stamp for shard in checkpoint.shards),
        adapter_files=tuple(adapter.stamp for adapter, _ in adapters),
        notes=(*checkpoint.notes, *(note for adapter, _ in adapters for note in adapter.notes)),
        warnings=tuple(_warnings(checkpoint, adapters, uses)),
        hash=digest,
    )


# ------------------------------------------------------------------------------------ 1. deltas to base tensors


@dataclass(frozen=True)
class _Bound:
    """An adapter's deltas, turned the way the base stores them, each with its tensor and module."""

    deltas: tuple[tuple[TensorEntry, str, Delta], ...]
    tensors_used: int
    unmatched: tuple[str, ...]


def _bind(checkpoint: Checkpoint, adapter: Adapter, options: Options) -> _Bound:
    matched, left = naming.match(adapter, checkpoint, allow_unmatched=options.allow_unmatched)
    deltas = []
    for one in matched:
        delta = one.source.delta
        if not one.source.stored_as_base and _is_flipped(checkpoint, adapter, one):
            delta = delta.transposed()
        _require_fit(adapter, one, delta)
        deltas.append((one.target, one.source.module, delta))
    return _Bound(
        tuple(deltas),
        sum(len(one.source.tensors) for one in matched) + len(adapter.ignored),
        tuple(name for one in left for name in one.tensors),
    )


def _is_flipped(checkpoint: Checkpoint, adapter: Adapter, match: naming.Match) -> bool:
    """Whether the base stores this weight as (in, out): by its shape, else by the layer's kind, else by the flag.

    PEFT, too, corrects the flag by the layer's kind; it is the last word only on models that transformers doesn't have.
    """
    shape = match.target.matrix
    if shape[0] != shape[1]:
        return match.source.delta.shape == (shape[1], shape[0])
    parts = [checkpoint.config, *(one for one in checkpoint.config.values() if isinstance(one, Mapping))]
    if any(part.get("model_type") in CONV1D_MODELS for part in parts):
        return match.source.module.rsplit(".", 1)[-1] in CONV1D_MODULES
    foreign = "model_type" not in checkpoint.config or "auto_map" in checkpoint.config
    return foreign and bool(adapter.fan_in_fan_out)


def _require_fit(adapter: Adapter, match: naming.Match, delta: Delta) -> None:
    target = match.target
    if target.dtype not in FLOATS:
        raise Unsupported(f"the base stores {target.name!r} as {target.dtype}, to which no delta can be added")
    if len(target.shape) > 2 and not isinstance(delta, Replacement):
        raise Unsupported(
            f"the base tensor {target.name!r} has shape {list(target.shape)} (a convolution or experts); "
            "LoRA on it is not supported yet"
        )
    whole = isinstance(delta, Replacement)
    shape = delta.entries[0].shape if whole else delta.shape
    if shape != (target.shape if whole else target.matrix):
        raise AdapterMismatch(
            f"{adapter.path}: the delta for {target.name!r} has shape {list(shape)} and the base tensor "
            f"{list(target.shape)} ({match.source.tensors[0]}); the adapter was trained on another model or size"
        )


def _gather(
    checkpoint: Checkpoint, adapters: Sequence[tuple[Adapter, float]], bound: Sequence[_Bound]
) -> dict[str, tuple[Term, ...]]:
    """The terms of every base tensor that changes; an adapter at weight 0 has none."""
    terms: dict[str, list[Term]] = {}
    for position, ((_, weight), one) in enumerate(zip(adapters, bound, strict=True)):
        for target, _, delta in one.deltas:
            _refuse_tied(checkpoint, target)
            if weight != 0:
                terms.setdefault(target.name, []).append(Term(delta, weight, position))
    return {name: tuple(one) for name, one in terms.items()}


def _refuse_tied(checkpoint: Checkpoint, target: TensorEntry) -> None:
    """Refuse a change to a weight that a model uses twice: as its embedding and as its head, or in two embeddings."""
    leaf = _layer(target)
    if leaf not in EMBEDDINGS + naming.HEADS:
        return
    config = checkpoint.config
    text = config.get("text_config")
    flag = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, Mapping) else None)
    names = config.get("architectures")
    names = names if isinstance(names, list) and names else [""]
    headless = all(isinstance(name, str) and _HEADLESS.search(name) and not _HEADED.search(name) for name in names)
    stored = any(_layer(entry) in naming.HEADS for entry in checkpoint.entries)
    shared = config.get("is_encoder_decoder") and leaf in EMBEDDINGS
    if not shared and (flag is False or (flag is None and stored) or headless):
        return
    raise Unsupported(
        f"the adapter changes {target.name!r}, which the base ties to "
        f"{'the embeddings of its encoder and decoder' if shared else 'its output head (tie_word_embeddings)'}: "
        "a merged model would compute something else than the adapted one. Untying is not supported yet"
    )


def _layer(entry: TensorEntry) -> str:
    """The name of the layer whose weight this is; nothing for other parameters."""
    parts = entry.name.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] == "weight" else ""


# ---------------------------------------------------------------------------------------------- 3. what to tell


def _use(adapter: Adapter, weight: float, bound: _Bound) -> AdapterUse:
    deltas = [delta for _, _, delta in bound.deltas]
    low = [delta for delta in deltas if delta.rank] or deltas
    return AdapterUse(
        path=adapter.path,
        weight=weight,
        sha256=adapter.sha256,
        names_base=adapter.names_base,
        kinds=tuple(sorted({delta.kind for delta in deltas})),
        rank=(min(delta.rank for delta in low), max(delta.rank for delta in low)),
        scale=(min(delta.scale for delta in low), max(delta.scale for delta in low)),
        scale_assumed=adapter.scale_assumed,
        modules=len({module for _, module, _ in bound.deltas}),
        tensors=adapter.tensor_count,
        tensors_used=bound.tensors_used,
        unmatched=bound.unmatched,
    )


def _targets(bound: Sequence[_Bound]) -> Iterator[TargetGroup]:
    for position, one in enumerate(bound):
        groups: dict[tuple[str, str], list[Delta]] = {}
        for _, module, delta in one.deltas:
            groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module), delta.kind), []).append(delta)
        for (target, kind), deltas in groups.items():
            ranks, scales = [delta.rank for delta in deltas], [delta.scale for delta in deltas]
            yield TargetGroup(position, target, kind, len(deltas), (min(ranks), max(ranks)), (min(scales), max(scales)))


def _warnings(
    checkpoint: Checkpoint, adapters: Sequence[tuple[Adapter, float]], uses: Sequence[AdapterUse]
) -> Iterator[str]:
    known = _base_names(checkpoint)
    for (adapter, weight), use in zip(adapters, uses, strict=True):
        yield from adapter.warnings
        if use.unmatched:
            yield f"{adapter.path}: {len(use.unmatched)} tensors fit nothing and were left out: {listed(use.unmatched)}"
        if adapter.scale_assumed:
            yield f"{adapter.path} says nothing about alpha: its scale was taken to be 1"
        if weight == 0:
            yield f"{adapter.path} has weight 0 and changes nothing"
        if adapter.names_base is not None and _short(adapter.names_base) not in known:
            yield (
                f"{adapter.path} says it was trained on {adapter.names_base!r}; this base is "
                f"{sorted(known)[0]!r}. If that is the same model under another name, all is well"
            )


def _base_names(checkpoint: Checkpoint) -> set[str]:
    """The names this base goes by: its folder's, its Hub cache's, its config's."""
    path = os.path.realpath(checkpoint.path)
    names = {_short(os.path.abspath(checkpoint.path)), _short(path)}
    cached = re.search(r"models--[^/]*--([^/]+)/snapshots/", path.replace(os.sep, "/") + "/")
    if cached:
        names = {_short(cached[1])}
    own = checkpoint.config.get("_name_or_path")
    return names | ({_short(own)} if isinstance(own, str) and own else set())


def _short(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()
