"""On a GPU: a run that is started twice, and one that is killed and resumed, end with the same bits."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT
from scripts import assert_resume_identical, digests, metrics, succeed
from tiny_run import prompts, tiny_run

DEVICE = "cuda"
RUNS = {"ppo": ("ppo", ""), "gspo": ("grpo", "gspo"), "rloo": ("grpo", "rloo")}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("run", RUNS)
def test_runs_repeat_and_resume_bit_for_bit(run, tmp_path: Path):
    """In bf16 as by default, with two epochs of two minibatches: old logprobs are of a pass of their own."""
    script, preset = RUNS[run]
    given = {"model_dtype": None, "parallel_device": DEVICE, "rollout_max_new_tokens": 24, "data_max_prompt_tokens": 96}
    given |= {"rollout_samples_per_prompt": 4, "run_prompts_per_step": 4, "run_steps": 6, "run_save_every": 1}
    given |= {"run_keep": 6, "run_show": 0, f"{script}_epochs": 2, f"{script}_minibatches": 2}
    config = tiny_run(tmp_path, prompts(12), "length", **given) / "config.toml"
    overlays = [ROOT / "launch" / "configs" / "presets" / f"{preset}.toml"] if preset else []
    words = ["--config", *overlays, config]
    for name in ("one", "other"):
        succeed(script, *words, "--run.output", tmp_path / name)
    assert digests(tmp_path / "one", 6) == digests(tmp_path / "other", 6)
    assert metrics(tmp_path / "one") == metrics(tmp_path / "other")
    assert all(0 <= step["first_ratio_error"] <= 1e-3 for step in metrics(tmp_path / "one"))
    assert_resume_identical("checkpoints/step_1", tmp_path / "resumed", tmp_path / "one", 6, script, *words)
