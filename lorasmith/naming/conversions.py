"""How transformers 5 renames and rearranges a checkpoint's tensors on loading: what each is called in the model.

``conversions.json`` is read off ``transformers.conversion_mapping``: entries by model type or class, each a list of
steps. All renamings apply to a name, one after the other; then at most one conversion takes it, which makes one or
several parameters of one or several tensors (``operations``). Parts of a model, such as the language model behind a
vision tower, have entries of their own, which apply below the part's path. ``save_pretrained`` goes the other way, so
that the names on disk are always those on the left, while an adapter trained with transformers 5 has those on the
right.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

LONGEST = 1000
"""Characters of a name that any rule is tried on; transformers has none that is a third of this."""

LEGACY = "legacy"
"""The entry of all models."""


@dataclass(frozen=True)
class Step:
    """Patterns for names of stored tensors, what takes the place of what matches, and what is done to the tensors.

    ``scopes`` are the beginnings of names below which it applies, the first that fits; no ``operations`` make it a
    renaming. ``offset`` is added to the number in a name; a ``guarded`` step applies only if its first pattern does.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    scopes: tuple[str, ...] = ("",)
    offset: int = 0
    guarded: bool = False

    def apply(self, name: str) -> tuple[str, int] | None:
        """The name after the step, and the number of the pattern that matched; None where none does."""
        if not any(word in name for word in _words(self.sources)):
            return None
        scope = next((scope for scope in self.scopes if name.startswith(scope)), None)
        rest = None if scope is None else name.removeprefix(scope)
        match = None if rest is None else _compiled(self.sources).search(rest)
        if match is None or scope is None or rest is None:
            return None
        label = next(label for label, found in match.groupdict().items() if found is not None)
        number = int(label[1:])
        target = self.targets[number if self.guarded else 0]
        if r"\1" in target:
            inner = match.group(match.re.groupindex[label] + 1)
            target = target.replace(r"\1", str(int(inner) + self.offset) if self.offset else inner)
        return scope + rest.replace(match[0], target, 1), number


@functools.cache
def _words(sources: tuple[str, ...]) -> tuple[str, ...]:
    """For every pattern a word that is in all names it matches: looking for that is quicker than matching."""
    return tuple("" if re.search(r"[(\[|?]", one) else max(re.findall(r"\w*", one), key=len) for one in sources)


@functools.cache
def _compiled(sources: tuple[str, ...]) -> re.Pattern[str]:
    """Alternatives for a step's patterns, the longest first; ``*.`` is any part, and a word ends where it ends."""
    branches = []
    for number, source in sorted(enumerate(sources), key=lambda pair: -len(pair[1])):
        pattern = source.replace("*.", r".*\.")
        if pattern[-1].isalnum() and pattern[-1].isascii():
            pattern += r"(?!\w)"
        branches.append(f"(?P<g{number}>{pattern})")
    return re.compile("|".join(branches))


@dataclass(frozen=True)
class Made:
    """What a parameter of the running model is made of: for each of a step's patterns, names of stored tensors."""

    step: Step
    sources: tuple[tuple[str, ...], ...]
    target: int


@functools.cache
def _table() -> Mapping[str, Any]:
    text = resources.files("lorasmith.naming").joinpath("conversions.json").read_text(encoding="utf-8")
    table: Mapping[str, Any] = json.loads(text)
    return table


@functools.cache
def _entries() -> Mapping[str, Sequence[Mapping[str, Any]]]:
    return {key: one["steps"] for one in _table()["entries"] for key in one["keys"]}


@functools.cache
def _parts() -> Mapping[str, Mapping[str, Any]]:
    return {name: one for one in _table()["parts"] for name in one["classes"]}


def is_known(model_type: object) -> bool:
    """Whether the table was made by a transformers that has this type of model."""
    return model_type in _table()["model_types"]


def steps_of(config: Mapping[str, Any], architecture: str | None) -> tuple[Step, ...]:
    """The steps for a checkpoint with this config, in their order (transformers, ``get_model_conversion_mapping``)."""
    steps: list[Step] = []
    claimed: list[tuple[str, str]] = []
    whole = _parts().get(architecture or "", {})
    prefix = whole.get("prefix", "")
    model_type = _text(config.get("model_type"))
    for path, name, kind in [("", architecture, model_type), *_parts_in(config, whole)]:
        above = {key for key, place in claimed if not place or path.startswith(place + ".")}
        if name in above:
            continue
        key = name if name in _entries() else kind
        if key not in _entries() or (key == kind and kind in above):
            continue
        steps += _scoped(_entries()[key or ""], path, prefix)
        claimed += [(one, path) for one in ([name] if key == name else [name, kind]) if one]
    return (*steps, *_scoped(_entries()[LEGACY], "", ""))


