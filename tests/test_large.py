"""One tensor larger than all the memory that a run is given."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from generate import Sizes, config, half_unit, write_json
from safetensors import safe_open
from safetensors.torch import save_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks /proc for the peak"),
]

ROWS, COLUMNS, RANK = 262_144, 2_048, 64
NAME = "model.embed_tokens.weight"
MEMORY = 64 << 20
SLACK = 40 << 20

MERGE = """
import sys
import torch, lorasmith
from lorasmith.merging import merge

def held():
    with open("/proc/self/status") as stream:
        return int(next(line for line in stream if line.startswith("VmHWM")).split()[1]) << 10

before = held()
base, adapter, out, memory = sys.argv[1:]
merge(base, adapter, out, memory=int(memory), threads=2)
print(held() - before)
"""
"""Prints how many bytes more a merge takes than importing what it needs."""


def write_large(folder: Path) -> Path:
    """A model that is one embedding of 1 GiB, made of 8 MiB of numbers again and again."""
    folder.mkdir()
    facts = {**config(Sizes(hidden=COLUMNS, vocabulary=ROWS)), "architectures": ["LlamaModel"]}
    write_json(folder / "config.json", facts)
    block = torch.randn(2048, COLUMNS, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    header = {NAME: {"dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": [0, ROWS * COLUMNS * 2]}}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for number in range(ROWS // len(block)):  # every copy is another permutation of its columns
            stream.write(block.roll(number, 1).view(torch.uint8).numpy().data)
    return folder


def write_factors(folder: Path) -> Path:
    """A LoRA on the embedding, as PEFT stores it: A of (rank, tokens), B of (width, rank)."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    factors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.randn(RANK, ROWS, generator=generator),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.randn(COLUMNS, RANK, generator=generator) * 1e-3,
    }
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    facts = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": ["embed_tokens"]}
    write_json(folder / "adapter_config.json", facts)
    return folder


def test_an_embedding_of_a_gibibyte_is_merged_within_a_budget_of_64_mebibytes(tmp_path: Path) -> None:
    base, adapter, out = write_large(tmp_path / "base"), write_factors(tmp_path / "adapter"), tmp_path / "out"
    words = [sys.executable, "-c", MERGE, str(base), str(adapter), str(out), str(MEMORY)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) <= MEMORY + SLACK
    require_rows(base, adapter, out)


def require_rows(base: Path, adapter: Path, out: Path) -> None:
    """Rows at the borders of blocks and some others are what float64 says, to one rounding."""
    chance = random.Random(0)
    rows = sorted({0, 1, 255, 256, 257, ROWS // 2, ROWS - 256, ROWS - 1, *chance.sample(range(ROWS), 200)})
    with (
        safe_open(base / "model.safetensors", "pt") as before,
        safe_open(out / "model.safetensors", "pt") as after,
        safe_open(adapter / "adapter_model.safetensors", "pt") as factors,
    ):
        assert list(after.keys()) == [NAME]
        old, new = before.get_slice(NAME), after.get_slice(NAME)
        assert (new.get_shape(), new.get_dtype()) == ([ROWS, COLUMNS], "BF16")
        a, b = (factors.get_tensor(name).double() for name in sorted(factors.keys()))
        for row in rows:
            w0, merged = old[row : row + 1].double(), new[row : row + 1]
            column = a[:, row : row + 1].t()
            exact = w0 + 32 / RANK * (column @ b.t())
            size = w0.abs() + 32 / RANK * (column.abs() @ b.abs().t())
            off = (merged.double() - exact).abs()
            assert (off <= half_unit(merged) + (RANK + 4) * 2.0**-23 * size).all(), row
            assert not torch.equal(merged.double(), w0)
