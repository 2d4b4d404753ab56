"""Time and memory of every op beside plain torch, torch.compile, liger-kernel's algorithm and bitsandbytes' NF4.

    python benchmarks/bench_kernels.py
    python benchmarks/bench_kernels.py --op logprob --op gae --dtype float32 --threads 2

The contenders take turns in one process; a turn repeats the call for some milliseconds and counts the mean. The table
has the median of the turns' ratios to trialign's time; "first" is the ratio of each turn's first call, with the caches
as the other contenders left them. Peak memory is the growth of the process in one call, "scratch" the part that is not
results. The program stops where a contender's results differ from trialign's. The row "products" is the matrix products
of trialign alone: its ratio is their part of trialign's time, and "ratio_bound" in the last line, eager's time over
that of the products, is an upper bound of any ratio. The last line is one JSON object:
{op: {"ratio": eager / trialign, ...}}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from case import Case, Run
from contenders import CASES
from ranks import refuse_ranks
from rich.console import Console
from rich.table import Table
from torch._dynamo.exc import BackendCompilerFailed
from trialign.kernels import dispatch


@dataclass(frozen=True)
class Bench:
    op: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """an op to time (may be repeated); all by default"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of the tensors, except the per-token ones, which are fp32"""
    threads: int = 1
    """torch's threads"""
    seconds: float = 4.0
    """seconds of turns for each op"""
    turn_ms: float = 10.0
    """milliseconds of a turn"""
    compile: bool = True
    """include torch.compile (several seconds of compiling for each op)"""


@dataclass(frozen=True)
class Timing:
    means: list[float]  # seconds a call, one a turn
    firsts: list[float]


def check(name: str, results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], tolerance: float) -> None:
    """ValueError where a result differs from the expected one by more than `tolerance` of its largest entry."""
    for place, (a, b) in enumerate(zip(results, expected, strict=True)):
        if b.numel() == 0 or not b.is_floating_point():
            continue
        error, scale = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
        if not error <= tolerance * scale + 1e-12:
            raise ValueError(
                f"{name}: result {place} differs from trialign's by {error:.3g}, largest entry {scale:.3g}"
            )


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_memory(run: Run) -> tuple[float, float] | None:
    """(growth of the process in one call, the same without its results) in megabytes; None off Linux.

    The allocator's free memory is returned to the system first: a call that reuses it would show no growth.
    """
    if not sys.platform.startswith("linux"):
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    results = run()
    peak = max(status("VmHWM") - before, 0) / 1e6
    return peak, max(peak - sum(x.nbytes for x in results) / 1e6, 0.0)


def turn(run: Run, seconds: float) -> tuple[float, float]:
    """(mean, first) seconds of the calls that fill the given time."""
    start = time.perf_counter()
    run()
    first = end = time.perf_counter() - start
    calls = 1
    while end < seconds:
        run()
        end = time.perf_counter() - start
        calls += 1
    return end / calls, first


def alternate(runs: dict[str, Run], bench: Bench) -> dict[str, Timing]:
    """Turns of every contender, each round starting with another, for bench.seconds and at least five rounds."""
    timings = {name: Timing([], []) for name in runs}
    names, start, rounds = list(runs), time.perf_counter(), 0
    while rounds < 5 or time.perf_counter() - start < bench.seconds:
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            mean, first = turn(runs[name], bench.turn_ms / 1e3)
            timings[name].means.append(mean)
            timings[name].firsts.append(first)
        rounds += 1
    return timings


def usable(op: str, case: Case, bench: Bench) -> dict[str, Run]:
    """The contenders that run on this machine, warmed up and checked against trialign."""
    tolerance = 2e-2 if bench.dtype == "bfloat16" else 1e-3
    runs, expected = {}, case.compare(case.runs["trialign"]())
    for name, run in case.runs.items():
        if name == "compile" and not bench.compile:
            continue
        try:
            results = case.compare(run())
        except BackendCompilerFailed as error:  # no C++ compiler
            warnings.warn(f"{op}: torch.compile does not work here: {str(error).splitlines()[0]}", stacklevel=2)
            continue
        check(f"{op} by {name}", results, expected, tolerance)
        runs[name] = run
    return runs


def ratio(times: list[float], baseline: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(times, baseline, strict=True)), 2)


def measure(op: str, bench: Bench, table: Table) -> dict[str, float | None]:
    """Times one op, adds its rows to the table and returns its numbers."""
    torch.manual_seed(0)
    case = CASES[op](getattr(torch, bench.dtype))
    runs = usable(op, case, bench)
    if case.products is not None:
        case.products()
        runs["products"] = case.products
    peaks = {name: peak_memory(run) for name, run in runs.items()}
    timings = alternate(runs, bench)
    own, numbers = timings["trialign"], {}
    for name, timing in timings.items():
        median = statistics.median(timing.means) * 1e3
        cells = [f"{median:.3f}", "", "", "-", "-"]
        numbers[f"ms_{name}"] = round(median, 4)
        if name != "trialign":
            suffix = "" if name == "eager" else f"_{name}"
            against = ratio(timing.means, own.means), ratio(timing.firsts, own.firsts)
            numbers |= {f"ratio{suffix}": against[0], f"first{suffix}": against[1]}
            cells[1:3] = (f"{r:.2f}" for r in against)
        if (peak := peaks[name]) is not None:
            numbers |= {f"peak_mb_{name}": round(peak[0], 1), f"scratch_mb_{name}": round(peak[1], 1)}
            cells[3:] = (f"{megabytes:.1f}" for megabytes in peak)
        table.add_row(*((op, case.size) if name == "trialign" else ("", "")), name, *cells)
    if "products" in timings:
        numbers["ratio_bound"] = ratio(timings["eager"].means, timings["products"].means)
    for name in case.runs.keys() - runs.keys():
        table.add_row("", "", name, "does not run on this machine" if bench.compile else "left out")
    table.add_section()
    return numbers


def main(bench: Bench) -> None:
    refuse_ranks("bench_kernels.py")
    if unknown := set(bench.op) - CASES.keys():
        raise SystemExit(f"--op {', '.join(sorted(unknown))}: allowed are {', '.join(CASES)}")
    torch.set_num_threads(bench.threads)
    if dispatch.MODE == "reference" or dispatch.PROBLEM:
        raise SystemExit(f"nothing to compare: {dispatch.PROBLEM or 'TRIALIGN_KERNELS=reference'}")
    table = Table("op", "size", "contender", "ms", "ratio", "first", "peak MB", "scratch MB")
    report = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch._inductor")
        for op in bench.op or CASES:
            print(f"{op} ...", flush=True)
            report[op] = measure(op, bench, table)
    Console(width=max(Console().width, 120)).print(table)
    print(json.dumps(report))


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
