"""The folder a result grows in, and how it becomes the output: all of it or nothing.

    OUT.partial/            beside OUT (inside OUT, as OUT/.lorasmith.partial, where OUT is a mount point)
        journal             what is being made, which files are finished, that publishing began
        result              the result: a folder, or a file where OUT is one
        scratch             what a run needs for a while

The journal is locked while a run lives, so two runs never share an output. A killed run leaves the folder, and the
same command goes on from its finished files; a result is renamed to OUT once everything in it is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Collection, Iterator, Sequence

from lorasmith.errors import InputChanged, IOFailed, LorasmithError, NoSpace, OutputBusy, OutputExists
from lorasmith.execution.destination import (
    JOURNAL,
    REPLACED,
    RESULT,
    SCRATCH,
    is_empty,
    partial_folder,
    require_free,
)
from lorasmith.execution.journal import Finished, Journal, Undertaking, heading
from lorasmith.execution.renaming import exchange, identity, move_into, remove, sync_folder
from lorasmith.gitnames import git_name, pointer_name
from lorasmith.jsonfile import open_regular
from lorasmith.records import Output, SideFile
from lorasmith.rounding import Sample, summed

_BLOCK = 1 << 20

_ATTEMPTS = 1000
"""How often the folder may vanish between two looks at it, because runs before this one end."""


class Workplace:
    """The partial folder of one run, locked; made by ``claim``.

    ``published`` says that the output is complete already, ``samples`` what was measured of the finished files,
    ``scratch`` is a folder, perhaps yet to be made, for what a run needs for a while.
    """

    def __init__(self, out: str, target: str, folder: str, journal: Journal, *, overwrite: bool) -> None:
        self._out = out
        self._overwrite = overwrite
        self._target = target
        self._folder = folder
        self._result = os.path.join(folder, RESULT)
        self._replaced = os.path.join(folder, REPLACED)
        self.scratch = os.path.join(folder, SCRATCH)
        self._is_mount = os.path.dirname(folder) == target
        self._journal = journal
        self._single_file = False
        self._plan: Undertaking | None = None
        self._finished: set[str] = set()
        self.samples: list[Sample] = []
        self.published = False

    # --------------------------------------------------------------------------------------------- finished files

    def begin(self, plan: Undertaking, elsewhere: Collection[str] = ()) -> None:
        """Go on from what an earlier run of the same plan finished, or start afresh.

        Files ``elsewhere`` were finished and may have been taken away. Raises OutputExists when something that must
        stay has come to the output meanwhile.
        """
        self._plan, self._single_file = plan, plan.single_file
        past = self._journal.read()
        ours = past.heading == heading(plan)
        if past.publishing is not None:
            self._finish_publishing(past.publishing)
            self.published = ours and self._is_published(past.publishing) and self._holds(self._target, plan)
            ours = self.published or (ours and self._is_result(past.publishing))
        if ours:
            self._take_up(plan, past.finished, elsewhere)
        if self.published:
            return
        if not self._finished:
            self._restore_replaced()
            remove(self._result)
            remove(self.scratch)
            self._journal.begin(plan)
        require_free(self._out, self._target, overwrite=self._overwrite)
        if not plan.single_file:
            os.makedirs(self._result, exist_ok=True)

    def _take_up(self, plan: Undertaking, finished: Sequence[Finished], elsewhere: Collection[str]) -> None:
        sizes = {output.name: output.size for output in plan.outputs}
        for one in finished:
            there = self.published or one.name in elsewhere or self._size(self._result, one.name) == one.size
            if there and sizes.get(one.name) == one.size and one.name not in self._finished:
                self._finished.add(one.name)
                self.samples += one.samples

    def is_finished(self, output: Output) -> bool:
        """Whether a file of the result is on the disk, whole."""
        return output.name in self._finished

    def finish(self, output: Output, samples: Sequence[Sample]) -> None:
        """Note that a file of the result is on the disk, and what was sampled of its tensors."""
        whole = summed(samples)
        self._journal.finish(output, whole)
        self._finished.add(output.name)
        self.samples += whole

    def path(self, name: str) -> str:
        """Where a file of the result is written, its folder made; never the result's own, which others took away."""
        path = self._within(self._result, name)
        if not os.path.isdir(self._folder if self._single_file else self._result):
            raise self._disturbed()
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def where(self, name: str) -> str:
        """Where a finished file of the result is now."""
        return self._within(self._target if self.published else self._result, name)

    def _within(self, result: str, name: str) -> str:
        """A file of a result; a single file is the result itself."""
        return result if self._single_file else os.path.join(result, *name.split("/"))

    def _size(self, result: str, name: str) -> int:
        try:
            return os.stat(self._within(result, name)).st_size
        except OSError:
            return -1

    def _holds(self, result: str, plan: Undertaking) -> bool:
        """Whether a result has all its files: inodes are used again, so that one alone proves nothing."""
        names = [] if self._single_file else [file.name for file in plan.side_files]
        return all(self._size(result, one.name) == one.size for one in plan.outputs) and all(
            self._size(result, name) >= 0 for name in names
        )

    # ------------------------------------------------------------------------------------------------ publishing

    def write_side_files(self, files: Sequence[SideFile]) -> None:
        """Put the files that hold no merged weights beside those that do, on the disk."""
        for file in files:
            put(file, self.path(file.name))
        if os.path.isdir(self._result):
            for root, _, _ in os.walk(self._result):
                sync_folder(root)

    def publish(self) -> None:
        """Rename the finished result to the output, replacing what is there, and remove the partial folder."""
        if not self.published:
            if self._plan is None or not self._holds(self._result, self._plan):
                raise self._disturbed()
            sync_folder(self._folder)
            self._journal.publish(identity(self._result))
            self._swap()
            self.published = True
        self.remove()

    def adopt(self, made: str) -> None:
        """Make a folder or a file, made in ``scratch`` by others, the output, and remove the partial folder."""
        require_free(self._out, self._target, overwrite=False)
        sync_folder(made)
        for root, _, names in os.walk(made):
            for name in names:
                sync_folder(os.path.join(root, name))
            sync_folder(root)
        if self._is_mount:
            move_into(made, self._target)
        else:
            if os.path.isdir(self._target):
                os.rmdir(self._target)
            os.rename(made, self._target)
            sync_folder(os.path.dirname(self._target))
        self.remove()

    def _disturbed(self) -> IOFailed:
        return IOFailed(
            errno.ENOENT,
            f"{self._folder}, in which {self._out} grows, was removed or emptied by others; run the same command again",
        )

    def _swap(self) -> None:
        """Make the result the output; after a kill at any point ``_finish_publishing`` does the rest."""
        require_free(self._out, self._target, overwrite=self._overwrite)
        if self._is_mount:
            move_into(self._result, self._target)
            return
        if not os.path.lexists(self._target) or is_empty(self._target):
            if os.path.isdir(self._target):
                os.rmdir(self._target)
            os.rename(self._result, self._target)
        elif not exchange(self._result, self._target):
            os.rename(self._target, self._replaced)
            os.rename(self._result, self._target)
        sync_folder(os.path.dirname(self._target))

    def _finish_publishing(self, published: Sequence[int]) -> None:
        """Complete what a run that was killed while publishing had begun."""
        if not self._is_result(published):
            return
        if self._is_mount:
            move_into(self._result, self._target)
        elif os.path.lexists(self._replaced) and not os.path.lexists(self._target):
            os.rename(self._result, self._target)
            sync_folder(os.path.dirname(self._target))

    def _is_result(self, published: Sequence[int]) -> bool:
        return os.path.lexists(self._result) and identity(self._result) == tuple(published)

    def _is_published(self, published: Sequence[int]) -> bool:
        if self._is_mount:
            return not os.path.lexists(self._result)
        return os.path.lexists(self._target) and identity(self._target) == tuple(published)

    def _restore_replaced(self) -> None:
        """Put back what was about to be replaced by a result that is not there any more, or no longer wanted."""
        if os.path.lexists(self._replaced) and not os.path.lexists(self._target):
            os.rename(self._replaced, self._target)
        remove(self._replaced)

    def remove(self) -> None:
        """Remove the partial folder."""
        for path in (self._result, self._replaced, self.scratch):
            remove(path)
        if os.name == "nt":  # where nothing can be removed that is open
            self._journal.close()
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self._folder, JOURNAL))
            os.rmdir(self._folder)


