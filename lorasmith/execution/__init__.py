"""Carries a plan out: threads that compute, threads that write, files finished one by one.

    arithmetic tasks ──> computing threads ──> filled panels ──> writing threads ──> files
    copies ───────────────────────────────────────────────────────────┘
    free panels go back to whoever needs one next

Writing waits for the disk and computing for nothing, so each has threads of its own. Copies need no arithmetic: they
begin while torch is still being imported, and afterwards fill the gaps between panels. Computing threads have torch's
own threads switched off and work side by side on different panels.

Where what is read is not there yet, one more thread has it fetched, file of the result by file, and hands on the tasks
of each file whose sources have come.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

from lorasmith.execution.blocks import WRITERS, Budget, Task, tasks
from lorasmith.execution.device import DeviceWorker, full_precision
from lorasmith.execution.torchthreads import switch_off_torch_threads, torch_threads_kept
from lorasmith.execution.transfer import copy
from lorasmith.execution.worker import Filled, Worker
from lorasmith.execution.workplace import Workplace
from lorasmith.records import Convert, Copy, Merge, Output, Plan, Progress, Write
from lorasmith.rounding import Sample
from lorasmith.safefile import AlignedBuffer, Reader, Writer

ProgressCallback = Callable[[Progress], None]
FinishedCallback = Callable[[Output, list[Sample]], None]
"""Told that a file is on the disk, with what was sampled of its tensors; one call at a time."""
FetchCallback = Callable[[Output, Callable[[], bool]], None]
"""Asked to make sure that what a file is made from is there; returns when it is, or when what it is given says that
the run has ended."""

POLL = 0.1
"""Seconds between two progress events, and the longest a Ctrl-C waits to be noticed."""


FEEDERS = 4
"""Threads that feed a GPU, at most: what one reads in the meantime is more than a disk takes."""


def default_threads(device: str = "cpu") -> int:
    """As many as the processors this process may use; for a GPU a few do."""
    if device != "cpu":
        return min(FEEDERS, default_threads())
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def execute(
    plan: Plan,
    place: Workplace,
    budget: Budget,
    finished: FinishedCallback,
    progress: ProgressCallback | None = None,
    fetch: FetchCallback | None = None,
) -> int:
    """Write every file of the plan that holds weights and is not finished yet; return the bytes that were.

    ``fetch`` is called, from a thread of its own, for one file after another before it is begun; a source is closed
    when no file to come reads from it. Raises NotFinite, IOFailed, what ``finished``, ``fetch`` and ``progress`` raise,
    and the system's own OSError from a failed write (``claim`` makes it lorasmith's).
    """
    started = time.monotonic()
    with _readers() as readers, torch_threads_kept():
        work = _Work(plan, budget, place, readers, finished, fetch)
        running = [threading.Thread(target=work.write, daemon=True) for _ in range(WRITERS)]
        if fetch is not None:
            running.append(threading.Thread(target=work.fetch, daemon=True))
        if work.needs_torch:
            running += [threading.Thread(target=work.compute, daemon=True) for _ in range(budget.threads)]
        try:
            for thread in running:
                thread.start()
            for thread in running:
                while thread.is_alive():
                    thread.join(POLL)
                    if progress is not None:
                        progress(work.progress(time.monotonic() - started))
        finally:
            work.stop()
            for thread in running:
                if thread.ident is not None:
                    thread.join()
            work.close()
        work.raise_error()
        if progress is not None:
            progress(work.progress(time.monotonic() - started))
    return work.resumed


class _Work:
    """What is left to do, shared by all threads: tasks in the order of the files, and panels filled and free."""

    def __init__(
        self,
        plan: Plan,
        budget: Budget,
        place: Workplace,
        readers: dict[str, Reader],
        finished: FinishedCallback,
        fetch: FetchCallback | None,
    ) -> None:
        self._plan = plan
        self._place = place
        self._budget = budget
        self._readers = readers
        self._finished = finished
        self._fetch = fetch
        self._coming: deque[int] = deque()
        self._samples: dict[int, list[Sample]] = {}
        self._changed = threading.Condition()
        self._arithmetic: deque[Task] = deque()
        self._plain: deque[Task] = deque()
        self._filled: deque[Filled] = deque()
        self._free = [AlignedBuffer(budget.panel) for _ in range(budget.panels)]
        self._left: dict[int, int] = {}
        self._writers: dict[int, Writer] = {}
        self._error: BaseException | None = None
        self._stopped = False
        self.resumed = sum(output.size for output in plan.outputs if place.is_finished(output))
        self._done = self.resumed
        ahead = [index for index, output in enumerate(plan.outputs) if not place.is_finished(output)]
        self.needs_torch = any(isinstance(step, Convert) for index in ahead for step in plan.outputs[index].steps)
        if fetch is None:
            for index in ahead:
                self._queue(index)
        else:
            self._coming = deque(ahead)

    def _queue(self, index: int) -> None:
        for task in tasks(self._plan, index, self._budget.panel):
            (self._arithmetic if isinstance(task.step, Convert) else self._plain).append(task)
            self._left[index] = self._left.get(index, 0) + 1

    # ------------------------------------------------------------------------------------------------ fetching

    def fetch(self) -> None:
        """Have the sources of one file after another fetched, until there is none left or something failed."""
        assert self._fetch is not None
        try:
            while self._coming and not self._stopped:
                self._fetch(self._plan.outputs[self._coming[0]], lambda: self._stopped)
                with self._changed:
                    self._queue(self._coming.popleft())
                    self._changed.notify_all()
        except BaseException as error:  # handed to the caller's thread
            self._fail(error)

    def _close_readers(self, done: int) -> None:
        """Close what no file but one that is done reads from, so that it may be removed."""
        ahead = {*self._left, *self._coming} - {done}
        needed = {source for index in ahead for source in sources(self._plan.outputs[index])}
        for file in self._readers.keys() - needed:
            self._readers.pop(file).close()

    def progress(self, seconds: float) -> Progress:
        total = sum(output.size for output in self._plan.outputs)
        return Progress(self._done, total, seconds, self.resumed)

    # ----------------------------------------------------------------------------------------------- computing

    def compute(self) -> None:
        """Fill panels until no arithmetic is left or something failed."""
        try:
            switch_off_torch_threads()
            worker = _worker(self._plan, self._readers)
            with full_precision("cpu") if self._plan.device == "cpu" else contextlib.nullcontext():
                while (taken := self._next_arithmetic()) is not None:
                    filled = worker.fill(*taken)
                    with self._changed:
                        self._filled.append(filled)
                        self._changed.notify_all()
        except BaseException as error:  # handed to the caller's thread
            self._fail(error)

    def _next_arithmetic(self) -> tuple[Task, AlignedBuffer] | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or (self._arithmetic and self._free) or not (self._arithmetic or self._coming)
            )
            if self._stopped or not self._arithmetic:
                return None
            return self._arithmetic.popleft(), self._free.pop()

    # ------------------------------------------------------------------------------------------------- writing

    def write(self) -> None:
        """Write filled panels, and copies in between, until nothing is left or something failed."""
        try:
            while (taken := self._next_to_write()) is not None:
                task, panel = taken.task, taken.panel
                writer = self._writer(task.output)
                if isinstance(task.step, Convert):
                    writer.write(panel, taken.start, taken.nbytes, taken.offset)
                elif isinstance(task.step, Copy):
                    copy(self._readers[task.step.source], taken.start, writer, taken.offset, taken.nbytes, panel)
                elif isinstance(task.step, Write):
                    writer.write_bytes(task.step.data, taken.offset)
                self._finish(taken, writer)
        except BaseException as error:  # handed to the caller's thread
            self._fail(error)

    def _next_to_write(self) -> Filled | None:
        """A filled panel if there is one, else a copy and a panel for it."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stopped or self._filled or (self._plain and self._free) or not (self._left or self._coming)
                )
            )
            if self._stopped or not (self._left or self._coming):
                return None
            if self._filled:
                return self._filled.popleft()
            task = self._plain.popleft()
            step = task.step
            source = step.start + task.start if isinstance(step, Copy) else 0
            return Filled(task, self._free.pop(), source, task.stop - task.start, step.offset + task.start)

    def _writer(self, index: int) -> Writer:
        with self._changed:
            if index not in self._writers:
                output = self._plan.outputs[index]
                self._writers[index] = Writer(self._place.path(output.name), output.size)
            return self._writers[index]

    def _finish(self, taken: Filled, writer: Writer) -> None:
        index = taken.task.output
        with self._changed:
            self._done += taken.nbytes
            self._free.append(taken.panel)
            self._samples.setdefault(index, []).extend(taken.samples)
            self._left[index] -= 1
            last = self._left[index] == 0
            self._changed.notify_all()
        if last:
            writer.sync()
            with self._changed:
                if self._fetch is not None:
                    self._close_readers(index)
                self._finished(self._plan.outputs[index], self._samples.pop(index))
                del self._writers[index], self._left[index]
                self._changed.notify_all()
            writer.close()

    # -------------------------------------------------------------------------------------------------- ending

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
        self.stop()

    def stop(self) -> None:
        """Let every thread end after the task it is at."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def raise_error(self) -> None:
        """Raise what went wrong in any thread."""
        if self._error is not None:
            raise self._error


def _worker(plan: Plan, readers: Mapping[str, Reader]) -> Worker:
    if plan.device == "cpu":
        return Worker(readers, allow_overflow=plan.allow_overflow)
    return DeviceWorker(readers, plan.device, allow_overflow=plan.allow_overflow)


def sources(output: Output) -> set[str]:
    """The files that an output is made from."""
    found = set()
    for step in output.steps:
        if isinstance(step, Copy):
            found.add(step.source)
        elif isinstance(step, Convert):
            terms = step.terms if isinstance(step, Merge) else ()
            found |= {step.entry.file, *(entry.file for term in terms for entry in term.delta.entries)}
    return found


@contextlib.contextmanager
def _readers() -> Iterator[dict[str, Reader]]:
    """A reader for every file that steps read from, opened when it is first needed."""
    readers = _Readers()
    try:
        yield readers
    finally:
        for reader in readers.values():
            reader.close()


class _Readers(dict[str, Reader]):
    """Opens a file when it is first read from."""

    _lock = threading.Lock()

    def __missing__(self, file: str) -> Reader:
        with self._lock:
            if file not in self:
                self[file] = Reader(file)
            return self[file]
