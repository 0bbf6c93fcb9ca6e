"""Systems without the fast calls: the same bytes through plain reads and writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from generate import LARGE, bases, tree, write_adapter, write_base

import lorasmith

PLAIN = """
import os, sys

for name in {missing!r}:
    if hasattr(os, name):
        delattr(os, name)
for module in {modules!r}:
    sys.modules[module] = None  # importing it raises ImportError

import lorasmith
from lorasmith import safefile

assert {probe}
base, adapter, out, *options = sys.argv[1:]
lorasmith.merge(base, adapter, out, overwrite="overwrite" in options)
"""

POSIX = (
    "preadv", "pread", "pwrite", "pwritev", "copy_file_range", "sendfile", "posix_fallocate", "O_DIRECT", "O_CLOEXEC",
    "sched_getaffinity", "O_DIRECTORY",
)  # fmt: skip

SYSTEMS = {
    "Windows": (POSIX, ("fcntl", "resource"), "not hasattr(os, 'preadv')"),
    "macOS": (("copy_file_range", "posix_fallocate", "O_DIRECT", "sched_getaffinity"), (), "hasattr(os, 'preadv')"),
    "no positional reads": (("preadv", "pread", "pwrite"), (), "safefile.read_at.__globals__.get('_SEEK') is not None"),
    "no direct writes": (("O_DIRECT",), (), "True"),
    "no locks": ((), ("fcntl",), "True"),
}
"""What other systems lack: names of ``os``, whole modules; and what must then be so."""


def run(system: str, *arguments: Path | str) -> None:
    missing, modules, probe = SYSTEMS[system]
    script = PLAIN.format(missing=missing, modules=modules, probe=probe)
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True, capture_output=True, text=True)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_without_fast_calls_writes_the_same_bytes(tmp_path: Path, system: str) -> None:
    base = bases(LARGE)
    folder = write_base(tmp_path / "base", base, sizes=LARGE, shards=3)
    lora = write_adapter(tmp_path / "adapter", base, targets=("q_proj", "up_proj"))
    lorasmith.merge(folder, lora.folder, tmp_path / "fast")
    run(system, folder, lora.folder, tmp_path / "plain" / "out")
    assert tree(tmp_path / "plain" / "out") == tree(tmp_path / "fast")
    assert os.listdir(tmp_path / "plain") == ["out"]


@pytest.mark.parametrize("system", ["Windows", "no locks"])
def test_a_system_without_fast_calls_replaces_a_model(tmp_path: Path, system: str) -> None:
    base = bases()
    folder = write_base(tmp_path / "base", base, shards=2)
    first, second = (write_adapter(tmp_path / f"adapter {seed}", base, seed=seed) for seed in (1, 2))
    lorasmith.merge(folder, first.folder, tmp_path / "out")
    lorasmith.merge(folder, second.folder, tmp_path / "wanted")
    run(system, folder, second.folder, tmp_path / "out", "overwrite")
    assert tree(tmp_path / "out") == tree(tmp_path / "wanted")
    assert not (tmp_path / "out.partial").exists()
