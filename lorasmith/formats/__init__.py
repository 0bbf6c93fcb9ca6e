"""Adapter dialects: one file each. A dialect recognises its tensor names and reads them into an Adapter."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Protocol

from lorasmith.adapter import Adapter
from lorasmith.checkpoint import require_path
from lorasmith.errors import AdapterMismatch, BadFile, MissingFile, Unsupported, listed
from lorasmith.folders import Folder, OnDisk
from lorasmith.formats import peft
from lorasmith.safefile import Header
from lorasmith.weightfile import read_weights


class Dialect(Protocol):
    """What a module of this folder offers."""

    def recognises(self, path: str, header: Header) -> bool:
        """Whether the tensors have this dialect's names, or a config at ``path`` says that they are of this dialect."""

    def read(self, path: str, header: Header) -> Adapter:
        """Read the adapter at ``path`` (a folder or a file), whose tensors ``header`` lists."""


FORMATS: dict[str, Dialect] = {"peft": peft}
"""Every dialect that can be read, by its name."""

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""What a folder's tensors are called; the first that is there counts, as with PEFT."""

_FOREIGN = (
    (re.compile(r"^lora_(unet|te\d?|transformer)_|\.lora_(up|down)\.weight$"), "a kohya (sd-scripts) LoRA"),
    (re.compile(r"\.(hada_w|lokr_w)"), "a LyCORIS adapter (LoHa or LoKr)"),
    (re.compile(r"\.lora_[ab]$|\.lora_a\.weight$"), "an mlx or torchtune LoRA"),
    (re.compile(r"^(unet|text_encoder|transformer)\..*\.(lora_A|lora\.down)"), "a diffusers pipeline LoRA"),
)


def adapter_file(folder: Folder) -> str:
    """The name of the file in an adapter folder that holds its tensors; MissingFile, with what there is, if none."""
    names = folder.names()
    for file in ADAPTER_FILES:
        if file in names:
            return file
    inner = [name for name in names if any(folder.is_file(f"{name}/{file}") for file in ADAPTER_FILES)]
    inner.sort(key=lambda name: [int(part) if part.isdigit() else 0 for part in re.split(r"(\d+)", name)])
    if inner:
        raise MissingFile(
            f"{folder.name} is not an adapter itself but holds {len(inner)}: "
            f"{listed([os.path.join(folder.name, name) for name in inner], most=10)}; name the one you mean"
        )
    if "config.json" in names:
        raise MissingFile(
            f"{folder.name} looks like a model, not an adapter: it has no adapter_model.safetensors. "
            "The base comes first: lorasmith merge BASE ADAPTER"
        )
    raise MissingFile(f"{folder.name} holds no adapter_model.safetensors; is it an adapter folder?")


def read_adapter(path: str) -> Adapter:
    """Read an adapter folder or file: names, shapes, scales and the digest of its contents.

    Raises MissingFile, BadFile, Unsupported (by name, for what cannot be merged), NotFinite.
    """
    require_path(path)
    file = os.path.join(path, adapter_file(OnDisk(path))) if os.path.isdir(path) else path
    header, notes = read_weights(file)
    if not header.entries:
        raise BadFile(f"{file} holds no tensors at all")
    for dialect in FORMATS.values():
        if dialect.recognises(path, header):
            adapter = dialect.read(path, header)
            return replace(adapter, notes=(*notes, *adapter.notes))
    raise _unrecognised(header)


def _unrecognised(header: Header) -> Exception:
    names = [entry.name for entry in header.entries]
    for pattern, what in _FOREIGN:
        if any(pattern.search(name) for name in names):
            return Unsupported(f"{header.file} looks like {what}, a dialect that is not supported yet")
    return AdapterMismatch(
        f"{header.file} holds no LoRA tensors (*.lora_A.weight); it begins with {listed(names)}. "
        "Is it a model rather than an adapter?"
    )
