"""A base that passes through: its shards are downloaded one after another, and gone once they are merged.

At most two files of the result are in the house at a time, from the download of what they are made from until they
are finished (or uploaded and gone, where they do not stay). So no more than three shards are on the disk beside what
stays: a result that is being uploaded, and the next one and what it is made from; or a shard that is merged, its
result, and the shard that comes next.
"""

from __future__ import annotations

import contextlib
import glob
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from lorasmith.execution import sources as sources_of
from lorasmith.records import Convert, Copy, Output, Plan, Step
from lorasmith.sources import Sources

IN_HOUSE = 2
"""Files of the result that are worked on at a time."""

POLL = 0.1
"""Seconds after which a download that waits looks whether the run still goes on."""


class Stream:
    """The shards of one run that pass through ``folder``; ``plan`` reads them there."""

    def __init__(self, plan: Plan, sources: Sources, folder: str) -> None:
        self._sources = sources
        self._folder = folder
        self._from = {
            os.path.join(folder, *str(sources.name_of(file)).split("/")): file
            for file, _, _ in plan.base_files
            if not os.path.exists(file)  # what the cache has is read from there, and stays
        }
        self.plan = _moved(plan, {old: new for new, old in self._from.items()})
        self._ahead = list(self.plan.outputs)
        for left in glob.glob(os.path.join(glob.escape(folder), ".cache", "**", "*.incomplete"), recursive=True):
            os.unlink(left)  # by a run that was killed; the client begins such files anew
        self._room = threading.Semaphore(IN_HOUSE)
        self._inside: set[str] = set()
        self._lock = threading.Lock()

    def fetch(self, output: Output, stopped: Callable[[], bool]) -> None:
        """Download what a file of the result is made from, once there is room for it."""
        while not self._room.acquire(timeout=POLL):
            if stopped():
                return
        self._inside.add(output.name)
        for file in sorted(sources_of(output) & self._from.keys()):
            if not stopped():
                self._sources.fetch_into(self._from[file], self._folder, stopped)

    def merged(self, output: Output) -> None:
        """Remove what was fetched for a file of the result and for none that is to come."""
        with self._lock:
            self._ahead = [one for one in self._ahead if one.name != output.name]
            needed = {file for one in self._ahead for file in sources_of(one)}
        for file in (sources_of(output) & self._from.keys()) - needed:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file)

    def leave(self, output: Output) -> None:
        """Say that a file of the result is done with: another may come in."""
        if output.name in self._inside:
            self._inside.remove(output.name)
            self._room.release()


def most_room(plan: Plan, *, stays: bool) -> int:
    """The most bytes that pass through the disk at a time; the result's own count where it does not stay there."""
    largest = max((size for _, size, _ in plan.base_files), default=0)
    if stays:
        return IN_HOUSE * largest
    return largest + IN_HOUSE * max((largest, *(output.size for output in plan.outputs)))


def _moved(plan: Plan, where: Mapping[str, str]) -> Plan:
    """The same plan with files of the base in other places."""
    outputs = (replace(one, steps=tuple(_steps(one.steps, where))) for one in plan.outputs)
    return replace(plan, outputs=tuple(outputs))


def _steps(steps: Iterable[Step], where: Mapping[str, str]) -> Iterable[Step]:
    for step in steps:
        if isinstance(step, Copy):
            yield replace(step, source=where.get(step.source, step.source))
        elif isinstance(step, Convert):
            file = step.entry.file
            yield replace(step, entry=replace(step.entry, file=where.get(file, file)))
        else:
            yield step
