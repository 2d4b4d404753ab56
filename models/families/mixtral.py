"""Mixtral (https://arxiv.org/abs/2401.04088): Mistral with experts (MoE) in every layer, two for each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import HeadKind, ModelConfig, MoEConfig
from . import llama
from .family import Family, WeightRow, loss_weight, read_decoder, whole, with_defaults, write_decoder

_OWN, _HF = "layers.{i}.mlp.", "model.layers.{i}.block_sparse_moe."

EXPERTS = (
    WeightRow(_OWN + "router.weight", "", _HF + "gate.weight", "experts hidden", "moe"),
    WeightRow(_OWN + "experts.gate_up.weight", "{e}.gate", _HF + "experts.{e}.w1.weight", "expert_ffn hidden", "moe"),
    WeightRow(_OWN + "experts.gate_up.weight", "{e}.up", _HF + "experts.{e}.w3.weight", "expert_ffn hidden", "moe"),
    WeightRow(_OWN + "experts.down.weight", "{e}", _HF + "experts.{e}.w2.weight", "hidden expert_ffn", "moe"),
)


def table(config: ModelConfig) -> tuple[WeightRow, ...]:
    return llama.table(config) + EXPERTS


def read(values: Mapping[str, Any]) -> ModelConfig:
    values = with_defaults(
        values, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=131072, rope_theta=1e6
    )
    moe = MoEConfig(
        experts=whole(values, "num_local_experts", 8),
        top_k=whole(values, "num_experts_per_tok", 2),
        ffn_size=whole(values, "intermediate_size"),
        aux_coef=loss_weight(values, "router_aux_loss_coef", 0.001),
    )
    window = None if values.get("sliding_window") is None else whole(values, "sliding_window")
    fixed = {"attention_bias": False, "mlp_bias": False, "router_jitter_noise": 0.0}
    return read_decoder(values, fixed, window=window, moe=moe)


def write(config: ModelConfig, head: HeadKind) -> dict[str, Any]:
    assert config.moe is not None
    return write_decoder(
        config,
        head,
        sliding_window=config.window,
        num_local_experts=config.moe.experts,
        num_experts_per_tok=config.moe.top_k,
        router_aux_loss_coef=config.moe.aux_coef,
        output_router_logits=False,
    )


MIXTRAL = Family(
    "Mixtral",
    {"MixtralForCausalLM": "lm", "MixtralForSequenceClassification": "score"},
    read=read,
    write=write,
    table=table,
    model_type="mixtral",
)
