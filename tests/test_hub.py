"""Bases and adapters from the Hub: the real client against a Hub on the loopback interface, which records all."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from generate import Sizes, bases, tree, write_adapter, write_base, write_json
from hub_server import READER, Hub, Sparse
from huggingface_hub import constants
from safetensors import safe_open

import lorasmith
from lorasmith.safefile import build_header

SCRIPT = os.path.join(sysconfig.get_path("scripts"), "lorasmith")
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SIZES = Sizes(hidden=192, inner=515, key=64, vocabulary=1103, layers=2)
SHARD = r"/org/base/resolve/.*\.safetensors$"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in three shards, an adapter, one that fits another model, and the merge of the first two."""
    room = tmp_path_factory.mktemp("made")
    tensors = bases(SIZES)
    write_base(room / "base", tensors, sizes=SIZES, shards=3)
    (room / "base" / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A base\n")
    (room / "base" / "tokenizer.model").write_bytes(b"a large file, by its name")
    write_adapter(room / "lora", tensors, rank=4)
    write_adapter(room / "other", bases(Sizes(hidden=64, layers=2)), rank=4)
    lorasmith.merge(room / "base", room / "lora", room / "merged")
    return room


@pytest.fixture
def hub(made: Path, tmp_path: Path) -> Iterator[Hub]:
    """A Hub with these in repositories."""
    with Hub(tmp_path) as server:
        server.add("org/base", made / "base")
        server.add("me/lora", made / "lora")
        server.add("me/other", made / "other")
        yield server


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The client's own folder, a new one, for this process; large files travel by LFS."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def at(hub: Hub, home: Path) -> dict[str, str]:
    """What library calls are given."""
    return {"endpoint": hub.url, "token": READER}


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(hub: Hub, home: Path, tmp_path: Path) -> Run:
    """The installed command, which knows no other network than the loopback Hub."""

    def run(*args: str, code: int = 0, token: str = READER, **environment: str) -> subprocess.CompletedProcess[str]:
        known = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        done = subprocess.run(
            [SCRIPT, *args], capture_output=True, text=True, timeout=120, cwd=tmp_path,
            env={**os.environ, **known, **environment},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert token not in done.stdout + done.stderr
        return done

    return run


def whole(hub: Hub, pattern: str = SHARD) -> list[str]:
    """The files that were asked for without a range, or from within: those that were downloaded."""
    return [one.path.rsplit("/", 1)[1] for one in hub.asked("GET", pattern) if one.span != "bytes=0-65535"]


def same(out: Path, merged: Path) -> bool:
    """Whether two results agree in all but the record of where they come from."""
    one, other = tree(out), tree(merged)
    assert one.pop("lorasmith.json") != other.pop("lorasmith.json")
    return one == other


# ------------------------------------------------------------------------------------------------------ names


def test_a_merge_by_names_gives_what_the_merge_of_the_downloads_gives(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path
) -> None:
    report = lorasmith.merge("org/base", "me/lora", tmp_path / "out", **at)
    assert same(tmp_path / "out", made / "merged")
    commit = hub.repositories["org/base"].refs["main"]
    assert report.base_origin == lorasmith.Origin("org/base", commit)
    record = json.loads((tmp_path / "out" / "lorasmith.json").read_text())
    assert (record["base_repo"], record["base_commit"]) == ("org/base", commit)
    (use,) = record["adapters"]
    assert (use["repo"], use["commit"]) == ("me/lora", hub.repositories["me/lora"].refs["main"])
    assert str(tmp_path) not in (tmp_path / "out" / "lorasmith.json").read_text()
    assert report.warnings == ()


@pytest.mark.parametrize(
    "name",
    ["org/base", "org/base@v1", "org/base@{commit}", "hf://org/base", "hf://models/org/base@v1", "{url}/org/base",
     "{url}/org/base/tree/v1", "org/base@feature%2Fx", "{url}/org/base?library=transformers"],
)  # fmt: skip
def test_a_base_may_be_named_in_many_ways(hub: Hub, at: dict[str, str], made: Path, name: str) -> None:
    repository = hub.repositories["org/base"]
    commit = repository.refs["v1"] = repository.refs["feature/x"] = repository.refs["main"]
    plan = lorasmith.plan(name.format(url=hub.url, commit=commit), "me/lora", **at)
    assert plan.base == f"org/base@{commit}"


def test_a_tag_is_not_the_branch(hub: Hub, at: dict[str, str], made: Path, tmp_path: Path) -> None:
    hub.repositories["me/lora"].refs["v2"] = hub.repositories["me/lora"].refs["main"]
    write_adapter(tmp_path / "newer", bases(SIZES), rank=8)
    hub.add("me/lora", tmp_path / "newer")
    ranks = {name: lorasmith.plan("org/base", name, **at).adapters[0].rank for name in ("me/lora@v2", "me/lora")}
    assert ranks == {"me/lora@v2": (4, 4), "me/lora": (8, 8)}


def test_a_weight_follows_the_revision(hub: Hub, run: Run) -> None:
    hub.repositories["me/lora"].refs["v2"] = hub.repositories["me/lora"].refs["main"]
    for name, weight in {"me/lora@v2:0.8": 0.8, "hf://me/lora:-1": -1, f"{hub.url}/me/lora:.5": 0.5}.items():
        plan = json.loads(run("merge", "org/base", name, "-o", "out", "--dry-run", "--json").stdout)
        assert plan["adapters"][0]["weight"] == weight
        assert plan["adapters"][0]["origin"]["repo"] == "me/lora"


def test_a_path_that_exists_wins(hub: Hub, at: dict[str, str], made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "base", tmp_path / "org" / "base")
    shutil.copytree(made / "lora", tmp_path / "me" / "lora@v2")
    plan = lorasmith.plan("org/base", "me/lora@v2", **at)
    assert plan.base_origin is None
    assert hub.requests == []
    with pytest.raises(lorasmith.MissingFile, match="did you mean"):
        lorasmith.plan("org/bas", "me/lora@v2", **at)
    assert hub.requests == []
    assert lorasmith.plan("hf://org/base", "me/lora@v2", **at).base_origin is not None


def test_the_revision_is_resolved_once(hub: Hub, at: dict[str, str], made: Path, tmp_path: Path) -> None:
    before = hub.repositories["org/base"].refs["main"]
    write_base(tmp_path / "newer", bases(SIZES, seed=9), sizes=SIZES, shards=3)
    hub.fault("GET", SHARD, act=lambda: hub.add("org/base", tmp_path / "newer") and None)
    report = lorasmith.merge("org/base", "me/lora", tmp_path / "out", **at)
    assert hub.repositories["org/base"].refs["main"] != before
    assert report.base_origin is not None
    assert report.base_origin.commit == before
    assert same(tmp_path / "out", made / "merged")


def test_a_renamed_repository_is_called_by_its_new_name(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path
) -> None:
    hub.renamed["old/base"] = "org/base"
    report = lorasmith.merge("old/base", "me/lora", tmp_path / "out", **at)
    assert report.base_origin is not None
    assert report.base_origin.repo == "org/base"
    assert same(tmp_path / "out", made / "merged")


def test_an_adapter_may_lie_in_a_sub_folder(hub: Hub, at: dict[str, str], made: Path, tmp_path: Path) -> None:
    for name in ("style", "facts-2", "facts-10"):
        shutil.copytree(made / "lora", tmp_path / "many" / name)
    hub.add("me/many", tmp_path / "many")
    assert lorasmith.plan("org/base", "me/many/facts-2", **at).adapters[0].tensors_used == 28
    assert whole(hub, "/me/many/resolve/.*safetensors") == ["adapter_model.safetensors"]
    with pytest.raises(lorasmith.MissingFile, match=r"holds 3: .*/style, .*/facts-2, .*/facts-10; name"):
        lorasmith.plan("org/base", "me/many", **at)
    with pytest.raises(lorasmith.MissingFile, match=r"nothing at 'tone'; it has facts-10, facts-2, style"):
        lorasmith.plan("org/base", "me/many/tone", **at)


def test_where_only_sub_folders_have_weights_these_are_named(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path
) -> None:
    for name in ("runs/a/final", "runs/b/final"):
        shutil.copytree(made / "lora", tmp_path / "many" / name)
    commit = hub.add("me/many", tmp_path / "many")
    for inside in ("", "/runs"):
        named = rf"There are weights in me/many@{commit}/runs/a/final, me/many@{commit}/runs/b/final: name the"
        with pytest.raises(lorasmith.MissingFile, match=named):
            lorasmith.plan("org/base", "me/many" + inside, **at)
        with pytest.raises(lorasmith.MissingFile, match=named):
            lorasmith.plan("me/many" + inside, "me/lora", **at)
        with pytest.raises(lorasmith.MissingFile, match=named):
            lorasmith.pull("me/many" + inside, tmp_path / "out", **at)
    assert lorasmith.plan("org/base", f"me/many@{commit}/runs/a/final", **at).tensors_merged == 14


def test_single_files_of_a_repository_are_read(hub: Hub, at: dict[str, str], made: Path, tmp_path: Path) -> None:
    write_base(tmp_path / "one", bases(SIZES), sizes=SIZES)
    hub.add("org/one", tmp_path / "one")
    out = tmp_path / "out.safetensors"
    lorasmith.merge("org/one/model.safetensors", "me/lora/adapter_model.safetensors", out, **at)
    lorasmith.merge(tmp_path / "one" / "model.safetensors", made / "lora", tmp_path / "wanted.safetensors")
    with safe_open(out, "pt") as ours, safe_open(tmp_path / "wanted.safetensors", "pt") as wanted:
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours.get_tensor(name), wanted.get_tensor(name)) for name in wanted.keys())  # noqa: SIM118
        assert json.loads(ours.metadata()["lorasmith"])["base_inside"] == "model.safetensors"


