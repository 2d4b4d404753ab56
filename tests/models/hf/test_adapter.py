"""Adapters out and in: peft loads ours, we load peft's, merged exports, checkpoints that hold adapters alone."""

import dataclasses
import json
import math
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_family
from harness import run_ranks
from layouts import assert_close
from peft_case import build, held, learner, logits_of, peft_model, samples, save_peft, train
from safetensors.torch import load_file, save_file
from tiny import VOCAB, tiny_llama
from tiny_moe import tiny_mixtral
from torch import Tensor
from trialign.algorithms.batch import pack
from trialign.algorithms.config.common import LoRAConfig, ParallelConfig
from trialign.algorithms.config.run import RunConfig
from trialign.algorithms.roles.build import read_shape
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.roles.role import stage_forward
from trialign.engine.mesh import Mesh, build_mesh
from trialign.engine.parallel.lora import LoRA
from trialign.engine.storage import checkpoint
from trialign.engine.storage.checkpoint import Reader
from trialign.models.config import HeadKind, ModelConfig
from trialign.models.families.registry import read_config
from trialign.models.folder import assets
from trialign.models.hf.adapter_record import adapter_record, check_same_adapter
from trialign.models.hf.convert import export_checkpoint
from trialign.models.hf.peft import export_adapter, load_adapter, read_peft
from trialign.models.hf.peft_config import unsupported_by_peft
from trialign.models.lora import EVERY_TARGET, TARGETS, adapter_shapes, check_lora, trained_name

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
LORA = LoRA(4, 8.0, ("q", "v", "output", "down"), rslora=True)
QLORA = dataclasses.replace(LORA, quantize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), **SIZES)


def save(trained: Learner, root: Path, base: Path, mesh: Mesh, role: str = "actor") -> Path:
    """A checkpoint as the scripts write it."""
    model = trained.model
    entries = trained.optimizer.entries(role, partial(trained_name, config=model.config, head=model.kind))
    state = {"adapters": {role: adapter_record(model, base)}, "steps": trained.optimizer.steps}
    return checkpoint.save(root, 1, entries, state, mesh, keep=1, assets=assets(base, f"{role}/"))


def trained_checkpoint(
    rank: int, world: int, folder: Path, root: Path, lora: LoRA, tp: int, pp: int, head: HeadKind = "lm"
) -> dict[str, Tensor]:
    """Trains two steps in a layout (an "lm" head), saves, and gives the numbers."""
    mesh = build_mesh(tp=tp, pp=pp)
    model = build(folder, mesh, lora, head=head)
    trained = train(model, 2) if head == "lm" else learner(model)
    save(trained, root, folder, mesh, "actor" if head == "lm" else "critic")
    return held(trained)


def our_logits(folder: Path, lora: LoRA | None, adapter: Path | None) -> Tensor:
    model = build(folder, build_mesh(), lora, adapter)
    with torch.no_grad():
        return model.logits(stage_forward(model, pack(samples(VOCAB)), None))


@pytest.mark.parametrize("lora", [LORA, QLORA], ids=["lora", "qlora"])
def test_a_checkpoint_holds_only_adapters_and_exports_to_peft_and_merged(folder, tmp_path, lora):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run_ranks(trained_checkpoint, 4, folder, tmp_path / "run", lora, 2, 2)
    saved, shapes = tmp_path / "run" / "step_1", adapter_shapes(read_config(folder), lora)
    kinds = {"master", "exp_avg", "exp_avg_sq"}
    assert Reader(saved).tensors.keys() == {f"actor/{kind}/{name}" for kind in kinds for name in shapes}
    tensors = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    assert tensors < 1.5 * 12 * sum(map(math.prod, shapes.values()))

    export_adapter(saved, tmp_path / "adapter")
    export_checkpoint(saved, tmp_path / "merged", dtype=torch.float32)
    expected = our_logits(folder, lora, tmp_path / "adapter")
    assert (expected - our_logits(folder, None, None)).abs().max() > 0.01
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-5, atol=2e-5)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert {n for n, _ in wrapped.named_parameters() if "lora_" in n} == {
        name.replace("_A.weight", "_A.default.weight").replace("_B.weight", "_B.default.weight") for name in shapes
    }
    # On the plain base: what peft computes is what our model computes there.
    plain = expected if not lora.quantize else our_logits(folder, LORA, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(wrapped), plain, rtol=1e-5, atol=2e-5)
    again = read_peft(tmp_path / "adapter", read_config(folder), quantize=lora.quantize)
    assert again == lora
    with pytest.raises(ValueError, match="adapter: exists and is not an empty folder"):
        export_adapter(saved, tmp_path / "adapter")


