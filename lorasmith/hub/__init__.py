"""Transfer to and from the Hub, by its own client: names to revisions, files and ranges; files to commits.

    reference("me/lora@v2/sub")   what a name means on the Hub, None where it is a path
    Hub(endpoint, token)          a connection
        .open(reference)          its files at one commit, nothing fetched
        .fetch(snapshot, names)   into the shared cache
        .fetch_into(...)          one file, into a folder; .fetch_all several
        .reader(snapshot, name)   the first bytes of a file

The client is loaded when a name of the Hub is met, not before. Its errors leave here as lorasmith's, one line each.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasmith import __version__
from lorasmith.errors import BadOption, HubFailed, NoSpace
from lorasmith.gitnames import git_name, pointer_name
from lorasmith.hub.failures import told
from lorasmith.hub.silence import silent_bar
from lorasmith.records import Origin

if TYPE_CHECKING:
    from huggingface_hub import HfApi, RepoFile

FIRST_BYTES = 1 << 16
"""What is asked for of a file whose header is wanted; most headers are shorter."""

ATTEMPTS = 4
"""How often the first bytes of a file are asked for where answers break off."""

_ADDRESS = re.compile(r"(hf://|https?://|(www\.)?huggingface\.co/|hf\.co/)", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[^\s:]+)?(/[^\s:]+)*")
_TYPES = ("models", "datasets", "spaces", "kernels", "buckets")
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".json")


@dataclass(frozen=True)
class Reference:
    """A repository as it was named, and the folder or file in it that is meant."""

    repo: str
    revision: str | None
    inside: str


@dataclass(frozen=True)
class RemoteFile:
    """Size in bytes, the SHA-1 that Git knows it by, whether Git holds only a pointer to it, and then its SHA-256."""

    size: int
    digest: str
    is_large: bool
    sha256: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at one commit, and the folder of the cache where they are or will be."""

    origin: Origin
    files: Mapping[str, RemoteFile]
    folder: str


def reference(text: str, endpoint: str | None = None, *, or_path: bool = True) -> Reference | None:
    """What a name means on the Hub; None where it is a path: one that exists, or one into a folder that does.

    Where no path can be meant (not ``or_path``), it does not matter what is here. Raises BadOption for an address that
    is none of a model.
    """
    if or_path and os.path.lexists(text):
        return None
    first = text.split("/", 1)[0]
    if not _ADDRESS.match(text):
        if not _NAME.fullmatch(text) or (or_path and os.path.isdir(first)) or first in _TYPES:
            return None
        if text.count("/") == 1 and text.endswith(_FILES):
            return None
        text = f"hf://{text}"
    from huggingface_hub import constants
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    text = re.sub(r"^(https?://)[^/]*@", r"\1", text)  # a login, as addresses for git have it, is nothing to show
    try:
        uri = parse_hf_uri(text, endpoint or constants.ENDPOINT)
    except HfUriError as error:
        raise BadOption(f"{text} is no address of a model on the Hub: {error.msg}") from error
    if uri.type != "model":
        raise BadOption(f"{text} is the address of a {uri.type}, not of a model")
    return Reference(uri.id, uri.revision, uri.path_in_repo.strip("/"))


