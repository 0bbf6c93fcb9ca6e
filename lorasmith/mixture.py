"""What a mix is made of: adapters in, module by module what is to be summed; whatever cannot be right is refused here.

deltas of one module, of however many adapters     ──> Module: one product is made of them
what is no product: layers trained whole, biases,  ──> Whole: taken over as it is, or weighted against the base
rows of tokens
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lorasmith.adapter import Adapter, ModuleDelta, short
from lorasmith.assembly import Bound
from lorasmith.binding import bind
from lorasmith.checkpoint import Checkpoint
from lorasmith.combining import LINEAR, Method
from lorasmith.combining.combined import Combined, Source, draw_name
from lorasmith.deltas import Delta
from lorasmith.deltas.addition import Addition
from lorasmith.deltas.experts import Stacked
from lorasmith.deltas.token_rows import TokenRows
from lorasmith.errors import AdapterMismatch, BadOption, Unsupported, listed
from lorasmith.formats.peft import plain_names
from lorasmith.formats.stacks import is_by_expert
from lorasmith.formats.writing import Site, site_of, stack_of
from lorasmith.naming.stems import TEXT, stems
from lorasmith.safefile import TensorEntry
from lorasmith.structure import open_structure
from lorasmith.weightfile import read_weights
from lorasmith.wholes import Weighted, Whole, is_base, named, weighed, whole_tensors


@dataclass(frozen=True)
class Part:
    """What the adapter at a position does to a module, (outputs, inputs), its weight there, and what names both
    to what is drawn.
    """

    adapter: int
    delta: Delta
    weight: float
    digest: str
    name: str


@dataclass(frozen=True)
class Module:
    """One product of the mix: the ``parts`` it is made of, and the biases on them, each with its weight.

    Of stacked experts, it is one ``expert``'s.

    Where what comes out is not of low rank by itself, ``dense`` is the whole combination on the ``entry`` it reads from
    the base, if it does; ``turned`` says that it stands the other way round than the module's factors.
    """

    site: Site
    parts: tuple[Part, ...]
    biases: tuple[tuple[Addition, float], ...] = ()
    dense: Combined | None = None
    entry: TensorEntry | None = None
    turned: bool = False
    expert: int = -1

    @property
    def name(self) -> str:
        """What the module is called in a report."""
        return self.site.path if self.expert < 0 else f"{self.site.path}[{self.expert}]"

    @property
    def rank(self) -> int:
        """The rank of all parts together."""
        return sum(part.delta.rank for part in self.parts)


@dataclass(frozen=True)
class Mixture:
    """Everything that a mix is made of, from ``adapters`` with their weights.

    ``dropped`` says that some modules of theirs have the weight 0.
    """

    adapters: tuple[tuple[Adapter, float], ...]
    modules: tuple[Module, ...]
    wholes: tuple[Whole, ...]
    method: Method
    dropped: bool
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def gather(adapters: Weighted, method: Method, *, prefer: int | None = None, base: Checkpoint | None = None) -> Mixture:
    """Sort out what adapters have for each module.

    ``prefer`` is the position of the adapter whose tensors count where they cannot be combined; ``base`` is the model
    against which they can. Raises AdapterMismatch where adapters do not go together, Unsupported where it takes a base
    or PEFT could not load the result, BadOption.
    """
    if not adapters:
        raise BadOption("no adapter was given: lorasmith mix ADAPTER[:WEIGHT]... -o OUT")
    if base is None:
        _require_one_base([adapter for adapter, _ in adapters])
        _require_one_naming([adapter for adapter, weight in adapters if weight])
    bound = _bind(base, adapters)
    notes: list[str] = []
    modules = tuple(_modules(adapters, method, bound))
    if not modules:
        raise BadOption("the weights leave no LoRA to mix: all of it has the weight 0")
    adapted = {module.site.module for module in modules}
    wholes = tuple(named(one, adapted) for one in whole_tensors(adapters, prefer, bound, notes))
    _require_loadable(adapters, modules, wholes)
    weighing = [adapter for adapter, weight in adapters if weight]
    had = {(one.module, one.parameter) for adapter in weighing for one in adapter.deltas if one.delta.rank}
    return Mixture(
        tuple(adapters),
        modules,
        wholes,
        method,
        len(had) > len(modules),
        tuple(dict.fromkeys([*(note for adapter, _ in adapters for note in adapter.notes), *notes])),
        (*_warnings(adapters, modules), *(_parts_of_one_name(adapters) if base is None else ())),
    )


def _require_one_base(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that name different bases: their modules are alike by accident."""
    named = {short(one.names_base): one for one in adapters if one.names_base}
    if len(named) > 1:
        (first, one), (second, other) = list(named.items())[:2]
        raise AdapterMismatch(
            f"{one.path} says it was trained on {one.names_base!r} and {other.path} on {other.names_base!r}: a mix of "
            f"both fits neither. If {first} and {second} are the same model, say which with --base BASE"
        )


