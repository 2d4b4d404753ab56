"""launch/show_presets.py on a batch of known numbers, and its refused input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "show_presets.py"


# Two prompts with two responses each: of different lengths, one with an environment's tokens, one far from its
# sampler, one reward above every clip.
BATCH = [
    {"group": "a", "reward": 12, "logprobs": [-1.0], "old_logprobs": [-1.2], "rollout_logprobs": [-2.5],
     "ref_logprobs": [-1.5], "values": [0.5], "old_values": [0.2]},
    {"group": "a", "reward": 0, "logprobs": [-2.0, -9.0, -0.5], "old_logprobs": [-1.0, -9.0, -0.8],
     "ref_logprobs": [-1.5, -9.0, -0.8], "values": [1.0, 7.0, 0.0], "old_values": [0.4, 7.0, 0.1], "mask": [1, 0, 1]},
    {"group": "b", "reward": 1, "logprobs": [-26.0, -1.0], "old_logprobs": [-3.0, -1.0], "ref_logprobs": [-3.5, -16.0],
     "values": [1.0, 2.0], "old_values": [0.5, 0.5]},
    {"group": "b", "reward": -1, "logprobs": [-0.5, -1.0], "old_logprobs": [-4.5, -1.5], "ref_logprobs": [-1.0, -1.0],
     "values": [0.0, -1.0], "old_values": [0.0, 0.0]},
]  # fmt: skip


def run(batch: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--batch", str(batch)]
    return subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "200", "PATH": ""})


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


ROWS = {
    "kl k1": [1.75714, 1.04286, 1.75714, 1.75714, 1.04286, 1.75714],
    "kl k3": [6.14544, 2.91466, 6.14544, 2.91466, 2.91466, 2.91466],
    "reward, summed": [2.34625, 2.40875, 2.84625, 2.84625, 2.90875, 2.84625],
    "advantage (GAE)": [1.00375, 1.06571, 1.28946, 1.28, 1.35911, 1.28],
    "return": [1.24661, 1.30857, 1.53232, 1.52286, 1.60196, 1.52286],
    "whitened, largest": [2.44184, 2.43742, 2.26282, 2.26261, 2.26029, 2.26261],
    "policy loss (PPO)": [3.71191, 3.97232, 3.34431, 0.103159, 3.48169, 2.64037],
    "value loss": [6.81711, 6.74336, 10.0044, 9.82033, 9.92452, 34.2974],
    "advantage (GRPO), largest": [0.707107, 0.707107, 0.707098, 0.707107, 12, 0.707107],
    "advantage (GRPO), least": [-0.707107, -0.707107, -0.707098, -0.707107, -12, -0.707107],
    "policy loss (GRPO)": [5.67672, 5.67673, 5.79755, 0.464526, 17.4131, 4.86107],
    "policy loss (GSPO)": [1.67708, 1.67709, 1.85381, 1.67708, 4.74176, 1.67708],
    "policy loss (CISPO)": [-0.337189, -0.33719, -0.460546, -0.337189, -1.22412, -0.187083],
    "advantage (RLOO), largest": [10.01, 9.985, 12.01, 12.01, 12.01, 12.01],
    "advantage (RLOO), least": [-10.01, -10.025, -12.01, -12.01, -12.01, -12.01],
    "policy loss (RLOO)": [9.44802, 15.6528, 21.8659, 2.16396, 11.6925, 6.70298],
    "advantage (REINFORCE++), largest": [2.43035, 2.4227, 2.25535, 2.25535, 2.42225, 2.25535],
    "advantage (REINFORCE++), least": [-0.614583, -0.637635, -0.53847, -0.53847, -0.618803, -0.53847],
    "policy loss (REINFORCE++)": [4.32016, 4.49899, 4.20512, 0.127414, 4.46031, 3.00287],
    "advantage (REINFORCE++ baseline), largest": [1.84883, 1.81057, 1.70482, 1.62486, 1.7787, 1.66043],
    "advantage (REINFORCE++ baseline), least": [-1.29286, -1.31274, -1.2062, -1.21865, -1.31983, -1.21717],
    "policy loss (REINFORCE++ baseline)": [0.0262266, 0.028665, 0.310934, 0.0553403, 0.0475115, -0.210669],
    "importance weight": [1.14286, 1.38133, 0.857143, 1.14286, 1.14286, 1.14286],
    "loss (IPO)": [93.745, 93.745, 50.18, 93.745, 93.745, 93.745],
}  # fmt: skip


def test_quantities_of_a_batch_under_every_preset(tmp_path: Path) -> None:
    """Checked by hand: KL (d = 0.3; 0.5, 0; 0.5, 15; -3.5, -0.5), IPO (h = 0.7 and -8, per token 0.6 and -4), the
    weights (one of e^1.3, six of 1); GRPO's advantages are 1/sqrt(2). The functions are test_golden.py's."""
    done = run(write(tmp_path / "batch.jsonl", BATCH))
    assert done.returncode == 0, done.stderr
    lines = (line.split("│")[1:8] for line in done.stdout.splitlines() if "│" in line)
    shown = {name.strip(): [float(cell) for cell in cells] for name, *cells in lines}
    assert shown == ROWS


def test_defaults_of_absent_columns(tmp_path: Path) -> None:
    """One response a prompt: no pairs, so no IPO; no sampler's logprobs, so importance weights are 1."""
    rows = [{"reward": r, "logprobs": [-1.0, -2.0], "ref_logprobs": [-1.0, -2.0]} for r in (1, 0, 0)]
    done = run(write(tmp_path / "batch.jsonl", rows))
    assert done.returncode == 0, done.stderr
    lines = {line.split("│")[1].strip(): line.split("│")[2:8] for line in done.stdout.splitlines() if "│" in line}
    assert set(ROWS) - set(lines) == {"loss (IPO)"}
    assert [cell.strip() for cell in lines["importance weight"]] == ["1"] * 6
    # A group of one: verl gives the reward, the others 0.
    assert [cell.strip() for cell in lines["advantage (GRPO), largest"]] == ["0", "0", "0", "1", "0", "0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no sample"),
        ("nonsense", "batch.jsonl:1: not valid JSON"),
        ('{"reward": 1}', "batch.jsonl:1: needs logprobs"),
        ('{"reward": NaN, "logprobs": [0]}', "reward=nan"),
        ('{"reward": 1, "logprobs": [0, true]}', "logprobs must be"),
        ('{"reward": 1, "logprobs": [0, 3.5]}', "logprobs holds 3.5"),
        ('{"reward": 1, "logprobs": [0], "mask": [0.5]}', "mask must hold"),
        ('{"reward": 1, "logprobs": [0], "old_logprob": [0]}', "batch.jsonl:1: old_logprob"),
        ('{"reward": 1, "logprobs": [0], "values": [1, 2]}', "values has 2"),
        ('{"reward": 1, "logprobs": [0], "mask": [0]}', "mask leaves no token"),
        ('{"group": [1], "reward": 1, "logprobs": [0]}', "batch.jsonl:1: group=[1]"),
        ('{"group": "a", "reward": 1, "logprobs": [0]}\n' * 2 + '{"group": "b", "reward": 1, "logprobs": [0]}',
         "batch.jsonl:3: group='b'"),
    ],
)  # fmt: skip
def test_bad_batches_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    batch = tmp_path / "batch.jsonl"
    batch.write_text(text, encoding="utf-8")
    done = run(batch)
    assert done.returncode == 1 and message in done.stderr
