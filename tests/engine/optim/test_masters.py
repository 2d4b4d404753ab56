"""bf16 training starts from masters in the full precision of the model folder, in every layout."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from peft_case import peft_model, save_peft
from safetensors.torch import load_file
from scripts import options, succeed
from tiny import assemble, tiny_chat_model, tiny_llama
from tiny_moe import tiny_mixtral
from torch import Tensor
from trialign.algorithms.config.common import LoRAConfig, OptimizerConfig
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.engine.mesh import build_mesh
from trialign.engine.optim import adamw as optimizer
from trialign.engine.parallel.lora import LoRA
from trialign.engine.storage.checkpoint import Reader
from trialign.models.decoder import Decoder
from trialign.models.families.registry import read_config
from trialign.models.lora import trained_name

Case = tuple[Path, dict[str, Any]]  # a folder, arguments of build_decoder


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("masters")
    tied, config = tiny_llama(root / "tied"), LoRAConfig(4, 8.0, targets=("q", "down"), adapter=str(root / "adapter"))
    save_peft(peft_model(tied, LoRA(4, 8.0, config.targets)), root / "adapter")
    return {
        "tied": (tied, {}),
        "untied": (tiny_llama(root / "untied", tied=False), {}),
        "reward model": (tiny_llama(root / "score", score=True), {"head": "score"}),
        "adapters": (tied, {"lora": config}),
        "experts": (tiny_mixtral(root / "moe"), {}),
    }


def started(case: Case, dtype: str, **sizes: Any) -> dict[str, Tensor]:
    """Whole states and weights after a step at a learning rate of 0."""
    (folder, arguments), mesh = case, build_mesh(**sizes)
    model = build_decoder(str(folder), read_config(folder), mesh, dtype, trained=True, **arguments)
    learner = build_learner(model, OptimizerConfig(lr=0.0, weight_decay=0.1), 1, ema_decay=0.5)
    weights = [bucket.weights.clone() for bucket in learner.optimizer.buckets]
    for bucket in learner.optimizer.buckets:
        bucket.grads.fill_(1.0)
        bucket.fresh.clear()
    learner.optimizer.step(0.0)
    for bucket, before in zip(learner.optimizer.buckets, weights, strict=True):
        assert torch.equal(bucket.weights, before)  # as in the first forward
        bucket.states["weight"] = bucket.weights[bucket.local]
    return whole(model, learner.optimizer, mesh)


def whole(model: Decoder, adamw: optimizer.ShardedAdamW, mesh: Any) -> dict[str, Tensor]:
    return assemble(adamw.entries("r", partial(trained_name, config=model.config, head=model.kind)), mesh.world)


def all_cases(rank: int, world: int, cases: dict[str, Case]) -> dict[str, dict[str, Tensor]]:
    """Each case in a layout of its own."""
    optimizer.REFINED_ELEMENTS = 100
    layouts = [{"tp": 2}, {"pp": 2}, {"dp": 2}, {"tp": 2}, {"dp": 2, "ep": 2}]
    return {
        name: started(case, "bfloat16", **sizes) for (name, case), sizes in zip(cases.items(), layouts, strict=True)
    }


def test_masters_have_the_precision_of_the_folder(cases):
    expected = {name: started(case, "float32") for name, case in cases.items()}
    folder, _ = cases["untied"]
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(expected["untied"][f"r/master/{name}"], tensor), name
        assert tensor.dim() == 1 or not torch.equal(tensor, tensor.bfloat16().float()), f"{name} is bf16 already"
    for rank in run_ranks(all_cases, 2, cases, timeout=120, fresh=True):
        for name, got in rank.items():
            assert got.keys() == expected[name].keys()
            for key, tensor in got.items():
                master, kind = expected[name][key.replace("/weight/", "/master/")], key.split("/")[1]
                if kind in ("master", "ema", "weight"):
                    assert torch.equal(tensor, master.bfloat16() if kind == "weight" else master), key


def test_run_at_zero_learning_rate_ends_with_the_folder_s_numbers(tmp_path):
    """Through the script, its checkpoint, and a run from there."""
    model = tiny_chat_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say", "response": "hi"}\n' * 4)
    given = options(
        data_sources=tmp_path / "rows.jsonl", data_max_tokens=64, update_batch_size=2, run_steps=1, run_show=0,
        optimizer_lr=0, model_path=model, model_dtype="bfloat16", run_output=tmp_path / "run",
    )  # fmt: skip
    succeed("sft", *given)
    reader = Reader(tmp_path / "run" / "checkpoints" / "step_1")
    again = build_decoder(str(reader.path), read_config(reader.path), build_mesh(), "bfloat16", trained=True)
    masters = whole(again, build_learner(again, OptimizerConfig(), 1).optimizer, again.mesh)
    for name, tensor in load_file(model / "model.safetensors").items():
        assert torch.equal(reader.read(f"actor/master/{name}"), tensor), name
        assert torch.equal(masters[f"r/master/{name}"], tensor), name