@contextlib.contextmanager
def claim(out: str, *, overwrite: bool, resumes: bool = True) -> Iterator[Workplace]:
    """Make and lock the partial folder of an output for the time of a ``with`` block.

    It is removed when the block fails by an error of lorasmith's own; a full disk, a failed read or write, and an
    interruption leave it for the next run, unless that could take up nothing (``resumes``). Raises OutputBusy when
    another run holds it, and NoSpace or IOFailed for what the system reports under way.
    """
    target = os.path.realpath(out)
    folder = partial_folder(target)
    made = _first_missing(os.path.dirname(folder))
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        journal = Journal(_lock(out, folder))
    except LorasmithError:
        raise
    except OSError as error:
        _remove_empty(os.path.dirname(folder), made)
        raise IOFailed(error.errno, f"cannot write beside {out}: {error.strerror}") from error
    place = Workplace(out, target, folder, journal, overwrite=overwrite)
    try:
        yield place
    except LorasmithError as error:
        if not (error.may_pass and resumes):
            place.remove()
        raise
    except OSError as error:
        if not resumes:
            place.remove()
        raise _as_ours(error, out, " to go on from here" if resumes else "") from error
    except BaseException as error:
        if isinstance(error, Exception) or not resumes:
            place.remove()
        raise
    finally:
        journal.close()
        _remove_empty(os.path.dirname(folder), made)