def _require_one_naming(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that call the layers of a language model by different names: PEFT would find only one's."""
    known: dict[str, tuple[Adapter, set[str]]] = {}
    for adapter in adapters:
        found = {name: set(rests) for name, rests in stems(one.path for one in adapter.deltas).items() if name in TEXT}
        for name, rests in found.items():
            for other, (first, theirs) in known.items():
                if other not in found and name != other and rests & theirs:
                    layer = min(rests & theirs)
                    raise AdapterMismatch(
                        f"{first.path} has {other + layer!r} and {adapter.path} has {name + layer!r}: they were "
                        "trained with different releases of transformers, or in different wrappings of the model, and "
                        f"a mix has one name for a layer. {_MERGE}"
                    )
        known |= {name: (adapter, rests) for name, rests in found.items() if name not in known}


def _bind(base: Checkpoint | None, adapters: Weighted) -> dict[int, Bound] | None:
    """Every delta that is on the whole of a base's tensor, by the delta's identity; None without a base."""
    if base is None:
        return None
    structure = open_structure(base, [adapter for adapter, _ in adapters], None)
    weighing = [adapter for adapter, weight in adapters if weight]
    bindings = [bind(base, structure, adapter) for adapter in weighing]
    names: dict[str, tuple[str, bool, str]] = {}
    places: dict[str, tuple[set[str], str]] = {}
    for adapter, binding in zip(weighing, bindings, strict=True):
        targets: dict[str, set[str]] = {}
        for one in binding.bound:
            targets.setdefault(one.source.path, set()).add(one.target.name)
        for layer, ours in targets.items():
            theirs, path = places.setdefault(layer, (ours, adapter.path))
            if theirs.isdisjoint(ours):
                raise AdapterMismatch(
                    f"{layer!r} is {min(theirs)!r} to {path} and {min(ours)!r} to {adapter.path}, which were trained "
                    f"on two parts of the model; an adapter cannot have both under one name. {_MERGE}"
                )
        for one in binding.bound:
            called = one.source.module, one.is_whole, adapter.path
            name, is_whole, path = names.setdefault(one.target.name, called)
            if name != one.source.module and (is_whole or one.is_whole):
                raise AdapterMismatch(
                    f"{path} calls a layer {name!r} and {adapter.path} calls it {one.source.module!r}; an adapter can "
                    f"have only one name for it. {_MERGE}"
                )
    return {id(one.source): one for binding in bindings for one in binding.bound if one.is_whole}


def _require_loadable(adapters: Weighted, modules: Sequence[Module], wholes: Sequence[Whole]) -> None:
    """Refuse what no single LoraConfig of PEFT's can express."""
    sites = {module.site.module: module for module in modules}
    biased = any(module.biases for module in modules)
    for module in modules:
        if biased and module.site.embedding:
            raise Unsupported(
                f"{module.site.module!r} is an embedding, and another module has a bias on its LoRA (lora_bias), which "
                f"PEFT has not for embeddings; {_MERGE}"
            )
    for whole in wholes:
        rows = isinstance(whole.source.delta, TokenRows)
        replaces = rows or (whole.source.parameter == "weight" and not is_base(whole.source))
        if replaces and whole.source.module in sites:
            what = "single rows of" if rows else "all of"
            raise Unsupported(
                f"{adapters[whole.adapter][0].path} trains {what} {whole.source.module!r} ({whole.stored.name}), and "
                f"another adapter has a LoRA on it; PEFT loads only one of them. {_MERGE}"
            )


_MERGE = "Merge the adapters into the model instead: lorasmith merge BASE ADAPTER:WEIGHT... -o OUT"


# ----------------------------------------------------------------------------------------------------- products


def _modules(adapters: Weighted, method: Method, bound: Mapping[int, Bound] | None) -> Iterator[Module]:
    found: dict[tuple[str, str], list[tuple[int, ModuleDelta, float]]] = {}
    biases: dict[str, list[tuple[Addition, float]]] = {}
    for position, source, weight in weighed(adapters):
        if isinstance(source.delta, Addition):
            biases.setdefault(source.module, []).append((source.delta, weight))
        elif source.delta.rank:
            found.setdefault((source.module, source.parameter), []).append((position, source, weight))
    names: dict[int, Mapping[str, str]] = {}
    for (module, parameter), some in found.items():
        own = biases.get(module, []) if parameter == "weight" else []
        if any(isinstance(source.delta, Stacked) for _, source, _ in some):
            yield from _experts(adapters, method, some, names)
        else:
            yield _module(adapters, method, some, tuple(own), bound)


def _experts(
    adapters: Weighted,
    method: Method,
    some: Sequence[tuple[int, ModuleDelta, float]],
    names: dict[int, Mapping[str, str]],
) -> Iterator[Module]:
    """A module for every expert of a stack, with factors as they are stored; ``names`` are kept for the next stack."""
    sites = []
    for position, source, _ in some:
        if position not in names:
            names[position] = plain_names(read_weights(adapters[position][0].file)[0])
        sites.append(stack_of(source, names[position]) if isinstance(source.delta, Stacked) else None)
    site = sites[0]
    if site is None or any(one != site for one in sites):
        first, last = adapters[some[0][0]][0].path, adapters[some[-1][0]][0].path
        raise AdapterMismatch(
            f"{first} and {last} have factors of different shapes, or of other parameters beside them, for the stacked "
            f"experts {some[0][1].module}.{some[0][1].parameter}. {_MERGE}"
        )
    stacks = [_by_layout(adapters[position][0], source) for position, source, _ in some]
    for expert in range(site.experts):
        parts = tuple(
            Part(position, stack.expert(expert), weight, adapters[position][0].sha256, f"{draw_name(source)}[{expert}]")
            for (position, source, weight), stack in zip(some, stacks, strict=True)
        )
        module = Module(site, parts, expert=expert)
        yield module if method.space == "core" or method.is_linear else replace(module, dense=_combined(method, parts))


def _by_layout(adapter: Adapter, source: ModuleDelta) -> Stacked:
    assert isinstance(source.delta, Stacked)
    by_expert = is_by_expert(adapter.config)
    if by_expert is None:
        raise AdapterMismatch(
            f"{adapter.path}: lora_B_layout = {adapter.config.get('lora_B_layout')!r:.80} is not known, so it is not "
            f"known which columns of {source.tensors[1]!r} belong to which expert"
        )
    return replace(source.delta, by_expert=by_expert)


def _combined(method: Method, parts: Sequence[Part]) -> Combined:
    sources = (Source(((part.delta, 1.0),), part.weight, part.digest, part.name) for part in parts)
    return Combined(method, tuple(sources))


def _module(
    adapters: Weighted,
    method: Method,
    some: Sequence[tuple[int, ModuleDelta, float]],
    biases: tuple[tuple[Addition, float], ...],
    bound: Mapping[int, Bound] | None,
) -> Module:
    sites = [site_of(adapters[position][0], source) for position, source, _ in some]
    for (position, source, _), site in zip(some, sites, strict=True):
        if site != sites[0]:
            first, other = (adapters[at][0].path for at in (some[0][0], position))
            if site.parameter != sites[0].parameter:
                raise AdapterMismatch(
                    f"{first} and {other} adapt {site.module!r} in two ways, as a module and by its parameter's name "
                    f"(target_parameters), and PEFT takes only one of them. {_MERGE}"
                )
            raise AdapterMismatch(
                f"{first} has a delta of shape {list(sites[0].shape)} for {sites[0].module!r} and {other} one of "
                f"{list(site.shape)} ({source.tensors[0]}): they were trained on different models or layers"
            )
    site = sites[0]
    parts = tuple(
        Part(position, site.turned(source.delta), weight, adapters[position][0].sha256, draw_name(source))
        for position, source, weight in some
    )
    on_base = [source for _, source, _ in some if source.delta.needs_base]
    if on_base and bound is not None and any(id(source) not in bound for _, source, _ in some):
        raise Unsupported(
            f"{adapters[some[0][0]][0].path}: {on_base[0].module!r} is no whole tensor of the base, and "
            f"{on_base[0].delta.kind} is mixed only against one. {_MERGE}"
        )
    if on_base and bound is None:
        raise Unsupported(
            f"{adapters[some[0][0]][0].path}: what {on_base[0].delta.kind} does to {on_base[0].module!r} depends on "
            "the base, so it can only be mixed against one: lorasmith mix ... --base BASE --rank N. Or merge them "
            "straight into the model: lorasmith merge BASE ADAPTER:WEIGHT... -o OUT"
        )
    if on_base and not method.is_linear and method.space != "dense":
        raise Unsupported(
            f"{on_base[0].delta.entries[0].name!r} belongs to a {on_base[0].delta.kind}, which is of no low rank, so "
            f"that --method {method.name} has no core to work on; use --space dense, or the plain sum"
        )
    if not on_base and (method.space == "core" or method.is_linear):
        return Module(site, parts, biases)
    return _dense(adapters, method, some, Module(site, parts, biases), bound if on_base else None)


def _dense(
    adapters: Weighted,
    method: Method,
    some: Sequence[tuple[int, ModuleDelta, float]],
    module: Module,
    bound: Mapping[int, Bound] | None,
) -> Module:
    """The module with all its elements: on the base's tensor where a delta reads that, else as the factors stand."""
    deltas = [
        bound[id(source)].delta if bound else part.delta
        for (_, source, _), part in zip(some, module.parts, strict=True)
    ]
    first = some[0][1]
    turned = module.site.embedding != bool(bound and bound[id(first)].flipped)
    if not bound and turned:
        deltas = [delta.transposed() for delta in deltas]
    sources = tuple(
        Source(((delta, 1.0),), part.weight, part.digest, part.name, bool(bound and bound[id(source)].flipped))
        for delta, part, (_, source, _) in zip(deltas, module.parts, some, strict=True)
    )
    return Module(
        module.site,
        module.parts,
        module.biases,
        Combined(method if method.space == "dense" else LINEAR, sources),
        bound[id(first)].target if bound else None,
        turned,
    )


# ------------------------------------------------------------------------------------------------------ to tell


def _warnings(adapters: Weighted, modules: Sequence[Module]) -> Iterator[str]:
    for adapter, weight in adapters:
        yield from adapter.warnings
        if adapter.scale_assumed:
            yield f"{adapter.path} says nothing about alpha: its scale was taken to be 1"
        if weight == 0:
            yield f"{adapter.path} has weight 0 and is not in the mix"
    full = {one.names_base.rstrip("/"): None for one, _ in adapters if one.names_base}
    if len(full) > len({short(name) for name in full}):
        yield f"the adapters name different bases ({listed(list(full))}); if these are not one model, nothing fits"
    names: dict[str, str] = {}
    for module in modules:
        tail = re.sub(r"^.*?(?=\b(layers?|blocks?|h)\.\d)", "", module.name)
        other = names.setdefault(tail, module.name)
        if other != module.name and {part.adapter for part in module.parts}.isdisjoint(
            part.adapter for one in modules if one.name == other for part in one.parts
        ):
            yield (
                f"{other} and {module.name} are of different adapters and end alike; if they are the same layer "
                f"under two names, half of it is lost on loading. {_MERGE}"
            )
            return


def _parts_of_one_name(adapters: Weighted) -> Iterator[str]:
    """A warning of layers that are of one name in models of two classes, which may be parts of one model."""
    known: dict[str, tuple[str, Adapter]] = {}
    for adapter in (adapter for adapter, weight in adapters if weight):
        trained = adapter.trained_class
        if trained is None:
            continue
        for layer in (one.path for one in adapter.deltas):
            other, first = known.setdefault(layer, (trained, adapter))
            if other != trained:
                yield (
                    f"{first.path} was trained on a {other} and {adapter.path} on a {trained}, with {layer!r} in both: "
                    f"if these are two parts of a model, the mix fits neither. {_MERGE}"
                )
                break
