"""launch/ppo.py with LoRA and QLoRA from the outside: one base for actor and reference, resume, both exports."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_case import samples
from safetensors.torch import load_file
from scripts import metrics, succeed
from tiny import VOCAB, tiny_chat_model
from torch import Tensor
from trialign.engine.parallel.lora import LoRA
from trialign.engine.storage.checkpoint import Reader
from trialign.models.hf.adapter_record import saved_adapter
from trialign.models.lora import TARGETS


def logits_of(peer: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([peer.eval()(torch.tensor([row])).logits[0] for row in samples(VOCAB)])


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    tiny_chat_model(folder / "model", hidden_size=128, intermediate_size=256)
    rows = [json.dumps({"prompt": f"count to {i}"}) for i in range(12)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "rewards.py").write_text(
        "def length(prompts, completions, **fields):\n    return [len(c) / 10 for c in completions]\n"
    )
    return folder


def run(setting: Path, out: Path, *arguments: object) -> None:
    given = {
        "--model.path": setting / "model",
        "--model.dtype": "float32",
        "--data.sources": setting / "prompts.jsonl",
        "--data.max_prompt_tokens": 96,
        "--rollout.max_new_tokens": 6,
        "--reward.functions": f"{setting}/rewards.py:length",
        "--lora.rank": 4,
        "--actor.optimizer.lr": 1e-2,
        "--ppo.minibatches": 2,
        "--run.prompts_per_step": 4,
        "--run.steps": 1,
        "--run.show": 1,
        "--run.output": out,
    }
    succeed("ppo", *(word for pair in given.items() for word in pair), *arguments)


def test_lora_run_exports_the_merged_model_and_the_adapter(setting, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    run(setting, out)
    (step,) = metrics(out)
    assert step["kl"] == 0  # the reference is the actor without its adapters, which begin as nothing
    assert step["ratio_min"] < 1 < step["ratio_max"]  # of the second minibatch: the first has exactly 1, or stops
    saved = Reader(out / "checkpoints" / "step_1")
    assert all(".lora_" in name or name.startswith("critic/") for name in saved.tensors)
    assert {n for n in saved.tensors if ".lora_" not in n} == {
        f"critic/{kind}/score.weight" for kind in ("master", "exp_avg", "exp_avg_sq")
    }
    merged = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(setting / "model", dtype=torch.float32)
    before = logits_of(base)
    wrapped = PeftModel.from_pretrained(base, out / "adapter")
    torch.testing.assert_close(logits_of(merged), logits_of(wrapped), rtol=1e-5, atol=2e-5)
    assert (logits_of(merged) - before).abs().max() > 1e-3


def test_qlora_run_resumes_in_another_layout_and_exports_again(setting, tmp_path):
    out = tmp_path / "run"
    run(setting, out, "--lora.quantize", "True")
    succeed("ppo", "--resume", out, "--run.steps", 2, "--parallel.tp", 2, ranks=2)
    steps = metrics(out)
    assert [step["step"] for step in steps] == [1, 2]
    assert steps[0]["kl"] == 0 != steps[1]["kl"]
    last = out / "checkpoints" / "step_2"
    saved = saved_adapter(Reader(last), "actor")
    assert saved is not None and saved[0] == LoRA(4, 32.0, TARGETS, quantize=True)
    assert (out / "adapter" / "adapter_config.json").is_file()
    succeed("export_hf", "--checkpoint", last, "--output", tmp_path / "again", "--dtype", "float32")
    again, exported = (load_file(path / "model.safetensors") for path in (tmp_path / "again", out / "model"))
    assert again.keys() == exported.keys() and all(torch.equal(again[name], exported[name]) for name in again)
    succeed("export_hf", "--checkpoint", last, "--output", tmp_path / "adapter", "--adapter", "--dtype", "float32")
    one, two = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "adapter", out / "adapter"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
