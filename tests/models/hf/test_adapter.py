"""Checkpoints of adapters: resumed in any layout, merged into their base, and exchanged with peft."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_family
from harness import run_ranks
from layouts import ALONE, Layout, assert_close
from peft import LoraConfig, PeftModel, get_peft_model
from peft_case import (
    adapted,
    build,
    learner,
    logits,
    masters,
    peer_logits,
    randomize_b,
    resume,
    resumed,
    samples,
    save_peft,
    save_run,
    states,
    train,
    train_and_save,
)
from tiny import VOCAB, tiny_llama
from tiny_moe import moe_folder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trialign.algorithms.batch import pack
from trialign.algorithms.roles.role import stage_forward
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.lora import LoRA
from trialign.engine.storage import checkpoint
from trialign.engine.storage.checkpoint import Reader
from trialign.models.families.registry import read_config
from trialign.models.hf.adapter_record import check_same_adapter
from trialign.models.hf.convert import export_checkpoint
from trialign.models.hf.peft import export_adapter, load_adapter, read_peft
from trialign.models.hf.peft_config import unsupported_by_peft
from trialign.models.lora import EVERY_TARGET, TARGETS, Target, adapter_shapes, check_lora

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
LORA = LoRA(4, 8.0, ("q", "v", "output", "down"), rslora=True)
EXPERTS: tuple[Target, ...] = ("experts.gate", "experts.up", "experts.down")
DENSE, MOE = Layout(tp=2, pp=2), Layout(tp=2, dp=2, ep=2)
CASES = {
    "lora": ("Llama", LORA, DENSE),
    "qlora": ("Llama", dataclasses.replace(LORA, quantize=True), DENSE),
    "mixtral": ("Mixtral", LoRA(4, 8.0, ("q", "v", *EXPERTS, "router", "head")), MOE),
    "qwen3-moe": ("Qwen3Moe", LoRA(4, 8.0, ("q", *EXPERTS, "router"), rslora=True), MOE),
    "qwen2-moe-tied": ("Qwen2Moe", LoRA(4, 8.0, EVERY_TARGET, rslora=True), MOE),
    "qwen2-moe-qlora": ("Qwen2Moe", LoRA(4, 8.0, EVERY_TARGET, quantize=True), MOE),
    "qwen2-moe-some": ("Qwen2Moe", LoRA(4, 8.0, ("up", "shared.down")), MOE),
}


def peer(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_resumes_merges_and_loads_in_peft(case, tmp_path):
    """The merged folder has its own head, also where the base's is tied."""
    (family, lora, layout), folder, saved = CASES[case], tmp_path / "base", tmp_path / "run" / "step_1"
    if family == "Llama":
        tiny_llama(folder, **SIZES)
    else:
        moe_folder(folder, family=family, tied="tied" in case)
    shapes, mesh = adapter_shapes(read_config(folder), lora), build_mesh()
    first = run_ranks(train_and_save, layout.world, layout, folder, tmp_path / "run", lora)[0]
    kinds = ("master", "exp_avg", "exp_avg_sq")
    assert Reader(saved).tensors.keys() == {f"actor/{kind}/{name}" for kind in kinds for name in shapes}
    first = {name: tensor for name, tensor in first.items() if not name.startswith("grad/")}
    many = Layout(dp=2, ep=2) if family != "Llama" else Layout(tp=2 if lora.quantize else 4)
    for other in (Layout(pp=2), many):
        for got in run_ranks(resume, other.world, other, folder, saved, lora):
            assert_close({name: got[name] for name in first}, first, 0)

    expected = logits(resumed(ALONE, folder, saved, lora).model)
    assert (expected - logits(build(folder, mesh, None))).abs().max() > 0.01
    export_checkpoint(saved, tmp_path / "merged", dtype=torch.float32)
    assert_close(peer_logits(peer(tmp_path / "merged")), expected)
    if lora.adapts("head"):
        assert not read_config(tmp_path / "merged").tie_embeddings

    export_adapter(saved, tmp_path / "adapter")
    wrapped: Any = PeftModel.from_pretrained(peer(folder), tmp_path / "adapter")
    assert all(p.any() for name, p in wrapped.named_parameters() if "lora_B" in name)  # all were loaded
    plain = dataclasses.replace(lora, quantize=False)
    assert_close(peer_logits(wrapped), logits(build(folder, mesh, plain, tmp_path / "adapter")))
    assert read_peft(tmp_path / "adapter", read_config(folder), quantize=lora.quantize) == lora
    saved_masters = {n.removeprefix("master/"): t for n, t in first.items() if n.startswith("master/")}
    for got in run_ranks(masters, layout.world, layout, folder, lora, tmp_path / "adapter"):
        assert_close(got, saved_masters, 0)


@pytest.mark.parametrize("family", ["baichuan2-7b", "qwen-logn", "qwen3", "qwen2-moe"])
def test_families_merge_and_fused_weights_have_no_peft(tmp_path, family):
    """The merged folder, loaded as a plain model, equals the model with adapters on all targets."""
    folder, lora, mesh = tiny_family(tmp_path / "base", family), LoRA(2, 4.0, ("all",)), build_mesh()
    trained = train(build(folder, mesh, lora), 2)
    saved, config = save_run(trained, tmp_path / "run", folder), trained.model.config
    export_checkpoint(saved, tmp_path / "merged", dtype=torch.float32)
    got, base = (logits(build(place, mesh, None)) for place in (tmp_path / "merged", folder))
    assert_close(got, logits(trained.model))
    assert (got - base).abs().max() > 1e-3
    if unsupported_by_peft(config, lora) is None:
        export_adapter(saved, tmp_path / "adapter")
        every = EVERY_TARGET if family == "qwen2-moe" else (*TARGETS, "head")
        assert family in ("qwen3", "qwen2-moe") and read_peft(tmp_path / "adapter", config).targets == every
    else:
        with pytest.raises(ValueError, match="#q: .*fused weight; export it merged"):
            export_adapter(saved, tmp_path / "adapter")


