"""What the phases of a step cost: seconds, tokens/s, model FLOPs utilization (MFU) and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass
class Phase:
    """What was done in a phase, over all ranks; set inside the `with`."""

    tokens: int = 0
    flops: float = 0.0


class Profiler:
    """Times phases by name. One that is entered several times a step adds up.

        phases = Profiler(device, world, peak=matmul_peak(dtype, device))
        with phases("rollout") as phase:
            ...
            phase.tokens, phase.flops = 1000, forward_flops(shape, lengths)
        metrics = phases.take()

    Args:
        world: ranks that share the work that `Phase` counts.
        peak: FLOP/s one rank can reach.
        around: entered around a phase with its name, to display it.
    """

    def __init__(
        self,
        device: torch.device,
        world: int = 1,
        *,
        peak: float,
        around: Callable[[str], AbstractContextManager[None]] = nullcontext,
    ):
        self.device, self.peak, self.around = device, peak * world, around
        self._seconds: dict[str, float] = {}
        self._work: dict[str, Phase] = {}
        self._memory: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[Phase]:
        phase = Phase()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        with self.around(name):
            yield phase
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
        work = self._work.setdefault(name, Phase())
        work.tokens += phase.tokens
        work.flops += phase.flops
        self._memory[name] = max(self._memory.get(name, 0), memory_high_water(self.device))

    def take(self) -> dict[str, float]:
        """The metrics since the last call: for each phase seconds/NAME, memory_gb/NAME and, where they were counted,
        tokens_per_s/NAME and mfu/NAME; and over all phases seconds/step and mfu/step."""
        metrics = {}
        for name, seconds in self._seconds.items():
            work = self._work[name]
            metrics[f"seconds/{name}"] = seconds
            if work.tokens:
                metrics[f"tokens_per_s/{name}"] = work.tokens / seconds
            if work.flops:
                metrics[f"mfu/{name}"] = work.flops / seconds / self.peak
            metrics[f"memory_gb/{name}"] = self._memory[name] / 2**30
        whole = sum(self._seconds.values())
        if whole:
            metrics["seconds/step"] = whole
            metrics["mfu/step"] = sum(work.flops for work in self._work.values()) / whole / self.peak
        self._seconds, self._work, self._memory = {}, {}, {}
        return metrics


def memory_high_water(device: torch.device) -> int:
    """Bytes: the most that CUDA tensors took since the counter was reset, or the process on the CPU since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def matmul_peak(dtype: torch.dtype, device: torch.device, seconds: float = 0.2) -> float:
    """FLOP/s of a large square matrix product, the best of what fits in `seconds`: what MFU is measured against.

    All ranks should call it together, for ranks that share a machine's cores share its peak.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))

    def run() -> float:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    run()  # the first call sets up libraries
    end = time.perf_counter() + seconds
    best = run()
    while time.perf_counter() < end:
        best = min(best, run())
    return 2 * size**3 / best


class Shape(Protocol):
    """The sizes of a decoder that its FLOPs depend on."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def mlp_weights(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


def forward_flops(shape: Shape, lengths: Sequence[int], head_rows: int = 0) -> float:
    """FLOPs of one forward pass; a backward pass has twice as many, generating the same tokens as many.

    Matrix products only: 2 for each weight and token; causal attention has 4·width for each pair of tokens.

    Args:
        lengths: tokens of each sequence.
        head_rows: tokens whose vocabulary logits are computed (0 for a scalar head, which costs nothing next to it).
    """
    width = shape.num_heads * shape.head_dim
    kv = shape.num_kv_heads * shape.head_dim
    weights = shape.num_layers * shape.hidden_size * (2 * width + 2 * kv) + shape.mlp_weights
    tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    body = 2.0 * weights * tokens + shape.num_layers * 4.0 * width * pairs
    return body + 2.0 * shape.hidden_size * shape.vocab_size * head_rows
