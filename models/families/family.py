"""Definition of a model family: reader and writer of its config.json, and one table of its weights.

The table serves loading, export, checkpoints and adapters. Below it: the config.json keys of LLaMA-like families.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..config import HeadKind, ModelConfig
from .rope_keys import read_rope, write_rope


@dataclass(frozen=True)
class WeightRow:
    """Row of a conversion table: a part of a Decoder's parameter, and its Hugging Face tensor.

    `{i}` is the layer, `{e}` the expert. Rows with the same `tensor` are concatenated along dim 0 in that fused tensor,
    in the table's order.

    Attributes:
        parameter: name in the Decoder.
        part: of a fused parameter ("q", "gate", "{e}.up"); "" for an unfused one.
        tensor: Hugging Face's name.
        shape: of the whole part, dims by their names in models/hf/table.py.
        layers: layers that have it, in an MoE model.
    """

    parameter: str
    part: str
    tensor: str
    shape: str
    layers: Literal["all", "dense", "moe"] = "all"


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: for messages.
        architectures: supported `architectures` entries of config.json; the first of each head is written.
        read: content of config.json -> config; raises ValueError naming key, value and what is allowed.
        write: config, head -> content of config.json without `architectures`, `model_type` and dtype.
        table: config -> rows, without the head's.
        model_type: of config.json.
    """

    name: str
    architectures: Mapping[str, HeadKind]
    read: Callable[[Mapping[str, Any]], ModelConfig]
    write: Callable[[ModelConfig, HeadKind], dict[str, Any]]
    table: Callable[[ModelConfig], tuple[WeightRow, ...]]
    model_type: str

    def architecture(self, head: HeadKind) -> str:
        """The `architectures` entry to write for this head."""
        return next(name for name, kind in self.architectures.items() if kind == head)


def heads_of(stem: str) -> dict[str, HeadKind]:
    """transformers' two architectures of a family: StemForCausalLM and StemForSequenceClassification."""
    return {f"{stem}ForCausalLM": "lm", f"{stem}ForSequenceClassification": "score"}


def read_decoder(values: Mapping[str, Any], fixed: Mapping[str, Any] | None = None, **more: Any) -> ModelConfig:
    """Config from the keys that LLaMA-like families have in common.

    Args:
        fixed: keys with one supported value, besides those of every family; an absent or null key is always allowed.
        more: fields read by the family itself; they take precedence.

    Raises:
        ValueError: a missing or invalid number, an unsupported feature.
    """
    always = {
        "hidden_act": "silu",
        "quantization_config": None,
        "partial_rotary_factor": 1.0,
        "is_causal": True,
        "dual_chunk_attention_config": None,  # vLLM's attention for Qwen2.5-1M
    }
    for key, only in (always | dict(fixed or {})).items():
        if values.get(key) is not None and values[key] != only:
            raise ValueError(f"{key}={values[key]!r} is not supported; allowed: {json.dumps(only)}")
    architecture = values["architectures"][0]
    labels = values.get("num_labels", len(values.get("id2label") or [0]))
    if architecture.endswith("ForSequenceClassification") and labels != 1:
        raise ValueError(f"num_labels={labels}: a score head has 1")

    heads, hidden = positive_int(values, "num_attention_heads"), positive_int(values, "hidden_size")
    kv_heads = more.pop("num_kv_heads", None) or positive_int(values, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads={heads} does not divide by num_key_value_heads={kv_heads}")
    if values.get("head_dim") is None and hidden % heads:
        raise ValueError(f"hidden_size={hidden} does not divide by num_attention_heads={heads}, and no head_dim")
    head_dim = positive_int(values, "head_dim", hidden // heads)
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: rotary embeddings need an even number")
    eos = values.get("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    vocab_size = positive_int(values, "vocab_size")
    if not all(type(i) is int and 0 <= i < vocab_size for i in eos_ids):
        raise ValueError(f"eos_token_id={eos!r}: expected a token id below vocab_size={vocab_size} or a list of them")
    max_positions = more.pop("max_positions", None) or positive_int(values, "max_position_embeddings", 2048)
    if "rope" not in more:
        more["rope"], more["rope_theta"] = read_rope(values, max_positions)
    fields: dict[str, Any] = {
        "architecture": architecture,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "ffn_size": positive_int(values, "intermediate_size"),
        "num_layers": positive_int(values, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "norm_eps": positive(values, "rms_norm_eps", 1e-6),
        "max_positions": max_positions,
        "tie_embeddings": flag(values, "tie_word_embeddings"),
        "initializer_range": positive(values, "initializer_range", 0.02),
        "bos_id": _token(values, "bos_token_id", vocab_size),
        "eos_ids": eos_ids,
        "pad_id": _token(values, "pad_token_id", vocab_size),
    }
    return ModelConfig(**(fields | more))


def write_decoder(config: ModelConfig, head: HeadKind, **more: Any) -> dict[str, Any]:
    """The keys of `read_decoder`, and the family's own in `more`."""
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        **write_rope(config.rope, config.rope_theta),
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings and head == "lm",
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
        "use_cache": True,
    }
    if head == "score":
        values |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    return values | more


def positive_int(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """values[key], an integer of at least 1; raises ValueError otherwise."""
    value = values.get(key) if values.get(key) is not None else default
    if value is None:
        raise ValueError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}={value!r}: expected an integer of at least 1")
    return value


def _token(values: Mapping[str, Any], key: str, vocab_size: int) -> int | None:
    """values[key], a token id, None where it is absent, null or -1 (LLaMA 1); raises ValueError otherwise."""
    value = values.get(key)
    if value is None or value == -1:
        return None
    if type(value) is not int or not 0 <= value < vocab_size:
        raise ValueError(f"{key}={value!r}: expected a token id below vocab_size={vocab_size}")
    return value


def positive(values: Mapping[str, Any], key: str, default: float) -> float:
    """values[key], a finite number above 0; raises ValueError otherwise."""
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key}={value!r}: expected a finite number above 0")
    return float(value)


def nonnegative(values: Mapping[str, Any], key: str, default: float) -> float:
    """values[key], a finite number of at least 0; raises ValueError otherwise."""
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{key}={value!r}: expected a finite number of at least 0")
    return float(value)


def flag(values: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """values[key], true or false; raises ValueError otherwise."""
    value = values.get(key) if values.get(key) is not None else default
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r}: expected true or false")
    return value
