"""PEFT adapters in and out, merged exports, and checkpoints of adapters alone."""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_family
from harness import run_ranks
from layouts import ALONE, Layout, assert_close
from peft_case import (
    build,
    learner,
    logits,
    peer_logits,
    peft_model,
    resume,
    samples,
    save_peft,
    save_run,
    states,
    train,
    train_and_save,
)
from safetensors.torch import load_file, save_file
from tiny import VOCAB, tiny_llama
from tiny_moe import tiny_mixtral
from torch import Tensor
from trialign.algorithms.batch import pack
from trialign.algorithms.config.common import LoRAConfig, ParallelConfig
from trialign.algorithms.config.run import RunConfig
from trialign.algorithms.roles.build import read_shape
from trialign.algorithms.roles.role import stage_forward
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.lora import LoRA
from trialign.engine.storage import checkpoint
from trialign.engine.storage.checkpoint import Reader
from trialign.models.config import ModelConfig
from trialign.models.families.registry import read_config
from trialign.models.hf.adapter_record import check_same_adapter
from trialign.models.hf.convert import export_checkpoint
from trialign.models.hf.peft import export_adapter, load_adapter, read_peft
from trialign.models.hf.peft_config import unsupported_by_peft
from trialign.models.lora import EVERY_TARGET, TARGETS, adapter_shapes, check_lora

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
LORA = LoRA(4, 8.0, ("q", "v", "output", "down"), rslora=True)
QLORA = dataclasses.replace(LORA, quantize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), **SIZES)


def adapter_logits(folder: Path, lora: LoRA | None, adapter: Path | None) -> Tensor:
    return logits(build(folder, build_mesh(), lora, adapter))


@pytest.mark.parametrize("lora", [LORA, QLORA], ids=["lora", "qlora"])
def test_checkpoint_of_adapters_exports_to_peft_and_merged(folder, tmp_path, lora):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run_ranks(train_and_save, 4, Layout(tp=2, pp=2), folder, tmp_path / "run", lora)
    saved, shapes = tmp_path / "run" / "step_1", adapter_shapes(read_config(folder), lora)
    kinds = {"master", "exp_avg", "exp_avg_sq"}
    assert Reader(saved).tensors.keys() == {f"actor/{kind}/{name}" for kind in kinds for name in shapes}
    export_adapter(saved, tmp_path / "adapter")
    export_checkpoint(saved, tmp_path / "merged", dtype=torch.float32)
    expected = adapter_logits(folder, lora, tmp_path / "adapter")
    assert (expected - adapter_logits(folder, None, None)).abs().max() > 0.01
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(peer_logits(merged), expected, rtol=1e-5, atol=2e-5)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(base, tmp_path / "adapter")
    names = {n.replace(".default", "") for n, _ in wrapped.named_parameters() if "lora_" in n}
    assert names == shapes.keys()
    plain = expected if not lora.quantize else adapter_logits(folder, LORA, tmp_path / "adapter")
    torch.testing.assert_close(peer_logits(wrapped), plain, rtol=1e-5, atol=2e-5)
    assert read_peft(tmp_path / "adapter", read_config(folder), quantize=lora.quantize) == lora
    with pytest.raises(ValueError, match="adapter: exists and is not an empty folder"):
        export_adapter(saved, tmp_path / "adapter")


@pytest.mark.parametrize("family", ["baichuan2-7b", "qwen-logn", "qwen3", "qwen2-moe"])
def test_every_family_merges_and_fused_weights_are_refused_by_peft(tmp_path, family):
    """The merged folder, loaded as a plain model, equals the model with adapters on all targets."""
    folder, lora, mesh = tiny_family(tmp_path / "base", family), LoRA(2, 4.0, ("all",)), build_mesh()
    trained = train(build(folder, mesh, lora), 2)
    saved = save_run(trained, tmp_path / "run", folder)
    export_checkpoint(saved, tmp_path / "merged", dtype=torch.float32)
    got, base = (logits(build(place, mesh, None)) for place in (tmp_path / "merged", folder))
    torch.testing.assert_close(got, logits(trained.model), rtol=1e-5, atol=1e-5)
    assert (got - base).abs().max() > 1e-3
    config, reason = trained.model.config, unsupported_by_peft(trained.model.config, lora)
    if reason is None:
        export_adapter(saved, tmp_path / "adapter")
        every = EVERY_TARGET if family == "qwen2-moe" else (*TARGETS, "head")
        assert family in ("qwen3", "qwen2-moe") and read_peft(tmp_path / "adapter", config).targets == every
    else:
        with pytest.raises(ValueError, match="#q: .*fused weight; export it merged"):
            export_adapter(saved, tmp_path / "adapter")