@pytest.mark.parametrize("family", ["baichuan2-7b", "qwen-logn", "qwen3", "qwen2-moe"])
def test_other_families_merge_fused_weights_too_and_peft_gets_none_of_those(tmp_path, family):
    """What the merged folder computes, loaded as a plain model, is what the model with every adapter computes."""
    folder, lora = tiny_family(tmp_path / "base", family), LoRA(2, 4.0, ("all",))
    mesh, batch = build_mesh(), pack(samples(VOCAB))
    trained = train(build(folder, mesh, lora), 2)
    saved = save(trained, tmp_path / "run", folder, mesh)
    export_checkpoint(saved, tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        expected, got, base = (
            model.logits(stage_forward(model, batch, None))
            for model in (trained.model, build(tmp_path / "merged", mesh, None), build(folder, mesh, None))
        )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - base).abs().max() > 1e-3
    why = unsupported_by_peft(trained.model.config, lora)
    if family in ("qwen3", "qwen2-moe"):
        export_adapter(saved, tmp_path / "adapter")
        every = EVERY_TARGET if family == "qwen2-moe" else (*TARGETS, "head")
        assert why is None and read_peft(tmp_path / "adapter", trained.model.config).targets == every
    else:
        assert why is not None and "PEFT has no adapters on parts of a fused weight" in why
        with pytest.raises(ValueError, match=f"{re.escape(why)}; export it merged"):
            export_adapter(saved, tmp_path / "adapter")


def test_a_merged_model_needs_its_own_base(folder, tmp_path):
    base = Path(shutil.copytree(folder, tmp_path / "base"))
    saved = tmp_path / "run" / "step_1"
    trained_checkpoint(0, 1, base, tmp_path / "run", LORA, 1, 1)
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="base: no such folder, and the adapters"):
        export_checkpoint(saved, tmp_path / "out")
    other = tiny_llama(tmp_path / "other", seed=9, **SIZES)
    with pytest.raises(ValueError, match="other: not the weights that the adapters were trained on, .*base"):
        export_checkpoint(saved, tmp_path / "out", base=other)
    export_checkpoint(saved, tmp_path / "out", base=tmp_path / "moved")


def resumed(rank: int, world: int, folder: Path, path: Path, lora: LoRA, tp: int, pp: int) -> dict[str, Tensor]:
    mesh = build_mesh(tp=tp, pp=pp)
    trained = learner(build(folder, mesh, lora))
    model = trained.model
    check_same_adapter(checkpoint.read_state(path)["adapters"]["actor"], model, folder)
    entries = trained.optimizer.entries("actor", partial(trained_name, config=model.config, head=model.kind))
    trained.optimizer.restore(checkpoint.load(path, entries, mesh)["steps"])
    return held(trained)


def test_a_checkpoint_resumes_in_any_layout_on_the_same_base_only(folder, tmp_path):
    first = run_ranks(trained_checkpoint, 2, folder, tmp_path, LORA, 2, 1)[0]
    for tp, pp in ((1, 1), (1, 2), (4, 1)):
        for got in run_ranks(resumed, tp * pp, folder, tmp_path / "step_1", LORA, tp, pp):
            for name, tensor in first.items():
                assert name.startswith("grad/") or torch.equal(got[name], tensor), name
    saved = checkpoint.read_state(tmp_path / "step_1")["adapters"]["actor"]
    mesh = build_mesh()
    for lora, message in (
        (dataclasses.replace(LORA, alpha=4.0), "lora.alpha=4.0, but the checkpoint was trained with 8.0"),
        (QLORA, "lora.quantize=True, but the checkpoint was trained with False"),
        (None, "the checkpoint has adapters, this config trains full weights"),
    ):
        with pytest.raises(ValueError, match=message):
            check_same_adapter(saved, build(folder, mesh, lora), folder)
    with pytest.raises(ValueError, match="the checkpoint has full weights, this config trains adapters"):
        check_same_adapter(None, build(folder, mesh, LORA), folder)
    other = tiny_llama(tmp_path / "other", seed=9, **SIZES)
    with pytest.raises(ValueError, match="other: not the weights"):
        check_same_adapter(saved, build(other, mesh, LORA), other)


