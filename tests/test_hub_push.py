"""Results to the Hub: the real client against a Hub on the loopback interface, which fails on demand."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generate import bases, sha256, tree, write_adapter, write_base, write_json
from hub_server import READER, WRITER, Hub
from huggingface_hub import ModelCard
from safetensors.torch import load, save_file
from test_hub import README, SCRIPT, SIZES, Run, home, run, whole

import lorasmith

__all__ = ["home", "run"]

SHARDS = 8
SHARD = r"/org/base/resolve/.*\.safetensors$"
PUT = r"^/lfs/\w+$"
LAYER = ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")
"""What the small adapter changes: two shards of eight."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in eight shards, an adapter for all of its layers, one for two of them, and both merges."""
    room = tmp_path_factory.mktemp("made")
    tensors = bases(SIZES)
    write_base(room / "base", tensors, sizes=SIZES, shards=SHARDS)
    card = "license: llama3.1\nlicense_link: LICENSE\nlanguage:\n- en\n- de\npipeline_tag: text-generation\n"
    (room / "base" / "README.md").write_text(f"---\n{card}---\nBest.\n")
    write_adapter(room / "lora", tensors, rank=4)
    write_adapter(room / "small", tensors, rank=4, targets=LAYER)
    lorasmith.merge(room / "base", room / "lora", room / "merged")
    lorasmith.merge(room / "base", room / "small", room / "merged-small")
    return room


@pytest.fixture
def hub(made: Path, tmp_path: Path) -> Iterator[Hub]:
    """A Hub with these in repositories."""
    with Hub(tmp_path) as server:
        server.add("org/base", made / "base")
        server.add("me/lora", made / "lora")
        server.add("me/small", made / "small")
        yield server


@pytest.fixture
def at(hub: Hub, home: Path) -> dict[str, str]:
    """What library calls are given."""
    return {"endpoint": hub.url, "token": WRITER}


def pushed(hub: Hub, repo: str = "me/merged", revision: str = "main") -> dict[str, bytes]:
    """The files of a repository, but for those that only a repository has."""
    files = {name: hub.content(repo, name, revision) for name in hub.files(repo, revision)}
    return {name: content for name, content in files.items() if name not in (".gitattributes", "README.md")}


def on_disk(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def same(hub: Hub, folder: Path, repo: str = "me/merged", revision: str = "main") -> bool:
    """Whether a repository holds what a folder holds, but for the record of where its inputs come from."""
    one, other = pushed(hub, repo, revision), on_disk(folder)
    assert one.pop("lorasmith.json") != other.pop("lorasmith.json")
    return one == other


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def changed(made: Path, merged: str = "merged") -> list[Path]:
    """The shards of a merge that are not the base's."""
    pairs = zip(shards(made / "base"), shards(made / merged), strict=True)
    return [new for old, new in pairs if sha256(old) != sha256(new)]


def sent(hub: Hub) -> list[str]:
    """The digests of the large files that were received whole."""
    return [one.path.rsplit("/", 1)[1] for one in hub.asked("PUT", PUT) if one.status == 200]


def nothing_left(tmp_path: Path, home: Path) -> bool:
    """Whether a run has left nothing but what the client caches."""
    return os.listdir(tmp_path) == ["home"] and set(os.listdir(home)) <= {"hub", "xet", "logs"}


# ------------------------------------------------------------------------------------------------ what is pushed


def test_a_merge_to_a_repository_is_there_as_it_would_be_on_the_disk(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path, home: Path
) -> None:
    report = lorasmith.merge("org/base", "me/lora", push="me/merged", **at)
    assert same(hub, made / "merged")
    assert report.out == "hf://me/merged"
    repository = hub.repositories["me/merged"]
    assert report.pushed == lorasmith.Pushed("me/merged", repository.refs["main"], f"{hub.url}/me/merged", None)
    assert repository.messages[repository.refs["main"]] == "Merge me/lora"
    assert not repository.private
    assert nothing_left(tmp_path, home)


def test_a_result_may_go_to_the_disk_and_to_a_repository(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path
) -> None:
    report = lorasmith.merge("org/base", "me/small", tmp_path / "out", push="me/merged", **at)
    assert report.out == str(tmp_path / "out")
    assert pushed(hub) == on_disk(tmp_path / "out")
    assert same(hub, made / "merged-small")
    assert sorted(os.listdir(tmp_path)) == ["home", "out"]


def test_local_inputs_may_be_merged_to_a_repository(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path, home: Path
) -> None:
    lorasmith.merge(made / "base", made / "lora", push="me/merged", **at)
    assert pushed(hub) == on_disk(made / "merged")
    data = ModelCard(hub.content("me/merged", "README.md").decode()).data
    assert data.base_model is None
    assert data.license == "llama3.1"
    assert str(made) not in hub.content("me/merged", "README.md").decode()
    assert nothing_left(tmp_path, home)


def test_nothing_is_visible_before_the_last_shard_is_there(hub: Hub, at: dict[str, str], made: Path) -> None:
    seen: list[int] = []
    hub.fault("PUT", PUT, act=lambda: seen.append(len(hub.repositories["me/merged"].commits)), times=99)
    lorasmith.merge("org/base", "me/lora", push="me/merged", **at)
    assert seen == [1] * len(changed(made)) != []  # what the repository was made with
    assert len(hub.asked("POST", "/commit/")) == 1
    last = max(one.ended for one in hub.asked("PUT", PUT))
    assert last < hub.asked("POST", "/commit/")[0].began


def test_a_branch_a_message_and_privacy_are_as_asked_for(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path
) -> None:
    hub.add("me/merged", made / "lora")
    hub.repositories["me/merged"].refs["try"] = hub.repositories["me/merged"].refs["main"]
    before = hub.repositories["me/merged"].refs["main"]
    options: dict[str, Any] = {"revision": "try", "commit_message": "A try", **at}
    report = lorasmith.merge("org/base", "me/lora", push="me/merged", **options)
    repository = hub.repositories["me/merged"]
    assert repository.refs["main"] == before
    assert report.pushed is not None
    assert repository.messages[repository.refs["try"]] == "A try"
    assert repository.refs["try"] == report.pushed.commit
    for _ in range(2):
        lorasmith.push(made / "lora", "me/secret", private=True, **at)
        assert hub.repositories["me/secret"].private


def test_nothing_private_goes_to_a_public_repository(hub: Hub, at: dict[str, str], made: Path) -> None:
    before = hub.add("me/open", made / "small")
    refused = pytest.raises(lorasmith.BadOption, match="me/open exists and is public, and --private is for one")
    with refused:
        lorasmith.push(made / "lora", "me/open", private=True, **at)
    with refused:
        lorasmith.merge("org/base", "me/lora", push="me/open", private=True, **at)
    with refused:
        lorasmith.mix("me/lora", push="me/open", private=True, **at)
    assert hub.repositories["me/open"].refs["main"] == before


def test_a_pull_request_leaves_the_branch_alone(hub: Hub, run: Run, made: Path) -> None:
    hub.add("them/model", made / "lora")
    before = hub.repositories["them/model"].refs["main"]
    done = run("merge", "org/base", "me/small", "--push", "them/model", "--create-pr", token=WRITER)
    assert hub.repositories["them/model"].refs["main"] == before
    assert hub.repositories["them/model"].refs.keys() == {"main", "refs/pr/1"}
    assert re.search(rf"^pushed   {hub.url}/them/model/discussions/1 \(commit \w{{40}}\)$", done.stdout, re.M)
    files = pushed(hub, "them/model", "refs/pr/1")
    merged = on_disk(made / "merged-small")
    assert all(files[name] == content for name, content in merged.items() if name != "lorasmith.json")


def test_weights_that_would_be_loaded_instead_are_removed_and_all_else_stays(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    write_base(old, bases(SIZES, seed=3), sizes=SIZES)
    for name in ("pytorch_model.bin", "notes.txt", "model.gguf", "2_Dense/model.safetensors"):
        (old / name).parent.mkdir(exist_ok=True)
        (old / name).write_bytes(b"kept?")
    hub.add("me/merged", old)
    lorasmith.merge("org/base", "me/lora", push="me/merged", **at)
    kept = {"notes.txt", "model.gguf", "2_Dense/model.safetensors"}
    assert pushed(hub).keys() == on_disk(made / "merged").keys() | kept


def test_a_model_takes_the_place_of_the_adapter_that_a_repository_was_for(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path, home: Path
) -> None:
    shutil.copytree(made / "lora", tmp_path / "lora")
    facts = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    write_json(tmp_path / "lora" / "adapter_config.json", {**facts, "base_model_name_or_path": "org/base"})
    hub.add("me/lora", tmp_path / "lora")
    lorasmith.merge("org/base", "me/lora", push="me/lora", **at)
    assert pushed(hub, "me/lora").keys() == on_disk(made / "merged").keys()
    lorasmith.push(made / "merged", "me/lora", **at)
    code = "import transformers as t; print(type(t.AutoModelForCausalLM.from_pretrained('me/lora')))"
    subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home / "theirs"), "HF_TOKEN": WRITER},
    )  # fmt: skip


