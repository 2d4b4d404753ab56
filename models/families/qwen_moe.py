"""Qwen2-MoE (https://arxiv.org/abs/2407.10671) and Qwen3-MoE: fine-grained experts; a shared expert in Qwen2-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import HeadKind, ModelConfig, MoEConfig
from . import llama
from .family import Family, WeightRow, flag, heads_of, nonnegative, positive_int, read_decoder, write_decoder

_LAYER, _HF = "layers.{i}.mlp.", "model.layers.{i}.mlp."
_EXPERT = _HF + "experts.{e}."

EXPERTS = (
    WeightRow(_LAYER + "router.weight", "", _HF + "gate.weight", "experts hidden", "moe"),
    WeightRow(_LAYER + "experts.gate_up.weight", "{e}.gate", _EXPERT + "gate_proj.weight", "expert_ffn hidden", "moe"),
    WeightRow(_LAYER + "experts.gate_up.weight", "{e}.up", _EXPERT + "up_proj.weight", "expert_ffn hidden", "moe"),
    WeightRow(_LAYER + "experts.down.weight", "{e}", _EXPERT + "down_proj.weight", "hidden expert_ffn", "moe"),
)
SHARED = (
    WeightRow(_LAYER + "shared.gate_up.weight", "gate", _HF + "shared_expert.gate_proj.weight", "shared hidden", "moe"),
    WeightRow(_LAYER + "shared.gate_up.weight", "up", _HF + "shared_expert.up_proj.weight", "shared hidden", "moe"),
    WeightRow(_LAYER + "shared.down.weight", "", _HF + "shared_expert.down_proj.weight", "hidden shared", "moe"),
    WeightRow(_LAYER + "shared_gate.weight", "", _HF + "shared_expert_gate.weight", "one hidden", "moe"),
)
# Sliding windows differ between versions of transformers and vLLM, and no published MoE model has one.
_FIXED = {"use_sliding_window": False, "mlp_bias": False}


def table(config: ModelConfig) -> tuple[WeightRow, ...]:
    assert config.moe is not None
    return llama.table(config) + EXPERTS + (SHARED if config.moe.shared_ffn_size else ())


def _read_experts(values: Mapping[str, Any], experts: int, top_k: int, shared_ffn_size: int) -> MoEConfig:
    """Keys of the experts: every `decoder_sparse_step`th layer is MoE, except `mlp_only_layers`."""
    step, layers = positive_int(values, "decoder_sparse_step", 1), positive_int(values, "num_hidden_layers")
    plain = values.get("mlp_only_layers") or ()
    # transformers 5 writes num_local_experts for Qwen3-MoE; transformers 4 and vLLM read num_experts.
    count = positive_int(
        values, "num_experts" if values.get("num_experts") is not None else "num_local_experts", experts
    )
    return MoEConfig(
        experts=count,
        top_k=positive_int(values, "num_experts_per_tok", top_k),
        ffn_size=positive_int(values, "moe_intermediate_size"),
        normalize=flag(values, "norm_topk_prob"),
        shared_ffn_size=shared_ffn_size,
        dense_layers=tuple(i for i in range(layers) if i in plain or (i + 1) % step),
        aux_coef=nonnegative(values, "router_aux_loss_coef", 0.001),
    )


def _write_experts(moe: MoEConfig) -> dict[str, Any]:
    return {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.ffn_size,
        "norm_topk_prob": moe.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(moe.dense_layers),
        "router_aux_loss_coef": moe.aux_coef,
        "output_router_logits": False,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def read_qwen2(values: Mapping[str, Any]) -> ModelConfig:
    values = {"max_position_embeddings": 32768, **values}  # transformers' defaults
    moe = _read_experts(values, 60, 4, positive_int(values, "shared_expert_intermediate_size", 5632))
    return read_decoder(values, _FIXED, qkv_bias=flag(values, "qkv_bias", True), moe=moe)


def write_qwen2(config: ModelConfig, head: HeadKind) -> dict[str, Any]:
    assert config.moe is not None
    more = {"qkv_bias": config.qkv_bias, "shared_expert_intermediate_size": config.moe.shared_ffn_size}
    return write_decoder(config, head, **_write_experts(config.moe), **more)


def read_qwen3(values: Mapping[str, Any]) -> ModelConfig:
    values = {"num_key_value_heads": 4, "max_position_embeddings": 32768, **values}  # transformers' defaults
    bias = flag(values, "attention_bias")
    moe = _read_experts(values, 128, 8, 0)
    return read_decoder(values, _FIXED, qkv_bias=bias, output_bias=bias, qk_norm=True, moe=moe)


def write_qwen3(config: ModelConfig, head: HeadKind) -> dict[str, Any]:
    assert config.moe is not None
    return write_decoder(config, head, attention_bias=config.qkv_bias, **_write_experts(config.moe))


QWEN2_MOE = Family("Qwen2-MoE", heads_of("Qwen2Moe"), read_qwen2, write_qwen2, table, "qwen2_moe")
QWEN3_MOE = Family("Qwen3-MoE", heads_of("Qwen3Moe"), read_qwen3, write_qwen3, table, "qwen3_moe")
