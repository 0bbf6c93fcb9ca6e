"""Times a merge against copying the same files, writing as many bytes, importing torch, and PEFT.

    python tests/benchmarks/merge.py                        # the shapes of Llama-3.2-1B, all-linear, rank 16
    python tests/benchmarks/merge.py --size 3b --rank 64    # or 8b; --targets attention
    python tests/benchmarks/merge.py --rounds 9 --json figures.json

Models and adapters are generated, once, in a temporary folder (or ``--folder``, where they are kept). In every round
each contestant runs once, one after the other, as a process of its own with the base in the page cache:

    lorasmith   ``lorasmith merge``, which returns once the result is on the disk
    cp          ``cp -r --reflink=never`` of the base, and ``sync`` of the copies
    raw         as many bytes written with O_DIRECT into preallocated files by two threads, and synced
    import      ``import torch``
    peft        load, ``merge_and_unload``, ``save_pretrained``; not synced

Figures are medians over the rounds with the least and the most, and ratios are medians of each round's own ratio.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.metadata
import json
import mmap
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PAGE = 4096
PIECE = 8 << 20


@dataclass(frozen=True)
class Shape:
    """What sets the tensors of a Llama model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head: int
    tied: bool
    shards: int
    vocabulary: int = 128256

    def linear(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a block's linear layers."""
        return {
            "self_attn.q_proj": (self.heads * self.head, self.hidden),
            "self_attn.k_proj": (self.key_heads * self.head, self.hidden),
            "self_attn.v_proj": (self.key_heads * self.head, self.hidden),
            "self_attn.o_proj": (self.hidden, self.heads * self.head),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of a checkpoint."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for module, shape in self.linear().items():
                yield f"model.layers.{layer}.{module}.weight", shape
            yield f"model.layers.{layer}.input_layernorm.weight", (self.hidden,)
            yield f"model.layers.{layer}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "1b": Shape(2048, 8192, 16, 32, 8, 64, tied=True, shards=1),
    "3b": Shape(3072, 8192, 28, 24, 8, 128, tied=True, shards=2),
    "8b": Shape(4096, 14336, 32, 32, 8, 128, tied=False, shards=4),
}
"""Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B."""

TARGETS = {"all-linear": "", "attention": "self_attn."}
"""What the modules an adapter targets begin with."""

PEFT_MERGE = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def make_base(folder: Path, shape: Shape) -> None:
    """Normally distributed bfloat16 weights, in as many shards as the original has."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(1 << 26).normal_(std=0.02, generator=generator).to(torch.bfloat16)
    tensors = list(shape.tensors())
    sizes = [torch.Size(dims).numel() for _, dims in tensors]
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    first = 0
    for number in range(shape.shards):
        name = f"model-{number + 1:05d}-of-{shape.shards:05d}.safetensors" if shape.shards > 1 else "model.safetensors"
        last, limit = first, sum(sizes) * (number + 1) // shape.shards
        while last < len(tensors) and (sum(sizes[: last + 1]) <= limit or number == shape.shards - 1):
            last += 1
        part = {}
        for tensor, dims in tensors[first:last]:
            count = torch.Size(dims).numel()
            repeats = -(-count // len(pool))
            start = int(torch.randint(len(pool), (1,), generator=generator))
            part[tensor] = pool.roll(start).repeat(repeats)[:count].view(dims).clone()
            weight_map[tensor] = name
        save_file(part, folder / name, {"format": "pt"})
        first = last
    if shape.shards > 1:
        index = {"metadata": {"total_size": 2 * sum(sizes)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config()))


def make_adapter(folder: Path, base: Path, shape: Shape, rank: int, prefix: str, seed: int = 1) -> None:
    """A float32 LoRA as PEFT writes it, its delta about 1 % of the weights."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    modules = {name: dims for name, dims in shape.linear().items() if name.startswith(prefix)}
    tensors = {}
    for layer in range(shape.layers):
        for module, (out, inputs) in modules.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.002
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.split(".")[1] for name in modules}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


# ----------------------------------------------------------------------------------------------- contestants


@dataclass(frozen=True)
class Run:
    """Wall-clock seconds and the peak resident memory in bytes of one process."""

    seconds: float
    memory: int


