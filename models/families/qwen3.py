"""Qwen3 (https://arxiv.org/abs/2505.09388): norms on queries and keys, heads of their own size, no biases as a rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import HeadKind, ModelConfig
from . import llama
from .family import Family, flag, read_decoder, with_defaults, write_decoder
from .qwen2 import read_windows, write_windows


def read(values: Mapping[str, Any]) -> ModelConfig:
    values = with_defaults(values, head_dim=128, max_position_embeddings=32768)
    bias = flag(values, "attention_bias")
    window, full_layers = read_windows(values)
    return read_decoder(
        values,
        {"mlp_bias": False},
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        window=window,
        full_layers=full_layers,
    )


def write(config: ModelConfig, head: HeadKind) -> dict[str, Any]:
    return write_decoder(config, head, attention_bias=config.qkv_bias, **write_windows(config))


QWEN3 = Family(
    "Qwen3",
    {"Qwen3ForCausalLM": "lm", "Qwen3ForSequenceClassification": "score"},
    read=read,
    write=write,
    table=llama.table,
    model_type="qwen3",
)