def test_other_bases_and_options_are_refused(tmp_path):
    base, other = (tiny_llama(tmp_path / f"base{seed}", seed=seed, **SIZES) for seed in (0, 9))
    saved, mesh = save_run(learner(build(base, build_mesh(), LORA)), tmp_path / "run", base), build_mesh()
    record = checkpoint.read_state(saved)["adapters"]["actor"]
    for state, lora, at, message in (
        (record, dataclasses.replace(LORA, alpha=4.0), base, "lora.alpha=4.0.* 8.0"),
        (record, CASES["qlora"][1], base, "lora.quantize=True.* False"),
        (record, None, base, "checkpoint has adapters, this config trains full weights"),
        (None, LORA, base, "checkpoint has full weights, this config trains adapters"),
        (record, LORA, other, "base9: not the weights .*base0"),
    ):
        with pytest.raises(ValueError, match=message):
            check_same_adapter(state, build(at, mesh, lora), at)
    shutil.move(base, tmp_path / "moved")
    for place, message in (
        (None, "base0: no such folder, and the adapters"),
        (other, "base9: not the weights .*base0"),
    ):
        with pytest.raises(ValueError, match=message):
            export_checkpoint(saved, tmp_path / "out", base=place)
    export_checkpoint(saved, tmp_path / "out", base=tmp_path / "moved")
    with pytest.raises(ValueError, match="out: exists and is not an empty folder"):
        export_adapter(saved, tmp_path / "out")


def test_critic_adapters_load_in_peft_and_merge(tmp_path):
    folder = tiny_llama(tmp_path / "base", **SIZES)
    saved = save_run(learner(build(folder, build_mesh(), LORA, head="score")), tmp_path / "run", folder, "critic")
    trained = {name.removeprefix("critic/master/") for name in Reader(saved).tensors if "/master/" in name}
    assert trained == {"score.weight", *adapter_shapes(read_config(folder), LORA)}
    export_adapter(saved, tmp_path / "adapter", role="critic")
    export_checkpoint(saved, tmp_path / "merged", role="critic", dtype=torch.float32)
    auto, options = AutoModelForSequenceClassification, {"num_labels": 1, "dtype": torch.float32}
    merged = auto.from_pretrained(tmp_path / "merged", **options)
    wrapped = PeftModel.from_pretrained(auto.from_pretrained(folder, **options), tmp_path / "adapter")
    model, batch = build(folder, build_mesh(), LORA, head="score"), pack(samples(VOCAB))
    load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        scores = model.scores(stage_forward(model, batch, None))[batch.last]
        for other in (merged, wrapped):
            got = torch.cat([other.eval()(torch.tensor([row])).logits[0] for row in samples(VOCAB)])
            torch.testing.assert_close(got, scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe"])
def test_adapters_of_experts_saved_by_peft_load(tmp_path, family):
    """Adapters that peft loaded from trialign and saves by the layer; and its own, with one A for gate and up."""
    folder, mesh = moe_folder(tmp_path / "base", family=family), build_mesh()
    lora, again, config = LoRA(4, 8.0, ("q", *EXPERTS, "router"), rslora=True), tmp_path / "again", read_config(folder)
    trained = learner(adapted(folder, lora))
    export_adapter(save_run(trained, tmp_path / "run", folder), tmp_path / "adapter")
    save_peft(PeftModel.from_pretrained(peer(folder), tmp_path / "adapter"), again)
    assert read_peft(again, config) == lora
    assert_close(masters(0, 1, ALONE, folder, lora, again), states(trained, "master"), 0)
    for parameters, targets in ((["gate_up_proj", "down_proj"], EXPERTS), (["gate_up_proj"], EXPERTS[:2])):
        options: Any = {"target_modules": ["q_proj"], "target_parameters": [f"mlp.experts.{p}" for p in parameters]}
        wrapped = randomize_b(get_peft_model(peer(folder), LoraConfig(r=4, lora_alpha=8, **options)))
        save_peft(wrapped, again)
        lora = LoRA(4, 8.0, ("q", *targets))
        assert read_peft(again, config) == lora
        assert_close(logits(build(folder, mesh, lora, again)), peer_logits(wrapped))


def test_targets_without_peft_form_or_weights_are_refused(tmp_path):
    mixtral, qwen3 = (read_config(moe_folder(tmp_path / f, family=f)) for f in ("Mixtral", "Qwen3Moe"))
    assert str(unsupported_by_peft(mixtral, LoRA(1, 1.0, EXPERTS[:2]))).startswith("experts.gate, experts.up: ")
    assert str(unsupported_by_peft(qwen3, LoRA(1, 1.0, ("q", "down")))).startswith("down: ")
    with pytest.raises(ValueError, match="no gate, shared.up; allowed: q, k, v, output, experts.gate, ex"):
        check_lora(mixtral, LoRA(1, 1.0, ("q", "gate", "shared.up")), tp=1)
    check_lora(mixtral, LoRA(1, 1.0, ("all",), quantize=True), tp=2)
    narrow = read_config(moe_folder(tmp_path / "narrow", moe_intermediate_size=96))
    with pytest.raises(ValueError, match="lora.quantize: .* 64; moe.ffn_size=96"):
        check_lora(narrow, LoRA(1, 1.0, ("q",), quantize=True), tp=1)
