"""Checks and timings for the first hours on a GPU, in one report: what runs, whether the numbers are right, how fast.

    make gpu-check                                              # on a GPU, under 10 minutes
    python benchmarks/gpu_check.py --model DIR --device cpu     # the same sections on a CPU

Sections run one after the other in processes of their own, each with a limit of time. One that fails is reported and
the next goes on; the exit code is 1 if any has failed. The report is one Markdown file with all numbers as JSON at its
end. docs/gpu.md says how to read it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from ranks import refuse_ranks

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STEPS = 3
TOLERANCES = ((1e-4, 1e-5), (1e-3, 1e-4), (1e-3, 1e-4))
"""(relative, absolute) difference of a step's metrics that is allowed; in the first step nearly all come before any
update. Two SIMD levels of the C++ differ by at most 5e-5 in the first step and 2e-4 later."""
NOISE = ("seconds", "tokens_per_s", "mfu", "memory_gb", "time", "sampler_mismatch", "first_ratio", "ratio_", "clip_")
"""Beginnings of the names of metrics that are costs, sizes of rounding errors, extremes or counts."""
SAMPLED = 0.75
"""Fraction of the first step's responses that the device must sample as the CPU does: rounding may turn a token."""

Found = tuple[list[str], dict[str, Any]]  # problems, numbers


@dataclass(frozen=True)
class Check:
    model: str
    """folder of a chat model in Hugging Face format; make gpu-check gives SmolLM2-135M-Instruct"""
    device: Literal["cuda", "cpu"] = "cuda"
    """device whose numbers and times are taken"""
    output: Path = Path("runs/gpu_check")
    """folder of report.md; replaced"""
    config: Path = ROOT / "launch/configs/ppo_smollm2.toml"
    """config of the compared PPO steps"""
    prompts: int = 0
    """prompts of a compared PPO step (0: 8 on a GPU, 4 on a CPU)"""
    tests: tuple[str, ...] = (str(ROOT / "tests"),)
    """files or folders of the tests"""
    rows: tuple[int, ...] = ()
    """sequences that are generated together (empty: 1, 32 and, on a GPU, 256)"""
    tokens: int = 0
    """tokens of a response in timings (0: 128 on a GPU, 32 on a CPU)"""
    samples: int = 0
    """samples of 512 tokens in a micro-batch (0: 8 on a GPU, 1 on a CPU)"""
    vllm: str = ""
    """Python of an environment with vLLM (empty: this one, if vLLM is installed in it)"""
    minutes: float = 9.5
    """limit of the whole check; a section may take its share of it and what earlier ones have left"""


@dataclass(frozen=True)
class Section:
    """A part of the check: a command, its share of the time, and the reader of its output."""

    name: str
    command: list[str]
    share: float
    read: Callable[[str], Found]
    environment: dict[str, str] = field(default_factory=dict)
    allowed: tuple[int, ...] = (0,)  # exit codes


@dataclass(frozen=True)
class Result:
    name: str
    command: str
    seconds: float
    problems: list[str]
    numbers: dict[str, Any]
    output: str  # its end, where there are problems


