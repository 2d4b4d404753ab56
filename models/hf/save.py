"""Export: a Hugging Face folder out of whole tensors or a checkpoint, written whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ...engine.storage.atomic import atomic_folder
from ...engine.storage.checkpoint import Reader, read_state
from ...engine.storage.safetensors_io import DTYPES, write_stream
from ..config import HeadKind, ModelConfig, model_folder, read_json
from ..lora import merger, open_checkpoint, same_base, saved_adapter
from .padding import score_padding, write_padding
from .table import HEADS, INDEX, Rows, blocks, hf_shapes, part_shapes, whole_tensors
from .tokenizer import made_tokenizer
from .translate import Target, Translated, translate_config

ExportRole = Literal["actor", "critic", "reward"]
SCORES = "scores"
"""Key of a checkpoint's state and of config.json: "steps" where a score head was trained at the ends of steps."""
"""Whose weights of a checkpoint."""

# Of the files that lie in models' folders, those that a model is loaded with; a trainer's and an adapter's are not.
_ASSETS = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "tekken.json",
}


def assets(folder: Path | str, prefix: str = "") -> dict[str, Path]:
    """Name -> path of what belongs to a folder's model beside its weights: configs, tokenizer, chat templates."""
    own = model_folder(folder)
    found = [p for p in own.iterdir() if p.name in _ASSETS or p.suffix in (".jinja", ".tiktoken")]
    found += (own / "additional_chat_templates").glob("*.jinja")  # those of other names than "default"
    return {prefix + p.relative_to(own).as_posix(): p for p in sorted(found) if p.is_file()}


def copy_assets(source: Path | str, target: Path) -> None:
    """Copies `assets`, and makes the tokenizer one that is read without code: a sentencepiece model or a rank file
    alone gets a tokenizer.json beside it, and `auto_map`, whose code stays behind, is left out where there is one.

    Raises:
        ValueError: a sentencepiece model or a rank file that cannot be read.
    """
    for name, path in assets(source).items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
    made = made_tokenizer(target)
    if made is not None:
        made.save_pretrained(target)
    settings = target / "tokenizer_config.json"
    if settings.is_file() and (target / "tokenizer.json").is_file():
        values = read_json(settings)
        if values.pop("auto_map", None):
            _write_json(settings, values)


T = TypeVar("T", bound=Tensor | Rows, covariant=True)


