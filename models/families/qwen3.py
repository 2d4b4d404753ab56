"""Qwen3 (https://arxiv.org/abs/2505.09388): RMSNorm on queries and keys, explicit head_dim, usually no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import HeadKind, ModelConfig
from . import llama
from .family import Family, flag, heads_of, read_decoder, write_decoder
from .qwen2 import read_windows, write_windows


def read(values: Mapping[str, Any]) -> ModelConfig:
    values = {"head_dim": 128, "max_position_embeddings": 32768, **values}  # transformers' defaults
    bias = flag(values, "attention_bias")
    window, full_layers = read_windows(values)
    more = {"qkv_bias": bias, "output_bias": bias, "qk_norm": True}
    return read_decoder(values, {"mlp_bias": False}, window=window, full_layers=full_layers, **more)


def write(config: ModelConfig, head: HeadKind) -> dict[str, Any]:
    return write_decoder(config, head, attention_bias=config.qkv_bias, **write_windows(config))


QWEN3 = Family("Qwen3", heads_of("Qwen3"), read, write, llama.table, "qwen3")
