"""How an adapter stores what tuning has changed, so that PEFT computes with it what the tuned model computes.

a weight of a linear layer or a convolution   LoRA
a bias on one of those                        as it is, under its own name (``bias`` in the config): loading puts it
                                              in the base's place, exactly, which a LoRA's own bias would not
a norm's weight, an embedding                 the layer whole (``modules_to_save``), for loading wants all its tensors
parameters beside other layers                as they are, under their own names

PEFT takes a name in ``modules_to_save`` for the end of a module's name anywhere, and raises an error for a layer that
it finds in this way and that the file does not have whole (``_set_trainable``, ``set_peft_model_state_dict``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from lorasmith.binding import CONV1D_MODELS, CONV1D_MODULES
from lorasmith.checkpoint import Checkpoint
from lorasmith.difference import Pair, Paired
from lorasmith.formats.peft import PREFIX
from lorasmith.formats.writing import Site
from lorasmith.naming.ties import EMBEDDINGS, layer
from lorasmith.safefile import TensorEntry

_LOOKED_UP = re.compile(
    r"embed(dings?|s|der|s_layer)?$|emb$|^embed_(?!out$)|^pos(ition)?_emb|_tokens?$|^wpe$|_bias$|^codebook$"
    r"|reference_points$|^query_feat$|^patterns$"
)
"""What layers beside those of tokens are called that look rows up (``torch.nn.Embedding``) instead of multiplying."""

_ROUTERS = ("gate", "router", "input_linear", "output_linear", "group_linear", "codebooks_head")
"""What layers with a weight of their own are called that are no ``torch.nn.Linear``: PEFT has no LoRA for them."""


@dataclass(frozen=True)
class Low:
    """A weight whose change becomes a LoRA at ``site``; ``turned`` says that it is stored as (inputs, outputs)."""

    site: Site
    pair: Pair
    turned: bool


@dataclass(frozen=True)
class Whole:
    """A tensor of the tuned model that goes into the adapter as it is, under ``name``."""

    name: str
    entry: TensorEntry


@dataclass(frozen=True)
class Tuning:
    """Everything that tuning has changed, by how it is stored.

    ``saved`` are the layers in ``modules_to_save``, ``bias`` the config's word on biases, ``modules`` the paths of all
    the model's modules, and ``fan_in_fan_out`` says that linear layers store (inputs, outputs). Without any ``lows``,
    ``idle`` is a weight that could be one of them.
    """

    lows: tuple[Low, ...]
    wholes: tuple[Whole, ...]
    saved: tuple[str, ...]
    bias: str
    modules: frozenset[str]
    fan_in_fan_out: bool
    idle: Low | None

    def targets(self, adapted: Collection[str]) -> list[str]:
        """``target_modules``: names of layers that are adapted wherever they are, and paths of the others."""
        by_leaf: dict[str, list[str]] = {}
        for module in self.modules:
            by_leaf.setdefault(_leaf(module), []).append(module)
        return sorted(
            {_leaf(one) if all(other in adapted for other in by_leaf[_leaf(one)]) else one for one in adapted}
        )


def sort_out(base: Checkpoint, paired: Paired, changed: Collection[str], *, embeddings: str) -> Tuning:
    """Decide for every changed tensor how it is stored; ``embeddings`` of tokens are so ``whole`` or as ``lora``."""
    model = _Model(base, paired, changed, embeddings)
    whole = model.whole_modules()
    kept = [name for name in paired.pairs if name in changed and not _within(name, whole)]
    lows = tuple(model.low(paired.pairs[name]) for name in kept if model.is_low(name))
    loose = [name for name in kept if not model.is_low(name)]
    free = (model.low(one) for name, one in paired.pairs.items() if model.is_low(name) and not _within(name, whole))
    idle = None if lows else next(free, None)
    adapted = {low.pair.module for low in (*lows, *([idle] if idle else []))}
    saved = [name for name in paired.pairs if _within(name, whole)]
    biases = {paired.pairs[name].module for name in loose if paired.pairs[name].parameter == "bias"}
    names = {name: _own_name(paired.pairs[name], adapted) for name in [*saved, *loose]}
    return Tuning(
        lows=lows,
        wholes=tuple(Whole(names[name], paired.pairs[name].new) for name in [*saved, *loose]),
        saved=tuple(sorted(whole)),
        bias="none" if not biases else "lora_only" if biases <= adapted else "all",
        modules=model.modules,
        fan_in_fan_out=any(low.turned and not low.site.embedding for low in (*lows, *([idle] if idle else []))),
        idle=idle,
    )


def _own_name(pair: Pair, adapted: Collection[str]) -> str:
    """What PEFT calls a parameter of the base; a layer with a LoRA has become part of another."""
    inner = ".base_layer" if pair.module in adapted else ""
    return f"{PREFIX}{pair.module}{inner}.{pair.parameter}" if pair.module else f"{PREFIX}{pair.parameter}"


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _within(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _above(module: str) -> Iterator[str]:
    """A module and all that it is in."""
    while module:
        yield module
        module = module.rpartition(".")[0]


class _Model:
    """What is known of a model's layers from their tensors."""

    def __init__(self, base: Checkpoint, paired: Paired, changed: Collection[str], embeddings: str) -> None:
        self._pairs: Mapping[str, Pair] = paired.pairs
        self._groups = paired.groups
        self._changed = changed
        self._lora_embeddings = embeddings == "lora"
        self._own = {pair.module for pair in self._pairs.values()}
        self.modules = frozenset(one for module in self._own for one in _above(module))
        self._containers = {one.rpartition(".")[0] for one in self.modules}
        self._turns = _stores_inputs_first(base, self._pairs)

    def is_low(self, name: str) -> bool:
        """Whether a parameter's change can be a LoRA."""
        pair = self._pairs[name]
        shape = pair.old.shape
        if pair.parameter != "weight" or pair.resized or not 2 <= len(shape) <= 5 or not prod(shape):
            return False
        leaf, parent = _leaf(pair.module), pair.module.rpartition(".")[0]
        if self._is_embedding(name):
            return self._lora_embeddings and len(shape) == 2
        if leaf in _ROUTERS or (len(shape) == 2 and _LOOKED_UP.search(leaf)):
            return False
        if f"{parent}.in_proj_weight" in self._pairs:  # torch's attention reads its output's weight past any LoRA
            return False
        return len(shape) == 2 or shape[1] > 1  # of depth-wise convolutions PEFT's factors are no smaller than they

    def _is_embedding(self, name: str) -> bool:
        return layer(name) in EMBEDDINGS

    def low(self, pair: Pair) -> Low:
        """A weight's place in the adapter."""
        rows, columns = pair.old.matrix
        if self._is_embedding(pair.name):
            return Low(Site(pair.module, (columns, rows), embedding=True), pair, turned=True)
        if self._turns and len(pair.old.shape) == 2 and _leaf(pair.module) in CONV1D_MODULES:
            return Low(Site(pair.module, (columns, rows)), pair, turned=True)
        return Low(Site(pair.module, (rows, columns), kernel=pair.old.shape[2:]), pair, turned=False)

    def whole_modules(self) -> set[str]:
        """Paths of the layers that are stored whole: those that must be, and those that PEFT takes for one of them."""
        wanted = {self._pairs[name].module for name in self._changed if self._is_whole(name)}
        for group in self._groups:  # tied layers are not tied any more once one of them is replaced
            if wanted & {self._pairs[name].module for name in group}:
                wanted |= {module for name in group if (module := self._pairs[name].module) not in self._containers}
        while more := {one for one in self.modules if one.endswith(tuple(wanted))} - wanted if wanted else set():
            wanted |= more
        return {one for one in wanted if not any(other in wanted for other in _above(one.rpartition(".")[0]))}

    def _is_whole(self, name: str) -> bool:
        """Whether a changed parameter takes its layer along, which must contain no others and floats only."""
        pair = self._pairs[name]
        if self.is_low(name) or not pair.module or pair.module in self._containers:
            return False
        if f"{pair.module}.running_mean" in self._pairs:  # beside it stands a counter that no adapter holds
            return False
        weight = self._pairs.get(f"{pair.module}.weight")
        return pair.parameter != "bias" or weight is None or len(weight.old.shape) == 1


def _stores_inputs_first(base: Checkpoint, pairs: Mapping[str, Pair]) -> bool:
    """Whether linear layers are transformers' ``Conv1D``, by the model's type or by a bias as long as a row."""
    parts = [base.config, *(one for one in base.config.values() if isinstance(one, Mapping))]
    if any(part.get("model_type") in CONV1D_MODELS for part in parts):
        return True
    layers = [
        (pair.old.shape, bias.old.shape)
        for pair in pairs.values()
        if _leaf(pair.module) in CONV1D_MODULES and (bias := pairs.get(f"{pair.module}.bias")) is not None
    ]
    return any(len(shape) == 2 and shape[0] != shape[1] and bias == shape[1:] for shape, bias in layers)