def sections(check: Check) -> list[Section]:
    """All sections in their order."""
    gpu, work = check.device == "cuda", check.output
    rows = check.rows or ((1, 32, 256) if gpu else (1, 32))
    tokens, samples = check.tokens or (128 if gpu else 32), check.samples or (8 if gpu else 1)
    given = ["--model", check.model, "--device", check.device]
    ppo = [*script("ppo_steps"), str(STEPS), str(work / "rollouts"), "--config", str(check.config)]
    ppo += ["--model.path", check.model, "--model.dtype", "float32", "--run.show", "0"]
    ppo += ["--run.prompts_per_step", str(check.prompts or (8 if gpu else 4))]
    on_cpu = [*ppo, "--parallel.device", "cpu", "--run.output", str(work / "cpu")]
    on_device = [*ppo, "--parallel.device", check.device, "--run.output", str(work / "device")]
    compare = lambda _: compared(work / "cpu", work / "device")  # noqa: E731
    other = {} if gpu else {"TRIALIGN_KERNELS": "baseline"}  # on a CPU: C++ that adds in another order, without SIMD
    step = [*script("bench_step"), *given, "--rows", *map(str, rows), "--samples", str(samples)]
    step += ["--steps", str(min(32, tokens // 2)), "--repeats", "5" if gpu else "2"]
    vllm = check.vllm or (sys.executable if importlib.util.find_spec("vllm") else "")
    sizes = ["--new-tokens", str(tokens), "--repeats", "3" if gpu else "1", *(["--vllm", vllm] if vllm else [])]
    generate = [[*script("bench_generate"), *given, "--batch", str(count), *sizes] for count in rows]
    iteration = [*script("bench_ppo"), *given, "--prompts", "256" if gpu else "4", "--new-tokens", str(tokens)]
    iteration += ["--iters", "3" if gpu else "2", "--micro", str(4 * samples)]
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *check.tests]
    return [
        Section("environment", [*script("environment"), "--device", check.device], 0.1, last_json),
        Section("PPO on the CPU", on_cpu, 0.2, lambda _: ([], {})),
        Section("PPO compared with the CPU", on_device, 0.2, compare, other),
        Section("decode step and micro-batch", step, 0.15, last_json),
        *(Section(f"generation: {n}", words, 0.08, last_json) for n, words in zip(rows, generate, strict=True)),
        Section("PPO iteration", iteration, 0.1, last_json),
        Section("tests", tests, 0.3, lambda output: counted(output, gpu), allowed=(0,) if gpu else (0, 5)),
    ]


def script(name: str) -> list[str]:
    """The command of a script of this folder."""
    return [sys.executable, str(HERE / f"{name}.py")]


def last_json(output: str) -> Found:
    """The JSON object in the last line."""
    return [], json.loads(output.splitlines()[-1])


def counted(output: str, gpu: bool) -> Found:
    """Tests by result, from the last line of pytest."""
    numbers = {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", output.splitlines()[-1])}
    none = gpu and not numbers.get("passed")
    return ["no test ran on the GPU"] if none else [], {name: n for name, n in numbers.items() if name != "warnings"}


def compared(cpu: Path, device: Path) -> Found:
    """Metrics of the steps on both, which learn from the same rollouts."""
    problems, numbers = [], {}
    runs = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (cpu, device))
    for (relative, absolute), (expected, got) in zip(TOLERANCES, zip(*runs, strict=True), strict=True):
        worst = ("", 0.0)
        for name, value in expected.items():
            if name.startswith(NOISE):
                continue
            limit = relative * abs(value) + absolute
            error = abs(got.get(name, float("nan")) - value) / limit
            if not error <= 1:
                problems.append(f"step {expected['step']}: {name} is {got.get(name)}, on the CPU {value}")
            worst = max(worst, (name, error), key=lambda found: found[1])
        numbers[f"step {expected['step']}: largest difference in units of the limit"] = {worst[0]: worst[1]}
        for name in ("value_loss", "critic_grad_norm", "actor_grad_norm", "kl", "sampler_mismatch_max"):
            numbers[f"step {expected['step']}: {name}"] = {"cpu": expected.get(name), "device": got.get(name)}
    numbers["responses sampled as on the CPU, by step"] = same = json.loads((device / "sampled.json").read_text())
    if same[0] < SAMPLED:
        problems.append(f"{same[0]:.0%} of the first step's responses are those of the CPU; allowed: {SAMPLED:.0%}")
    return problems, numbers


def run(section: Section, limit: float) -> Result:
    """Runs a section for at most `limit` seconds."""
    start = time.perf_counter()
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "MPLBACKEND": "Agg"} | os.environ
    problems, numbers = [], {}
    # A session of its own: where the time is up, its workers end with it.
    process = subprocess.Popen(
        section.command,
        env=environment | section.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=max(1.0, limit))[0]
        if process.returncode not in section.allowed:
            problems.append(f"exit code {process.returncode}")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output = process.communicate()[0]
        problems.append(f"not finished after {limit:.0f} s")
    if not problems:
        try:
            problems, numbers = section.read(output)
        except (ValueError, IndexError, OSError, KeyError, TypeError) as error:
            problems.append(f"its output cannot be read: {error!r}")
    words = shlex.join(section.command)
    seconds, end = round(time.perf_counter() - start, 1), "\n".join(output.splitlines()[-40:]) if problems else ""
    return Result(section.name, words, seconds, problems, numbers, end)


def table(numbers: dict[str, Any], prefix: str = "") -> list[str]:
    """Rows of a Markdown table; nested names are joined by dots."""
    rows = []
    for name, value in numbers.items():
        if isinstance(value, dict):
            rows += table(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            rows += [row for i, part in enumerate(value) for row in table(part, f"{prefix}{name}.{i}.")]
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            rows.append(f"| {prefix}{name} | {shown} |")
    return rows


def markdown(results: list[Result]) -> str:
    """The report."""
    lines = ["# GPU check", "", "| section | result | seconds |", "|---|---|---|"]
    lines += [f"| {r.name} | {'; '.join(r.problems) or 'ok'} | {r.seconds} |" for r in results]
    for result in results:
        lines += ["", f"## {result.name}", "", f"`{result.command}`", ""]
        lines += [f"**{problem}**" for problem in result.problems]
        if result.numbers:
            lines += ["| | |", "|---|---|", *table(result.numbers)]
        if result.output:
            lines += ["", "```", result.output.replace("```", "'''"), "```"]
    document = json.dumps([asdict(result) for result in results], indent=1)
    return "\n".join([*lines, "", "## JSON", "", "```json", document, "```", ""])


def main(check: Check) -> None:
    refuse_ranks("gpu_check.py")
    shutil.rmtree(check.output, ignore_errors=True)
    check.output.mkdir(parents=True)
    start, given, results = time.perf_counter(), 0.0, []
    for section in sections(check):
        given += section.share
        limit = 60 * check.minutes * min(1.0, given) - (time.perf_counter() - start)
        result = run(section, limit)
        results.append(result)
        print(f"{section.name}: {'; '.join(result.problems) or 'ok'} ({result.seconds:.0f} s)", flush=True)
        (check.output / "report.md").write_text(markdown(results))
    for name in ("cpu", "device", "rollouts"):
        path = check.output / name
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    print(f"report: {check.output / 'report.md'}")
    sys.exit(any(result.problems for result in results))


if __name__ == "__main__":
    main(tyro.cli(Check, description=__doc__))
