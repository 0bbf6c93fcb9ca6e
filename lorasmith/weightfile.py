"""The weights of a file of either kind, safetensors or ``torch.save``, as one header of byte ranges."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasmith.errors import IOFailed, NoSpace
from lorasmith.picklefile import is_pickle, load_tensors, read_pickle
from lorasmith.safefile import Header, build_header, read_header

if TYPE_CHECKING:
    import torch


def read_weights(file: str) -> tuple[Header, tuple[str, ...]]:
    """The header of a safetensors or ``torch.save`` file, told apart by their contents, and notes on it.

    Where tensors are no ranges of the file, they are read from a copy that is made of it. Raises what
    ``read_header``, ``read_pickle`` and ``spool`` raise.
    """
    if not is_pickle(file):
        return read_header(file), ()
    pickle = read_pickle(file)
    if pickle.header is not None:
        return pickle.header, pickle.notes
    note = f"{file} {pickle.obstacle}, so it was loaded at once, which takes {pickle.memory:,} bytes of memory"
    return _spooled(file), (note, *pickle.notes)


class _Copy(str):
    """The path of a copy, which is gone once no tensor is at it any more."""


def _spooled(file: str) -> Header:
    """The header of a file whose tensors are read from a copy that goes when they do."""
    facts = os.stat(file)
    folder = tempfile.mkdtemp(prefix="lorasmith-")
    try:
        path = spool(file, folder)
    except BaseException:
        shutil.rmtree(folder)
        raise
    if os.path.isdir("/proc/self/fd"):
        fd = os.open(path, os.O_RDONLY)
        shutil.rmtree(folder)
        place = _Copy(f"/proc/self/fd/{fd}")
        weakref.finalize(place, os.close, fd)
    else:
        place = _Copy(path)
        weakref.finalize(place, shutil.rmtree, folder, ignore_errors=True)
    copy = read_header(place)
    return replace(copy, file=file, data_start=0, size=facts.st_size, mtime_ns=facts.st_mtime_ns)


def spool(file: str, folder: str) -> str:
    """Write the tensors of a ``torch.save`` file to a new safetensors file in ``folder``; returns its path.

    Takes memory as ``load_tensors`` does, and disk for every tensor under each of its names. Raises what that raises,
    NoSpace and IOFailed; the folder is left as it was then.
    """
    tensors = load_tensors(file)
    facts = [(name, code, tuple(tensor.shape), tensor.nbytes) for name, (code, tensor) in tensors.items()]
    header = build_header(facts, {"format": "pt"})
    size = len(header) + sum(nbytes for *_, nbytes in facts)
    path = os.path.join(folder, os.path.splitext(os.path.basename(file))[0] + ".safetensors")
    try:
        free = shutil.disk_usage(folder).free
        with open(path, "xb") as out:
            if free < size:
                raise NoSpace(f"{folder} has no room for the {size:,} bytes that {file} takes as safetensors")
            out.write(header)
            for _, tensor in tensors.values():
                out.write(_bytes(tensor))
    except FileExistsError:
        raise IOFailed(f"{path} is there already; give a folder of its own") from None
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        if isinstance(error, OSError) and not isinstance(error, NoSpace):
            raise IOFailed(f"writing {path} failed: {error.strerror}") from error
        raise
    return path


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