def test_an_adapter_or_a_bare_file_takes_nothing_else_away(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path
) -> None:
    model = on_disk(made / "merged").keys()
    hub.add("me/all", made / "merged")
    (tmp_path / "pickled").mkdir()
    shutil.copy(made / "lora" / "adapter_config.json", tmp_path / "pickled")
    torch.save({}, tmp_path / "pickled" / "adapter_model.bin")
    lorasmith.push(tmp_path / "pickled", "me/all", **at)
    assert pushed(hub, "me/all").keys() == model | {"adapter_config.json", "adapter_model.bin"}
    lorasmith.push(made / "lora", "me/all", **at)
    assert pushed(hub, "me/all").keys() == model | {"adapter_config.json", "adapter_model.safetensors"}
    for name in ("style.safetensors", "facts.safetensors"):
        shutil.copy(made / "lora" / "adapter_model.safetensors", tmp_path / name)
        lorasmith.push(tmp_path / name, "me/many", **at)
    assert pushed(hub, "me/many").keys() == {"style.safetensors", "facts.safetensors"}


def test_what_goes_to_a_renamed_repository_goes_to_the_one_that_it_is_now(
    hub: Hub, at: dict[str, str], made: Path
) -> None:
    hub.add("me/new", made / "lora")
    hub.renamed["me/old"] = "me/new"
    assert lorasmith.push(made / "merged", "me/old", **at).repo == "me/new"
    assert pushed(hub, "me/new") == on_disk(made / "merged")
    assert lorasmith.merge("org/base", "me/small", push="me/old", **at).pushed == lorasmith.Pushed(
        "me/new", hub.repositories["me/new"].refs["main"], f"{hub.url}/me/new", None
    )
    assert "me/old" not in hub.repositories


def test_a_branch_is_made_if_need_be(hub: Hub, run: Run, made: Path) -> None:
    hub.add("me/merged", made / "lora")
    main = hub.repositories["me/merged"].refs["main"]
    done = run("push", made / "merged", "me/merged", "--revision", "dev/new", token=WRITER)
    assert done.stdout.startswith(f"Pushed to {hub.url}/me/merged/tree/dev/new\n")
    assert pushed(hub, revision="dev/new") == on_disk(made / "merged")
    run("merge", "org/base", "me/small", "--push", "me/other", "--revision", "dev", token=WRITER)
    assert same(hub, made / "merged-small", "me/other", "dev")
    assert hub.repositories["me/merged"].refs["main"] == main
    assert "is empty" in run("push", made / "merged", "me/merged", "--revision", "", code=2, token=WRITER).stderr


