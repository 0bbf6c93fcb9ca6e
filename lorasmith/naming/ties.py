"""Which parameters of a model are one and the same: an output head that repeats the embeddings, and the like.

``ties.json`` is read off transformers, class by class (``_tied_weights_keys``). A class it does not know is taken to
tie its ``lm_head`` to its embeddings, if its config says so or says nothing, as transformers did for all before 5.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

EMBEDDINGS = (
    "embed_tokens", "wte", "word_embeddings", "word_embedding", "shared", "embed_in", "tok_embeddings", "tokens_embed",
    "embeddings", "embedding",
)  # fmt: skip
"""What the layers are called that turn tokens into hidden states."""

HEADS = (
    "lm_head", "embed_out", "proj_out", "output_projection", "decoder", "generator_lm_head", "lm_loss",
    "vocab_projector",
)  # fmt: skip
"""What the layers are called that turn hidden states into logits over the vocabulary."""

RESCALED = ("t5", "longt5", "pop2piano", "switch_transformers")
"""Model types that multiply what a tied head is given by 1/√d_model, and what an untied one is given not."""

FORCED = ("t5", "mt5", "umt5", "longt5", "udop", "pop2piano")
"""Model types that tie whatever their config says, but for a head that is stored with values of its own."""

_COMPOSITE = re.compile(
    r"^(Vision|Speech)?EncoderDecoder|^(Instruct)?Blip(2|Video|For)|^InstructBlip|^Musicgen|^Rag[TSM]"
)
"""Classes that tie what the classes of their parts tie, which the table knows for one choice of parts only."""

_HEADLESS = re.compile(r"(?<!MT)Model$|(Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction)$")
_HEADED = re.compile(r"Head|EncoderDecoder|^Bark")
"""How the names of classes end that have no output head over the vocabulary, and exceptions to it."""


@functools.cache
def _table() -> tuple[Mapping[str, tuple[Mapping[str, str], bool]], frozenset[str]]:
    """Ties and the flag's default by class, and the classes without any."""
    text = resources.files("lorasmith.naming").joinpath("ties.json").read_text(encoding="utf-8")
    facts = json.loads(text)
    tied = {name: (one["ties"], one["default"]) for one in facts["tied"] for name in one["classes"]}
    return tied, frozenset(facts["untied"])


def ties_of(config: Mapping[str, Any], architecture: str | None, names: Sequence[str]) -> Mapping[str, str] | None:
    """Tied parameters of a model that stores these ``names``, to the one each repeats; none if its config says so.

    None where it cannot be known.
    """
    if _COMPOSITE.search(architecture or ""):
        return None
    tied, untied = _table()
    ties, default = tied.get(architecture or "", ({}, False))
    if not ties and architecture not in untied:
        ties, default = _likely(architecture, names), True
    flag = True if config.get("model_type") in FORCED else _flag(config)
    return ties if (default if flag is None else flag) else {}


def with_head(architecture: str, endings: Sequence[str]) -> str | None:
    """The class of the table that puts a head on a headless one: ``GPT2LMHeadModel`` for ``GPT2Model``."""
    tied, untied = _table()
    if not architecture.endswith("Model"):
        return None
    names = (architecture.removesuffix("Model") + ending for ending in endings)
    return next((name for name in names if name in tied or name in untied), None)


def gain(config: Mapping[str, Any]) -> float:
    """What the weight of a head must be multiplied with when it is untied, so that the logits stay what they were."""
    width = config.get("d_model")
    rescales = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)) is not False
    if config.get("model_type") in RESCALED and rescales and isinstance(width, (int, float)) and width > 0:
        return float(width**-0.5)
    return 1.0


def layer(name: str) -> str:
    """The name of the layer whose weight this is; nothing for other parameters."""
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] == "weight" else ""


def _flag(config: Mapping[str, Any]) -> bool | None:
    """What a config says about tying: at its top, else where it describes the text model."""
    for part in (config, config.get("text_config")):
        value = part.get("tie_word_embeddings") if isinstance(part, Mapping) else None
        if isinstance(value, bool):
            return value
    return None


def _likely(architecture: str | None, names: Sequence[str]) -> Mapping[str, str]:
    """The tie of a class that the table does not know, if it has a head and stores none."""
    if architecture and _HEADLESS.search(architecture) and not _HEADED.search(architecture):
        return {}
    embeddings = [name for name in names if layer(name) in EMBEDDINGS]
    heads = [name for name in names if layer(name) in HEADS]
    return {"lm_head.weight": embeddings[0]} if len(embeddings) == 1 and not heads else {}