def test_a_critics_adapters_and_score_head_load_in_peft_and_merge(folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    trained_checkpoint(0, 1, folder, tmp_path / "run", LORA, 1, 1, "score")
    saved = tmp_path / "run" / "step_1"
    assert "critic/master/score.weight" in Reader(saved).tensors
    export_adapter(saved, tmp_path / "adapter", role="critic")
    export_checkpoint(saved, tmp_path / "merged", role="critic", dtype=torch.float32)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(base, tmp_path / "adapter")
    model = build(folder, build_mesh(), LORA, head="score")
    load_adapter(model, tmp_path / "adapter")
    rows = samples(VOCAB)
    with torch.no_grad():
        scores = model.scores(stage_forward(model, pack(rows), None))
        for row, last in zip(rows, torch.tensor([len(row) for row in rows]).cumsum(0) - 1, strict=True):
            for peer in (merged, wrapped):
                got = peer.eval()(torch.tensor([row])).logits[0, 0]
                torch.testing.assert_close(got, scores[last], rtol=1e-5, atol=1e-6)


def loaded(rank: int, world: int, folder: Path, adapter: Path, tp: int, pp: int) -> dict[str, Tensor]:
    return held(learner(build(folder, build_mesh(tp=tp, pp=pp), LORA, adapter)))


def test_pefts_adapter_loads_into_any_layout(folder, tmp_path):
    adapter = save_peft(peft_model(folder, LORA), tmp_path)
    theirs = load_file(adapter / "adapter_model.safetensors")
    for tp, pp in ((1, 1), (2, 2), (4, 1)):
        for got in run_ranks(loaded, tp * pp, folder, adapter, tp, pp):
            ours = {n.removeprefix("master/"): t for n, t in got.items() if n.startswith("master/")}
            assert_close(ours, theirs, 0)


def test_other_adapters_are_refused_by_name(folder, tmp_path):
    shape = read_config(folder)
    adapter = save_peft(peft_model(folder, LORA), tmp_path / "good")
    values = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    first, named = sorted(tensors)[0], values["target_modules"]

    def spoilt(changes: dict[str, Any], tensors: dict[str, Tensor] = tensors) -> Path:
        path = tmp_path / "spoilt"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(values | changes))
        save_file(tensors, path / "adapter_model.safetensors")
        return path

    for key, *refused in (  # the message has key and value
        ("use_dora", True),
        ("peft_type", "LOHA"),
        ("r", None, "8"),
        ("lora_alpha", [8]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 0.1}),
        ("alora_invocation_tokens", [5, 6]),
        ("velora_config", {"rank": 4}),
        ("monteclora_config", {"use_entropy": True}),
        ("layers_to_transform", [0]),
        ("a_key_of_tomorrow", 1),
        ("use_rslora", "false"),
        ("target_modules", 7, ["q_proj", None], "(q_proj"),
        ("exclude_modules", {"q_proj": 1}),
        ("rank_pattern", {"q_proj": 8}),
        ("init_lora_weights", "pissa"),
    ):
        for value in refused:
            with pytest.raises(ValueError, match=re.escape(f"adapter_config.json: {key}={value!r}")):
                read_peft(spoilt({key: value}), shape)
    for changes, message in (  # of the weights that are named, and the adapters in the file
        ({"target_modules": ["q_proj"]}, "target_modules lacks model.layers.0.self_attn.v_proj"),
        ({"target_modules": [*named, "k_proj"]}, "target_modules has model.layers.0.self_attn.k_proj"),
        ({"target_modules": "all-linear"}, "target_modules has model.layers.0.self_attn.k_proj"),
        (
            {"target_modules": r".*layers\.[01]\..*(q|v|o|down)_proj"},
            "target_modules lacks model.layers.2.self_attn.q_proj",
        ),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, "target_modules lacks model.layers.1.self_attn.q_proj"),
        ({"r": 8}, r"has shape \[4, 128\], expected \[8, 128\]"),
    ):
        with pytest.raises(ValueError, match=message):
            read_peft(spoilt(changes), shape)
    for changes in (
        {"target_modules": r".*(q|v|o|down)_proj"},
        {"target_modules": [*named, "k_proj"], "exclude_modules": r".*\.k_proj"},
        {"target_modules": None},
        {"lora_dropout": 0.1, "a_key_of_tomorrow": False},
    ):
        assert read_peft(spoilt(changes), shape) == LORA
    for tensor, message in (
        (tensors[first].int(), f"{first} is I32; allowed: .*'F32'"),
        (
            tensors[first].index_fill(0, torch.tensor(3), math.nan),
            f"{first} has NaN or infinity; allowed: finite numbers",
        ),
    ):
        with pytest.raises(ValueError, match=f"spoilt/adapter_model.safetensors: {message}"):
            read_peft(spoilt({}, tensors | {first: tensor}), shape)
    with pytest.raises(ValueError, match=r"model.score.weight has shape \[2, 128\], expected \[1, 128\]"):
        read_peft(spoilt({}, tensors | {"base_model.model.score.weight": torch.zeros(2, 128)}), shape)
    unknown = tensors | {"base_model.model.model.embed_tokens.lora_A.weight": torch.zeros(4, 128)}
    with pytest.raises(ValueError, match="unknown to the model: base_model.model.model.embed_tokens.lora_A"):
        read_peft(spoilt({}, unknown), shape)
    with pytest.raises(ValueError, match=f"missing tensors: {first}"):
        read_peft(spoilt({}, {name: t for name, t in tensors.items() if name != first}), shape)
    with pytest.raises(ValueError, match="no adapter_config.json"):
        read_peft(folder, shape)
    (spoilt({}) / "adapter_model.safetensors").rename(tmp_path / "spoilt" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no adapter_model.safetensors \(adapter_model.bin is a pickle"):
        read_peft(tmp_path / "spoilt", shape)
    with open(spoilt({}) / "adapter_model.safetensors", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match="corrupt or truncated"):
        read_peft(tmp_path / "spoilt", shape)

    def look(model: Path, lora: LoRA) -> ModelConfig:
        numbers = {key: getattr(lora, key) for key in ("rank", "alpha", "rslora", "targets")}
        return read_shape(str(model), ParallelConfig(), RunConfig(), "lm", LoRAConfig(**numbers, adapter=str(adapter)))

    for lora, message in (
        (dataclasses.replace(LORA, alpha=1.0), "alpha=8.0, the model's adapters have 1.0"),
        (dataclasses.replace(LORA, rslora=False), "rslora=True, the model's adapters have False"),
        (dataclasses.replace(LORA, targets=("q",)), "the model's adapters have"),
    ):
        with pytest.raises(ValueError, match=message):
            load_adapter(build(folder, build_mesh(), lora), adapter)
        with pytest.raises(ValueError, match=message):  # as every script looks at its model, before it is loaded
            look(folder, lora)
    look(folder, LORA)
    with pytest.raises(ValueError, match=r"has shape \[4, 128\], expected \[4, 64\]"):
        look(tiny_llama(tmp_path / "narrow", hidden_size=64), LORA)


def test_the_config_section(tmp_path):
    shapes = [read_config(make(tmp_path / make.__name__)) for make in (tiny_llama, tiny_mixtral)]
    assert LoRAConfig().adapters(shapes[0]) is None
    asked = LoRAConfig(rank=4, alpha=8.0, rslora=True, targets=("q", "v", "output", "down"), quantize=True)
    assert asked.adapters(shapes[0]) == QLORA
    for shape, targets in zip(shapes, (TARGETS, ("q", "k", "v", "output")), strict=True):
        default = LoRAConfig(rank=4).adapters(shape)
        assert default is not None and default.targets == targets and unsupported_by_peft(shape, default) is None
        check_lora(shape, default, tp=1)
    for changes, message in (
        ({"rank": -1}, "rank=-1: must be 0"),
        ({"quantize": True}, "quantize=True: must be off where rank is 0"),
        ({"rank": 1, "targets": ("q", "q")}, "targets=.*each once"),
    ):
        with pytest.raises(ValueError, match=message):
            LoRAConfig(**changes)  # pyright: ignore[reportArgumentType]