# --------------------------------------------------------------------------------------------- what is fetched


CLUTTER = (
    "original/consolidated.00.pth", "original/params.json", "pytorch_model.bin", "onnx/model.onnx", "model.gguf",
    "tf_model.h5", "flax_model.msgpack", "runs/events", "checkpoint-5/model.safetensors", ".gitattributes",
)  # fmt: skip


def test_only_what_is_needed_is_fetched(hub: Hub, at: dict[str, str], made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "base", tmp_path / "base")
    for name in CLUTTER:
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_bytes(b"large")
    hub.add("org/base", tmp_path / "base")
    report = lorasmith.merge("org/base", "me/lora", tmp_path / "out", **at)
    asked = {one.path.split("/", 5)[5] for one in hub.asked("GET", "/org/base/resolve/")}
    assert asked & {*CLUTTER, "README.md"} == set()
    assert {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*")} >= asked
    assert same(tmp_path / "out", made / "merged")
    assert any("not used" in note for note in report.notes)


def llama_8b(hub: Hub, folder: Path) -> None:
    """Llama-3.1-8B as it lies on the Hub, in four shards that hold zeros but for their headers."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    write_json(folder / "config.json", config)
    (folder / "tokenizer.json").write_bytes(b"x" * 9_000_000)
    shapes = {"model.embed_tokens.weight": (128256, 4096)}
    for layer in range(32):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{name}_proj.weight": (1024 if name in "kv" else 4096, 4096) for name in "qkvo"}
        shapes |= {f"{at}mlp.{name}_proj.weight": (14336, 4096) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (4096, 14336)
        shapes |= {f"{at}{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (4096,), "lm_head.weight": (128256, 4096)}
    names = list(shapes)
    parts = {f"model-0000{part + 1}-of-00004.safetensors": names[part * 73 : (part + 1) * 73] for part in range(4)}
    weight_map = {name: file for file, some in parts.items() for name in some}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})
    hub.add("org/llama-8b", folder)
    for file, some in parts.items():
        sizes = {name: 2 * shapes[name][0] * (shapes[name][1] if len(shapes[name]) > 1 else 1) for name in some}
        head = build_header([(name, "BF16", shapes[name], sizes[name]) for name in some], {"format": "pt"})
        hub.add_large("org/llama-8b", file, Sparse(head, len(head) + sum(sizes.values())))


@pytest.fixture
def large(hub: Hub, tmp_path: Path) -> Hub:
    """The Hub with an 8B model, and an adapter for some of its layers."""
    llama_8b(hub, tmp_path / "8b")
    like = {f"model.layers.{layer}.self_attn.k_proj.weight": torch.randn(1024, 4096) for layer in range(2)}
    write_adapter(tmp_path / "fits", like, rank=2, targets=("k_proj",))
    hub.add("me/fits", tmp_path / "fits")
    hub.requests.clear()
    return hub


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "whole files"])
def test_a_dry_run_on_an_8b_base_moves_less_than_two_megabytes_and_creates_nothing(
    large: Hub, run: Run, tmp_path: Path, home: Path, ranges: bool
) -> None:
    large.ranges = ranges
    before = sorted(os.listdir(tmp_path))
    done = run("merge", "org/llama-8b", "me/fits", "-o", "out", "--dry-run", "--stream")
    assert "2 merged, 289 copied" in done.stdout
    assert "download 16.1 GB" in done.stdout
    assert sorted({*os.listdir(tmp_path)} - {"home"}) == before
    assert not list(home.rglob("model-*"))
    assert not list(home.rglob("tokenizer*"))
    moved = sum(one.sent for one in large.requests if "me/fits" not in one.path)
    if ranges:
        assert moved < 2_000_000
    else:  # the connection is closed once the header has come, whatever is under way in it
        assert moved < 100_000_000
    assert len(large.requests) < 30


def test_an_adapter_that_does_not_fit_is_refused_before_any_shard_is_fetched(
    hub: Hub, run: Run, tmp_path: Path
) -> None:
    before = sorted(os.listdir(tmp_path))
    done = run("merge", "org/base", "me/other", "-o", "out", code=1)
    assert re.fullmatch(r"Error: me/other@\w{40}: .*another model or size.*\n", done.stderr)
    assert whole(hub) == []
    assert sorted({*os.listdir(tmp_path)} - {"home"}) == before


def test_what_was_downloaded_is_used_again(hub: Hub, at: dict[str, str], made: Path, tmp_path: Path) -> None:
    lorasmith.merge("org/base", "me/lora", tmp_path / "out", **at)
    assert len(whole(hub)) == len(set(whole(hub))) == 3
    hub.requests.clear()
    lorasmith.merge("org/base", "me/lora", tmp_path / "again", **at)
    assert hub.asked("GET", "/resolve/") == []
    assert tree(tmp_path / "again") == tree(tmp_path / "out")


def test_progress_tells_of_the_download_and_then_of_the_merge(hub: Hub, at: dict[str, str], tmp_path: Path) -> None:
    events: list[lorasmith.Progress] = []
    lorasmith.plan("org/base", "me/lora", **at)
    hub.requests.clear()
    report = lorasmith.merge("org/base", "me/lora", tmp_path / "out", progress=events.append, **at)
    moved = sum(one.sent for one in hub.asked("GET", "/org/base/resolve") if one.span != "bytes=0-65535")
    first, last = events[0].total, events[-1].total
    assert moved == first != last
    shards = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert last == shards < report.bytes_written
    done = [event.done for event in events if event.total == first]
    assert done == sorted(done)
    assert done[-1] == first
    assert len(done) >= 4


def test_an_output_called_like_an_owner_is_no_input(hub: Hub, at: dict[str, str], tmp_path: Path) -> None:
    lorasmith.merge("org/base", "me/lora", "me", **at)
    assert (tmp_path / "me" / "config.json").is_file()


def test_a_plan_has_the_hash_of_the_merge_before_and_after_the_download(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path
) -> None:
    before = lorasmith.plan("org/base", "me/lora", **at)
    report = lorasmith.merge("org/base", "me/lora", tmp_path / "out", **at)
    after = lorasmith.plan("org/base", "me/lora", **at)
    assert before.hash == report.plan_hash == after.hash


def test_a_pickled_base_is_fetched_to_be_read(hub: Hub, at: dict[str, str], made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "base", tmp_path / "old", ignore=shutil.ignore_patterns("model*"))
    torch.save(bases(SIZES), tmp_path / "old" / "pytorch_model.bin")
    hub.add("org/old", tmp_path / "old")
    with pytest.raises(lorasmith.BadOption, match="--stream needs safetensors"):
        lorasmith.merge("org/old", "me/lora", tmp_path / "streamed", stream=True, **at)
    assert hub.asked("GET", r"\.bin$") == []
    lorasmith.merge("org/old", "me/lora", tmp_path / "out", **at)
    lorasmith.merge(tmp_path / "old", made / "lora", tmp_path / "wanted")
    assert same(tmp_path / "out", tmp_path / "wanted")
    with pytest.raises(lorasmith.BadOption, match="--stream needs safetensors"):
        lorasmith.merge("org/old", "me/lora", tmp_path / "streamed", stream=True, **at)


@pytest.mark.parametrize("fault", [{"drop_after": 100_000}, {"status": 503, "times": 2}], ids=["cut off", "503 twice"])
def test_a_download_that_fails_for_a_while_goes_on(
    hub: Hub, at: dict[str, str], made: Path, tmp_path: Path, fault: dict[str, Any]
) -> None:
    lorasmith.plan("org/base", "me/lora", **at)
    hub.requests.clear()
    hub.fault("GET", SHARD, **fault)
    lorasmith.merge("org/base", "me/lora", tmp_path / "out", **at)
    assert same(tmp_path / "out", made / "merged")
    sizes = sum(file.stat().st_size for file in (made / "base").glob("*.safetensors"))
    assert sum(one.sent for one in hub.asked("GET", SHARD) if one.span != "bytes=0-65535") <= sizes + (1 << 16)


def test_a_header_that_breaks_off_is_asked_for_again(hub: Hub, at: dict[str, str]) -> None:
    hub.fault("GET", r"/org/base/resolve/.*model-00002", drop_after=100, times=2)
    plan = lorasmith.plan("org/base", "me/lora", **at)
    assert plan.tensors_merged == 14
    hub.fault("GET", r"/org/base/resolve/.*model-00002", drop_after=100, times=99)
    with pytest.raises(lorasmith.HubFailed, match="cannot be reached for org/base"):
        lorasmith.plan("org/base", "me/lora", **at)


def test_a_listing_that_breaks_off_is_told_on_one_line(
    hub: Hub, at: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fault("GET", r"/org/base/tree/", drop_after=10, times=99)
    with pytest.raises(lorasmith.HubFailed, match="cannot be reached for org/base"):
        lorasmith.plan("org/base", "me/lora", **at)


def test_an_extraction_takes_names(hub: Hub, run: Run, made: Path, tmp_path: Path) -> None:
    hub.add("me/merged", made / "merged")
    run("extract", "org/base", "me/merged", "-o", "by-names", "--rank", "4", "-q")
    lorasmith.extract(made / "base", made / "merged", tmp_path / "by-paths", rank=4)
    ours, wanted = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("by-names", "by-paths"))
    assert ours == wanted


def test_an_extraction_names_the_base_as_peft_finds_it(
    hub: Hub, at: dict[str, str], run: Run, made: Path, tmp_path: Path
) -> None:
    hub.add("me/merged", made / "merged")
    for number, base in enumerate(("org/base@main", lorasmith.pull("org/base", **at))):
        run("extract", base, "me/merged", "-o", f"out{number}", "--rank", "1", "-q")
        facts = json.loads((tmp_path / f"out{number}" / "adapter_config.json").read_text())
        assert facts["base_model_name_or_path"] == "org/base"
    assert run("merge", "org/base", "out0", "-o", "again", "-q").stderr == ""


def test_a_resize_takes_a_name(hub: Hub, run: Run, made: Path, tmp_path: Path) -> None:
    run("resize", "me/lora", "-o", "by-name", "--rank", "2", "-q")
    lorasmith.resize(made / "lora", tmp_path / "by-path", rank=2)
    ours, wanted = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("by-name", "by-path"))
    assert ours == wanted


def test_a_token_is_taken_wherever_names_are(hub: Hub, at: dict[str, str], run: Run, made: Path) -> None:
    hub.add("org/closed", made / "base", private=True)
    hub.add("me/closed", made / "merged", private=True)
    hub.add("me/closed-lora", made / "lora", private=True)
    with_token = ("--token", READER, "-q")
    for number, arguments in enumerate((
        ("extract", "org/closed", "me/closed", "--rank", "1"),
        ("resize", "me/closed-lora", "--rank", "1"),
        ("mix", "me/closed-lora"),
    )):  # fmt: skip
        run(*arguments, "-o", f"out{number}", code=1, token="hf_nobody")
        run(*arguments, "-o", f"out{number}", *with_token, token="hf_nobody")
    lorasmith.extract("org/closed", "me/closed", rank=1, dry_run=True, **at)
    lorasmith.resize("me/closed-lora", rank=1, dry_run=True, **at)
    assert len(lorasmith.interference(["me/closed-lora", "me/closed-lora"], **at)) == 1


# ------------------------------------------------------------------------------------------------------ offline


def test_offline_what_is_in_the_cache_is_enough(hub: Hub, run: Run, made: Path, tmp_path: Path) -> None:
    run("pull", "org/base")
    run("pull", "me/lora")
    hub.requests.clear()
    run("merge", "org/base", "me/lora", "-o", "out", HF_HUB_OFFLINE="1")
    assert hub.requests == []
    assert same(tmp_path / "out", made / "merged")


def test_offline_what_is_not_in_the_cache_is_an_error_of_one_line(hub: Hub, run: Run, tmp_path: Path) -> None:
    run("pull", "me/lora")
    hub.requests.clear()
    done = run("merge", "org/base", "me/lora", "-o", "out", code=1, HF_HUB_OFFLINE="1")
    assert re.fullmatch(r"Error: org/base is not in the cache.*HF_HUB_OFFLINE.*\n", done.stderr)
    run("merge", "org/base", "me/lora", "-o", "out", "--dry-run")
    hub.requests.clear()
    done = run("merge", "org/base", "me/lora", "-o", "out", code=1, HF_HUB_OFFLINE="1")
    assert re.fullmatch(r"Error: org/base is not in the cache, or not all of it.*\n", done.stderr)
    assert hub.requests == []
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- errors


def private(hub: Hub) -> None:
    hub.repositories["org/base"].private = True


def gated(hub: Hub) -> None:
    hub.repositories["org/base"].gated = True


def missing(hub: Hub) -> None:
    del hub.repositories["org/base"]


def broken(hub: Hub) -> None:
    hub.fault("GET", "/api/models/org/base", status=500, times=9)


def full(hub: Hub) -> None:
    hub.fault("GET", "/api/models/org/base", status=429, times=9)


def gone(hub: Hub) -> None:
    hub.fault("HEAD", "/org/base/resolve/.*index.json", status=404, code="EntryNotFound", times=9)


@pytest.mark.parametrize(
    ("before", "name", "token", "says"),
    [
        (missing, "org/base", READER, "there is no repository org/base at http.*check the name.*hf auth login"),
        (private, "org/base", "", "there is no repository org/base at http.*check the name.*hf auth login"),
        (gated, "org/base", READER, "org/base is gated: accept its terms at http.*/org/base, and log in"),
        (gated, "org/base", "", "org/base is gated: accept its terms at http.*/org/base, and log in"),
        (None, "org/base@v9", READER, "org/base has no branch, tag or commit v9; see http.*/org/base"),
        (None, "org/base", "hf_wrongtoken", "org/base needs a valid login .*Invalid credentials.*hf auth login"),
        (broken, "org/base", READER, r"http\S+ answered .* for org/base \(HTTP 500\)"),
        (full, "org/base", READER, "asks for a pause.*few minutes"),
        (gone, "org/base", READER, "org/base has no such file any more: model.safetensors.index.json"),
        (None, "org/base/unet", READER, "org/base has nothing at 'unet'"),
        (None, "me/lora", READER, "me/lora.* is an adapter, not a base model"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_goes_wrong_is_told_on_one_line_and_leaves_nothing(
    hub: Hub, run: Run, tmp_path: Path, before: Callable[[Hub], None] | None, name: str, token: str, says: str
) -> None:
    there = sorted(os.listdir(tmp_path))
    if before is not None:
        before(hub)
    environment = {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"} if not token else {}
    done = run("merge", name, "me/lora", "-o", "out", code=1, token=token or "unused", **environment)
    assert re.fullmatch(rf"Error: [^\n]*{says}[^\n]*\n", done.stderr)
    assert done.stdout == ""
    assert sorted({*os.listdir(tmp_path)} - {"home"}) == there
    assert whole(hub) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf://org", "no address of a model"),
        ("hf://datasets/org/base", "address of a dataset"),
        ("https://example.org/org/base", "no address of a model"),
        ("hf://org/base@", "no address of a model"),
    ],
)
def test_an_address_of_anything_else_is_wrong_usage(hub: Hub, run: Run, name: str, says: str) -> None:
    done = run("merge", name, "me/lora", "-o", "out", code=2)
    assert re.fullmatch(rf"Error: [^\n]*{says}[^\n]*\n", done.stderr)
    assert hub.requests == []


def test_a_login_in_an_address_is_not_shown(hub: Hub, run: Run, tmp_path: Path) -> None:
    run("pull", "https://someone:hf_secret@huggingface.co/org/base", "-o", "pulled")
    for address in ("huggingface.co/org/base/commit/abc", "example.com/org/base", "huggingface.co/datasets/a/b"):
        done = run("merge", f"https://someone:hf_secret@{address}", "me/lora", "-o", "out", code=2)
        assert "hf_secret" not in done.stdout + done.stderr
    done = run("merge", "https://someone:hf_secret@huggingface.co/org/none", "me/lora", "-o", "out", code=1)
    assert "hf_secret" not in done.stdout + done.stderr


def test_a_path_that_is_not_there_may_have_been_meant_for_the_hub(hub: Hub, run: Run, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    done = run("merge", "org/base", "me/lora", "-o", "out", code=1)
    assert done.stderr == "Error: org/base does not exist; if org/base on the Hub is meant, write hf://org/base\n"
    done = run("merge", "hf://org/base", "me/lora/", "-o", "out", code=1)
    assert done.stderr.endswith("; if me/lora on the Hub is meant, write hf://me/lora\n")
    done = run("merge", "./org/base", "me/lora", "-o", "out", code=1)
    assert "Hub" not in done.stderr


def test_a_revision_that_is_not_there_may_have_been_written_otherwise(hub: Hub, run: Run, made: Path) -> None:
    hub.repositories["org/base"].refs["dev/new"] = commit = hub.repositories["org/base"].refs["main"]
    for name in (f"org/base@{commit[:8]}", "org/base@dev/new"):
        done = run("merge", name, "me/lora", "-o", "out", code=1)
        assert re.search(r"has no branch, tag or commit .*\. Of a commit, all 40 digits .*%2F\n$", done.stderr)
    run("merge", "org/base@dev%2Fnew", "me/lora", "-o", "out", "-q")


@pytest.mark.parametrize(("token", "says"), [("", "is empty"), ("hf_two\nlines", "characters"), ("hf_ö", "characters")])
def test_what_can_be_no_token_is_wrong_usage(hub: Hub, run: Run, token: str, says: str) -> None:
    done = run("merge", "org/base", "me/lora", "-o", "out", "--token", token, code=2)
    assert re.fullmatch(rf"Error: the token .*{says}.*\n", done.stderr)
    assert "hf_" not in done.stderr
    assert hub.requests == []


def test_a_cache_that_cannot_be_written_is_told_with_the_way_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder is made in it")
    done = run("merge", "org/base", "me/lora", "-o", "out", code=1, HF_HOME=str(tmp_path / "file"))
    assert re.fullmatch(r"Error: what is downloaded .* cannot be .*\(.*/file.*\); .*HF_HOME.*\n", done.stderr)
    assert os.listdir(tmp_path) == ["file"]


def test_a_hub_that_is_not_there_is_told_on_one_line(run: Run) -> None:
    done = run("merge", "org/base", "me/lora", "-o", "out", code=1, HF_ENDPOINT="http://127.0.0.1:9")
    assert re.fullmatch(
        r"Error: http://127\.0\.0\.1:9 cannot be reached for org/base \(ConnectError\);.*\n", done.stderr
    )


def test_a_local_merge_neither_loads_the_client_nor_asks_the_hub(hub: Hub, made: Path, tmp_path: Path) -> None:
    code = (
        "import sys, lorasmith; lorasmith.merge(*sys.argv[1:]); "
        "print({'huggingface_hub', 'httpx2', 'hf_xet'} & sys.modules.keys())"
    )
    arguments = [str(made / "base"), str(made / "lora"), str(tmp_path / "out")]
    done = subprocess.run(
        [os.path.join(sysconfig.get_path("scripts"), "python"), "-c", code, *arguments],
        capture_output=True, text=True, check=True, env={**os.environ, "HF_ENDPOINT": hub.url},
    )  # fmt: skip
    assert done.stdout == "set()\n"
    assert hub.requests == []


# --------------------------------------------------------------------------------------------------------- pull


def test_pull_downloads_what_will_be_used_and_the_card(hub: Hub, run: Run, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "base", tmp_path / "base")
    for name in CLUTTER:
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_bytes(b"large")
    hub.add("org/base", tmp_path / "base")
    assert run("pull", "org/base", "-o", "pulled").stdout == "pulled\n"
    assert {name: facts[10:] for name, facts in tree(tmp_path / "pulled").items()} == {
        name: facts[10:] for name, facts in tree(made / "base").items()
    }
    assert len(whole(hub)) == 3
    assert sorted(os.listdir(tmp_path)) == ["base", "home", "pulled"]
    lorasmith.merge(tmp_path / "pulled", made / "lora", tmp_path / "out")
    done = run("pull", "org/base", "-o", "pulled", code=1)
    assert "pulled exists already" in done.stderr


def test_a_model_that_lacks_a_shard_is_not_pulled(hub: Hub, run: Run, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "base", tmp_path / "part")
    (tmp_path / "part" / "model-00002-of-00003.safetensors").unlink()
    hub.add("me/part", tmp_path / "part")
    done = run("pull", "me/part", "-o", "pulled", code=1)
    assert re.fullmatch(
        r"Error: me/part@\w+/model.safetensors.index.json names 1 of 3 shards that are not there: "
        r"model-00002-of-00003.safetensors; .*\n",
        done.stderr,
    )
    assert whole(hub, r"/me/part/resolve/.*safetensors$") == []
    assert sorted(os.listdir(tmp_path)) == ["home", "part"]


def test_pull_takes_an_adapter_out_of_a_sub_folder(hub: Hub, at: dict[str, str], made: Path, tmp_path: Path) -> None:
    for name in ("style", "facts"):
        shutil.copytree(made / "lora", tmp_path / "many" / name)
    hub.add("me/many", tmp_path / "many")
    assert lorasmith.pull("me/many/facts", tmp_path / "facts", **at) == str(tmp_path / "facts")
    assert sorted(os.listdir(tmp_path / "facts")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert lorasmith.plan(made / "base", tmp_path / "facts").adapters[0].tensors_used == 28
    cached = lorasmith.pull("me/many/facts", **at)
    assert sorted(os.listdir(cached)) == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(lorasmith.BadOption, match="no name on the Hub"):
        lorasmith.pull(str(tmp_path / "many"), **at)
    with pytest.raises(lorasmith.MissingFile, match="has nothing at 'fact'; it has facts, style"):
        lorasmith.pull("me/many/fact", **at)


def test_what_is_pulled_is_on_the_hub_whatever_is_here(hub: Hub, run: Run, made: Path, tmp_path: Path) -> None:
    hub.add("org/other", made / "base")
    for name in ("org/base", "org/other"):
        run("pull", name, "-o", name)
    assert sorted(os.listdir(tmp_path / "org")) == ["base", "other"]
    assert run("pull", "org/base").stdout.startswith(str(tmp_path / "home"))
    done = run("pull", "org/base", "-o", "org/base", code=1)
    assert "org/base exists already" in done.stderr
    assert "--overwrite" not in done.stderr


def test_a_pull_that_broke_off_goes_on(hub: Hub, at: dict[str, str], made: Path, tmp_path: Path) -> None:
    hub.fault("GET", r"model-00003", status=404, times=99)
    with pytest.raises(lorasmith.HubFailed):
        lorasmith.pull("org/base", tmp_path / "pulled", **at)
    assert not (tmp_path / "pulled").exists()
    hub.faults.clear()
    lorasmith.pull("org/base", tmp_path / "pulled", **at)
    assert (tmp_path / "pulled" / "model-00003-of-00003.safetensors").is_file()
    assert not (tmp_path / "pulled.partial").exists()
    got = [one for one in whole(hub) if one.startswith(("model-00001", "model-00002"))]
    assert len(got) == len(set(got))


def test_a_pull_leaves_alone_what_is_in_its_way(hub: Hub, at: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "pulled.partial").mkdir()
    (tmp_path / "pulled.partial" / "half a thesis.tex").write_text("mine")
    before = tree(tmp_path / "pulled.partial")
    with pytest.raises(lorasmith.OutputExists, match="was not made by lorasmith"):
        lorasmith.pull("org/base", tmp_path / "pulled", **at)
    assert tree(tmp_path / "pulled.partial") == before
    (tmp_path / "empty").mkdir()
    lorasmith.pull("org/base/config.json", tmp_path / "config.json", **at)
    lorasmith.pull("org/base", tmp_path / "empty", **at)
    assert (tmp_path / "empty" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
    with pytest.raises(lorasmith.OutputExists):
        lorasmith.pull("org/base", tmp_path, **at)


def test_the_client_s_own_cache_check_finds_nothing_wrong(hub: Hub, run: Run, home: Path) -> None:
    run("pull", "org/base")
    from huggingface_hub import scan_cache_dir

    report = scan_cache_dir(home / "hub")
    assert not report.warnings
    assert {repo.repo_id for repo in report.repos} == {"org/base"}
