"""The model card of a result: front matter that the Hub understands, and the recipe for people.

Written from the provenance record, which every result carries, so that a result can get its card at any time.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorasmith.combining import Method
from lorasmith.hub.silence import silence
from lorasmith.records import Survival

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")
"""What is still true of a base after adapters were merged into it."""

PROJECT = "lorasmith"

OPTIONS: Mapping[str, Any] = {
    "dtype": "keep",
    "device": "cpu",
    "max_shard_size": None,
    "tokenizer": None,
    "allow_unmatched": False,
    "allow_overflow": False,
    "architecture": None,
    "base_is_residual": False,
    "rename": [],
    "expert_layout": None,
}
"""Options of a merge that a record may have, and what they are unless they are given."""


def model_card(
    record: Mapping[str, Any],
    title: str,
    *,
    survival: Survival | None = None,
    base_card: str | None = None,
    library: str | None = None,
    single_file: bool = False,
) -> str:
    """The card of a merged model. ``base_card`` is the text of the base's, ``library`` what loads the result."""
    carried = front_matter(base_card)
    facts: dict[str, Any] = {key: carried[key] for key in CARRIED if _is_text(carried.get(key))}
    if library is not None:
        facts.setdefault("library_name", library)
    repos = base_models(record)
    if repos:
        facts |= {"base_model": repos, "base_model_relation": "merge"}
    facts["tags"] = [PROJECT, "merge", "lora"]
    where = "The header of the file" if single_file else "`lorasmith.json`"
    rest = _rest(record, survival, where)
    return _card(facts, [f"# {title}", "", *_merged(record), "", *_adapters(record), *rest])


def adapter_card(record: Mapping[str, Any], title: str, *, base: str | None, task: str | None = None) -> str:
    """The card of an adapter that was made from others, after PEFT's conventions. ``base`` is what it is for."""
    facts: dict[str, Any] = {"library_name": "peft", "tags": ["lora", PROJECT]}
    if base is not None:
        facts |= {"base_model": base, "base_model_relation": "adapter"}
        facts["tags"] = [f"base_model:adapter:{base}", *facts["tags"]]
    if task == "CAUSAL_LM":
        facts["pipeline_tag"] = "text-generation"
        facts["tags"].append("transformers")
    of = f" for {_link(base)}" if base is not None else ""
    table = list(_adapters(record))
    lines = [f"A LoRA adapter{of}.", *_mixed(record), *(["", *table] if table else [])]
    return _card(facts, [f"# {title}", "", *lines, *_rest(record, None, "`lorasmith.json`")])


def base_models(record: Mapping[str, Any]) -> list[str]:
    """The repositories on the Hub that went into a result, each once: the base's and the adapters'."""
    repos = [record.get("base_repo"), *(one.get("repo") for one in record.get("adapters", ()))]
    return list(dict.fromkeys(repo for repo in repos if isinstance(repo, str)))


def front_matter(card: str | None) -> Mapping[str, Any]:
    """The metadata of a card; none of one that has none, or none that can be read."""
    from huggingface_hub import RepoCard

    if card is None:
        return {}
    try:
        with silence():
            facts: dict[str, Any] = RepoCard(card, ignore_metadata_errors=True).data.to_dict()  # type: ignore[no-untyped-call]
    except Exception:  # cards are written by hand, and their parsers fail in many ways
        return {}
    return {**facts, "language": _languages(facts.get("language"))}


def _languages(value: Any) -> Any:
    """Languages, with Norwegian in its place, which YAML 1.1 reads as the word no."""
    if isinstance(value, list):
        return [_languages(one) for one in value]
    return "no" if value is False else value


