"""Model config: sizes and variants of every family's decoder under one set of names, as plain data."""

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
    """Mixture-of-experts layers: `experts` MLPs of `ffn_size`, `top_k` of them per token."""

    experts: int
    top_k: int
    ffn_size: int
    normalize: bool = True
    """divide the chosen experts' weights by their sum"""
    shared_ffn_size: int = 0
    """size of the shared expert (Qwen2-MoE); 0: none"""
    dense_layers: tuple[int, ...] = ()
    """layers with a plain MLP of the model's ffn_size instead"""
    aux_coef: float = 0.0
    """weight of the load-balancing loss"""
    z_coef: float = 0.0
    """weight of the router's z-loss"""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and variants of a LLaMA-like decoder (https://arxiv.org/abs/2302.13971)."""

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
    """bias of the attention's output projection"""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over head_dim on queries and keys, before the rotary embedding (Qwen3)"""
    window: int | None = None
    """sliding window in tokens, the query's own included (Mistral); None: full attention"""
    full_layers: tuple[int, ...] = ()
    """layers with full attention in spite of `window` (Qwen2)"""
    rope: Rope = Rope()
    alibi: bool = False
    """ALiBi instead of rotary embeddings (Baichuan 13B)"""
    logn: int | None = None
    """log-n attention: past this length a query is multiplied by the log of its position to this base (Qwen 1)"""
    norm_head: bool = False
    """rows of the LM head divided by their L2 norms (Baichuan2)"""
    moe: MoEConfig | None = None
    initializer_range: float = 0.02
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    @property
    def longest_document(self) -> float:
        """Longest document to train on or to score; math.inf under dynamic NTK, which is defined for any length."""
        return math.inf if self.rope.kind == "dynamic" else self.longest_rollout

    @property
    def longest_rollout(self) -> int:
        """Longest document to sample: max_positions, or the length that rope scaling extends them to.

        Under dynamic NTK it is the trained length: past it every rotation depends on the document's final length, which
        is unknown while sampling, so the logprobs would differ from those of a training forward.
        """
        return self.rope.stretched_positions(self.max_positions)

    @property
    def mlp_weights(self) -> int:
        """Active MLP weights per token, all layers; in MoE layers those of the chosen experts and of the router."""
        dense, moe = 3 * self.ffn_size, self.moe
        if moe is None:
            return self.num_layers * self.hidden_size * dense
        shared = 3 * moe.shared_ffn_size + 1 if moe.shared_ffn_size else 0
        sparse = 3 * moe.top_k * moe.ffn_size + moe.experts + shared
        count = len(moe.dense_layers)
        return self.hidden_size * (count * dense + (self.num_layers - count) * sparse)

    def window_of(self, layer: int) -> int | None:
        """Sliding window of a layer; None: full attention."""
        return None if layer in self.full_layers else self.window


def check_layout(config: ModelConfig, tp: int, pp: int, ep: int = 1, pp_layers: Sequence[int] = ()) -> None:
    """Checks that a layout fits the model: a query head and a column of each MLP on every TP rank, a layer on every
    pipeline stage, the same number of experts on every EP rank. The vocabulary fits any tp.

    Raises:
        ValueError: naming the size, the layout's option and its allowed values.
    """
    moe = config.moe
    widths = {"num_heads": config.num_heads, "num_kv_heads x head_dim": config.num_kv_heads * config.head_dim}
    if moe is None or moe.dense_layers:
        widths["ffn_size"] = config.ffn_size
    if moe is not None:
        widths |= {"moe.ffn_size": moe.ffn_size, "moe.shared_ffn_size": moe.shared_ffn_size or moe.ffn_size}
    name = min(widths, key=lambda name: widths[name])
    if not 1 <= tp <= widths[name]:
        raise ValueError(f"{name}={widths[name]} cannot be sharded over tp={tp} ranks; allowed tp: 1 to {widths[name]}")
    split_layers(config.num_layers, pp, pp_layers)
    experts = moe.experts if moe is not None else 0
    if ep < 1 or experts % ep:
        allowed = ", ".join(str(n) for n in range(1, min(experts, 1024) + 1) if experts % n == 0)
        raise ValueError(f"moe.experts={experts} does not divide by ep={ep}; allowed ep: {allowed}")
