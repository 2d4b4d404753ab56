"""Profiler of a step's phases: seconds, tokens/s, model FLOPs utilization (MFU) and memory.

Scripts and algorithms open phases; roles and generator report tokens and FLOPs to the open one.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from .memory import MemoryHolders
from .mesh import Mesh
from .parallel.collectives import all_reduce


@dataclass
class Work:
    """Work of a phase since the last `take`."""

    tokens: int = 0  # of all ranks
    reported_tokens: int = 0  # of this rank
    reported_flops: float = 0.0


class Profiler:
    """Times phases by name and counts their work. Phases do not nest; repeated ones add up within a step.

        profiler = Profiler(mesh, peak=matmul_peak(dtype, mesh.device))
        with profiler("rollout"):
            ...                                    # profiler.add(mesh, tokens=1000, flops=2e12)
        metrics = profiler.take()

    Args:
        mesh: of all ranks that take part in the phases.
        around: context manager entered with the phase's name, to display it.

    Attributes:
        peak: FLOP/s of one rank; None leaves MFU out.
        data_sheet: the same as its maker gives it; None leaves that MFU out.
        memory: tensors of roles, optimizers and generators, for the report of an allocation that fails in a phase.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        peak: float | None = None,
        around: Callable[[str], AbstractContextManager[None]] = nullcontext,
    ):
        self.mesh, self.peak, self.around = mesh, peak, around
        self.data_sheet: float | None = None
        self.memory = MemoryHolders(mesh.device)
        self._open: Work | None = None
        self._learned = 0  # tokens of the trained batches, each once
        self._seconds: dict[str, float] = {}
        self._work: dict[str, Work] = {}
        self._memory: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str, *, tokens: int = 0, epochs: int = 0) -> Iterator[None]:
        """Times a phase.

        Args:
            tokens: of its batch, of all ranks.
            epochs: passes over the batch where the phase is an update that learns from it.
        """
        assert self._open is None, f"phase {name} opened within another"
        device = self.mesh.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        work = self._work.setdefault(name, Work())
        work.tokens += tokens * max(1, epochs)
        self._learned += tokens if epochs else 0
        start = time.perf_counter()
        self._open = work
        try:
            with self.around(name), self.memory.explained(lambda error: name):
                yield
        finally:
            self._open = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
        self._memory[name] = max(self._memory.get(name, 0), memory_high_water(device))

    def add(self, mesh: Mesh, *, tokens: int = 0, flops: float = 0.0) -> None:
        """Adds work of one DP rank of `mesh` to the open phase, if any.

        All tp, pp and cp ranks of the DP rank may call this; it is counted once.
        """
        if self._open is not None and mesh.tp.rank == mesh.pp.rank == mesh.cp.rank == 0:
            self._open.reported_tokens += tokens
            self._open.reported_flops += flops

    def take(self) -> dict[str, float]:
        """Metrics since the last call. Collective over the world; all ranks must have had the same phases.

        For each phase seconds/NAME and memory_gb/NAME (of this rank) and, where counted, tokens_per_s/NAME and mfu/NAME
        (of all ranks); for all phases together seconds/step, mfu/step, mfu_data_sheet/step, and tokens_per_s, in which
        a trained batch counts once for all its epochs.
        """
        if not self._seconds:
            return {}
        own = [[self._work[name].reported_tokens, self._work[name].reported_flops] for name in self._seconds]
        sums = all_reduce(torch.tensor(own, dtype=torch.float64, device=self.mesh.device), self.mesh.world).tolist()
        metrics, all_flops = {}, 0.0
        peak = None if self.peak is None else self.peak * self.mesh.world.size
        for (name, seconds), (tokens, flops) in zip(self._seconds.items(), sums, strict=True):
            tokens += self._work[name].tokens
            all_flops += flops
            metrics[f"seconds/{name}"] = seconds
            if tokens:
                metrics[f"tokens_per_s/{name}"] = tokens / seconds
            if flops and peak is not None:
                metrics[f"mfu/{name}"] = flops / seconds / peak
            metrics[f"memory_gb/{name}"] = self._memory[name] / 2**30
        metrics["seconds/step"] = whole = sum(self._seconds.values())
        if peak is not None:
            metrics["mfu/step"] = all_flops / whole / peak
        if self.data_sheet is not None:
            metrics["mfu_data_sheet/step"] = all_flops / whole / (self.data_sheet * self.mesh.world.size)
        if self._learned:
            metrics["tokens_per_s"] = self._learned / whole
        self._seconds, self._work, self._memory, self._learned = {}, {}, {}, 0
        return metrics


def memory_high_water(device: torch.device) -> int:
    """Peak memory in bytes: of CUDA tensors since the counter was reset, or of the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def matmul_peak(dtype: torch.dtype, device: torch.device, seconds: float = 0.2) -> float:
    """Measured peak FLOP/s of a large square matrix product, the reference of MFU: the best run within `seconds`.

    All ranks should call it at the same time, since those of one machine share its cores. The factors are random:
    products of equal numbers toggle fewer bits, so a GPU at its power limit would run them at a higher clock than any
    real product.
    """
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, dtype=dtype, device=device, generator=generator) for _ in range(2))

    def run() -> float:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    run()  # the first call initializes libraries
    end = time.perf_counter() + seconds
    best = run()
    while time.perf_counter() < end:
        best = min(best, run())
    return 2 * size**3 / best


DATA_SHEETS = {
    "A10": 125, "A10G": 70, "A30": 165, "A40": 150, "A100": 312, "A800": 312, "L4": 121, "L40": 181, "L40S": 362,
    "H20": 148, "H100": 989, "H100 NVL": 835, "H100 PCIe": 756, "H200": 989, "H800": 989, "H800 PCIe": 756,
    "GH200": 989, "B200": 2250, "GB200": 2500,
}  # fmt: skip
"""TFLOP/s of bf16 and fp16 products with fp32 sums, without sparsity, from NVIDIA's data sheets."""


def data_sheet_peak(dtype: torch.dtype, name: str) -> float | None:
    """FLOP/s of a GPU by its data sheet; None for others than those of `DATA_SHEETS`, and for fp32.

    Args:
        name: of the device, as torch.cuda.get_device_name gives it.
    """
    words = f" {name.replace('-', ' ')} "
    found = max((gpu for gpu in DATA_SHEETS if f" {gpu} " in words), key=len, default=None)
    return DATA_SHEETS[found] * 1e12 if found and dtype in (torch.bfloat16, torch.float16) else None
