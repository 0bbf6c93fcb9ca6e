"""The names that Git gives to contents: of a small file its own, of a large one that of the pointer to it.

A blob's name is the SHA-1 of ``blob SIZE\\0`` and its bytes (gitformat-object); a pointer is three lines of text
(git-lfs, docs/spec.md).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

_BLOCK = 1 << 20


def git_name(file: str) -> str:
    """What Git calls a file that it holds itself."""
    sha = hashlib.sha1(b"blob %d\0" % os.path.getsize(file))
    for block in _blocks(file):
        sha.update(block)
    return sha.hexdigest()


def pointer_name(file: str) -> str:
    """What Git calls the pointer to a large file."""
    sha = hashlib.sha256()
    for block in _blocks(file):
        sha.update(block)
    size = os.path.getsize(file)
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha.hexdigest()}\nsize {size}\n".encode()
    return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()


def _blocks(file: str) -> Iterator[bytes]:
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            yield block
