"""Where a result may go: what is refused as an output, what may be replaced, and how much room there is."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence

from lorasmith.errors import BadOption, IOFailed, LorasmithError, NoSpace, OutputExists
from lorasmith.jsonfile import read_json
from lorasmith.safefile import read_header

JOURNAL, RESULT, REPLACED, SCRATCH = "journal", "result", "replaced", "scratch"
"""What a partial folder holds: the journal, the result, for a moment what the result replaces, and what passes."""

MOUNT_FOLDER = ".lorasmith.partial"
"""The partial folder where it must be inside the output, because that cannot be renamed."""

MARKS = {
    "config.json": ("architectures", "model_type", "_class_name"),
    "adapter_config.json": ("peft_type",),
    "model_index.json": ("_class_name",),
    "lorasmith.json": ("lorasmith",),
}
"""Files that tell a model or an adapter, by a key that one of them has."""

PICKLES = ("pytorch_model", "adapter_model", "diffusion_pytorch_model")
"""What the names of pickled weights begin with."""

NOT_MODELS = ("checkpoint-", "global_step", "runs", ".git")
"""What the names of folders begin with that hold more than a model: a training run, a history."""


def check_output(out: str, inputs: Sequence[str], *, single_file: bool, overwrite: bool) -> None:
    """Refuse an output that is an input, that is no place for this result, that would be lost, or cannot be made."""
    if not out or "\0" in out:
        raise BadOption(f"{out!r} is not a path to write to")
    target = os.path.realpath(out)
    for path in inputs:
        given = os.path.realpath(path)
        if target == given:
            raise OutputExists(f"the output {out} is the input {path}; choose another output")
        if os.path.isdir(given) and _contains(given, target):
            raise OutputExists(f"the output {out} lies inside the input {path}; choose another output")
        if _contains(target, given):
            raise OutputExists(f"the output {out} contains the input {path}; choose another output")
    if single_file and os.path.isdir(target):
        raise OutputExists(
            f"{out} is a folder and the base is a single file, so the result is one too; name the file: "
            f"-o {os.path.join(out, 'model.safetensors')}"
        )
    if overwrite or not is_left_over(partial_folder(target)):
        require_free(out, target, overwrite=overwrite)
    _require_writable(out, target)


def _require_writable(out: str, target: str) -> None:
    """Raise IOFailed unless the partial folder can be made, and folders above it that are not there yet."""
    folder = os.path.dirname(partial_folder(target))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise IOFailed(errno.ENOTDIR, f"cannot write beside {out}: {folder} is no folder; choose another output")
    if not os.access(folder, os.W_OK | os.X_OK):
        read_only = hasattr(os, "statvfs") and os.statvfs(folder).f_flag & os.ST_RDONLY
        why = errno.EROFS if read_only else errno.EACCES
        raise IOFailed(why, f"cannot write beside {out}: {os.strerror(why)}: {folder}; choose another output")


def require_free(out: str, target: str, *, overwrite: bool) -> None:
    """Raise OutputExists unless there is nothing at ``target``, or something that may be replaced."""
    if not os.path.lexists(target) or is_empty(target):
        return
    if not overwrite:
        raise OutputExists(f"{out} exists already; choose another output, or replace it with --overwrite")
    why = _why_kept(target)
    if why is not None:
        raise OutputExists(f"{out} {why}, so --overwrite leaves it alone; choose another output, or remove it yourself")


def _contains(folder: str, path: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def is_empty(target: str) -> bool:
    """Whether a folder holds nothing but what a file system or this tool keeps in it."""
    if not os.path.isdir(target):
        return False
    return not set(os.listdir(target)) - {MOUNT_FOLDER, "lost+found"}


def _why_kept(target: str) -> str | None:
    """Why what is there must not be replaced; None if it is a model or an adapter and nothing more."""
    if not os.path.isdir(target):
        return None if _has_tensors(target) else "is not a safetensors file"
    if _must_stay(target):
        return "is a mount point or the current folder, whose contents cannot be replaced in one step"
    names = sorted(os.listdir(target))
    if not any(_is_mark(target, name) for name in names) or not any(_is_weights(target, name) for name in names):
        return "is neither a model nor an adapter"
    more = [name for name in names if name.startswith(NOT_MODELS) and os.path.isdir(os.path.join(target, name))]
    return f"holds {more[0]}, which is more than a model" if more else None


def _is_mark(folder: str, name: str) -> bool:
    if name not in MARKS:
        return False
    try:
        return not read_json(os.path.join(folder, name)).keys().isdisjoint(MARKS[name])
    except LorasmithError:
        return False


def _is_weights(folder: str, name: str) -> bool:
    if name.endswith(".bin"):
        return name.startswith(PICKLES)
    return name.endswith(".safetensors") and _has_tensors(os.path.join(folder, name))


def _has_tensors(file: str) -> bool:
    try:
        return bool(read_header(file).entries)
    except LorasmithError:
        return False


def partial_folder(target: str) -> str:
    """Where the result for ``target`` grows."""
    return os.path.join(target, MOUNT_FOLDER) if _must_stay(target) else target + ".partial"


def _must_stay(target: str) -> bool:
    """Whether another folder cannot take this one's place: it is a mount point, or the one we stand in."""
    return os.path.ismount(target) or (os.path.isdir(target) and os.path.samefile(target, os.curdir))


def is_left_over(folder: str) -> bool:
    """Whether a partial folder is there and one of ours."""
    return os.path.isdir(folder) and (os.path.isfile(os.path.join(folder, JOURNAL)) or not os.listdir(folder))


def require_room(out: str, takes: int, *, at_most: bool = False) -> int:
    """Raise NoSpace where a result of so many bytes, or of ``at_most`` so many, has no room; the bytes there are.

    Some file systems count nothing; what they have room for shows when it is written.
    """
    free = free_space(out)
    if takes > free and shutil.disk_usage(_existing(out)).total:
        raise NoSpace(
            errno.ENOSPC,
            f"the result takes {'up to ' if at_most else ''}{takes:,} bytes and the disk of {out} has {free:,} free; "
            "make room or choose another output",
        )
    return free


def free_space(out: str) -> int:
    """Bytes there are for the result: free ones, and those an unfinished run of the same output holds."""
    return shutil.disk_usage(_existing(out)).free + _held(partial_folder(os.path.realpath(out)))


def _existing(out: str) -> str:
    """The folder that is there, of those in which an output is or will be."""
    folder = os.path.realpath(out)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _held(folder: str) -> int:
    files = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    return sum(getattr(os.lstat(file), "st_blocks", 0) * 512 for file in files)
