"""Kills, interruptions, and two runs at once: an output is there whole or not at all, and a rerun finishes it.

Runs that are to die are forked from a process that has everything imported (multiprocessing's forkserver), and give
themselves the signal once they have written so many bytes or taken so many steps: syncs, renames, removals. A few are
the installed console script, killed from outside.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from generate import Lora, Sizes, bases, tree, write_adapter, write_base, write_json
from safetensors.torch import load_file, save_file

import lorasmith

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

COMMAND = Path(sys.executable).parent / "lorasmith"
SIZES = Sizes(hidden=192, inner=1031, key=64, vocabulary=1103, layers=3)
POINTS = 30

WRITES = ("write", "writev", "pwrite", "pwritev", "sendfile", "copy_file_range")
STEPS = (
    "fsync", "fdatasync", "rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "mkdir",
    "truncate", "ftruncate", "posix_fallocate",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- runs that die


@dataclass(frozen=True)
class Trap:
    """A signal that a run gives itself after so many bytes or steps; 0 stands for never."""

    unit: str = "steps"
    after: int = 0
    number: int = signal.SIGKILL


@dataclass(frozen=True)
class End:
    """How a run ended: its exit code, what it returned or raised, and what it wrote and did."""

    code: int
    report: lorasmith.MergeReport | None = None
    error: BaseException | None = None
    nbytes: int = 0
    steps: tuple[str, ...] = ()


class Counter:
    """Counts what this process writes and does to files, and springs the trap."""

    def __init__(self, trap: Trap) -> None:
        self.nbytes = 0
        self.steps: list[str] = []
        self._trap = trap
        self._lock = threading.Lock()
        for name in WRITES + STEPS:
            if hasattr(os, name):
                setattr(os, name, self._counted(getattr(os, name), name))

    def _counted(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            result = call(*args, **options)
            if self._is_due(name, result):
                os.kill(os.getpid(), self._trap.number)
            return result

        return counted

    def _is_due(self, name: str, result: Any) -> bool:
        with self._lock:
            before = self._reached
            if name in STEPS:
                self.steps.append(name)
            else:
                self.nbytes += result
            return before < self._trap.after <= self._reached

    @property
    def _reached(self) -> int:
        return len(self.steps) if self._trap.unit == "steps" else self.nbytes


def _merge(pipe: Any, trap: Trap, exchange: bool, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    from lorasmith.execution import workplace

    if not exchange:
        workplace.exchange = lambda one, other: False  # as on systems that cannot swap two paths in one step
    counter = Counter(trap)
    report = error = None
    try:
        report = lorasmith.merge(*arguments, **options)
    except Exception as raised:
        error = raised
    pipe.send((report, error, counter.nbytes, tuple(counter.steps)))


def _command(trap: Trap, arguments: list[str], stderr: str) -> None:
    from lorasmith.cli import main

    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Counter(trap)
    main(arguments)


def forked(target: Callable[..., None], *arguments: Any) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lorasmith.merging", "lorasmith.cli", "safetensors.torch", "pytest"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def run(*arguments: Any, trap: Trap = Trap(), exchange: bool = True, **options: Any) -> End:
    """Merge in a process of its own, until it ends or the trap springs."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = forked(_merge, theirs, trap, exchange, arguments, options)
    theirs.close()
    outcome: tuple[Any, ...] = ()
    with contextlib.suppress(EOFError):
        outcome = ours.recv()
    process.join()
    return End(process.exitcode, *outcome)


def finish(*arguments: Any, **options: Any) -> lorasmith.MergeReport:
    """Merge in a process of its own that must succeed."""
    end = run(*arguments, **options)
    if end.error is not None:
        raise end.error
    assert end.code == 0
    assert end.report is not None
    return end.report


@dataclass(frozen=True)
class Job:
    """A merge to disturb, and what it writes undisturbed: the tree, the bytes and the steps it takes."""

    base: Path
    lora: Lora
    options: dict[str, Any]
    whole: dict[str, str]
    nbytes: int
    steps: tuple[str, ...]

    def run(self, out: Path, **options: Any) -> End:
        return run(self.base, self.lora.folder, out, **self.options, **options)

    def finish(self, out: Path, **options: Any) -> lorasmith.MergeReport:
        return finish(self.base, self.lora.folder, out, **self.options, **options)

    def kill(self, out: Path, trap: Trap, **options: Any) -> None:
        """Run until the trap springs, which it must."""
        end = self.run(out, trap=trap, **options)
        assert end.code == -signal.SIGKILL, (trap, end)

    @property
    def words(self) -> list[str]:
        """The same on a command line."""
        pairs = ((f"--{key}", str(value)) for key, value in self.options.items())
        return ["merge", str(self.base), str(self.lora.folder), *(word for pair in pairs for word in pair)]


