"""Export: a Hugging Face folder out of whole tensors or a checkpoint, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..engine.checkpoint import Reader
from ..engine.safetensors_io import fsync, write_tensors
from .config import HeadKind, ModelConfig
from .hf import HEADS, INDEX, hf_shapes


def assets(folder: Path | str, prefix: str = "") -> dict[str, Path]:
    """Name -> path of what belongs to a folder's model beside its weights: configs, tokenizer, chat template."""
    kept = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
    found = sorted(p for p in Path(folder).iterdir() if p.is_file() and p.suffix in kept)
    return {prefix + p.name: p for p in found if not p.name.endswith(".index.json")}


def export_hf(
    folder: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    asset_folder: Path,
    *,
    head: HeadKind = "lm",
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 5 << 30,
) -> None:
    """Writes a folder that transformers and vLLM load: whole, or not at all.

    Args:
        folder: must not exist, or be empty.
        tensors: (Hugging Face's name, whole tensor) in any order; one file's worth is held at a time.
        asset_folder: where tokenizer, chat template and generation config come from.

    Raises:
        ValueError: the folder is not empty; a tensor is missing, unknown, twice or of another shape.
        OSError: the disk is full.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    aside.mkdir(parents=True)
    try:
        sizes: list[dict[str, int]] = []  # by file: tensor -> bytes
        for shard in _shards(tensors, hf_shapes(config, head), dtype, shard_bytes):
            write_tensors(aside / f"{len(sizes)}", shard)
            sizes.append({name: tensor.numel() * tensor.element_size() for name, tensor in shard.items()})
        if len(sizes) == 1:
            (aside / "0").rename(aside / "model.safetensors")
        else:
            names = [f"model-{i + 1:05d}-of-{len(sizes):05d}.safetensors" for i in range(len(sizes))]
            for i, name in enumerate(names):
                (aside / f"{i}").rename(aside / name)
            places = {tensor: file for file, held in zip(names, sizes, strict=True) for tensor in held}
            total = sum(sum(held.values()) for held in sizes)
            _write_json(aside / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        for name, source in assets(asset_folder).items():
            shutil.copyfile(source, aside / name)
        _write_json(aside / "config.json", config.to_hf_dict(head, str(dtype).removeprefix("torch.")))
        for path in (*aside.iterdir(), aside):
            fsync(path)
        aside.rename(folder)  # replaces an empty folder
        fsync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _shards(
    tensors: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups of at most `shard_bytes` (or one tensor); a group is emptied before the next is filled."""
    shard: dict[str, Tensor] = {}
    filled = 0
    for name, tensor in tensors:
        shape = shapes.pop(name, None)
        if shape != tuple(tensor.shape):
            expected = "not a tensor of this model, or twice" if shape is None else f"expected {list(shape)}"
            raise ValueError(f"{name} {list(tensor.shape)}: {expected}")
        size = tensor.numel() * dtype.itemsize
        if shard and filled + size > shard_bytes:
            yield shard
            shard.clear()
            filled = 0
        shard[name] = tensor.to(dtype)
        filled += size
    if shapes:
        raise ValueError(f"{len(shapes)} tensors are missing: {', '.join(list(shapes)[:3])}")
    yield shard


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    *,
    role: Literal["actor", "critic"] = "actor",
    weights: Literal["master", "ema"] = "master",
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Streams one role's weights out of a checkpoint into a Hugging Face folder, without a process group.

    The checkpoint's assets must hold `{role}/config.json` and what else belongs to the model.

    Raises:
        ValueError: no such checkpoint, role or weights in it, a damaged file, a folder that is not empty.
        OSError: the disk is full.
    """
    reader = Reader(checkpoint)
    prefix = f"{role}/{weights}/"
    held = {name.removeprefix(prefix) for name in reader.tensors if name.startswith(prefix)}
    if not held:
        kinds = sorted({name.rpartition("/")[0] for name in reader.tensors})
        raise ValueError(f"{checkpoint}: no {prefix.rstrip('/')} weights; it holds {', '.join(kinds)}")
    for name in (name for name in reader.sums if name.startswith(f"assets/{role}/")):
        reader.check(name)
    asset_folder = checkpoint / "assets" / role
    config, head = ModelConfig.from_hf(asset_folder), "score" if HEADS["score"].theirs in held else "lm"
    tensors = ((name, reader.read(prefix + name)) for name in hf_shapes(config, head) if name in held)
    export_hf(folder, config, tensors, asset_folder, head=head, dtype=dtype)
