"""Baichuan 7B and 13B, Baichuan2 7B and 13B (https://arxiv.org/abs/2309.10305): fused q, k, v without bias.

The 7B models have RoPE, the 13B ones ALiBi (https://arxiv.org/abs/2108.12409); Baichuan2 has a normalized head. No key
of a published config.json records either; these keys differ:

| | architecture | hidden_size | max_position_embeddings | vocab_size |
|---|---|---|---|---|
| 7B | BaiChuanForCausalLM | 4096 | present | 64000 |
| 13B | BaichuanForCausalLM | 5120 | absent (model_max_length) | 64000 |
| 2-7B | BaichuanForCausalLM | 4096 | present | 125696 |
| 2-13B | BaichuanForCausalLM | 5120 | absent (model_max_length) | 125696 |

Baichuan2's code also has the key z_loss_weight. Exported folders have two more keys, `alibi` and `norm_head`, which
take precedence; a config without them that fits no row is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import HeadKind, ModelConfig
from ..rope import Rope
from . import llama
from .family import Family, WeightRow, flag, positive_int, read_decoder, write_decoder

_PACKED = "model.layers.{i}.self_attn.W_pack.weight"

TABLE = (
    *llama.ENDS,
    *llama.NORMS,
    WeightRow("layers.{i}.attention.qkv.weight", "q", _PACKED, "q hidden"),
    WeightRow("layers.{i}.attention.qkv.weight", "k", _PACKED, "kv hidden"),
    WeightRow("layers.{i}.attention.qkv.weight", "v", _PACKED, "kv hidden"),
    WeightRow("layers.{i}.attention.output.weight", "", "model.layers.{i}.self_attn.o_proj.weight", "hidden q"),
    *llama.MLP,
)
_HIDDEN_7B, _HIDDEN_13B = 4096, 5120
_VOCAB_1, _VOCAB_2 = 64000, 125696


def table(config: ModelConfig) -> tuple[WeightRow, ...]:
    return TABLE


def has_alibi(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a 13B model; raises ValueError where it fits neither size."""
    if values.get("alibi") is not None:
        return flag(values, "alibi")
    hidden, positions = values.get("hidden_size"), values.get("max_position_embeddings")
    is_7b = positions is not None and hidden != _HIDDEN_13B
    is_13b = positions is None and values.get("model_max_length") is not None and hidden != _HIDDEN_7B
    if values["architectures"] == ["BaiChuanForCausalLM"]:
        is_7b, is_13b = hidden != _HIDDEN_13B, False
    if is_7b == is_13b:
        raise ValueError(
            f"hidden_size={hidden}, max_position_embeddings={positions} with {values['architectures'][0]}: neither a"
            f" 7B (hidden_size {_HIDDEN_7B}, max_position_embeddings, RoPE) nor a 13B (hidden_size {_HIDDEN_13B}, only"
            " model_max_length, ALiBi); set the key alibi to true or false"
        )
    return is_13b


def has_norm_head(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a Baichuan2 model; raises ValueError where it fits neither."""
    if values.get("norm_head") is not None:
        return flag(values, "norm_head")
    vocab, z_loss = values.get("vocab_size"), values.get("z_loss_weight")
    if vocab == _VOCAB_2 or (z_loss is not None and vocab != _VOCAB_1):
        return True
    if vocab == _VOCAB_1 and z_loss is None:
        return False
    raise ValueError(
        f"vocab_size={vocab} and z_loss_weight={z_loss}: neither Baichuan (vocab_size {_VOCAB_1}) nor Baichuan2"
        f" (vocab_size {_VOCAB_2}, z_loss_weight); set the key norm_head to true or false"
    )


def read(values: Mapping[str, Any]) -> ModelConfig:
    alibi, norm_head = has_alibi(values), has_norm_head(values)
    positions = positive_int(values, "max_position_embeddings", positive_int(values, "model_max_length", 4096))
    fixed = {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False}
    more: dict[str, Any] = {"rope": Rope(), "rope_theta": 10000.0} if alibi else {}
    return read_decoder(values, fixed, alibi=alibi, norm_head=norm_head, max_positions=positions, **more)


def write(config: ModelConfig, head: HeadKind) -> dict[str, Any]:
    values = write_decoder(config, head, model_max_length=config.max_positions)
    if head == "lm":
        first = not config.alibi and not config.norm_head
        values["architectures"] = ["BaiChuanForCausalLM" if first else "BaichuanForCausalLM"]
    for key in ("num_key_value_heads", "head_dim"):
        del values[key]
    if config.alibi:
        for key in ("max_position_embeddings", "rope_theta", "rope_parameters"):
            del values[key]
    return values | {"alibi": config.alibi, "norm_head": config.norm_head}


# BaichuanForSequenceClassification exists in trialign only, for critics and reward models.
BAICHUAN = Family(
    "Baichuan",
    {"BaichuanForCausalLM": "lm", "BaiChuanForCausalLM": "lm", "BaichuanForSequenceClassification": "score"},
    read,
    write,
    table,
    "baichuan",
)
