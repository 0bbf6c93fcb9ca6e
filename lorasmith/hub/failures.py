"""The client's errors as lorasmith's: what is wrong, and what to do, on one line and without any token."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from typing import Any

from lorasmith.errors import (
    BadOption,
    BranchMoved,
    HubFailed,
    HubRefused,
    IOFailed,
    LorasmithError,
    MissingFile,
    NoSpace,
    one_line,
)
from lorasmith.hub.silence import silence

READ = "to do this"
"""What a token is wanted for where something is to be read."""

PUSH = "to push to it"
"""What a token is wanted for where something is to be pushed."""


@contextlib.contextmanager
def told(repo: str, endpoint: str, revision: str | None = None, *, wanted: str = READ) -> Iterator[None]:
    """Turn the client's errors about a repository into lorasmith's, and keep it from printing meanwhile.

    ``wanted`` is what the token is for, as in: needs a login *to write to it*.
    """
    try:
        with silence():
            yield
    except LorasmithError:
        raise
    except Exception as error:
        ours = _as_ours(error, repo, endpoint, revision, wanted)
        if ours is None:
            raise
        raise ours from error


def _as_ours(error: Exception, repo: str, endpoint: str, revision: str | None, wanted: str) -> LorasmithError | None:
    import httpx2
    from huggingface_hub import errors

    where = f"{repo}@{revision}" if revision else repo
    match error:
        case errors.OfflineModeIsEnabled() if wanted == PUSH:
            return HubFailed(f"the Hub must not be asked (HF_HUB_OFFLINE), so nothing goes to {repo}; unset that")
        case errors.OfflineModeIsEnabled() | errors.IncompleteSnapshotError() | errors.LocalEntryNotFoundError():
            return _unreachable(where, endpoint, error, wanted)
        case errors.RevisionResolutionError(__cause__=errors.HfHubHTTPError() as answer):
            return _by_status(answer, where, endpoint, wanted)
        case errors.RevisionResolutionError():
            return _unreachable(where, endpoint, error, wanted)
        case errors.GatedRepoError():
            return HubRefused(
                f"{repo} is gated: accept its terms at {endpoint}/{repo}, and log in as the one who did (hf auth "
                "login, HF_TOKEN or --token)"
            )
        case errors.RepositoryNotFoundError():
            return MissingFile(
                f"there is no repository {repo} at {endpoint}, and no such path here; check the name, or, if it is "
                "private, log in (hf auth login, HF_TOKEN or --token)"
            )
        case errors.RevisionNotFoundError():
            return MissingFile(
                f"{repo} has no branch, tag or commit {revision or 'of this name'}; see {endpoint}/{repo}. "
                "Of a commit, all 40 digits are needed, and a slash in a branch's name is written %2F"
            )
        case errors.RemoteEntryNotFoundError():
            return MissingFile(f"{repo} has no such file any more: {_path_of(error)}; see {endpoint}/{repo}/tree/main")
        case errors.LocalTokenNotFoundError():
            return HubRefused(f"{repo} needs a login {wanted}: hf auth login, HF_TOKEN or --token")
        case errors.HfHubHTTPError():
            return _by_status(error, where, endpoint, wanted)
        case errors.HFValidationError():
            return BadOption(f"{repo!r} is no name of a repository; write it like org/name")
        case httpx2.HTTPError():
            return _unreachable(where, endpoint, error, wanted)
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return NoSpace(
                error.errno, f"the disk is full while {where} was being transferred; make room and run again"
            )
        case OSError() if wanted == READ and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            place = f": {error.filename}" if error.filename else ""
            return IOFailed(
                error.errno,
                f"what is downloaded of {where} cannot be written ({error.strerror}{place}); point HF_HOME to a folder "
                "that may be written to",
            )
        case OSError() if error.errno is not None:
            return IOFailed(
                error.errno, f"the transfer of {where} failed: {error.strerror}; run the same command again"
            )
        case ValueError() if "Invalid metadata in README.md" in str(error):
            return BadOption(f"the Hub refuses the model card for {repo}: {_tail(error)}")
        case RuntimeError(__cause__=errors.HfHubHTTPError() as answer):  # of the storage, not of the Hub
            status = answer.response.status_code
            return HubFailed(f"the transfer of {where} failed (HTTP {status}); run the same command again")
        case RuntimeError() | OSError() | ValueError():
            cause = _tail(error.__cause__ or error)
            return HubFailed(f"the transfer of {where} failed: {cause}; run the same command again to go on from here")
    return None


def _by_status(error: Any, where: str, endpoint: str, wanted: str) -> LorasmithError:
    status = error.response.status_code
    said = one_line(error.server_message or "").strip(". ") or f"HTTP {status}"
    if status == 401:
        return HubRefused(f"{where} needs a valid login {wanted} ({said}): hf auth login, HF_TOKEN or --token")
    if status == 403:
        return HubRefused(
            f"this token has no right {wanted}: {where} ({said}); use one that has, made at {endpoint}/settings/tokens"
        )
    if status == 412:
        return BranchMoved(
            f"{where} has moved since this run began, others pushed to it; run the same command again to push onto "
            "what is there now"
        )
    if status == 429:
        return HubFailed(f"{endpoint} asks for a pause (HTTP 429); run the same command again in a few minutes")
    return HubFailed(f"{endpoint} answered {said!r} for {where} (HTTP {status}); run the same command again")


def _unreachable(where: str, endpoint: str, error: Exception, wanted: str) -> HubFailed:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return HubFailed(
            f"{where} is not in the cache, or not all of it, and the Hub must not be asked (HF_HUB_OFFLINE); "
            "download it first, or unset that"
        )
    why = type(error.__cause__ or error).__name__
    path = "if a path was meant, it does not exist; else " if wanted == READ else ""
    return HubFailed(
        f"{endpoint} cannot be reached for {where} ({why}); {path}check the network, and run the same command again"
    )


def _path_of(error: Any) -> str:
    return str(error.response.url.path).split("/resolve/")[-1].partition("/")[2]


def _tail(error: BaseException) -> str:
    """What an error says, without the signatures that addresses carry."""
    return one_line(re.sub(r"\?\S+", "?…", " ".join(str(error).split())))[:300]
