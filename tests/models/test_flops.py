"""FLOPs of a decoder against torch's own counter."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM
from trialign.models.families.registry import from_hf_dict
from trialign.models.flops import forward_flops


def test_flops_equal_torch_s_own_count():
    sizes: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "head_dim": 16,
    }
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    config._attn_implementation = "eager"
    values = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    shape = from_hf_dict(values)
    n = 9
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        LlamaForCausalLM(config)(torch.arange(n)[None])
    square = 3 * 4.0 * 64 * n * n  # eager attention computes the masked half too
    causal = 3 * 4.0 * 64 * (n * (n + 1) // 2)
    counted = counter.get_total_flops() - square + causal
    assert forward_flops(shape, [n], logits=n) == counted
    assert forward_flops(shape, [n, n]) == 2 * (counted - 2 * 48 * 128 * n)


def test_flops_of_a_mixture_are_those_of_the_experts_a_token_takes():
    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 48, "num_hidden_layers": 3, "head_dim": 16}
    experts: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": False}
    ffn: dict[str, Any] = {
        "intermediate_size": 80,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [1],
    }
    config = Qwen2MoeConfig(**sizes, **experts, **ffn, num_attention_heads=4, num_key_value_heads=2)
    config._attn_implementation = config._experts_implementation = "eager"
    shape = from_hf_dict({**config.to_dict(), "architectures": ["Qwen2MoeForCausalLM"]})
    n, width = 9, shape.num_heads * shape.head_dim
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Qwen2MoeForCausalLM(config)(torch.arange(n)[None])
    masked = 3 * 4.0 * width * (n * n - n * (n + 1) // 2)
    assert forward_flops(shape, [n], logits=n) == counter.get_total_flops() - masked
