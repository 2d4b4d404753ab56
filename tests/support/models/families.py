"""Tiny random models of every family as Hugging Face folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trialign.models.families.registry import from_hf_dict
from trialign.models.hf.table import hf_shapes

_DATA = json.loads(Path(__file__).with_suffix(".json").read_text())
SIZES: dict[str, Any] = _DATA["sizes"]  # config keys of all peers
# name -> (prefix of transformers' classes, config keys besides SIZES)
PEERS: dict[str, tuple[str, dict[str, Any]]] = {n: (row["class"], row["config"]) for n, row in _DATA["peers"].items()}
OWN: dict[str, dict[str, Any]] = _DATA["own"]  # published config.json of families that transformers lacks
ALL = (*PEERS, *OWN)
SPARSE = ("mixtral", "qwen2-moe", "qwen3-moe")


def write_folder(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def peer_config(name: str) -> Any:
    import transformers

    prefix, changes = PEERS[name]
    return getattr(transformers, f"{prefix}Config")(**(SIZES | changes))


def peer_class(name: str, kind: str = "ForCausalLM") -> Any:
    import transformers

    return getattr(transformers, PEERS[name][0] + kind)


def values_of(name: str) -> dict[str, Any]:
    """Content of the family's config.json."""
    return OWN[name] if name in OWN else peer_config(name).to_dict() | {"architectures": [peer_class(name).__name__]}


def randomize(tensors: Mapping[str, Tensor], seed: int) -> None:
    """Fills all tensors, biases and norms too: initial values of 0 and 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(tensors.items()):
        noise = torch.randn(tensor.shape, generator=generator)
        norm = tensor.dim() == 1 and not name.endswith("bias")
        tensor.data.copy_(1 + 0.2 * noise if norm else 0.2 * noise)


def random_folder(folder: Path, values: Mapping[str, Any], seed: int = 0) -> Path:
    """A random model with this config.json."""
    shapes = hf_shapes(from_hf_dict(values))
    tensors = {tensor: torch.empty(shape) for tensor, shape in shapes.items()}
    randomize(tensors, seed)
    return write_folder(folder, values, tensors)


def tiny_family(folder: Path, name: str, seed: int = 0) -> Path:
    """A random model, written by transformers if it has the family."""
    if name in OWN:
        return random_folder(folder, OWN[name], seed)
    model = peer_class(name)(peer_config(name))
    randomize(dict(model.named_parameters()), seed)
    model.save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether names, dtypes and bits are equal."""
    return one.keys() == other.keys() and all(
        t.dtype == other[name].dtype and torch.equal(t.view(torch.uint8), other[name].view(torch.uint8))
        for name, t in one.items()
    )