def make_job(folder: Path, *, file: bool = False) -> Job:
    base = bases(SIZES)
    path = folder / "base.safetensors"
    if file:
        save_file(base, path, {"format": "pt"})
    else:
        path = write_base(folder / "base", base, sizes=SIZES, shards=4)
        for name in ("LICENSE", "empty.txt", "tokenizer.json", "modeling_own.py"):
            (path / name).unlink()
    lora = write_adapter(folder / "adapter", base, ratio=0.1)
    options = {"memory": 12 << 20, "threads": 2}
    end = run(path, lora.folder, folder / "whole", **options)
    assert end.error is None
    touched = sum(base[name].nbytes for name in lora.terms)
    assert end.nbytes >= touched, "weights are written by other calls than those that are counted here"
    return Job(path, lora, options, tree(folder / "whole"), end.nbytes, end.steps)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def file_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("file job"), file=True)


@pytest.fixture(scope="module")
def old(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What another adapter gives: a model of the same names and sizes, to be overwritten."""
    folder = tmp_path_factory.mktemp("old")
    other = write_adapter(folder / "adapter", bases(SIZES), ratio=0.1, seed=7)
    lorasmith.merge(job.base, other.folder, folder / "old")
    return folder / "old"


@pytest.fixture(scope="module")
def old_file(file_job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old file")
    other = write_adapter(folder / "adapter", bases(SIZES), ratio=0.1, seed=7)
    lorasmith.merge(file_job.base, other.folder, folder / "old")
    return folder / "old"


def copied(path: Path, to: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, to)
    else:
        shutil.copyfile(path, to)


def in_folders(folder: Path) -> Iterator[Path]:
    """A new, empty folder at a time, taken away when the next is asked for."""
    number = 0
    while True:
        number += 1
        one = folder / str(number)
        one.mkdir(parents=True)
        yield one
        shutil.rmtree(one)


# ----------------------------------------------------------------------------------------------------- SIGKILL


@pytest.mark.parametrize("point", range(POINTS))
def test_a_kill_while_bytes_are_written_publishes_nothing_and_a_rerun_goes_on(
    tmp_path: Path, job: Job, point: int
) -> None:
    out = tmp_path / "out"
    job.kill(out, Trap("bytes", job.nbytes * (2 * point + 1) // (2 * POINTS)))
    assert not out.exists()
    before = time.time_ns()
    report = job.finish(out)
    assert tree(out) == job.whole
    assert os.listdir(tmp_path) == ["out"]
    kept = [file for file in out.glob("*.safetensors") if file.stat().st_mtime_ns < before]
    assert report.bytes_resumed == sum(file.stat().st_size for file in kept)


def test_a_rerun_computes_no_finished_shard_again(tmp_path: Path, job: Job) -> None:
    job.kill(tmp_path / "out", Trap("bytes", job.nbytes * 97 // 100))
    report = job.finish(tmp_path / "out")
    total = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0 < report.bytes_resumed < total
    job.kill(tmp_path / "again", Trap("bytes", 4096))
    assert job.finish(tmp_path / "again").bytes_resumed == 0


def test_progress_counts_from_what_an_earlier_run_finished(tmp_path: Path, job: Job) -> None:
    job.kill(tmp_path / "out", Trap("bytes", job.nbytes * 97 // 100))
    events: list[lorasmith.Progress] = []
    report = lorasmith.merge(job.base, job.lora.folder, tmp_path / "out", progress=events.append)
    assert report.bytes_resumed > 0
    assert {event.resumed for event in events} == {report.bytes_resumed}
    assert all(report.bytes_resumed <= event.done <= event.total for event in events)
    assert events[-1].done == events[-1].total


def test_a_run_killed_again_and_again_arrives(tmp_path: Path, job: Job) -> None:
    kills = 0
    while (end := job.run(tmp_path / "out", trap=Trap("bytes", job.nbytes * 2 // 3))).code:
        assert end.code == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        kills += 1
        assert kills < 10
    assert kills >= 1
    assert tree(tmp_path / "out") == job.whole
    assert os.listdir(tmp_path) == ["out"]


def test_a_run_resumes_with_other_threads_and_memory(tmp_path: Path, job: Job) -> None:
    job.kill(tmp_path / "out", Trap("bytes", job.nbytes * 97 // 100))
    report = finish(job.base, job.lora.folder, tmp_path / "out", threads=1, memory=256 << 20)
    assert report.bytes_resumed > 0
    assert tree(tmp_path / "out") == job.whole


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_kill_after_any_step_publishes_nothing_early_and_a_rerun_goes_on(
    tmp_path: Path, job: Job, file_job: Job, kind: str
) -> None:
    """Every sync, rename and removal from the first folder made to the last one taken away."""
    task = job if kind == "folder" else file_job
    assert task.steps.count("fsync") >= 5
    assert "rename" in task.steps
    early = late = 0
    for step, folder in zip(range(1, len(task.steps) + 1), in_folders(tmp_path), strict=False):
        out = folder / "deep" / "out"
        task.kill(out, Trap("steps", step))
        was_there = out.exists()
        if was_there:
            assert tree(out) == task.whole
        late, early = late + was_there, early + (not was_there)
        end = task.run(out)
        assert end.error is None or (was_there and isinstance(end.error, lorasmith.OutputExists)), (step, end)
        assert tree(out) == task.whole, step
        assert os.listdir(out.parent) == ["out"], step
    assert early >= 5
    assert late >= 2


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_with_overwrite_the_old_or_the_new_model_is_there_whole_after_a_kill_at_any_step(
    tmp_path: Path, job: Job, file_job: Job, old: Path, old_file: Path, kind: str
) -> None:
    task, before = (job, old) if kind == "folder" else (file_job, old_file)
    states = {"old": tree(before), "new": task.whole}
    seen = []
    for folder in in_folders(tmp_path):
        out = folder / "out"
        copied(before, out)
        end = task.run(out, trap=Trap("steps", len(seen) + 1), overwrite=True)
        if end.code == 0:
            break
        seen.append(next((name for name, state in states.items() if tree(out) == state), "neither"))
        finish = task.run(out, overwrite=True)
        assert finish.error is None
        assert tree(out) == task.whole
        assert os.listdir(folder) == ["out"]
    assert "neither" not in seen
    assert seen == sorted(seen, reverse=True)
    assert seen.count("old") >= 5
    assert seen.count("new") >= 2


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_where_two_paths_cannot_be_swapped_the_old_model_is_never_lost(
    tmp_path: Path, job: Job, file_job: Job, old: Path, old_file: Path, kind: str
) -> None:
    """Between the two renames neither is at the output: both are beside it, and the rerun puts the new one there."""
    task, before = (job, old) if kind == "folder" else (file_job, old_file)
    states = {"old": tree(before), "new": task.whole}
    seen = []
    for folder in in_folders(tmp_path):
        out = folder / "out"
        copied(before, out)
        end = task.run(out, trap=Trap("steps", len(seen) + 1), overwrite=True, exchange=False)
        if end.code == 0:
            break
        if out.exists():
            seen.append(next(name for name, state in states.items() if tree(out) == state))
        else:
            seen.append("between")
            beside = [tree(one) for one in (folder / "out.partial").iterdir()]
            assert states["old"] in beside
            assert states["new"] in beside
        assert task.run(out, overwrite=True, exchange=False).error is None
        assert tree(out) == task.whole
        assert os.listdir(folder) == ["out"]
    assert 1 <= seen.count("between") <= 2
    assert seen.count("old") >= 5
    assert seen.count("new") >= 1


def test_an_output_taken_away_after_a_kill_is_made_anew(tmp_path: Path, job: Job, old: Path) -> None:
    """What the killed run had just replaced lies about then, and has the names and sizes of the new one."""
    wrong, kills = [], 0
    for folder in in_folders(tmp_path):
        out = folder / "out"
        copied(old, out)
        if job.run(out, trap=Trap("steps", kills + 1), overwrite=True).code == 0:
            break
        kills += 1
        shutil.rmtree(out)
        job.finish(out, overwrite=True)
        if tree(out) != job.whole:
            wrong.append(kills)
        assert os.listdir(folder) == ["out"]
    assert kills > 10
    assert not wrong


@pytest.mark.parametrize("torn", [b'{"finis', b"\0" * 64], ids=["half a line", "zeros"])
def test_a_journal_cut_short_by_a_power_cut_misleads_no_later_run(
    tmp_path: Path, job: Job, old: Path, torn: bytes
) -> None:
    wrong, kills = [], 0
    for folder in in_folders(tmp_path):
        out = folder / "out"
        copied(old, out)
        job.kill(out, Trap("bytes", job.nbytes * 97 // 100), overwrite=True)
        with open(folder / "out.partial" / "journal", "ab") as journal:
            journal.write(torn)
        if job.run(out, trap=Trap("steps", kills + 1), overwrite=True).code == 0:
            break
        kills += 1
        assert tree(out) in (tree(old), job.whole)
        job.finish(out, overwrite=True)
        if tree(out) != job.whole:
            wrong.append(kills)
        assert os.listdir(folder) == ["out"]
    assert kills > 10
    assert not wrong


# ------------------------------------------------------------------------------------------- the console script


def written_by(process: subprocess.Popen[bytes]) -> int:
    """Bytes the process has handed to write and its kin."""
    with contextlib.suppress(OSError), open(f"/proc/{process.pid}/io", encoding="ascii") as stream:
        return int(next(line for line in stream if line.startswith("wchar")).split()[1])
    return 0


def signalled(words: list[str], number: int, nbytes: int) -> subprocess.CompletedProcess[str]:
    """Run the console script and signal it once it has written so many bytes."""
    with subprocess.Popen([COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and written_by(process) < nbytes:
            time.sleep(0.0002)
        process.send_signal(number)
        stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(words, process.returncode, stdout.decode(), stderr.decode())


@pytest.fixture(scope="module")
def big_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Large enough to be caught in the act from outside: 48 MB in 6 shards."""
    folder = tmp_path_factory.mktemp("big job")
    sizes = Sizes(hidden=512, inner=2750, key=128, vocabulary=2003, layers=4)
    base = bases(sizes)
    path = write_base(folder / "base", base, sizes=sizes, shards=6)
    lora = write_adapter(folder / "adapter", base)
    options = {"memory": 16 << 20, "threads": 1}
    lorasmith.merge(path, lora.folder, folder / "whole", **options)
    return Job(path, lora, options, tree(folder / "whole"), sum(tensor.nbytes for tensor in base.values()), ())


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="asks /proc how much was written")


