"""LoRA and QLoRA in the launch scripts: only adapters are trained; resume, both exports, PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_case import peer_logits
from safetensors.torch import load_file
from samples import write_jsonl
from scripts import metrics, options, succeed, succeed_in_turn
from tiny import tiny_chat_model
from tiny_run import REWARDS
from trialign.engine.parallel.lora import LoRA
from trialign.engine.storage.checkpoint import Reader
from trialign.models.hf.adapter_record import saved_adapter
from trialign.models.lora import TARGETS

PROMPTS = {"data_max_prompt_tokens": 96, "rollout_max_new_tokens": 6, "reward_functions": "spread"}
ROWS = {"data_max_tokens": 64, "update_batch_size": 4, "optimizer_lr": 1e-2, "run_steps": 2}
GROUPS = {**PROMPTS, "rollout_samples_per_prompt": 2, "run_show": 0, "optimizer_lr": 1e-2}
PPO = {**PROMPTS, "reward_functions": "length", "actor_optimizer.lr": 1e-2, "ppo_minibatches": 2}
PPO |= {"run_prompts_per_step": 4, "run_steps": 1, "run_show": 1}
SCRIPTS = {
    "ppo": PPO,
    "grpo": {**GROUPS, "grpo_minibatches": 2, "run_prompts_per_step": 4, "lora_quantize": True, "run_steps": 2},
    "rejection": {**GROUPS, "rejection_rounds": 1, "rejection_prompts_per_round": 4, "update_batch_size": 4},
    **{"reward": ROWS, "dpo": ROWS, "kto": ROWS, "pretrain": ROWS, "conditional": ROWS | {"run_show": 0}},
}
SFT = {"data_max_tokens": 128, "data_eval_fraction": 0.25, "optimizer_lr": 5e-3, "update_batch_size": 6}
SFT |= {"run_steps": 6, "run_show": 0}


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A tiny chat model as a folder and as a checkpoint, reward functions, rows with the columns of every script."""
    folder = tmp_path_factory.mktemp("lora")
    tiny_chat_model(folder / "model", hidden_size=128, intermediate_size=256)
    succeed("import_hf", "--model", folder / "model", "--output", folder / "imported", "--tp", 2)
    rows = [
        {"prompt": f"count to {i}", "response": "one two " * i, "chosen": f"yes {i}", "rejected": f"no {i}"}
        | {"reward": i / 10, "label": i % 2 == 0, "text": f"plain text {i} " * 3}
        for i in range(1, 9)
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def words(setting: Path, script: str, out: Path, given: dict, *arguments: object, model="model") -> list[Any]:
    """A script and its arguments, with adapters of rank 4."""
    values = {"model_path": setting / model, "model_dtype": "float32", "data_sources": setting / "rows.jsonl"}
    values |= {"lora_rank": 4, "run_log": (), "run_output": out, **given}
    if "reward_functions" in given:
        values["reward_functions"] = f"{setting}/rewards.py:{given['reward_functions']}"
    return [script, *options(**values), *arguments]


def assert_adapter_is_merged(folder: Path, base: Path, kind: Any, **given: int) -> None:
    """Asserts that PEFT's model has the logits of the merged export, and other ones than the base."""
    from peft import PeftModel

    merged = peer_logits(kind.from_pretrained(folder / "model", dtype=torch.float32))
    start = kind.from_pretrained(base, dtype=torch.float32, **given)
    before = peer_logits(start)
    wrapped = peer_logits(PeftModel.from_pretrained(start, folder / "adapter"))
    torch.testing.assert_close(merged, wrapped, rtol=1e-5, atol=2e-5)
    assert (merged - before).abs().max() > 1e-3


@pytest.fixture(scope="module")
def trained(setting) -> Path:
    """The folder of a run of each script."""
    succeed_in_turn([words(setting, script, setting / script, given) for script, given in SCRIPTS.items()], ranks=1)
    return setting


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_adapters_are_trained_and_exports_agree(setting, trained, script):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    run = trained / script
    saved = Reader(max((run / "checkpoints").glob("step_*")))
    others = {name for name in saved.tensors if ".lora_" not in name}
    role = {"reward": "reward", "ppo": "critic"}.get(script)
    head = {f"{role}/{kind}/score.weight" for kind in ("master", "exp_avg", "exp_avg_sq") if role}
    assert others == head and len(saved.tensors) > len(others)

    kind = AutoModelForSequenceClassification if script == "reward" else AutoModelForCausalLM
    alone = {"num_labels": 1} if script == "reward" else {}
    merged = kind.from_pretrained(run / "model", dtype=torch.float32).eval()
    start = dict(kind.from_pretrained(setting / "model", dtype=torch.float32, **alone).named_parameters())
    moved = {name for name, tensor in merged.named_parameters() if not torch.equal(tensor, start[name])}
    assert moved and all("proj" in name or name == "score.weight" for name in moved)
    if script != "grpo":  # a 4-bit base is exported rounded; PEFT reads the original
        assert_adapter_is_merged(run, setting / "model", kind, **alone)


def test_qlora_ppo_resumes_in_another_layout(setting, tmp_path):
    out = tmp_path / "run"
    succeed(*words(setting, "ppo", out, PPO | {"lora_quantize": True}))
    succeed("ppo", "--resume", out, "--run.steps", 2, "--parallel.tp", 2, ranks=2)
    steps = metrics(out)
    assert [step["step"] for step in steps] == [1, 2]
    assert steps[0]["kl"] == 0 != steps[1]["kl"]  # adapters begin at zero
    assert all(step["ratio_min"] < 1 < step["ratio_max"] for step in steps)  # in the second minibatch
    last = out / "checkpoints" / "step_2"
    trained = {name for name in Reader(last).tensors if ".lora_" not in name}
    assert trained == {f"critic/{kind}/score.weight" for kind in ("master", "exp_avg", "exp_avg_sq")}
    saved = saved_adapter(Reader(last), "actor")
    assert saved is not None and saved[0] == LoRA(4, 32.0, TARGETS, quantize=True)
    succeed("export_hf", "--checkpoint", last, "--output", tmp_path / "adapter", "--dtype", "float32", "--adapter")
    again, exported = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (tmp_path, out))
    assert again.keys() == exported.keys() and all(torch.equal(again[key], exported[key]) for key in again)


