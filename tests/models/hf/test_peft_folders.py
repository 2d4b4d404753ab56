"""PEFT folders and `lora` options: those of plain LoRA that fit the model are read, others refused."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_case import build, peft_model, save_peft
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from torch import Tensor
from trialign.algorithms.config.common import LoRAConfig, ParallelConfig
from trialign.algorithms.config.run import RunConfig
from trialign.algorithms.roles.build import read_shape
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.lora import LoRA
from trialign.models.config import ModelConfig
from trialign.models.families.registry import read_config
from trialign.models.hf.peft import load_adapter, read_peft

LORA = LoRA(4, 8.0, ("q", "v", "output", "down"), rslora=True)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


class Copies:
    """Copies of a PEFT folder with changed keys or tensors."""

    def __init__(self, folder: Path, path: Path):
        self.path, self.values = path, json.loads((folder / "adapter_config.json").read_text())
        self.tensors = load_file(folder / "adapter_model.safetensors")

    def __call__(self, keys: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None) -> Path:
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        (self.path / "adapter_config.json").write_text(json.dumps(self.values | (keys or {})))
        save_file(tensors or self.tensors, self.path / "adapter_model.safetensors")
        return self.path


@pytest.fixture
def copies(folder, tmp_path) -> Copies:
    return Copies(save_peft(peft_model(folder, LORA), tmp_path / "good"), tmp_path / "copy")


def test_configs_other_than_plain_lora_are_refused(folder, copies):
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
        ({"r": 8}, r"has shape \[4, 32\], expected \[8, 32\]"),
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


def test_corrupt_folders_are_refused_by_tensor(folder, copies):
    shape, tensors, first = read_config(folder), copies.tensors, min(copies.tensors)
    score, embedding = "base_model.model.score.weight", "base_model.model.model.embed_tokens.lora_A.weight"
    nan = tensors[first].index_fill(0, torch.tensor(3), math.nan)
    for changed, message in (
        (tensors | {first: tensors[first].int()}, f"{first} is I32; allowed: .*'F32'"),
        (tensors | {first: nan}, f"{first} has NaN or infinity"),
        (tensors | {score: torch.zeros(2, 32)}, rf"{score} has shape \[2, 32\], expected \[1, 32\]"),
        (tensors | {embedding: torch.zeros(4, 32)}, f"unknown to the model: {embedding}"),
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
    with pytest.raises(ValueError, match=r"has shape \[4, 32\], expected \[4, 64\]"):
        read(tiny_llama(tmp_path / "wide", hidden_size=64), LORA)
