"""Where an adapter is written: a PEFT folder or one file, module by module, with ranks that show only as they come."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from lorasmith import __version__
from lorasmith.adapter import Adapter
from lorasmith.dtypes import NAMES, all_finite, itemsize, torch_dtype
from lorasmith.errors import NotFinite
from lorasmith.execution.workplace import claim, put
from lorasmith.formats import read_adapter
from lorasmith.formats.writing import Site, longest_config
from lorasmith.growingfile import GrowingFile
from lorasmith.records import Output, SideFile
from lorasmith.safefile import TensorEntry, require_unchanged
from lorasmith.sidefiles import PROVENANCE, written

if TYPE_CHECKING:
    import torch

    Config = Callable[[Mapping[str, int]], dict[str, Any]]
    """The LoraConfig for modules of these ranks."""

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
INSIDE = "lora_adapter_metadata"
"""The key under which a bare file's header holds the config, where diffusers looks for it."""

SUFFIXES = (".safetensors", ".st", ".sft")
"""Endings of an output that is to be one file; any other is a folder."""

Whole = tuple[str, str, tuple[int, ...]]
"""A tensor that is no factor: its name, format code and shape."""


class AdapterFile:
    """Factors and other tensors of an adapter, in the order they are added.

    ``most`` gives the largest rank that each site may get, ``wholes`` the other tensors that may come, ``code`` the
    dtype of the factors, ``ranks`` those that were added. Every B has a bias if ``biased``. ``metadata`` goes into the
    header, and so does the config if ``inside``.
    """

    def __init__(
        self,
        path: str,
        most: Mapping[Site, int],
        wholes: Sequence[Whole],
        config: Config,
        *,
        code: str,
        biased: bool,
        inside: bool,
        metadata: Mapping[str, str],
    ) -> None:
        self._code, self._biased, self._inside = code, biased, inside
        self._config, self._metadata = config, metadata
        self.ranks: dict[str, int] = {}
        ranks = {site.path: rank for site, rank in most.items()}
        tensors = _sized(most, wholes, code, biased)
        self._file = GrowingFile(path, tensors, self._header(longest_config(config(ranks), ranks)))

    def _header(self, config: Mapping[str, Any]) -> dict[str, str]:
        text = dumped(config)
        return {**self._metadata, **({INSIDE: text} if self._inside else {}), "format": "pt"}

    def add(self, site: Site, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Append factors of shapes (outputs, rank) and (rank, inputs), and the bias on the outputs; or a whole stack.

        Raises NotFinite for a number too large for the dtype.
        """
        import torch

        rank = right.shape[0] // max(1, site.experts)
        self.ranks[site.path] = rank
        factors = dict(zip((site.a(rank), site.b(rank)), (right / site.times, left), strict=True))
        for (name, shape), tensor in factors.items():
            self._append(name, tensor.reshape(shape))
        if self._biased:
            self._append(site.bias(), torch.zeros(site.shape[0]) if bias is None else bias)

    def _append(self, name: str, tensor: torch.Tensor) -> None:
        rounded = tensor.to(torch_dtype(self._code))
        if not all_finite(rounded):
            raise NotFinite(
                f"tensor {name!r} overflows {NAMES[self._code]}: it has values up to {float(tensor.abs().max()):.6g}; "
                f"use {'smaller weights' if self._code == 'F32' else '--dtype float32, or smaller weights'}"
            )
        self._file.add(name, self._code, rounded)

    def begin(self, whole: Whole) -> None:
        """Say which other tensor the bytes that follow are of."""
        name, code, shape = whole
        self._file.begin(name, code, shape, prod(shape) * itemsize(code))

    def write(self, data: memoryview) -> None:
        """Append bytes of the tensor that was begun last."""
        self._file.write(data)

    def copy(self, name: str, entry: TensorEntry) -> None:
        """Append a tensor as it is stored elsewhere."""
        self._file.copy(name, entry)

    def finish(self) -> tuple[int, dict[str, Any]]:
        """Write the header and return once all is on the disk: the file's size in bytes, and the config."""
        config = self._config(self.ranks)
        return self._file.finish(self._header(config)), config

    def close(self) -> None:
        """Close the file; once is enough."""
        self._file.close()


def room(ranks: Mapping[Site, int], wholes: Sequence[Whole], code: str, *, biased: bool) -> int:
    """The bytes that the tensors of an adapter take, with the arguments of ``AdapterFile``."""
    return sum(nbytes for *_, nbytes in _sized(ranks, wholes, code, biased))


def _sized(
    ranks: Mapping[Site, int], wholes: Sequence[Whole], code: str, biased: bool
) -> list[tuple[str, str, tuple[int, ...], int]]:
    tensors = [one for site, rank in ranks.items() for one in _tensors(site, rank, code, biased)]
    return [(name, code, shape, prod(shape) * itemsize(code)) for name, code, shape in [*wholes, *tensors]]


def _tensors(site: Site, rank: int, code: str, biased: bool) -> list[Whole]:
    named = [site.a(rank), site.b(rank), *([(site.bias(), site.shape[:1])] if biased else [])]
    return [(name, code, shape) for name, shape in named]


# ------------------------------------------------------------------------------------------------- where it goes


@dataclass(frozen=True)
class Spot:
    """Where an adapter's weights are written (``path``); ``inside`` says that their config goes into the same file.

    ``finish`` puts the config and the record beside them, if need be, and makes the result appear.
    """

    path: str
    inside: bool
    finish: Callable[[Mapping[str, Any], Mapping[str, Any]], None]


@dataclass(frozen=True)
class _Undertaking:
    hash: str
    base_files: tuple[tuple[str, int, int], ...]
    single_file: bool
    outputs: tuple[Output, ...] = ()
    side_files: tuple[SideFile, ...] = ()


def is_file(out: str) -> bool:
    """Whether an output is to be one file: it is one, or its name says so and no folder is there."""
    return not os.path.isdir(out) and not out.endswith(os.sep) and (os.path.isfile(out) or out.endswith(SUFFIXES))


@contextlib.contextmanager
def open_spot(
    out: str | None,
    digest: str,
    inputs: Sequence[tuple[str, int, int]],
    *,
    overwrite: bool,
    beside: Sequence[SideFile] = (),
) -> Iterator[Spot | None]:
    """A place to write an adapter to for the time of a ``with`` block; what is not finished does not appear.

    ``digest`` names the result and ``inputs`` are the stamps of what it is made from: None is given where an earlier
    run has finished all of it. ``beside`` are more files for a folder. Without ``out``, all of it is in a temporary
    folder, which is the caller's to remove.
    """
    if out is None:
        folder = tempfile.mkdtemp(prefix="lorasmith-")

        def complete(config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
            require_unchanged(inputs)
            for file in beside:
                put(file, os.path.join(folder, file.name))

        try:
            yield Spot(os.path.join(folder, WEIGHTS), True, complete)
        except BaseException:
            shutil.rmtree(folder)
            raise
        return
    inside = is_file(out)
    with claim(out, overwrite=overwrite, resumes=False) as place:
        place.begin(_Undertaking(digest, tuple(inputs), inside))

        def finish(config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
            require_unchanged(inputs)
            texts = {} if inside else {CONFIG: config, PROVENANCE: record}
            files = [written(name, dumped(facts) + "\n") for name, facts in texts.items()]
            place.write_side_files([*files, *(() if inside else beside)])
            place.publish()

        yield None if place.published else Spot(place.path(WEIGHTS), inside, finish)
        if place.published:
            place.remove()


def kept(path: str, beside: Sequence[SideFile] = ()) -> Adapter:
    """The adapter in a temporary folder, which goes when the adapter does, with what is ``beside`` it."""
    folder = os.path.dirname(path)
    adapter = replace(read_adapter(path), side_files={one.name: os.path.join(folder, one.name) for one in beside})
    weakref.finalize(adapter, _remove, folder, os.getpid())
    return adapter


def _remove(folder: str, owner: int) -> None:
    """Remove a temporary folder; a forked child leaves it to the process that made it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def record_of(**facts: Any) -> dict[str, Any]:
    """What makes a result what it is, with the versions that made it: no paths, no times."""
    return {"lorasmith": __version__, "torch": importlib.metadata.version("torch"), **facts}


def digest_of(facts: Mapping[str, Any]) -> str:
    """The SHA-256 of a record or a config."""
    return hashlib.sha256(dumped(facts).encode()).hexdigest()


def dumped(facts: Mapping[str, Any]) -> str:
    """A config or a record as text, the same for equal ones."""
    return json.dumps(facts, indent=2, sort_keys=True)
