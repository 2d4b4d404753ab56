"""Mistral (https://arxiv.org/abs/2310.06825): LLaMA with one sliding window in all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import HeadKind, ModelConfig
from . import llama
from .family import Family, heads_of, positive_int, read_decoder, write_decoder


def read(values: Mapping[str, Any]) -> ModelConfig:
    values = {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072, **values}
    window = None if values["sliding_window"] is None else positive_int(values, "sliding_window")
    kinds, windowed, full = values.get("layer_types") or (), "sliding_attention", "full_attention"
    if {*kinds} not in (set(), {windowed}, {full}):
        raise ValueError(
            f"layer_types={sorted({*kinds})}: Mistral's layers all have one window; allowed: all {windowed}, all {full}"
        )
    if full in kinds:  # as transformers' AutoModel, which reads a config with layer_types as Ministral's
        window = None
    return read_decoder(values, {"attention_bias": False, "mlp_bias": False}, window=window)


def write(config: ModelConfig, head: HeadKind) -> dict[str, Any]:
    return write_decoder(config, head, sliding_window=config.window)


MISTRAL = Family("Mistral", heads_of("Mistral"), read, write, llama.table, "mistral")
