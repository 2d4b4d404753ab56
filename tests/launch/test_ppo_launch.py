"""launch/ppo.py from the outside: several rewards on several ranks, MoE, outputs, tables, a failing reward."""

import json
import re
from pathlib import Path

import pytest
import torch
from scripts import launch, metrics, options, succeed
from tiny import tiny_llama, tiny_tokenizer
from tiny_moe import tiny_mixtral
from tiny_run import prompts, tiny_run


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    tiny_llama(folder / "reward", score=True, vocab_size=260, seed=1)
    given = {"data_max_prompt_tokens": 96, "rollout_max_new_tokens": 6, "run_show": 2}
    return tiny_run(folder, prompts(12), "length", **given)


def given(setting: Path, out: Path, **more: object) -> list[object]:
    return ["--config", setting / "config.toml", "--run.output", out, *options(**more)]


def test_function_and_reward_model_on_four_ranks(setting, tmp_path):
    """tp=2 x dp=2: the run's folder, the export, and the logged metrics."""
    out = tmp_path / "run"
    words = given(setting, out, reward_models=setting / "reward", reward_weights=(0.5, 2.0), reward_clip=0)
    words += options(run_steps=2, run_prompts_per_step=4, run_save_every=1, run_keep=1, run_log="tensorboard")
    words += options(parallel_tp=2, actor_ema_decay=0.5) + ["--actor.optimizer.lr", "1e-3"]
    printed = succeed("ppo", *words, ranks=4)
    assert "stop tokens: </s> (2); dp=2 pp=1 tp=2" in printed and "before" in printed and "after" in printed
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        weighted = 0.5 * step["reward/rewards.py:length"] + 2 * step["reward/reward"]
        assert step["reward"] == pytest.approx(weighted, rel=1e-5)
        assert step["reward"] == pytest.approx(step["reward_shaped"], rel=1e-5)
        assert step["sampler_mismatch_max"] < 1e-4
        for phase in ("rollout", "score", "update"):
            assert all(step[f"{cost}/{phase}"] > 0 for cost in ("seconds", "memory_gb", "tokens_per_s", "mfu"))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_2"]
    assert (out / "ppo.png").stat().st_size > 10_000
    assert list((out / "tensorboard").iterdir())

    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(out / "model").chat_template
    average, last = (AutoModelForCausalLM.from_pretrained(out / name) for name in ("model_ema", "model"))
    assert not torch.equal(average.lm_head.weight, last.lm_head.weight)


def test_table_shows_the_same_prompts_before_and_after(setting, tmp_path):
    """Also where a resume increases run.show."""
    out = tmp_path / "run"
    words = given(setting, out, run_prompts_per_step=2, run_steps=2)
    printed = succeed("ppo", *words, "--actor.optimizer.lr", 0)
    before = json.loads((out / "before.json").read_text())
    rows = [line for line in printed.splitlines() if " words" in line]
    assert len(rows) == 2 and all(prompt in row for (prompt, *_), row in zip(before, rows, strict=True))
    for row in rows:  # at a learning rate of 0 a prompt's reward stays
        assert len(set(re.findall(r"[+-]\d+\.\d\d", row))) == 1, row
    printed = succeed("ppo", "--resume", out, "--run.steps", 3, "--run.show", 4)
    assert "run.steps=3 (was 2)" in printed and "run.show=4 (was 2)" in printed


def test_a_small_cache_preempts_and_changes_nothing(setting, tmp_path):
    """The same metrics; a prompt that can never fit is refused by its row."""
    words, runs = options(run_prompts_per_step=12, run_steps=1, run_show=0, rollout_kv_block=2), {}
    for name, gib in (("small", 1e-4), ("large", 0.0)):
        succeed("ppo", *given(setting, tmp_path / name), *words, "--rollout.cache_gib", gib)
        runs[name] = metrics(tmp_path / name)[0]
    assert runs["small"].pop("preempted") > 0 and "preempted" not in runs["large"]
    costs = re.compile("seconds|memory_gb|tokens_per_s|mfu")
    assert all(runs["small"][key] == value for key, value in runs["large"].items() if not costs.match(key))
    refused = launch("ppo", *given(setting, tmp_path / "none"), *words, "--rollout.cache_gib", 1e-5)
    assert refused.returncode == 1 and "rows.jsonl:" in refused.stderr and "KV cache blocks" in refused.stderr


def test_nan_reward_stops_the_run_and_keeps_checkpoints(setting, tmp_path):
    out = tmp_path / "run"
    words = given(setting, out, run_steps=9, run_prompts_per_step=12, run_save_every=1)
    done = launch("ppo", *words, "--reward.functions", f"{setting}/rewards.py:nan_later")
    assert done.returncode == 1
    assert "error: reward function" in done.stderr and "nan" in done.stderr and "rows.jsonl:8" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_1"]
    assert not (out / "model").exists()


def test_moe_on_two_expert_parallel_ranks(tmp_path):
    """One prompt is shown, so a rank has none; the ranks have different numbers of micro-batches."""
    from transformers import MixtralForCausalLM

    folder = tiny_run(tmp_path, [{"prompt": f"count{' on' * i}"} for i in range(8)], "length")
    moe = tiny_tokenizer(tiny_mixtral(folder / "moe", vocab_size=260))
    words = given(folder, folder / "run", model_path=moe, data_max_prompt_tokens=80, rollout_max_new_tokens=6)
    words += options(ppo_minibatches=2, ppo_micro_batch_tokens=90, run_steps=2, run_prompts_per_step=8, run_show=1)
    words += ["--actor.optimizer.lr", "1e-3", "--actor.optimizer.router_aux_coef", 0.5]
    words += ["--actor.optimizer.router_z_coef", 0.01, "--parallel.ep", 2]
    assert "dp=2 ep=2 pp=1 tp=1" in succeed("ppo", *words, ranks=2)
    for step in metrics(folder / "run"):
        assert step["sampler_mismatch_max"] < 1e-4
        for role in ("actor", "critic"):
            assert step[f"{role}_router_dropped"] == 0 and 1 < step[f"{role}_router_load"] <= 2
            assert 0 < step[f"{role}_router_entropy"] < 1.4 and step[f"{role}_router_aux_loss"] > 1.9
    exported = MixtralForCausalLM.from_pretrained(folder / "run" / "model", dtype=torch.float32)
    assert exported.config.router_aux_loss_coef == 0.5  # the training's; the folder has 0.1
    start = MixtralForCausalLM.from_pretrained(moe, dtype=torch.float32)
    assert not any(torch.equal(a, b) for a, b in zip(exported.parameters(), start.parameters(), strict=True))
