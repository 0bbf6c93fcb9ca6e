"""Writes lorasmith/naming/ties.json: which parameters the models of the installed transformers tie, by class.

    python tests/make_ties.py

Every model class is built on the meta device from its config's defaults, with ``tie_word_embeddings`` set wherever
the config has it. ``default`` is what the flag is when a config.json leaves it out.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

TABLE = Path(__file__).parents[1] / "lorasmith" / "naming" / "ties.json"


def classes() -> Iterator[type[PreTrainedModel]]:
    """The public model classes of transformers that can be built from a config."""
    for name in sorted(dir(transformers)):
        if "PreTrained" not in name and not name.startswith("Auto"):
            try:
                found = getattr(transformers, name)
            except (ImportError, AttributeError, RuntimeError):
                continue
            if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is not None:
                yield found


def tie(config: Any) -> None:
    """Set the flag wherever the config has it."""
    for part in [config, *vars(config).values()]:
        if isinstance(part, transformers.PretrainedConfig) and hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = True


def ties_of(model_class: type[PreTrainedModel]) -> dict[str, str]:
    """Tied parameters to the one they share, for one class; those of embeddings and heads only."""
    try:
        config = copy.deepcopy(model_class.config_class())
        tie(config)
        with torch.device("meta"):
            model = model_class(config)
    except Exception:  # no defaults that make a model: what the class itself says is all there is
        pairs = dict(getattr(model_class, "_tied_weights_keys", None) or {})
        names = {name for pair in pairs.items() for name in pair if re.fullmatch(r"[\w.]+\.(weight|bias)", name)}
    else:
        pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {key: value for key, value in sorted(pairs.items()) if {key, value} <= names and not re.search(r"\d", key)}


def default_of(model_class: type[PreTrainedModel]) -> bool:
    """What the flag is in a config that says nothing."""
    return bool(getattr(model_class.config_class(), "tie_word_embeddings", False))


def table() -> dict[str, Any]:
    """Classes that tie alike, together, and those that tie nothing."""
    groups: dict[str, dict[str, Any]] = {}
    untied = []
    for model_class in classes():
        ties = ties_of(model_class)
        if not ties:
            untied.append(model_class.__name__)
        else:
            try:
                default = default_of(model_class)
            except Exception:  # a config without defaults
                continue
            group = groups.setdefault(json.dumps([ties, default]), {"ties": ties, "default": default, "classes": []})
            group["classes"].append(model_class.__name__)
    return {"tied": sorted(groups.values(), key=lambda group: group["classes"]), "untied": untied}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    found = table()
    TABLE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{sum(len(one['classes']) for one in found['tied'])} classes tie, {len(found['untied'])} do not")
