"""torch's own threads: off where several of ours compute side by side, and afterwards as they were."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

_users = 0
_threads = 0
_lock = threading.Lock()


def switch_off_torch_threads() -> None:
    """Let the calling thread's torch operations run on one thread; the first to ask notes what to go back to."""
    global _threads
    import torch

    with _lock:
        if _threads == 0:
            _threads = torch.get_num_threads()
    torch.set_num_threads(1)


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Give torch its number of threads back once the last run in this process has ended."""
    global _users, _threads
    with _lock:
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _threads:
                import torch

                # in a thread of its own: the caller's own setting was never changed
                restore = threading.Thread(target=torch.set_num_threads, args=(_threads,))
                restore.start()
                restore.join()
                _threads = 0


def in_order(work: Callable[[Job], Result], jobs: Iterable[Job], threads: int) -> Iterator[Result]:
    """What ``work`` makes of every job, in their order, computed by several threads a little ahead of the caller.

    Every thread's torch operations run on that thread alone, so that results do not depend on how many there are.
    """
    waiting: deque[Future[Result]] = deque()
    with torch_threads_kept(), ThreadPoolExecutor(threads, initializer=switch_off_torch_threads) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(work, job))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()
