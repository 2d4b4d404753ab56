"""Hugging Face folders: one table says which of their tensors a parameter's piece is; load and export both read it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..engine.parallel.shard import Piece, shard_of
from ..engine.safetensors_io import DTYPES
from .config import HeadKind, ModelConfig
from .decoder import Decoder

INDEX = "model.safetensors.index.json"


# Numbers of a config that change the computation, most of them without changing every tensor's shape.
_COMPUTED = "vocab_size hidden_size ffn_size num_layers num_heads num_kv_heads head_dim rope_theta norm_eps".split()


@dataclass(frozen=True)
class Row:
    """One weight: our parameter and part of it, Hugging Face's name, the whole tensor's dims as keys of `_sizes`."""

    ours: str
    part: str
    theirs: str
    shape: str


LLAMA = (
    Row("embedding.weight", "", "model.embed_tokens.weight", "vocab hidden"),
    Row("layers.{i}.attention_norm.weight", "", "model.layers.{i}.input_layernorm.weight", "hidden"),
    Row("layers.{i}.attention.qkv.weight", "q", "model.layers.{i}.self_attn.q_proj.weight", "q hidden"),
    Row("layers.{i}.attention.qkv.weight", "k", "model.layers.{i}.self_attn.k_proj.weight", "kv hidden"),
    Row("layers.{i}.attention.qkv.weight", "v", "model.layers.{i}.self_attn.v_proj.weight", "kv hidden"),
    Row("layers.{i}.attention.output.weight", "", "model.layers.{i}.self_attn.o_proj.weight", "hidden q"),
    Row("layers.{i}.mlp_norm.weight", "", "model.layers.{i}.post_attention_layernorm.weight", "hidden"),
    Row("layers.{i}.mlp.gate_up.weight", "gate", "model.layers.{i}.mlp.gate_proj.weight", "ffn hidden"),
    Row("layers.{i}.mlp.gate_up.weight", "up", "model.layers.{i}.mlp.up_proj.weight", "ffn hidden"),
    Row("layers.{i}.mlp.down.weight", "", "model.layers.{i}.mlp.down_proj.weight", "hidden ffn"),
    Row("norm.weight", "", "model.norm.weight", "hidden"),
)
HEADS: dict[HeadKind, Row] = {
    "lm": Row("head.weight", "", "lm_head.weight", "vocab hidden"),
    "score": Row("head.weight", "", "score.weight", "one hidden"),
}
TIED = LLAMA[0].theirs  # a tied head is this tensor and has none of its own


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "q": config.num_heads * config.head_dim,
        "kv": config.num_kv_heads * config.head_dim,
        "ffn": config.ffn_size,
        "one": 1,
    }


@cache
def _names(config: ModelConfig, head: HeadKind) -> dict[tuple[str, str], tuple[str, tuple[int, ...]]]:
    """(our parameter, part) -> (Hugging Face's name, whole shape), the table written out for all layers."""
    sizes, names = _sizes(config), {}
    for row in (*LLAMA, HEADS[head]):
        shape = tuple(sizes[dim] for dim in row.shape.split())
        for i in range(config.num_layers if "{i}" in row.ours else 1):
            names[row.ours.format(i=i), row.part] = row.theirs.format(i=i), shape
    if head == "lm" and config.tie_embeddings:
        names[HEADS["lm"].ours, ""] = names[LLAMA[0].ours, ""]
    return names


def hf_name(parameter: str, part: str, config: ModelConfig, head: HeadKind = "lm") -> str:
    """Hugging Face's name of a part of our parameter; a tied head's is the embedding's."""
    return _names(config, head)[parameter, part][0]


def hf_shapes(config: ModelConfig, head: HeadKind = "lm") -> dict[str, tuple[int, ...]]:
    """Every tensor of a folder with this config and head, in the table's order: name -> shape."""
    return dict(_names(config, head).values())


def pieces(model: Decoder) -> Iterator[tuple[str, Piece, Tensor]]:
    """Every piece of every parameter of this stage: (Hugging Face's name, rectangle, view of the parameter).

    A tied head that is a copy (pp > 1) comes under the embedding's name too.
    """
    for name, parameter in model.named_parameters():
        begin = 0
        for piece in shard_of(parameter).pieces:
            view = parameter.data[begin : begin + piece.shape[0]]
            yield hf_name(name, piece.part, model.config, cast("HeadKind", model.kind)), piece, view
            begin += piece.shape[0]


def load_hf(model: Decoder, folder: Path | str, *, new_head: Literal["refuse", "zero", "normal"] = "refuse") -> None:
    """Fills the model's parameters, each rank reading only its slices, converted to the parameters' dtype.

    Args:
        folder: config.json and safetensors, one file or several with an index.
        new_head: how a "score" head begins when the folder holds a causal language model: "refuse", "zero", or
            "normal" with standard deviation 1/(hidden + 1), so that values begin near 0; equal on all ranks.

    Raises:
        ValueError: before any parameter is changed: a file or tensor that is missing, truncated, of another shape or
            not of the model; a config.json that disagrees with the model's; a head that is not there.
    """
    folder = Path(folder)
    config = ModelConfig.from_hf(folder)
    _same_sizes(config, model.config, folder)
    if model.kind == "lm" and config.head == "score":
        raise ValueError(f"{folder}: {config.architecture} has a score head; a language model needs lm_head.weight")
    fresh = model.kind == "score" and config.head == "lm"
    if fresh and new_head == "refuse":
        raise ValueError(
            f"{folder}: {config.architecture} has no score.weight; expected LlamaForSequenceClassification"
        )
    found = _tensors(folder)
    _same_tensors(found, config, folder)

    todo: dict[str, list[tuple[str, Piece, Tensor]]] = {}
    for name, piece, view in pieces(model):
        if not (fresh and name == HEADS["score"].theirs):
            todo.setdefault(found[name][0], []).append((name, piece, view))
        elif new_head == "zero":
            view.zero_()
        else:
            draws = torch.randn(view.shape, generator=torch.Generator().manual_seed(0))
            view.copy_(draws / (config.hidden_size + 1))
    for file, parts in todo.items():
        with safe_open(folder / file, "pt") as source:
            for name, piece, view in parts:
                cut = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
                view.copy_(source.get_slice(name)[cut])


def _same_sizes(found: ModelConfig, expected: ModelConfig, folder: Path) -> None:
    both_lm = found.head == expected.head == "lm"
    for key in (*_COMPUTED, *(["tie_embeddings"] if both_lm else [])):
        if getattr(found, key) != getattr(expected, key):
            raise ValueError(f"{folder}: {key}={getattr(found, key)}, the model has {getattr(expected, key)}")


def _tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (file, shape), from the headers of all files."""
    if (folder / "model.safetensors").is_file():
        files, promised = ["model.safetensors"], {}
    elif (folder / INDEX).is_file():
        try:
            promised = dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / INDEX}: not an index of safetensors files: {error!r}") from None
        files = sorted(set(promised.values()))
    else:
        others = sorted(p.name for suffix in ("bin", "pt", "pth", "gguf") for p in folder.glob(f"*.{suffix}"))
        only = f" (only safetensors are read, found {', '.join(others)})" if others else ""
        raise ValueError(f"{folder}: no model.safetensors and no {INDEX}{only}")
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file}: missing, {INDEX} names it")
        try:
            with safe_open(folder / file, "pt") as source:
                for name in source.keys():
                    view = source.get_slice(name)
                    if view.get_dtype() not in DTYPES.values():
                        raise ValueError(
                            f"{folder / file}: {name} is {view.get_dtype()}; allowed: {[*DTYPES.values()]}"
                        )
                    found[name] = file, tuple(view.get_shape())
        except SafetensorError as error:
            raise ValueError(f"{folder / file}: damaged or truncated: {error}") from None
    for name, file in promised.items():
        if name not in found:
            raise ValueError(f"{folder / file}: no tensor {name}, {INDEX} promises it")
    return found


def _same_tensors(found: Mapping[str, tuple[str, tuple[int, ...]]], config: ModelConfig, folder: Path) -> None:
    """The folder holds exactly the tensors of its own config."""
    expected = hf_shapes(config, config.head)
    tied = config.head == "lm" and config.tie_embeddings
    head = HEADS["lm"].theirs
    missing = [name for name in expected if name not in found]
    # Old files carry the rotary frequencies, which follow from rope_theta.
    extra = [
        n for n in found if n not in expected and not n.endswith("rotary_emb.inv_freq") and not (tied and n == head)
    ]
    for what, names in (("lacks", missing), ("holds what the model has no place for:", extra)):
        if names:
            raise ValueError(
                f"{folder} {what} {', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}"
            )
    for name, shape in expected.items():
        if found[name][1] != shape:
            raise ValueError(f"{folder}: {name} has shape {list(found[name][1])}, config.json asks for {list(shape)}")
    if tied and head in found:
        with safe_open(folder / found[head][0], "pt") as one, safe_open(folder / found[TIED][0], "pt") as other:
            if not torch.equal(one.get_tensor(head), other.get_tensor(TIED)):
                raise ValueError(f"{folder}: config.json ties the embeddings, but {head} differs from {TIED}")


def stop_ids(folder: Path | str, config: ModelConfig) -> tuple[int, ...]:
    """The tokens that end an answer: those of config.json and, as chat models have more, of generation_config.json."""
    path = Path(folder) / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    more = named if isinstance(named, list) else [] if named is None else [named]
    return tuple(sorted({*config.eos_ids, *more}))
