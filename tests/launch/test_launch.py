"""launch/ppo.py from the outside: several rewards over several ranks, what it leaves behind, and how it stops."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_chat_model, tiny_llama

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    tiny_chat_model(folder / "model", vocab_size=261)
    tiny_llama(folder / "reward", score=True, vocab_size=261, seed=1)
    rows = [json.dumps({"prompt": f"count to {i}"}) for i in range(12)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "rewards.py").write_text(
        "import math\n"
        "calls = []\n"
        "def length(prompts, completions, **fields):\n"
        "    return [len(c) / 10 for c in completions]\n"
        "def spoilt(prompts, completions, **fields):\n"
        "    calls.append(1)\n"
        "    return [math.nan if len(calls) > 2 and 'count to 7' in p else 0.0 for p in prompts]\n"
    )
    return folder


def launch(setting: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    fixed = {
        "--model.path": setting / "model",
        "--model.dtype": "float32",
        "--data.max_prompt_tokens": 96,
        "--rollout.max_new_tokens": 6,
        "--run.show": 2,
    }
    given = [str(word) for pair in fixed.items() for word in pair]
    command = [sys.executable, *launcher, str(ROOT / "launch" / "ppo.py"), *given]
    command += ["--data.sources", str(setting / "prompts.jsonl"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_function_and_reward_model_over_four_ranks(setting, tmp_path):
    """tp=2 x dp=2, a function and a model with weights: the run's folder, the export, and what the step logs."""
    out = tmp_path / "run"
    done = launch(
        setting,
        *("--reward.functions", f"{setting}/rewards.py:length", "--reward.models", str(setting / "reward")),
        *("--reward.weights", "0.5", "2.0", "--reward.clip", "0"),
        *("--run.output", str(out), "--run.steps", "2", "--run.prompts_per_step", "4", "--run.save_every", "1"),
        *("--run.keep", "1", "--parallel.tp", "2", "--actor.ema_decay", "0.5", "--actor.optimizer.lr", "1e-3"),
        ranks=4,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stop tokens: </s> (2); dp=2 pp=1 tp=2" in done.stdout and "before" in done.stdout and "after" in done.stdout
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        weighted = 0.5 * step["reward/rewards.py:length"] + 2 * step["reward/reward"]
        assert step["reward"] == pytest.approx(weighted, rel=1e-5)
        assert step["reward"] == pytest.approx(step["reward_shaped"], rel=1e-5)
        assert step["sampler_mismatch_max"] < 1e-4
        for phase in ("rollout", "score", "update", "sync"):
            assert step[f"seconds/{phase}"] >= 0 and step[f"memory_gb/{phase}"] > 0
        for phase in ("rollout", "score", "update"):
            assert step[f"tokens_per_s/{phase}"] > 0 and step[f"mfu/{phase}"] > 0
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_2"]
    assert (out / "ppo.png").stat().st_size > 10_000
    assert list((out / "tensorboard").iterdir())

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(out / "model").chat_template
    start = AutoModelForCausalLM.from_pretrained(setting / "model", dtype=torch.float32)
    average = AutoModelForCausalLM.from_pretrained(out / "model_ema", dtype=torch.float32)
    for a, b, c in zip(start.parameters(), average.parameters(), model.parameters(), strict=True):
        assert (b - a).norm() < (c - a).norm()  # the average lags behind


def test_the_table_shows_the_same_prompts_before_and_after_and_what_a_resume_changes_is_said(setting, tmp_path):
    """The first prompts of the data, on a resume too, even one that asks for more of them."""
    out = tmp_path / "run"
    given = (
        "--reward.functions",
        f"{setting}/rewards.py:length",
        "--run.output",
        str(out),
        "--run.prompts_per_step",
        "2",
    )
    done = launch(setting, *given, "--run.steps", "2", "--actor.optimizer.lr", "0", "--run.log")
    assert done.returncode == 0, done.stderr
    before = json.loads((out / "before.json").read_text())
    assert len(before) == 2
    rows = [line for line in done.stdout.splitlines() if "count to" in line]
    assert len(rows) == 2 and all(prompt in row for (prompt, *_), row in zip(before, rows, strict=True))
    for row in rows:  # at a learning rate of 0 the same prompt gets the same score
        assert len(set(re.findall(r"[+-]\d+\.\d\d", row))) == 1, row
    done = launch(setting, "--resume", str(out), "--run.steps", "3", "--run.show", "4")
    assert done.returncode == 0, done.stderr
    assert "steps = 3" in (out / "config.toml").read_text()
    assert "resumed with run.steps=3 (was 2); run.show=4 (was 2)" in done.stdout


def test_a_reward_that_turns_to_nan_stops_the_run_and_keeps_its_checkpoints(setting, tmp_path):
    out = tmp_path / "run"
    done = launch(
        setting,
        *("--reward.functions", f"{setting}/rewards.py:spoilt", "--run.output", str(out), "--run.steps", "9"),
        *("--run.prompts_per_step", "12", "--run.save_every", "1", "--run.log"),
    )
    assert done.returncode == 1
    assert "error: reward function" in done.stderr and "nan" in done.stderr and "prompts.jsonl:8" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_1"]
    assert not (out / "model").exists()


def test_sizes_that_do_not_divide_stop_before_anything_is_read(setting, tmp_path):
    out = tmp_path / "run"
    given = ("--reward.functions", "nowhere.py:f", "--run.output", str(out), "--run.prompts_per_step", "3")
    done = launch(setting, *given, "--ppo.minibatches", "2")
    assert done.returncode == 1 and "do not divide by ppo.minibatches=2" in done.stderr
    assert not out.exists()
