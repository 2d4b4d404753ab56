"""launch/convention.py on a batch of known numbers, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "launch" / "convention.py"


def run(batch: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--batch", str(batch)]
    return subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "200", "PATH": ""})


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_side_by_side(tmp_path: Path) -> None:
    rows = [{"group": 0, "reward": r, "logprobs": [-1.0, -2.0], "ref_logprobs": [-1.0, -2.0]} for r in (1, 0, 0, 0)]
    done = run(write(tmp_path / "batch.jsonl", rows))
    assert done.returncode == 0, done.stderr
    lines = {line.split("│")[1].strip(): line.split("│")[2:] for line in done.stdout.splitlines() if "│" in line}
    # The winner of rewards [1, 0, 0, 0]: 0.75 over the deviation 0.5, leave-one-out 1 (its siblings do not differ).
    assert [cell.strip() for cell in lines["group advantage, largest"][:6]] == [
        "1.5", "1.5", "1.4997", "1.5", "1", "1.5"
    ]  # fmt: skip
    assert [cell.strip() for cell in lines["kl k1"][:6]] == ["0"] * 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no sample"),
        ("nonsense", "batch.jsonl:1: not JSON"),
        ('{"reward": 1}', "batch.jsonl:1: needs logprobs"),
        ('{"reward": "much", "logprobs": [0]}', "reward='much': must be a number"),
        ('{"reward": 1, "logprobs": [0], "values": [1, 2]}', "values has 2 numbers, logprobs 1"),
        ('{"reward": 1, "logprobs": [0], "mask": [0]}', "mask leaves no token"),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    batch = tmp_path / "batch.jsonl"
    batch.write_text(text, encoding="utf-8")
    done = run(batch)
    assert done.returncode == 1 and message in done.stderr