def test_runs_resume_in_any_layout_on_the_same_base_and_options_only(folder, tmp_path):
    base = Path(shutil.copytree(folder, tmp_path / "base"))
    saved, mesh = tmp_path / "run" / "step_1", build_mesh()
    first = run_ranks(train_and_save, 2, Layout(tp=2), base, tmp_path / "run", LORA)[0]
    first = {name: tensor for name, tensor in first.items() if not name.startswith("grad/")}
    for layout in (ALONE, Layout(pp=2), Layout(tp=4)):
        for got in run_ranks(resume, layout.world, layout, base, saved, LORA):
            assert_close({name: got[name] for name in first}, first, 0)
    record = checkpoint.read_state(saved)["adapters"]["actor"]
    other = tiny_llama(tmp_path / "other", seed=9, **SIZES)
    for state, lora, at, message in (
        (record, dataclasses.replace(LORA, alpha=4.0), base, "lora.alpha=4.0.* 8.0"),
        (record, QLORA, base, "lora.quantize=True.* False"),
        (record, None, base, "checkpoint has adapters, this config trains full weights"),
        (None, LORA, base, "checkpoint has full weights, this config trains adapters"),
        (record, LORA, other, "other: not the weights .*base"),
    ):
        with pytest.raises(ValueError, match=message):
            check_same_adapter(state, build(at, mesh, lora), at)
    base.rename(tmp_path / "moved")
    for place, message in ((None, "base: no such folder, and the adapters"), (other, "other: not the weights .*base")):
        with pytest.raises(ValueError, match=message):
            export_checkpoint(saved, tmp_path / "out", base=place)
    export_checkpoint(saved, tmp_path / "out", base=tmp_path / "moved")


def test_critic_adapters_and_score_head_load_in_peft_and_merge(folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    trained = learner(build(folder, build_mesh(), LORA, head="score"))
    saved = save_run(trained, tmp_path / "run", folder, "critic")
    export_adapter(saved, tmp_path / "adapter", role="critic")
    export_checkpoint(saved, tmp_path / "merged", role="critic", dtype=torch.float32)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(base, tmp_path / "adapter")
    model = build(folder, build_mesh(), LORA, head="score")
    load_adapter(model, tmp_path / "adapter")
    batch = pack(samples(VOCAB))
    with torch.no_grad():
        scores = model.scores(stage_forward(model, batch, None))[batch.last]
        for peer in (merged, wrapped):
            got = torch.cat([peer.eval()(torch.tensor([row])).logits[0] for row in samples(VOCAB)])
            torch.testing.assert_close(got, scores, rtol=1e-5, atol=1e-6)


def loaded(rank: int, world: int, layout: Layout, folder: Path, adapter: Path) -> dict[str, Tensor]:
    return states(learner(build(folder, layout.mesh(), LORA, adapter)), "master")


def test_peft_adapter_loads_in_any_layout(folder, tmp_path):
    adapter = save_peft(peft_model(folder, LORA), tmp_path)
    expected = load_file(adapter / "adapter_model.safetensors")
    for layout in (ALONE, Layout(tp=2, pp=2), Layout(tp=4)):
        for got in run_ranks(loaded, layout.world, layout, folder, adapter):
            assert_close(got, expected, 0)


INVALID: list[tuple[Any, ...]] = [  # key, invalid values: the message has key and value
    ("use_dora", True),
    ("peft_type", "LOHA"),
    ("r", None, "8"),
    ("lora_alpha", [8]),
    ("arrow_config", {"top_k": 2}),
    ("alora_invocation_tokens", [5, 6]),
    ("layers_to_transform", [0]),
    ("a_future_key", 1),
    ("use_rslora", "false"),
    ("target_modules", 7, ["q_proj", None], "(q_proj"),
    ("exclude_modules", {"q_proj": 1}),
    ("rank_pattern", {"q_proj": 8}),
    ("init_lora_weights", "pissa"),
]


class Copies:
    """Copies of a PEFT folder with changed keys or tensors."""

    def __init__(self, folder: Path, root: Path):
        self.path = root / "copy"
        self.values = json.loads((folder / "adapter_config.json").read_text())
        self.tensors = load_file(folder / "adapter_model.safetensors")

    def __call__(self, keys: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None) -> Path:
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        (self.path / "adapter_config.json").write_text(json.dumps(self.values | (keys or {})))
        save_file(tensors or self.tensors, self.path / "adapter_model.safetensors")
        return self.path


@pytest.fixture
def copies(folder, tmp_path) -> Copies:
    return Copies(save_peft(peft_model(folder, LORA), tmp_path / "good"), tmp_path)


def test_peft_configs_other_than_plain_lora_are_refused(folder, copies):
    shape, named = read_config(folder), copies.values["target_modules"]
    for key, *values in INVALID:
        for value in values:
            with pytest.raises(ValueError, match=re.escape(f"adapter_config.json: {key}={value!r}")):
                read_peft(copies({key: value}), shape)
    module = "model.layers.{}.self_attn.{}_proj".format
    for keys, message in (
        ({"target_modules": ["q_proj"]}, f"target_modules lacks {module(0, 'v')}"),
        ({"target_modules": [*named, "k_proj"]}, f"target_modules has {module(0, 'k')}"),
        ({"target_modules": "all-linear"}, f"target_modules has {module(0, 'k')}"),
        ({"target_modules": r".*layers\.[01]\..*(q|v|o|down)_proj"}, f"target_modules lacks {module(2, 'q')}"),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, f"target_modules lacks {module(1, 'q')}"),
        ({"r": 8}, r"has shape \[4, 128\], expected \[8, 128\]"),
    ):
        with pytest.raises(ValueError, match=message):
            read_peft(copies(keys), shape)
    for keys in (
        {"target_modules": r".*(q|v|o|down)_proj"},
        {"target_modules": [*named, "k_proj"], "exclude_modules": r".*\.k_proj"},
        {"target_modules": None},
        {"lora_dropout": 0.1, "a_future_key": False},
    ):
        assert read_peft(copies(keys), shape) == LORA


