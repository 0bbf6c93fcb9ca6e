"""Times mixing adapters: the exact sum, the same recompressed, and what PEFT's ``add_weighted_adapter`` takes.

    python tests/benchmarks/mix.py                              # eight adapters of Llama-3.1-8B's shapes, rank 16
    python tests/benchmarks/mix.py --size 1b --adapters 2 --rounds 9

Adapters are generated in a temporary folder (or ``--folder``, where they are kept): float32, all linear layers. In
every round each contestant runs once, as a process of its own with the adapters in the page cache:

    exact     ``lorasmith mix``, the sum at the rank of all together
    cut       ``lorasmith mix --rank``, recompressed to the rank of one
    files     reading all adapters and writing as many bytes as *exact* does, durably
    import    ``import torch``

PEFT needs the model and takes far longer, so it gets one layer's attention: *cat* and *svd*, in a process that has
loaded everything, against the same call of lorasmith's there. Figures are medians, with the least and the most.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from merge import PIECE, SHAPES, Run, Shape, machine, make_adapter, run, warm

RANK = 16

PEFT_MIX = """
import json, sys, time, torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM
import lorasmith
config, kind, rank, *adapters = sys.argv[1:]
model = LlamaForCausalLM(LlamaConfig(**json.loads(config)))
model = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
for number, adapter in enumerate(adapters[1:], 1):
    model.load_adapter(adapter, adapter_name=f"a{number}")
names = [f"a{number}" for number in range(len(adapters))]
options = {"svd_rank": int(rank), "svd_full_matrices": False} if kind == "svd" else {}
started = time.perf_counter()
model.add_weighted_adapter(names, [1.0] * len(names), "all", combination_type=kind, **options)
theirs = time.perf_counter() - started
started = time.perf_counter()
lorasmith.mix(adapters, rank=int(rank) if kind == "svd" else None)
print(json.dumps([theirs, time.perf_counter() - started]))
"""


def make_all(folder: Path, shape: Shape, count: int, prefix: str) -> list[Path]:
    """So many adapters, in a process of their own."""
    found = [folder / f"adapter-{prefix.strip('.') or 'all'}-{shape.layers}-{shape.hidden}-{n}" for n in range(count)]
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as maker:
        for number, adapter in enumerate(found):
            if not adapter.exists():
                maker.submit(make_adapter, adapter, Path("base"), shape, RANK, prefix, number).result()
    return found


def files(adapters: list[Path], out: Path) -> Run:
    """Read every adapter and write as many bytes, synced: what the exact sum takes at least."""
    started = time.perf_counter()
    buffer = memoryview(bytearray(PIECE))
    with out.open("wb") as target:
        for adapter in adapters:
            with (adapter / "adapter_model.safetensors").open("rb", buffering=0) as source:
                while size := source.readinto(buffer):
                    target.write(buffer[:size])
        target.flush()
        os.fsync(target.fileno())
    return Run(time.perf_counter() - started, 0)


def measure(adapters: list[Path], out: Path, rounds: int) -> dict[str, list[Run]]:
    """Run every contestant once a round."""
    script = Path(sys.executable).with_name("lorasmith")
    command = (script, "mix", *adapters, "-o", out, "-q")
    todo: dict[str, Callable[[], Run]] = {
        "exact": lambda: run(*command),
        "cut": lambda: run(*command, "--rank", str(RANK)),
        "files": lambda: files(adapters, out),
        "import": lambda: run(sys.executable, "-c", "import torch"),
    }
    results: dict[str, list[Run]] = {name: [] for name in todo}
    for number in range(rounds):
        for name, contestant in todo.items():
            out.unlink(missing_ok=True)
            for adapter in adapters:
                warm(adapter)
            os.sync()
            results[name].append(contestant())
            print(f"round {number + 1}: {name} {results[name][-1].seconds:.2f} s", file=sys.stderr, flush=True)
    out.unlink(missing_ok=True)
    return results


def beside_peft(adapters: list[Path], shape: Shape, kind: str, rounds: int) -> list[tuple[float, float]]:
    """Seconds that PEFT and lorasmith take for the same, in one process."""
    config = {**shape.config(), "vocab_size": 64}
    arguments = [sys.executable, "-c", PEFT_MIX, json.dumps(config), kind, str(RANK), *map(str, adapters)]
    found = []
    for number in range(rounds):
        theirs, ours = json.loads(subprocess.run(arguments, check=True, stdout=subprocess.PIPE).stdout)
        found.append((theirs, ours))
        print(f"round {number + 1}: {kind} {theirs:.2f} s, lorasmith {ours:.3f} s", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out")
    parser.add_argument("--folder", type=Path, help="where adapters are made, and kept")
    options = parser.parse_args()
    shape = SHAPES[options.size]
    one_layer = dataclasses.replace(shape, layers=1, tied=True)
    with tempfile.TemporaryDirectory(prefix="lorasmith-benchmark-") as scratch:
        folder = options.folder or Path(scratch)
        results = measure(make_all(folder, shape, options.adapters, ""), folder / "out.safetensors", options.rounds)
        pairs = {}
        if not options.no_peft:
            few = make_all(folder, one_layer, options.adapters, "self_attn.")
            pairs = {kind: beside_peft(few, one_layer, kind, options.rounds) for kind in ("cat", "svd")}
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{machine()}; {options.adapters} adapters of {options.size}, rank {RANK}, {options.rounds} rounds")
    for name, runs in results.items():
        seconds = [one.seconds for one in runs]
        memory = max(one.memory for one in runs) / 2**20
        peak = f"  {memory:7.0f} MiB" if memory else ""
        spread = f"({min(seconds):.2f} to {max(seconds):.2f})"
        print(f"  {name:10} {statistics.median(seconds):7.2f} s {spread:18}{peak}")
    net = zip(results["exact"], results["import"], results["files"], strict=True)
    ratio = statistics.median((ours.seconds - torch_.seconds) / least.seconds for ours, torch_, least in net)
    print(f"  (exact - import) / files    {ratio:.2f}")
    for kind, times in pairs.items():
        theirs, ours = (statistics.median(side) for side in zip(*times, strict=True))
        times_as_long = statistics.median(peft / mine for peft, mine in times)
        print(f"  one layer's attention, PEFT {kind} {theirs:.2f} s, lorasmith {ours:.3f} s: {times_as_long:.2g} times")


if __name__ == "__main__":
    main()