def _parts_in(config: Mapping[str, Any], whole: Mapping[str, Any]) -> Iterator[tuple[str, str | None, str | None]]:
    """Path, class and model type of a model's parts, as its config has chosen them.

    Of a class that the table lacks because its parts are anybody's choice, the config names parts by their paths.
    """
    for key, part in config.items() if not whole else ():
        if isinstance(part, Mapping) and isinstance(part.get("model_type"), str) and not key.endswith("_config"):
            yield key, _table()["classes"].get(part["model_type"]), part["model_type"]
    for path, where, usual, usual_type in whole.get("parts", ()):
        own: Any = config
        for key in where:
            own = own.get(key) if isinstance(own, Mapping) else None
        kind = _text(own.get("model_type")) if isinstance(own, Mapping) else None
        if kind is None or kind == usual_type:
            yield path, usual, usual_type
        else:
            yield path, _table()["classes"].get(kind), kind


def path_of(config: Mapping[str, Any], architecture: str | None, name: str | None) -> str | None:
    """Where a model of some class has its only part of another one; None where it has none, or several."""
    parts = _parts_in(config, _parts().get(architecture or "", {}))
    paths = [path for path, kind, _ in parts if kind is not None and kind == name]
    return paths[0] if len(paths) == 1 else None


def _scoped(steps: Iterable[Mapping[str, Any]], path: str, prefix: str) -> Iterator[Step]:
    """An entry's steps for the part at ``path``; names may lack the prefix of the model's body."""
    scopes: tuple[str, ...] = ("",)
    if path:
        below = path.removeprefix(prefix).removeprefix(".")
        below = f"{below}." if below else ""
        scopes = (f"{prefix}.{below}" if prefix else below, below)
    for one in steps:
        operations = tuple((name, facts) for name, facts in one.get("operations", ()))
        yield Step(
            tuple(one["from"]), tuple(one["to"]), operations, scopes, one.get("offset", 0), one.get("guarded", False)
        )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def runtime_names(steps: Sequence[Step], names: Sequence[str]) -> dict[str, str | Made]:
    """The parameters of the running model, by name: what a stored tensor is called, or what they are made of.

    Of tensors that get one name between them, none is known by it.
    """
    renamings = [step for step in steps if not step.operations]
    converters = [step for step in steps if step.operations]
    active = [step for step in renamings if not step.guarded or _is_active(step, names)]
    found: dict[str, str | Made] = {}
    clashes: set[str] = set()
    collected: dict[tuple[str, int], list[list[str]]] = {}
    for name in names:
        renamed = name
        if len(name) > LONGEST:
            found[name] = name
            continue
        for step in active:
            moved = step.apply(renamed)
            renamed = renamed if moved is None else moved[0]
        for number, step in enumerate(converters):
            moved = step.apply(renamed)
            if moved is not None:
                groups = collected.setdefault((moved[0], number), [[] for _ in step.sources])
                groups[moved[1]].append(name)
                break
        else:
            clashes |= {renamed} if renamed in found else set()
            found[renamed] = name
    found = {name: source for name, source in found.items() if name not in clashes}
    for (first, number), groups in collected.items():
        step = converters[number]
        sources = tuple(tuple(sorted(group, key=natural)) for group in groups)
        for target, pattern in enumerate(_targets(step, first)):
            found[pattern] = Made(step, sources, target)
    return found


def _targets(step: Step, first: str) -> Iterator[str]:
    """The names of all parameters that a conversion makes, given that of the first."""
    plain = [target.replace("\\.", ".") for target in step.targets]
    for target in plain:
        before, _, after = first.partition(plain[0])
        yield before + target + after


def _is_active(step: Step, names: Iterable[str]) -> bool:
    """Whether the first pattern of a guarded step matches any name, without which the others mean the new ones."""
    return any((moved := step.apply(name)) is not None and moved[1] == 0 for name in names)


def natural(name: str) -> list[tuple[int, int, str, int]]:
    """A key by which numbers in names sort as numbers."""
    key = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        number = int(part[len(text) :] or "-1")
        key.append((0, number, "", 0) if not text else (1, 0, text, number))
    return key