# --------------------------------------------------------------------------------------------- what is transferred


def test_untouched_shards_are_neither_downloaded_nor_uploaded(
    hub: Hub, at: dict[str, str], made: Path, home: Path
) -> None:
    lorasmith.merge("org/base", "me/small", push="me/merged", **at)
    assert same(hub, made / "merged-small")
    new = changed(made, "merged-small")
    assert len(new) == 2
    assert sorted(whole(hub)) == [file.name for file in new]
    assert sorted(sent(hub)) == sorted(sha256(file) for file in new)


@pytest.mark.parametrize("stream", [False, True], ids=["cache", "stream"])
def test_where_the_hub_cannot_copy_untouched_shards_are_transferred(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path, home: Path, stream: bool
) -> None:
    hub.copies = False
    hub.large = dict(hub.large)
    lorasmith.merge("org/base", "me/small", push="me/merged", stream=stream, **at)
    assert same(hub, made / "merged-small")
    assert len(whole(hub)) == len(set(whole(hub))) == SHARDS
    assert len(hub.asked("POST", "/commit/")) == 1
    assert nothing_left(tmp_path, home)


def test_a_result_that_stays_has_its_untouched_shards_copied_as_well(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path
) -> None:
    lorasmith.merge("org/base", "me/small", tmp_path / "out", push="me/merged", **at)
    assert len(whole(hub)) == SHARDS
    assert len(sent(hub)) == 2


def test_the_same_result_again_sends_nothing_and_makes_no_commit(hub: Hub, at: dict[str, str], made: Path) -> None:
    first = lorasmith.merge("org/base", "me/lora", push="me/merged", **at)
    card = hub.content("me/merged", "README.md")
    hub.requests.clear()
    again = lorasmith.merge("org/base", "me/lora", push="me/merged", **at)
    assert again.pushed == first.pushed
    assert hub.asked("PUT", PUT) == hub.asked("POST", "/commit/") == []
    assert hub.content("me/merged", "README.md") == card


# ------------------------------------------------------------------------------------------------------- refused


def test_the_right_to_write_is_checked_before_anything_is_downloaded(
    hub: Hub, run: Run, made: Path, tmp_path: Path, home: Path
) -> None:
    hub.add("me/merged", made / "lora")
    for arguments in (["--push", "me/merged"], ["--push", "me/merged", "-o", "out"], ["--push", "me/new"]):
        done = run("merge", "org/base", "me/lora", *arguments, code=1, token=READER)
        says = "this token has no right to (create or )?write to it.*/settings/tokens"
        assert re.fullmatch(rf"(Merging|Downloading)[^\n]*\nError: [^\n]*{says}[^\n]*\n", done.stderr)
    done = run("merge", "org/base", "me/lora", "--push", "me/merged", "--dry-run", code=1, token=READER)
    assert "no right to write" in done.stderr
    done = run("merge", "org/base", "me/lora", "--push", "me/new", code=1, token="hf_wrongtoken", HF_TOKEN="")
    assert "login" in done.stderr
    assert whole(hub) == []
    assert "me/new" not in hub.repositories
    assert nothing_left(tmp_path, home)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say where the result goes: -o/--out OUT, --push REPO"),
        (["-o", "out", "--private"], "--private is for --push"),
        (["-o", "out", "--card", "card.md"], "--card is for --push"),
        (["--push", "merged"], "'merged' is no name of a repository to push to"),
        (["--push", "../merged"], "is no name of a repository"),
        (["--push", "me/merged", "--card", "nothing.md"], "nothing.md does not exist"),
    ],
)
def test_wrong_usage_is_found_before_anything_is_asked_for(hub: Hub, run: Run, arguments: list[str], says: str) -> None:
    done = run("merge", "org/base", "me/lora", *arguments, code=1 if "nothing.md" in arguments else 2)
    assert re.fullmatch(rf"Error: [^\n]*{re.escape(says)}[^\n]*\n", done.stderr)
    assert hub.requests == []


def test_offline_nothing_is_pushed(hub: Hub, run: Run, tmp_path: Path) -> None:
    run("pull", "org/base")
    run("pull", "me/lora")
    hub.requests.clear()
    done = run("merge", "org/base", "me/lora", "--push", "me/merged", "-o", "out", code=1, HF_HUB_OFFLINE="1")
    assert re.fullmatch(r"Merging.*\nError: the Hub must not be asked \(HF_HUB_OFFLINE\).*me/merged.*\n", done.stderr)
    assert hub.requests == []
    assert os.listdir(tmp_path) == ["home"]


def test_streaming_a_base_that_is_here_is_wrong_usage(hub: Hub, at: dict[str, str], made: Path, tmp_path: Path) -> None:
    with pytest.raises(lorasmith.BadOption, match="on the disk already"):
        lorasmith.merge(made / "base", "me/lora", tmp_path / "out", stream=True, **at)


def test_a_branch_that_moves_meanwhile_is_an_error_and_the_rerun_sends_nothing_again(
    hub: Hub, run: Run, made: Path, tmp_path: Path, home: Path
) -> None:
    shutil.copytree(made / "lora", tmp_path / "theirs")
    (tmp_path / "theirs" / "notes.txt").write_text("theirs")

    def move() -> None:
        hub.add("me/merged", tmp_path / "theirs")

    hub.fault("PUT", PUT, act=move)
    arguments = ("merge", "org/base", "me/lora", "--push", "me/merged")
    done = run(*arguments, code=1, token=WRITER)
    assert re.fullmatch(r"Down.*\nError: me/merged has moved since this run began, others pushed.*\n", done.stderr)
    assert pushed(hub).keys() == on_disk(tmp_path / "theirs").keys()
    shutil.rmtree(tmp_path / "theirs")
    assert len(sent(hub)) == len(changed(made))
    hub.requests.clear()
    run(*arguments, token=WRITER)
    assert sent(hub) == []
    assert whole(hub) == []
    files = pushed(hub)
    assert files["config.json"] == (made / "merged" / "config.json").read_bytes()
    assert files["notes.txt"] == b"theirs"
    assert nothing_left(tmp_path, home)


