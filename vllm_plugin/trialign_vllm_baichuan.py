"""Baichuan for vLLM: LLaMA with a fused W_pack, ALiBi in the 13B models, a normalized head in Baichuan2.

vLLM's CPU, Triton and FlashAttention 2 backends apply ALiBi. FlashInfer ignores the slopes: do not use it for the 13B
models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slopes (https://arxiv.org/abs/2108.12409), as in trialign's models/rope.py."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]


class AlibiAttention(nn.Module):
    """Attention with ALiBi instead of rotary embeddings."""

    def __init__(
        self, config, hidden_size: int, num_heads: int, quant_config=None, cache_config=None, prefix: str = "", **_
    ):
        super().__init__()
        tp, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        if num_heads % tp:
            raise ValueError(f"num_attention_heads={num_heads} does not divide by tensor_parallel_size={tp}")
        local, head_dim = num_heads // tp, hidden_size // num_heads
        slopes = alibi_slopes(num_heads)[rank * local : (rank + 1) * local]
        options = {"bias": False, "quant_config": quant_config}
        self.qkv_proj = QKVParallelLinear(
            hidden_size, head_dim, num_heads, num_heads, prefix=f"{prefix}.qkv_proj", **options
        )
        self.o_proj = RowParallelLinear(hidden_size, hidden_size, prefix=f"{prefix}.o_proj", **options)
        self.attn = Attention(
            local,
            head_dim,
            head_dim**-0.5,
            alibi_slopes=slopes,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)  # [tokens, 3 hidden/tp]
        output, _ = self.o_proj(self.attn(*qkv.chunk(3, dim=-1)))
        return output


class BaichuanLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config=None):
        chosen = config or vllm_config.model_config.hf_config
        attention = AlibiAttention if chosen.alibi else LlamaAttention
        super().__init__(vllm_config, prefix, config, attn_layer_type=attention)


class BaichuanForCausalLM(LlamaForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=BaichuanLayer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads weights under LLaMA's names: W_pack in its three parts, the head's rows normalized."""

        def renamed() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights:
                if ".W_pack." in name:
                    for part, rows in zip("qkv", weight.chunk(3), strict=True):
                        yield name.replace("W_pack", f"{part}_proj"), rows
                elif name == "lm_head.weight" and self.config.norm_head:
                    yield name, nn.functional.normalize(weight.to(torch.float32)).to(weight.dtype)
                else:
                    yield name, weight

        return super().load_weights(renamed())
