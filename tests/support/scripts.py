"""Runs of launch scripts as users start them, killed runs, and readers of their outputs.

As a program under torchrun: several scripts in turn in the same ranks, which import everything once.
"""

import hashlib
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from trialign.engine.storage.checkpoint import Reader

ROOT = Path(__file__).resolve().parents[2]
AXES = ("tp", "pp", "dp")  # of the mesh
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}


def command(script: str, *arguments: object, ranks: int = 1) -> list[str]:
    """`python launch/SCRIPT.py ...` or, for several ranks, its torchrun command."""
    launcher = [sys.executable] if ranks == 1 else torchrun(ranks)
    return [*launcher, str(ROOT / "launch" / f"{script}.py"), *map(str, arguments)]


def torchrun(ranks: int) -> list[str]:
    """The torchrun command before a script."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]


def _run(words: Sequence[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ENVIRONMENT
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def launch(script: str, *arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end."""
    return _run(command(script, *arguments, ranks=ranks))


def succeed(script: str, *arguments: object, ranks: int = 1) -> str:
    """Runs a script that must succeed; returns its stdout."""
    done = launch(script, *arguments, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def succeed_in_turn(runs: Sequence[Sequence[object]], ranks: int = 2) -> None:
    """`succeed(*run, ranks=ranks)` of each under one torchrun, which ends at the first failure."""
    jobs = json.dumps([list(map(str, run)) for run in runs])
    done = _run([*torchrun(ranks), __file__, jobs], timeout=300 * len(runs))
    assert done.returncode == 0, done.stdout + done.stderr


def start(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Starts a script without waiting for its end."""
    null = subprocess.DEVNULL
    return subprocess.Popen(command(script, *arguments), env=os.environ | ENVIRONMENT, stdout=null, stderr=null)


def kill_after(file: str, folder: Path, script: str, *arguments: object) -> None:
    """Starts a script and kills it as soon as a file in `folder` matches the pattern."""
    process = start(script, *arguments)
    deadline = time.monotonic() + 120
    while not list(folder.glob(file)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()


def assert_resume_identical(file: str, folder: Path, whole: Path, step: int, script: str, *arguments: object) -> str:
    """Kills a script when `file` appears in `folder`, resumes it, and compares it bit for bit with the run `whole` of
    `step` steps; returns the resumed run's stdout."""
    kill_after(file, folder, script, *arguments, "--run.output", folder)
    assert not (folder / "checkpoints" / f"step_{step}").exists(), "killed after the last step"
    printed = succeed(script, "--resume", folder)
    assert digests(folder, step) == digests(whole, step) and metrics(folder) == metrics(whole)
    return printed


def digests(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of each tensor file of a checkpoint, and its state without the options."""
    last = run / "checkpoints" / f"step_{step}"
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(last.glob("*.safetensors"))}
    state = json.loads((last / "state.json").read_text())
    return sums | {"state.json": json.dumps({name: value for name, value in state.items() if name != "facts"})}


def metrics(run: Path) -> list[dict[str, float]]:
    """The logged steps without their costs (time, throughput, memory)."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    costs = ("time", "seconds", "tokens_per_s", "mfu", "memory_gb")
    return [{name: value for name, value in line.items() if not name.startswith(costs)} for line in lines]


def options(**given: object) -> list[str]:
    """`model_path="m"` as `--model.path m`; a tuple as several arguments."""
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in given.items()}
    return [word for name, own in values.items() for word in (f"--{name.replace('_', '.', 1)}", *map(str, own))]


def agree(run: Path, other: Path, step: int, tolerance: float = 1e-5, logged: bool = False) -> None:
    """Asserts that weights and averages of two checkpoints differ by at most `tolerance` of each tensor's maximum;
    logged: that the logged metrics are equal within 1e-4 too."""
    for found, expected in zip(metrics(run), metrics(other), strict=True) if logged else ():
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), run.name
    actual, reference = (Reader(folder / "checkpoints" / f"step_{step}") for folder in (run, other))
    compared = [name for name in reference.tensors if "/master/" in name or "/ema/" in name]
    assert compared and actual.tensors.keys() == reference.tensors.keys()
    for name in compared:
        expected = reference.read(name)
        limit = tolerance * expected.abs().max().item()
        torch.testing.assert_close(actual.read(name), expected, rtol=0, atol=limit, msg=f"{run.name}: {name}")


def rewound(run: Path, folder: Path, step: int) -> Path:
    """Copies a run to `folder` without the checkpoints after this step."""
    shutil.copytree(run, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    assert (folder / "checkpoints" / f"step_{step}").exists()
    return folder


def _in_turn(jobs: list[list[str]]) -> None:
    """One rank of `succeed_in_turn`. Each run has keys of its own in the launcher's store."""
    sys.path[0] = str(ROOT / "launch")
    env: Any = importlib.import_module("common.env")
    for number, (script, *arguments) in enumerate(jobs):
        store, rank, size = next(iter(rendezvous("env://")))
        own = PrefixStore(f"run {number}", store)
        env.rendezvous = lambda *_, own=own, rank=rank, size=size, **__: iter([(own, rank, size)])
        sys.argv = [f"{script}.py", *arguments]
        print(*sys.argv, flush=True)
        runpy.run_path(str(ROOT / "launch" / sys.argv[0]), run_name="__main__")


if __name__ == "__main__":
    _in_turn(json.loads(sys.argv[1]))
