"""The folder a result grows in, and how it becomes the output: all of it or nothing.

    OUT.partial/            beside OUT (inside OUT, as OUT/.lorasmith.partial, where OUT is a mount point)
        journal             JSON lines: what is being made, which files are finished, that publishing began
        result              the result: a folder, or a file where OUT is one

The journal is locked while a run lives, so two runs never share an output. A killed run leaves the folder, and the
same command goes on from its finished files; a result is renamed to OUT once everything in it is on the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorasmith.errors import IOFailed, LorasmithError, NoSpace, OutputBusy, OutputExists
from lorasmith.records import Plan, SideFile
from lorasmith.safefile import read_header

JOURNAL, RESULT, REPLACED = "journal", "result", "replaced"
MOUNT_FOLDER = ".lorasmith.partial"

_MODEL_MARKS = ("config.json", "adapter_config.json", "lorasmith.json", "model_index.json")


def check_output(out: str, inputs: Sequence[str], *, single_file: bool, overwrite: bool) -> None:
    """Refuse an output that is an input, that is no place for this result, or that would be lost."""
    target = os.path.realpath(out)
    for path in inputs:
        given = os.path.realpath(path)
        if target == given:
            raise OutputExists(f"the output {out} is the input {path}; choose another output")
        if os.path.isdir(given) and _contains(given, target):
            raise OutputExists(f"the output {out} lies inside the input {path}; choose another output")
        if _contains(target, given):
            raise OutputExists(f"the output {out} contains the input {path}; choose another output")
    if not os.path.lexists(target):
        return
    if single_file and os.path.isdir(target):
        raise OutputExists(
            f"{out} is a folder and the base is a single file, so the result is one too; name the file: "
            f"-o {os.path.join(out, 'model.safetensors')}"
        )
    if _is_empty(target) or (overwrite and _is_replaceable(target)):
        return
    if overwrite:
        raise OutputExists(
            f"{out} is neither a model nor an adapter, so --overwrite leaves it alone; remove it yourself"
        )
    if _left_over(target) is None:
        raise OutputExists(f"{out} exists already; choose another output, or replace it with --overwrite")


def _contains(folder: str, path: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def _is_empty(target: str) -> bool:
    if not os.path.isdir(target):
        return False
    return not set(os.listdir(target)) - {MOUNT_FOLDER, "lost+found"}


def _is_replaceable(target: str) -> bool:
    """Whether what is there is a model or an adapter and nothing more."""
    if os.path.isfile(target):
        try:
            return bool(read_header(target).entries)
        except LorasmithError:
            return False
    if os.path.ismount(target):
        return False
    names = os.listdir(target)
    weights = any(name.endswith((".safetensors", ".bin")) for name in names)
    return weights and any(name in _MODEL_MARKS for name in names) and ".git" not in names


def _place(target: str) -> str:
    return os.path.join(target, MOUNT_FOLDER) if os.path.ismount(target) else target + ".partial"


def _left_over(target: str) -> str | None:
    """The partial folder of an earlier run, if it is one of ours."""
    folder = _place(target)
    ours = os.path.isdir(folder) and (os.path.isfile(os.path.join(folder, JOURNAL)) or not os.listdir(folder))
    return folder if ours else None


def free_space(out: str) -> int:
    """Bytes there are for the result: free ones, and those an unfinished run of the same output holds."""
    target = os.path.realpath(out)
    folder = target
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free + _held(_place(target))


def _held(folder: str) -> int:
    if not hasattr(os, "statvfs"):
        return 0
    files = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    return sum(os.lstat(file).st_blocks * 512 for file in files)


class Workplace:
    """The partial folder of one run, locked; made by ``claim``."""

    def __init__(self, out: str, target: str, folder: str, lock: int, made: str | None, overwrite: bool) -> None:
        self.out = out
        self._overwrite = overwrite
        self.target = target
        self.folder = folder
        self.result = os.path.join(folder, RESULT)
        self._journal = lock
        self._made = made
        self.finished: dict[str, int] = {}
        self.published = False

    # -------------------------------------------------------------------------------------------------- journal

    def begin(self, plan: Plan) -> None:
        """Go on from what an earlier run of the same plan finished, or start afresh.

        Raises OutputExists when another run has published a result meanwhile.
        """
        heading = {"lorasmith": plan.hash, "base": [list(facts) for facts in plan.base_files]}
        lines = self._read_journal()
        publishing = next((line["publishing"] for line in lines if "publishing" in line), None)
        if publishing is not None:
            self._finish_publishing(publishing)
        if lines[:1] == [heading]:
            self.published = publishing is not None and self._is_published(publishing)
            self.finished = {line["finished"]: line["size"] for line in lines if "finished" in line}
            self.finished = {name: size for name, size in self.finished.items() if self._size_of(name) == size}
        if not self.finished and not self.published:
            self._clear()
            self._append(heading)
        if self.published:
            return
        self._require_free()
        if not plan.single_file:
            os.makedirs(self.result, exist_ok=True)

    def _require_free(self) -> None:
        """Refuse to replace what ``check_output`` has not seen, or must not be replaced."""
        if os.path.dirname(self.folder) == self.target or not os.path.lexists(self.target) or _is_empty(self.target):
            return
        if not (self._overwrite and _is_replaceable(self.target)):
            raise OutputExists(f"{self.out} exists already; choose another output, or replace it with --overwrite")

    def path(self, name: str) -> str:
        """Where a file of the result is written, its folder made."""
        if name == "":
            return self.result
        path = os.path.join(self.result, *name.split("/"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def finish(self, name: str, size: int) -> None:
        """Record that a file of the result is on the disk."""
        self._append({"finished": name, "size": size})

    def _append(self, line: Mapping[str, Any]) -> None:
        os.write(self._journal, (json.dumps(line) + "\n").encode())
        os.fsync(self._journal)

    def _read_journal(self) -> list[dict[str, Any]]:
        """The journal's whole lines; one cut short by a crash was never acted upon."""
        with open(os.path.join(self.folder, JOURNAL), "rb") as stream:
            text = stream.read().decode("utf-8", "replace")
        lines = []
        for line in text.splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                break
            if isinstance(value, dict):
                lines.append(value)
        return lines

    def _size_of(self, name: str) -> int:
        try:
            return os.stat(os.path.join(self.result, *name.split("/")) if name else self.result).st_size
        except OSError:
            return -1

    def _clear(self) -> None:
        """Forget an earlier run: its result and its journal's lines."""
        os.ftruncate(self._journal, 0)
        os.lseek(self._journal, 0, os.SEEK_SET)
        for name in (RESULT, REPLACED):
            _remove(os.path.join(self.folder, name))

    # ----------------------------------------------------------------------------------------------- publishing

    def write_side_files(self, files: Sequence[SideFile]) -> None:
        """Put the files that hold no weights beside those that do, on the disk."""
        for file in files:
            path = self.path(file.name)
            if file.source is not None:
                shutil.copyfile(file.source, path)
            else:
                with open(path, "w", encoding="utf-8", newline="\n") as stream:
                    stream.write(file.text or "")
            with open(path, "rb+") as stream:
                os.fsync(stream.fileno())
        if os.path.isdir(self.result):
            for root, _, _ in os.walk(self.result):
                _sync_folder(root)

    def publish(self) -> None:
        """Rename the finished result to the output, replacing what is there, and remove the partial folder."""
        if not self.published:
            _sync_folder(self.folder)
            self._append({"publishing": _identity(self.result)})
            self._swap()
            self.published = True
        self.remove()

    def _swap(self) -> None:
        """Make the result the output; after a kill at any point ``_finish_publishing`` does the rest."""
        self._require_free()
        if os.path.dirname(self.folder) == self.target:
            _move_into(self.result, self.target)
            return
        if not os.path.lexists(self.target) or _is_empty(self.target):
            if os.path.isdir(self.target):
                os.rmdir(self.target)
            os.rename(self.result, self.target)
        elif not _exchange(self.result, self.target):
            os.rename(self.target, os.path.join(self.folder, REPLACED))
            os.rename(self.result, self.target)
        _sync_folder(os.path.dirname(self.target))

    def _finish_publishing(self, identity: list[int]) -> None:
        """Complete what a run that was killed while publishing had begun."""
        if self._is_published(identity):
            return
        replaced = os.path.join(self.folder, REPLACED)
        if os.path.lexists(self.result) and _identity(self.result) == identity:
            if os.path.lexists(replaced) and not os.path.lexists(self.target):
                os.rename(self.result, self.target)
            elif os.path.dirname(self.folder) == self.target:
                _move_into(self.result, self.target)

    def _is_published(self, identity: list[int]) -> bool:
        if os.path.dirname(self.folder) == self.target:
            return not os.path.lexists(self.result)
        return os.path.lexists(self.target) and _identity(self.target) == identity

    def remove(self) -> None:
        """Remove the partial folder, and the folders that were made for it if they are empty."""
        for name in (RESULT, REPLACED):
            _remove(os.path.join(self.folder, name))
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self.folder, JOURNAL))
            os.rmdir(self.folder)
        parent = os.path.dirname(self.folder)
        while self._made is not None and len(parent) >= len(self._made):
            try:
                os.rmdir(parent)
            except OSError:
                break
            parent = os.path.dirname(parent)


