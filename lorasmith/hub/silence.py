"""Keeps the client from printing: a library shows nothing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

_lock = threading.Lock()
_users = 0
_restore: list[Callable[[], None]] = []


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep the client's bars and remarks off the terminal, until the last thread that asked for it is done."""
    global _users
    with _lock:
        if _users == 0:
            _restore.extend(_switch_off())
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for restore in _restore:
                    restore()
                _restore.clear()


def _switch_off() -> Iterator[Callable[[], None]]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    yield lambda: logging.set_verbosity(level)
    if not are_progress_bars_disabled():
        disable_progress_bars()
        yield enable_progress_bars


def silent_bar(moved: Callable[[int], None]) -> Any:
    """A progress bar that shows nothing and tells of the bytes; what it is told to raises, ends the transfer."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            moved(int(n or 0))
            return None

    return Silent