class Lazy(Mapping[str, T]):
    """Whole tensors by name, each made when it is asked for and not kept."""

    def __init__(self, names: Iterable[str], read: Callable[[str], T]):
        self.names, self.read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> T:
        if name not in self.names:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def export_hf(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor | Rows],
    asset_folder: Path,
    *,
    head: HeadKind = "lm",
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 5 << 30,
    pad_token: str | None = None,
    more: dict[str, Any] | None = None,
) -> None:
    """Writes a folder that transformers and vLLM load: whole, or not at all. One tensor at a time is asked for.

    Args:
        folder: must not exist, or be empty; or a symbolic link to such a one.
        tensors: Hugging Face's name -> whole tensor; a `Lazy` keeps a large model out of memory, `Rows` a large
            tensor. A fused tensor may come in parts, as `hf_name` names them.
        asset_folder: where tokenizer, chat template and generation config come from.
        shard_bytes: the largest file, unless one tensor is larger.
        pad_token: of the tokenizer; None: its own.
        more: keys that config.json gets besides.

    Raises:
        ValueError: the folder is not empty; a tensor is missing, unknown or of another shape.
        OSError: the disk is full.
    """
    shapes, found = hf_shapes(config, head), whole_tensors(tensors, config, head)
    missing, unknown = (list(a - b) for a, b in ((shapes.keys(), found.keys()), (found.keys(), shapes.keys())))
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing: {', '.join(sorted(missing)[:3])}")
    if unknown:
        raise ValueError(f"not tensors of this model: {', '.join(sorted(unknown)[:3])}")

    expected = part_shapes(config, head) | shapes

    def converted(name: str) -> Iterator[Tensor]:
        for part in found[name]:
            tensor = tensors[part]
            if tuple(tensor.shape) != expected[part]:
                raise ValueError(f"{part} {list(tensor.shape)}: expected {list(expected[part])}")
            yield from (tensor[rows].to(dtype) for rows in blocks(tensor.shape))
            del tensor  # else it is held while the next is read

    with atomic_folder(folder) as aside:
        shards = _shards(shapes, dtype, shard_bytes)
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        if len(shards) == 1:
            files = ["model.safetensors"]
        else:
            places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            total = sum(map(math.prod, shapes.values())) * dtype.itemsize
            _write_json(aside / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        for file, names in zip(files, shards, strict=True):
            described = {name: (dtype, shapes[name]) for name in names}
            write_stream(aside / file, described, chain.from_iterable(map(converted, names)))
        copy_assets(asset_folder, aside)
        if pad_token is not None:
            write_padding(aside, pad_token)
        _write_json(aside / "config.json", config.to_hf_dict(head, str(dtype).removeprefix("torch.")) | (more or {}))


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _shards(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int) -> list[list[str]]:
    """The names in groups of at most `shard_bytes`, or of one tensor."""
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


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    *,
    role: ExportRole = "actor",
    weights: Literal["master", "ema"] = "master",
    dtype: torch.dtype | None = None,
    base: Path | None = None,
    family: Target | None = None,
) -> None:
    """Streams one role's weights out of a checkpoint into a Hugging Face folder, without a process group.

    The checkpoint's assets must hold `{role}/config.json` and what else belongs to the model. Adapters are merged. A
    model with a score head that was trained here gets the padding token of `score_padding`.

    Args:
        dtype: of the numbers; None for the type that the model came in, as `own_dtype` finds it.
        base: where the model that adapters belong to lies now; None where it was when they were trained.
        family: write it as a model of this family, which computes the same; None: as what it is.

    Raises:
        ValueError: no such checkpoint, role or weights in it, a damaged file, a folder that is not empty, a family
            that does not compute the same.
        OSError: the disk is full.
    """
    reader = open_checkpoint(checkpoint)
    prefix = f"{role}/{weights}/"
    held = {name.removeprefix(prefix) for name in reader.tensors if name.startswith(prefix)}
    if not held:
        kinds = sorted({name.rpartition("/")[0] for name in reader.tensors})
        raise ValueError(f"{checkpoint}: no {prefix.rstrip('/')} weights; it holds {', '.join(kinds)}")
    for name in (name for name in reader.sums if name.startswith(f"assets/{role}/")):
        reader.check(name)
    asset_folder = checkpoint / "assets" / role
    config, head = ModelConfig.from_hf(asset_folder), "score" if HEADS["score"].theirs in held else "lm"
    reader.check("state.json")
    state = read_state(reader.path)
    used = state.get("router_aux_coef", {}).get(role)
    if config.moe is not None and used is not None:
        config = replace(config, moe=replace(config.moe, aux_coef=used))
    trained = Lazy(held, lambda name: reader.read(prefix + name))
    tensors: Mapping[str, Tensor | Rows] = trained
    saved = saved_adapter(reader, role)
    if saved is not None:
        lora, facts = saved
        merged = merger(same_base(facts, base), config, head, lora, trained)
        if head == "lm" and lora.wants("head"):  # with its adapter it is another matrix than the embedding
            config = replace(config, tie_embeddings=False)
        tensors = Lazy(part_shapes(config, head), merged)
    if family is not None:
        own, config = config, translate_config(config, family, head)
        tensors = Translated(tensors, own, config, head)
    dtype = dtype or own_dtype(reader, prefix, asset_folder)
    pad_token = None
    if head == "score" and "imported_from" not in state:  # one that was trained here
        config, pad_token = score_padding(config, asset_folder)
    more = {SCORES: state[SCORES]} if head == "score" and SCORES in state else {}
    export_hf(folder, config, tensors, asset_folder, head=head, dtype=dtype, pad_token=pad_token, more=more)


def own_dtype(reader: Reader, prefix: str, asset_folder: Path) -> torch.dtype:
    """The type that a checkpoint's model came in: an imported one's numbers keep it (the widest where they differ), and
    a run's config.json names it; bfloat16 where that is silent."""
    reader.check("state.json")
    if "imported_from" in read_state(reader.path):
        return reduce(torch.promote_types, {reader.dtype(n) for n in reader.tensors if n.startswith(prefix)})
    values = read_json(asset_folder / "config.json")
    named = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    return named.get(str(values.get("dtype") or values.get("torch_dtype")), torch.bfloat16)
