"""A decode step and a micro-batch: milliseconds, kernels, launches, host synchronizations; tokens/s.

    python benchmarks/bench_step.py --model DIR --device cuda --rows 1 32 256

Each number is a difference, of generations of two lengths or of optimizer steps of one and two micro-batches, without
what comes once or belongs to the rest of a step. Times are those of the fastest runs, since others on the machine only
add to them. On a CPU, where nothing is launched or waited for, the operators are counted. The last line is one JSON
object.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from ranks import refuse_ranks
from torch.profiler import ProfilerActivity, profile
from trialign.algorithms.batch import pack
from trialign.algorithms.config.common import OptimizerConfig, ParallelConfig
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.algorithms.sft import sft_step
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import SamplingParams
from trialign.engine.mesh import build_mesh
from trialign.engine.profiler import matmul_peak
from trialign.models.families.registry import read_config
from trialign.models.flops import forward_flops

Call = Callable[[], object]
WAITS = ("Synchronize", "cudaMemcpy")  # of CUDA's runtime; a copy with Async in its name does not wait
LAUNCHES = ("LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync")


@dataclass(frozen=True)
class Bench:
    model: str
    """folder of a causal language model in Hugging Face format"""
    rows: tuple[int, ...] = (1, 32)
    """sequences that decode together"""
    prompt_tokens: int = 32
    """random tokens of a prompt"""
    steps: int = 16
    """decode steps whose mean is taken"""
    samples: int = 8
    """samples of a micro-batch"""
    tokens: int = 512
    """tokens of a sample"""
    repeats: int = 5
    """timed runs of each, after one warm-up; the fastest counts"""
    recompute: Literal["auto", "none", "full"] = "auto"
    """activation checkpointing, as parallel.recompute"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """compute dtype"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def counts(run: Call, device: torch.device) -> dict[str, int]:
    """Kernels, copies, launches and host synchronizations of a call; operators on a CPU."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as seen:
        run()
        wait(device)
    events = seen.events() or []
    names = [event.name for event in events if event.device_type.name == "CPU"]
    if device.type != "cuda":
        operators = [
            e for e in events if e.name.startswith(("aten::", "trialign::", "mkldnn::")) and not e.cpu_children
        ]
        return {"operators": len(operators)}
    on_device = [event for event in events if event.device_type.name == "CUDA"]
    return {
        "kernels": sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device),
        "copies": sum(event.name.startswith("Memcpy") for event in on_device),
        "launches": sum(name.startswith("cu") and any(word in name for word in LAUNCHES) for name in names),
        "synchronizations": sum(
            name.startswith("cu") and "Async" not in name and any(word in name for word in WAITS) for name in names
        ),
    }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Call, device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def difference(short: Call, long: Call, units: int, bench: Bench, device: torch.device) -> dict[str, float]:
    """Milliseconds and counts of one of the `units` that `long` does more than `short`."""
    for run in (short, long):
        run()
    pairs = [(seconds(short, device), seconds(long, device)) for _ in range(bench.repeats)]
    low, high = (min(times) for times in zip(*pairs, strict=True))
    few, many = counts(short, device), counts(long, device)
    return {"ms": 1e3 * (high - low) / units} | {name: (many[name] - few[name]) / units for name in many}


def decode(bench: Bench, rows: int) -> dict[str, float]:
    """A decode step of so many sequences."""
    mesh, config = build_mesh(device=bench.device), read_config(bench.model)
    model = build_decoder(bench.model, config, mesh, bench.dtype)
    length = bench.prompt_tokens + 2 * bench.steps
    generator = EmbeddedGenerator(model, mesh, max_running=rows, max_length=length)
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(config.vocab_size, (rows, bench.prompt_tokens), generator=random).tolist()

    def run(tokens: int) -> None:
        generator.generate(prompts, list(range(rows)), SamplingParams(temperature=1.0, max_new_tokens=tokens))

    found = difference(lambda: run(bench.steps), lambda: run(2 * bench.steps), bench.steps, bench, mesh.device)
    return {"rows": rows, **found, "tokens_per_s": rows / found["ms"] * 1e3}


def micro_batch(bench: Bench) -> dict[str, float]:
    """Forward and backward of a micro-batch of a policy that learns, with the logprobs of all its tokens."""
    mesh, config = build_mesh(device=bench.device), read_config(bench.model)
    parallel = ParallelConfig(recompute=bench.recompute)
    model = build_decoder(bench.model, config, mesh, bench.dtype, trained=True, parallel=parallel)
    learner = build_learner(model, OptimizerConfig(), 100, sizes=UpdateConfig(micro_batch_size=bench.samples))
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(config.vocab_size, (2 * bench.samples, bench.tokens), generator=random).tolist()
    one, two = (pack(rows[: n * bench.samples]).to(mesh.device) for n in (1, 2))
    found = difference(lambda: sft_step(learner, one), lambda: sft_step(learner, two), 1, bench, mesh.device)
    flops = 3 * forward_flops(config, [bench.tokens] * bench.samples, bench.samples * (bench.tokens - 1))
    rate = flops / found["ms"] * 1e3
    return {
        "tokens": bench.samples * bench.tokens,
        **found,
        "tokens_per_s": bench.samples * bench.tokens / found["ms"] * 1e3,
        "mfu": rate / matmul_peak(getattr(torch, bench.dtype), mesh.device),
    }


def main(bench: Bench) -> None:
    refuse_ranks("bench_step.py")
    with torch.inference_mode():
        steps = [decode(bench, rows) for rows in bench.rows]
    report = {"decode_step": steps, "micro_batch": micro_batch(bench)}
    for found in (*steps, report["micro_batch"]):
        print("  ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
