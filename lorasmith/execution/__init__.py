"""Carries a plan out: one queue of tasks, threads that take from it, files finished one by one.

Copies need no arithmetic, so they begin while torch is still being imported. Threads work side by side on different
panels, each with torch's own threads switched off.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from lorasmith.execution.blocks import Budget, Task, tasks
from lorasmith.execution.worker import Worker
from lorasmith.execution.workplace import Workplace
from lorasmith.records import Convert, Plan, Progress, Survival
from lorasmith.rounding import Sample, survival
from lorasmith.safefile import Reader, Writer

ProgressCallback = Callable[[Progress], None]

POLL = 0.1
"""Seconds between two progress events, and the longest a Ctrl-C waits to be noticed."""


@dataclass(frozen=True)
class Outcome:
    """What carrying out a plan has shown: the survival, bytes found finished, and the threads used."""

    survival: Survival | None
    bytes_resumed: int
    threads: int


def default_threads() -> int:
    """Two more than the processors this process may use: while some wait for the disk, others compute."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return usable + 2


def execute(plan: Plan, place: Workplace, budget: Budget, progress: ProgressCallback | None = None) -> Outcome:
    """Write every file of the plan that holds weights and is not finished yet.

    Raises NotFinite, IOFailed, and the system's own OSError from a failed write (``claim`` makes it lorasmith's).
    """
    queue = _Queue(plan, budget, place)
    started = time.monotonic()
    with _readers(plan) as readers, _torch_threads_kept():
        workers = [Worker(budget.panel, readers, allow_overflow=plan.allow_overflow) for _ in range(budget.threads)]
        running = [threading.Thread(target=queue.work, args=(worker,), daemon=True) for worker in workers]
        if queue.needs_torch:
            running.append(threading.Thread(target=queue.import_torch, daemon=True))
        try:
            for thread in running:
                thread.start()
            for thread in running:
                while thread.is_alive():
                    thread.join(POLL)
                    if progress is not None:
                        progress(queue.progress(time.monotonic() - started))
        finally:
            queue.stop()
            for thread in running:
                if thread.ident is not None:
                    thread.join()
            queue.close()
        queue.raise_error()
        if progress is not None:
            progress(queue.progress(time.monotonic() - started))
    samples: list[Sample] = [one for worker in workers for one in worker.samples]
    return Outcome(survival(samples), queue.resumed, budget.threads)


class _Queue:
    """The tasks that are left, in the order of the files; shared by all threads."""

    def __init__(self, plan: Plan, budget: Budget, place: Workplace) -> None:
        self._plan = plan
        self._place = place
        self._lock = threading.Lock()
        self._torch_ready = threading.Event()
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self._writers: dict[int, Writer] = {}
        self._plain: deque[tuple[int, Task]] = deque()
        self._arithmetic: deque[tuple[int, Task]] = deque()
        self._left: dict[int, int] = {}
        self.resumed = 0
        self._fill(budget)
        self._done = self.resumed
        self.needs_torch = bool(self._arithmetic)

    def _fill(self, budget: Budget) -> None:
        number = 0
        for index, output in enumerate(self._plan.outputs):
            if self._name(index) in self._place.finished:
                self.resumed += output.size
                continue
            for task in tasks(self._plan, index, budget.panel):
                (self._arithmetic if isinstance(task.step, Convert) else self._plain).append((number, task))
                self._left[index] = self._left.get(index, 0) + 1
                number += 1

    def _name(self, index: int) -> str:
        """The file's name in the result; a single file is the result itself."""
        return "" if self._plan.single_file else self._plan.outputs[index].name

    def progress(self, seconds: float) -> Progress:
        total = sum(output.size for output in self._plan.outputs)
        return Progress(self._done, total, seconds, self.resumed)

    # ------------------------------------------------------------------------------------------------- threads

    def import_torch(self) -> None:
        try:
            import torch  # noqa: F401 - the first import takes a second, during which copies go on
        except BaseException as error:  # handed to the caller's thread
            self._fail(error)
        finally:
            self._torch_ready.set()

    def work(self, worker: Worker) -> None:
        """Take tasks until none is left or something failed."""
        alone = False
        try:
            while (task := self._next()) is not None:
                if isinstance(task.step, Convert) and not alone:
                    _switch_off_torch_threads()
                    alone = True
                writer = self._writer(task.output)
                written = worker.run(task, writer)
                self._finish(task, writer, written)
        except BaseException as error:  # handed to the caller's thread
            self._fail(error)

    def _next(self) -> Task | None:
        while not self._stopped.is_set():
            with self._lock:
                ready = self._torch_ready.is_set()
                queues = [one for one in (self._plain, self._arithmetic if ready else None) if one]
                if queues:
                    return min(queues, key=lambda one: one[0][0]).popleft()[1]
                if not self._arithmetic:
                    return None
            self._torch_ready.wait()
        return None

    def _writer(self, index: int) -> Writer:
        with self._lock:
            if index not in self._writers:
                path = self._place.path(self._name(index))
                self._writers[index] = Writer(path, self._plan.outputs[index].size)
            return self._writers[index]

    def _finish(self, task: Task, writer: Writer, written: int) -> None:
        with self._lock:
            self._done += written
            self._left[task.output] -= 1
            last = self._left[task.output] == 0
        if last:
            writer.sync()
            with self._lock:
                self._place.finish(self._name(task.output), self._plan.outputs[task.output].size)
                del self._writers[task.output]
            writer.close()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
        self.stop()

    def stop(self) -> None:
        """Let every thread end after the task it is at."""
        self._stopped.set()
        self._torch_ready.set()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def raise_error(self) -> None:
        """Raise what went wrong in any thread."""
        if self._error is not None:
            raise self._error


@contextlib.contextmanager
def _readers(plan: Plan) -> Iterator[Mapping[str, Reader]]:
    """A reader for every file the steps read from."""
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


# ---------------------------------------------------------------------------------------------- torch's threads

_torch_users = 0
_torch_threads = 0
_torch_lock = threading.Lock()


def _switch_off_torch_threads() -> None:
    """Let the calling thread's torch operations run on one thread; the first to ask notes what to go back to."""
    global _torch_threads
    import torch

    with _torch_lock:
        if _torch_threads == 0:
            _torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)


@contextlib.contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """Give torch its number of threads back once the last run in this process has ended."""
    global _torch_users, _torch_threads
    with _torch_lock:
        _torch_users += 1
    try:
        yield
    finally:
        with _torch_lock:
            _torch_users -= 1
            if _torch_users == 0 and _torch_threads:
                import torch

                # in a thread of its own: the caller's own setting was never changed
                restore = threading.Thread(target=torch.set_num_threads, args=(_torch_threads,))
                restore.start()
                restore.join()
                _torch_threads = 0
