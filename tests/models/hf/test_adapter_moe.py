"""Adapters of mixtures and heads in and out: checkpoints in other layouts, merged exports, PEFT both ways."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from layouts import assert_close
from peft_case import adapted, build, held, learner, logits_of, masters, samples, save_peft, train
from test_adapter import save
from tiny import VOCAB
from tiny_moe import mixture, world_of
from torch import Tensor
from trialign.algorithms.batch import pack
from trialign.algorithms.roles.role import stage_forward
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.lora import LoRA
from trialign.engine.storage import checkpoint
from trialign.models.families.registry import read_config
from trialign.models.hf.adapter_record import check_same_adapter
from trialign.models.hf.convert import export_checkpoint
from trialign.models.hf.peft import export_adapter, read_peft
from trialign.models.hf.peft_config import unsupported_by_peft
from trialign.models.lora import EVERY_TARGET, Target, check_lora, trained_name

QUANTIZED = LoRA(4, 8.0, EVERY_TARGET, quantize=True)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory) -> Path:
    return mixture(tmp_path_factory.mktemp("base"), tied=request.param)


def saved_run(rank: int, world: int, folder: Path, root: Path, lora: LoRA, sizes: dict[str, Any]) -> dict[str, Tensor]:
    """Two steps in a layout, a checkpoint of them, and the numbers."""
    trained = train(adapted(folder, lora, sizes), 2)
    save(trained, root, folder, trained.model.mesh)
    return held(trained)


def resumed(rank: int, world: int, folder: Path, path: Path, lora: LoRA, sizes: dict[str, Any]) -> dict[str, Tensor]:
    trained = learner(adapted(folder, lora, sizes))
    model = trained.model
    check_same_adapter(checkpoint.read_state(path)["adapters"]["actor"], model, folder)
    entries = trained.optimizer.entries("actor", partial(trained_name, config=model.config, head=model.kind))
    trained.optimizer.restore(checkpoint.load(path, entries, model.mesh)["steps"])
    return held(trained)


@pytest.mark.parametrize("lora", [LoRA(4, 8.0, ("all",)), QUANTIZED], ids=["lora", "qlora"])
def test_checkpoints_resume_in_another_layout_and_export_merged(folder, tmp_path, lora):
    """The merged folder has a head of its own, also where the base's is tied; transformers gives the same logits."""
    from transformers import AutoModelForCausalLM

    saved = tmp_path / "step_1"
    first = run_ranks(saved_run, 4, folder, tmp_path, lora, {"tp": 2, "ep": 2})[0]
    for sizes in ({}, {"pp": 2}, {"ep": 2}):
        for got in run_ranks(resumed, world_of(sizes), folder, saved, lora, sizes):
            for name, tensor in first.items():
                assert name.startswith("grad/") or torch.equal(got[name], tensor), name
    model = build(folder, build_mesh(), lora)
    trained = learner(model)
    entries = trained.optimizer.entries("actor", partial(trained_name, config=model.config, head=model.kind))
    trained.optimizer.restore(checkpoint.load(saved, entries, model.mesh)["steps"])
    with torch.no_grad():
        expected = model.logits(stage_forward(model, pack(samples(VOCAB)), None))
    export_checkpoint(saved, tmp_path / "merged", dtype=torch.float32)
    assert not read_config(tmp_path / "merged").tie_embeddings
    got = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert_close({"logits": got}, {"logits": expected})


def loaded(rank: int, world: int, folder: Path, adapter: Path, lora: LoRA, sizes: dict[str, Any]) -> dict[str, Tensor]:
    return masters(learner(build(folder, build_mesh(**sizes), lora, adapter)))


EXPERTS = ("experts.gate", "experts.up", "experts.down")


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
def test_peft_loads_the_adapter_and_gives_the_same_logits(tmp_path, family, targets, tied, rslora):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, lora = mixture(tmp_path / "base", family=family, tied=tied), LoRA(4, 8.0, targets, rslora=rslora)
    trained = train(adapted(folder, lora), 1)
    saved = save(trained, tmp_path / "run", folder, trained.model.mesh)
    export_adapter(saved, tmp_path / "adapter")
    with torch.no_grad():
        expected = trained.model.logits(stage_forward(trained.model, pack(samples(VOCAB)), None))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a head is tied, and what it makes of its own rank patterns
        wrapped = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert all(p.any() for name, p in wrapped.named_parameters() if "lora_B" in name)  # none was left as it began
    assert_close({"logits": logits_of(wrapped)}, {"logits": expected})
    assert read_peft(tmp_path / "adapter", trained.model.config) == lora
    ours = masters(trained)
    for sizes in ({}, {"tp": 2, "ep": 2}):
        for got in run_ranks(loaded, world_of(sizes), folder, tmp_path / "adapter", lora, sizes):
            assert_close(got, ours, 0)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe"])
def test_what_peft_itself_saves_of_a_mixture_loads_back(tmp_path, family):
    """Adapters it read from us, which it holds by the layer; and such that it made, with one A for gate and up."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = mixture(tmp_path / "base", family=family)
    lora = LoRA(4, 8.0, ("q", *EXPERTS, "router"), rslora=True)
    model = adapted(folder, lora)
    export_adapter(save(learner(model), tmp_path / "run", folder, model.mesh), tmp_path / "adapter")

    def again(wrapped: Any) -> Path:
        return save_peft(wrapped, tmp_path / "again")

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = again(PeftModel.from_pretrained(base(), tmp_path / "adapter"))
    assert read_peft(theirs, model.config) == lora
    assert_close(masters(learner(build(folder, build_mesh(), lora, theirs))), masters(learner(model)), 0)

    for parameters, targets in ((["gate_up_proj", "down_proj"], EXPERTS), (["gate_up_proj"], EXPERTS[:2])):
        names = [f"mlp.experts.{name}" for name in parameters]
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=names)
        wrapped: Any = get_peft_model(base(), config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        theirs, lora = again(wrapped), LoRA(4, 8.0, ("q", *targets))
        assert read_peft(theirs, model.config) == lora
        ours = build(folder, build_mesh(), lora, theirs)
        with torch.no_grad():
            got = ours.logits(stage_forward(ours, pack(samples(VOCAB)), None))
        assert_close({"logits": got}, {"logits": logits_of(wrapped)})


def test_what_peft_has_no_form_for_and_what_a_model_lacks_is_refused_by_name(tmp_path):
    configs = {f: read_config(mixture(tmp_path / f, family=f)) for f in ("Mixtral", "Qwen3Moe")}
    refused: list[tuple[str, tuple[Target, ...], str]] = [
        ("Mixtral", ("experts.gate", "experts.up"), "experts.gate, experts.up: PEFT reads adapters of experts.down al"),
        ("Qwen3Moe", ("q", "down"), "down: PEFT takes modules of these names in a Qwen3-MoE for those of experts"),
    ]
    for family, targets, message in refused:
        assert message in str(unsupported_by_peft(configs[family], LoRA(1, 1.0, targets)))
    with pytest.raises(
        ValueError, match="the model has no gate, shared.up; allowed: q, k, v, output, experts.gate, ex"
    ):
        check_lora(configs["Mixtral"], LoRA(1, 1.0, ("q", "gate", "shared.up")), tp=1)
    check_lora(configs["Mixtral"], LoRA(1, 1.0, ("all",), quantize=True), tp=2)
    with pytest.raises(ValueError, match="multiple of 64; moe.ffn_size=96 is not"):
        narrow = read_config(mixture(tmp_path / "narrow", moe_intermediate_size=96))
        check_lora(narrow, LoRA(1, 1.0, ("q",), quantize=True), tp=1)