class Hub:
    """A connection, by default the one that the client is set up for (``HF_ENDPOINT``, ``HF_TOKEN``, a login).

    Raises BadOption for what can be no token.
    """

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        from huggingface_hub import HfApi

        if token is not None and not re.fullmatch(r"[!-~]+", token):
            what = "has characters that no token has" if token else "is empty; is a variable of the script not set?"
            raise BadOption(f"the token {what}")
        self._token = token
        self.api: HfApi = HfApi(endpoint=endpoint, token=token, library_name="lorasmith", library_version=__version__)

    # ------------------------------------------------------------------------------------------------- reading

    def open(self, reference: Reference) -> Snapshot:
        """The files of a repository at the commit that its revision stands for now."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        repo = reference.repo
        with told(repo, self.api.endpoint, reference.revision):
            if not constants.HF_HUB_OFFLINE:
                repo = self._name_now(reference)
            commit = self.api.resolve_revision(repo, revision=reference.revision).resolved
        name = repo_folder_name(repo_id=repo, repo_type="model")
        folder = os.path.join(constants.HF_HUB_CACHE, name, "snapshots", commit)
        with told(repo, self.api.endpoint, reference.revision):
            files = self._listing(repo, commit, folder)
        return Snapshot(Origin(repo, commit, reference.inside), files, folder)

    def _name_now(self, reference: Reference) -> str:
        """A repository's name, which may be another than it was asked for by; as asked where the Hub is away."""
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return self.api.model_info(reference.repo, revision=reference.revision).id
        except httpx2.TransportError:
            return reference.repo
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
            return reference.repo

    def _listing(self, repo: str, commit: str, folder: str) -> dict[str, RemoteFile]:
        """The files of a commit; offline, those that the cache knows or holds."""
        import httpx2
        from huggingface_hub import RepoFile, get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError, OfflineModeIsEnabled

        try:
            found: list[Any] = list(self.api.list_repo_tree(repo, recursive=True, revision=commit))
        except (OfflineModeIsEnabled, httpx2.TransportError) as away:
            try:
                found = list(get_cached_repo_tree(repo, revision=commit))
            except CachedRepoTreeNotFoundError:
                if not os.path.isdir(folder):
                    raise away from None
                return _held(folder)
        return {one.path: _remote_file(one) for one in found if isinstance(one, RepoFile)}

    def fetch(
        self, snapshot: Snapshot, names: Sequence[str], moved: Callable[[int], None] = lambda nbytes: None
    ) -> None:
        """Have files in the shared cache; ``moved`` is told of bytes as they come."""
        missing = [name for name in names if not os.path.exists(os.path.join(snapshot.folder, name))]
        if not missing:
            return
        self._require_room(sum(snapshot.files[name].size for name in missing), snapshot.folder)
        self._download(snapshot, missing, None, moved)
        absent = [name for name in missing if not os.path.exists(os.path.join(snapshot.folder, name))]
        if absent:
            raise HubFailed(f"{snapshot.origin.repo}: {absent[0]} was not downloaded; run the same command again")

    def _require_room(self, nbytes: int, folder: str) -> None:
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        free = shutil.disk_usage(folder).free
        if nbytes > free:
            raise NoSpace(
                errno.ENOSPC,
                f"{nbytes:,} bytes are to be downloaded and the disk of {folder} has {free:,} free; make room, point "
                "HF_HOME to another disk, or use --stream, which keeps a few shards at a time",
            )

    def fetch_into(self, snapshot: Snapshot, name: str, folder: str, stopped: Callable[[], bool]) -> str:
        """Download one file into a folder and return its path."""

        def moved(nbytes: int) -> None:
            if stopped():
                raise HubFailed("the download was given up, as the run has ended")

        return self._download_one(snapshot, name, folder, moved)

    def fetch_all(self, snapshot: Snapshot, names: Sequence[str], folder: str) -> None:
        """Download files into a folder; those that are there, whole, are not downloaded again."""
        self._require_room(sum(snapshot.files[name].size for name in names), folder)
        self._download(snapshot, names, folder, lambda nbytes: None)

    def _download(
        self, snapshot: Snapshot, names: Sequence[str], folder: str | None, moved: Callable[[int], None]
    ) -> None:
        """Download small files side by side, then large ones one by one: a kill loses what is under way."""
        small = [name for name in names if not snapshot.files[name].is_large]
        if small:
            patterns = [glob.escape(name) for name in small]
            with told(snapshot.origin.repo, self.api.endpoint):
                self.api.snapshot_download(
                    snapshot.origin.repo, revision=snapshot.origin.commit, allow_patterns=patterns, local_dir=folder
                )
            moved(sum(snapshot.files[name].size for name in small))
        for name in names:
            if snapshot.files[name].is_large:
                self._download_one(snapshot, name, folder, moved)

    def _download_one(self, snapshot: Snapshot, name: str, folder: str | None, moved: Callable[[int], None]) -> str:
        with told(snapshot.origin.repo, self.api.endpoint):
            return self.api.hf_hub_download(
                snapshot.origin.repo,
                name,
                revision=snapshot.origin.commit,
                local_dir=folder,
                tqdm_class=silent_bar(moved),
            )

    def reader(self, snapshot: Snapshot, name: str) -> Callable[[int], bytes]:
        """A function that returns the next n bytes of a file, from its first on, by few requests for ranges."""
        have = b""
        position = 0

        def read(count: int) -> bytes:
            nonlocal have, position
            wanted = min(position + count, snapshot.files[name].size)
            if len(have) < wanted:
                have = self._first_bytes(snapshot, name, max(wanted, FIRST_BYTES))
            position += count
            return have[position - count : position]

        return read

    def _first_bytes(self, snapshot: Snapshot, name: str, count: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        origin = snapshot.origin
        url = hf_hub_url(origin.repo, name, revision=origin.commit, endpoint=self.api.endpoint)
        headers = build_hf_headers(token=self._token, library_name="lorasmith", library_version=__version__)
        headers |= {"range": f"bytes=0-{count - 1}", "accept-encoding": "identity"}
        with told(origin.repo, self.api.endpoint):
            for _ in range(ATTEMPTS):
                got, broken = _received(url, headers, count)
                if broken is None:
                    break
            else:
                assert broken is not None
                raise broken
        return got


def _received(url: str, headers: Mapping[str, str], count: int) -> tuple[bytes, Exception | None]:
    """The first bytes of an answer, and what has cut it short, which the client must not see: it takes up only answers
    that have not begun.
    """
    import httpx2
    from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

    got = bytearray()
    with http_stream_backoff("GET", url, headers=headers) as response:
        hf_raise_for_status(response)
        try:
            for block in response.iter_bytes():
                got += block
                if len(got) >= count:  # also where a server sends all of a file whatever it is asked for
                    break
        except httpx2.TransportError as error:
            return b"", error
    return bytes(got[:count]), None


def _remote_file(file: RepoFile) -> RemoteFile:
    is_large = file.lfs is not None or file.xet_hash is not None
    return RemoteFile(file.size, file.blob_id, is_large, file.lfs.sha256 if file.lfs else None)


def _held(folder: str) -> dict[str, RemoteFile]:
    """The files that are in a folder of the cache, each a link to a file that is called by its digest."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            if os.path.isfile(path):
                size, is_large = os.path.getsize(path), len(os.path.basename(os.path.realpath(path))) == 64
                digest = pointer_name(path) if is_large else git_name(path)
                found[os.path.relpath(path, folder).replace(os.sep, "/")] = RemoteFile(size, digest, is_large)
    return found
