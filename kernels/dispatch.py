"""Which implementation of an op runs: C++ on the CPU, Triton on CUDA, the torch reference elsewhere.

TRIALIGN_KERNELS is the one switch, read when this module is imported: `auto` (the default), `reference` (plain torch
everywhere), or `avx2` / `baseline` (the C++ of a lesser machine, for tests). A missing or stale trialign._C is said
once, and the references serve.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from ..source_hash import source_hash  # pyright: ignore[reportMissingImports] (it lies in csrc/)

Implementation = Literal["cpp", "triton", "reference"]

MODES = ("auto", "reference", "avx2", "baseline")
COMPILED_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


def _mode() -> str:
    mode = os.environ.get("TRIALIGN_KERNELS", "auto")
    if mode not in MODES:
        raise ValueError(f"TRIALIGN_KERNELS={mode!r}: allowed are {', '.join(MODES)}")
    return mode


def why_unusable(built_hash: str, built_torch: str, sources: Path) -> str | None:
    """What is wrong with a trialign._C built from `built_hash` against `built_torch`; None when it fits what is here.

    The extension uses torch's stable ABI, so another patch release fits; another minor release is rebuilt to be safe.
    """
    here = source_hash(sources)
    if here and here != built_hash:
        return "was built from other sources than those in csrc/"
    if built_torch.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"was built for torch {built_torch}, this is torch {torch.__version__}"
    return None


def _load() -> str | None:
    """Loads trialign._C, which registers torch.ops.trialign.*. Returns why it cannot be used, or None."""
    if importlib.util.find_spec("trialign._C") is None:
        return "is not built"
    try:
        extension = importlib.import_module("trialign._C")
    except ImportError as error:
        return f"does not load ({error})"
    sources = Path(str(extension.__file__)).parent
    return why_unusable(extension.source_hash, extension.torch_version, sources)


MODE = _mode()
PROBLEM = None if MODE == "reference" else _load()
EXTENSION = MODE != "reference" and PROBLEM is None
if PROBLEM and os.environ.get("RANK", "0") == "0":
    warnings.warn(
        f"trialign._C {PROBLEM}: plain torch serves instead, several times slower. "
        "`pip install -e . --no-build-isolation --no-deps -v` builds it and shows what it lacks.",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def has_op(op: str) -> bool:
    """True when trialign._C is usable and has the op."""
    return EXTENSION and hasattr(torch.ops.trialign, op)


def has_cuda(op: str) -> bool:
    """True when the op has an implementation for CUDA tensors: CUDA C++ of trialign._C, or Triton's once registered."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"trialign::{op}", "CUDA")


@functools.cache
def has_triton() -> bool:
    """True when Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def choose(op: str, tensor: torch.Tensor) -> Implementation:
    """The implementation of torch.ops.trialign.`op` that fits the tensor's device and dtype."""
    device = tensor.device.type
    if tensor.dtype not in COMPILED_DTYPES.get(device, ()) or not has_op(op):
        return "reference"
    if device == "cpu":
        return "cpp"
    return "triton" if has_cuda(op) else "reference"


def register(
    op: str,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    triton: Callable | None = None,
) -> None:
    """Gives torch.ops.trialign.`op` its shapes for FakeTensor and meta runs, its gradient and its Triton launcher.

    The schema, the CPU implementation and, where nvcc was found, CUDA C++ ones come from csrc/ (those go before
    Triton's); without a usable trialign._C there is nothing to register.
    """
    if not has_op(op):
        return
    torch.library.register_fake(f"trialign::{op}", fake)
    if triton is not None and has_triton() and not has_cuda(op):
        torch.library.impl(f"trialign::{op}", "CUDA")(triton)
    if backward is not None:
        torch.library.register_autograd(f"trialign::{op}", backward, setup_context=setup_context)
