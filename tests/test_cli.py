"""The command as users run it: what it prints where, its exit codes, its options, and what the README says of it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import termios
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from generate import Sizes, Tensors, bases, tree, write_adapter, write_base, write_json
from safetensors.torch import load_file, save_file

import lorasmith
from lorasmith.cli import commands
from lorasmith.cli.lines import size
from lorasmith.cli.output import _Log
from lorasmith.cli.parameters import Place, Size

SCRIPT = os.path.join(sysconfig.get_path("scripts"), "lorasmith")
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
TINY = Sizes(hidden=64, inner=80, key=16, vocabulary=70, layers=2)
MERGE = ("merge", "base", "adapter", "-o", "out")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, the same in shards, two adapters, and the merge of base and adapter."""
    room = tmp_path_factory.mktemp("made")
    tensors = bases(TINY)
    write_base(room / "base", tensors, sizes=TINY)
    write_base(room / "sharded", tensors, sizes=TINY, shards=3)
    write_adapter(room / "adapter", tensors, rank=4)
    write_adapter(room / "other", tensors, rank=8, seed=2, targets=("q_proj", "down_proj"), rslora=True)
    lorasmith.merge(room / "base", room / "adapter", room / "merged")
    return room


@pytest.fixture
def room(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them, as the working folder."""
    shutil.copytree(made, tmp_path / "room")
    monkeypatch.chdir(tmp_path / "room")
    return tmp_path / "room"


def run(*args: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in the working folder."""
    done = subprocess.run(
        [SCRIPT, *args], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert done.returncode == code, done.stderr
    assert ("Traceback" in done.stderr) == ("LORASMITH_DEBUG" in environment)
    return done


def invoke(*args: str) -> click.testing.Result:
    """Run a command in this process; its own errors come through."""
    return CliRunner().invoke(commands, args, catch_exceptions=False, standalone_mode=False)


def weights(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------- help, usage


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [(), *((name,) for name in commands.commands)])
def test_every_command_explains_itself(command: tuple[str, ...], flag: str) -> None:
    done = run(*command, flag)
    assert done.stdout.startswith(f"Usage: lorasmith {' '.join(command)}".rstrip())
    assert done.stderr == ""
    known = commands.commands if not command else {}
    assert all(f"  {name}  " in done.stdout for name in known)


def test_the_version_is_the_package_s() -> None:
    assert run("--version").stdout == f"lorasmith, version {lorasmith.__version__}\n"


@pytest.mark.parametrize(
    "code", ["import lorasmith", "from lorasmith.cli import commands; commands(['--help'], 'x', standalone_mode=False)"]
)
def test_neither_import_nor_help_loads_anything_heavy(code: str) -> None:
    heavy = {"torch", "numpy", "safetensors", "tqdm", "huggingface_hub"}
    ask = f"import sys\n{code}\nprint(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["merge", "base", "-o", "out"], "ADAPTER"),
        (["merge", "-o", "out"], "BASE"),
        (["merge", "base", "adapter"], "--out"),
        (["merge", "base", "adapter", "-o"], "-o"),
        (["merge", "base", "adapter", "-o", ""], "empty"),
        (["merge", "", "adapter", "-o", "out"], "empty"),
        (["merge", "base", "", "-o", "out"], "empty"),
        ([*MERGE, "--fast"], "--fast"),
        ([*MERGE, "--overwrit"], "--overwrite"),
        ([*MERGE, "--memory", "lots"], "lots"),
        ([*MERGE, "--memory", "-5GB"], "-5GB"),
        ([*MERGE, "--memory", "5XB"], "5XB"),
        ([*MERGE, "--memory", "0"], "memory"),
        ([*MERGE, "--max-shard-size", "0"], "max-shard-size"),
        ([*MERGE, "--threads", "0"], "threads"),
        ([*MERGE, "--threads", "two"], "two"),
        ([*MERGE, "--dtype", "int8"], "int8"),
        ([*MERGE, "--device", "tpu"], "tpu"),
        ([*MERGE, "--tokenizer", "mine"], "mine"),
        ([*MERGE, "--tokenizer", "adapter"], "tokenizer"),
        (["merge", "base", "adapter:1e999", "-o", "out"], "inf"),
        (["merg"], "merge"),
        (["demo", "--fast"], "--fast"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_exits_with_2_and_names_what_is_wrong(room: Path, args: list[str], named: str) -> None:
    before = tree(room)
    done = run(*args, code=2)
    assert done.stdout == ""
    assert named in done.stderr
    assert "Error: " in done.stderr
    assert tree(room) == before


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("0", 0), ("1000000", 10**6), ("5GB", 5 * 10**9), ("5G", 5 * 10**9), ("128MiB", 128 << 20), ("1.5 kb", 1500),
     ("2tib", 2 << 40), ("0.1GB", 10**8), ("7B", 7), ("9007199254740993", 2**53 + 1)],
)  # fmt: skip
def test_sizes_are_exact(text: str, nbytes: int) -> None:
    assert Size().convert(text, None, None) == nbytes


def test_a_size_larger_than_any_float_is_just_large() -> None:
    assert Size().convert("9" * 400 + "GB", None, None) > 10**400


@pytest.mark.parametrize("text", ["", "GB", "5 bytes", "5i", "5IB", "1e9", "0x10", "nan", "inf", "5GBB", "1,000"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match=re.escape(repr(text))):
        Size().convert(text, None, None)


# --------------------------------------------------------------------------------------------- odd names, typos


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (["bsae", "adapter"], "base"),
        (["base", "adpter"], "adapter"),
        (["base", "adpter:0.5"], "adapter"),
        (["base/", "adapte/"], "adapter"),
        (["base/model.safetensor", "adapter"], os.path.join("base", "model.safetensors")),
    ],
)
def test_a_typo_in_a_path_is_answered_with_the_name_nearby(room: Path, args: list[str], near: str) -> None:
    done = run("merge", *args, "-o", "out", code=1)
    assert done.stderr.startswith("Error: ")
    assert f"did you mean {near}" in done.stderr
    assert done.stdout == ""
    assert not (room / "out").exists()


