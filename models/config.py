"""Shape of a decoder: sizes and variants of every family under one set of names, as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..engine.pipeline.stage import split_layers
from .rope import Rope

HeadKind = Literal["lm", "score"]
"""Output of the last hidden state: logits over the vocabulary, or one number a token (critic, reward model)."""


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts layers: `experts` MLPs of `ffn_size`, of which each token takes `top_k`."""

    experts: int
    top_k: int
    ffn_size: int
    normalize: bool = True
    """divide the chosen experts' weights by their sum"""
    shared_ffn_size: int = 0
    """one more MLP that every token takes (Qwen2-MoE); 0 for none"""
    dense_layers: tuple[int, ...] = ()
    """layers that have a plain MLP of the model's ffn_size instead"""
    aux_coef: float = 0.0
    """weight of the load-balancing loss"""
    z_coef: float = 0.0
    """weight of the router's z-loss"""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and variants of a decoder (https://arxiv.org/abs/2302.13971 and its kin), under trialign's names."""

    architecture: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    max_positions: int
    tie_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    """of the attention's output projection"""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over head_dim on queries and keys, before they are turned (Qwen3)"""
    window: int | None = None
    """keys a query sees, itself included (Mistral); None for all"""
    full_layers: tuple[int, ...] = ()
    """layers that see all keys in spite of `window` (Qwen2)"""
    rope: Rope = Rope()
    alibi: bool = False
    """scores fall linearly with the distance, and nothing is turned (Baichuan 13B)"""
    logn: int | None = None
    """queries past this many positions are multiplied by log(position) to this base (Qwen 1)"""
    norm_head: bool = False
    """logits are made with the head's rows divided by their length (Baichuan2)"""
    moe: MoEConfig | None = None
    initializer_range: float = 0.02
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    @property
    def longest_document(self) -> float:
        """The longest document to train on or to score; math.inf under dynamic NTK, which takes any length."""
        return math.inf if self.rope.kind == "dynamic" else self.longest_rollout

    @property
    def longest_rollout(self) -> int:
        """The longest a sampled document may become: max_positions, or as far as rope scaling stretches them.

        Under dynamic NTK the trained length: past it a document's first token already turns by an angle of the final
        length, which a rollout does not know yet, so its logprobs would be none that a training forward computes.
        """
        return self.rope.stretched_positions(self.max_positions)

    @property
    def mlp_weights(self) -> int:
        """Weights of all MLPs that multiply a token; of an MoE model those of the chosen experts and of the router."""
        dense, moe = 3 * self.ffn_size, self.moe
        if moe is None:
            return self.num_layers * self.hidden_size * dense
        shared = 3 * moe.shared_ffn_size + 1 if moe.shared_ffn_size else 0
        sparse = 3 * moe.top_k * moe.ffn_size + moe.experts + shared
        count = len(moe.dense_layers)
        return self.hidden_size * (count * dense + (self.num_layers - count) * sparse)

    def window_of(self, layer: int) -> int | None:
        """Keys a query of this layer sees, itself included; None for all."""
        return None if layer in self.full_layers else self.window


def check_layout(config: ModelConfig, tp: int, pp: int, ep: int = 1, pp_layers: Sequence[int] = ()) -> None:
    """Checks that the model can be cut into a layout: every rank of tp needs a query head and a column of each MLP,
    every stage a layer, and ranks' numbers of experts are equal. The vocabulary is cut over any tp.

    Raises:
        ValueError: naming the size that is too small, or does not divide, and what would be allowed.
    """
    widths = {"num_heads": config.num_heads, "num_kv_heads x head_dim": config.num_kv_heads * config.head_dim}
    if config.moe is None or config.moe.dense_layers:
        widths["ffn_size"] = config.ffn_size
    if config.moe is not None:
        widths["moe.ffn_size"] = config.moe.ffn_size
    if config.moe is not None and config.moe.shared_ffn_size:
        widths["moe.shared_ffn_size"] = config.moe.shared_ffn_size
    name = min(widths, key=lambda name: widths[name])
    if not 1 <= tp <= widths[name]:
        raise ValueError(f"{name}={widths[name]} cannot be shared by tp={tp} ranks; allowed tp: 1 to {widths[name]}")
    split_layers(config.num_layers, pp, pp_layers)
    experts = config.moe.experts if config.moe is not None else 0
    if ep < 1 or experts % ep:
        allowed = ", ".join(str(n) for n in range(1, min(experts, 1024) + 1) if experts % n == 0)
        raise ValueError(f"moe.experts={experts} does not divide by ep={ep}; allowed ep: {allowed}")