@pytest.mark.parametrize("quantize", [False, True])
def test_exported_sft_adapters_continue_at_the_same_loss(setting, tmp_path, quantize):
    """From an imported checkpoint, with quantize on two ranks: the exports start runs at the run's last eval loss."""
    from transformers import AutoModelForCausalLM

    def eval_losses(name: str, given: dict, *arguments: object, model: str = "model", ranks: int = 1) -> list[float]:
        succeed(*words(setting, "sft", tmp_path / name, SFT | given, *arguments, model=model), ranks=ranks)
        return [step["eval_loss"] for step in metrics(tmp_path / name) if "eval_loss" in step]

    out, ranks = tmp_path / "run", 1 + quantize
    losses = eval_losses("run", {"lora_quantize": quantize, "parallel_tp": ranks}, model="imported", ranks=ranks)
    assert losses[-1] < 0.95 * losses[0]
    assert all(".lora_" in name for name in Reader(out / "checkpoints" / "step_6").tensors)
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["r"] == 4
    expected = pytest.approx(losses[-1], rel=1e-5)
    assert eval_losses("merged", {"run_steps": 1}, model=str(out / "model"))[0] == expected
    if not quantize:  # a 4-bit base is exported rounded; PEFT reads the original
        assert_adapter_is_merged(out, setting / "model", AutoModelForCausalLM)
        assert eval_losses("again", {"run_steps": 1}, "--lora.adapter", out / "adapter")[0] == expected