@pytest.mark.parametrize(
    "name",
    ["with space", "größe–模型", "-dash", "--out", "new\nline", "tab\tstop", "\x1b[31mred", "co:lon", "e:0.7",
     "'quo\"te", "$HOME", "~", "*", "%s{}", "a" * 240, os.fsdecode(b"\xff\xfe")],
    ids=ascii,
)  # fmt: skip
def test_files_may_have_any_name(room: Path, name: str) -> None:
    (room / name).mkdir()
    os.rename("base", os.path.join(name, "base"))
    os.rename("adapter", os.path.join(name, "adapter"))
    base, adapter, out = (os.path.join(name, part) for part in ("base", "adapter", "out"))
    os.rename(os.path.join(base, "LICENSE"), os.path.join(base, name))
    plan = json.loads(invoke("merge", "--json", "--dry-run", "--out", out, "--", base, adapter).stdout)
    assert plan["base"] == base
    done = run("merge", "--out", out, "--", base, adapter)
    assert all(line.isprintable() for line in (done.stdout + done.stderr).splitlines())
    assert len(done.stderr.splitlines()) == 1
    assert "Merged into" in done.stdout
    merged = (room / "merged" / "model.safetensors").read_bytes()
    assert (room / name / "out" / "model.safetensors").read_bytes() == merged
    assert (room / name / "out" / name).read_bytes() == (room / name / "base" / name).read_bytes()


@pytest.mark.parametrize("name", ["with space.safetensors", "模型.st", "new\nline.safetensors", "no ending"], ids=ascii)
def test_single_files_may_have_any_name(room: Path, name: str) -> None:
    shutil.copy("base/model.safetensors", name)
    run("merge", name, "adapter", "-o", f"merged {name}", "-q")
    assert same(load_file(room / f"merged {name}"), weights(room / "merged"))


def test_paths_may_be_relative_and_end_in_slashes(room: Path) -> None:
    (room / "below").mkdir()
    done = subprocess.run([SCRIPT, "merge", "../base/", "..//adapter///:1", "-o", "./new/deep/out/"], cwd="below")
    assert done.returncode == 0
    assert (room / "below/new/deep/out/model.safetensors").is_file()


def test_the_home_folder_is_meant_where_the_shell_has_not_put_it(room: Path) -> None:
    run("merge", "~/base", "~/adapter:1", "--out=~/out", "-q", HOME=str(room))
    assert (room / "out" / "model.safetensors").is_file()
    (room / "~").mkdir()
    assert Place().convert("~", None, None) == "~"


def test_an_output_that_is_in_the_way_is_left_alone(room: Path) -> None:
    (room / "notes.txt").write_text("mine")
    for out, why in (
        ("notes.txt", "exists already"),
        ("base", "is the input"),
        ("base/x", "inside"),
        (".", "contains"),
    ):
        before = tree(room)
        done = run("merge", "base", "adapter", "-o", out, code=1)
        assert re.fullmatch(rf"Error: .*{why}.*\n", done.stderr)
        assert tree(room) == before
    done = run(*MERGE[:-1], "/proc/nothing/here", code=1)
    assert re.fullmatch(r"Merging .*\nError: cannot write beside /proc/nothing/here: .*\n", done.stderr)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_base_that_may_only_be_read_is_enough(room: Path) -> None:
    for path in [room / "base", *(room / "base").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    run(*MERGE, "-q")
    assert os.access(room / "out" / "model.safetensors", os.W_OK)


# ------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    ("given", "path", "weight"),
    [
        ("adapter", "adapter", 1),
        ("adapter:0.7", "adapter", 0.7),
        ("adapter/:0.7", "adapter/", 0.7),
        ("adapter:-0.5", "adapter", -0.5),
        ("adapter:+2", "adapter", 2),
        ("adapter:1e-3", "adapter", 1e-3),
        ("adapter:.5", "adapter", 0.5),
        ("adapter:5.", "adapter", 5),
        ("adapter:0", "adapter", 0),
        ("odd:0.7", "odd:0.7", 1),
        ("odd:0.7:0.5", "odd:0.7", 0.5),
        ("C:\\x", "C:\\x", 1),
        ("C:\\x:0.5", "C:\\x", 0.5),
    ],
)
def test_a_weight_is_the_number_after_the_last_colon(room: Path, given: str, path: str, weight: float) -> None:
    for name in ("odd:0.7", "C:\\x"):
        shutil.copytree("adapter", name)
    (use,) = json.loads(run("merge", "base", given, "-o", "out", "--dry-run", "--json").stdout)["adapters"]
    assert (use["path"], use["weight"]) == (path, weight)