# -------------------------------------------------------------------------------------------------- what breaks off


def test_an_upload_that_fails_is_an_error_and_the_rerun_sends_only_what_is_missing(
    hub: Hub, run: Run, made: Path, tmp_path: Path, home: Path
) -> None:
    last = sha256(changed(made)[-1])
    hub.fault("PUT", last, status=403, times=99)
    arguments = ("merge", "org/base", "me/lora", "--push", "me/merged", "--stream")
    done = run(*arguments, code=1, token=WRITER)
    assert re.fullmatch(r"Down[^\n]*\nError: [^\n]*me/merged[^\n]*\n", done.stderr)
    assert hub.asked("POST", "/commit/") == []
    assert len(set(sent(hub))) == len(changed(made)) - 1
    hub.faults.clear()
    hub.requests.clear()
    run(*arguments, token=WRITER)
    assert sent(hub) == [last]
    assert whole(hub) == []
    assert same(hub, made / "merged")
    assert nothing_left(tmp_path, home)


DOWNLOAD, UPLOAD = ("GET", r"model-00004.*safetensors"), ("PUT", PUT)
BEFORE, COMMIT = ("POST", "lfs/objects/batch"), ("POST", "/commit/")
KEEP, STREAM = ["-o", "out"], ["--stream"]
KILLS = [
    ("a download", DOWNLOAD, [], STREAM), ("a download", DOWNLOAD, KEEP, []), ("an upload", UPLOAD, [], STREAM),
    ("the commit", COMMIT, [], []),
]  # fmt: skip
MORE_KILLS = [
    (during, request, out, stream)
    for during, request in (
        ("a download", DOWNLOAD), ("an upload", UPLOAD), ("what precedes an upload", BEFORE), ("the commit", COMMIT)
    )
    for out in ([], KEEP) for stream in ([], STREAM)
]  # fmt: skip


