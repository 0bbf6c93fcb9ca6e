"""Beginnings of module paths: what stands before the layers, and what of it means the same.

A vision-language model's layers are ``language_model.model.layers.0…`` in one release of a library,
``model.language_model.layers.0…`` in the next, and ``model.layers.0…`` where the language model is taken out; a base
saved without its head lacks ``bert.`` or ``transformer.``. A stem of an adapter is mapped to one of the base as a
whole, if that has all the layers, and to a language model's only if it is one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_TOWER = re.compile(r"^((vision_tower|vision_model|visual|vision_encoder|image_encoder)\.)+")

_PART = re.compile(r"vision|visual|image|audio|speech|(^|\.)(encoder|decoder)\.$")

TEXT = frozenset({
    "", "model.", "language_model.", "language_model.model.", "model.language_model.", "model.language_model.model.",
    "text_model.model.", "model.text_model.", "model.text_model.model.", "thinker.model.", "model.model.",
    "thinker.model.language_model.", "backbone.", "llm.model.", "llm.", "vlm.language_model.",
    "vlm.model.language_model.",
})  # fmt: skip
"""What may stand before the layers of a language model."""

HEADS = ("lm_head.", "embed_out.", "language_model.lm_head.", "model.lm_head.", "text_model.lm_head.", "llm.lm_head.",
         "thinker.lm_head.", "model.language_model.lm_head.")  # fmt: skip
"""Names of output heads over the vocabulary; a model has one of them."""


def stem_of(name: str) -> tuple[str, str] | None:
    """What stands before a parameter's layer, and the rest; None for one that is in no numbered layer."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts[:-1]) if place and part.isdigit()), None)
    if number is None:
        return None
    stem = "".join(f"{part}." for part in parts[: number - 1])
    return stem, name[len(stem) :]


def stems(names: Iterable[str]) -> dict[str, list[str]]:
    """The stems of numbered layers, each with the rests of its names."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = stem_of(name)
        if parts is not None:
            found.setdefault(parts[0], []).append(parts[1])
    return found


def is_part(stem: str) -> bool:
    """Whether layers that something stands before are a part of a model: a tower, an encoder or a decoder."""
    return _PART.search(stem) is not None


def candidates(stem: str, ours: Sequence[str], *, parts: bool) -> Iterator[list[str]]:
    """Stems of the base that an adapter's may mean, those that are likelier first.

    They have more or fewer words in front, are both a language model's, or differ in what a tower is called. Layers of
    the base that nothing stands before are those of a part of a model only if it is one itself (``parts``); those of
    the adapter may be of any part.
    """
    others = [one for one in ours if one != stem]
    if not stem:
        yield others
        return
    yield [one for one in others if one and (one.endswith(f".{stem}") or stem.endswith(f".{one}"))]
    yield [one for one in others if one in TEXT] if stem in TEXT else []
    yield [one for one in others if one not in TEXT and stem not in TEXT and _canonical(one) == _canonical(stem)]
    yield [one for one in others if not one and (parts or not is_part(stem))]


def _canonical(stem: str) -> str:
    """A tower's stem with one word for all that the tower may be called."""
    inner = stem.removeprefix("model.")
    return _TOWER.sub("visual.", inner)


def moves(name: str, mapping: Mapping[str, str], ours: Iterable[str]) -> Iterator[str]:
    """Other names for a parameter in no numbered layer, given what has become of the stems of those that are."""
    for head in HEADS:
        if name.startswith(head):
            yield from (other + name.removeprefix(head) for other in HEADS if other != head)
            return
    for stem, other in sorted(mapping.items(), key=lambda pair: -len(pair[0])):
        for strip, add in ((stem, other), _difference(stem, other)):
            if name.startswith(strip) and strip != add:
                yield add + name.removeprefix(strip)
    if not mapping:
        for stem in TEXT:
            if name.startswith(stem) and stem:
                yield from (one + name.removeprefix(stem) for one in ours if one in TEXT and one != stem)
    yield f"model.{name}"
    if name.startswith("model."):
        yield name.removeprefix("model.")


def _difference(stem: str, other: str) -> tuple[str, str]:
    """Two stems without the words that both end with: ``bert.encoder.`` is ``encoder.`` with ``bert.`` before it."""
    mine, theirs = stem.split("."), other.split(".")
    while mine and theirs and mine[-1] == theirs[-1]:
        mine.pop()
        theirs.pop()
    return "".join(f"{part}." for part in mine), "".join(f"{part}." for part in theirs)


def prefix_rules(wanted: Sequence[str], names: Iterable[str], *, parts: bool) -> list[tuple[str, str]]:
    """Prefixes to take off and put on, read off the base tensors that end like some of the wanted names.

    See ``candidates`` for ``parts``.
    """
    rules: dict[tuple[str, str], None] = {}
    by_tail: dict[str, list[str]] = {}
    for name in names:
        by_tail.setdefault(tail(name), []).append(name)
    for name in wanted[:: max(1, len(wanted) // 8)]:
        for candidate in by_tail.get(tail(name), []):
            bare = (stem_of(candidate) or ("?", ""))[0] == ""
            if name.endswith("." + candidate) and (parts or not bare or not is_part(name.removesuffix(candidate))):
                rules[name.removesuffix(candidate), ""] = None
            elif candidate.endswith("." + name):
                rules["", candidate.removesuffix(name)] = None
    return list(rules)


def tail(name: str) -> str:
    """The last two words of a name."""
    return ".".join(name.split(".")[-2:])


def settle(
    wanted: Sequence[str], ours: Sequence[str], fits: Callable[[str, Sequence[str]], bool], *, parts: bool
) -> tuple[dict[str, str], list[tuple[str, list[str]]]]:
    """For each stem among the wanted names, the base's that it means, and those which may mean several.

    ``fits`` says whether all of some names are there.
    """
    mapping: dict[str, str] = {}
    doubtful: list[tuple[str, list[str]]] = []
    for stem, rests in stems(wanted).items():
        if fits(stem, rests):
            mapping[stem] = stem
            continue
        found = next(
            (some for group in candidates(stem, ours, parts=parts) if (some := [o for o in group if fits(o, rests)])),
            [],
        )
        if len(found) == 1:
            mapping[stem] = found[0]
        elif found:
            doubtful.append((stem, found))
    return mapping, doubtful
