"""Comparison of interpreted launches with the tables SPECS, which tests/kernels/aot compiles ahead of time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from trialign.kernels.backends import triton_runtime

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels" / "aot"))

from kernel_table import specs  # pyright: ignore[reportMissingImports]

KERNELS = {spec.kernel.fn: (name, spec) for name, spec in specs() if hasattr(spec.kernel, "fn")}
TYPES = {"*fp32": torch.float32, "*i64": torch.int64, "*i32": torch.int32, "*u8": torch.uint8}
Values = frozenset[tuple[str, object]]


def bound(config: dict, spec: triton_runtime.Spec) -> Values:
    """The compile-time values of a config or a launch that are not free, with its warps and stages."""
    return frozenset((k, v) for k, v in config.items() if k not in spec.free and k not in spec.signature)


def table(spec: triton_runtime.Spec, wide: bool, vendor: str) -> Iterable[dict]:
    """The configs that may be launched on a vendor's GPUs; wide: with tensors of fp32."""
    if wide and spec.fp32_configs is not None:
        return spec.fp32_configs
    return spec.hip_configs or spec.configs if vendor == "hip" else spec.configs


def is_wide(spec: triton_runtime.Spec, arguments: dict) -> bool:
    """True if a launch's tensors of a variable dtype ('*bf16' in the table) are fp32."""
    tensors = [arguments[name] for name, kind in spec.signature.items() if kind == "*bf16"]
    return any(tensor is not None and tensor.dtype == torch.float32 for tensor in tensors)


def fits(given: object, kind: str) -> bool:
    """True if an argument has its type of `Spec.signature`: "*bf16" stands for every dtype of the kernel, None for a
    tensor that is not read."""
    if kind.startswith("*"):
        return given is None or isinstance(given, torch.Tensor) and given.dtype == TYPES.get(kind, given.dtype)
    return type(given) is {"u1": bool, "fp32": float}.get(kind, int)


def check(kernel: Callable, arguments: dict, vendor: str = "cuda") -> None:
    """Raises ValueError for a launch of a kernel of the package with types or values that its table does not have."""
    if kernel not in KERNELS:
        return
    name, spec = KERNELS[kernel]
    for argument, kind in spec.signature.items():
        given = arguments[argument]
        if not fits(given, kind):
            actual = given.dtype if isinstance(given, torch.Tensor) else repr(given)
            raise ValueError(f"{name} is launched with {argument} = {actual}, where SPECS has {kind}")
    values = bound(arguments, spec)
    if values not in {bound(config, spec) for config in table(spec, is_wide(spec, arguments), vendor)}:
        raise ValueError(f"{name} is launched with values that SPECS does not have: {sorted(values)}")
