"""CUDA graphs of decode steps: a step is captured once a padded number of rows and replayed, so that the host launches
one graph instead of some hundred kernels.

A captured step reads and writes the same addresses at every replay: the lane's buffers, the weights and the cache. So
graphs live no longer than the cache of a rollout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .lane import Lane

MAX_BYTES = 2 << 30
"""Memory that the graphs of a generator may take; steps of further sizes run without a graph."""
TOLERANCE = 0.01
"""Largest median difference of logprobs between a step and its captured replay."""


def padded(rows: int) -> int:
    """The number of rows that a step of `rows` rows is padded to: 1, 2, 4, multiples of 8, of 16 above 128."""
    if rows <= 4:
        return rows if rows < 3 else 4
    unit = 8 if rows <= 128 else 16
    return -(-rows // unit) * unit


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    hidden: Tensor | None  # [rows, hidden], the input of a stage after the first
    output: Tensor


class DecodeGraphs:
    """Captured decode steps.

    Args:
        decode: (lane, rows, hidden states or None, whether stop ids may be masked) -> a step's output, [rows, ...].
            Without host synchronization, copies from the host, or shapes that depend on data.
    """

    def __init__(self, decode: Callable[[Lane, int, Tensor | None, bool], Tensor]) -> None:
        self.decode = decode
        self._seen: set[tuple] = set()
        self._captured: dict[tuple, _Captured] = {}
        self._pool = None
        self._bytes = 0

    def run(self, lane: Lane, rows: int, hidden: Tensor | None, masked: bool) -> Tensor:
        """The output of a step, [rows, ...]. A size is captured when it is met a second time: by then its kernels are
        compiled.

        Raises:
            RuntimeError: the first replay of a graph gives other numbers than the step without it.
        """
        size = padded(rows)
        key = (id(lane), size, masked, lane.tables.data_ptr(), lane.stop_ids.data_ptr())
        if hidden is not None:
            hidden = F.pad(hidden, (0, 0, 0, size - rows))
        captured = self._captured.get(key)
        if captured is not None:
            if captured.hidden is not None and hidden is not None:
                captured.hidden.copy_(hidden)
            captured.graph.replay()
            return captured.output[:rows]
        output = self.decode(lane, size, hidden, masked)
        if key in self._seen and self._bytes < MAX_BYTES:
            self._captured[key] = self._capture(lane, size, hidden, masked, output)
        self._seen.add(key)
        return output[:rows]

    def _capture(self, lane: Lane, rows: int, hidden: Tensor | None, masked: bool, expected: Tensor) -> _Captured:
        """Captures a step that has just run, and checks its replay, which writes the same keys and values again."""
        device, static = lane.state.device, None if hidden is None else hidden.clone()
        before, graph = torch.cuda.memory_reserved(device), torch.cuda.CUDAGraph()
        # Other threads (NCCL's, the watchdog) may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = self.decode(lane, rows, static, masked)
        self._pool = graph.pool()
        self._bytes += torch.cuda.memory_reserved(device) - before
        graph.replay()
        # The median: one sampled token in a thousand may differ where a library chooses another algorithm.
        error = (output[:, -1].double() - expected[:, -1].double()).abs().median().item()
        if not error <= TOLERANCE:
            raise RuntimeError(
                f"a captured decode step of {rows} rows differs from the same step without it by {error}"
            )
        return _Captured(graph, static, output)