@pytest.mark.parametrize(
    "given", ["adapter:nan", "adapter:inf", "adapter:-inf", "adapter:", "adapter:x", ":0.5", "adapter:0x1"]
)
def test_what_is_no_number_is_no_weight(room: Path, given: str) -> None:
    done = run("merge", "base", given, "-o", "out", code=1)
    assert re.fullmatch(r"Error: .* does not exist.*\n", done.stderr)
    assert not (room / "out").exists()


def test_weights_reach_the_sum(room: Path) -> None:
    run("merge", "base", "adapter:-0.5", "other:0.25", "-o", "out", "-q", "--dtype", "float32")
    lorasmith.merge("base", [("adapter", -0.5), ("other", 0.25)], "right", dtype="float32")
    lorasmith.merge("base", ["adapter", "other"], "wrong", dtype="float32")
    assert same(weights(room / "out"), weights(room / "right"))
    assert not same(weights(room / "out"), weights(room / "wrong"))


def test_numpy_s_numbers_are_weights_and_true_is_none(room: Path) -> None:
    for number in (np.float32(0.5), np.float64(0.5)):
        for given in (("adapter", number), [("adapter", number)]):
            (use,) = lorasmith.plan("base", given).adapters
            assert (use.path, use.weight) == ("adapter", 0.5)
    with pytest.raises(lorasmith.BadOption, match="is not an adapter"):
        lorasmith.plan("base", [("adapter", True)])


# -------------------------------------------------------------------------------------------------- what it says


def test_a_dry_run_prints_the_plan_and_writes_nothing(room: Path) -> None:
    before = tree(room)
    done = run("merge", "base", "adapter:0.7", "other", "-o", "new/out", "--dry-run", "--threads", "2")
    assert tree(room) == before
    assert done.stderr == ""
    out = done.stdout
    assert "base     base (1 file)" in out
    assert "adapter × 0.7: LoRA, rank 4, scale 8, all 28 tensors used" in out
    assert f"other: LoRA, rank 8, scale {32 / 8**0.5:g}, all 8 tensors used" in out
    assert re.search(r"\[1\] model\.layers\.\*\.self_attn\.v_proj +LoRA +2 +4 +8\n", out)
    assert re.search(rf"\[2\] model\.layers\.\*\.mlp\.down_proj +LoRA +2 +8 +{32 / 8**0.5:g}\n", out)
    assert "14 merged, 7 copied" in out
    read = sum(Path(name).stat().st_size for name in ("base/model.safetensors", *_adapter_files("adapter", "other")))
    assert f"read     {size(read)}\n" in out
    plan = lorasmith.plan("base", [("adapter", 0.7), "other"], "new/out")
    assert f"write    {size(plan.bytes_written)} to new/out (" in out
    assert re.search(r"\(\d+(\.\d+)? [kMGTP]?B free\)", out)
    assert re.search(r"memory   \d+(\.\d+)? MB of buffers for 2 threads", out)
    assert out.endswith("Nothing was written (--dry-run).\n")


def _adapter_files(*names: str) -> list[str]:
    return [f"{name}/adapter_model.safetensors" for name in names]


def test_a_dry_run_s_json_is_the_plan_and_nothing_else(room: Path) -> None:
    before = tree(room)
    done = run(*MERGE, "--dry-run", "--json")
    assert tree(room) == before
    assert done.stderr == ""
    facts = json.loads(done.stdout)
    takes = facts.pop("resources")
    assert facts == json.loads(json.dumps(lorasmith.plan("base", "adapter", "out").to_dict()))
    assert facts["schema"] == 1
    assert takes.keys() == {"threads", "memory", "disk", "disk_free", "download"}
    assert takes["disk"] == facts["bytes_written"]


