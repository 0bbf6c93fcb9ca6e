"""Where a base and adapters come from: paths, or names on the Hub, of which no more is fetched than is needed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from lorasmith.adapter import Adapter
from lorasmith.checkpoint import (
    TOKENIZER_FILES,
    Checkpoint,
    checked,
    model_files,
    open_checkpoint,
    open_file,
    open_folder,
    require_path,
)
from lorasmith.errors import BadOption, LorasmithError, MissingFile, listed
from lorasmith.formats import ADAPTER_FILES, adapter_file, read_adapter
from lorasmith.hub import Hub, Reference, Snapshot, reference
from lorasmith.records import Origin, Progress
from lorasmith.safefile import Header, parse_header
from lorasmith.weightfile import read_weights

if TYPE_CHECKING:
    from lorasmith.records import Plan

ADAPTER_CONFIG = "adapter_config.json"

SIDE_BY_SIDE = 8
"""Requests for headers at a time."""


class OnHub:
    """A folder of a repository at one commit; its files come into the shared cache when they are asked for.

    Of one that ``passes`` no weights are to stay there, so that what was pickled is refused.
    """

    def __init__(self, hub: Hub, snapshot: Snapshot, inside: str, *, passes: bool = False) -> None:
        self._hub, self._snapshot, self._inside, self._passes = hub, snapshot, inside, passes
        self.name = str(snapshot.origin)
        self.path = os.path.join(snapshot.folder, *inside.split("/")) if inside else snapshot.folder

    def names(self, inside: str = "") -> list[str]:
        """What the commit has there, sorted."""
        start = self.at(inside)
        start += "/" if start else ""
        return sorted({name[len(start) :].split("/")[0] for name in self._snapshot.files if name.startswith(start)})

    def has(self, name: str) -> bool:
        """Whether the commit has it."""
        return self.is_file(name) or self.is_folder(name)

    def is_folder(self, name: str) -> bool:
        """Whether the commit has files in it."""
        return any(one.startswith(self.at(name) + "/") for one in self._snapshot.files)

    def is_file(self, name: str) -> bool:
        """Whether the commit has it."""
        return self.at(name) in self._snapshot.files

    def here(self, name: str) -> str:
        """Its path in the cache, where it is from now on."""
        self._hub.fetch(self._snapshot, [self.at(name)])
        return self._path(name)

    def weights(self, name: str) -> tuple[Header, tuple[str, ...]]:
        """The header of a safetensors file by its first bytes; what was pickled is fetched, as it must be read."""
        path = self._path(name)
        if not os.path.exists(path) and name.endswith(".safetensors"):
            size = self._snapshot.files[self.at(name)].size
            return parse_header(path, self._hub.reader(self._snapshot, self.at(name)), size, 0), ()
        if self._passes and not name.endswith(".safetensors"):
            raise BadOption("--stream needs safetensors; pickled weights are downloaded whole to be read")
        header, notes = read_weights(self.here(name))
        return replace(header, mtime_ns=0), notes

    def with_weights(self) -> list[str]:
        """The folders inside that have weights, as they are to be named; none if it has some itself."""
        start = self.at("") + "/" if self._inside else ""
        files = [name[len(start) :] for name in self._snapshot.files if name.startswith(start)]
        places = sorted({os.path.dirname(name) for name in files if name.endswith((".safetensors", ".bin"))})
        return [] if "" in places else [f"{self.name.rstrip('/')}/{place}" for place in places]

    def all_weights(self, names: Sequence[str]) -> list[tuple[Header, tuple[str, ...]]]:
        """The headers of several files, asked for side by side."""
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            return list(pool.map(self.weights, names))

    def at(self, name: str) -> str:
        """What the repository calls it."""
        return "/".join(part for part in (self._inside, name) if part)

    def _path(self, name: str) -> str:
        return os.path.join(self.path, *name.split("/"))


class Sources:
    """Opens what a run is made from, and fetches of the base what it reads.

    ``base`` is the snapshot of a base that is on the Hub, once it was opened; it passes through if ``stream``.
    """

    def __init__(self, endpoint: str | None = None, token: str | None = None, *, stream: bool = False) -> None:
        self._endpoint, self._token, self._streams = endpoint, token, stream
        self.base: Snapshot | None = None

    @cached_property
    def hub(self) -> Hub:
        """The connection, made when it is first needed."""
        return Hub(self._endpoint, self._token)

    def reference(self, path: str) -> Reference | None:
        """What a path is on the Hub; None if it is a path."""
        return reference(path, self._endpoint)

    def require(self, path: str) -> None:
        """Raise MissingFile for a path that is not there; names on the Hub are asked for later."""
        if self.reference(path) is not None:
            return
        try:
            require_path(path)
        except MissingFile as error:
            name = path.rstrip("/")
            if reference(name, self._endpoint, or_path=False) is None:
                raise
            raise MissingFile(f"{error}; if {name} on the Hub is meant, write hf://{name}") from None

    def open_base(self, path: str) -> Checkpoint:
        """Open a base by its headers, as ``open_checkpoint`` does; of one on the Hub, no tensor is fetched."""
        self.require(path)
        named = self.reference(path)
        if named is None:
            return open_checkpoint(path)
        snapshot = self.base = self.hub.open(named)
        inside, _, name = named.inside.rpartition("/")
        if named.inside in snapshot.files:
            folder = OnHub(self.hub, snapshot, inside, passes=self._streams)
            bare = open_file(folder, name, str(snapshot.origin))
            return checked(replace(bare, origin=snapshot.origin))
        folder = OnHub(self.hub, snapshot, named.inside, passes=self._streams)
        if not folder.names():
            raise _nothing_inside(snapshot)
        with _choices(folder):
            opened = open_folder(folder)
        known = {
            os.path.join(snapshot.folder, *name.split("/")): (file.size, file.digest)
            for name, file in snapshot.files.items()
        }
        return checked(replace(opened, origin=snapshot.origin, known=known))

    def read_adapter(self, path: str | Adapter) -> Adapter:
        """Read an adapter, which is fetched whole if it is on the Hub; one that was read already stays as it is."""
        if isinstance(path, Adapter):
            return path
        named = self.reference(path)
        if named is None:
            return read_adapter(path)
        snapshot = self.hub.open(named)
        self.hub.fetch(snapshot, self._adapter_files(snapshot))
        adapter = read_adapter(os.path.join(snapshot.folder, *named.inside.split("/")).rstrip(os.sep))
        return replace(adapter, path=str(snapshot.origin), origin=snapshot.origin)

    def _adapter_files(self, snapshot: Snapshot) -> list[str]:
        """The files of a repository that an adapter consists of."""
        inside, _, name = snapshot.origin.inside.rpartition("/")
        if snapshot.origin.inside not in snapshot.files:
            inside, name = snapshot.origin.inside, ""
        folder = OnHub(self.hub, snapshot, inside)
        if not folder.names():
            raise _nothing_inside(snapshot)
        with _choices(folder):
            own = name or adapter_file(folder)
        beside = (ADAPTER_CONFIG, *(() if name else TOKENIZER_FILES))
        return [folder.at(own), *(folder.at(one) for one in beside if folder.is_file(one))]

    def needed(self, path: str, beside: Sequence[str]) -> tuple[Snapshot, list[str]]:
        """A model or an adapter on the Hub, and the names of the files that it consists of, with others beside it."""
        named = reference(path, self._endpoint, or_path=False)
        if named is None:
            raise BadOption(f"{path!r} is no name on the Hub; write it like org/name, or hf://org/name")
        snapshot = self.hub.open(named)
        folder = OnHub(self.hub, snapshot, named.inside)
        if named.inside in snapshot.files:
            return snapshot, [named.inside]
        if not folder.names():
            raise _nothing_inside(snapshot)
        also = [folder.at(name) for name in beside if folder.is_file(name)]
        if any(folder.is_file(name) for name in (ADAPTER_CONFIG, *ADAPTER_FILES)):
            return snapshot, [*self._adapter_files(snapshot), *also]
        with _choices(folder):
            return snapshot, [*map(folder.at, model_files(folder)), *also]

    def beside_base(self, name: str, path: str) -> str | None:
        """The path of another file of the base's folder or repository, fetched if need be; None if it has none."""
        if self.base is None:
            file = os.path.join(path, name)
            return file if os.path.isfile(file) else None
        if name not in self.base.files:
            return None
        self.hub.fetch(self.base, [name])
        return os.path.join(self.base.folder, name)

    # ------------------------------------------------------------------------------------------------- fetching

    def name_of(self, path: str) -> str | None:
        """The name in the base's repository of a file that is, or will be, at a path of the cache; None for others."""
        if self.base is None:
            return None
        name = os.path.relpath(path, self.base.folder).replace(os.sep, "/")
        return name if name in self.base.files else None

    def whence(self, path: str) -> tuple[str, Origin, str]:
        """The name, the repository and the SHA-256 of a large file of the base, known by its path in the cache."""
        name = self.name_of(path)
        assert self.base is not None
        assert name is not None
        return name, self.base.origin, self.base.files[name].sha256 or ""

    def fetch(self, paths: Iterable[str], progress: Callable[[Progress], None] | None = None) -> None:
        """Have those files of the base in the cache that are on the Hub."""
        names = list(dict.fromkeys(name for name in map(self.name_of, paths) if name is not None))
        if self.base is None or not names:
            return
        folder, files, began = self.base.folder, self.base.files, time.monotonic()
        total = sum(files[name].size for name in names if not os.path.exists(os.path.join(folder, name)))
        done = 0

        def moved(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(Progress(min(done, total), total, time.monotonic() - began))

        self.hub.fetch(self.base, names, moved)

    def fetch_into(self, path: str, folder: str, stopped: Callable[[], bool]) -> str:
        """Download a file of the base, known by its path in the cache, into a folder; returns its path there."""
        name = self.name_of(path)
        assert self.base is not None
        assert name is not None
        return self.hub.fetch_into(self.base, name, folder, stopped)


@contextlib.contextmanager
def _choices(folder: OnHub) -> Iterator[None]:
    """Let an error about a folder without weights name those inside it that have some."""
    try:
        yield
    except MissingFile as error:
        inner = folder.with_weights()
        if not inner or inner[0] in str(error):
            raise
        raise MissingFile(f"{error} There are weights in {listed(inner, 10)}: name the one you mean") from None


def _nothing_inside(snapshot: Snapshot) -> LorasmithError:
    folders = sorted({name.split("/")[0] for name in snapshot.files if "/" in name})
    there = f"it has {listed(folders)}" if folders else "it has no folders"
    return MissingFile(f"{snapshot.origin.repo} has nothing at {snapshot.origin.inside!r}; {there}")


def side_paths(plan: Plan) -> Sequence[str]:
    """The paths that side files are copied from."""
    return [file.source for file in plan.side_files if file.source is not None]
