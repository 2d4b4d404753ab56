"""Runs of launch scripts and of test functions on a fake CUDA device (fake_device.py)."""

import hashlib
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import Ended, Forked
from scripts import ROOT

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or ""
HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent


def build_guard() -> Path:
    """The compiled guard.cpp, in build/; takes a second or two the first time."""
    source = HERE / "guard.cpp"
    key = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    target = ROOT / "build" / "fake_cuda" / f"guard-{key}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
        libraries = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
        aside = target.with_suffix(f".{os.getpid()}")
        command = [COMPILER, "-std=c++20", "-O0", "-shared", "-fPIC", "-w", *includes, str(source), "-o", str(aside)]
        subprocess.run([*command, *libraries], check=True)
        os.replace(aside, target)
    return target


class FakeCuda:
    """A process that forks ranks with fake CUDA devices, until `close`."""

    def __init__(self) -> None:
        self.forked = Forked(sys.executable, str(HERE / "with_guard.py"), str(TORCH), str(build_guard()))

    def script(self, script: str, *arguments: object, ranks: int = 1) -> tuple[Ended, list[dict[str, Any]]]:
        """Runs a launch script; how its ranks ended, and their ledgers."""
        with tempfile.TemporaryDirectory() as folder:
            ended = self.forked.run(script, *arguments, ranks=ranks, ledgers=Path(folder))
            files = [Path(folder, f"rank_{rank}.json") for rank in range(ranks)]
            return ended, [json.loads(file.read_text()) for file in files if file.exists()]

    def call(self, function: Callable, *arguments: Any, ranks: int = 1) -> list[Any]:
        """Runs a function of a test file's top level on every rank, in a process group of NCCL where there are several;
        its results. AssertionError with the output if it fails."""
        with tempfile.TemporaryDirectory() as folder:
            job = (sys.path, function.__module__, function.__name__, arguments)
            Path(folder, "job").write_bytes(pickle.dumps(job))
            ended = self.forked.run(str(HERE / "fake_run"), folder, ranks=ranks, ledgers=Path(folder))
            assert not any(ended.codes), ended.output
            return [pickle.loads(Path(folder, f"{rank}.result").read_bytes()) for rank in range(ranks)]

    def close(self) -> None:
        self.forked.close()


def _call(folder: Path) -> None:
    """One rank of `FakeCuda.call`."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sys.path[:], module, name, arguments = pickle.loads((folder / "job").read_bytes())
    if ranks > 1:
        dist.init_process_group("nccl", init_method="env://")
    result = getattr(importlib.import_module(module), name)(*arguments)
    (folder / f"{rank}.result").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _call(Path(sys.argv[1]))
