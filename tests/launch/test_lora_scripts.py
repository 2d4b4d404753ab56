"""LoRA in every script that learns and has no test of it elsewhere (PPO, SFT, DPO: test_lora_ppo, test_lora_sft,
test_preference_launch): only adapters are held, the base stays, and the adapter on the base is the merged model."""

import json
from pathlib import Path

import pytest
import torch
from peft_case import samples
from scripts import options, succeed
from tiny import VOCAB, tiny_chat_model
from trialign.engine.storage.checkpoint import Reader

PROMPTS = {"data_max_prompt_tokens": 96, "rollout_max_new_tokens": 6, "rollout_samples_per_prompt": 2, "run_show": 0}
ROWS = {"data_max_tokens": 64, "update_batch_size": 4}
SCRIPTS = {
    "grpo": {**PROMPTS, "grpo_minibatches": 2, "run_prompts_per_step": 4, "lora_quantize": True},
    "rejection": {**PROMPTS, "round_count": 1, "round_prompts": 4, "update_batch_size": 4},
    "reward": ROWS,
    "kto": ROWS,
    "pretrain": ROWS,
    "conditional": {**ROWS, "run_show": 0},
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A tiny chat model, a reward, and rows that every script finds its columns in."""
    folder = tmp_path_factory.mktemp("lora-scripts")
    tiny_chat_model(folder / "model", hidden_size=128, intermediate_size=256)
    rows = [
        {
            **{"prompt": f"count to {i}", "response": "one two " * i, "reward": i / 10, "label": i % 2 == 0},
            **{"chosen": f"yes {i}", "rejected": f"no {i}", "text": f"plain text {i} " * 3},
        }
        for i in range(1, 9)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(
        "def spread(prompts, completions, **_):\n    return [len(set(c)) for c in completions]\n"
    )
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_adapters_are_learned_and_both_exports_agree(setting, tmp_path, script):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    given = {
        **{"model_path": setting / "model", "model_dtype": "float32", "data_sources": setting / "rows.jsonl"},
        **{"lora_rank": 4, "optimizer_lr": 1e-2, "run_steps": 2, "run_log": (), "run_output": tmp_path / "run"},
        **SCRIPTS[script],
    }
    if "rollout_max_new_tokens" in given:
        given["reward_functions"] = f"{setting}/rewards.py:spread"
    if script == "rejection":
        del given["run_steps"]
    succeed(script, *options(**given))
    saved = Reader(max((tmp_path / "run" / "checkpoints").glob("step_*")))
    others = {name for name in saved.tensors if ".lora_" not in name}
    head = {f"reward/{kind}/score.weight" for kind in ("master", "exp_avg", "exp_avg_sq")}
    assert others == (head if script == "reward" else set()) and len(saved.tensors) > len(others)

    kind = AutoModelForSequenceClassification if script == "reward" else AutoModelForCausalLM
    alone: dict = {"num_labels": 1} if script == "reward" else {}
    merged = kind.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32).eval()
    start = dict(kind.from_pretrained(setting / "model", dtype=torch.float32, **alone).named_parameters())
    moved = {name for name, tensor in merged.named_parameters() if not torch.equal(tensor, start[name])}
    assert moved and all("proj" in name or name == "score.weight" for name in moved)
    if script == "grpo":  # of the base in 4 bits the export has the rounded numbers, peft the folder's
        return
    with torch.no_grad():
        expected = [merged(torch.tensor([row])).logits for row in samples(VOCAB)]
        wrapped = PeftModel.from_pretrained(
            kind.from_pretrained(setting / "model", dtype=torch.float32, **alone), tmp_path / "run" / "adapter"
        ).eval()
        for row, wanted in zip(samples(VOCAB), expected, strict=True):
            torch.testing.assert_close(wrapped(torch.tensor([row])).logits, wanted, rtol=1e-5, atol=2e-5)