@pytest.mark.parametrize(
    ("during", "request_", "out", "stream"),
    [*KILLS, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE_KILLS if one not in KILLS)],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:10] or "-",
)
def test_a_kill_costs_one_shard_at_most(
    hub: Hub, made: Path, tmp_path: Path, home: Path, during: str, request_: tuple[str, str], out: list[str],
    stream: list[str],
) -> None:  # fmt: skip
    method, pattern = request_
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": WRITER, "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [SCRIPT, "merge", "org/base", "me/lora", "--push", "me/merged", *out, *stream]
    running: list[subprocess.Popen[bytes]] = []

    def kill() -> None:
        running[0].kill()

    calm = {"GET": 1, "PUT": 3, "POST": 0}[method]  # the first of a shard is for its header
    hub.fault(method, pattern, times=calm)
    hub.fault(method, pattern, act=kill, drop_after=50_000)
    running.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE))
    running[0].communicate(timeout=100)
    assert running[0].returncode == -signal.SIGKILL
    assert hub.repositories["me/merged"].commits.keys() == {hub.repositories["me/merged"].refs["main"]}
    assert not (tmp_path / "out").exists()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=100)
    assert same(hub, made / "merged")
    assert len(whole(hub)) - len(set(whole(hub))) <= 1
    assert len(sent(hub)) - len(set(sent(hub))) <= 1
    if out:
        assert pushed(hub) == on_disk(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == (["home", "out"] if out else ["home"])
    assert set(os.listdir(home)) <= {"hub", "xet", "logs"}


def test_ctrl_c_ends_a_stream_soon_and_the_same_command_goes_on(
    hub: Hub, run: Run, made: Path, tmp_path: Path, home: Path
) -> None:
    arguments = ["merge", "org/base", "me/lora", "--push", "me/merged", "--stream"]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": WRITER,
                   "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    running: list[subprocess.Popen[str]] = []
    hub.fault("GET", "model-00005.*safetensors")
    hub.fault("GET", "model-00005.*safetensors", act=lambda: running[0].send_signal(signal.SIGINT), wait=1)
    running.append(
        subprocess.Popen([SCRIPT, *arguments], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    )
    _, said = running[0].communicate(timeout=30)
    assert running[0].returncode == 130
    assert re.fullmatch(r"Down.*\n+Error: interrupted; .*\n", said)
    assert hub.asked("POST", "/commit/") == []
    before = len(sent(hub))
    run(*arguments, token=WRITER)
    assert len(sent(hub)) == len(set(sent(hub))) == len(changed(made)) > before > 0
    assert same(hub, made / "merged")
    assert nothing_left(tmp_path, home)


def test_addresses_with_signatures_are_not_shown(hub: Hub, run: Run, made: Path) -> None:
    hub.signature = "?X-Amz-Signature=secret"
    hub.fault("PUT", PUT, status=403, times=99)
    done = run("merge", "org/base", "me/lora", "--push", "me/merged", code=1, token=WRITER)
    assert re.search(r"\nError: .*me/merged.*\n$", done.stderr)
    assert "secret" not in done.stderr


def test_what_the_hub_has_lost_is_sent_again(hub: Hub, run: Run, made: Path, tmp_path: Path, home: Path) -> None:
    hub.fault("POST", "/commit/", status=500)
    arguments = ("merge", "org/base", "me/lora", "--push", "me/merged")
    assert "HTTP 500" in run(*arguments, code=1, token=WRITER).stderr
    del hub.large[sha256(shards(made / "merged")[2])]
    assert "HTTP 400" in run(*arguments, code=1, token=WRITER).stderr
    run(*arguments, token=WRITER)
    assert same(hub, made / "merged")
    assert nothing_left(tmp_path, home)


# ------------------------------------------------------------------------------------------------------- stream


def small_disk(folder: Path, nbytes: int) -> None:
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("may not mount")


@pytest.fixture
def disk(tmp_path: Path, made: Path) -> Iterator[Path]:
    """A disk that holds four and a half shards of the eight, beside a few small files."""
    largest = max(file.stat().st_size for file in shards(made / "base"))
    beside = sum(file.stat().st_size for file in (made / "lora").iterdir()) + 400_000
    small_disk(tmp_path / "disk", 7 * largest // 2 + beside)
    try:
        yield tmp_path / "disk"
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def test_a_stream_needs_no_room_for_the_base_nor_for_the_result(
    hub: Hub, run: Run, made: Path, disk: Path, home: Path
) -> None:
    arguments = ("merge", "org/base", "me/lora", "--push", "me/merged")
    room = {"HF_HOME": str(disk / "home"), "TMPDIR": str(disk)}
    done = run(*arguments, code=1, token=WRITER, **room)
    assert re.search(r"Error: .*(--stream|make room).*\n", done.stderr)
    hub.requests.clear()
    run(*arguments, "--stream", token=WRITER, **room)
    assert same(hub, made / "merged")
    assert sorted(whole(hub)) == [file.name for file in changed(made)]
    assert len(sent(hub)) == len(changed(made)) == SHARDS - 1
    assert not list(disk.rglob("*.safetensors*")) or {file.name for file in disk.rglob("*.safetensors")} == {
        "adapter_model.safetensors"
    }


def test_a_stream_downloads_merges_and_uploads_at_the_same_time(hub: Hub, at: dict[str, str], made: Path) -> None:
    hub.fault("GET", SHARD, wait=0.15, times=99)
    hub.fault("PUT", PUT, wait=0.15, times=99)
    lorasmith.merge("org/base", "me/lora", push="me/merged", stream=True, **at)
    gets = [one for one in hub.asked("GET", SHARD) if one.span != "bytes=0-65535"]
    puts = hub.asked("PUT", PUT)
    assert any(get.began < put.ended and put.began < get.ended for get in gets for put in puts)
    for number, get in enumerate(gets[2:]):
        assert puts[number].ended < get.began, "more than two shards were in the house"


def test_a_stream_to_the_disk_keeps_nothing_of_the_base(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path, home: Path
) -> None:
    lorasmith.merge("org/base", "me/lora", tmp_path / "out", stream=True, **at)
    one, other = tree(tmp_path / "out"), tree(made / "merged")
    assert one.pop("lorasmith.json") != other.pop("lorasmith.json")
    assert one == other
    assert [file.name for file in home.rglob("*.safetensors")] == ["adapter_model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["home", "out"]


def test_a_stream_reads_what_the_cache_has_and_leaves_it_there(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path, home: Path
) -> None:
    cached = lorasmith.pull("org/base", **at)
    hub.requests.clear()
    lorasmith.merge("org/base", "me/lora", push="me/merged", stream=True, **at)
    assert whole(hub) == []
    assert same(hub, made / "merged")
    assert len(shards(Path(cached))) == SHARDS


def test_a_stream_may_cut_new_shards(hub: Hub, at: dict[str, str], made: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_shard_size": 500_000, "dtype": "float32"}
    lorasmith.merge("org/base", "me/lora", push="me/merged", stream=True, **options, **at)
    lorasmith.merge(made / "base", made / "lora", tmp_path / "wanted", **options)
    assert same(hub, tmp_path / "wanted")


# --------------------------------------------------------------------------------------------------------- cards


def test_the_card_says_what_the_result_is_made_of(hub: Hub, at: dict[str, str], made: Path) -> None:
    hub.add("me/merged", made / "lora")
    report = lorasmith.merge("org/base", [("me/lora", 0.5), "me/small"], push="me/merged", **at)
    card = ModelCard(hub.content("me/merged", "README.md").decode())
    assert card.data.to_dict() == {
        "base_model": ["org/base", "me/lora", "me/small"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "llama3.1",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "tags": ["lorasmith", "merge", "lora"],
    }
    assert report.survival is not None
    assert f"{report.survival.total:.2%}" in card.text
    commit = hub.repositories["me/lora"].refs["main"]
    assert f"| [me/lora](https://huggingface.co/me/lora) | `{commit[:12]}` | 0.5 | LoRA | 4 | 8 |" in card.text
    (command,) = re.findall(r"^lorasmith merge .*$", card.text, re.M)
    assert f"me/lora@{commit}:0.5" in command
    assert "Best." not in card.text
    assert len(hub.asked("POST", "/api/validate-yaml")) == 2  # before the first shard, and with the commit


@pytest.mark.parametrize(
    ("theirs", "carried"),
    [
        ("---\nlanguage:\n- en\n- no\nlicense: mit\n---\n", {"language": ["en", "no"], "license": "mit"}),
        ("---\nlanguage: no\n---\n", {"language": "no"}),
        ("---\nlanguage: {en: no}\nlicense: 3.0\npipeline_tag: [a, 1]\n---\n", {}),
        ("No front matter at all.\n", {}),
    ],
)
def test_of_the_base_s_card_only_what_the_hub_takes_is_carried_over(
    hub: Hub, run: Run, made: Path, tmp_path: Path, theirs: str, carried: dict[str, object]
) -> None:
    shutil.copytree(made / "base", tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(theirs)
    done = run("merge", "base", "me/small", "--push", "me/merged", "-q", token=WRITER)
    assert done.stderr == ""
    facts = ModelCard(hub.content("me/merged", "README.md").decode()).data.to_dict()
    ours = {"base_model", "base_model_relation", "library_name", "tags"}
    assert {name: value for name, value in facts.items() if name not in ours} == carried


def test_the_card_of_a_rule_says_so_and_its_command_makes_the_same(hub: Hub, run: Run, tmp_path: Path) -> None:
    adapters = ("me/lora:0.12345678", "me/small")
    options = ("--method", "dare-ties", "--density", "0.7", "--seed", "3", "--weights", "mlp|q_proj=0.5")
    run("merge", "org/base", *adapters, *options, "--dtype", "float32", "--push", "me/merged", token=WRITER)
    card = hub.content("me/merged", "README.md").decode()
    assert "combined by `dare-ties` (density 0.7, space core, seed 3, sign total)" in card
    assert "Σ weight" not in card
    (command,) = re.findall(r"^lorasmith merge .*$", card, re.M)
    run(*shlex.split(command)[1:])
    assert pushed(hub) == on_disk(tmp_path / "merged")
    run("mix", *adapters, *options, "--rank", "2", "--push", "me/mixed", token=WRITER)
    card = hub.content("me/mixed", "README.md").decode()
    assert "combined by `dare-ties` (density 0.7, space core, seed 3, sign total)" in card
    assert "rank 2" in card


def test_a_card_s_command_has_every_option_that_a_merge_was_given(
    hub: Hub, run: Run, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "small", tmp_path / "small")
    (tmp_path / "small" / "tokenizer.json").write_text("{}")
    hub.add("me/small", tmp_path / "small")
    adapters = ("me/lora", "me/small")
    options = ("--weights", "me/small:q_proj=0.5", "--rename", r"^model\.layers\.=layers.", "--tokenizer", "base")
    run("merge", "org/base", *adapters, *options, "--allow-unmatched", "--push", "me/merged", token=WRITER)
    (command,) = re.findall(r"^lorasmith merge .*$", hub.content("me/merged", "README.md").decode(), re.M)
    commit = hub.repositories["me/small"].refs["main"]
    assert f"--weights me/small@{commit}:q_proj=0.5" in command
    run(*shlex.split(command)[1:])
    assert pushed(hub) == on_disk(tmp_path / "merged")


def test_the_card_of_a_single_file_speaks_of_no_other(hub: Hub, run: Run, tmp_path: Path) -> None:
    save_file(bases(SIZES), tmp_path / "one.safetensors")
    run("merge", "one.safetensors", "me/small", "--push", "me/one", token=WRITER)
    assert pushed(hub, "me/one").keys() == {"one.safetensors"}
    assert "lorasmith.json" not in hub.content("me/one", "README.md").decode()


@pytest.mark.parametrize(
    ("named", "base"),
    [
        ("org/base", "org/base"),
        ("org/base@main", "org/base"),
        ("https://huggingface.co/org/base/tree/main", "org/base"),
        ("outputs/base", None),
        ("/data/base", None),
        ("https://example.com/base", None),
    ],
)
def test_the_card_of_an_adapter_names_as_base_only_what_is_a_repository(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path, named: str, base: str | None
) -> None:
    shutil.copytree(made / "lora", tmp_path / "lora")
    facts = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    write_json(tmp_path / "lora" / "adapter_config.json", {**facts, "base_model_name_or_path": named})
    lorasmith.mix(tmp_path / "lora", push="me/mixed", **at)
    facts = ModelCard(hub.content("me/mixed", "README.md").decode()).data.to_dict()
    assert facts.get("base_model") == base
    assert facts["tags"] == [*([f"base_model:adapter:{base}"] if base else []), "lora", "lorasmith", "transformers"]


def test_a_folder_s_own_card_and_record_are_checked_before_anything_is_sent(
    hub: Hub, run: Run, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "merged", tmp_path / "merged")
    (tmp_path / "merged" / "lorasmith.json").write_text('{"adapters": [{}]}')
    assert "is not as lorasmith writes it" in run("push", "merged", "me/merged", code=1, token=WRITER).stderr
    (tmp_path / "merged" / "README.md").write_text("---\nlicense: not-a-licence\n---\n")
    assert "refuses the model card" in run("push", "merged", "me/merged", code=2, token=WRITER).stderr
    (tmp_path / "merged" / "README.md").write_bytes(b"\xff")
    assert "is no UTF-8 text" in run("push", "merged", "me/merged", code=1, token=WRITER).stderr
    assert sent(hub) == []
    assert "me/merged" not in hub.repositories


def test_the_card_of_an_extraction_has_no_table_of_nothing(hub: Hub, run: Run, made: Path) -> None:
    hub.add("me/tuned", made / "merged")
    run("extract", "org/base", "me/tuned", "-o", "out", "--rank", "1", "-q")
    run("push", "out", "me/extracted", token=WRITER)
    card = hub.content("me/extracted", "README.md").decode()
    assert "for [org/base]" in card
    assert "|" not in card


def test_a_card_of_one_s_own_is_taken_as_it_is(hub: Hub, run: Run, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\nMine, ü.\n")
    run("merge", "org/base", "me/lora", "--push", "me/merged", "--card", "card.md", token=WRITER)
    assert hub.content("me/merged", "README.md") == (tmp_path / "card.md").read_bytes()


def test_a_card_that_the_hub_refuses_is_refused_before_anything_is_downloaded(
    hub: Hub, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "card.md").write_text("---\nlicense: not-a-licence\n---\n")
    done = run("merge", "org/base", "me/lora", "--push", "me/merged", "--card", "card.md", code=2, token=WRITER)
    assert re.search(r"\nError: the Hub refuses the model card for me/merged: .*license.*\n$", done.stderr)
    assert whole(hub) == []
    assert "me/merged" not in hub.repositories


# ---------------------------------------------------------------------------------------------------- push, pull


def test_push_sends_a_model_and_nothing_beside_it(hub: Hub, run: Run, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "merged", tmp_path / "merged")
    for name in ("optimizer.pt", ".git/config", "notes.gguf", "checkpoint-5/config.json"):
        (tmp_path / "merged" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "merged" / name).write_bytes(b"more")
    done = run("push", "merged/", "me/merged", "--private", token=WRITER)
    assert done.stdout.splitlines()[0] == f"Pushed to {hub.url}/me/merged"
    assert pushed(hub) == on_disk(made / "merged")
    assert hub.repositories["me/merged"].private
    assert "local" in hub.content("me/merged", "README.md").decode()
    assert len(hub.asked("POST", "/commit/")) == 1
    run("pull", "me/merged", "-o", "pulled", token=WRITER)
    (tmp_path / "pulled" / "README.md").unlink()
    assert on_disk(tmp_path / "pulled") == on_disk(made / "merged")


def test_a_model_that_lacks_a_shard_is_not_pushed(hub: Hub, run: Run, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "merged", tmp_path / "merged")
    shards(tmp_path / "merged")[2].unlink()
    done = run("push", "merged", "me/merged", code=1, token=WRITER)
    assert "names 1 of 8 shards that are not there" in done.stderr
    assert "me/merged" not in hub.repositories


def test_push_sends_an_adapter_with_its_own_card(hub: Hub, at: dict[str, str], made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "lora", tmp_path / "lora")
    (tmp_path / "lora" / "README.md").write_text("---\nlicense: mit\n---\nTrained on cats.\n")
    (tmp_path / "lora" / "tokenizer.json").write_text("{}")
    (tmp_path / "lora" / "training_args.bin").write_bytes(b"pickle")
    report = lorasmith.push(tmp_path / "lora", "me/cats", **at)
    assert report.repo == "me/cats"
    assert hub.content("me/cats", "README.md") == (tmp_path / "lora" / "README.md").read_bytes()
    names = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert pushed(hub, "me/cats").keys() == names


def test_a_push_that_broke_off_sends_only_what_is_missing(hub: Hub, at: dict[str, str], made: Path) -> None:
    last = sha256(changed(made)[-1])
    hub.fault("PUT", last, status=403, times=99)
    with pytest.raises(lorasmith.HubFailed, match="me/merged"):
        lorasmith.push(made / "merged", "me/merged", **at)
    assert len(sent(hub)) == len(changed(made)) - 1
    hub.faults.clear()
    hub.requests.clear()
    lorasmith.push(made / "merged", "me/merged", **at)
    assert sent(hub) == [last]
    assert pushed(hub) == on_disk(made / "merged")


def test_transformers_and_peft_load_what_was_pushed_by_name(
    hub: Hub, run: Run, made: Path, tmp_path: Path, home: Path
) -> None:
    for name in ("base", "lora"):
        shutil.copytree(made / name, tmp_path / name)
    facts = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    write_json(tmp_path / "lora" / "adapter_config.json", {**facts, "base_model_name_or_path": "me/base"})
    run("push", "base", "me/base", token=WRITER)
    run("push", "lora", "me/pushed-lora", token=WRITER)
    run("merge", "me/base", "me/pushed-lora", "--push", "me/merged", "--dtype", "float32", token=WRITER)
    code = """
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
adapted = AutoPeftModelForCausalLM.from_pretrained("me/pushed-lora", dtype=torch.float32).eval()
merged = AutoModelForCausalLM.from_pretrained("me/merged", dtype=torch.float32).eval()
base = AutoModelForCausalLM.from_pretrained("me/base", dtype=torch.float32).eval()
tokens = torch.arange(24).view(2, 12)
with torch.no_grad():
    one, other, before = (model(tokens).logits for model in (adapted, merged, base))
print(float((one - other).abs().max()), float((one - before).abs().max()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home / "theirs"), "HF_TOKEN": WRITER},
    )  # fmt: skip
    error, change = (float(number) for number in done.stdout.split()[-2:])
    assert error < 1e-5
    assert change > 100 * error


# ----------------------------------------------------------------------------------------------------------- mix


def test_a_mix_of_names_goes_to_a_repository_with_peft_s_card(
    hub: Hub, run: Run, made: Path, tmp_path: Path, home: Path
) -> None:
    for name in ("lora", "small"):
        shutil.copytree(made / name, tmp_path / name)
        facts = json.loads((tmp_path / name / "adapter_config.json").read_text())
        write_json(tmp_path / name / "adapter_config.json", {**facts, "base_model_name_or_path": "org/base"})
        hub.add(f"me/{name}", tmp_path / name)
        shutil.rmtree(tmp_path / name)
    done = run("mix", "me/lora:0.5", "me/small@main", "--push", "me/mixed", "--private", token=WRITER)
    assert f"pushed   {hub.url}/me/mixed (commit " in done.stdout
    assert hub.repositories["me/mixed"].private
    assert nothing_left(tmp_path, home)
    assert ModelCard(hub.content("me/mixed", "README.md").decode()).data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/base", "lora", "lorasmith", "transformers"],
    }
    record = json.loads(hub.content("me/mixed", "lorasmith.json"))
    assert [one["repo"] for one in record["adapters"]] == ["me/lora", "me/small"]
    lorasmith.mix([(made / "lora", 0.5), made / "small"], tmp_path / "wanted")
    wanted, mixed = (
        load(content)
        for content in (
            (tmp_path / "wanted" / "adapter_model.safetensors").read_bytes(),
            hub.content("me/mixed", "adapter_model.safetensors"),
        )
    )
    assert wanted.keys() == mixed.keys()
    assert all(torch.equal(wanted[name], mixed[name]) for name in wanted)
    assert "[me/lora]" in hub.content("me/mixed", "README.md").decode()


def test_a_mix_asks_for_the_right_to_push_before_it_begins(hub: Hub, run: Run, made: Path, tmp_path: Path) -> None:
    hub.add("me/mixed", made / "lora")
    done = run("mix", "me/lora", "me/small", "--push", "me/mixed", "-o", "out", code=1, token=READER)
    assert re.fullmatch(r"Error: this token has no right to write to it.*\n", done.stderr)
    assert os.listdir(tmp_path) in ([], ["home"])
    done = run("mix", "me/lora", "me/small", "--push", "me/mixed", "-o", "out.safetensors", code=2, token=WRITER)
    assert "in a folder" in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--private"], 2, "--private is for --push"),
        (["--card", "card.md"], 2, "--card is for --push"),
        (["--push", "me/mixed", "--card", "card.md"], 2, "the Hub refuses the model card"),
        (["--push", "me/mixed", "--card", "no.md"], 1, "no.md does not exist"),
    ],
)
def test_a_mix_knows_before_it_begins_what_cannot_be_pushed(
    hub: Hub, run: Run, tmp_path: Path, options: list[str], code: int, says: str
) -> None:
    (tmp_path / "card.md").write_text("---\nlicense: not-a-licence\n---\n")
    done = run("mix", "me/lora", "me/small", "-o", "out", *options, code=code, token=WRITER)
    assert says in done.stderr
    assert not (tmp_path / "out").exists()
    assert "me/mixed" not in hub.repositories


def test_a_mix_that_could_not_be_pushed_stays_and_says_how_to_push_it(
    hub: Hub, run: Run, tmp_path: Path, home: Path
) -> None:
    hub.fault("POST", "/commit/", status=500, times=2)
    arguments = ("mix", "me/lora", "me/small", "--push", "me/mixed", "--private", "--revision", "it's")
    hub.repositories["me/mixed"] = replace(hub.repositories["me/lora"], private=True)
    hub.repositories["me/mixed"].refs["it's"] = hub.repositories["me/lora"].refs["main"]
    done = run(*arguments, code=1, token=WRITER)
    assert re.fullmatch(r"Error: .*HTTP 500.*; run the same command again\n", done.stderr)
    done = run(*arguments, "-o", "my mix", code=1, token=WRITER)
    line = re.fullmatch(r"Error: .*HTTP 500.*; the mix is complete in my mix: (lorasmith push .*)\n", done.stderr)
    assert line is not None
    run(*shlex.split(line[1])[1:], token=WRITER)
    assert pushed(hub, "me/mixed", "it's") == on_disk(tmp_path / "my mix")


# -------------------------------------------------------------------------------------------------- and the rest


def test_no_token_is_ever_written(hub: Hub, run: Run, tmp_path: Path) -> None:
    arguments = ("merge", "org/base", "me/lora", "--push", "me/merged", "-o", "out", "--token", WRITER)
    run(*arguments, token=READER)
    hub.fault("POST", "/commit/", status=500)
    run(*arguments[:4], "me/other", "-o", "new", *arguments[-2:], token=READER, code=1)
    assert (tmp_path / "new.partial").is_dir()
    files = [file for file in tmp_path.rglob("*") if file.is_file() and "cas" not in file.parts]
    assert len(files) > 30
    assert not [file for file in files if WRITER.encode() in file.read_bytes() or READER.encode() in file.read_bytes()]


def test_the_hf_command_finds_it_as_an_extension(run: Run) -> None:
    done = subprocess.run(
        [Path(SCRIPT).with_name("hf-lorasmith"), "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"lorasmith, version {lorasmith.__version__}\n"


def test_the_readme_s_command_runs(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.repositories["meta-llama/Llama-3.1-8B"] = hub.repositories["org/base"]
    hub.repositories["me/my-lora"] = hub.repositories["me/lora"]
    hub.repositories["me/lora"].refs["v2"] = hub.repositories["me/lora"].refs["main"]
    (line,) = re.findall(r"^(lorasmith merge .*--push.*)$", README, re.M)
    run(*line.split()[1:], token=WRITER)
    assert pushed(hub) == on_disk(tmp_path / "merged")
    assert hub.repositories["me/merged"].private


def test_progress_counts_what_passes_through(hub: Hub, at: dict[str, str]) -> None:
    events: list[lorasmith.Progress] = []
    began = time.monotonic()
    lorasmith.merge("org/base", "me/lora", push="me/merged", stream=True, progress=events.append, **at)
    assert events[-1].done == events[-1].total > 0
    assert events[-1].seconds <= time.monotonic() - began


def test_a_hub_that_cannot_be_reached_for_a_push_is_no_path(run: Run, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "lora", tmp_path / "lora")
    done = run("push", "lora", "me/lora", code=1, token=WRITER, HF_ENDPOINT="http://127.0.0.1:9")
    assert re.fullmatch(
        r"Error: http://127\.0\.0\.1:9 cannot be reached for me/lora \(ConnectError\); check the network.*\n",
        done.stderr,
    )


def test_a_push_that_breaks_off_speaks_neither_of_paths_nor_of_downloads(
    hub: Hub, run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made / "lora", tmp_path / "lora")
    hub.fault("POST", "/commit/", drop_after=0, times=99)
    done = run("push", "lora", "me/new", code=1, token=WRITER)
    assert re.fullmatch(r"Error: .* cannot be reached for me/new \(\w+\); check the network.*\n", done.stderr)
    done = run("mix", "me/lora", "me/small", "--push", "me/new", "-o", "mix", code=1, token=WRITER)
    said = r"check the network; the mix is complete in mix: lorasmith push mix me/new"
    assert re.fullmatch(rf"Error: .* cannot be reached for me/new \(\w+\); {said}\n", done.stderr)
    hub.faults.clear()

    def closed(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "lora/adapter_model.safetensors")

    monkeypatch.setattr("huggingface_hub.HfApi.preupload_lfs_files", closed)
    with pytest.raises(lorasmith.LorasmithError, match="the transfer of me/new failed: Permission denied"):
        lorasmith.push(tmp_path / "lora", "me/new", endpoint=hub.url, token=WRITER)
