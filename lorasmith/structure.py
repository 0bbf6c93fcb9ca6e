"""What the adapted model is made of: every tensor it has, under its stored name, and what it is read from.

A checkpoint leaves tensors out that the model has: those tied to another (``lm_head`` to ``embed_tokens``), and the
copies that ``layer_replication`` makes of layers. Here all of them are entries that can be changed; an entry that is
not stored has the byte range of the one it repeats.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorasmith.adapter import Adapter
from lorasmith.checkpoint import Checkpoint
from lorasmith.errors import AdapterMismatch, BadOption, Unsupported
from lorasmith.naming.conversions import runtime_names, steps_of
from lorasmith.naming.ties import ties_of, with_head
from lorasmith.safefile import TensorEntry

TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
"""Task types of PEFT that put a new head on a model, and how transformers ends the names of such classes."""

HEADED_TASKS = {
    "CAUSAL_LM": ("ForCausalLM", "LMHeadModel"),
    "SEQ_2_SEQ_LM": ("ForConditionalGeneration",),
}
"""Task types for which a base may have been saved without the head that belongs to it."""

_FAMILY = re.compile(r"^(?P<family>.{1,100}?)(For[A-Z]\w+|LMHeadModel|LMHead|DoubleHeadsModel|Model)$")
LABELS = re.compile(
    r"(^|\.)(score|classifier|(classifier|classification_head)\.out_proj|classifier\.\d+)\.(weight|bias)$"
)
"""Parameters whose rows are the labels of a classification."""

_LAYER = re.compile(r"^(?P<stem>(?:.*\.)?(?:layers|layer|h))\.(?P<number>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class Structure:
    """The adapted model: ``tensors`` by name, and ``ties``, from the name of a tied tensor to the one it repeats.

    ``architecture`` is its class, and ``takes_heads`` says that this may have layers that the base's has not.
    ``layer_map`` gives for each of its layers the base's that it is a copy of; None where all are as they were.
    ``ties_known`` is False where the model ties tensors and it cannot be told which.
    """

    tensors: Mapping[str, TensorEntry]
    ties: Mapping[str, str]
    architecture: str | None
    takes_heads: bool
    layer_map: tuple[int, ...] | None
    ties_known: bool

    def group(self, name: str) -> tuple[str, ...]:
        """The source of the tie that a tensor is in, and all that repeat it; just the tensor if it is in none."""
        source = self.ties.get(name, name)
        return (source, *(member for member, its_source in self.ties.items() if its_source == source))


def open_structure(checkpoint: Checkpoint, adapters: Sequence[Adapter], architecture: str | None) -> Structure:
    """The structure that a base has with these adapters on it.

    ``architecture`` names the model's class if the adapters make another one of it than their task types say. Raises
    AdapterMismatch when adapters disagree about it.
    """
    layer_map = _layer_map(adapters)
    stored = {entry.name: entry for entry in checkpoint.entries}
    if layer_map is not None:
        stored = dict(_replicate(checkpoint, stored, layer_map))
    own, of_task = _architectures(checkpoint, adapters)
    name = architecture or of_task or own
    ties = _stored_ties(checkpoint, name, stored)
    known = ties or {}
    repeated = {
        member: replace(stored[source], name=member) for member, source in known.items() if member not in stored
    }
    return Structure(
        tensors={**stored, **repeated},
        ties=known,
        architecture=name,
        takes_heads=name != own or of_task is not None or own is None,
        layer_map=layer_map,
        ties_known=ties is not None,
    )


def _architectures(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> tuple[str | None, str | None]:
    """The class of the base, and that of what the adapters' task makes of it."""
    names = checkpoint.config.get("architectures")
    own = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    said = {task for adapter in adapters if isinstance(task := adapter.config.get("task_type"), str)}
    tasks = said & TASKS.keys()
    if len(tasks) > 1:
        raise AdapterMismatch(
            f"the adapters are for different tasks ({', '.join(sorted(tasks))}); name the class of the result with "
            "--architecture"
        )
    match = _FAMILY.match(own or "")
    if tasks and match:
        return own, match["family"] + TASKS[tasks.pop()]
    endings = [ending for task in sorted(said & HEADED_TASKS.keys()) for ending in HEADED_TASKS[task]]
    return own, with_head(own or "", endings)


def _stored_ties(
    checkpoint: Checkpoint, architecture: str | None, stored: Mapping[str, TensorEntry]
) -> dict[str, str] | None:
    """Ties by the names that the checkpoint has for tensors; a tie's source is one that is stored.

    A base that was saved without its head lacks the first word of names. None where a class ties tensors and the
    checkpoint has neither of their names.
    """
    own = checkpoint.config.get("architectures")
    of_base = own[0] if isinstance(own, list) and own and isinstance(own[0], str) else architecture
    steps = steps_of(checkpoint.config, of_base)
    names = {name: source for name, source in runtime_names(steps, list(stored)).items() if isinstance(source, str)}
    pairs = ties_of(checkpoint.config, architecture, list(names))
    if not pairs:
        return None if pairs is None else {}
    stems = {name.partition(".")[0] + "." for pair in pairs.items() for name in pair if name.count(".") > 1}
    ties: dict[str, str] = {}
    for pair in pairs.items():
        for stem in ["", *sorted(stems)]:
            member, source = (name.removeprefix(stem) for name in pair)
            if source in names:
                ties[names.get(member, member)] = names[source]
                break
            if member in names:  # transformers, too, takes the one that is there
                ties[source] = names[member]
                break
        else:
            return None
    return {member: source for member, source in ties.items() if source not in ties}


