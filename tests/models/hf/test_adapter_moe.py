"""Adapters of MoE models and heads in and out: checkpoints in other layouts, merged exports, PEFT both ways."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from layouts import ALONE, Layout, assert_close
from peft_case import (
    adapted,
    build,
    learner,
    logits,
    peer_logits,
    randomize_b,
    resume,
    resumed,
    save_peft,
    save_run,
    states,
    train,
    train_and_save,
)
from tiny_moe import moe_folder
from torch import Tensor
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.lora import LoRA
from trialign.models.families.registry import read_config
from trialign.models.hf.convert import export_checkpoint
from trialign.models.hf.peft import export_adapter, read_peft
from trialign.models.hf.peft_config import unsupported_by_peft
from trialign.models.lora import EVERY_TARGET, Target, check_lora

QUANTIZED = LoRA(4, 8.0, EVERY_TARGET, quantize=True)
EXPERTS = ("experts.gate", "experts.up", "experts.down")


def peer(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("lora", [LoRA(4, 8.0, ("all",)), QUANTIZED], ids=["lora", "qlora"])
def test_checkpoints_resume_in_other_layouts_and_export_merged(tmp_path, lora, tied):
    """The merged folder has its own head, also where the base's is tied."""
    folder, saved = moe_folder(tmp_path / "base", tied=tied), tmp_path / "step_1"
    first = run_ranks(train_and_save, 4, Layout(tp=2, dp=2, ep=2), folder, tmp_path, lora)[0]
    first = {name: tensor for name, tensor in first.items() if not name.startswith("grad/")}
    for layout in (Layout(pp=2), Layout(dp=2, ep=2)):
        for got in run_ranks(resume, layout.world, layout, folder, saved, lora):
            assert_close({name: got[name] for name in first}, first, 0)
    export_checkpoint(saved, tmp_path / "merged", dtype=torch.float32)
    assert not read_config(tmp_path / "merged").tie_embeddings
    assert_close(peer_logits(peer(tmp_path / "merged")), logits(resumed(ALONE, folder, saved, lora).model))


def loaded(rank: int, world: int, layout: Layout, folder: Path, adapter: Path, lora: LoRA) -> dict[str, Tensor]:
    return states(learner(build(folder, layout.mesh(), lora, adapter)), "master")


@pytest.mark.parametrize(
    ("family", "targets", "tied", "rslora"),
    [
        ("Mixtral", ("q", "v", *EXPERTS, "router", "head"), False, False),
        ("Mixtral", ("experts.down", "head"), True, False),
        ("Qwen3Moe", ("q", *EXPERTS, "router"), False, True),
        ("Qwen2Moe", EVERY_TARGET, True, True),
        ("Qwen2Moe", ("up", "shared.down"), False, False),
    ],
)
def test_exported_adapters_give_the_same_logits_in_peft(tmp_path, family, targets, tied, rslora):
    from peft import PeftModel

    folder, lora = moe_folder(tmp_path / "base", family=family, tied=tied), LoRA(4, 8.0, targets, rslora=rslora)
    trained = train(adapted(folder, lora), 1)
    export_adapter(save_run(trained, tmp_path / "run", folder), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a tied head, and of its own rank patterns
        wrapped = PeftModel.from_pretrained(peer(folder), tmp_path / "adapter")
    assert all(p.any() for name, p in wrapped.named_parameters() if "lora_B" in name)  # all were loaded
    assert_close(peer_logits(wrapped), logits(trained.model))
    assert read_peft(tmp_path / "adapter", trained.model.config) == lora
    for layout in (ALONE, Layout(tp=2, dp=2, ep=2)):
        for got in run_ranks(loaded, layout.world, layout, folder, tmp_path / "adapter", lora):
            assert_close(got, states(trained, "master"), 0)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe"])
def test_adapters_saved_by_peft_load(tmp_path, family):
    """Adapters that peft loaded from trialign and saves by the layer; and its own, with one A for gate and up."""
    from peft import LoraConfig, PeftModel, get_peft_model

    folder = moe_folder(tmp_path / "base", family=family)
    lora = LoRA(4, 8.0, ("q", *EXPERTS, "router"), rslora=True)
    model = adapted(folder, lora)
    export_adapter(save_run(learner(model), tmp_path / "run", folder), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = save_peft(PeftModel.from_pretrained(peer(folder), tmp_path / "adapter"), tmp_path / "again")
    assert read_peft(again, model.config) == lora
    got = learner(build(folder, build_mesh(), lora, again))
    assert_close(states(got, "master"), states(learner(model), "master"), 0)
    for parameters, targets in ((["gate_up_proj", "down_proj"], EXPERTS), (["gate_up_proj"], EXPERTS[:2])):
        names = [f"mlp.experts.{name}" for name in parameters]
        options: Any = {"target_modules": ["q_proj"], "target_parameters": names}
        wrapped = randomize_b(get_peft_model(peer(folder), LoraConfig(r=4, lora_alpha=8, **options)))
        again, lora = save_peft(wrapped, tmp_path / "again"), LoRA(4, 8.0, ("q", *targets))
        assert read_peft(again, model.config) == lora
        assert_close(logits(build(folder, build_mesh(), lora, again)), peer_logits(wrapped))


def test_targets_without_peft_form_or_weights_are_refused(tmp_path):
    configs = {f: read_config(moe_folder(tmp_path / f, family=f)) for f in ("Mixtral", "Qwen3Moe")}
    unsupported: list[tuple[str, tuple[Target, ...], str]] = [
        ("Mixtral", ("experts.gate", "experts.up"), "experts.gate, experts.up: "),
        ("Qwen3Moe", ("q", "down"), "down: "),
    ]
    for family, targets, message in unsupported:
        assert str(unsupported_by_peft(configs[family], LoRA(1, 1.0, targets))).startswith(message)
    with pytest.raises(ValueError, match="no gate, shared.up; allowed: q, k, v, output, experts.gate, ex"):
        check_lora(configs["Mixtral"], LoRA(1, 1.0, ("q", "gate", "shared.up")), tp=1)
    check_lora(configs["Mixtral"], LoRA(1, 1.0, ("all",), quantize=True), tp=2)
    narrow = read_config(moe_folder(tmp_path / "narrow", moe_intermediate_size=96))
    with pytest.raises(ValueError, match="lora.quantize: .* 64; moe.ffn_size=96"):
        check_lora(narrow, LoRA(1, 1.0, ("q",), quantize=True), tp=1)
