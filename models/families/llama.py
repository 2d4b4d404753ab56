"""LLaMA 1, 2, 3, 3.1, 3.2 and Code Llama (https://arxiv.org/abs/2302.13971); most families extend its table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import HeadKind, ModelConfig
from .family import Family, WeightRow, flag, heads_of, read_decoder, write_decoder

_LAYER, _HF = "layers.{i}.", "model.layers.{i}."

ENDS = (
    WeightRow("embedding.weight", "", "model.embed_tokens.weight", "vocab hidden"),
    WeightRow("norm.weight", "", "model.norm.weight", "hidden"),
)
NORMS = (
    WeightRow(_LAYER + "attention_norm.weight", "", _HF + "input_layernorm.weight", "hidden"),
    WeightRow(_LAYER + "mlp_norm.weight", "", _HF + "post_attention_layernorm.weight", "hidden"),
)
ATTENTION = (
    WeightRow(_LAYER + "attention.qkv.weight", "q", _HF + "self_attn.q_proj.weight", "q hidden"),
    WeightRow(_LAYER + "attention.qkv.weight", "k", _HF + "self_attn.k_proj.weight", "kv hidden"),
    WeightRow(_LAYER + "attention.qkv.weight", "v", _HF + "self_attn.v_proj.weight", "kv hidden"),
    WeightRow(_LAYER + "attention.output.weight", "", _HF + "self_attn.o_proj.weight", "hidden q"),
)
QKV_BIAS = (
    WeightRow(_LAYER + "attention.qkv.bias", "q", _HF + "self_attn.q_proj.bias", "q"),
    WeightRow(_LAYER + "attention.qkv.bias", "k", _HF + "self_attn.k_proj.bias", "kv"),
    WeightRow(_LAYER + "attention.qkv.bias", "v", _HF + "self_attn.v_proj.bias", "kv"),
)
OUTPUT_BIAS = (WeightRow(_LAYER + "attention.output.bias", "", _HF + "self_attn.o_proj.bias", "hidden"),)
QK_NORM = (
    WeightRow(_LAYER + "attention.q_norm.weight", "", _HF + "self_attn.q_norm.weight", "head"),
    WeightRow(_LAYER + "attention.k_norm.weight", "", _HF + "self_attn.k_norm.weight", "head"),
)
MLP = (
    WeightRow(_LAYER + "mlp.gate_up.weight", "gate", _HF + "mlp.gate_proj.weight", "ffn hidden", "dense"),
    WeightRow(_LAYER + "mlp.gate_up.weight", "up", _HF + "mlp.up_proj.weight", "ffn hidden", "dense"),
    WeightRow(_LAYER + "mlp.down.weight", "", _HF + "mlp.down_proj.weight", "hidden ffn", "dense"),
)
MLP_BIAS = (
    WeightRow(_LAYER + "mlp.gate_up.bias", "gate", _HF + "mlp.gate_proj.bias", "ffn", "dense"),
    WeightRow(_LAYER + "mlp.gate_up.bias", "up", _HF + "mlp.up_proj.bias", "ffn", "dense"),
    WeightRow(_LAYER + "mlp.down.bias", "", _HF + "mlp.down_proj.bias", "hidden", "dense"),
)


def table(config: ModelConfig) -> tuple[WeightRow, ...]:
    """Rows of a model with LLaMA's tensor names; biases and q/k norms where the config has them."""
    rows = (*ENDS, *NORMS, *ATTENTION, *MLP)
    rows += QKV_BIAS if config.qkv_bias else ()
    rows += OUTPUT_BIAS if config.output_bias else ()
    rows += MLP_BIAS if config.mlp_bias else ()
    return rows + (QK_NORM if config.qk_norm else ())


def read(values: Mapping[str, Any]) -> ModelConfig:
    bias, mlp_bias = flag(values, "attention_bias"), flag(values, "mlp_bias")
    return read_decoder(values, {"sliding_window": None}, qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)


def write(config: ModelConfig, head: HeadKind) -> dict[str, Any]:
    assert config.qkv_bias == config.output_bias, "LLaMA has both biases or none"
    return write_decoder(config, head, attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias)


LLAMA = Family("LLaMA", heads_of("Llama"), read, write, table, "llama")
