"""Files to commits: a repository that may be written to, large files ahead, then everything at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasmith.errors import BadOption, LorasmithError
from lorasmith.hub import Hub
from lorasmith.hub.failures import PUSH, told
from lorasmith.records import Origin, Pushed

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete


@dataclass(frozen=True)
class Target:
    """Where a push goes: ``head`` is the commit it builds on."""

    repo: str
    revision: str | None = None
    private: bool = False
    create_pr: bool = False
    message: str | None = None
    head: str | None = None


def check_writable(hub: Hub, target: Target) -> None:
    """Raise HubRefused unless the token may write to a repository, which need not exist; makes nothing.

    Raises BadOption for one that is to be private and is not.
    """
    with told(target.repo, hub.api.endpoint, wanted=PUSH):
        name = hub.api.whoami()["name"]
        there = hub.api.repo_exists(target.repo)
        public = there and target.private and not hub.api.repo_info(target.repo).private
    if public:
        raise BadOption(
            f"{target.repo} exists and is public, and --private is for one that is made; make it private in its "
            "settings, push to another name, or leave --private out"
        )
    if target.create_pr or not there:
        return
    with told(target.repo, hub.api.endpoint, wanted=f"to write to it (logged in as {name})"):
        hub.api.auth_check(target.repo, write=True)


def prepare(hub: Hub, target: Target) -> Target:
    """The same target by its name of today, with its repository and branch made if need be, and the head of that.

    Where a repository was renamed, none is made: one of the old name would end the way to it.
    """
    check_writable(hub, target)
    with told(target.repo, hub.api.endpoint, target.revision, wanted="to create or write to it"):
        if not hub.api.repo_exists(target.repo):
            hub.api.create_repo(target.repo, private=target.private or None, exist_ok=True)
        if target.revision is not None and not _has_revision(hub, target):
            hub.api.create_branch(target.repo, branch=target.revision, exist_ok=True)
        found = hub.api.repo_info(target.repo, revision=target.revision)
    return dataclasses.replace(target, repo=found.id, head=found.sha)


def exists(hub: Hub, repo: str) -> bool:
    """Whether there is a repository of this name that the token may see."""
    with told(repo, hub.api.endpoint, wanted=PUSH):
        return hub.api.repo_exists(repo)


def _has_revision(hub: Hub, target: Target) -> bool:
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        hub.api.repo_info(target.repo, revision=target.revision)
        return True
    except RevisionNotFoundError:
        return False


def addition(name: str, content: str | bytes) -> CommitOperationAdd:
    """An addition of a file: a path, or bytes."""
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(name, content)


def upload(hub: Hub, target: Target, name: str, content: str | bytes) -> CommitOperationAdd:
    """An addition of a large file, whose content is sent ahead."""
    added = addition(name, content)
    with told(target.repo, hub.api.endpoint, wanted=PUSH):
        hub.api.preupload_lfs_files(
            target.repo, [added], revision=target.revision, create_pr=target.create_pr, free_memory=False
        )
    return added


def is_small(added: CommitOperationAdd) -> bool:
    """Whether the Hub takes a file only with the commit."""
    return added._upload_mode != "lfs"


def require_valid(hub: Hub, target: Target, card: str) -> None:
    """Raise BadOption for a card that the Hub would refuse, as the client finds out before it commits one."""
    with told(target.repo, hub.api.endpoint, wanted=PUSH):
        hub.api._validate_yaml(card, repo_type="model")


def files_at(hub: Hub, target: Target) -> dict[str, str]:
    """The files of a target's branch, and their digests: SHA-256 of large ones, Git's SHA-1 of small ones."""
    from huggingface_hub import RepoFile

    with told(target.repo, hub.api.endpoint, wanted=PUSH):
        tree = list(hub.api.list_repo_tree(target.repo, recursive=True, revision=target.head))
    return {one.path: one.lfs.sha256 if one.lfs else one.blob_id for one in tree if isinstance(one, RepoFile)}


def commit(hub: Hub, target: Target, operations: Sequence[Operation], message: str) -> Pushed:
    """Make all changes visible at once. Raises BranchMoved, CannotCopy, and what else the Hub says."""
    from huggingface_hub.errors import FileDuplicationError

    with told(target.repo, hub.api.endpoint, wanted=PUSH):
        try:
            made = hub.api.create_commit(
                target.repo,
                operations,
                commit_message=target.message or message,
                revision=target.revision,
                create_pr=target.create_pr,
                parent_commit=target.head,
            )
        except FileDuplicationError as error:
            raise CannotCopy(str(error)) from error
        except ValueError as error:
            if "no xet hash" in str(error):
                raise CannotCopy(str(error)) from error
            raise
    url = f"{hub.api.endpoint}/{target.repo}"
    branch = f"/tree/{target.revision}" if target.revision else ""
    return Pushed(target.repo, made.oid, made.pr_url or url + branch, made.pr_url)


class CannotCopy(LorasmithError):
    """The Hub can't copy a file from one repository to another: old storage, or another region."""


def copy_of(name: str, source: str, origin: Origin) -> CommitOperationCopy:
    """A copy of a file of another repository, made by the Hub."""
    from huggingface_hub import CommitOperationCopy

    return CommitOperationCopy(source, name, src_repo_id=origin.repo, src_repo_type="model", src_revision=origin.commit)


def deletion_of(name: str) -> CommitOperationDelete:
    """A deletion of one file."""
    from huggingface_hub import CommitOperationDelete

    return CommitOperationDelete(name)


def uploaded(name: str, size: int, sha256: str) -> CommitOperationAdd:
    """An addition of a large file that an earlier run has sent, and that need not be here any more.

    The client has no public way to say that; pickling its additions would do the same.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub._commit_api import UploadInfo

    addition = CommitOperationAdd(name, b"")
    addition.upload_info = UploadInfo(sha256=bytes.fromhex(sha256), size=size, sample=b"")
    addition._upload_mode, addition._is_uploaded, addition._should_ignore = "lfs", True, False
    return addition
