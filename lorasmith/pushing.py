"""Results to the Hub: shards ahead while others are still being made, then all of it in one commit.

What was sent is noted on the disk beside the result, so that a run that is given again sends only what is missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from lorasmith.card import adapter_card, model_card
from lorasmith.checkpoint import TOKENIZER_FILES, model_files, require_path
from lorasmith.errors import BadFile, BadOption, HubFailed, LorasmithError
from lorasmith.folders import OnDisk, names_in
from lorasmith.formats import ADAPTER_FILES, adapter_file
from lorasmith.hub import Hub, reference
from lorasmith.hub.writing import (
    CannotCopy,
    Target,
    addition,
    commit,
    copy_of,
    deletion_of,
    exists,
    files_at,
    is_small,
    prepare,
    require_valid,
    upload,
    uploaded,
)
from lorasmith.jsonfile import open_regular, read_json
from lorasmith.records import Copy, Origin, Plan, Pushed
from lorasmith.sidefiles import PROVENANCE
from lorasmith.sources import ADAPTER_CONFIG

if TYPE_CHECKING:
    from lorasmith.hub.writing import Operation

CARD = "README.md"
SENT = "sent"
"""The file in which an upload notes what was sent."""

WEIGHTS = re.compile(r"(.*/)?((.+\.safetensors|pytorch_model.*\.bin|adapter_model\.bin)(\.index\.json)?)")
"""Weights that transformers or PEFT would load; those that an earlier push of a model left are in another's way."""


