"""Starts scripts of launch/ as a user does, kills them, and reads what they leave."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}


def command(script: str, *arguments: object, ranks: int = 1) -> list[str]:
    """The words of `python launch/SCRIPT.py ...`, or of torchrun."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    return [sys.executable, *launcher, str(ROOT / "launch" / f"{script}.py"), *map(str, arguments)]


def launch(script: str, *arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end."""
    return subprocess.run(
        command(script, *arguments, ranks=ranks),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def succeed(script: str, *arguments: object, ranks: int = 1) -> str:
    """Runs a script that must succeed; what it printed."""
    done = launch(script, *arguments, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_after(file: str, folder: Path, script: str, *arguments: object) -> None:
    """Starts a script that writes into `folder`, and kills it as soon as a file there matches the pattern."""
    process = subprocess.Popen(
        command(script, *arguments),
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob(file)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def digests(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint that training fills."""
    last = run / "checkpoints" / f"step_{step}"
    files = [*sorted(last.glob("*.safetensors")), last / "state.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def metrics(run: Path) -> list[dict[str, float]]:
    """The logged steps without what they cost."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    costs = ("time", "seconds", "tokens_per_s", "mfu", "memory_gb")
    return [{name: value for name, value in line.items() if not name.startswith(costs)} for line in lines]


def options(**given: object) -> list[str]:
    """`model_path="m"` as `--model.path m`; a tuple as several words."""
    words = []
    for name, value in given.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '.', 1)}", *map(str, values)]
    return words
