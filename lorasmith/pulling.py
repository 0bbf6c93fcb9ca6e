"""A model or an adapter from the Hub, without what lies beside it: other formats, other kinds of weights, logs."""

from __future__ import annotations

import os

from lorasmith.errors import OutputExists
from lorasmith.execution.destination import check_output, is_empty
from lorasmith.execution.renaming import remove
from lorasmith.execution.workplace import claim
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
    target = os.path.realpath(out)
    if os.path.lexists(target) and not is_empty(target):
        raise OutputExists(f"{os.fspath(out)} exists already; choose another output, or remove it yourself")
    inputs = [os.path.dirname(os.path.dirname(snapshot.folder))]
    check_output(os.fspath(out), inputs, single_file=False, overwrite=False)
    with claim(os.fspath(out), overwrite=False) as place:
        sources.hub.fetch_all(snapshot, names, place.scratch)
        remove(os.path.join(place.scratch, ".cache"))
        place.adopt(os.path.join(place.scratch, *snapshot.origin.inside.split("/")).rstrip(os.sep))
    return os.fspath(out)