def test_corrupt_peft_folders_are_refused_by_tensor(folder, copies):
    shape, tensors, first = read_config(folder), copies.tensors, min(copies.tensors)
    score, embedding = "base_model.model.score.weight", "base_model.model.model.embed_tokens.lora_A.weight"
    nan = tensors[first].index_fill(0, torch.tensor(3), math.nan)
    for changed, message in (
        (tensors | {first: tensors[first].int()}, f"{first} is I32; allowed: .*'F32'"),
        (tensors | {first: nan}, f"{first} has NaN or infinity"),
        (tensors | {score: torch.zeros(2, 128)}, rf"{score} has shape \[2, 128\], expected \[1, 128\]"),
        (tensors | {embedding: torch.zeros(4, 128)}, f"unknown to the model: {embedding}"),
        ({name: t for name, t in tensors.items() if name != first}, f"missing tensors: {first}"),
    ):
        with pytest.raises(ValueError, match=f"adapter_model.safetensors: .*{message}"):
            read_peft(copies(tensors=changed), shape)
    with pytest.raises(ValueError, match="no adapter_config.json"):
        read_peft(folder, shape)
    (copies() / "adapter_model.safetensors").rename(copies.path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no adapter_model.safetensors \(adapter_model.bin is a pickle"):
        read_peft(copies.path, shape)
    with open(copies() / "adapter_model.safetensors", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match="corrupt or truncated"):
        read_peft(copies.path, shape)


def test_adapters_of_other_options_or_sizes_are_refused(folder, copies, tmp_path):
    adapter = copies()

    def read(model: Path, lora: LoRA) -> ModelConfig:
        options = {key: getattr(lora, key) for key in ("rank", "alpha", "rslora", "targets")}
        return read_shape(str(model), ParallelConfig(), RunConfig(), "lm", LoRAConfig(**options, adapter=str(adapter)))

    read(folder, LORA)
    for changes, message in (
        ({"alpha": 1.0}, "alpha=8.0, .* 1.0"),
        ({"rslora": False}, "rslora=True, .* False"),
        ({"targets": ("q",)}, "targets="),
    ):
        lora = dataclasses.replace(LORA, **changes)
        with pytest.raises(ValueError, match=message):
            load_adapter(build(folder, build_mesh(), lora), adapter)
        with pytest.raises(ValueError, match=message):  # before the model is loaded
            read(folder, lora)
    with pytest.raises(ValueError, match=r"has shape \[4, 128\], expected \[4, 64\]"):
        read(tiny_llama(tmp_path / "narrow", hidden_size=64), LORA)


def test_lora_config_section(tmp_path):
    dense, moe = (read_config(make(tmp_path / make.__name__)) for make in (tiny_llama, tiny_mixtral))
    assert LoRAConfig().adapters(dense) is None
    section = LoRAConfig(rank=4, alpha=8.0, rslora=True, targets=("q", "v", "output", "down"), quantize=True)
    assert section.adapters(dense) == QLORA
    for shape, targets in ((dense, TARGETS), (moe, ("q", "k", "v", "output"))):
        default = LoRAConfig(rank=4).adapters(shape)
        assert default is not None and default.targets == targets and unsupported_by_peft(shape, default) is None
        check_lora(shape, default, tp=1)
    invalid: Sequence[dict[str, Any]] = ({"rank": -1}, {"quantize": True}, {"rank": 1, "targets": ("q", "q")})
    for changes in invalid:
        key = list(changes)[-1]
        with pytest.raises(ValueError, match=re.escape(f"{key}={changes[key]!r}")):
            LoRAConfig(**changes)