@contextlib.contextmanager
def claim(out: str, *, overwrite: bool) -> Iterator[Workplace]:
    """Make and lock the partial folder of an output for the time of a ``with`` block.

    It is removed when the block fails by an error of lorasmith's own; a full disk, a failed read or write, and an
    interruption leave it for the next run. Raises OutputBusy when another run holds it, and NoSpace or IOFailed for
    what the system reports under way.
    """
    target = os.path.realpath(out)
    folder = _place(target)
    made = _first_missing(os.path.dirname(folder))
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        lock = _lock(out, folder)
    except LorasmithError:
        raise
    except OSError as error:
        raise IOFailed(error.errno, f"cannot write beside {out}: {error.strerror}") from error
    place = Workplace(out, target, folder, lock, made, overwrite)
    try:
        yield place
    except (NoSpace, IOFailed):
        raise
    except OSError as error:
        if isinstance(error, LorasmithError):
            place.remove()
            raise
        raise _as_ours(error, out) from error
    except Exception:
        place.remove()
        raise
    finally:
        os.close(lock)


def _as_ours(error: OSError, out: str) -> NoSpace | IOFailed:
    """An error of the system's, met while writing, as one of ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(
            error.errno, f"the disk of {out} is full; make room and run the same command again to go on from here"
        )
    return IOFailed(
        error.errno, f"writing {out} failed: {error.strerror}; run the same command again to go on from here"
    )


def _lock(out: str, folder: str) -> int:
    """The journal, opened and locked: made if need be, refused if the folder is not ours."""
    busy = OutputBusy(
        errno.EAGAIN, f"another run is writing {out} ({folder} is locked); wait for it, or choose another output"
    )
    path = os.path.join(folder, JOURNAL)
    while True:
        if os.path.isdir(folder) and os.listdir(folder) and not os.path.isfile(path):
            raise OutputExists(f"{folder} is in the way and was not made by lorasmith; move it elsewhere")
        try:
            os.makedirs(folder, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o666)
        except FileNotFoundError:
            continue  # another run has just removed the folder
        except FileExistsError:
            raise OutputExists(f"{folder} is in the way and is not a folder; move it elsewhere") from None
        try:
            _flock(fd)
        except BlockingIOError:
            os.close(fd)
            raise busy from None
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(fd)):
            return fd
        os.close(fd)  # the run that held the lock has finished and taken the journal away


def _flock(fd: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: two runs are not kept apart
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return  # a file system without locks


def _first_missing(folder: str) -> str | None:
    """The topmost of the folders that would have to be made."""
    missing = None
    while not os.path.isdir(folder) and os.path.dirname(folder) != folder:
        missing, folder = folder, os.path.dirname(folder)
    return missing


def _identity(path: str) -> list[int]:
    facts = os.stat(path)
    return [facts.st_dev, facts.st_ino]


def _move_into(result: str, target: str) -> None:
    """Move a result's files into a mount point, what makes it a model last."""
    names = sorted(os.listdir(result), key=lambda name: (name == "config.json", name.endswith(".index.json"), name))
    for name in names:
        os.replace(os.path.join(result, name), os.path.join(target, name))
    _sync_folder(target)
    os.rmdir(result)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchange(one: str, other: str) -> bool:
    """Swap two paths in one step (renameat2(2)); False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _sync_folder(folder: str) -> None:
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.unlink(path)
