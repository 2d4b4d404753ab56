"""Shared parts of the Triton kernels: the optional import, the launch table `Spec`, helpers for block sizes.

Triton reads TRITON_INTERPRET when it is imported and when a kernel is decorated; the kernels themselves are the same in
both modes. Without Triton a kernel stays a plain function that is never called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..dispatch import INTERPRET, MODE

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None  # the C++ ops and the torch references remain


def jit(fn: Callable) -> Any:
    """triton.jit, or the function itself where Triton is not installed."""
    return fn if triton is None else triton.jit(fn)


@dataclass(frozen=True)
class Spec:
    """A Triton kernel's launch table: the tests compile every config ahead of time for every architecture.

    signature: {argument: "*bf16" | "*fp32" | "*i64" | "i32" | "fp32" ...} of the arguments known at run time;
    configs: every set of compile-time values, `num_warps` and `num_stages` included, that a launch may use;
    free: the compile-time values that may be anything (sizes of a model or a call, used in addresses, masks and loop
        bounds only); configs has one example;
    hip_configs: the configs on AMD, sm_configs: those on an architecture of NVIDIA, fp32_configs: those for fp32
        tensors, where they differ;
    dot: the kernel must use the matrix units;
    unaligned: arguments that need not be multiples of 16.
    """

    kernel: Any
    signature: dict[str, str]
    configs: tuple[dict[str, Any], ...]
    hip_configs: tuple[dict[str, Any], ...] | None = None
    fp32_configs: tuple[dict[str, Any], ...] | None = None
    free: tuple[str, ...] = ()
    dot: bool = False
    unaligned: tuple[str, ...] = ()
    sm_configs: dict[str, tuple[dict[str, Any], ...]] = field(default_factory=dict)

    def on(self, arch: str) -> tuple[dict[str, Any], ...]:
        """The configs on an architecture, for tensors of 16 bits."""
        if arch.startswith("gfx"):
            return self.hip_configs or self.configs
        return self.sm_configs.get(arch, self.configs)


def uses_triton(tensor: torch.Tensor) -> bool:
    """True where an op without a C++ implementation runs its Triton kernel: on a GPU, or interpreted on the CPU."""
    return (tensor.is_cuda or INTERPRET) and triton is not None and MODE != "reference"


def vendor() -> str:
    """GPU vendor of this torch build: "hip" (AMD) or "cuda"."""
    return "hip" if torch.version.hip else "cuda"


@functools.cache
def architecture(device: torch.device) -> str:
    """The architecture whose launch tables a device takes: gfx942, sm_90 (Hopper), sm_100 (data centers' Blackwell), or
    sm_80, whose matrix unit all others have too, and the interpreter."""
    if vendor() == "hip":
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and torch.cuda.is_available() else 8
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (SMs, compute units) of a GPU; of the interpreter, a few."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int, least: int = 16) -> int:
    """The smallest power of two >= n and >= least (tl.arange and tl.dot want one; tl.dot at least 16)."""
    return max(least, 1 << (n - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: fp32 is multiplied as fp32, as torch does by default, never as TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"
