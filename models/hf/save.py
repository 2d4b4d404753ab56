"""Saving of Hugging Face folders, atomically and one tensor at a time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine.storage.atomic import atomic_folder
from ...engine.storage.safetensors_io import write_stream
from ..config import HeadKind, ModelConfig
from ..families.registry import to_hf_dict
from ..folder import INDEX, assets, read_json, write_json
from .lazy import LazyTensor, blocks
from .padding import write_padding
from .table import check_tensors, hf_shapes, part_shapes, parts_by_tensor
from .tokenizer import build_tokenizer


def copy_assets(source: Path | str, target: Path) -> None:
    """Copies `assets` so that the tokenizer needs no code: adds a tokenizer.json to a lone sentencepiece or tiktoken
    file, and drops `auto_map`, which names code that is not copied.

    Raises:
        ValueError: a sentencepiece or tiktoken file that cannot be read.
    """
    for name, path in assets(source).items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
    built = build_tokenizer(target)
    if built is not None:
        built.save_pretrained(target)
    settings = target / "tokenizer_config.json"
    if settings.is_file() and (target / "tokenizer.json").is_file():
        values = read_json(settings)
        if values.pop("auto_map", None):
            write_json(settings, values)


def export_hf(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor | LazyTensor],
    asset_folder: Path,
    *,
    head: HeadKind = "lm",
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 5 << 30,
    pad_token: str | None = None,
    more: dict[str, Any] | None = None,
) -> None:
    """Writes a folder for transformers and vLLM, atomically; reads one tensor at a time.

    Args:
        folder: must not exist, or be empty; or a symbolic link to such a one.
        tensors: Hugging Face's name -> whole tensor; or the parts of a fused tensor under their `hf_name`. Use
            `LazyState` and `LazyTensor` where memory matters.
        asset_folder: of tokenizer, chat template and generation config.
        shard_bytes: maximum size of a file, unless one tensor is larger.
        pad_token: of the tokenizer; None: its own.
        more: further keys of config.json.

    Raises:
        ValueError: the folder is not empty; a tensor is missing, unknown or of another shape.
        OSError: the disk is full.
    """
    shapes, found = hf_shapes(config, head), parts_by_tensor(tensors, config, head)
    check_tensors(folder, shapes, {name: shapes.get(name, ()) for name in found})
    expected = part_shapes(config, head) | shapes

    def converted(name: str) -> Iterator[Tensor]:
        for part in found[name]:
            tensor = tensors[part]
            if tuple(tensor.shape) != expected[part]:
                raise ValueError(f"{part} {list(tensor.shape)}: expected {list(expected[part])}")
            yield from (tensor[rows].to(dtype) for rows in blocks(tensor.shape))
            del tensor  # before the next one is read

    with atomic_folder(folder) as aside:
        shards = _shards(shapes, dtype, shard_bytes)
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        if len(shards) == 1:
            files = ["model.safetensors"]
        else:
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            total = sum(map(math.prod, shapes.values())) * dtype.itemsize
            write_json(aside / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for file, names in zip(files, shards, strict=True):
            described = {name: (dtype, shapes[name]) for name in names}
            write_stream(aside / file, described, chain.from_iterable(map(converted, names)))
        copy_assets(asset_folder, aside)
        if pad_token is not None:
            write_padding(aside, pad_token)
        write_json(aside / "config.json", to_hf_dict(config, head, str(dtype).removeprefix("torch.")) | (more or {}))


def _shards(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int) -> list[list[str]]:
    """Names in groups of at most `shard_bytes`, or of one tensor."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
