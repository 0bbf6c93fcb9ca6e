"""What goes wrong while a merge is under way: full disks, files that shrink or vanish, too few descriptors, signals.

A run is forked from a process that has everything imported. It stops itself (SIGSTOP) once it has written so many bytes
or taken so many steps; something then happens to its surroundings, and it goes on. It must end with one line that says
what is wrong, having published nothing or all of it, and the same command must then do its work.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from generate import Sizes, bases, tree, write_adapter, write_base
from test_crash import COMMAND, Counter, Job, Trap, forked, make_job

import lorasmith

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/stat"), reason="asks /proc whether a process stands still"
)


@dataclass(frozen=True)
class End:
    """How a command ended: its exit code, and what it said on stderr."""

    code: int
    said: str


def _command(trap: Trap, words: list[str], stderr: str, limits: dict[int, int]) -> None:
    from lorasmith.cli import main

    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
    Counter(trap)
    main(words)


def run(job: Job, out: Path, stderr: Path, *more: str, **limits: int) -> End:
    """The command, undisturbed but for limits on resources."""
    return disturbed(job, out, stderr, Trap(), lambda: None, *more, **limits)


def disturbed(
    job: Job, out: Path, stderr: Path, trap: Trap, fault: Callable[[], None], *more: str, **limits: int
) -> End:
    """The command, with something that happens when the trap springs."""
    words = [*job.words, "-o", str(out), "-q", *more]
    numbers = {getattr(resource, name): value for name, value in limits.items()}
    process = forked(_command, trap, words, str(stderr), numbers)
    try:
        if trap.number == signal.SIGSTOP and _stops(process):
            fault()
            os.kill(process.pid, signal.SIGCONT)
        process.join(60)
        assert process.exitcode is not None, "still running"
    finally:
        process.kill()
    return End(process.exitcode, stderr.read_text())


def _stops(process: Any) -> bool:
    """Wait until a process stands still; False if it ends instead."""
    while process.is_alive():
        with contextlib.suppress(OSError), open(f"/proc/{process.pid}/stat", encoding="ascii") as stream:
            if stream.read().rsplit(")", 1)[1].split()[0] == "T":
                return True
        time.sleep(0.001)
    return False


def at(unit: str, after: int) -> Trap:
    return Trap(unit, after, signal.SIGSTOP)


def require_told(end: End, *named: str) -> None:
    """It failed, and says so in one line that has all of ``named``."""
    assert end.code == 1, end
    assert len(end.said.splitlines()) == 1, end
    assert "unforeseen" not in end.said
    for name in named:
        assert name in end.said


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def own(job: Job, tmp_path: Path) -> Job:
    """The same with inputs that may be spoiled."""
    shutil.copytree(job.base, tmp_path / "base")
    return Job(tmp_path / "base", job.lora, job.options, job.whole, job.nbytes, job.steps)


def in_mounts(folder: Path, size: str = "64m") -> Iterator[Path]:
    """A new, empty file system at a time."""
    folder.mkdir()
    while True:
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
        ).returncode:
            pytest.skip("may not mount")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Use up all the room there is."""
    file = folder / "filler"
    with open(file, "wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(1 << 20))
    with open(file, "ab", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(1))
    return file


# --------------------------------------------------------------------------------------------------- full disks


def require_full_and_resumed(job: Job, mount: Path, stderr: Path, trap: Trap) -> bool:
    """Fill the disk when the trap springs; whether the run failed of it."""
    out = mount / "out"
    end = disturbed(job, out, stderr, trap, lambda: fill(mount))
    if end.code == 0:  # it had all its room by then
        assert tree(out) == job.whole
        return False
    require_told(end, "disk", "full", "run the same command again")
    assert not out.exists()
    (mount / "filler").unlink()
    assert run(job, out, stderr) == End(0, "")
    assert tree(out) == job.whole
    assert os.listdir(mount) == ["out"]
    return True


def test_a_disk_that_others_fill_is_told_and_the_same_command_goes_on_once_there_is_room(
    tmp_path: Path, job: Job
) -> None:
    shares = [0.02, 0.2, 0.4, 0.6, 0.8, 0.97]
    mounts = in_mounts(tmp_path / "mount")
    with contextlib.closing(mounts):
        failed = [
            require_full_and_resumed(job, mount, tmp_path / "stderr", at("bytes", int(job.nbytes * share)))
            for share, mount in zip(shares, mounts, strict=False)
        ]
    assert sum(failed) >= 3


def test_a_disk_that_is_full_at_any_step_is_told_be_it_the_journal_or_a_side_file_that_finds_no_room(
    tmp_path: Path, job: Job
) -> None:
    mounts = in_mounts(tmp_path / "mount")
    with contextlib.closing(mounts):
        failed = [
            require_full_and_resumed(job, mount, tmp_path / "stderr", at("steps", step))
            for step, mount in zip(range(1, len(job.steps) + 1), mounts, strict=False)
        ]
    assert sum(failed) >= len(failed) // 3


# ------------------------------------------------------------------------------------------- inputs that change


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9])
@pytest.mark.parametrize("how", ["cut off", "emptied", "removed", "replaced by a folder"])
def test_a_base_that_is_damaged_under_way_gives_no_model(tmp_path: Path, own: Job, share: float, how: str) -> None:
    def damage() -> None:
        for file in own.base.glob("*.safetensors"):
            if how == "cut off":
                os.truncate(file, file.stat().st_size // 2)
            elif how == "emptied":
                os.truncate(file, 0)
            else:
                file.unlink()
                if how != "removed":
                    file.mkdir()

    out = tmp_path / "out"
    require_told(disturbed(own, out, tmp_path / "stderr", at("bytes", int(own.nbytes * share)), damage), ".safetensors")
    assert not out.exists()


def test_an_adapter_that_is_cut_off_under_way_gives_no_model(tmp_path: Path, job: Job) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(job.lora.folder, adapter)
    own = Job(job.base, type(job.lora)(adapter, job.lora.terms), job.options, job.whole, job.nbytes, job.steps)
    file = adapter / "adapter_model.safetensors"
    trap = at("bytes", job.nbytes // 3)
    end = disturbed(
        own, tmp_path / "out", tmp_path / "stderr", trap, lambda: os.truncate(file, file.stat().st_size // 2)
    )
    require_told(end, "adapter_model.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["removed", "changed"])
def test_a_side_file_that_is_not_what_it_was_gives_no_model(tmp_path: Path, own: Job, how: str) -> None:
    file, out = own.base / "tokenizer_config.json", tmp_path / "out"
    fault = file.unlink if how == "removed" else lambda: file.write_text("{}")
    end = disturbed(own, out, tmp_path / "stderr", at("bytes", own.nbytes // 3), fault)
    require_told(end, "tokenizer_config.json", "changed")
    assert not out.exists()
    assert run(own, out, tmp_path / "stderr") == End(0, "")
    assert (out / file.name).exists() == (how == "changed")


# -------------------------------------------------------------------------------------- the place of the result


@pytest.mark.parametrize("share", [0.001, 0.3, 0.6, 0.9])
@pytest.mark.parametrize(
    "what", ["the partial folder", "the result in it", "the folder around it", "one finished file"]
)
def test_a_result_that_others_remove_under_way_is_never_published_in_part(
    tmp_path: Path, job: Job, what: str, share: float
) -> None:
    out = tmp_path / "deep" / "er" / "out"
    partial = out.parent / "out.partial"

    def remove() -> None:
        if what == "one finished file":
            for file in (partial / "result").glob("*.safetensors"):
                if share > 0.5:
                    file.unlink()
                    break
        else:
            shutil.rmtree(
                {"the partial folder": partial, "the result in it": partial / "result"}.get(what, tmp_path / "deep")
            )

    end = disturbed(job, out, tmp_path / "stderr", at("bytes", int(job.nbytes * share)), remove)
    if end.code == 0:
        assert tree(out) == job.whole
    else:
        require_told(end, "out")
        assert not out.exists()
    assert run(job, out, tmp_path / "stderr").code == (0 if end.code else 1)
    assert tree(out) == job.whole
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("place", ["out", "new/out"])
def test_an_output_on_a_read_only_file_system_is_refused_in_one_line(tmp_path: Path, job: Job, place: str) -> None:
    for mount in in_mounts(tmp_path / "mount"):
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        require_told(run(job, mount / place, tmp_path / "stderr"), "Read-only file system")
        assert os.listdir(mount) == []
        break


def test_inputs_on_a_read_only_file_system_are_enough(tmp_path: Path, job: Job) -> None:
    for mount in in_mounts(tmp_path / "mount"):
        shutil.copytree(job.base, mount / "base")
        shutil.copytree(job.lora.folder, mount / "adapter")
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        lora = type(job.lora)(mount / "adapter", job.lora.terms)
        own = Job(mount / "base", lora, job.options, job.whole, job.nbytes, job.steps)
        assert run(own, tmp_path / "out", tmp_path / "stderr") == End(0, "")
        assert tree(tmp_path / "out") == job.whole
        break


@pytest.mark.parametrize("year", [1971, 2100])
def test_a_clock_that_is_wrong_keeps_no_run_from_going_on(tmp_path: Path, job: Job, year: int) -> None:
    out = tmp_path / "out"
    job.kill(out, Trap("bytes", job.nbytes * 97 // 100))
    moment = (year - 1970) * 365 * 86_400
    for one in [tmp_path / "out.partial", *(tmp_path / "out.partial").rglob("*")]:
        os.utime(one, (moment, moment))
    assert job.finish(out).bytes_resumed > 0
    assert tree(out) == job.whole


# ----------------------------------------------------------------------------------------------- limits, signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("share", [0.05, 0.97])
def test_a_run_that_is_terminated_says_nothing_and_the_same_command_goes_on(
    tmp_path: Path, job: Job, number: int, share: float
) -> None:
    out = tmp_path / "runs" / "out"
    end = disturbed(job, out, tmp_path / "stderr", Trap("bytes", int(job.nbytes * share), number), lambda: None)
    assert end == End(-number, "")
    assert os.listdir(out.parent) == ["out.partial"]
    assert run(job, out, tmp_path / "stderr") == End(0, "")
    assert tree(out) == job.whole
    assert os.listdir(out.parent) == ["out"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """163 shards, as the largest open models have."""
    folder = tmp_path_factory.mktemp("sharded")
    sizes = Sizes(hidden=64, inner=64, key=64, vocabulary=16, layers=23)
    base = bases(sizes)
    path = write_base(folder / "base", base, sizes=sizes, shards=163)
    lora = write_adapter(folder / "adapter", base)
    lorasmith.merge(path, lora.folder, folder / "whole")
    return Job(path, lora, {"threads": 2}, tree(folder / "whole"), 0, ())


def test_a_model_of_163_shards_is_merged_with_the_descriptors_that_a_process_usually_has(
    tmp_path: Path, sharded: Job
) -> None:
    assert run(sharded, tmp_path / "out", tmp_path / "stderr", RLIMIT_NOFILE=1024) == End(0, "")
    assert tree(tmp_path / "out") == sharded.whole


def test_the_number_of_adapted_layers_bears_not_on_the_descriptors_that_a_run_needs(tmp_path: Path) -> None:
    sizes = Sizes(hidden=64, inner=64, key=64, vocabulary=16, layers=40)
    base = bases(sizes)
    job = Job(write_base(tmp_path / "base", base), write_adapter(tmp_path / "adapter", base), {"threads": 2}, {}, 0, ())
    assert len(job.lora.terms) == 280
    assert run(job, tmp_path / "out", tmp_path / "stderr", RLIMIT_NOFILE=48) == End(0, "")


def test_too_few_descriptors_are_told_and_the_same_command_goes_on_with_more(tmp_path: Path, sharded: Job) -> None:
    out = tmp_path / "runs" / "out"
    require_told(run(sharded, out, tmp_path / "stderr", RLIMIT_NOFILE=16), "Too many open files")
    assert not out.exists()
    assert run(sharded, out, tmp_path / "stderr") == End(0, "")
    assert tree(out) == sharded.whole
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("mebibytes", [100, 400, 800, 1600, 3200, 8000])
def test_a_limit_on_memory_leads_to_a_whole_model_or_to_one_line(tmp_path: Path, job: Job, mebibytes: int) -> None:
    """As with ``ulimit -v``, which counts what is mapped; torch's libraries alone are hundreds of mebibytes."""
    out = tmp_path / "out"
    limit = mebibytes << 20
    words = [str(COMMAND), *job.words, "-o", str(out), "-q"]
    done = subprocess.run(
        words, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    )
    assert "Traceback" not in done.stderr
    if done.returncode == 0:
        assert (done.stderr, tree(out)) == ("", job.whole)
    else:
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert not out.exists()
    assert done.returncode == 0 or mebibytes < 8000
