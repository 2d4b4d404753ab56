"""Conversion of Hugging Face folders and GGUF files into checkpoints, and of checkpoints into Hugging Face folders.

At most one tensor is in host memory at a time.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
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
from .translate import Target, TranslatedState, translate_config

ExportRole = Literal["actor", "critic", "reward"]
"""Roles that a checkpoint may have weights of."""
SCORES = "scores"
"""Key of a checkpoint's state and of config.json: "steps" where a score head was trained on step ends."""


def import_checkpoint(
    model: Path, output: Path, *, tp: int = 1, pp: int = 1, dtype: torch.dtype | None = None
) -> tuple[Source, str]:
    """Writes `model` as a checkpoint, atomically: role "actor", or "critic" if it has a score head.

    Args:
        model: a Hugging Face folder, a .gguf file or a checkpoint.
        output: of the checkpoint; must not exist, or be an empty folder.
        tp, pp: layout of the files, one for each of its ranks. Runs in other layouts read them too.
        dtype: of the weights; None: each tensor's own (float32 for quantized ones).

    Returns:
        the source, and the role.

    Raises:
        ValueError: a layout that does not fit the model; a tensor or file that is missing, corrupt, unknown or not
            finite; `output` is not empty.
        OSError: the disk is full.
    """
    source = open_source(model)
    config, head = source.config, head_of(source.config)
    check_layout(config, tp, pp)
    role, table = "actor" if head == "lm" else "critic", hf_slices(config, head)
    slices: dict[str, TensorSlice] = {}  # by the entries' names

    def entries(rank: int) -> Iterator[Entry]:
        stage = Decoder(config, mesh_as(rank, tp=tp, pp=pp, device="meta"), dtype=torch.float32, head=head)
        for name, parameter in stage.named_parameters():
            shard = shard_of(parameter)
            owned = not shard.duplicate and (shard.axis is not None or rank % tp == 0)
            for piece in (piece for piece in shard.pieces if math.prod(piece.shape)):
                part = table[name, piece.part]
                key = f"{role}/master/{part.name}"
                slices[key] = part
                tensor = torch.empty(piece.shape, dtype=dtype or source.dtype(part), device="meta")
                yield Entry(key, piece.global_shape, piece.offset, tensor, owned)

    def read(entry: Entry) -> Tensor:
        piece, (top, *left) = torch.empty_like(entry.tensor, device="cpu"), entry.offset
        for rows in blocks(piece.shape):
            shape = (rows.stop - rows.start, *piece.shape[1:])
            piece[rows] = read_finite(source, model, slices[entry.name], (top + rows.start, *left), shape)
        return piece

    with tempfile.TemporaryDirectory() as name:
        asset_folder = Path(name)
        if isinstance(source, GGUFFile):
            write_json(asset_folder / "config.json", to_hf_dict(config))
            source.tokenizer().save_pretrained(asset_folder)
        else:
            copy_assets(model, asset_folder)
        state = {"imported_from": str(model), "tp": tp, "pp": pp}
        write(output, map(entries, range(tp * pp)), read, state, assets(asset_folder, f"{role}/"))
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
    """Writes one role's weights of a checkpoint as a Hugging Face folder, without a process group. Adapters are merged.

    A score model trained by trialign gets the padding token of `score_padding`.

    Args:
        dtype: of the weights; None: `original_dtype`.
        base: folder of the adapters' base model; None: its path during training.
        family: another family whose model computes the same (models/hf/translate.py); None: its own.

    Raises:
        ValueError: no such checkpoint, role or weights, a corrupt file, a folder that is not empty, a family that does
            not compute the same.
        OSError: the disk is full.
    """
    reader = open_checkpoint(checkpoint)
    prefix = f"{role}/{weights}/"
    names = {name.removeprefix(prefix) for name in reader.tensors if name.startswith(prefix)}
    if not names:
        kinds = sorted({name.rpartition("/")[0] for name in reader.tensors})
        raise ValueError(f"{checkpoint}: no {prefix.rstrip('/')} weights; it holds {', '.join(kinds)}")
    for name in (name for name in reader.sums if name.startswith(f"assets/{role}/")):
        reader.check(name)
    asset_folder = checkpoint / "assets" / role
    config, head = read_config(asset_folder), "score" if HEADS["score"].tensor in names else "lm"
    reader.check("state.json")
    state = read_state(reader.path)
    aux_coef = state.get("router_aux_coef", {}).get(role)
    if config.moe is not None and aux_coef is not None:
        config = replace(config, moe=replace(config.moe, aux_coef=aux_coef))
    trained = LazyState(names, lambda name: reader.read(prefix + name))
    tensors: Mapping[str, Tensor | LazyTensor] = trained
    saved = saved_adapter(reader, role)
    if saved is not None:
        lora, record = saved
        merged = merged_reader(find_base(record, base), config, head, lora, trained)
        if head == "lm" and lora.adapts("head"):  # with its adapter the head is no longer the embedding
            config = replace(config, tie_embeddings=False)
        tensors = LazyState(part_shapes(config, head), merged)
    if family is not None:
        old, config = config, translate_config(config, family, head)
        tensors = TranslatedState(tensors, old, config, head)
    imported, pad_token = "imported_from" in state, None
    dtype = dtype or original_dtype(reader, prefix, asset_folder, imported)
    if head == "score" and not imported:
        config, pad_token = score_padding(config, asset_folder)
    more = {SCORES: state[SCORES]} if head == "score" and SCORES in state else {}
    export_hf(folder, config, tensors, asset_folder, head=head, dtype=dtype, pad_token=pad_token, more=more)


def original_dtype(reader: Reader, prefix: str, asset_folder: Path, imported: bool) -> torch.dtype:
    """Dtype of a checkpoint's model before training: of an imported model the widest of its tensors, of a run's that in
    config.json, or bfloat16."""
    if imported:
        return reduce(torch.promote_types, {reader.dtype(n) for n in reader.tensors if n.startswith(prefix)})
    values = read_json(asset_folder / "config.json")
    named = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    return named.get(str(values.get("dtype") or values.get("torch_dtype")), torch.bfloat16)
