"""What the Triton kernels share: the import that may be missing, and the table each kernel is described by.

Triton reads TRITON_INTERPRET when it is imported and when a kernel is decorated; the kernels themselves are the same in
both modes. Without Triton a kernel stays a plain function that nobody calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..dispatch import MODE

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None  # the references and the C++ ops serve


def jit(fn: Callable) -> Any:
    """triton.jit, or the function itself where Triton is not installed."""
    return fn if triton is None else triton.jit(fn)


@dataclass(frozen=True)
class Spec:
    """One Triton kernel as it ships: the tests compile each config of it ahead of time for every architecture.

    signature: {argument: "*bf16" | "*fp32" | "*i64" | "i32" | "fp32" ...} of the arguments known at run time;
    configs: every set of compile-time values, `num_warps` and `num_stages` included, that a launch may use;
    free: those of them that are sizes of a model or a call, for addresses, masks and counts of steps only: a launch may
    use any value, and configs names one;
    hip_configs: those of AMD where they differ; fp32_configs: those of fp32 tensors where they differ;
    dot: it has to use the matrix units.
    """

    kernel: Any
    signature: dict[str, str]
    configs: tuple[dict[str, Any], ...]
    hip_configs: tuple[dict[str, Any], ...] | None = None
    fp32_configs: tuple[dict[str, Any], ...] | None = None
    free: tuple[str, ...] = ()
    dot: bool = False
    unaligned: tuple[str, ...] = field(default=())  # arguments that need not be multiples of 16


def uses_triton(tensor: torch.Tensor) -> bool:
    """True where an op without a C++ form runs its Triton kernel on `tensor`: on a GPU, or interpreted on the CPU."""
    return (tensor.is_cuda or INTERPRET) and triton is not None and MODE != "reference"


def vendor() -> str:
    """Whose GPUs this torch drives: "hip" or "cuda"."""
    return "hip" if torch.version.hip else "cuda"


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int, least: int = 16) -> int:
    """The smallest power of two >= n and >= least (tl.arange and tl.dot want one; tl.dot at least 16)."""
    return max(least, 1 << (n - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: fp32 is multiplied as fp32, as torch does by default, never as TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"
