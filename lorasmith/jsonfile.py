"""Files that others wrote, opened with suspicion, and JSON out of them."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from typing import Any

from lorasmith.errors import BadFile, IOFailed, MissingFile

MAX_HEADER = 100_000_000
"""Longest header or JSON file accepted, in bytes: the limit of the safetensors library."""

MAX_DEPTH = 64
"""Deepest nesting of JSON accepted; configs have about 5 levels."""

_FOREIGN = (
    (b"version https://git-lfs.github.com", "is a Git LFS pointer, not the file; fetch the file with: git lfs pull"),
    (b"PK\x03\x04", "is a zip archive, and not one that torch.save wrote"),
    (b"\x80", "is a pickle, but not one that torch.save wrote; only state dicts saved by torch can be read"),
    (b"GGUF", "is a GGUF file; give the model it was made from"),
    (b"<!", "is a web page, as a failed download leaves it; fetch the file again"),
    (b"<html", "is a web page, as a failed download leaves it; fetch the file again"),
)
"""How files begin that are mistaken for weights or JSON, and what to say."""


def open_regular(file: str) -> Any:
    """Open a regular file for reading in binary, with lorasmith's own errors."""
    try:
        mode = os.stat(file).st_mode
        if not stat.S_ISREG(mode):
            raise BadFile(f"{file} is not a regular file")
        return open(file, "rb")
    except FileNotFoundError:
        raise MissingFile(f"{file} does not exist (or is a link to nothing)") from None
    except ValueError as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile(f"{file!r} is not a usable path: {error}") from None
    except OSError as error:
        raise IOFailed(f"{file} cannot be opened: {error.strerror}") from error


def parse_json(file: str, raw: bytes) -> Any:
    """Parse JSON that must be UTF-8, without repeated keys and without NaN; BadFile otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise BadFile(f"{file}: the key {twice!r} stands twice, so what it means is ambiguous")
        return found

    def refuse(constant: str) -> Any:
        raise BadFile(f"{file}: {constant} is not valid JSON")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except BadFile:
        raise
    except UnicodeEncodeError:
        raise BadFile(f"{file} holds half of a character (a lone surrogate), which no text can contain") from None
    except RecursionError:
        raise BadFile(f"{file}: its JSON is nested too deeply to be real") from None
    except ValueError as error:
        raise BadFile(f"{file} holds broken JSON: {error}; was the file cut short?") from None
    _refuse_deep(file, value)
    return value


def read_json(file: str) -> dict[str, Any]:
    """Read a JSON object from a file of at most MAX_HEADER bytes."""
    value = load_json(file)
    if not isinstance(value, dict):
        raise BadFile(f"{file} should hold a JSON object, not a {type(value).__name__}")
    return value


def load_json(file: str) -> Any:
    """Read any JSON value from a file of at most MAX_HEADER bytes."""
    with open_regular(file) as stream:
        if os.fstat(stream.fileno()).st_size > MAX_HEADER:
            raise BadFile(f"{file} is larger than {MAX_HEADER:,} bytes: not a plausible JSON file")
        raw = stream.read()
    refuse_foreign(file, raw)
    return parse_json(file, raw)


def refuse_foreign(file: str, raw: bytes) -> None:
    """Raise BadFile for what is known to be mistaken for a file of ours, by how it begins."""
    for beginning, what in _FOREIGN:
        if raw.startswith(beginning):
            raise BadFile(f"{file} {what}")


def _refuse_deep(file: str, value: Any) -> None:
    """Refuse nesting on which code that recurses would stumble."""
    level = [value]
    for _ in range(MAX_DEPTH):
        children = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list)))
        level = [child for some in children for child in some if isinstance(child, (dict, list))]
        if not level:
            return
    raise BadFile(f"{file}: its JSON is nested too deeply to be real")
