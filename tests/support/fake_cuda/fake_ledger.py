"""Ledger of a fake CUDA device: launches, host synchronizations, copies and allocations, by line of the product."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[3]
PRODUCT = tuple(f"{ROOT / folder}/" for folder in ("kernels", "engine", "models", "algorithms", "launch"))
_files: dict[str, str] = {}  # a code object's file -> its path in the product, "" for others


def where() -> str:
    """The innermost line of the product that is running, `engine/mesh.py:12`; "?" outside it."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        path = _files.get(name)
        if path is None:
            path = _files[name] = str(Path(name).relative_to(ROOT)) if name.startswith(PRODUCT) else ""
        if path:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class Launch(NamedTuple):
    """A launched op. `arguments`: numbers as they are, tensors as `Ledger.describe` gives them."""

    op: str
    arguments: tuple


class Allocation(NamedTuple):
    """An allocation, or with negative `bytes` its end. `address` is used once: no later allocation has it."""

    address: int
    bytes: int
    op: str
    line: str


class Block:
    """Memory of the fake device, freed when no tensor refers to it."""

    __slots__ = ("address", "bytes", "ledger", "line", "op")

    def __init__(self, ledger: "Ledger", size: int, op: str):
        self.ledger, self.bytes, self.op, self.line = ledger, size, op, where()
        ledger.blocks += 1
        self.address = ledger.blocks
        ledger.allocate(self)

    def __del__(self) -> None:
        self.ledger.free(self)


class Ledger:
    """Work that a fake device has been asked for since `clear`.

    Attributes:
        phase: of what follows.
        launches, syncs, copies: (phase, op or kind, line) -> count. An op that would be several kernels counts once;
            a copy is one that the host does not wait for.
        capacity, live, peak: bytes of the device's memory, allocated now, and at most since `peak` was reset.
        allocations: since `recording` began; None outside it.
        trace: launches since `tracing` began; None outside it.
    """

    def __init__(self) -> None:
        self.phase = "start"
        self.launches, self.syncs, self.copies = Counter[tuple](), Counter[tuple](), Counter[tuple]()
        self.capacity, self.live, self.peak, self.blocks = 80 << 30, 0, 0, 0
        self.peaks: dict[str, int] = {}
        self.allocations: list[Allocation] | None = None
        self.trace: list[Launch] | None = None
        self._traced_from = 0

    def clear(self) -> None:
        """Forgets the counts."""
        for counts in (self.launches, self.syncs, self.copies):
            counts.clear()

    def launch(self, op: str, given: tuple = ()) -> None:
        self.launches[self.phase, op, where()] += 1
        if self.trace is not None:
            self.trace.append(Launch(op, tuple(self.describe(value) for value in given)))

    def sync(self, kind: str) -> None:
        """The host waits for the device."""
        self.syncs[self.phase, kind, where()] += 1

    def copy(self, kind: str) -> None:
        """A copy between host and device that the host does not wait for."""
        self.copies[self.phase, kind, where()] += 1

    def allocate(self, block: Block) -> None:
        if self.live + block.bytes > self.capacity:
            held = f"{self.live} of {self.capacity} bytes are allocated"
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {block.bytes} bytes; {held}")
        self.live += block.bytes
        self.peak = max(self.peak, self.live)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live)
        if self.allocations is not None:
            self.allocations.append(Allocation(block.address, block.bytes, block.op, block.line))

    def free(self, block: Block) -> None:
        self.live -= block.bytes
        if self.allocations is not None:
            self.allocations.append(Allocation(block.address, -block.bytes, block.op, block.line))

    @contextmanager
    def recording(self) -> Iterator[list[Allocation]]:
        """Records allocations and their ends, in order."""
        self.allocations = []
        try:
            yield self.allocations
        finally:
            self.allocations = None

    @contextmanager
    def tracing(self) -> Iterator[list[Launch]]:
        """Records launches with their arguments: two equal traces are of steps that one captured graph can replay."""
        self.trace, self._traced_from = [], self.blocks
        try:
            yield self.trace
        finally:
            self.trace = None

    def describe(self, value: Any) -> Any:
        """A tensor as (place, offset, shape, strides, dtype): the place of one from before the trace is its address,
        that of one allocated within is its number in the trace."""
        if isinstance(value, torch.Tensor):
            block = getattr(value, "block", None)
            if block is None:
                return ("host", tuple(value.shape), value.dtype, value.tolist() if value.dim() == 0 else None)
            place = ("address", block.address)
            if block.address > self._traced_from:
                place = ("temporary", block.address - self._traced_from)
            return (*place, value.storage_offset(), tuple(value.shape), value.stride(), value.dtype)
        if isinstance(value, list | tuple):
            return tuple(self.describe(item) for item in value)
        return value if isinstance(value, int | float | str | bool | torch.dtype) or value is None else str(value)

    def report(self) -> dict[str, Any]:
        """The counts as JSON: phase -> launches; phase, kind and line of synchronizations; phase -> peak bytes."""
        launches: Counter[str] = Counter()
        for (phase, _, _), count in self.launches.items():
            launches[phase] += count
        syncs, copies = ([[*key, n] for key, n in counts.most_common()] for counts in (self.syncs, self.copies))
        return {"launches": launches, "syncs": syncs, "copies": copies, "peaks": self.peaks, "live": self.live}


LEDGER = Ledger()
