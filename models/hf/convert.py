"""Conversion: Hugging Face folders, GGUF files and checkpoints into a checkpoint, and a checkpoint into a folder.

Both hold one tensor at a time on the host, or a block of rows of it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...engine.mesh import mesh_as
from ...engine.parallel.shard import Entry, shard_of
from ...engine.storage.checkpoint import Reader, read_state, write
from ...engine.storage.safetensors_io import DTYPES
from ..config import check_layout
from ..decoder import Decoder
from ..families.registry import head_of, read_config, to_hf_dict
from ..folder import assets, open_checkpoint, read_json, write_json
from ..lora import merged_reader
from .adapter_record import find_base, saved_adapter
from .gguf import GGUFFile
from .lazy import LazyState, LazyTensor, blocks
from .padding import score_padding
from .save import copy_assets, export_hf
from .source import Source, open_source, read_finite
from .table import HEADS, TensorSlice, hf_slices, part_shapes
from .translate import Target, Translated, translate_config

ExportRole = Literal["actor", "critic", "reward"]
"""The roles whose weights a checkpoint may hold."""
SCORES = "scores"
"""Key of a checkpoint's state and of config.json: "steps" where a score head was trained at the ends of steps."""


def import_checkpoint(
    model: Path, output: Path, *, tp: int = 1, pp: int = 1, dtype: torch.dtype | None = None
) -> tuple[Source, str]:
    """Writes `model` as a checkpoint: role "actor", or "critic" where it has a score head; whole, or not at all.

    The host holds one rank's piece of one tensor at a time, whatever the model's size.

    Args:
        model: a Hugging Face folder, a .gguf file or a checkpoint.
        output: the checkpoint; must not exist, or be an empty folder.
        tp, pp: the files are cut as the ranks of this layout hold the model, so that each reads only its own. A run in
            any other layout reads it too.
        dtype: of the numbers; None keeps each tensor's own (float32 for quantized ones).

    Returns:
        the model as it was read, and the role.

    Raises:
        ValueError: a layout that the model cannot be cut into; a tensor or file that is missing, damaged or
            not of the model, or holds a NaN or an infinity; `output` is not empty.
        OSError: the disk is full.
    """
    source = open_source(model)
    config, head = source.config, head_of(source.config)
    check_layout(config, tp, pp)
    role, table = "actor" if head == "lm" else "critic", hf_slices(config, head)
    found: dict[str, TensorSlice] = {}  # by entry's name

    def entries(rank: int) -> Iterator[Entry]:
        stage = Decoder(config, mesh_as(rank, tp=tp, pp=pp, device="meta"), dtype=torch.float32, head=head)
        for name, parameter in stage.named_parameters():
            shard = shard_of(parameter)
            owned = not shard.duplicate and (shard.axis is not None or rank % tp == 0)
            for piece in (piece for piece in shard.pieces if math.prod(piece.shape)):
                part = table[name, piece.part]
                key = f"{role}/master/{part.name}"
                found[key] = part
                numbers = torch.empty(piece.shape, dtype=dtype or source.dtype(part), device="meta")
                yield Entry(key, piece.global_shape, piece.offset, numbers, owned)

    def read(entry: Entry) -> Tensor:
        piece, (top, *left) = torch.empty_like(entry.tensor, device="cpu"), entry.offset
        for rows in blocks(piece.shape):
            shape = (rows.stop - rows.start, *piece.shape[1:])
            piece[rows] = read_finite(source, model, found[entry.name], (top + rows.start, *left), shape)
        return piece

    with ExitStack() as stack:
        beside = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if isinstance(source, GGUFFile):
            write_json(beside / "config.json", to_hf_dict(config))
            source.tokenizer().save_pretrained(beside)
        else:
            copy_assets(model, beside)
        state = {"imported_from": str(model), "tp": tp, "pp": pp}
        write(output, map(entries, range(tp * pp)), read, state, assets(beside, f"{role}/"))
    return source, role


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

    The checkpoint's assets must hold `{role}/config.json` and the model's other files. Adapters are merged. A model
    with a score head that was trained here gets the padding token of `score_padding`.

    Args:
        dtype: of the numbers; None for the model's own, `own_dtype`.
        base: folder of the model that adapters belong to; None for its path when they were trained.
        family: write it as a model of this family, which computes the same; None for its own.

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
    config, head = read_config(asset_folder), "score" if HEADS["score"].tensor in held else "lm"
    reader.check("state.json")
    state = read_state(reader.path)
    used = state.get("router_aux_coef", {}).get(role)
    if config.moe is not None and used is not None:
        config = replace(config, moe=replace(config.moe, aux_coef=used))
    trained = LazyState(held, lambda name: reader.read(prefix + name))
    tensors: Mapping[str, Tensor | LazyTensor] = trained
    saved = saved_adapter(reader, role)
    if saved is not None:
        lora, facts = saved
        merged = merged_reader(find_base(facts, base), config, head, lora, trained)
        if head == "lm" and lora.wants("head"):  # with its adapter it is another matrix than the embedding
            config = replace(config, tie_embeddings=False)
        tensors = LazyState(part_shapes(config, head), merged)
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
    """The type of a checkpoint's model before training: that of an imported one's numbers (the widest where they
    differ), or the one in a run's config.json; bfloat16 where there is none."""
    reader.check("state.json")
    if "imported_from" in read_state(reader.path):
        return reduce(torch.promote_types, {reader.dtype(n) for n in reader.tensors if n.startswith(prefix)})
    values = read_json(asset_folder / "config.json")
    named = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    return named.get(str(values.get("dtype") or values.get("torch_dtype")), torch.bfloat16)
