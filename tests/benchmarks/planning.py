"""Time and memory to plan the merge of a very large mixture of experts: headers and names, no weights.

    python tests/benchmarks/planning.py                    DeepSeek-V3's: 671B, 163 files, 58 layers of 256 experts
    python tests/benchmarks/planning.py --model qwen3      Qwen3-30B-A3B's: 48 layers of 128 experts, 16 files
    python tests/benchmarks/planning.py --adapter apart    an adapter with factors for each expert, not stacked

The files are sparse: they have the size of the model, and take no room. The adapter's are sparse as well, and so of
zeros; it is read whole, for its digest, which is timed apart. Each round is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Shapes = list[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Mixture:
    """What sets the tensors of a mixture of experts; the first ``dense`` layers have none."""

    config: dict[str, object]
    hidden: int
    inner: int
    expert: int
    experts: int
    layers: int
    dense: int
    shared: bool
    files: int
    vocabulary: int
    attention: dict[str, tuple[int, int]]

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of a checkpoint."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            stem = f"model.layers.{layer}"
            for name, shape in self.attention.items():
                yield f"{stem}.self_attn.{name}.weight", shape
            yield from _gated(f"{stem}.mlp", self.hidden, self.inner) if layer < self.dense else self._experts(stem)
            yield f"{stem}.input_layernorm.weight", (self.hidden,)
            yield f"{stem}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def _experts(self, stem: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{stem}.mlp.gate.weight", (self.experts, self.hidden)
        if self.shared:
            yield f"{stem}.mlp.gate.e_score_correction_bias", (self.experts,)
            yield from _gated(f"{stem}.mlp.shared_experts", self.hidden, self.expert)
        for expert in range(self.experts):
            yield from _gated(f"{stem}.mlp.experts.{expert}", self.hidden, self.expert)

    def adapter(self, rank: int, *, stacked: bool) -> Shapes:
        """Factors for all experts of all layers that have some."""
        found: Shapes = []
        for layer in range(self.dense, self.layers):
            stem = f"base_model.model.model.layers.{layer}.mlp.experts"
            if stacked:
                total = rank * self.experts
                found += _factors(f"{stem}.base_layer", 2 * self.expert, self.hidden, total)
                found += _factors(stem, self.hidden, self.expert, total)
                continue
            for expert in range(self.experts):
                for name, (rows, columns) in _gated(f"{stem}.{expert}", self.hidden, self.expert):
                    found += _factors(name.removesuffix(".weight"), rows, columns, rank)
        return found


def _gated(stem: str, hidden: int, inner: int) -> Shapes:
    down = (f"{stem}.down_proj.weight", (hidden, inner))
    return [down, (f"{stem}.gate_proj.weight", (inner, hidden)), (f"{stem}.up_proj.weight", (inner, hidden))]


def _factors(stem: str, rows: int, columns: int, rank: int) -> Shapes:
    return [(f"{stem}.lora_A.weight", (rank, columns)), (f"{stem}.lora_B.weight", (rows, rank))]


MODELS = {
    "deepseek": Mixture(
        {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168},
        7168, 18432, 2048, 256, 61, 3, True, 163, 129280,
        {"q_a_proj": (1536, 7168), "q_b_proj": (24576, 1536), "kv_a_proj_with_mqa": (576, 7168),
         "kv_b_proj": (32768, 512), "o_proj": (7168, 16384)},
    ),
    "qwen3": Mixture(
        {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048},
        2048, 6144, 768, 128, 48, 0, False, 16, 151936,
        {"q_proj": (4096, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 4096)},
    ),
}  # fmt: skip


def write_sparse(file: Path, tensors: Shapes) -> int:
    """A safetensors file of bfloat16 zeros that takes no room; returns its size."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors:
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        stream.truncate(8 + len(raw) + position)
    return 8 + len(raw) + position


def write_base(folder: Path, model: Mixture) -> tuple[int, int]:
    """A sharded model folder; returns the number of tensors and of bytes."""
    folder.mkdir()
    tensors = list(model.tensors())
    each = -(-len(tensors) // model.files)
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(model.files):
        name = f"model-{number + 1:05d}-of-{model.files:05d}.safetensors"
        part = tensors[number * each : (number + 1) * each]
        total += write_sparse(folder / name, part)
        weight_map |= dict.fromkeys((one for one, _ in part), name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**model.config, "tie_word_embeddings": False}))
    return len(tensors), total


def write_adapter(folder: Path, model: Mixture, rank: int, *, stacked: bool) -> int:
    """A PEFT folder; returns its bytes."""
    folder.mkdir()
    config: dict[str, object] = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "peft_version": "0.21.2"}
    if stacked:
        config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return write_sparse(folder / "adapter_model.safetensors", model.adapter(rank, stacked=stacked))


def plan_once(base: str, adapter: str) -> None:
    """Plan in this process; prints seconds for reading the adapter and for the rest, and the peak in MiB."""
    started = time.perf_counter()
    import lorasmith
    from lorasmith import checkpoint, formats, planning

    imported = time.perf_counter()
    read = formats.read_adapter(adapter)
    digested = time.perf_counter()
    plan = planning.build_plan(checkpoint.open_checkpoint(base), [(read, 1.0)], planning.Options())
    done = time.perf_counter()
    with open("/proc/self/status", encoding="ascii") as stream:
        peak = next(int(line.split()[1]) for line in stream if line.startswith("VmHWM:"))
    facts = {
        "import": imported - started,
        "adapter": digested - imported,
        "plan": done - digested,
        "MiB": peak / 1024,
        "merged": plan.tensors_merged,
        "copied": plan.tensors_copied,
        "version": lorasmith.__version__,
        "targets": [[one.target, one.count, one.placed] for one in plan.targets],
    }
    print(json.dumps(facts))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", choices=MODELS, default="deepseek")
    options.add_argument("--adapter", choices=["stacked", "apart"], default="stacked")
    options.add_argument("--rank", type=int, default=2)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--plan", nargs=2, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.plan:
        plan_once(*given.plan)
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as room:
        base, adapter = Path(room, "base"), Path(room, "adapter")
        count, size = write_base(base, MODELS[given.model])
        own = write_adapter(adapter, MODELS[given.model], given.rank, stacked=given.adapter == "stacked")
        files = MODELS[given.model].files
        print(f"{count:,} tensors in {files} files, {size / 1e9:,.0f} GB; adapter {own / 1e9:.2f} GB")
        command = [sys.executable, __file__, "--plan", str(base), str(adapter)]
        rounds = []
        for _ in range(given.rounds):
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            rounds.append(json.loads(run.stdout))
            print({key: round(rounds[-1][key], 2) for key in ("import", "adapter", "plan", "MiB")})
        for target in rounds[0]["targets"]:
            print(*target)
        print(f"{rounds[0]['merged']:,} tensors merged, {rounds[0]['copied']:,} copied")
        middle = {key: statistics.median(one[key] for one in rounds) for key in ("adapter", "plan", "MiB")}
        print(f"plan {middle['plan']:.1f} s, adapter {middle['adapter']:.1f} s, peak {middle['MiB']:.0f} MiB (medians)")


if __name__ == "__main__":
    main()