def test_a_dry_run_foretells_what_the_merge_writes_and_refuses_what_it_would(room: Path) -> None:
    plan = json.loads(run(*MERGE, "--dry-run", "--json").stdout)
    report = json.loads(run(*MERGE, "--json").stdout)
    for key in ("tensors_merged", "tensors_copied", "bytes_read", "bytes_written", "targets", "adapters"):
        assert plan[key] == report[key], key
    assert plan["hash"] == report["plan_hash"]
    written = sum(file.stat().st_size for file in (room / "out").rglob("*") if file.is_file())
    assert plan["bytes_written"] == written
    assert "--overwrite" in run(*MERGE, "--dry-run", code=1).stderr
    assert "smallest that works" in run(*MERGE[:-1], "new", "--dry-run", "--memory", "1kB", code=1).stderr
    assert "config.json is no folder" in run(*MERGE[:-1], "merged/config.json/new/out", "--dry-run", code=1).stderr


def test_an_output_that_may_not_be_written_is_refused_by_the_plan(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lorasmith.plan("base", "adapter", "new/out")
    monkeypatch.setattr(os, "access", lambda path, _: path != str(room))  # root may write everywhere
    with pytest.raises(lorasmith.IOFailed, match=r"cannot write beside new/out: Permission denied: .*/room; "):
        lorasmith.plan("base", "adapter", "new/out")


def test_the_report_names_every_adapter_and_what_it_took(room: Path) -> None:
    done = run("merge", "base", "adapter:0.7", "other:-1", "-o", "out")
    lines = done.stdout.splitlines()
    assert lines[0] == "Merged into out"
    assert "adapter  adapter × 0.7: LoRA, rank 4, scale 8, all 28 tensors used" in lines
    assert f"adapter  other × -1: LoRA, rank 8, scale {32 / 8**0.5:g}, all 8 tensors used" in lines
    assert re.search(r"^survival \d+\.\d\d% of the delta is left after rounding", done.stdout, re.M)
    assert re.search(r"^written  \d+ kB in \d+\.\d s, .*/s$", done.stdout, re.M)
    assert re.search(r"^memory   \d+ MB at most$", done.stdout, re.M)
    assert re.fullmatch(r"Merging 14 tensors, writing \d+ kB to out \(\d+ threads?\)\n", done.stderr)


def test_the_json_report_is_the_library_s_and_alone_on_stdout(room: Path) -> None:
    done = run(*MERGE, "--json")
    assert done.stderr == ""
    facts = json.loads(done.stdout)
    library = json.loads(json.dumps(lorasmith.merge("base", "adapter", "again").to_dict()))
    varies = {"out", "seconds", "rate", "peak_memory"}
    assert facts.keys() == library.keys()
    assert {key for key in facts if facts[key] != library[key]} <= varies
    assert facts["schema"] == 1
    assert facts["survival"]["total"] > 0.9


def test_quiet_prints_nothing_but_warnings_and_errors(room: Path) -> None:
    done = run(*MERGE, "--quiet")
    assert (done.stdout, done.stderr) == ("", "")
    done = run("merge", "base", "adapter:0.001", "-o", "faint", "-q")
    assert done.stdout == ""
    assert re.fullmatch(r"Warning: .*--dtype float32.*\n", done.stderr)
    done = run(*MERGE, "-q", code=1)
    assert re.fullmatch(r"Error: .*\n", done.stderr)


def test_warnings_leave_json_on_stdout_whole(room: Path) -> None:
    done = run("merge", "base", "adapter:0.001", "-o", "faint", "--json")
    (warning,) = json.loads(done.stdout)["warnings"]
    assert done.stderr == f"Warning: {warning}\n"


def on_terminal(*args: str, columns: int = 100, **environment: str) -> tuple[str, str]:
    """What a command writes to stdout, a pipe, and to stderr, a terminal of so many columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = subprocess.Popen(
        [SCRIPT, *args], stdout=subprocess.PIPE, stderr=follower, env={**os.environ, "TERM": "xterm", **environment}
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            block = os.read(leader, 65536)
        except OSError:  # Linux says EIO when the other end is closed
            break
        if not block:
            break
        seen += block
    os.close(leader)
    out, _ = command.communicate(timeout=60)
    assert command.returncode == 0, seen
    return out.decode(), seen.decode()


def test_a_terminal_shows_a_bar_that_is_gone_at_the_end(room: Path) -> None:
    out, seen = on_terminal(*MERGE, TQDM_MININTERVAL="0")
    assert out.startswith("Merged into out")
    bars = [part for part in re.split(r"[\r\n]+", seen) if "%|" in part]
    size_, rate, left = r"[\d.]+[kM]?", r"[\d.]+[kM]?B/s", r"\d\d:\d\d<\d\d:\d\d"
    assert any(re.search(rf"{size_}/{size_} \[{left}, +{rate}\]", part) for part in bars), seen
    assert re.search(r"\r *\r$", seen), "the bar is still there"


@pytest.mark.parametrize("option", ["--quiet", "--no-progress"])
def test_no_bar_where_none_is_wanted(room: Path, option: str) -> None:
    _, seen = on_terminal(*MERGE, option, TQDM_MININTERVAL="0")
    assert "%" not in seen
    assert "\r" not in seen.replace("\r\n", "")


def test_a_terminal_without_a_width_shows_no_bar(room: Path) -> None:
    _, seen = on_terminal(*MERGE, columns=0, TQDM_MININTERVAL="0")
    assert re.fullmatch(r"Merging [^\r\n]*\r\n", seen)


def test_a_log_has_a_line_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    log = _Log()
    for second in range(120):
        log(lorasmith.Progress(done=second * 10**8, total=12 * 10**9, seconds=second / 4))
    log(lorasmith.Progress(done=12 * 10**9, total=12 * 10**9, seconds=30.0))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        f"{done} GB of 12 GB ({share}%), 400 MB/s, {left} s left"
        for done, share, left in ((2, 17, 25), (4, 33, 20), (6, 50, 15), (8, 67, 10), (10, 83, 5))
    ]


def test_a_log_of_what_is_resumed_counts_only_the_new_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    _Log()(lorasmith.Progress(done=6 * 10**9, total=10**10, seconds=10.0, resumed=5 * 10**9))
    assert capsys.readouterr().err == "6 GB of 10 GB (60%), 100 MB/s, 40 s left\n"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"), (999_500, "1 MB"), (2_470_000_000, "2.47 GB"),
     (5e15, "5e+03 TB")],
)  # fmt: skip
def test_sizes_are_written_with_three_digits(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


def test_a_traceback_is_shown_only_when_asked_for(room: Path) -> None:
    done = run("merge", "base", "nothing", "-o", "out", code=1, LORASMITH_DEBUG="1")
    assert "MissingFile: nothing does not exist" in done.stderr


# ------------------------------------------------------------------------------------------------- odd streams


def shell(script: str) -> subprocess.CompletedProcess[str]:
    path = f"{os.path.dirname(SCRIPT)}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=120, env={**os.environ, "PATH": path}
    )


@pytest.mark.parametrize("option", ["--json", "--no-progress"])
def test_a_reader_that_has_gone_causes_no_traceback(room: Path, option: str) -> None:
    done = shell(f"lorasmith merge base adapter -o out {option} --dry-run | true")
    assert (done.returncode, done.stderr) == (0, "")
    done = shell(f"(lorasmith merge base adapter -o out {option}; echo >&2 code $?) | true")
    assert re.fullmatch(r"(Merging .*\n)?code [01]\n", done.stderr)
    assert (room / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_do_not_stop_a_merge(room: Path, closed: str) -> None:
    done = shell(f"lorasmith merge base adapter -o out {closed}")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert (room / "out" / "model.safetensors").is_file()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_that_is_full_stops_no_merge(room: Path) -> None:
    done = shell("lorasmith merge base adapter -o out 2> /dev/full")
    assert done.returncode == 0
    assert "Merged into out" in done.stdout
    assert shell("lorasmith merge base adapter -o out 2> /dev/full").returncode == 1  # it exists


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory")
def test_a_library_that_cannot_be_loaded_is_named(room: Path) -> None:
    done = shell("ulimit -v 400000; lorasmith merge base adapter -o out --threads 1")
    assert done.returncode == 1
    assert re.search(r"Error: (a library cannot be loaded: .*ulimit -v|the memory of this machine)", done.stderr)
    assert not (room / "out").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_report_that_cannot_be_written_is_an_error(room: Path) -> None:
    done = shell("lorasmith merge base adapter -o out --dry-run --json > /dev/full")
    assert done.returncode == 1
    assert re.fullmatch(r"Error: standard output .*\n", done.stderr)


def test_a_terminal_without_unicode_gets_escapes(room: Path) -> None:
    done = run("merge", "base", "adapter:0.5", "-o", "out", PYTHONIOENCODING="cp1251")
    assert r"adapter \xd7 0.5" in done.stdout


# ------------------------------------------------------------------------------------------------------ options


def test_options_reach_the_merge(room: Path) -> None:
    run(*MERGE, "-q")
    for option in (["--threads", "1"], ["--memory", "64MiB"], ["--no-progress"], ["--device", "cpu"]):
        run(*MERGE[:-1], "again", *option, "-q")
        assert tree(room / "again") == tree(room / "out")
        shutil.rmtree(room / "again")
    assert (
        json.loads(run(*MERGE[:-1], "x", "--threads", "1", "--dry-run", "--json").stdout)["resources"]["threads"] == 1
    )


def test_renames_apply_one_after_the_other(room: Path) -> None:
    file = room / "other" / "adapter_model.safetensors"
    save_file({name.replace("self_attn.q_proj", "attn.q"): one for name, one in load_file(file).items()}, file)
    failed = run("merge", "base", "other", "-o", "out", code=1)
    assert "--rename" in failed.stderr
    assert "Nearest to model.layers.0.attn.q.weight" in failed.stderr
    run("merge", "base", "other", "-o", "out", "-q", "--rename", r"\battn\.=self_attn.", "--rename", r"\.q\.=.q_proj.")
    shutil.copytree(room / "out", room / "renamed")
    shutil.rmtree(room / "out")
    save_file({name.replace("attn.q.", "self_attn.q_proj."): one for name, one in load_file(file).items()}, file)
    run("merge", "base", "other", "-o", "out", "-q")
    assert same(weights(room / "renamed"), weights(room / "out"))


def test_a_plan_shows_where_layers_go_that_the_base_has_under_other_names(room: Path) -> None:
    file = room / "adapter" / "adapter_model.safetensors"
    save_file(
        {name.replace("model.layers", "language_model.layers"): one for name, one in load_file(file).items()}, file
    )
    shown = run(*MERGE, "--dry-run").stdout
    assert re.search(
        r"language_model\.layers\.\*\.mlp\.up_proj +LoRA .*→ model\.layers\.\*\.mlp\.up_proj\.weight", shown
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_converts(room: Path, dtype: str) -> None:
    assert "14 merged" in run(*MERGE, "--dtype", dtype).stdout
    assert {tensor.dtype for tensor in weights(room / "out").values()} == {getattr(torch, dtype)}
    assert json.loads((room / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_max_shard_size_cuts(room: Path) -> None:
    run("merge", "base", "adapter", "-o", "out", "--max-shard-size", "50kB")
    files = list((room / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 60_000 for file in files)
    index = json.loads((room / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}


def test_allow_unmatched_leaves_out_what_fits_nothing(room: Path) -> None:
    file = room / "adapter" / "adapter_model.safetensors"
    more = {f"base_model.model.model.layers.9.self_attn.q_proj.lora_{side}.weight": torch.ones(shape)
            for side, shape in (("A", (4, 64)), ("B", (64, 4)))}  # fmt: skip
    run(*MERGE[:-1], "right", "-q")
    save_file({**load_file(file), **more}, file)
    assert "--allow-unmatched" in run(*MERGE, code=1).stderr
    done = run(*MERGE, "--allow-unmatched")
    assert "28 of 30 tensors used" in done.stdout
    assert re.search(r"^Warning: adapter: 2 tensors fit nothing and were left out: .*layers\.9", done.stderr, re.M)
    assert same(weights(room / "out"), weights(room / "right"))


def test_allow_overflow_clips(room: Path) -> None:
    big = {name: (tensor.float() * 1e6).bfloat16() for name, tensor in weights(room / "base").items()}
    save_file(big, room / "base" / "model.safetensors")
    before = tree(room)
    done = run(*MERGE, "--dtype", "float16", "--no-progress", code=1)
    assert "--allow-overflow" in done.stderr
    assert tree(room) == before
    run(*MERGE, "--dtype", "float16", "--allow-overflow")
    assert max(tensor.abs().max().item() for tensor in weights(room / "out").values()) == 65504


def test_overwrite_replaces_a_model_and_nothing_else(room: Path) -> None:
    run(*MERGE, "-q")
    first = tree(room / "out")
    assert "--overwrite" in run("merge", "base", "other", "-o", "out", code=1).stderr
    assert tree(room / "out") == first
    run("merge", "base", "other", "-o", "out", "--overwrite", "-q")
    assert tree(room / "out") != first
    (room / "notes").mkdir()
    (room / "notes" / "a.txt").write_text("mine")
    assert "neither a model nor" in run(*MERGE[:-1], "notes", "--overwrite", code=1).stderr
    assert (room / "notes" / "a.txt").read_text() == "mine"


# --------------------------------------------------------------------------------------------------- side files


def give_tokenizer(folder: Path, mark: str) -> None:
    (folder / "tokenizer.json").write_text(mark)
    (folder / "special_tokens_map.json").write_text(mark)


def test_an_adapter_s_tokenizer_replaces_the_base_s_as_one_set(room: Path) -> None:
    give_tokenizer(room / "adapter", "adapter's")
    assert (room / "base" / "tokenizer_config.json").exists()
    for number, option in enumerate(([], ["--tokenizer", "adapter"])):
        out = room / f"out{number}"
        run("merge", "base", "adapter", "other", "-o", str(out), "-q", *option)
        assert (out / "tokenizer.json").read_text() == "adapter's"
        assert (out / "special_tokens_map.json").read_text() == "adapter's"
        assert not (out / "tokenizer_config.json").exists()


def test_the_base_s_tokenizer_is_kept_on_demand(room: Path) -> None:
    give_tokenizer(room / "adapter", "adapter's")
    run(*MERGE, "-q", "--tokenizer", "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (room / "out" / name).read_bytes() == (room / "base" / name).read_bytes()
    assert not (room / "out" / "special_tokens_map.json").exists()


def test_two_adapters_with_different_tokenizers_are_refused(room: Path) -> None:
    for name in ("adapter", "other"):
        give_tokenizer(room / name, "one and the same")
    both = ("merge", "base", "adapter", "other", "-o")
    run(*both, "same", "-q")
    assert (room / "same" / "tokenizer.json").read_text() == "one and the same"
    give_tokenizer(room / "other", "another")
    before = tree(room)
    for option in ([], ["--tokenizer", "adapter"]):
        done = run(*both, "out", *option, code=2)
        assert "--tokenizer base" in done.stderr
        assert tree(room) == before
    run(*both, "out", "-q", "--tokenizer", "base")
    assert (room / "out" / "tokenizer.json").read_bytes() == (room / "base" / "tokenizer.json").read_bytes()


def test_what_belongs_to_the_model_goes_along_and_nothing_else(room: Path) -> None:
    base = room / "base"
    kept = (
        "LICENSE", "NOTICE.txt", "modeling_own.py", "code/more.py", "preprocessor_config.json", "1_Pooling/config.json",
        "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "config.json",
    )  # fmt: skip
    left = (
        "README.md", "readme.txt", ".gitattributes", ".cache/huggingface/x", ".git/config", "pytorch_model.bin",
        "tf_model.h5", "model.gguf", "consolidated.pth", "optimizer.pt", "pytorch_model.bin.index.json",
        "onnx/model.onnx", "original/params.json", "checkpoint-5/config.json", "runs/events", "trainer_state.json",
        "5_Dense/model.safetensors",
    )  # fmt: skip
    for name in {*kept, *left} - {"config.json"}:
        (base / name).parent.mkdir(exist_ok=True, parents=True)
        (base / name).write_text(name)
    write_json(base / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ])  # fmt: skip
    done = run(*MERGE)
    for name in (*kept, "modules.json"):
        assert (room / "out" / name).read_bytes() == (base / name).read_bytes(), name
    assert [name for name in left if (room / "out" / name).exists()] == []
    assert re.search(r"^note     weights are read from model\.safetensors; not used: ", done.stdout, re.M)


def test_an_adapter_that_names_another_base_is_warned_of(room: Path) -> None:
    config = json.loads((room / "adapter" / "adapter_config.json").read_text())
    write_json(room / "adapter" / "adapter_config.json", {**config, "base_model_name_or_path": "org/llama-9"})
    done = run(*MERGE, "-q")
    assert re.fullmatch(r"Warning: adapter says it was trained on 'org/llama-9'; this base is 'base'.*\n", done.stderr)


@pytest.mark.parametrize("place", ["org/llama-9/model.safetensors", "files/Llama-9.safetensors"])
def test_a_bare_base_goes_by_its_folder_s_name_and_its_own(room: Path, place: str) -> None:
    config = json.loads((room / "adapter" / "adapter_config.json").read_text())
    write_json(room / "adapter" / "adapter_config.json", {**config, "base_model_name_or_path": "org/llama-9"})
    os.makedirs(os.path.dirname(place))
    shutil.copy("base/model.safetensors", place)
    assert lorasmith.plan(place, "adapter").warnings == ()
    (warning,) = lorasmith.plan("base/model.safetensors", "adapter").warnings
    assert "this base is 'model.safetensors'" in warning


@pytest.mark.parametrize("link", [False, True])
def test_a_bare_base_in_the_shared_cache_goes_by_its_repository(room: Path, link: bool) -> None:
    config = json.loads((room / "adapter" / "adapter_config.json").read_text())
    write_json(room / "adapter" / "adapter_config.json", {**config, "base_model_name_or_path": "org/llama-9"})
    file = room / "models--me--Llama-9" / "snapshots" / "0123" / "model.safetensors"
    blob = room / "models--me--Llama-9" / "blobs" / "4567" if link else file
    for one in (file, blob):
        one.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy("base/model.safetensors", blob)
    if link:
        file.symlink_to(blob)
    assert lorasmith.plan(file, "adapter").warnings == ()


def test_a_bare_adapter_without_alpha_is_warned_of(room: Path) -> None:
    shutil.copy("adapter/adapter_model.safetensors", "bare.safetensors")
    done = run("merge", "base", "bare.safetensors", "-o", "out", "--no-progress")
    assert re.search(
        r"^Warning: bare\.safetensors says nothing about alpha: its scale was taken to be 1$", done.stderr, re.M
    )
    assert "scale 1," in done.stdout


# --------------------------------------------------------------------------------------------------------- demo


def test_the_demo_checks_itself(tmp_path: Path) -> None:
    done = run("demo", "--no-progress", TMPDIR=str(tmp_path))
    folder = re.search(r"^Making a base model and two adapters in (.*)$", done.stdout, re.M)
    assert folder is not None
    assert folder[1].startswith(str(tmp_path))
    assert os.listdir(tmp_path) == []
    assert "all-linear × 0.7: LoRA, rank 8, scale 2, all 112 tensors used" in done.stdout
    assert "attention × 0.3: LoRA, rank 16, scale 4, all 32 tensors used" in done.stdout
    assert "56 merged, 19 copied" in done.stdout
    checked = re.search(r"^checked  ([\d,]+) merged elements .*, ([\d,]+) not the nearest", done.stdout, re.M)
    assert checked is not None
    elements, misrounded = (int(number.replace(",", "")) for number in checked.groups())
    assert elements == 8 * (2 * 512 * 512 + 2 * 128 * 512 + 3 * 1408 * 512)
    assert misrounded <= elements // 10_000
    facts = json.loads(run("demo", "--json", TMPDIR=str(tmp_path)).stdout)
    assert facts["tensors_merged"] == 56
    assert facts["survival"]["total"] > 0.9


# ------------------------------------------------------------------------------------------------------- README


def options_of(command: click.Command) -> set[str]:
    return {name for one in command.params if isinstance(one, click.Option) for name in one.opts}


@pytest.mark.parametrize(("section", "command"), [("Merging", "merge"), ("Mixing", "mix"), ("Extracting", "extract")])
def test_the_readme_s_tables_have_every_option_and_no_other(section: str, command: str) -> None:
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `-")]
    assert set(re.findall(r"`(-{1,2}[a-z][a-z-]*)", " ".join(rows).replace("`, `", "` `"))) == options_of(
        commands.commands[command]
    )


def test_the_readme_names_every_command_and_what_it_takes() -> None:
    written = set(re.findall(r"\blorasmith ([a-z]+)\b", " ".join(re.findall(r"`+[^`]+`+", README))))
    assert written >= set(commands.commands)
    assert written & {"merge", "demo", "mix", "resize", "extract", "convert", "verify", "pull", "push"} <= set(
        commands.commands
    )
    shared = re.search(r"`lorasmith demo` takes (.*?) as well", README)
    assert shared is not None
    assert set(re.findall(r"`(--[a-z-]+)`", shared[1])) | {"-q"} == options_of(commands.commands["demo"])
    sized = re.search(r"`lorasmith resize` takes (.*?) may limit", README.replace("\n", " "))
    assert sized is not None
    takes = {name for name in options_of(commands.commands["resize"]) if "_" not in name}
    assert set(re.findall(r"`(-[a-z-]+)`", sized[1])) == takes


def test_options_that_the_readme_mentions_exist() -> None:
    ours = {name for command in commands.commands.values() for name in options_of(command)}
    text = re.sub(r"pip install[^&`\n]*", "", README)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= ours


def blocks(language: str) -> Sequence[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_the_readme_s_pipeline_passes_and_fails_as_it_says(room: Path) -> None:
    shutil.rmtree("merged")
    (script,) = blocks("bash")
    done = shell(script)
    assert done.returncode == 0, done.stderr
    assert json.loads((room / "report.json").read_text())["out"] == "merged/"
    shutil.rmtree(room / "merged")
    write_adapter(room / "faint", bases(TINY), rank=4, ratio=0.0003)
    done = shell(script.replace("adapter/", "faint/"))
    assert done.returncode == 1
    assert "not good enough to ship" in done.stderr


def test_the_readme_s_python_example_runs(room: Path) -> None:
    (script,) = blocks("python")
    shutil.rmtree("merged")
    os.rename("adapter", "style")
    os.rename("other", "facts")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    tensors, survival = done.stdout.split()
    assert tensors == "14"
    assert 0.9 < float(survival) < 1.1
    assert (room / "merged" / "model.safetensors").is_file()


def test_the_readme_s_commands_run(room: Path) -> None:
    os.rename("other", "facts")
    shutil.copytree("adapter", "style")
    lines = re.findall(r"^(?:\$ )?(lorasmith merge .*)$", README, re.M)
    here = [line for line in lines if "--push" not in line]  # the Hub has its own tests
    assert len(here) >= 3
    for line in here:
        shutil.rmtree("merged", ignore_errors=True)
        done = shell(line)
        assert done.returncode == 0, done.stderr


def test_the_readme_s_extraction_runs(room: Path) -> None:
    os.rename("merged", "tuned")
    shutil.rmtree("adapter")
    (line,) = re.findall(r"^\$ (lorasmith extract .*)$", README, re.M)
    done = shell(line)
    assert done.returncode == 0, done.stderr
    assert [row.split()[0] for row in done.stdout.splitlines()[:3]] == ["Extracted", "base", "tuned"]
    assert (room / "adapter" / "adapter_config.json").is_file()


def test_errors_come_through_where_a_program_calls_the_command(room: Path) -> None:
    with pytest.raises(lorasmith.MissingFile):
        invoke("merge", "base", "nothing", "-o", "out")
