"""Large files by xet: the real client and the real hf_xet, which reads and writes a store in a local folder."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import WRITER, Hub
from test_hub import SCRIPT, Run, home, run, whole
from test_hub_push import changed, made, on_disk, shards

__all__ = ["home", "made", "run"]

pytest.importorskip("hf_xet")


@pytest.fixture
def hub(made: Path, tmp_path: Path, home: Path) -> Iterator[Hub]:
    """A Hub with a store for xet, to which a base and two adapters were pushed by way of it."""
    with Hub(tmp_path, xet=True) as server:
        for name, repo in (("base", "org/base"), ("lora", "me/lora"), ("small", "me/small")):
            subprocess.run(
                [SCRIPT, "push", made / name, repo, "-q"], check=True, env=environment(server, home), timeout=100
            )
            for file in shards(made / name):  # for requests of ranges, which the real Hub answers from the store
                server.keep(file.name, file.read_bytes())
        server.requests.clear()
        yield server


def environment(hub: Hub, home: Path) -> dict[str, str]:
    known = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_XET"}
    return {**known, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": WRITER, "HF_HUB_DISABLE_TELEMETRY": "1"}


def stored(hub: Hub) -> int:
    """Bytes in the store."""
    assert hub.cas is not None
    return sum(file.stat().st_size for file in hub.cas.rglob("default.*") if file.suffix != ".tagset")


def pulled(run: Run, tmp_path: Path, repo: str) -> dict[str, bytes]:
    run("pull", repo, "-o", "pulled", token=WRITER, HF_HUB_DISABLE_XET="")
    files = on_disk(tmp_path / "pulled")
    del files["README.md"], files["lorasmith.json"]
    return files


def wanted(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in on_disk(folder).items() if name != "lorasmith.json"}


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["cache", "stream"])
def test_all_that_is_large_travels_by_xet(
    hub: Hub, run: Run, made: Path, tmp_path: Path, home: Path, stream: list[str]
) -> None:
    arguments = ("merge", "org/base", "me/small", "--push", "me/merged", *stream)
    run(*arguments, token=WRITER, HF_HUB_DISABLE_XET="")
    assert len(changed(made, "merged-small")) == 2
    assert len(hub.asked("GET", "xet-read-token")) >= 2
    assert len(hub.asked("GET", "xet-write-token")) == 2
    (copied,) = hub.asked("POST", "lfs-files/duplicate")
    assert len(copied.body["files"]) == 6
    assert whole(hub) == hub.asked("PUT", "") == hub.asked("POST", "/lfs/objects/") == []
    assert pulled(run, tmp_path, "me/merged") == wanted(made / "merged-small")
    assert set(os.listdir(home)) <= {"hub", "xet", "logs"}


def test_the_same_bytes_are_stored_once(hub: Hub, run: Run, made: Path, tmp_path: Path) -> None:
    hub.copies = False
    before = stored(hub)
    run("merge", "org/base", "me/small", "--push", "me/merged", token=WRITER, HF_HUB_DISABLE_XET="")
    grown = stored(hub) - before
    new = sum(file.stat().st_size for file in changed(made, "merged-small"))
    assert 0 < grown < 1.2 * new
    assert pulled(run, tmp_path, "me/merged") == wanted(made / "merged-small")


def test_a_kill_during_an_upload_is_made_good(hub: Hub, run: Run, made: Path, tmp_path: Path, home: Path) -> None:
    command = [SCRIPT, "merge", "org/base", "me/lora", "--push", "me/merged", "--stream", "-q"]
    running: list[subprocess.Popen[bytes]] = []
    hub.fault("GET", "xet-write-token", times=3)
    hub.fault("GET", "xet-write-token", act=lambda: running[0].kill())
    running.append(subprocess.Popen(command, cwd=tmp_path, env=environment(hub, home)))
    assert running[0].wait(100) == -signal.SIGKILL
    assert len(hub.repositories["me/merged"].commits) == 1
    before = len(hub.asked("GET", "xet-write-token"))
    run(*command[1:], token=WRITER, HF_HUB_DISABLE_XET="")
    assert len(hub.asked("GET", "xet-write-token")) - before == len(changed(made)) - 3
    assert pulled(run, tmp_path, "me/merged") == wanted(made / "merged")
    assert set(os.listdir(home)) <= {"hub", "xet", "logs"}