def _as_ours(error: OSError, out: str, what_for: str) -> NoSpace | IOFailed:
    """An error of the system's, met while writing, as one of ours; ``what_for`` a rerun is good."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(error.errno, f"the disk of {out} is full; make room and run the same command again{what_for}")
    return IOFailed(error.errno, f"writing {out} failed: {error.strerror}; run the same command again{what_for}")


def _lock(out: str, folder: str) -> int:
    """The journal, opened and locked: made if need be, refused if the folder is not ours."""
    busy = OutputBusy(
        errno.EAGAIN, f"another run is writing {out} ({folder} is locked); wait for it, or choose another output"
    )
    path = os.path.join(folder, JOURNAL)
    for attempt in range(_ATTEMPTS):
        if os.path.isdir(folder) and os.listdir(folder) and not os.path.isfile(path):
            raise OutputExists(f"{folder} is in the way and was not made by lorasmith; move it elsewhere")
        try:
            os.makedirs(folder, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o666)
        except FileNotFoundError:
            if attempt == _ATTEMPTS - 1:  # nobody removes it: no folder can be made there
                raise
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
    raise busy


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


def put(file: SideFile, path: str) -> None:
    """Write a side file, on the disk."""
    with open(path, "wb") as stream:
        if file.source is None:
            stream.write((file.text or "").encode())
        else:
            _copy(file, stream.fileno())
        stream.flush()
        os.fsync(stream.fileno())


def _copy(file: SideFile, fd: int) -> None:
    """Copy a side file, making sure that it is still what was planned."""
    assert file.source is not None
    sha = hashlib.sha256()
    changed = InputChanged(f"{file.source} was changed while its model was being merged; run the same command again")
    try:
        source = open_regular(file.source)
    except LorasmithError as error:
        raise changed from error
    with source as stream:
        while block := stream.read(_BLOCK):
            sha.update(block)
            view = memoryview(block)
            while view:
                view = view[os.write(fd, view) :]
    if file.sha256 not in (sha.hexdigest(), *_git_names(file)):
        raise changed


def _git_names(file: SideFile) -> tuple[str, ...]:
    """What else a side file may be known by, if its digest is none of the file's own."""
    if file.source is None or len(file.sha256) != 2 * hashlib.sha1().digest_size:
        return ()
    return git_name(file.source), pointer_name(file.source)


def _first_missing(folder: str) -> str | None:
    """The topmost of the folders that would have to be made."""
    missing = None
    while not os.path.isdir(folder) and os.path.dirname(folder) != folder:
        missing, folder = folder, os.path.dirname(folder)
    return missing


def _remove_empty(folder: str, topmost: str | None) -> None:
    """Remove the folders that were made for a result, up to ``topmost``, unless something is in them."""
    while topmost is not None and len(folder) >= len(topmost):
        try:
            os.rmdir(folder)
        except OSError:
            break
        folder = os.path.dirname(folder)
