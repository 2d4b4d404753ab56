"""Tiny MoE models: decoders with weights that are the same in every layout, and Hugging Face folders."""

import zlib
from pathlib import Path
from typing import Any

import torch
from families import randomize
from tiny import VOCAB
from torch import nn
from trialign.engine.mesh import Mesh
from trialign.engine.parallel.shard import shard_of
from trialign.models.config import HeadKind, ModelConfig, MoEConfig
from trialign.models.decoder import Decoder

SIZES: dict[str, Any] = {
    **{"architecture": "MixtralForCausalLM", "vocab_size": VOCAB, "hidden_size": 32, "ffn_size": 48, "num_layers": 4},
    **{"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope_theta": 10000.0, "norm_eps": 1e-6},
    **{"max_positions": 256, "tie_embeddings": False},
}
MIXTRAL = MoEConfig(experts=4, top_k=2, ffn_size=24, aux_coef=0.5, z_coef=0.1)
SHARED = MoEConfig(
    experts=4, top_k=3, ffn_size=24, normalize=False, shared_ffn_size=16, dense_layers=(1,), aux_coef=0.5, z_coef=0.1
)


def moe_config(moe: MoEConfig | None = MIXTRAL, **changes: Any) -> ModelConfig:
    return ModelConfig(moe=moe, **(SIZES | changes))


def fill(module: nn.Module, std: float = 0.3) -> None:
    """Fills parameters with random numbers that depend on name, part and index, not on the layout."""
    for name, parameter in module.named_parameters():
        begin = 0
        for piece in shard_of(parameter).pieces:
            seed = zlib.crc32(f"{name}:{piece.part}".encode())
            whole = torch.randn(piece.global_shape, generator=torch.Generator().manual_seed(seed))
            whole = 1 + 0.1 * whole if whole.dim() == 1 else std * whole
            cut = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
            parameter.data[begin : begin + piece.shape[0]] = whole[cut]
            begin += piece.shape[0]


def moe_decoder(config: ModelConfig, mesh: Mesh, head: HeadKind = "lm", **options: Any) -> Decoder:
    model = Decoder(config, mesh, dtype=torch.float32, head=head, **options)
    fill(model)
    return model


TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
EXPERTS: dict[str, Any] = TOKENS | {
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "router_aux_loss_coef": 0.1},
    **{"num_local_experts": 4},
}


def tiny_mixtral(folder: Path, **changes: Any) -> Path:
    """A random Mixtral with 2 layers of 4 experts as a Hugging Face folder."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 24, "max_position_embeddings": 256, "initializer_range": 0.1}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**(EXPERTS | sizes | changes))).save_pretrained(folder)
    return folder


def moe_folder(folder: Path, *, family: str = "Qwen2Moe", tied: bool = False, **changes: Any) -> Path:
    """A random MoE model of 2 layers with 4 experts, the second layer dense where the family has such."""
    import transformers

    sizes: dict[str, Any] = EXPERTS | {
        **{"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_experts_per_tok": 2},
        **{"max_position_embeddings": 64, "tie_word_embeddings": tied},
    }
    if family != "Mixtral":
        sizes |= {"num_experts": 4, "moe_intermediate_size": 128, "mlp_only_layers": [1]}
    if family == "Qwen2Moe":
        sizes |= {"shared_expert_intermediate_size": 128}
    config = getattr(transformers, f"{family}Config")(**(sizes | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    randomize(dict(model.named_parameters()), 0)
    model.save_pretrained(folder)
    return folder


def world_of(sizes: dict[str, Any]) -> int:
    """Ranks of a layout."""
    return sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("dp", sizes.get("ep", 1))
