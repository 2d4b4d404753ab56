"""launch/sft.py with LoRA and QLoRA from the outside: a user tunes, goes on from the adapter, and hands it to PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_case import samples
from scripts import metrics, options, succeed
from tiny import VOCAB, tiny_chat_model
from torch import Tensor
from trialign.engine.storage.checkpoint import Reader


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A tiny chat model as a folder and as a checkpoint, and rows."""
    folder = tmp_path_factory.mktemp("lora-sft")
    tiny_chat_model(folder / "model", hidden_size=128, intermediate_size=256)
    succeed("import_hf", "--model", folder / "model", "--output", folder / "imported", "--tp", 2)
    rows = [{"prompt": f"count to {i}", "response": " ".join(map(str, range(i + 1)))} for i in range(1, 11)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tune(setting: Path, out: Path, *arguments: object, model: str = "model", ranks: int = 1) -> list[dict[str, float]]:
    """Six steps over all rows but two; the logged steps."""
    given = options(
        model_path=setting / model,
        model_dtype="float32",
        data_sources=setting / "rows.jsonl",
        data_max_tokens=128,
        data_eval_fraction=0.2,
        lora_rank=4,
        optimizer_lr=5e-3,
        update_batch_size=8,
        run_steps=6,
        run_show=0,
        run_log=(),
        run_output=out,
    )
    succeed("sft", *given, *arguments, ranks=ranks)
    return metrics(out)


def logits_of(peer: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([peer.eval()(torch.tensor([row])).logits[0] for row in samples(VOCAB)])


def test_lora_is_tuned_exported_and_taken_up_again(setting, tmp_path):
    """From an imported checkpoint; PEFT puts the adapter on the folder that was imported."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    steps = tune(setting, tmp_path / "run", model="imported")
    losses = [step["eval_loss"] for step in steps if "eval_loss" in step]
    assert losses[-1] < 0.95 * losses[0]
    last = tmp_path / "run" / "checkpoints" / "step_6"
    assert all(".lora_" in name for name in Reader(last).tensors)

    base = AutoModelForCausalLM.from_pretrained(setting / "model", dtype=torch.float32)
    before = logits_of(base)
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32))
    wrapped = logits_of(PeftModel.from_pretrained(base, tmp_path / "run" / "adapter"))
    torch.testing.assert_close(merged, wrapped, rtol=1e-5, atol=2e-5)
    assert (merged - before).abs().max() > 1e-2

    for again, arguments in (("adapter", ["--lora.adapter", tmp_path / "run" / "adapter"]), ("merged", [])):
        start = str(tmp_path / "run" / "model") if again == "merged" else "model"
        more = tune(setting, tmp_path / again, *arguments, "--run.steps", 1, model=start)
        assert more[0]["eval_loss"] == pytest.approx(losses[-1], rel=1e-5)


def test_qlora_over_two_ranks_learns_and_exports_the_model_it_trained(setting, tmp_path):
    """The merged export, 4-bit codes and adapters in one, has the loss of the run's end."""
    steps = tune(setting, tmp_path / "run", "--lora.quantize", "True", "--parallel.tp", 2, model="imported", ranks=2)
    losses = [step["eval_loss"] for step in steps if "eval_loss" in step]
    assert losses[-1] < 0.95 * losses[0]
    merged = tune(setting, tmp_path / "merged", "--run.steps", 1, model=str(tmp_path / "run" / "model"))
    assert merged[0]["eval_loss"] == pytest.approx(losses[-1], rel=1e-5)
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 4
