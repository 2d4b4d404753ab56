"""CUDA graphs of the fake device: a capture records the ops, a replay runs them again on the same memory.

As on CUDA a captured op has no effect until the replay, numbers of the host are those of the capture, and nothing that
waits for the device or copies from the host can be captured.
"""

from typing import Any

import torch
from fake_ledger import LEDGER
from fake_tensor import DeviceTensor, State, deliver, tensors
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Capture:
    """Ops since the capture began."""

    def __init__(self) -> None:
        self.begin, self.blocks = LEDGER.live, LEDGER.blocks
        self.ops: list[tuple[Any, tuple, dict[str, Any], list[Tensor]]] = []
        self.saved: dict[int, tuple[Any, Tensor, Tensor]] = {}  # memory from before, as it was

    def before(self, written: list[DeviceTensor]) -> None:
        """Keeps what an op will overwrite of the memory from before the capture."""
        for tensor in written:
            storage = tensor.inner.untyped_storage()
            if tensor.block.address <= self.blocks and storage._cdata not in self.saved:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore
                self.saved[storage._cdata] = (tensor.block, whole, whole.clone())

    def add(self, run: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        given = {tensor.untyped_storage()._cdata for tensor in tensors((*args, *kwargs.values()))}
        fresh = [tensor for tensor in tensors((out,)) if tensor.untyped_storage()._cdata not in given]
        self.ops.append((run, args, kwargs, fresh))

    def end(self) -> None:
        for _, whole, before in self.saved.values():
            whole.copy_(before)
        for *_, fresh in self.ops:
            for tensor in fresh:
                tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.zero_()


class CUDAGraph:
    """torch.cuda.CUDAGraph of the fake device."""

    def __init__(self, **_: Any) -> None:
        self.ops: list[tuple[Any, tuple, dict[str, Any], list[Tensor]]] = []
        self.replays = 0

    def pool(self) -> tuple[int, int]:
        return (0, id(self))

    def replay(self) -> None:
        assert self.ops, "replay of a graph without a capture"
        LEDGER.launch("graph")
        self.replays += 1
        with _disable_current_modes():
            for run, args, kwargs, fresh in self.ops:
                out = run(*args, **kwargs)
                for target, value in zip(fresh, _fresh(out, len(fresh)), strict=True):
                    target.copy_(value)

    def reset(self) -> None:
        self.ops = []


def _fresh(out: Any, count: int) -> list[Tensor]:
    found = list(tensors((out,)))
    if not count:
        for work in out if isinstance(out, list | tuple) else (out,):
            if isinstance(work, torch.ScriptObject):
                work.wait()  # pyright: ignore
        return []
    return found[-count:]


class Graph:
    """torch.cuda.graph of the fake device."""

    def __init__(self, cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"):
        self.graph = cuda_graph

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        deliver(State.serial)
        State.capture = Capture()

    def __exit__(self, *_: Any) -> None:
        capture, State.capture = State.capture, None
        capture.end()
        self.graph.ops = capture.ops
