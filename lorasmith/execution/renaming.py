"""File-system steps that are done or not done, never half: rename, swap, sync, remove."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def exchange(one: str, other: str) -> bool:
    """Swap two paths in one step (renameat2(2)); False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def move_into(result: str, target: str) -> None:
    """Move a result's files into a mount point, what makes it a model last."""
    names = sorted(os.listdir(result), key=lambda name: (name == "config.json", name.endswith(".index.json"), name))
    for name in names:
        os.replace(os.path.join(result, name), os.path.join(target, name))
    sync_folder(target)
    os.rmdir(result)


def identity(path: str) -> tuple[int, ...]:
    """What stays the same when a file or folder is renamed."""
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino


def sync_folder(folder: str) -> None:
    """Return once the names in a folder are on the disk."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def remove(path: str) -> None:
    """Remove a file or a folder with all it holds, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.unlink(path)
