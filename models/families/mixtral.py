"""Mixtral (https://arxiv.org/abs/2401.04088): Mistral with an MoE layer in every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import HeadKind, ModelConfig, MoEConfig
from . import llama
from .family import Family, WeightRow, heads_of, nonnegative, positive_int, read_decoder, write_decoder

_LAYER, _HF = "layers.{i}.mlp.", "model.layers.{i}.block_sparse_moe."

EXPERTS = (
    WeightRow(_LAYER + "router.weight", "", _HF + "gate.weight", "experts hidden", "moe"),
    WeightRow(_LAYER + "experts.gate_up.weight", "{e}.gate", _HF + "experts.{e}.w1.weight", "expert_ffn hidden", "moe"),
    WeightRow(_LAYER + "experts.gate_up.weight", "{e}.up", _HF + "experts.{e}.w3.weight", "expert_ffn hidden", "moe"),
    WeightRow(_LAYER + "experts.down.weight", "{e}", _HF + "experts.{e}.w2.weight", "hidden expert_ffn", "moe"),
)


def table(config: ModelConfig) -> tuple[WeightRow, ...]:
    return llama.table(config) + EXPERTS


def read(values: Mapping[str, Any]) -> ModelConfig:
    defaults = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 1e6}
    values = {**defaults, **values}
    moe = MoEConfig(
        experts=positive_int(values, "num_local_experts", 8),
        top_k=positive_int(values, "num_experts_per_tok", 2),
        ffn_size=positive_int(values, "intermediate_size"),
        aux_coef=nonnegative(values, "router_aux_loss_coef", 0.001),
    )
    window = None if values.get("sliding_window") is None else positive_int(values, "sliding_window")
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


MIXTRAL = Family("Mixtral", heads_of("Mixtral"), read, write, table, "mixtral")
