"""A second Hub, that others wrote: olah, a mirror, serves models from a Git repository on the disk.

It needs a virtual environment of its own: ``python3 -m venv olah && olah/bin/pip install olah``, and ``OLAH`` in the
environment to name its command.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from generate import bases, sha256, tree, write_adapter, write_base
from test_hub import SCRIPT, SIZES

import lorasmith

OLAH = os.environ.get("OLAH") or shutil.which("olah-cli")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(OLAH is None, reason="olah is not installed")]


def mirrored(folder: Path) -> None:
    """Make a folder the main branch of a Git repository."""
    name = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
    for words in (["init", "-q", "-b", "main"], ["add", "-A"], [*name, "commit", "-qm", "All"]):
        subprocess.run(["git", *words], cwd=folder, check=True)


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    """A mirror with a base and an adapter."""
    write_base(tmp_path / "mirrors" / "models" / "org" / "base", bases(SIZES), sizes=SIZES, shards=3)
    write_adapter(tmp_path / "mirrors" / "models" / "me" / "lora", bases(SIZES), rank=4)
    for repo in ("org/base", "me/lora"):
        mirrored(tmp_path / "mirrors" / "models" / repo)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "olah.toml").write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{tmp_path}/repos"\n'
        f'mirrors-path = ["{tmp_path}/mirrors"]\n[accessibility]\noffline = true\n'
    )
    command = [str(OLAH), "-c", "olah.toml", "--log-path", "logs"]
    with open(tmp_path / "log", "wb") as log, subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log) as mirror:
        try:
            for _ in range(300):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            mirror.terminate()


def contents(folder: Path) -> dict[str, str]:
    return {name: sha256(folder / name) for name in tree(folder) if (folder / name).is_file()}


def test_another_hub_serves_a_pull_and_a_merge(endpoint: str, tmp_path: Path) -> None:
    known = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    for words in (
        ["pull", "org/base@main", "-o", "pulled"],
        ["merge", "org/base@main", "me/lora@main", "-o", "out"],
        ["merge", "org/base@main", "me/lora@main", "-o", "streamed", "--stream"],
    ):
        subprocess.run([SCRIPT, *words, "-q"], cwd=tmp_path, env={**os.environ, **known}, check=True, timeout=120)
    models = tmp_path / "mirrors" / "models"
    shutil.rmtree(models / "org" / "base" / ".git")
    assert contents(tmp_path / "pulled") == contents(models / "org" / "base")
    lorasmith.merge(models / "org" / "base", models / "me" / "lora", tmp_path / "wanted")
    wanted = contents(tmp_path / "wanted")
    assert wanted.pop("lorasmith.json")
    for out in ("out", "streamed"):
        found = contents(tmp_path / out)
        assert found.pop("lorasmith.json")
        assert found == wanted
