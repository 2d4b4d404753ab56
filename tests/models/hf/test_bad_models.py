"""Invalid model folders, refused by file, tensor and value before anything is built or changed."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from tiny_moe import tiny_mixtral
from torch import Tensor
from trialign.algorithms.config.common import ParallelConfig
from trialign.algorithms.config.run import RunConfig
from trialign.algorithms.roles.build import read_shape
from trialign.engine.mesh import build_mesh
from trialign.models.config import ModelConfig
from trialign.models.decoder import Decoder
from trialign.models.families.registry import read_config
from trialign.models.folder import INDEX
from trialign.models.hf.convert import import_checkpoint
from trialign.models.hf.load import load_hf
from trialign.models.hf.source import open_source

NORM, DOWN = "model.layers.1.input_layernorm.weight", "model.layers.3.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny LLaMA in two files with an index."""
    folder = tiny_llama(tmp_path / "model", tied=False)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"{'b' if 'layers.1' in name else 'a'}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    open_source(folder)
    return folder


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def point(folder: Path, name: str, file: str | list[str]) -> None:
    """Changes the index's file of a tensor."""
    index = json.loads((folder / INDEX).read_text())
    change(folder / INDEX, weight_map=index["weight_map"] | {name: file})


def put(file: Path, name: str, tensor: Tensor) -> None:
    save_file(load_file(file) | {name: tensor}, file)


def nested(path: Path) -> None:
    path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")


A = "a.safetensors"
FOLDERS = {
    "layers": (
        lambda f: change(f / "config.json", num_hidden_layers=1_000_000),
        r"model: config.json has 1000000 num_hidden_layers.* \d+ tensors",
    ),
    "model-type": (
        lambda f: change(f / "config.json", model_type="qwen2"),
        "config.json: model_type='qwen2' .*LlamaForCausalLM: allowed: 'llama'",
    ),
    "vocab-size": (lambda f: change(f / "config.json", vocab_size=0), "config.json: vocab_size=0"),
    "wrong-type": (lambda f: change(f / "config.json", id2label=3), "config.json: a value of the wrong type"),
    "no-json": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "json-list": (lambda f: (f / "config.json").write_text("[1]"), "config.json: .* found list"),
    "nested-config": (lambda f: nested(f / "config.json"), "config.json: .* nested too deep"),
    "nested-index": (lambda f: nested(f / INDEX), "index.json: not an index .* nested too deep"),
    "index-list": (lambda f: (f / INDEX).write_text("[]"), "index.json: not an index"),
    "index-numbers": (lambda f: change(f / INDEX, weight_map=3), "index.json: not an index"),
    "file-list": (lambda f: point(f, NORM, ["a"]), rf"{INDEX}: weight_map, {NORM}: \['a'\] is not"),
    "file-elsewhere": (lambda f: point(f, NORM, "../b.safetensors"), f"{INDEX}: weight_map, {NORM}: '../b.saf"),
    "wrong-file": (lambda f: point(f, NORM, A), f"{A}: no tensor {NORM}, expected by {INDEX}; it is in b.saf"),
    "missing-file": (lambda f: point(f, NORM, "c.safetensors"), "c.safetensors: missing"),
    "missing-tensor": (lambda f: point(f, "odd", A), f"{A}: no tensor odd, expected by {INDEX}"),
    "tensor-twice": (lambda f: put(f / A, NORM, torch.ones(32)), f"b.safetensors: {NORM} is also in {A}"),
    "integers": (lambda f: put(f / A, DOWN, torch.zeros(32, 64).char()), f"{DOWN} is I8; allowed: .*BF16"),
    "truncated": (lambda f: os.truncate(f / A, 1000), f"{A}: corrupt or truncated"),
    "truncated-header": (lambda f: os.truncate(f / A, 4), f"{A}: corrupt or truncated"),
    "tied": (
        lambda f: change(f / "config.json", tie_word_embeddings=True),
        "config.json ties the embeddings, but lm_head.weight differs from model.embed_tokens.weight",
    ),
    "no-config": (lambda f: (f / "config.json").unlink(), "no config.json in this folder"),
}


def assert_load_refuses(folder: Path, message: str, config: ModelConfig) -> None:
    model = Decoder(config, build_mesh(), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.fill_(-7.0)
    with pytest.raises(ValueError, match=message):
        load_hf(model, folder)
    assert all(parameter.eq(-7).all() for parameter in model.parameters())


@pytest.mark.parametrize("case", FOLDERS)
def test_inconsistent_folders_are_refused_before_any_work(case, folder):
    (corrupt, message), config = FOLDERS[case], read_config(folder)
    corrupt(folder)
    with pytest.raises(ValueError, match=message):
        read_shape(str(folder), ParallelConfig(), RunConfig())
    with pytest.raises(ValueError, match=message):
        import_checkpoint(folder, folder.parent / "imported")
    assert not (folder.parent / "imported").exists()
    assert_load_refuses(folder, message, config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_heads", 8), ("rope_theta", 5e5), ("norm_eps", 1e-5), ("vocab_size", 97), ("tie_embeddings", True)],
)
def test_folder_of_another_config_is_refused(folder, key, value):
    config = dataclasses.replace(read_config(folder), **{key: value})
    assert_load_refuses(folder, f"{key}=.*, the model has {value}", config)


def test_missing_folders_and_gguf_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x.gguf: .*launch/import_hf.py"):
        read_config("x.gguf")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        read_config(tmp_path / "nowhere")


def test_more_experts_than_tensors_are_refused(tmp_path):
    folder = tiny_mixtral(tmp_path / "model")
    change(folder / "config.json", num_experts=1_000_000, num_local_experts=1_000_000)
    with pytest.raises(ValueError, match=r"has \d+000000 experts in all layers.* \d+ tensors"):
        read_shape(str(folder), ParallelConfig(), RunConfig())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_refused_by_name(number, folder):
    put(folder / "b.safetensors", NORM, torch.ones(32).index_fill(0, torch.tensor(31), number))
    message = f"model: {NORM} has NaN or infinity"
    with pytest.raises(ValueError, match=message):
        import_checkpoint(folder, folder.parent / "imported")
    assert not (folder.parent / "imported").exists()
    with pytest.raises(ValueError, match=message):
        load_hf(Decoder(read_config(folder), build_mesh(), dtype=torch.float32), folder)
