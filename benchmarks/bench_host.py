"""Microseconds of the host in a decode step: the scheduler in C++ beside its reference in Python, taking turns.

    python benchmarks/bench_host.py --running 256

A step commits the last step's results, retires and plans, and takes the arrays that the device gets. Sequences end and
follow one another, so that some steps admit. Packing of a batch into micro-batches is timed too. The last line printed
is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro
from trialign.algorithms import micro_batch
from trialign.engine.generation.interface import SamplingParams
from trialign.engine.generation.scheduler import Scheduler
from trialign.engine.host import HOST
from trialign.engine.mesh import Axis


@dataclass(frozen=True)
class Bench:
    running: int = 256
    """sequences that run at once"""
    prompt_tokens: int = 512
    """tokens of a prompt"""
    new_tokens: int = 256
    """limit of a response; lengths are spread up to it"""
    samples: int = 4
    """of a prompt, which share its blocks"""
    steps: int = 1000
    """timed steps"""
    parts: int = 8
    """DP ranks of the packing"""


def serve(scheduler: Any, bench: Bench) -> list[float]:
    """Seconds of each step."""
    rng, seconds, step = np.random.default_rng(0), [], None
    results = np.stack((np.ones(bench.running), np.full(bench.running, -1.0)), 1)
    number, params = 0, SamplingParams(max_new_tokens=bench.new_tokens, stop_ids=(2,))
    for _ in range(bench.steps):
        while scheduler.alive < 2 * bench.running:
            prompt = [number // bench.samples % 1000] * bench.prompt_tokens
            scheduler.add(number, prompt, params, number)
            number += 1
        if step is not None:
            results[: step.size, 0] = np.where(rng.random(step.size) < 2 / bench.new_tokens, 2, 1)
        start = time.perf_counter()
        if step is not None:
            scheduler.commit(step, results[: step.size], 0)
        scheduler.retire(0)
        scheduler.take_ended()
        step = scheduler.plan(0)
        assert step is not None
        arrays(step, scheduler.width)
        seconds.append(time.perf_counter() - start)
    return seconds


def arrays(step: Any, width: int) -> tuple:
    """All that the device gets of a step."""
    new = step.new_rows(width, 1) if step.kept < step.size else None
    return step.moved, step.grown, step.copies, new, step.prefill() if step.decoding < step.size else None


def timed(function: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main(bench: Bench) -> None:
    if HOST is None:
        raise SystemExit("error: trialign._host is not built here")
    report: dict[str, float] = {}
    lengths = np.random.default_rng(0).integers(100, 4000, 4 * bench.running).tolist()
    rows, dp = list(range(len(lengths))), Axis("dp", bench.parts, 0, tuple(range(bench.parts)), None, None)
    for name, implementation in {"cpp": HOST.Scheduler, "python": Scheduler}.items():
        blocks = 2 * bench.running * (bench.prompt_tokens + bench.new_tokens) // 16
        limits = {"max_running": bench.running, "prefill_tokens": 4096}
        seconds = serve(implementation(16, blocks, **limits), bench)[bench.steps // 4 :]
        micro_batch.HOST = HOST if name == "cpp" else None
        packing = timed(lambda: micro_batch.deal_micro_batches(rows, lengths, dp, 0, 16384))
        report |= {
            f"{name}_step_us": statistics.median(seconds) * 1e6,
            f"{name}_mean_us": statistics.mean(seconds) * 1e6,
        }
        report |= {f"{name}_packing_us": packing * 1e6}
    report["ratio"] = report["python_step_us"] / report["cpp_step_us"]
    print(json.dumps({name: round(value, 1) for name, value in report.items()}))


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
