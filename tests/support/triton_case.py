"""Where the tests of the Triton kernels run: interpreted on the CPU (TRITON_INTERPRET=1), or compiled on a GPU.

Interpreting and compiling need processes of their own: a plain `pytest` on a machine without a GPU skips these tests.
"""

from __future__ import annotations

import os

import pytest
import torch

FAULT: tuple[type[Exception], ...] = (IndexError, RuntimeError, ValueError)
"""What an interpreted kernel raises when a check of interp_shim bites."""

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"

if INTERPRET:
    import interp_shim
    import launches
    import triton

    interp_shim.install()
    interp_shim.Monitor.watch = launches.check  # what is launched is what tests/aot compiles
    FAULT += (getattr(triton.runtime.errors, "InterpreterError", ValueError),)  # Triton 3.9 wraps them

needs_triton = [
    pytest.mark.skipif(not (INTERPRET or torch.cuda.is_available()), reason="needs TRITON_INTERPRET=1 or a GPU"),
    *([] if INTERPRET else [pytest.mark.gpu]),
]
