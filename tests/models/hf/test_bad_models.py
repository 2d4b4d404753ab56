"""Folders that contradict themselves: refused in a line that names the file and what is allowed, before any work."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from trialign.algorithms.config.common import ParallelConfig
from trialign.algorithms.config.run import RunConfig
from trialign.algorithms.roles.build import read_shape
from trialign.engine.mesh import build_mesh
from trialign.models.decoder import Decoder
from trialign.models.families.registry import family_of, from_hf_dict, read_config
from trialign.models.folder import INDEX
from trialign.models.hf.convert import import_checkpoint
from trialign.models.hf.load import load_hf
from trialign.models.hf.source import open_source

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny LLaMA in two files with an index."""
    folder = tiny_llama(tmp_path / "model")
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
    """Makes the index say that a tensor is in this file."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def write_deep(path: Path) -> None:
    path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")


FOLDERS = {
    "more layers than tensors": (
        lambda f: change(f / "config.json", num_hidden_layers=1_000_000),
        r"model: config.json has 1000000 num_hidden_layers.* \d+ tensors",
    ),
    "a model type of another family": (
        lambda f: change(f / "config.json", model_type="qwen2"),
        "config.json: model_type='qwen2' is not that of LlamaForCausalLM: allowed: 'llama'",
    ),
    "a deep config": (lambda f: write_deep(f / "config.json"), "config.json: .* nested too deep"),
    "a deep index": (lambda f: write_deep(f / INDEX), "index.json: not an index .* nested too deep"),
    "an index that is a list": (lambda f: (f / INDEX).write_text("[]"), "index.json: not an index"),
    "an index that is no JSON": (lambda f: (f / INDEX).write_text("{"), "index.json: not an index"),
    "an index of numbers": (lambda f: change(f / INDEX, weight_map=3), "index.json: not an index"),
    "a file that is a list": (lambda f: point(f, NORM, ["a"]), rf"{INDEX}: weight_map, {NORM}: \['a'\] is not"),
    "the wrong file of the index": (
        lambda f: point(f, NORM, "a.safetensors"),
        f"a.safetensors: no tensor {NORM}, expected by {INDEX}; it is in b.saf",
    ),
    "a file that is missing": (lambda f: point(f, NORM, "c.safetensors"), "c.safetensors: missing"),
    "a file elsewhere": (lambda f: point(f, NORM, "../b.safetensors"), f"{INDEX}: weight_map, {NORM}: '../b.saf"),
    "a tensor in no file": (
        lambda f: point(f, "odd", "a.safetensors"),
        f"a.safetensors: no tensor odd, expected by {INDEX}",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_contradicts_itself_is_refused_before_anything_is_built(case, folder):
    spoil, message = FOLDERS[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        read_shape(str(folder), ParallelConfig(), RunConfig())
    with pytest.raises(ValueError, match=message):
        import_checkpoint(folder, folder.parent / "imported")
    assert not (folder.parent / "imported").exists()


def test_a_model_type_may_be_absent(folder):
    values = json.loads((folder / "config.json").read_text())
    assert family_of(from_hf_dict({k: v for k, v in values.items() if k != "model_type"})).name == "LLaMA"


def test_more_experts_than_tensors_are_refused(tmp_path):
    from tiny_moe import tiny_mixtral

    folder = tiny_mixtral(tmp_path / "model")
    change(folder / "config.json", num_experts=1_000_000, num_local_experts=1_000_000)
    with pytest.raises(ValueError, match=r"has \d+000000 experts in all layers.* \d+ tensors"):
        read_shape(str(folder), ParallelConfig(), RunConfig())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named_by_load_and_import(number, folder):
    tensors = load_file(folder / "b.safetensors")
    tensors[NORM][-1] = number
    save_file(tensors, folder / "b.safetensors")
    message = f"model: {NORM} has NaN or infinity; allowed: finite numbers"
    with pytest.raises(ValueError, match=message):
        import_checkpoint(folder, folder.parent / "imported")
    assert not (folder.parent / "imported").exists()
    model = Decoder(read_config(folder), build_mesh(), dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        load_hf(model, folder)