# ------------------------------------------------------------------------------------------- replicated layers


def _layer_map(adapters: Sequence[Adapter]) -> tuple[int, ...] | None:
    """Which of the base's layers each layer of the model is a copy of (PEFT, ``replicate_layers``)."""
    wanted = [adapter.config.get("layer_replication") for adapter in adapters]
    maps = {_expand(adapter.path, ranges) for adapter, ranges in zip(adapters, wanted, strict=True) if ranges}
    if not maps:
        return None
    if len(maps) > 1 or not all(wanted):
        raise AdapterMismatch("the adapters replicate layers differently (layer_replication); merge them one by one")
    return maps.pop()


def _expand(path: str, ranges: object) -> tuple[int, ...]:
    pairs = ranges if isinstance(ranges, list) else []
    good = all(
        isinstance(pair, list) and len(pair) == 2 and all(type(one) is int and 0 <= one <= 10_000 for one in pair)
        for pair in pairs
    )
    numbers = [number for start, stop in pairs for number in range(start, stop)] if good else []
    if not numbers or len(numbers) > 10_000:
        raise BadOption(f"{path}: layer_replication = {ranges!r:.100} is not a list of [first, beyond] layers")
    return tuple(numbers)


def _replicate(
    checkpoint: Checkpoint, stored: Mapping[str, TensorEntry], layer_map: Sequence[int]
) -> Iterator[tuple[str, TensorEntry]]:
    """The tensors with the model's own layer numbers: copies are read from the layer they are made from."""
    layers: dict[str, dict[int, dict[str, TensorEntry]]] = {}
    for name, entry in stored.items():
        match = _LAYER.match(name)
        if match is None:
            yield name, entry
        else:
            layers.setdefault(match["stem"], {}).setdefault(int(match["number"]), {})[match["rest"]] = entry
    if len(layers) != 1:
        raise Unsupported(
            f"{checkpoint.path} has {len(layers)} stacks of layers ({', '.join(sorted(layers)) or 'none'}), so which "
            "one layer_replication means cannot be known"
        )
    ((stem, numbered),) = layers.items()
    for number, original in enumerate(layer_map):
        if original not in numbered:
            raise AdapterMismatch(
                f"{checkpoint.path} has no layer {original} to replicate (layer_replication); it has {len(numbered)}"
            )
        for rest, entry in numbered[original].items():
            name = f"{stem}.{number}.{rest}"
            yield name, replace(entry, name=name)


def config_changes(
    checkpoint: Checkpoint, structure: Structure, *, untied: bool, rows: Mapping[str, int], heads: Mapping[str, int]
) -> dict[str, Any]:
    """The keys of the base's config that the result's must have otherwise.

    ``untied`` says that tensors which the base ties are stored one by one, ``rows`` gives the new number of rows of
    tensors that have another, and ``heads`` that of new layers.
    """
    config = dict(checkpoint.config)
    if untied:
        config = _with(config, "tie_word_embeddings", False, always=True)
        config = _with(config, "scale_decoder_outputs", False, always=False)  # T5's, from transformers 5 on
    for name, count in rows.items():
        if not LABELS.search(name):
            old = structure.tensors[name].shape[0]
            config = _with(config, "vocab_size", count, always=old == config.get("vocab_size"))
    if structure.layer_map is not None:
        config = _with_layers(config, structure.layer_map)
    names = config.get("architectures")
    needed = untied or heads
    if needed and structure.architecture and isinstance(names, list) and names[:1] != [structure.architecture]:
        config["architectures"] = [structure.architecture]
    outputs = [count for name, count in {**heads, **rows}.items() if LABELS.search(name) and name.endswith("weight")]
    labels = outputs[-1] if outputs else 0
    ours = config.get("id2label")
    if labels and labels != (len(ours) if isinstance(ours, Mapping) else 2):
        config["id2label"] = {str(number): f"LABEL_{number}" for number in range(labels)}
        config["label2id"] = {f"LABEL_{number}": number for number in range(labels)}
    return {key: value for key, value in config.items() if value != checkpoint.config.get(key)}


def _with(config: Mapping[str, Any], key: str, value: Any, *, always: bool) -> dict[str, Any]:
    """The config with a key set wherever it has it; at its top in any case if ``always``."""
    changed = {
        name: _with(part, key, value, always=False) if name.endswith("_config") and isinstance(part, Mapping) else part
        for name, part in config.items()
    }
    if always or key in config:
        changed[key] = value
    return changed


def _with_layers(config: Mapping[str, Any], layer_map: Sequence[int]) -> dict[str, Any]:
    """The config with its number of layers, and what it says layer by layer, as the replication makes them."""
    key = next((one for one in ("num_hidden_layers", "n_layer", "num_layers") if one in config), "num_hidden_layers")
    before = config.get(key)
    changed = {**config, key: len(layer_map)}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == before and name.startswith("layer"):
            changed[name] = [value[number] for number in layer_map]
    return changed