def run(*command: str | Path) -> Run:
    """Run a process to its end."""
    started = time.perf_counter()
    process = subprocess.Popen([os.fspath(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed with {process.returncode}:\n{said.decode()}")
    return Run(seconds, usage.ru_maxrss * 1024)


def copy(base: Path, out: Path) -> Run:
    """``cp`` and ``sync`` of what was copied."""
    first = run("cp", "-r", "--reflink=never", base, out)
    second = run("sync", *out.iterdir(), out)
    return Run(first.seconds + second.seconds, max(first.memory, second.memory))


def raw(base: Path, out: Path) -> Run:
    """The least that writing as many bytes durably takes."""
    out.mkdir()
    buffer = mmap.mmap(-1, PIECE)
    buffer.write(os.urandom(PIECE))
    started = time.perf_counter()
    for file in base.glob("*.safetensors"):
        size = -(-file.stat().st_size // PAGE) * PAGE
        fd = os.open(out / file.name, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(fd, 0, size)

        def write(position: int, fd: int = fd, size: int = size) -> None:
            os.pwrite(fd, memoryview(buffer)[: min(PIECE, size - position)], position)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(write, range(0, size, PIECE)))
        os.fsync(fd)
        os.close(fd)
    return Run(time.perf_counter() - started, 0)


def contestants(base: Path, adapter: Path, out: Path, *, device: str, peft: bool) -> dict[str, Callable[[], Run]]:
    """What is timed, by its name."""
    script = Path(sys.executable).with_name("lorasmith")
    found: dict[str, Callable[[], Run]] = {
        "lorasmith": lambda: run(script, "merge", base, adapter, "-o", out, "--device", device, "-q"),
        "cp": lambda: copy(base, out),
        "raw": lambda: raw(base, out),
        "import": lambda: run(sys.executable, "-c", "import torch"),
    }
    if peft:
        found["peft"] = lambda: run(sys.executable, "-c", PEFT_MERGE, base, adapter, out)
    return found


# ------------------------------------------------------------------------------------------------ measuring


def warm(folder: Path) -> None:
    """Bring a folder's files into the page cache."""
    buffer = bytearray(PIECE)
    for file in folder.iterdir():
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def measure(base: Path, adapter: Path, out: Path, rounds: int, *, device: str, peft: bool) -> dict[str, list[Run]]:
    """Run every contestant once a round, each round beginning with another one."""
    todo = contestants(base, adapter, out, device=device, peft=peft)
    results: dict[str, list[Run]] = {name: [] for name in todo}
    names = list(todo)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            shutil.rmtree(out, ignore_errors=True)
            warm(base)
            os.sync()
            results[name].append(todo[name]())
            print(f"round {number + 1}: {name} {results[name][-1].seconds:.2f} s", file=sys.stderr, flush=True)
    shutil.rmtree(out, ignore_errors=True)
    return results


def ratios(results: dict[str, list[Run]]) -> dict[str, float]:
    """Medians of each round's own ratio."""
    seconds = {name: [run.seconds for run in runs] for name, runs in results.items()}
    net = [ours - torch_ for ours, torch_ in zip(seconds["lorasmith"], seconds["import"], strict=True)]

    def median(above: list[float], below: list[float]) -> float:
        return statistics.median(one / other for one, other in zip(above, below, strict=True))

    found = {
        "(lorasmith - import) / cp": median(net, seconds["cp"]),
        "(lorasmith - import) / raw": median(net, seconds["raw"]),
        "lorasmith / cp": median(seconds["lorasmith"], seconds["cp"]),
    }
    if "peft" in seconds:
        found["peft / lorasmith"] = median(seconds["peft"], seconds["lorasmith"])
    return found


def machine() -> str:
    """Processor, cores, memory and versions the figures belong to."""
    with open("/proc/cpuinfo", encoding="utf-8") as stream:
        models = [line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    python = platform.python_version()
    return f"{models[0]}, {cores} cores, {memory:.0f} GiB; Python {python}, torch {importlib.metadata.version('torch')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=sorted(TARGETS), default="all-linear")
    parser.add_argument("--device", default="cpu", help="what lorasmith computes on")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out: it takes most of the time")
    parser.add_argument("--folder", type=Path, help="where models are made, and kept")
    parser.add_argument("--json", type=Path, help="write every single figure there as well")
    options = parser.parse_args()
    shape = SHAPES[options.size]
    with tempfile.TemporaryDirectory(prefix="lorasmith-benchmark-") as scratch:
        folder = options.folder or Path(scratch)
        base = folder / f"base-{options.size}"
        adapter = folder / f"adapter-{options.size}-{options.targets}-{options.rank}"
        # in another process: a child's peak memory counts from that of the process it was forked from
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as maker:
            if not base.exists():
                maker.submit(make_base, base, shape).result()
            if not adapter.exists():
                maker.submit(make_adapter, adapter, base, shape, options.rank, TARGETS[options.targets]).result()
        device, peft = options.device, not options.no_peft
        results = measure(base, adapter, folder / "out", options.rounds, device=device, peft=peft)
    print(f"{machine()}; {device}, {options.size}, {options.targets}, rank {options.rank}, {options.rounds} rounds")
    for name, runs in results.items():
        seconds = [one.seconds for one in runs]
        spread = f"({min(seconds):.2f} to {max(seconds):.2f})"
        memory = max(one.memory for one in runs) / 2**20
        peak = f"  {memory:7.0f} MiB" if memory else ""
        print(f"  {name:10} {statistics.median(seconds):7.2f} s {spread:18}{peak}")
    for name, ratio in ratios(results).items():
        print(f"  {name:27} {ratio:.2f}")
    if options.json:
        figures = {name: [[one.seconds, one.memory] for one in runs] for name, runs in results.items()}
        options.json.write_text(json.dumps({"machine": machine(), "figures": figures, "ratios": ratios(results)}))


if __name__ == "__main__":
    main()
