"""Hugging Face folders: the family's table says where in its tensors our pieces lie; load and export both read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...engine.parallel.shard import Piece, Slot, shard_of, sinks, slots
from ..config import HeadKind, ModelConfig, model_folder, read_json
from ..decoder import Decoder
from ..families.family import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDEX = "model.safetensors.index.json"
_BLOCK = 1 << 20  # numbers of a large tensor that are converted at once


# What a config says that changes neither a tensor's place nor a number computed with it.
_FREE = {"architecture", "initializer_range", "bos_id", "eos_ids", "pad_id", "max_positions", "tie_embeddings"}

HEADS: dict[HeadKind, Row] = {
    "lm": Row("head.weight", "", "lm_head.weight", "vocab hidden"),
    "score": Row("head.weight", "", "score.weight", "one hidden"),
}


@dataclass(frozen=True)
class Place:
    """Where one whole part of our parameters lies in a folder: rows of a tensor, all of them unless it is fused.

    `name` is the tensor's, with the part's behind "#" where the tensor is fused: checkpoints hold the parts singly.
    """

    name: str
    tensor: str
    start: int
    shape: tuple[int, ...]


def _sizes(config: ModelConfig) -> dict[str, int]:
    sizes = {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "q": config.num_heads * config.head_dim,
        "kv": config.num_kv_heads * config.head_dim,
        "head": config.head_dim,
        "ffn": config.ffn_size,
        "one": 1,
    }
    if config.moe is not None:
        moe = config.moe
        sizes |= {"experts": moe.experts, "expert_ffn": moe.ffn_size, "shared": moe.shared_ffn_size}
    return sizes


@cache
def places(config: ModelConfig, head: HeadKind = "lm") -> dict[tuple[str, str], Place]:
    """(our parameter, part) -> its place: the family's table written out for all layers, one layer after the other."""
    table, sizes = config.family.table(config), _sizes(config)
    found: dict[tuple[str, str], Place] = {}
    filled: dict[str, int] = {}  # rows of each tensor so far

    def add(row: Row, i: int = 0) -> None:
        shape = tuple(sizes[dim] for dim in row.shape.split())
        for e in range(sizes["experts"] if "{e}" in row.part else 1):
            part, tensor = row.part.format(e=e), row.theirs.format(i=i, e=e)
            start = filled.get(tensor, 0)
            filled[tensor] = start + shape[0]
            found[row.ours.format(i=i), part] = Place(f"{tensor}#{part}", tensor, start, shape)

    embedding = next(row for row in table if row.ours == "embedding.weight")
    add(embedding)
    for i in range(config.num_layers):
        sparse = config.moe is not None and i not in config.moe.dense_layers
        for row in table:
            if "{i}" in row.ours and row.layers in ("all", "moe" if sparse else "dense"):
                add(row, i)
    for row in table:
        if "{i}" not in row.ours and row is not embedding:
            add(row)
    for key, place in found.items():
        if filled[place.tensor] == place.shape[0]:  # a tensor of its own
            found[key] = replace(place, name=place.tensor)
    if head == "lm" and config.tie_embeddings:
        found[HEADS["lm"].ours, ""] = found["embedding.weight", ""]
    else:
        row = HEADS[head]
        shape = tuple(sizes[dim] for dim in row.shape.split())
        found[row.ours, ""] = Place(row.theirs, row.theirs, 0, shape)
    return found


def hf_name(parameter: str, part: str, config: ModelConfig, head: HeadKind = "lm") -> str:
    """Hugging Face's name of a part of our parameter, with "#part" where the tensor is fused; a tied head's is the
    embedding's."""
    return places(config, head)[parameter, part].name


def hf_shapes(config: ModelConfig, head: HeadKind = "lm") -> dict[str, tuple[int, ...]]:
    """Every tensor of a folder with this config and head, in the table's order: name -> shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place in dict.fromkeys(places(config, head).values()):
        rows = place.start + place.shape[0]
        shapes[place.tensor] = (max(rows, shapes.get(place.tensor, (0,))[0]), *place.shape[1:])
    return shapes


def part_shapes(config: ModelConfig, head: HeadKind = "lm") -> dict[str, tuple[int, ...]]:
    """The same with the parts of fused tensors singly, as checkpoints hold them, under `hf_name`'s names."""
    return {place.name: place.shape for place in places(config, head).values()}


def blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Rows [start, stop) of a tensor of this shape, a few megabytes at a time."""
    step = max(_BLOCK // math.prod(shape[1:]), 1)
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


@dataclass(frozen=True)
class Rows:
    """A whole tensor that is never held whole: indexing it by a slice computes these rows, in whatever dtype."""

    shape: tuple[int, ...]
    read: Callable[[slice], Tensor]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.read(rows)


def whole_tensors(held: Iterable[str], config: ModelConfig, head: HeadKind = "lm") -> dict[str, list[str]]:
    """Tensor -> the names that it is held under: its own, or those of all parts of a fused one, one below the other."""
    names = dict.fromkeys(held)
    needed: dict[str, list[str]] = {}
    for place in dict.fromkeys(places(config, head).values()):
        if place.name != place.tensor:
            needed.setdefault(place.tensor, []).append(place.name)
    joined = {tensor: parts for tensor, parts in needed.items() if all(part in names for part in parts)}
    taken = {part for parts in joined.values() for part in parts}
    return {name: [name] for name in names if name not in taken} | joined


def pieces(model: Decoder) -> Iterator[tuple[str, Piece, Any]]:
    """Every piece of every weight of this stage, adapters left out: (name as `hf_name` gives it, rectangle, numbers).

    The numbers are a view of the parameter, or a `Sink` that quantizes what is copied into it. A tied head that is a
    copy (pp > 1) comes under the embedding's name too.
    """
    for place, piece, sink in _placed(model):
        yield place.name, piece, sink


def _placed(model: Decoder) -> Iterator[tuple[Place, Piece, Any]]:
    table = places(model.config, model.kind)
    for name, parameter in model.named_parameters():
        if not shard_of(parameter).adapter:
            for piece, sink in sinks(parameter):
                yield table[name, piece.part], piece, sink


def load_hf(
    model: Decoder,
    folder: Path | str,
    *,
    new_head: Literal["refuse", "zero", "normal"] = "refuse",
    into: Iterable[Slot] | None = None,
) -> None:
    """Fills the model's parameters, each rank reading only its slices, converted to the parameters' dtype.

    Args:
        folder: config.json and safetensors, one file or several with an index; or a checkpoint of a run.
        new_head: how a "score" head begins when the folder holds a causal language model: "refuse", "zero", or
            "normal" with standard deviation 1/(hidden + 1), so that values begin near 0; equal on all ranks.
        into: what is filled instead of the model: the optimizer's masters, with what the model's dtype cut off.

    Raises:
        ValueError: before any parameter is changed: a file or tensor that is missing, truncated, of another shape or
            not of the model; a config.json that disagrees with the model's; a head that is not there. A NaN or an
            infinity in a tensor, as it is read.
    """
    from .source import open_source, read_finite  # the sources are built on this module's tables

    source = open_source(folder)
    folder, config = Path(folder), source.config
    _same_sizes(config, model.config, folder)
    if model.kind == "lm" and config.head == "score":
        raise ValueError(f"{folder}: {config.architecture} has a score head; a language model needs lm_head.weight")
    fresh = model.kind == "score" and config.head == "lm"
    if fresh and new_head == "refuse":
        expected = next(name for name, kind in config.family.architectures.items() if kind == "score")
        raise ValueError(f"{folder}: {config.architecture} has no score.weight; expected {expected}")

    table = places(model.config, model.kind)
    for name, piece, sink in slots(model) if into is None else into:
        place = table.get((name, piece.part))
        if place is None:  # an adapter's
            continue
        if fresh and place.tensor == HEADS["score"].theirs:
            draws = torch.randn(piece.global_shape, generator=torch.Generator().manual_seed(0))
            cut = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
            sink.copy_(draws[cut] / (config.hidden_size + 1) if new_head == "normal" else torch.zeros(piece.shape))
        elif into is None or source.dtype(place) != model.dtype:
            numbers = read_finite(source, folder, place, piece.offset, piece.shape)
            # By way of float32, as masters go: float64 rounded twice may differ.
            sink.copy_(numbers.float() if numbers.dtype == torch.float64 != model.dtype else numbers)


def _same_sizes(found: ModelConfig, expected: ModelConfig, folder: Path) -> None:
    if found.family is not expected.family:
        raise ValueError(f"{folder}: a {found.family.name} model, expected {expected.family.name}")
    both_lm = found.head == expected.head == "lm"
    for key in (*(f.name for f in fields(ModelConfig) if f.name not in _FREE), *["tie_embeddings"] * both_lm):
        theirs, ours = getattr(found, key), getattr(expected, key)
        if key == "moe" and theirs is not None and ours is not None:  # a run may weigh the router's losses as it likes
            theirs = replace(theirs, aux_coef=ours.aux_coef, z_coef=ours.z_coef)
        if theirs != ours:
            raise ValueError(f"{folder}: {key}={theirs}, the model has {ours}")


def stop_ids(folder: Path | str, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer: every end of sequence that config.json, generation_config.json and the tokenizer
    name. Chat models have the end of a turn in one of them and the end of a text in another.

    Raises:
        ValueError: generation_config.json is no JSON object, or an eos_token_id no token ids of the model.
    """
    path = model_folder(folder) / "generation_config.json"
    named: Any = read_json(path).get("eos_token_id") if path.is_file() else None
    ends: set[int] = set(config.eos_ids)
    for source, value in ((path, named), (f"{folder}: the tokenizer", tokenizer.eos_token_id)):
        ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
            raise ValueError(
                f"{source}: eos_token_id={value!r}: expected a token id below vocab_size={config.vocab_size} or a list"
                " of them"
            )
        ends |= set(ids)
    return tuple(sorted(ends))