def _kill_script(tmp_path: Path, job: Job, share: float) -> bool:
    """Kill the script at this share of its bytes and let it run again; whether the kill came in time."""
    out = tmp_path / "out"
    words = [*job.words, "-o", str(out)]
    end = signalled(words, signal.SIGKILL, int(job.nbytes * share))
    if end.returncode == -signal.SIGKILL:
        assert not out.exists() or tree(out) == job.whole
        in_time = not out.exists()
        again = subprocess.run([COMMAND, *words], capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
    else:
        assert end.returncode == 0
        in_time = False
    assert tree(out) == job.whole
    assert os.listdir(tmp_path) == ["out"]
    return in_time


@needs_proc
@pytest.mark.parametrize("share", [0.05, 0.4, 0.75])
def test_the_console_script_killed_from_outside_publishes_nothing_and_goes_on(
    tmp_path: Path, big_job: Job, share: float
) -> None:
    assert _kill_script(tmp_path, big_job, share)


@needs_proc
@pytest.mark.slow
def test_the_console_script_killed_from_outside_at_30_points_goes_on_each_time(tmp_path: Path, big_job: Job) -> None:
    shares = [(2 * point + 1) / (2 * POINTS) for point in range(POINTS)]
    in_time = [
        _kill_script(folder, big_job, share) for share, folder in zip(shares, in_folders(tmp_path), strict=False)
    ]
    assert sum(in_time) >= POINTS * 3 // 4


# ------------------------------------------------------------------------------------------------------ Ctrl-C


def require_one_line(stderr: str) -> None:
    """One message; an empty line may stand before it, below the ``^C`` that terminals show."""
    assert len(stderr.strip().splitlines()) == 1
    assert "interrupted; the output is whole or not there, and the same command makes it" in stderr


@needs_proc
@pytest.mark.parametrize("share", [0.0001, 0.3])
def test_ctrl_c_ends_the_console_script_with_130_and_one_line(tmp_path: Path, big_job: Job, share: float) -> None:
    out = tmp_path / "out"
    words = [*big_job.words, "-o", str(out), "-q"]
    end = signalled(words, signal.SIGINT, int(big_job.nbytes * share))
    assert end.returncode == 130
    require_one_line(end.stderr)
    assert end.stdout == ""
    assert os.listdir(tmp_path) == ["out.partial"]
    again = subprocess.run([COMMAND, *words], capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, "")
    assert tree(out) == big_job.whole
    assert os.listdir(tmp_path) == ["out"]


def command(words: list[str], stderr: Path, trap: Trap) -> tuple[int, str]:
    """Exit code and stderr of a command line, run in a process of its own."""
    process = forked(_command, trap, words, str(stderr))
    process.join()
    return process.exitcode, stderr.read_text()


@pytest.mark.parametrize("share", [0.02, 0.2, 0.4, 0.6, 0.8])
def test_ctrl_c_while_bytes_are_written_publishes_nothing_and_a_rerun_goes_on(
    tmp_path: Path, job: Job, share: float
) -> None:
    out = tmp_path / "models" / "out"
    trap = Trap("bytes", int(job.nbytes * share), signal.SIGINT)
    code, said = command([*job.words, "-o", str(out), "-q"], tmp_path / "stderr", trap)
    assert code == 130
    require_one_line(said)
    assert not out.exists()
    job.finish(out)
    assert tree(out) == job.whole
    assert os.listdir(out.parent) == ["out"]


def test_ctrl_c_at_any_step_leaves_the_old_or_the_new_model_and_says_truly_which(
    tmp_path: Path, job: Job, old: Path
) -> None:
    interrupted, lies = 0, []
    for step, folder in zip(range(1, 200), in_folders(tmp_path / "runs"), strict=False):
        out = folder / "out"
        copied(old, out)
        words = [*job.words, "-o", str(out), "-q", "--overwrite"]
        code, said = command(words, tmp_path / "stderr", Trap("steps", step, signal.SIGINT))
        state = tree(out)
        assert state in (tree(old), job.whole)
        if code == 0:
            assert state == job.whole
            assert os.listdir(folder) == ["out"]
            if said == "" and step > len(job.steps):
                break
            continue
        assert code == 130
        require_one_line(said)
        interrupted += 1
        if "nothing was published" in said and state == job.whole:
            lies.append(step)
        job.finish(out, overwrite=True)
        assert tree(out) == job.whole
        assert os.listdir(folder) == ["out"]
    assert interrupted > 10
    assert not lies


# ------------------------------------------------------------------------------------------------- changed inputs


def change_base(job: Job, folder: Path) -> Path:
    """A copy of the job's base that can be changed."""
    shutil.copytree(job.base, folder / "base")
    return folder / "base"


def rewrite(file: Path, seed: int) -> None:
    """Other values under the same names and shapes, in place."""
    drawn = bases(SIZES, seed=seed)
    save_file({name: drawn[name] for name in load_file(file)}, file, {"format": "pt", "part": "0"})


LATE = ["97 % of the bytes", "all written", "renamed"]


def late_trap(job: Job, moment: str) -> Trap:
    if moment == LATE[0]:
        return Trap("bytes", job.nbytes * 97 // 100)
    last = len(job.steps) - 1 - job.steps[::-1].index("rename")
    return Trap("steps", last if moment == LATE[1] else last + 1)


@pytest.mark.parametrize("moment", LATE)
def test_a_base_changed_between_kill_and_rerun_is_not_blended(tmp_path: Path, job: Job, moment: str) -> None:
    base = change_base(job, tmp_path)
    out = tmp_path / "out"
    end = run(base, job.lora.folder, out, trap=late_trap(job, moment), **job.options)
    assert end.code == -signal.SIGKILL
    for number, file in enumerate(sorted(base.glob("*.safetensors"))):
        size = file.stat().st_size
        rewrite(file, seed=50)
        assert file.stat().st_size == size or number
    finish(base, job.lora.folder, tmp_path / "wanted", **job.options)
    end = run(base, job.lora.folder, out, **job.options)
    if moment == "renamed":
        assert isinstance(end.error, lorasmith.OutputExists)
        assert tree(out) == job.whole
    else:
        assert end.report is not None
        assert end.report.bytes_resumed == 0
        assert tree(out) == tree(tmp_path / "wanted") != job.whole
    assert sorted(os.listdir(tmp_path)) == ["base", "out", "wanted"]


@pytest.mark.parametrize("moment", LATE)
def test_an_adapter_trained_anew_between_kill_and_rerun_is_not_blended(tmp_path: Path, job: Job, moment: str) -> None:
    lora = tmp_path / "adapter"
    shutil.copytree(job.lora.folder, lora)
    out = tmp_path / "out"
    assert run(job.base, lora, out, trap=late_trap(job, moment), **job.options).code == -signal.SIGKILL
    shutil.rmtree(lora)
    write_adapter(lora, bases(SIZES), ratio=0.1, seed=33)
    stamp = (job.lora.folder / "adapter_model.safetensors").stat()
    os.utime(lora / "adapter_model.safetensors", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    finish(job.base, lora, tmp_path / "wanted", **job.options)
    end = run(job.base, lora, out, **job.options)
    if moment == "renamed":
        assert isinstance(end.error, lorasmith.OutputExists)
        assert tree(out) == job.whole
    else:
        assert end.report is not None
        assert end.report.bytes_resumed == 0
        assert tree(out) == tree(tmp_path / "wanted") != job.whole
    assert sorted(os.listdir(tmp_path)) == ["adapter", "out", "wanted"]


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_an_input_changed_under_way_is_refused_and_leaves_nothing_to_blend(
    tmp_path: Path, job: Job, which: str
) -> None:
    """The input is put back afterwards, time stamps and all: what was computed from the other must not be taken up."""
    base, lora = change_base(job, tmp_path), tmp_path / "adapter"
    shutil.copytree(job.lora.folder, lora)
    original = tmp_path / "original"

    def disturb(plan: lorasmith.Plan, resources: object) -> None:
        if which == "base":
            base.rename(original)
            shutil.copytree(original, base)
            for file in base.glob("*.safetensors"):
                rewrite(file, seed=51)
        else:
            lora.rename(original)
            write_adapter(lora, bases(SIZES), ratio=0.1, seed=34)

    with pytest.raises(lorasmith.LorasmithError, match="changed"):
        lorasmith.merge(base, lora, tmp_path / "out", planned=disturb)
    assert not (tmp_path / "out").exists()
    shutil.rmtree(base if which == "base" else lora)
    original.rename(base if which == "base" else lora)
    lorasmith.merge(base, lora, tmp_path / "out")
    assert tree(tmp_path / "out") == job.whole


def test_another_choice_of_tokenizer_leaves_nothing_of_the_killed_run_s(tmp_path: Path, job: Job) -> None:
    base, lora = change_base(job, tmp_path), tmp_path / "adapter"
    shutil.copytree(job.lora.folder, lora)
    (base / "tokenizer.model").write_bytes(b"the base's")
    (lora / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    trap = late_trap(job, "all written")
    options = {**job.options, "tokenizer": "base"}
    assert run(base, lora, out, trap=Trap("steps", trap.after + 1), **options).code == -signal.SIGKILL
    assert not out.exists()
    finish(base, lora, tmp_path / "wanted", **{**job.options, "tokenizer": "adapter"})
    finish(base, lora, out, **{**job.options, "tokenizer": "adapter"})
    assert tree(out) == tree(tmp_path / "wanted")


def test_a_resumed_run_tells_the_survival_that_an_undisturbed_one_tells(tmp_path: Path, job: Job) -> None:
    faint = write_adapter(tmp_path / "adapter", bases(SIZES), ratio=0.001)
    arguments = (job.base, faint.folder)
    wanted = finish(*arguments, tmp_path / "whole", **job.options)
    assert wanted.warnings
    for moment in LATE:
        out = tmp_path / moment
        run(*arguments, out, trap=late_trap(job, moment), **job.options)
        report = finish(*arguments, out, **job.options)
        assert report.survival == wanted.survival, moment
        assert report.warnings == wanted.warnings, moment


# --------------------------------------------------------------------------------------------- two runs at once


class Held:
    """A run in this process that stands still, its output claimed, until it is let go."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._claimed, self._go = threading.Event(), threading.Event()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(arguments, options))

    def _run(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        try:
            lorasmith.merge(*arguments, **options, progress=self._wait)
        except BaseException as error:
            self.failure = error

    def _wait(self, progress: lorasmith.Progress) -> None:
        self._claimed.set()
        assert self._go.wait(60)

    def __enter__(self) -> Held:
        self._thread.start()
        assert self._claimed.wait(60)
        return self

    def __exit__(self, *error: object) -> None:
        self._go.set()
        self._thread.join()


@pytest.mark.parametrize("first", ["this", "other"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_runs_on_one_output_the_second_is_told_that_it_is_busy(
    tmp_path: Path, job: Job, old: Path, first: str, overwrite: bool
) -> None:
    other = write_adapter(tmp_path / "adapter", bases(SIZES), ratio=0.1, seed=21)
    lorasmith.merge(job.base, other.folder, tmp_path / "wanted")
    results = {"this": job.whole, "other": tree(tmp_path / "wanted")}
    folders = {"this": job.lora.folder, "other": other.folder}
    out = tmp_path / "runs" / "out"
    out.parent.mkdir()
    if overwrite:
        copied(old, out)
    second = "other" if first == "this" else "this"
    with Held(job.base, folders[first], out, overwrite=overwrite) as held:
        for _ in range(2):
            with pytest.raises(lorasmith.OutputBusy, match="out"):
                lorasmith.merge(job.base, folders[second], out, overwrite=overwrite)
            end = run(job.base, folders[second], out, overwrite=overwrite)
            assert isinstance(end.error, lorasmith.OutputBusy)
        script = subprocess.run(
            [COMMAND, "merge", job.base, folders[first], "-o", out, "-q", *(["--overwrite"] if overwrite else [])],
            capture_output=True,
            text=True,
        )
        assert script.returncode == 1
        assert len(script.stderr.splitlines()) == 1
        assert tree(out) == tree(old) if overwrite else not out.exists()
    assert held.failure is None
    assert tree(out) == results[first]
    assert os.listdir(out.parent) == ["out"]


def test_runs_that_start_together_on_one_output_leave_one_whole_model(tmp_path: Path, job: Job) -> None:
    outcomes: list[BaseException | None] = []

    def once() -> None:
        try:
            lorasmith.merge(job.base, job.lora.folder, tmp_path / "out")
            outcomes.append(None)
        except (lorasmith.OutputBusy, lorasmith.OutputExists) as error:
            outcomes.append(error)

    threads = [threading.Thread(target=once) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 6
    assert outcomes.count(None) == 1
    assert tree(tmp_path / "out") == job.whole
    assert os.listdir(tmp_path) == ["out"]


# ------------------------------------------------------------------------------------------- places that are refused


def test_an_output_that_is_inside_or_around_an_input_or_one_itself_is_refused(tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    base = write_base(inputs / "base", bases(), shards=2)
    lora = write_adapter(inputs / "adapter", bases())
    (tmp_path / "link").symlink_to(base)
    write_json(inputs / "config.json", {})
    save_file(bases(), inputs / "model.safetensors")
    before = tree(tmp_path)
    places = [
        base, lora.folder, base / "out", base / "deep" / "er" / "out", lora.folder / "out", inputs, tmp_path,
        tmp_path / "link", tmp_path / "link" / "out", inputs / "base" / ".." / "base", Path(f"{base}{os.sep}"),
        inputs / "nowhere" / ".." / "adapter",
    ]  # fmt: skip
    for overwrite in (False, True):
        for place in places:
            with pytest.raises(lorasmith.OutputExists, match="input"):
                lorasmith.merge(base, lora.folder, place, overwrite=overwrite)
            assert tree(tmp_path) == before, place


def test_a_file_that_is_an_input_is_refused_as_output(tmp_path: Path) -> None:
    save_file(bases(), tmp_path / "base.safetensors")
    lora = write_adapter(tmp_path / "adapter", bases())
    (tmp_path / "link.safetensors").symlink_to("base.safetensors")
    before = tree(tmp_path)
    places = ["base.safetensors", "link.safetensors", "adapter/adapter_model.safetensors", "adapter/new.safetensors"]
    for place in places:
        with pytest.raises(lorasmith.OutputExists, match="input"):
            lorasmith.merge(tmp_path / "base.safetensors", lora.folder, tmp_path / place, overwrite=True)
        assert tree(tmp_path) == before


def test_an_output_that_exists_is_refused_without_overwrite_and_left_alone(
    tmp_path: Path, job: Job, old: Path, old_file: Path
) -> None:
    copied(old, tmp_path / "model")
    copied(old_file, tmp_path / "file")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".keep").write_text("")
    before = tree(tmp_path)
    for name in ("model", "file", "notes", "hidden"):
        with pytest.raises(lorasmith.OutputExists, match="exists"):
            lorasmith.merge(job.base, job.lora.folder, tmp_path / name)
        assert tree(tmp_path) == before


NOT_MODELS = {
    "notes": {"a.txt": b"mine"},
    "a config alone": {"config.json": b"{}"},
    "weights alone": {"model.safetensors": b"mine"},
    "a checkout": {"config.json": b"{}", "model.safetensors": b"mine", ".git/HEAD": b"ref"},
    "firmware": {"config.json": b'{"port": "COM3"}', "firmware.bin": b"\x7fELF", "src/main.c": b"int main;"},
}


@pytest.mark.parametrize("name", NOT_MODELS)
def test_a_folder_that_is_no_model_is_not_replaced_even_with_overwrite(tmp_path: Path, job: Job, name: str) -> None:
    out = tmp_path / "out"
    for file, data in NOT_MODELS[name].items():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_bytes(data)
    before = tree(tmp_path)
    with pytest.raises(lorasmith.OutputExists, match="--overwrite"):
        lorasmith.merge(job.base, job.lora.folder, out, overwrite=True)
    assert tree(tmp_path) == before


def test_a_file_that_is_no_model_is_not_replaced_even_with_overwrite(tmp_path: Path, file_job: Job) -> None:
    (tmp_path / "thesis.tex").write_bytes(b"\\documentclass{book}")
    before = tree(tmp_path)
    with pytest.raises(lorasmith.OutputExists, match="--overwrite"):
        lorasmith.merge(file_job.base, file_job.lora.folder, tmp_path / "thesis.tex", overwrite=True)
    assert tree(tmp_path) == before


def test_an_empty_folder_becomes_the_output_and_a_link_stays_one(tmp_path: Path, job: Job, old: Path) -> None:
    (tmp_path / "empty").mkdir()
    job.finish(tmp_path / "empty")
    assert tree(tmp_path / "empty") == job.whole
    copied(old, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    job.finish(tmp_path / "link", overwrite=True)
    assert os.readlink(tmp_path / "link") == "real"
    assert tree(tmp_path / "real") == job.whole
    assert sorted(os.listdir(tmp_path)) == ["empty", "link", "real"]


def test_a_partial_folder_that_is_someone_else_s_is_left_alone(tmp_path: Path, job: Job) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half a thesis.tex").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(lorasmith.OutputExists, match=r"out\.partial"):
        lorasmith.merge(job.base, job.lora.folder, tmp_path / "out")
    assert tree(tmp_path) == before


def test_what_appears_at_the_output_after_a_kill_is_left_alone(tmp_path: Path, job: Job) -> None:
    out = tmp_path / "out"
    job.kill(out, Trap("bytes", job.nbytes // 2))
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(lorasmith.OutputExists, match="exists"):
        job.finish(out)
    assert {name: (out / name).read_text() for name in os.listdir(out)} == {"notes.txt": "mine"}


# ------------------------------------------------------------------------------------------------- mount points


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "mount"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_result_on_a_mount_point_is_moved_into_it_and_what_makes_it_a_model_last(mount: Path, job: Job) -> None:
    parts = kills = 0
    while job.run(mount, trap=Trap("steps", kills + 1)).code:
        kills += 1
        found = set(os.listdir(mount)) - {".lorasmith.partial"}
        whole = set(os.listdir(job.base)) | {"lorasmith.json"}
        assert "config.json" not in found or found == whole
        assert "model.safetensors.index.json" not in found or found >= whole - {"config.json"}
        parts += 0 < len(found) < len(whole)
        end = job.run(mount)
        assert end.error is None or (found == whole and isinstance(end.error, lorasmith.OutputExists))
        assert {name: digest for name, digest in tree(mount).items() if name != "."} == {
            name: digest for name, digest in job.whole.items() if name != "."
        }
        for file in mount.iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    assert kills > 20
    assert parts >= 5


def test_a_mount_point_that_holds_something_is_left_alone(mount: Path, job: Job, old: Path) -> None:
    shutil.copytree(old, mount, dirs_exist_ok=True)
    before = tree(mount)
    with pytest.raises(lorasmith.OutputExists, match="exists"):
        lorasmith.merge(job.base, job.lora.folder, mount)
    with pytest.raises(lorasmith.OutputExists, match="mount point"):
        lorasmith.merge(job.base, job.lora.folder, mount, overwrite=True)
    assert tree(mount) == before


def test_a_model_half_moved_into_a_mount_point_is_completed_before_another_is_refused(mount: Path, job: Job) -> None:
    job.kill(mount, Trap("steps", len(job.steps)))
    assert 1 < len(os.listdir(mount)) < len(set(os.listdir(job.base)) | {"lorasmith.json"})
    assert (mount / ".lorasmith.partial").is_dir()
    end = job.run(mount, dtype="float32")
    assert isinstance(end.error, lorasmith.OutputExists)
    assert not (mount / ".lorasmith.partial").exists()
    assert {name for name in tree(mount) if name != "."} == {name for name in job.whole if name != "."}


# ----------------------------------------------------------------------------------------------- a disk that fails


def _merge_with_file_limit(pipe: Any, limit: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        lorasmith.merge(*arguments, **options)
    except Exception as error:
        pipe.send(error)


def test_a_write_that_fails_leaves_what_is_finished_for_a_rerun(tmp_path: Path, job: Job) -> None:
    """A limit on the size of files stands for a disk that fails after the smaller shards."""
    sizes = sorted(file.stat().st_size for file in job.base.glob("*.safetensors"))
    assert sizes[-2] < sizes[-1]
    out = tmp_path / "out"
    ours, theirs = multiprocessing.Pipe(duplex=False)
    arguments = (job.base, job.lora.folder, out)
    forked(_merge_with_file_limit, theirs, sizes[-1] - 1, arguments, {**job.options, "threads": 1}).join()
    error = ours.recv()
    assert isinstance(error, lorasmith.IOFailed)
    assert "run the same command again" in str(error)
    assert not out.exists()
    job.finish(out)
    assert tree(out) == job.whole
    assert json.loads((out / "lorasmith.json").read_text())["plan"]
    assert os.listdir(tmp_path) == ["out"]
