"""Qwen1.5, Qwen2 and Qwen2.5 (https://arxiv.org/abs/2407.10671): biases on q, k and v, none on the output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import HeadKind, ModelConfig
from . import llama
from .family import Family, flag, heads_of, positive_int, read_decoder, write_decoder


def read(values: Mapping[str, Any]) -> ModelConfig:
    values = {"max_position_embeddings": 32768, **values}  # transformers' defaults
    window, full_layers = read_windows(values)
    return read_decoder(values, {"mlp_bias": False}, qkv_bias=True, window=window, full_layers=full_layers)


def read_windows(values: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """Sliding window, and the layers with full attention: from `layer_types`, or all below `max_window_layers`.

    A null `sliding_window` means full attention; an absent one transformers' default, 4096.
    """
    if not flag(values, "use_sliding_window"):
        return None, ()
    layers = positive_int(values, "num_hidden_layers")
    windowed, full = "sliding_attention", "full_attention"
    first = values.get("max_window_layers", 28)
    kinds = values.get("layer_types") or [windowed if i >= first else full for i in range(layers)]
    if len(kinds) != layers or not {*kinds} <= {windowed, full}:
        raise ValueError(f"layer_types={kinds}: expected {layers} of {windowed}, {full}")
    without = tuple(i for i, kind in enumerate(kinds) if kind == full)
    null = "sliding_window" in values and values["sliding_window"] is None
    if null and values.get("layer_types") and len(without) < layers:
        raise ValueError(f"sliding_window is null, but layer_types={kinds}: expected a number, or {full} in all")
    if null or len(without) == layers:
        return None, ()
    return positive_int(values, "sliding_window", 4096), without


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The keys of `read_windows`; `layer_types` for windows in other than the last layers."""
    if config.window is None:
        return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_layers}
    kinds = ["sliding_attention" if config.window_of(i) else "full_attention" for i in range(config.num_layers)]
    return {
        "use_sliding_window": True,
        "sliding_window": config.window,
        "max_window_layers": kinds.index("sliding_attention"),
        "layer_types": kinds,
    }


def write(config: ModelConfig, head: HeadKind) -> dict[str, Any]:
    return write_decoder(config, head, **write_windows(config))


QWEN2 = Family("Qwen2", heads_of("Qwen2"), read, write, llama.table, "qwen2")
