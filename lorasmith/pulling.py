"""A model or an adapter from the Hub, without what lies beside it: other formats, other kinds of weights, logs."""

from __future__ import annotations

import contextlib
import os
import shutil

from lorasmith.errors import OutputExists
from lorasmith.execution.destination import is_empty
from lorasmith.execution.renaming import remove, sync_folder
from lorasmith.sources import Sources

BESIDE = ("README.md", "lorasmith.json")
"""What else belongs to a copy of a repository: its card, and what it was made from."""


def pull(
    repo: str,
    out: str | os.PathLike[str] | None = None,
    *,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Download a model or an adapter from the Hub and return its path: ``out``, or a folder of the shared cache.

    ``repo`` is ``org/name``, ``org/name@revision``, a sub-folder of these, or an address. Of several sets of weights
    the one is downloaded that transformers would load. ``out`` appears once all of it is there; what was downloaded
    before a run broke off is not downloaded again. Raises HubRefused, HubFailed, MissingFile, OutputExists, NoSpace or
    BadOption.
    """
    sources = Sources(endpoint, token)
    snapshot, names = sources.needed(repo, BESIDE)
    if out is None:
        sources.hub.fetch(snapshot, names)
        return os.path.join(snapshot.folder, *snapshot.origin.inside.split("/")).rstrip(os.sep)
    target = os.path.realpath(os.fspath(out))
    _require_free(os.fspath(out), target)
    part = f"{target}.partial"
    sources.hub.fetch_all(snapshot, names, part)
    inside = os.path.join(part, *snapshot.origin.inside.split("/")) if snapshot.origin.inside else part
    remove(os.path.join(part, ".cache"))
    _require_free(os.fspath(out), target)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(target)
    for root, _, _ in os.walk(inside):
        sync_folder(root)
    os.rename(inside, target)
    shutil.rmtree(part, ignore_errors=True)
    return os.fspath(out)


def _require_free(out: str, target: str) -> None:
    if os.path.lexists(target) and not is_empty(target):
        raise OutputExists(f"{out} exists already; choose another output")
