"""launch/show_presets.py on a batch of known numbers, and its refused input."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from samples import write_jsonl

# Of different lengths, one with an environment's tokens, one far from its sampler, one reward above every clip.
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


def cells(batch: Path) -> dict[str, list[float]]:
    """The table's numbers by quantity."""
    command = [sys.executable, str(ROOT / "launch" / "show_presets.py"), "--batch", str(batch)]
    printed = subprocess.check_output(command, text=True, env={"PATH": ""})
    lines = (line.split("│")[1:8] for line in printed.splitlines() if "│" in line)
    return {name.strip(): [float(cell) for cell in own] for name, *own in lines}


ROWS = {
    "kl k3": [6.14544, 2.91466, 6.14544, 2.91466, 2.91466, 2.91466],
    "reward, summed": [2.34625, 2.40875, 2.84625, 2.84625, 2.90875, 2.84625],
    "advantage (GAE)": [1.00375, 1.06571, 1.28946, 1.28, 1.35911, 1.28],
    "policy loss (PPO)": [3.71191, 3.97232, 3.34431, 0.103159, 3.48169, 2.64037],
    "value loss": [6.81711, 6.74336, 10.0044, 9.82033, 9.92452, 34.2974],
    "advantage (GRPO), largest": [0.707107, 0.707107, 0.707098, 0.707107, 12, 0.707107],
    "policy loss (GRPO)": [5.67672, 5.67673, 5.79755, 0.464526, 17.4131, 4.86107],
    "policy loss (RLOO)": [9.44802, 15.6528, 21.8659, 2.16396, 11.6925, 6.70298],
    "policy loss (REINFORCE++)": [4.32016, 4.49899, 4.20512, 0.127414, 4.46031, 3.00287],
    "policy loss (REINFORCE++ baseline)": [0.0262266, 0.028665, 0.310934, 0.0553403, 0.0475115, -0.210669],
    "importance weight": [1.14286, 1.38133, 0.857143, 1.14286, 1.14286, 1.14286],
    "loss (IPO)": [93.745, 93.745, 50.18, 93.745, 93.745, 93.745],
}  # fmt: skip


def test_quantities_of_a_batch_under_every_preset(tmp_path: Path) -> None:
    """Checked by hand: KL (d = 0.3; 0.5, 0; 0.5, 15; -3.5, -0.5), IPO (h = 0.7 and -8, per token 0.6 and -4), the
    weights (one of e^1.3, six of 1); GRPO's advantages are 1/sqrt(2). The functions are test_golden.py's."""
    shown = cells(write_jsonl(tmp_path / "batch.jsonl", BATCH))
    assert len(shown) == 24 and {name: shown[name] for name in ROWS} == ROWS


def test_bad_batches_are_refused_by_line(tmp_path: Path, launched) -> None:
    batch, read = tmp_path / "batch.jsonl", launched("show_presets").read
    for line, message in (
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
    ):
        batch.write_text(line)
        with pytest.raises(ValueError, match=message):
            read(batch)
    write_jsonl(batch, [{"group": group, "reward": 1, "logprobs": [0]} for group in "aab"])
    with pytest.raises(ValueError, match="batch.jsonl:3: group='b'"):
        read(batch)
