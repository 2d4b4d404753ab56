"""LLaMA 1, 2, 3, 3.1, 3.2 and Code Llama (https://arxiv.org/abs/2302.13971), and the table most families begin with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import HeadKind, ModelConfig
from .family import Family, Row, flag, read_decoder, write_decoder

_LAYER, _THEIRS = "layers.{i}.", "model.layers.{i}."

ENDS = (
    Row("embedding.weight", "", "model.embed_tokens.weight", "vocab hidden"),
    Row("norm.weight", "", "model.norm.weight", "hidden"),
)
NORMS = (
    Row(_LAYER + "attention_norm.weight", "", _THEIRS + "input_layernorm.weight", "hidden"),
    Row(_LAYER + "mlp_norm.weight", "", _THEIRS + "post_attention_layernorm.weight", "hidden"),
)
ATTENTION = (
    Row(_LAYER + "attention.qkv.weight", "q", _THEIRS + "self_attn.q_proj.weight", "q hidden"),
    Row(_LAYER + "attention.qkv.weight", "k", _THEIRS + "self_attn.k_proj.weight", "kv hidden"),
    Row(_LAYER + "attention.qkv.weight", "v", _THEIRS + "self_attn.v_proj.weight", "kv hidden"),
    Row(_LAYER + "attention.output.weight", "", _THEIRS + "self_attn.o_proj.weight", "hidden q"),
)
QKV_BIAS = (
    Row(_LAYER + "attention.qkv.bias", "q", _THEIRS + "self_attn.q_proj.bias", "q"),
    Row(_LAYER + "attention.qkv.bias", "k", _THEIRS + "self_attn.k_proj.bias", "kv"),
    Row(_LAYER + "attention.qkv.bias", "v", _THEIRS + "self_attn.v_proj.bias", "kv"),
)
OUTPUT_BIAS = (Row(_LAYER + "attention.output.bias", "", _THEIRS + "self_attn.o_proj.bias", "hidden"),)
QK_NORM = (
    Row(_LAYER + "attention.q_norm.weight", "", _THEIRS + "self_attn.q_norm.weight", "head"),
    Row(_LAYER + "attention.k_norm.weight", "", _THEIRS + "self_attn.k_norm.weight", "head"),
)
MLP = (
    Row(_LAYER + "mlp.gate_up.weight", "gate", _THEIRS + "mlp.gate_proj.weight", "ffn hidden", "dense"),
    Row(_LAYER + "mlp.gate_up.weight", "up", _THEIRS + "mlp.up_proj.weight", "ffn hidden", "dense"),
    Row(_LAYER + "mlp.down.weight", "", _THEIRS + "mlp.down_proj.weight", "hidden ffn", "dense"),
)
MLP_BIAS = (
    Row(_LAYER + "mlp.gate_up.bias", "gate", _THEIRS + "mlp.gate_proj.bias", "ffn", "dense"),
    Row(_LAYER + "mlp.gate_up.bias", "up", _THEIRS + "mlp.up_proj.bias", "ffn", "dense"),
    Row(_LAYER + "mlp.down.bias", "", _THEIRS + "mlp.down_proj.bias", "hidden", "dense"),
)


def table(config: ModelConfig) -> tuple[Row, ...]:
    """The rows of a model with LLaMA's names: biases and q/k norms where the config has them."""
    rows = (*ENDS, *NORMS, *ATTENTION, *MLP)
    rows += QKV_BIAS if config.qkv_bias else ()
    rows += OUTPUT_BIAS if config.output_bias else ()
    rows += MLP_BIAS if config.mlp_bias else ()
    return rows + (QK_NORM if config.qk_norm else ())


def read(values: Mapping[str, Any]) -> ModelConfig:
    bias = flag(values, "attention_bias")
    mlp_bias = flag(values, "mlp_bias")
    return read_decoder(values, {"sliding_window": None}, qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)


def write(config: ModelConfig, head: HeadKind) -> dict[str, Any]:
    assert config.qkv_bias == config.output_bias, "LLaMA has both biases or none"
    return write_decoder(config, head, attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias)


LLAMA = Family(
    "LLaMA",
    {"LlamaForCausalLM": "lm", "LlamaForSequenceClassification": "score"},
    read=read,
    write=write,
    table=table,
    model_type="llama",
)
