"""FLOPs of a decoder's passes, counted from its config."""

from __future__ import annotations

from collections.abc import Sequence

from .config import ModelConfig


def forward_flops(config: ModelConfig, lengths: Sequence[int], logits: int = 0) -> float:
    """FLOPs of one forward pass; a backward pass has twice as many, generating the same tokens as many.

    Matrix products only: 2 for each weight and token; causal attention has 4·width for each pair of tokens. The number
    is additive over sequences, so micro-batches and DP ranks may be counted apart.

    Args:
        lengths: tokens of each sequence.
        logits: tokens whose vocabulary logits are computed (0 for a scalar head, which costs nothing next to it).
    """
    width = config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    weights = config.num_layers * config.hidden_size * (2 * width + 2 * kv) + config.mlp_weights
    tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    body = 2.0 * weights * tokens + config.num_layers * 4.0 * width * pairs
    return body + 2.0 * config.hidden_size * config.vocab_size * logits
