"""The implementation that a test of kernels runs: C++ on the CPU, interpreted Triton, or a GPU's.

TRITON_INTERPRET=1 sends CPU tensors through the Triton kernels (kernels/dispatch.py), checked by interp_shim. Where
there is a GPU, tests run on it a second time, marked `gpu`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from trialign.kernels.dispatch import EXTENSION, INTERPRET

T = TypeVar("T")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES: list = ["cpu"]
FAULT: tuple[type[Exception], ...] = (IndexError, RuntimeError, ValueError)
"""Exceptions of an interpreted kernel that fails a check of interp_shim."""

if INTERPRET:
    import interp_shim
    import launches
    import triton

    interp_shim.install()
    interp_shim.Monitor.watch = launches.check  # every launch is one that tests/kernels/aot compiles
    FAULT += (getattr(triton.runtime.errors, "InterpreterError", ValueError),)  # Triton 3.9's wrapper
elif torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))

interpreted_only = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")


@pytest.fixture(params=DEVICES, autouse=True)
def device(request):
    """Fixed seed, and each device in turn as the default of new tensors, for every test of a file that imports this."""
    torch.manual_seed(0)
    with torch.device(request.param) as context:
        yield context


def cpp_only(test: Callable) -> Callable:
    """Marks a test of checks that only the C++ ops make."""
    test = pytest.mark.parametrize("device", ["cpu"], indirect=True)(test)
    return pytest.mark.skipif(INTERPRET or not EXTENSION, reason="tests the C++ ops of trialign._C")(test)


def by_mode(compiled: T, interpreted: T) -> T:
    """Sizes for compiled kernels, or smaller ones for the interpreter."""
    return interpreted if INTERPRET else compiled


def untouched(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """[elements] of zeros that take address space alone until they are written: more than 2^31 for index arithmetic."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)
