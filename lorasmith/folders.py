"""Where a model's or an adapter's files are: a folder of this machine, or one elsewhere that is asked the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from lorasmith.errors import IOFailed
from lorasmith.safefile import Header
from lorasmith.weightfile import read_weights


class Folder(Protocol):
    """Where a model's files are; names are relative to it, with slashes.

    ``name`` is what to call it, ``path`` where its files are or will be.
    """

    name: str
    path: str

    def names(self, inside: str = "") -> list[str]:
        """What is in the folder, or in one inside it, sorted."""

    def has(self, name: str) -> bool:
        """Whether there is anything of this name."""

    def is_folder(self, name: str) -> bool:
        """Whether there is a folder of this name."""

    def is_file(self, name: str) -> bool:
        """Whether there is a file of this name."""

    def here(self, name: str) -> str:
        """The path of a small file that can be read now."""

    def weights(self, name: str) -> tuple[Header, tuple[str, ...]]:
        """The header of a file of weights, and notes on it."""

    def all_weights(self, names: Sequence[str]) -> list[tuple[Header, tuple[str, ...]]]:
        """The same for several."""


class OnDisk:
    """A folder of this machine."""

    def __init__(self, path: str) -> None:
        self.name = self.path = path

    def names(self, inside: str = "") -> list[str]:
        """The sorted names in it; IOFailed where it may not be read."""
        return names_in(self._at(inside) if inside else self.path)

    def has(self, name: str) -> bool:
        """Whether it is there, links followed."""
        return os.path.exists(self._at(name))

    def is_folder(self, name: str) -> bool:
        """Whether it is one, links followed."""
        return os.path.isdir(self._at(name))

    def is_file(self, name: str) -> bool:
        """Whether it is one, links followed."""
        return os.path.isfile(self._at(name))

    def here(self, name: str) -> str:
        """Its path."""
        return self._at(name)

    def weights(self, name: str) -> tuple[Header, tuple[str, ...]]:
        """What ``read_weights`` gives."""
        return read_weights(self._at(name))

    def all_weights(self, names: Sequence[str]) -> list[tuple[Header, tuple[str, ...]]]:
        """What it gives for each."""
        return [self.weights(name) for name in names]

    def _at(self, name: str) -> str:
        return os.path.join(self.path, name)


def names_in(folder: str) -> list[str]:
    """The sorted names in a folder; IOFailed where it may not be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise IOFailed(f"the folder {folder} cannot be read: {error.strerror}") from error
