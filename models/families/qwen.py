"""Qwen 1 (https://arxiv.org/abs/2309.16609): fused q, k, v with bias, log-n attention, dynamic NTK.

Neither has an effect up to `seq_length`. Past it the published code applies them outside training only; trialign
applies them in every pass, so that rollout, scoring and training compute the same logprobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import HeadKind, ModelConfig
from ..rope import Rope
from .family import Family, WeightRow, flag, positive, positive_int, read_decoder

_LAYER, _HF = "layers.{i}.", "transformer.h.{i}."

TABLE = (
    WeightRow("embedding.weight", "", "transformer.wte.weight", "vocab hidden"),
    WeightRow(_LAYER + "attention_norm.weight", "", _HF + "ln_1.weight", "hidden"),
    WeightRow(_LAYER + "attention.qkv.weight", "q", _HF + "attn.c_attn.weight", "q hidden"),
    WeightRow(_LAYER + "attention.qkv.weight", "k", _HF + "attn.c_attn.weight", "kv hidden"),
    WeightRow(_LAYER + "attention.qkv.weight", "v", _HF + "attn.c_attn.weight", "kv hidden"),
    WeightRow(_LAYER + "attention.qkv.bias", "q", _HF + "attn.c_attn.bias", "q"),
    WeightRow(_LAYER + "attention.qkv.bias", "k", _HF + "attn.c_attn.bias", "kv"),
    WeightRow(_LAYER + "attention.qkv.bias", "v", _HF + "attn.c_attn.bias", "kv"),
    WeightRow(_LAYER + "attention.output.weight", "", _HF + "attn.c_proj.weight", "hidden q"),
    WeightRow(_LAYER + "mlp_norm.weight", "", _HF + "ln_2.weight", "hidden"),
    # The published code computes w1(x) * silu(w2(x)).
    WeightRow(_LAYER + "mlp.gate_up.weight", "gate", _HF + "mlp.w2.weight", "ffn hidden"),
    WeightRow(_LAYER + "mlp.gate_up.weight", "up", _HF + "mlp.w1.weight", "ffn hidden"),
    WeightRow(_LAYER + "mlp.down.weight", "", _HF + "mlp.c_proj.weight", "hidden ffn"),
    WeightRow("norm.weight", "", "transformer.ln_f.weight", "hidden"),
)


def table(config: ModelConfig) -> tuple[WeightRow, ...]:
    return TABLE


def read(values: Mapping[str, Any]) -> ModelConfig:
    seq_length = positive_int(values, "seq_length", positive_int(values, "max_position_embeddings", 2048))
    dynamic = flag(values, "use_dynamic_ntk")
    double_ffn = positive_int(values, "intermediate_size")
    if double_ffn % 2:
        raise ValueError(f"intermediate_size={double_ffn}: Qwen 1 counts both of its projections, so it is even")
    own = {key: value for key, value in values.items() if key not in ("rope_scaling", "rope_parameters")}
    norm_eps, head_dim = positive(values, "layer_norm_epsilon", 1e-6), positive_int(values, "kv_channels", 128)
    return read_decoder(
        {"rms_norm_eps": norm_eps, "head_dim": head_dim, **own},
        {"rotary_pct": 1.0, "scale_attn_weights": True, "no_bias": True, "num_key_value_heads": None},
        ffn_size=double_ffn // 2,
        qkv_bias=True,
        max_positions=seq_length if dynamic else positive_int(values, "max_position_embeddings", seq_length),
        rope=Rope("dynamic", original_positions=seq_length, doubling=True) if dynamic else Rope(),
        rope_theta=positive(values, "rotary_emb_base", 10000.0),
        logn=seq_length if flag(values, "use_logn_attn") else None,
    )


def write(config: ModelConfig, head: HeadKind) -> dict[str, Any]:
    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": 2 * config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "kv_channels": config.head_dim,
        "layer_norm_epsilon": config.norm_eps,
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": 1.0,
        "use_dynamic_ntk": config.rope.kind == "dynamic",
        "use_logn_attn": config.logn is not None,
        "seq_length": config.logn or config.max_positions,
        "max_position_embeddings": config.max_positions,
        "no_bias": True,
        "scale_attn_weights": True,
        "tie_word_embeddings": config.tie_embeddings and head == "lm",
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
        "use_cache": True,
    }
    return values | ({"id2label": {"0": "score"}, "label2id": {"score": 0}} if head == "score" else {})


# QWenForSequenceClassification exists in trialign only, for critics and reward models.
QWEN = Family("Qwen 1", {"QWenLMHeadModel": "lm", "QWenForSequenceClassification": "score"}, read, write, table, "qwen")
