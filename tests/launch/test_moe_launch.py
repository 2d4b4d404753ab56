"""launch/ppo.py aligns a mixture of experts under ep: what it logs, and that transformers loads what it exports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny import tiny_tokenizer
from tiny_moe import tiny_mixtral
from transformers import MixtralForCausalLM

ROOT = Path(__file__).resolve().parents[2]


def test_ppo_over_two_ranks_that_share_the_experts(tmp_path):
    """One prompt is shown, so a rank has none of it; the micro-batches are unequally many."""
    folder = tiny_tokenizer(tiny_mixtral(tmp_path / "model", vocab_size=260))
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "count{" on" * i}"}}\n' for i in range(8)))
    (tmp_path / "rewards.py").write_text(
        "def length(prompts, completions, **fields):\n    return map(len, completions)\n"
    )
    values = {
        "model.path": folder,
        "model.dtype": "float32",
        "data.sources": tmp_path / "prompts.jsonl",
        "data.max_prompt_tokens": 80,
        "rollout.max_new_tokens": 6,
        "reward.functions": f"{tmp_path}/rewards.py:length",
        "ppo.minibatches": 2,
        "ppo.micro_batch_tokens": 90,
        "actor.optimizer.lr": 1e-3,
        "actor.optimizer.router_aux_coef": 0.5,
        "actor.optimizer.router_z_coef": 0.01,
        "run.output": tmp_path / "run",
        "run.steps": 2,
        "run.prompts_per_step": 8,
        "run.show": 1,
        "parallel.ep": 2,
    }
    words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "launch" / "ppo.py"), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dp=2 ep=2 pp=1 tp=1" in done.stdout
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    for step in steps:
        assert step["sampler_mismatch_max"] < 1e-4
        for role in ("actor", "critic"):
            assert step[f"{role}_router_dropped"] == 0 and 1 < step[f"{role}_router_load"] <= 2
            assert 0 < step[f"{role}_router_entropy"] < 1.4 and step[f"{role}_router_aux_loss"] > 1.9
    exported = MixtralForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    assert exported.config.router_aux_loss_coef == 0.5  # what it was trained with, not its folder's 0.1
    start = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    moved = [(a - b).abs().max().item() for a, b in zip(exported.parameters(), start.parameters(), strict=True)]
    assert min(moved) > 0 and max(moved) < 0.1
