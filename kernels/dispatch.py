"""Choice of an op's implementation: C++ on the CPU; a library, CUDA C++ or Triton on CUDA; else the torch reference.

Two environment variables, read when this module is imported. TRIALIGN_KERNELS:
    auto            (the default) what fits the tensor: an installed library (backends/libraries.py), else our kernel
    own             as auto, without libraries
    fp8             as auto, and decoder layers multiply in FP8 where Transformer Engine is installed: other numbers
    reference       plain torch everywhere
    avx512, avx2, baseline  as own, with the C++ built for that SIMD level, for tests
TRITON_INTERPRET=1 (Triton's own switch): CPU tensors go through the Triton kernels, interpreted, for tests.
Without a usable trialign._C there is one warning; Triton still runs on CUDA, and the references on the CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .backends.cuda_cpp import cuda_cpp_problem, register_cuda_cpp
from .backends.extension import load_extension
from .backends.schemas import SCHEMAS

Implementation = Literal["cpp", "triton", "reference"]

MODES = ("auto", "own", "fp8", "reference", "avx512", "avx2", "baseline")
HALF = (torch.bfloat16, torch.float16)
COMPILED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, *HALF),
    "meta": (torch.float32, *HALF),
}


def _mode() -> str:
    mode = os.environ.get("TRIALIGN_KERNELS", "auto")
    if mode not in MODES:
        raise ValueError(f"TRIALIGN_KERNELS={mode!r}: allowed are {', '.join(MODES)}")
    return mode


MODE = _mode()
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
CUDA_KEY = "CPU" if INTERPRET else "CUDA"
"""Dispatch key of the GPU implementations; interpreted kernels take CPU tensors."""
PROBLEM = None if MODE == "reference" else load_extension("_C")
EXTENSION = MODE != "reference" and PROBLEM is None
if PROBLEM and os.environ.get("RANK", "0") == "0":
    warnings.warn(
        f"trialign._C {PROBLEM}: plain torch runs instead, several times slower. "
        "`pip install -e . --no-build-isolation --no-deps -v` builds it and shows errors.",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def has_op(op: str) -> bool:
    """True when trialign._C is usable and has the op."""
    return EXTENSION and hasattr(torch.ops.trialign, op)


def has_cuda(op: str) -> bool:
    """True when the op has an implementation for CUDA tensors: CUDA C++ of trialign._C, or Triton's once registered."""
    name = f"trialign::{op}"
    return hasattr(torch.ops.trialign, op) and torch._C._dispatch_has_kernel_for_dispatch_key(name, CUDA_KEY)


def capability(tensor: torch.Tensor) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU that holds the tensor; (0, 0) elsewhere."""
    return _capability(tensor.device.index or 0) if tensor.is_cuda and torch.version.hip is None else (0, 0)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def has_triton() -> bool:
    """True when Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def choose(op: str, tensor: torch.Tensor) -> Implementation:
    """The implementation of torch.ops.trialign.`op` that fits the tensor's device and, if floating point, its dtype."""
    return _choice(op, tensor.device.type, tensor.dtype)


@functools.cache  # asked at every call of every op: some two hundred times in a decode step
def _choice(op: str, device: str, dtype: torch.dtype) -> Implementation:
    """An op is chosen for after its file has been imported, which registers it: the answer no longer changes."""
    device = "cuda" if INTERPRET and device == "cpu" else device
    if device not in COMPILED_DTYPES or (dtype.is_floating_point and dtype not in COMPILED_DTYPES[device]):
        return "reference"
    if device == "meta":  # only shapes, which the op's fake implementation gives
        return "cpp" if has_op(op) else "triton" if hasattr(torch.ops.trialign, op) else "reference"
    if device == "cpu":
        return "cpp" if has_op(op) else "reference"
    _choose_cuda_cpp()
    return "triton" if has_cuda(op) else "reference"


CUDA_CPP = ("logprob_stats", "logprob_update_", "logprob_backward", "logprob_backward_", "sort_by_expert")
"""Ops that CUDA C++ serves better than Triton: one pass with a thread's own statistics, a sort by warps' votes."""
_beside_cuda_cpp: dict[str, Callable] = {}
"""Their Triton launchers, registered where CUDA C++ does not run."""


@functools.cache
def _choose_cuda_cpp() -> None:
    """Registers CUDA C++ if a probe launch succeeds on this process's device, else Triton with one warning. Once."""
    problem = cuda_cpp_problem() if EXTENSION and torch.cuda.is_available() else "no GPU"
    if problem is None:
        register_cuda_cpp()
        return
    for op, triton in _beside_cuda_cpp.items():
        torch.library.impl(f"trialign::{op}", CUDA_KEY)(triton)
    if EXTENSION and torch.version.cuda and torch.cuda.is_available() and os.environ.get("RANK", "0") == "0":
        ops = ", ".join(CUDA_CPP)
        warnings.warn(f"CUDA C++ of trialign._C ({problem}): Triton serves {ops}", RuntimeWarning, stacklevel=2)


def holds_data(tensor: torch.Tensor) -> bool:
    """False for meta and fake tensors, which have no values to check."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


_definitions = torch.library.Library("trialign", "FRAGMENT")


def register(
    op: str,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    triton: Callable | None = None,
) -> None:
    """Registers for torch.ops.trialign.`op` its fake (shapes only), its gradient and its Triton launcher.

    The schema, the CPU implementation and, where nvcc was found, CUDA C++ for CUDA_CPP come from csrc/.
    Without a usable trialign._C the schema is that of SCHEMAS, and Triton the only implementation.
    """
    if not has_op(op):
        if MODE == "reference" or triton is None or not has_triton():
            return
        _definitions.define(op + SCHEMAS[op])
    torch.library.register_fake(f"trialign::{op}", fake)
    if triton is not None and has_triton():
        if op in CUDA_CPP and not INTERPRET:
            _beside_cuda_cpp[op] = triton
        else:
            torch.library.impl(f"trialign::{op}", CUDA_KEY)(triton)
    if backward is not None:
        torch.library.register_autograd(f"trialign::{op}", backward, setup_context=setup_context)
