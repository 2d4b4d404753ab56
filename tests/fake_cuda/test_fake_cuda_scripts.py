"""Training scripts on a fake CUDA device: tensors are where CUDA needs them, and the numbers are those of the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
from samples import write_jsonl
from scripts import metrics, options
from tiny import tiny_chat_model, tiny_llama, tiny_tokenizer
from tiny_moe import tiny_mixtral
from tiny_run import REWARDS, write_config

PROMPTS = {"data_max_prompt_tokens": 96, "rollout_max_new_tokens": 6, "reward_functions": "spread", "run_show": 1}
GROUPS = PROMPTS | {"rollout_samples_per_prompt": 2, "optimizer_lr": 1e-2}
ROWS = {"data_max_tokens": 64, "update_batch_size": 4, "update_micro_batch_tokens": 128, "optimizer_lr": 1e-2}
ROWS |= {"optimizer_eps": 1e-5, "run_steps": 2, "data_eval_fraction": 0.25, "run_eval_every": 1}
PPO = PROMPTS | {"ppo_minibatches": 2, "run_prompts_per_step": 4, "run_steps": 1, "actor_optimizer.lr": 1e-3}
LORA, QLORA = {"lora_rank": 4}, {"lora_rank": 4, "lora_quantize": True}
MOE, RECOMPUTE = {"model_path": "moe"}, {"parallel_recompute": "full"}
TP, PP, DP = {"parallel_tp": 2}, {"parallel_pp": 2}, {"parallel_dp": 2}
EP = {"parallel_ep": 2}
SCRIPTS: dict[str, dict[str, Any]] = {
    "ppo": PPO | {"reward_models": "reward", "ppo_epochs": 2, "rollout_top_p": 0.9} | RECOMPUTE,
    "ppo lora tp": PPO | LORA | TP,
    "ppo pp": PPO | PP,
    "ppo bfloat16": PPO | {"model_dtype": "bfloat16", "parallel_recompute": "none"},
    "ppo moe ep": PPO | MOE | EP,
    "grpo qlora dp": GROUPS | {"run_prompts_per_step": 4, "run_steps": 2} | QLORA | DP,
    "sft qlora pp": ROWS | {"run_show": 1, "run_show_tokens": 4} | QLORA | PP,
    "sft moe recompute ep": ROWS | {"run_show": 0} | MOE | RECOMPUTE | EP,
    "pretrain recompute tp": ROWS | RECOMPUTE | TP,
    "reward dp": ROWS | DP,
    "reward process": {**ROWS, "data_sources": None, "data_eval_fraction": None, "data_max_tokens": None},
    "dpo lora dp": ROWS | LORA | DP,
    "kto pp": ROWS | PP,
    "conditional tp": ROWS | {"data_eval_fraction": None, "run_eval_every": None, "run_show": 1} | TP,
    "evaluate dp": PROMPTS | {"rollout_samples_per_prompt": 2, "run_show": None, "run_log": None} | DP,
    "rejection dp": {**GROUPS, "rejection_rounds": 1, "rejection_prompts_per_round": 4, "update_batch_size": 4} | DP,
}
SCRIPTS["reward process"] |= {"steps_sources": "steps", "steps_eval_fraction": 0.25, "steps_max_tokens": 64}
SCRIPTS["rlhf"] = {
    **{"data_sources": None, "prompts_sources": "rows", "prompts_max_prompt_tokens": 96, "prompts_eval_fraction": 0.3},
    **{f"{stage}_rollout.max_new_tokens": 6 for stage in ("preferences", "ppo", "evaluation")},
    **{f"{stage}_update.batch_size": 4 for stage in ("sft", "reward")},
    **{f"{stage}_optimizer.lr": 1e-2 for stage in ("sft", "reward")},
    **{"sft_data.sources": "rows", "sft_data.max_tokens": 64, "sft_run.show_tokens": 4, "run_show": 1},
    **{"preferences_rollout.samples_per_prompt": 4, "preferences_reward.functions": "spread"},
    **{"ppo_run.steps": 1, "ppo_run.prompts_per_step": 4, "ppo_run.show": 0},
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """Tiny models, rows with the columns of every script, and reward functions."""
    folder = tmp_path_factory.mktemp("fake_cuda")
    tiny_chat_model(folder / "model", hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    tiny_tokenizer(tiny_mixtral(folder / "moe", vocab_size=260))
    tiny_llama(folder / "reward", score=True, vocab_size=260, seed=1, num_hidden_layers=2)
    rows = [
        {"prompt": f"count to {i}", "response": "one two " * (i % 3 + 1), "chosen": f"yes {i}", "rejected": f"no {i}"}
        | {"reward": i / 10, "label": i % 2 == 0, "text": f"plain text {i} " * 3}
        for i in range(1, 13)
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    steps = [{"prompt": "say", "steps": ["yes"] * (1 + i % 2) + ["no"], "labels": [True] * (1 + i % 2) + [False]}
             for i in range(8)]  # fmt: skip
    write_jsonl(folder / "steps.jsonl", steps)
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def config_of(setting: Path, name: str) -> Path:
    given = {"model_path": "model", "model_dtype": "float32", "data_sources": "rows", "run_log": (), **SCRIPTS[name]}
    for option, value in given.items():
        if option.endswith(".functions") or option == "reward_functions":
            given[option] = [f"{setting}/rewards.py:{value}"]
        elif option.endswith(("_sources", ".sources")) and value:
            given[option] = [f"{setting}/{value}.jsonl"]
        elif option in ("model_path", "reward_models"):
            given[option] = f"{setting}/{value}" if option == "model_path" else [f"{setting}/{value}"]
    return write_config(setting / f"{name}.toml", **given)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs_on_the_device_with_the_numbers_of_the_cpu(fake, setting, name):
    script, config = name.split()[0], config_of(setting, name)
    ranks = 2 if name.split()[-1] in ("tp", "pp", "dp", "ep") else 1
    runs = {device: setting / f"{name} {device}" for device in ("cpu", "cuda")}
    alone = options(parallel_tp=1, parallel_pp=1, parallel_dp=1, parallel_ep=1)
    ended = fake.forked.run(script, "--config", config, "--run.output", runs["cpu"], *alone)
    assert ended.codes == [0], ended.output
    ended, ledgers = fake.script(script, "--config", config, "--run.output", runs["cuda"], ranks=ranks)
    assert ended.codes == [0] * ranks, ended.output
    expected, found = numbers(runs["cpu"]), numbers(runs["cuda"])
    assert found.keys() == expected.keys() and found
    for place, own in found.items():
        assert own == pytest.approx(expected[place], rel=1e-4, abs=1e-5), place
    assert len(ledgers) == ranks
    assert all(ledger["launches"][phase] > 50 for ledger in ledgers for phase in phases_of(script))


def numbers(run: Path) -> dict[str, dict[str, float]]:
    """Metrics of every step of a run or of its stages, or an evaluation's results."""
    folders = [path.parent for path in sorted(run.rglob("metrics.jsonl"))]
    found = {f"{folder.relative_to(run)} {step['step']}": step for folder in folders for step in metrics(folder)}
    for path in run.rglob("results.json"):
        found["results"] = flat(json.loads(path.read_text().replace(str(run), "")))
    return found


def flat(value: Any, name: str = "") -> dict[str, float]:
    """The numbers of nested dictionaries."""
    if isinstance(value, dict):
        return {key: number for part, own in value.items() for key, number in flat(own, f"{name}/{part}").items()}
    return {name: value} if isinstance(value, int | float) else {}


def phases_of(script: str) -> tuple[str, ...]:
    return ("start",) if script == "evaluate" else ("start", "update")