def target(
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> Target:
    """Where to push. Raises BadOption for what is no name of a repository."""
    name = repo.removeprefix("hf://")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise BadOption(f"{repo!r} is no name of a repository to push to; write it like me/name")
    if revision == "":
        raise BadOption("the branch to push to is empty; is a variable of the script not set?")
    return Target(name, revision, private, create_pr, commit_message)


def options_of(to: Target, card: str | os.PathLike[str] | None) -> list[str]:
    """The options of the command line that say how to push, but for a token."""
    values = {"--revision": to.revision, "--commit-message": to.message, "--card": None if card is None else str(card)}
    flags = {"--private": to.private, "--create-pr": to.create_pr}
    given = [text for name, value in values.items() if value is not None for text in (name, value)]
    return [*given, *(name for name, value in flags.items() if value)]


def require_pushed(**options: Any) -> None:
    """Raise BadOption if one of the options is given that say how to push, where nothing is to be pushed."""
    given = [name for name, value in options.items() if value]
    if given:
        raise BadOption(f"--{given[0].replace('_', '-')} is for --push, which was not given")


class Upload:
    """A push under way, from the first shard that is finished to the commit.

    ``sent`` are the files that the Hub has already, by their names.
    """

    def __init__(self, hub: Hub, to: Target, plan_hash: str) -> None:
        self._hub = hub
        self.to = prepare(hub, to)
        self._heading = {
            "at": hub.api.endpoint,
            "to": to.repo,
            "revision": to.revision,
            "create_pr": to.create_pr,
            "plan": plan_hash,
        }
        self._notes = ""
        self._operations: dict[str, Operation] = {}
        self._digests: dict[str, str] = {}
        self._copied: list[str] = []
        self._waiting: queue.Queue[tuple[str, str, Callable[[], None]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None
        self._closed = False
        self.sent: set[str] = set()

    def begin(self, folder: str) -> None:
        """Take up what an earlier run has sent and noted in a folder, where this one will note as well."""
        self._notes = os.path.join(folder, SENT)
        for name, size, sha256 in _noted(self._notes, self._heading):
            self._take(name, size, sha256)
        self._thread.start()

    def add(self, name: str, path: str, done: Callable[[], None]) -> None:
        """Send a file as soon as those before it are sent; ``done`` is called, from another thread, once it is."""
        if name in self.sent:
            done()
        else:
            self._waiting.put((name, path, done))

    def copy(self, name: str, source: str, origin: Origin, digest: str) -> None:
        """Have a file of this digest, ``source`` in another repository, copied from there by the Hub."""
        self._operations[name] = copy_of(name, source, origin)
        self._digests[name] = digest
        self._copied.append(name)

    @property
    def has_failed(self) -> bool:
        """Whether a file could not be sent."""
        return self._error is not None

    def close(self) -> None:
        """Send nothing more than what is being sent."""
        self._closed = True
        self._waiting.put(None)

    def require_well(self) -> None:
        """Raise what went wrong with a file that was to be sent."""
        if self._error is not None:
            raise self._error

    def finish(
        self, files: Mapping[str, str | bytes], message: str, instead: Callable[[str], AbstractContextManager[str]]
    ) -> Pushed:
        """Wait until all is sent, and commit it with ``files`` (paths or contents by their names).

        ``instead`` gives the path of a file for the time that the Hub, which cannot copy it, takes to receive it.
        """
        self._waiting.put(None)
        self._thread.join()
        self.require_well()
        self._operations |= {name: addition(name, content) for name, content in files.items()}
        try:
            return self._commit(message)
        except CannotCopy:
            self._send_instead(instead)
            return self._commit(message)

    def _send_instead(self, instead: Callable[[str], AbstractContextManager[str]]) -> None:
        for name in self._copied:
            with instead(name) as path:
                self._send(name, path)

    def _commit(self, message: str) -> Pushed:
        there = files_at(self._hub, self.to)
        known = {name for name, digest in self._digests.items() if there.get(name) == digest}
        now = [one for name, one in self._operations.items() if name not in known]
        try:
            return commit(self._hub, self.to, [*now, *left_overs(there, self._operations)], message)
        except HubFailed as error:
            if getattr(getattr(error.__cause__, "response", None), "status_code", None) == 400:
                self._forget()  # what was sent long ago may be gone
            raise

    def _run(self) -> None:
        while (one := self._waiting.get()) is not None:
            name, path, done = one
            try:
                if self._error is None and not self._closed:
                    self._send(name, path)
                    done()
            except BaseException as error:  # handed to whoever asks next
                self._error = error

    def _send(self, name: str, path: str) -> None:
        size = os.path.getsize(path)
        sent = upload(self._hub, self.to, name, path)
        if is_small(sent):  # goes with the commit, for which the file may be gone
            with open(path, "rb") as stream:
                self._operations[name] = addition(name, stream.read())
            return
        sha256 = sent.upload_info.sha256.hex()
        self._note(name, size, sha256)
        self._take(name, size, sha256)

    def _take(self, name: str, size: int, sha256: str) -> None:
        self._operations[name] = uploaded(name, size, sha256)
        self._digests[name] = sha256
        self.sent.add(name)

    def _forget(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._notes)

    def _note(self, name: str, size: int, sha256: str) -> None:
        os.makedirs(os.path.dirname(self._notes), exist_ok=True)
        new = not os.path.exists(self._notes)
        with open(self._notes, "a", encoding="utf-8") as stream:
            if new:
                stream.write(json.dumps(self._heading) + "\n")
            stream.write(json.dumps([name, size, sha256]) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def _noted(file: str, heading: Mapping[str, object]) -> Iterator[tuple[str, int, str]]:
    """What a run with the same heading has sent; a line that was cut short ends it."""
    with contextlib.suppress(FileNotFoundError, ValueError), open(file, encoding="utf-8") as stream:
        if json.loads(stream.readline()) != heading:
            os.unlink(file)
            return
        for line in stream:
            name, size, sha256 = json.loads(line)
            yield name, size, sha256


def left_overs(there: Collection[str], names: Collection[str]) -> list[Operation]:
    """Deletions of what would be loaded instead of, or beside, the weights that are pushed; none for a bare file.

    transformers takes a repository with the config of an adapter for that adapter, whatever weights it has besides.
    """
    content = {name for name in names if name != CARD}
    if len(content) < 2 or not any(WEIGHTS.fullmatch(name) for name in names):
        return []
    is_adapter = any(name in names for name in (*ADAPTER_FILES, ADAPTER_CONFIG))

    def is_in_the_way(name: str) -> bool:
        if is_adapter:
            return name in ADAPTER_FILES
        return name == ADAPTER_CONFIG or (WEIGHTS.fullmatch(name) is not None and "/" not in name)

    return [deletion_of(name) for name in there if name not in names and is_in_the_way(name)]


def untouched(plan: Plan) -> dict[str, str]:
    """Files of the result that are, byte for byte, files of the base: their names, and the base's paths."""
    sizes = {file: size for file, size, _ in plan.base_files}
    found = {}
    for output in plan.outputs:
        whole = output.steps[0]
        if len(output.steps) == 1 and isinstance(whole, Copy) and sizes.get(whole.source) == output.size:
            found[output.name] = whole.source
    return found


def push(
    path: str | os.PathLike[str],
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    card: str | os.PathLike[str] | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Pushed:
    """Push a model or an adapter, a folder or a file, to a repository on the Hub, which is made if need be.

    Large files are sent first, and nothing is visible before one commit at the end; a push that broke off goes on when
    it is called again. ``revision`` is a branch, ``private`` is for a repository that is made, ``create_pr`` opens a
    pull request. ``card`` is a file for ``README.md``; without one it is the folder's own, or one that tells what
    ``lorasmith.json`` tells. Raises HubRefused, HubFailed, BranchMoved, MissingFile or BadOption.
    """
    path = os.fspath(path)
    require_path(path)
    to = target(repo, revision=revision, private=private, create_pr=create_pr, commit_message=commit_message)
    message = f"Upload {os.path.basename(os.path.abspath(path))}"
    return send(Hub(endpoint, token), to, path, card=card, message=message)


def send(hub: Hub, to: Target, path: str, *, card: str | os.PathLike[str] | None, message: str) -> Pushed:
    """Push what is at a path to a target; ``push`` says how."""
    files: dict[str, str | bytes] = dict(files_of(path))
    given = card if card is not None else files.get(CARD)
    text = _card_of(hub, path, to.repo) if given is None else read_card(os.fsdecode(given))
    if text is not None:
        require_valid(hub, to, text)
        files[CARD] = text.encode()
    to = prepare(hub, to)
    large = {name: file for name, file in files.items() if WEIGHTS.fullmatch(name)}
    operations: dict[str, Operation] = {name: upload(hub, to, name, file) for name, file in large.items()}
    operations |= {name: addition(name, file) for name, file in files.items() if name not in large}
    stale = left_overs(files_at(hub, to), operations)
    return commit(hub, to, [*operations.values(), *stale], message)


def read_card(file: str | os.PathLike[str]) -> str:
    """A model card of the user's own."""
    try:
        with open_regular(os.fspath(file)) as stream:
            text: str = stream.read().decode("utf-8")
        return text
    except UnicodeDecodeError:
        raise BadFile(f"{os.fspath(file)} is no UTF-8 text, as a model card must be") from None


def files_of(path: str) -> Iterator[tuple[str, str]]:
    """The names and paths of what belongs to a model or an adapter, its card and its provenance included."""
    if not os.path.isdir(path):
        yield os.path.basename(path), path
        return
    names = names_in(path)
    if any(name in names for name in (*ADAPTER_FILES, ADAPTER_CONFIG)):
        found = {name: os.path.join(path, name) for name in (adapter_file(OnDisk(path)), ADAPTER_CONFIG)}
        found |= {name: os.path.join(path, name) for name in TOKENIZER_FILES}
    else:
        found = {name: os.path.join(path, *name.split("/")) for name in model_files(OnDisk(path))}
    found |= {name: os.path.join(path, name) for name in (CARD, PROVENANCE)}
    yield from ((name, file) for name, file in found.items() if os.path.isfile(file))


def _card_of(hub: Hub, path: str, repo: str) -> str | None:
    """A card that tells what the provenance of a result tells; None without that."""
    file = os.path.join(path, PROVENANCE)
    if not os.path.isfile(file):
        return None
    record = read_json(file)
    title = repo.rsplit("/", 1)[1]
    try:
        if not os.path.isfile(os.path.join(path, ADAPTER_CONFIG)):
            return model_card(record, title, library="transformers" if "base" in record else None)
        config = read_json(os.path.join(path, ADAPTER_CONFIG))
        base, task = config.get("base_model_name_or_path"), config.get("task_type")
        return adapter_card(record, title, base=_repo_of(hub, base), task=task if isinstance(task, str) else None)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, LorasmithError):
            raise
        raise BadFile(f"{file} is not as lorasmith writes it; give a model card with --card, or remove it") from error


def _repo_of(hub: Hub, base: object) -> str | None:
    """The repository that an adapter's config names as its base; None if it names none, or none that is there."""
    if not isinstance(base, str) or not base:
        return None
    try:
        named = reference(base, hub.api.endpoint)
    except BadOption:
        return None
    return named.repo if named is not None and exists(hub, named.repo) else None
