"""Renamings that transformers applies to tensor names on loading, by the config's ``model_type``.

Read from ``transformers.conversion_mapping`` (5.23). ``save_pretrained`` reverses them, so the names on disk are
always those on the left, while an adapter trained with transformers 5 has those on the right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_VIT = (
    (r"encoder\.layer\.", "layers."),
    (r"attention.query", "q_proj"),
    (r"attention.key", "k_proj"),
    (r"attention.value", "v_proj"),
    (r"attention.output.dense", "attention.o_proj"),
    (r"intermediate.dense", "mlp.fc1"),
    (r"output.dense", "mlp.fc2"),
)

RENAMINGS = dict.fromkeys(
    ("audio-spectrogram-transformer", "deit", "ijepa", "vit", "vit_mae", "vit_msn", "vivit"), _VIT
)
"""Regular expression and replacement, applied one after the other to each name."""


def runtime_name(config: Mapping[str, Any], name: str) -> str:
    """The name a stored tensor has in the running model; its parts (``encoder``, ``decoder``) have their own config."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
    first, dot, rest = name.partition(".")
    part = config.get(first)
    if dot and isinstance(part, Mapping):
        return first + dot + runtime_name(part, rest)
    model_type = config.get("model_type")
    for pattern, replacement in RENAMINGS.get(model_type, ()) if isinstance(model_type, str) else ():
        name = re.sub(pattern, replacement, name)
    return name