def _is_text(value: Any) -> bool:
    """Whether a fact is what the Hub takes, text or a list of texts."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(one, str) and one for one in texts)


def _card(facts: Mapping[str, Any], lines: Sequence[str]) -> str:
    from huggingface_hub import ModelCardData

    return "---\n" + ModelCardData(**facts).to_yaml() + "\n---\n\n" + "\n".join(lines) + "\n"


def _merged(record: Mapping[str, Any]) -> Iterator[str]:
    base = record.get("base_repo")
    at = f" at `{record['base_commit']}`" if base else ""
    what = "adapters" if len(record["adapters"]) > 1 else "adapter"
    yield f"{_link(base) if base else 'A local model'}{at} with the {what} below merged into its weights:"
    if _method(record).is_linear:
        yield "`W0 + Σ weight · scale · B·A`, summed in float32 and rounded once."
    else:
        yield f"what they change is combined {_rule(record)}, added in float32 and rounded once."
    yield from _factors(record)


def _mixed(record: Mapping[str, Any]) -> Iterator[str]:
    """How the adapters of a mix were put together, if it says so."""
    method, several = _method(record), len(record.get("adapters", ())) > 1
    if several and method.is_linear:
        yield "It does the sum of what the adapters below do, each times its weight."
    elif several:
        yield f"It does what the adapters below do, combined {_rule(record)}."
    yield from _factors(record)
    cut = [f"{name} {value:g}" for name, value in record.get("criterion", {}).items()]
    if cut:
        yield f"As much of it is kept as was asked for: {', '.join(cut)}."


def _method(record: Mapping[str, Any]) -> Method:
    return Method(**record.get("method", {}))


def _rule(record: Mapping[str, Any]) -> str:
    options = _method_options(_method(record))
    facts = ", ".join(f"{name} {value}" for name, value in options.items())
    return f"by `{_method(record).name}`" + (f" ({facts})" if facts else "")


def _method_options(method: Method) -> dict[str, str]:
    """The options that bear on what a method makes, by their names."""
    options: dict[str, str] = {}
    if not method.is_additive:
        options |= {"density": repr(method.density), "space": method.space}
    if method.draws:
        options["seed"] = str(method.seed)
    if method.elects:
        options["sign"] = method.sign
    return options


def _factors(record: Mapping[str, Any]) -> Iterator[str]:
    if record.get("weights"):
        yield "The weights of some modules were multiplied by factors of their own."


def _adapters(record: Mapping[str, Any]) -> Iterator[str]:
    if not record.get("adapters"):
        return
    yield "| Adapter | Revision | Weight | Kind | Rank | Scale |"
    yield "|---|---|---|---|---|---|"
    for one in record.get("adapters", ()):
        name = _link(one["repo"]) if "repo" in one else f"local, SHA-256 `{one['sha256'][:12]}…`"
        commit = f"`{one['commit'][:12]}`" if "commit" in one else ""
        ranges = [_span(one[key]) if key in one else "" for key in ("rank", "scale")]
        cells = [name, commit, f"{one.get('weight', 1):g}", ", ".join(one.get("kinds", ())), *ranges]
        yield f"| {' | '.join(cells)} |"


def _rest(record: Mapping[str, Any], survival: Survival | None, where: str) -> Iterator[str]:
    if survival is not None and survival.total is not None:
        size = survival.relative_norm
        beside = "" if size is None else f" (the change is {size:.2%} of the weights' norm)"
        yield ""
        yield f"{survival.total:.2%} of the adapters' change is left after rounding to the model's dtype{beside}."
    command = _command(record)
    if command is not None:
        yield from ("", "To make it again:", "", "```", command, "```")
    yield ""
    made = f"Made by {PROJECT} {record['lorasmith']} with torch {record['torch']}."
    yield f"{made} {where} has the digests of all inputs." if "plan" in record else made


def _command(record: Mapping[str, Any]) -> str | None:
    """What makes the same result; None where an input is on no Hub."""
    inputs = [one for one in record.get("adapters", ()) if "repo" in one]
    if "base_repo" not in record or len(inputs) < len(record.get("adapters", ())):
        return None
    names = [_name(one, "") for one in inputs]
    weights = ["" if one["weight"] == 1 else f":{one['weight']!r}" for one in inputs]
    options: dict[str, Any] = {"weights": [_for_one(pattern, names) for pattern in record.get("weights", ())]}
    method = _method(record)
    if not method.is_linear:
        options |= {"method": method.name, **_method_options(method)}
    options |= {name: record[name] for name, usual in OPTIONS.items() if record.get(name, usual) != usual}
    given = [text for name, value in options.items() for text in _option(name, value)]
    inputs_ = [_name(record, "base_"), *map("".join, zip(names, weights, strict=True))]
    return shlex.join(["lorasmith", "merge", *inputs_, "-o", "merged", *given])


def _option(name: str, value: Any) -> Iterator[str]:
    """An option of the command line: a switch, or with its value, or once for each of several."""
    for one in value if isinstance(value, list) else [value]:
        yield f"--{name.replace('_', '-')}"
        if one is not True:
            yield str(one)


def _for_one(pattern: str, names: Sequence[str]) -> str:
    """A pattern of ``--weights``, with the name of the adapter whose number it has, if any."""
    numbered = re.match(r"\[(\d+)\](\[\d+\])*:", pattern)
    return f"{names[int(numbered[1]) - 1]}:{pattern[numbered.end() :]}" if numbered else pattern


def _name(facts: Mapping[str, Any], prefix: str) -> str:
    inside = facts.get(f"{prefix}inside")
    return f"{facts[f'{prefix}repo']}@{facts[f'{prefix}commit']}" + (f"/{inside}" if inside else "")


def _link(repo: str) -> str:
    return f"[{repo}](https://huggingface.co/{repo})"


def _span(pair: Sequence[float]) -> str:
    low, high = (f"{value:g}" for value in pair)
    return low if low == high else f"{low}–{high}"
