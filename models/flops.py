"""FLOPs of a decoder's forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from .config import ModelConfig


def forward_flops(config: ModelConfig, lengths: Sequence[int], logits: int = 0) -> float:
    """FLOPs of one forward pass; a backward pass has twice as many, generating the same tokens just as many.

    Matrix products only: 2 per weight and token, and for causal attention 4·width per pair of tokens. Additive over
    sequences.

    Args:
        lengths: tokens of each sequence.
        logits: tokens whose vocabulary logits are computed; 0 with a scalar head.
    """
    width = config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    weights = config.num_layers * config.hidden_size * (2 * width + 2 * kv) + config.mlp_weights
    tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    body = 2.0 * weights * tokens + config.num_layers * 4.0 * width * pairs
    return body + 2.0 * config.hidden_size * config.vocab_size * logits
