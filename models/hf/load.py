"""Loading of a model's parameters from a Hugging Face folder or a checkpoint; each rank reads only its slices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import torch

from ...engine.parallel.shard import Slot, slots
from ..config import ModelConfig
from ..decoder import Decoder
from ..families.registry import family_of, head_of
from .source import open_source, read_finite
from .table import HEADS, hf_slices

# Fields of a config without effect on tensors and logits.
_FREE = {"architecture", "initializer_range", "bos_id", "eos_ids", "pad_id", "max_positions", "tie_embeddings"}


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
        new_head: initialization of a "score" head where the folder has an LM head: "refuse", "zero", or "normal" with
            standard deviation 1/(hidden + 1), equal on all ranks.
        into: slots to fill instead of the model's: the optimizer's masters, where the model's dtype has fewer bits.

    Raises:
        ValueError: a file or tensor that is missing, truncated, of another shape or unknown, a config.json that
            disagrees with the model's, a missing head: before any parameter changes. A NaN or an infinity: when read.
    """
    source = open_source(folder)
    folder, config = Path(folder), source.config
    _check_same_config(config, model.config, folder)
    found = head_of(config)
    if model.kind == "lm" and found == "score":
        raise ValueError(f"{folder}: {config.architecture} has a score head; a language model needs lm_head.weight")
    fresh = model.kind == "score" and found == "lm"
    if fresh and new_head == "refuse":
        expected = family_of(config).architecture("score")
        raise ValueError(f"{folder}: {config.architecture} has no score.weight; expected {expected}")

    table = hf_slices(model.config, model.kind)
    for name, piece, sink in slots(model) if into is None else into:
        rows = table.get((name, piece.part))
        if rows is None:  # of an adapter
            continue
        if fresh and rows.tensor == HEADS["score"].tensor:
            draws = torch.randn(piece.global_shape, generator=torch.Generator().manual_seed(0))
            cut = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
            sink.copy_(draws[cut] / (config.hidden_size + 1) if new_head == "normal" else torch.zeros(piece.shape))
        elif into is None or source.dtype(rows) != model.dtype:
            numbers = read_finite(source, folder, rows, piece.offset, piece.shape)
            # Via float32, as masters are: rounding float64 twice may differ.
            sink.copy_(numbers.float() if numbers.dtype == torch.float64 != model.dtype else numbers)


def _check_same_config(found: ModelConfig, expected: ModelConfig, folder: Path) -> None:
    family, own = family_of(found), family_of(expected)
    if family is not own:
        raise ValueError(f"{folder}: a {family.name} model, expected {own.name}")
    both_lm = head_of(found) == head_of(expected) == "lm"
    for key in (*(f.name for f in fields(ModelConfig) if f.name not in _FREE), *["tie_embeddings"] * both_lm):
        value, wanted = getattr(found, key), getattr(expected, key)
        if key == "moe" and value is not None and wanted is not None:  # coefficients of router losses are options
            value = replace(value, aux_coef=wanted.aux_coef, z_coef=wanted.z_coef)
        if value != wanted:
            raise ValueError(f"{folder}: {key}={value}, the model has {wanted}")
