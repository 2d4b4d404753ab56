"""A CUDA device without a GPU, for tests: `install()` in a process of its own.

Tensors say they are on cuda:N and hold real numbers on the CPU. What CUDA refuses is refused: tensors of two devices in
one op, CPU tensors in a collective of NCCL, waiting for the device while a graph is captured. Launches, host
synchronizations, copies and allocations are counted by line of the product (`LEDGER`). A copy to pinned memory that
the host did not wait for holds garbage, and pinned memory that is written before the copy from it has ended is noticed.

What it does not show: the numbers of CUDA kernels, NCCL's order and deadlocks, races between streams, and time.
"""

import ctypes
import importlib
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fake_ledger import LEDGER
from fake_runtime import patch_cuda, patch_distributed
from fake_tensor import Mode, State
from trialign.engine.profiler import Profiler


def install(index: int = 0, count: int = 1) -> None:
    """Gives this process, for good, the device cuda:`index` of `count`."""
    assert torch._C._get_accelerator().type == "cuda", "start this process by with_guard.py"  # pyright: ignore
    ctypes.CDLL(None).fake_cuda(index, count)
    State.device = torch.device("cuda", index)
    patch_cuda(count)
    patch_distributed()
    torch._C._set_only_lift_cpu_tensors(True)  # pyright: ignore
    # Backward in this thread, where the mode is.
    torch.autograd.set_multithreading_enabled(False).__enter__()  # pyright: ignore
    # Composite ops are not taken apart below the mode in inference mode.
    torch.inference_mode.__enter__ = _enter_no_grad  # pyright: ignore
    torch.inference_mode.__exit__ = _leave_no_grad  # pyright: ignore
    Mode().__enter__()


def _enter_no_grad(self: Any) -> None:
    self.no_grad = torch.no_grad()
    self.no_grad.__enter__()


def _leave_no_grad(self: Any, *given: Any) -> None:
    self.no_grad.__exit__(*given)


def prepare_script(rank: int, ranks: int, folder: Path) -> None:
    """Before a launch script: the device, and phases that the ledger counts by; writes `rank_N.json` at its end."""
    install(rank, ranks)
    run: Any = importlib.import_module("common.run")
    start = run.start
    run.matmul_peak = lambda *_: 1e12  # of a device that does not exist
    call = Profiler.__call__

    @contextmanager
    def phase(self: Profiler, name: str, **given: Any) -> Any:
        before, LEDGER.phase = LEDGER.phase, name
        try:
            with call(self, name, **given):
                yield
        finally:
            LEDGER.phase = before

    def begin(*given: Any) -> None:
        try:
            start(*given)
        finally:
            (folder / f"rank_{rank}.json").write_text(json.dumps(LEDGER.report()))

    Profiler.__call__, run.start = phase, begin
