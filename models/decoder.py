"""Decoder of every model family: the chunks of one pipeline stage.

Attention is an argument of the forward: training passes packed attention, the generator its paged KV cache.
Parameters are uninitialized until models/hf/load.py fills them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..engine.mesh import Axis, Mesh
from ..engine.parallel.collectives import copy_to_region, gather_from_region
from ..engine.parallel.lora import AdaptedLinear, Adapter, LoRA, adapted_linears
from ..engine.parallel.shard import (
    Shard,
    Slot,
    Split,
    full_piece,
    replicated,
    shard_along,
    shard_of,
    sharded_parameter,
    split,
)
from ..engine.parallel.tensor import (
    ColumnParallelLinear,
    MergeableLinear,
    ParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from ..engine.pipeline.stage import Chunk, Stage, stage_of
from ..kernels.linear import linear
from ..kernels.rms_norm import add_rms_norm, rms_norm
from ..kernels.rope import rope_
from .config import HeadKind, ModelConfig
from .flops import forward_flops
from .mlp import MLP
from .moe import MoE, Routing
from .rope import alibi_slopes

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(local layer, q [n, heads/tp, d], k [n, kv/tp, d], v [n, kv/tp, d]) -> [n, heads/tp, d]."""


class RotaryEmbedding(NamedTuple):
    """Rotary angles and the scale of queries, by position; None in models without them."""

    cos: Tensor | None  # [tokens, head_dim/2] fp32
    sin: Tensor | None
    query_scale: Tensor | None  # [tokens, 1, 1] fp32


class RMSNorm(nn.Module):
    """Root mean square norm (https://arxiv.org/abs/1910.07467); its weight is replicated over tp.

    Args:
        axis: the axis whose ranks normalize different rows (their own heads): the weight's gradient is summed over it.
    """

    def __init__(self, size: int, eps: float, mesh: Mesh, dtype: torch.dtype, axis: Axis | None = None):
        super().__init__()
        self.eps, self.axis = eps, axis
        self.weight = sharded_parameter(replicated(size), dtype=dtype, device=mesh.device)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.axis is None else copy_to_region(self.weight, self.axis)
        return rms_norm(x.reshape(-1, x.shape[-1]), weight, self.eps).view(x.shape)


class Heads(NamedTuple):
    """Partition of the attention heads over tp."""

    queries: Split  # heads
    kv: Split  # rows of the key and of the value weight
    used: range  # key/value heads that this rank's queries attend to

    @classmethod
    def of(cls, config: ModelConfig, tp: Axis) -> Heads:
        """Whole key/value heads with all their queries on each rank. With fewer key/value heads than ranks: some of one
        head's queries, at least one, and an even part of the rows of all key/value heads."""
        heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
        if heads >= tp.size:
            kv = split(heads, tp)
            return cls(kv.times(group), kv.times(config.head_dim), range(kv.start, kv.start + kv.size))
        bounds = [0]
        for rank in range(tp.size):
            head = rank * heads // tp.size
            first, stop = (-(-h * tp.size // heads) for h in (head, head + 1))  # ranks whose queries use this head
            bounds.append(head * group + (rank + 1 - first) * group // (stop - first))
        head = tp.rank * heads // tp.size
        return cls(Split(tp, tuple(bounds)), split(heads * config.head_dim, tp), range(head, head + 1))


class Attention(nn.Module):
    """Self-attention on this rank's heads.

    With more TP ranks than key/value heads a rank computes a fraction of a head and gathers the head that its queries
    use, so that no weight is stored twice.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, dtype: torch.dtype, lora: LoRA | None = None):
        super().__init__()
        self.head_dim, self.tp = config.head_dim, mesh.tp
        queries, self.kv, self.used = Heads.of(config, mesh.tp)
        self.heads, self.kv_heads = queries.size, len(self.used)
        self.gathered = config.num_kv_heads < mesh.tp.size
        q = queries.times(config.head_dim)
        outputs = {"q": q, "k": self.kv, "v": self.kv}
        self.qkv = ColumnParallelLinear(config.hidden_size, outputs, mesh, dtype, bias=config.qkv_bias, lora=lora)
        self.output = RowParallelLinear(
            q, config.hidden_size, mesh, dtype, bias=config.output_bias, lora=lora, target="output"
        )
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(config.head_dim, config.norm_eps, mesh, dtype, mesh.tp) for _ in range(2)
            )

    def forward(self, x: Tensor, rotary: RotaryEmbedding, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        qkv = self.qkv(x)  # [tokens, (heads + 2 kv)/tp * d]
        if self.gathered:
            qkv = self._with_whole_heads(qkv)
        qkv = qkv.view(x.shape[0], -1, self.head_dim)  # [tokens, heads/tp + 2 max(kv/tp, 1), d]
        # Slices: views from split() cannot be modified in place.
        qk, v = qkv[:, : -self.kv_heads], qkv[:, -self.kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split([self.heads, self.kv_heads], 1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), 1)
        if rotary.cos is not None and rotary.sin is not None:
            qk = rope_(qk, rotary.cos, rotary.sin)
        q, k = qk.split([self.heads, self.kv_heads], 1)
        if rotary.query_scale is not None:
            q = (q * rotary.query_scale).to(q.dtype)
        return self.output(attend(q, k, v).reshape(x.shape[0], -1))

    def _with_whole_heads(self, qkv: Tensor) -> Tensor:
        """[tokens, q/tp + 2 kv*d/tp] -> [tokens, q/tp + 2 d]: the key and value head of this rank's queries."""
        n, sizes = len(qkv), [2 * size for size in self.kv.sizes]
        q, kv = qkv.split([qkv.shape[1] - 2 * self.kv.size, 2 * self.kv.size], 1)
        parts = gather_from_region(kv, self.tp, sizes).split(sizes, 1)  # per rank: rows of k, then of v
        heads = torch.cat([part.view(n, 2, -1) for part in parts], 2)  # [tokens, k and v, kv * d]
        return torch.cat((q, heads.view(n, 2, -1, self.head_dim)[:, :, self.used.start].flatten(1)), 1)


class Layer(nn.Module):
    """Transformer block; `index` is its number in the whole model."""

    def __init__(self, config: ModelConfig, index: int, mesh: Mesh, dtype: torch.dtype, lora: LoRA | None = None):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, mesh, dtype)
        self.attention = Attention(config, mesh, dtype, lora)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, mesh, dtype)
        sparse = config.moe is not None and index not in config.moe.dense_layers
        if sparse:
            self.mlp = MoE(config, index, mesh, dtype, lora)
        else:
            self.mlp = MLP(config.hidden_size, config.ffn_size, mesh, dtype, bias=config.mlp_bias, lora=lora)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryEmbedding,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        routing: Routing | None = None,
    ) -> Tensor:
        attended = self.attention(self.attention_norm(x), rotary, attend)
        normed, x = add_rms_norm(attended, x, self.mlp_norm.weight, self.mlp_norm.eps)
        return x + (self.mlp(normed, routing) if isinstance(self.mlp, MoE) else self.mlp(normed))


class Head(AdaptedLinear):
    """Output projection: vocabulary rows sharded over tp ("lm"), or one replicated row ("score").

    An adapter widens it: [x, s A x] [W, B]ᵀ = x Wᵀ + s (x Aᵀ) Bᵀ is one product, so the fused losses take inputs and
    rows of an adapted head as of a plain one. The weight, possibly tied to the embedding, is unchanged.

    Args:
        normalized: divide each row by its L2 norm (Baichuan2's NormHead).
    """

    frozen = False  # while the generator holds the weight constant
    cached: Tensor | None = None  # computed rows meanwhile
    whole = False  # the cached rows have the adapter merged, and go with inputs as they are

    def __init__(self, shard: Shard, mesh: Mesh, dtype: torch.dtype, normalized: bool = False):
        super().__init__()
        self.normalized, self.tp = normalized, mesh.tp
        self.weight = sharded_parameter(shard, dtype=dtype, device=mesh.device)

    @property
    def computed(self) -> bool:
        """Whether the rows differ from the weight."""
        return self.normalized or self.active is not None

    def freeze(self, merge: bool) -> None:
        """Caches computed rows, with the adapter merged if asked, until `thaw`, while the weight does not change."""
        self.thaw()
        self.cached = self._merged_rows() if merge and self.active else self.rows() if self.computed else None
        self.frozen, self.whole = True, merge

    def thaw(self) -> None:
        self.cached = None
        self.frozen = self.whole = False

    def _merged(self) -> Tensor:
        """The weight with its adapter, in fp32 or wider."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        if self.active is None:
            return self.weight.to(dtype)
        a = copy_to_region(self.lora_a, self.tp).to(dtype)  # norms of this rank's rows: A's gradient is a sum
        return torch.addmm(self.weight.to(dtype), self.lora_b.to(dtype), a, alpha=self.active.lora.scale)

    @torch.no_grad()
    def _merged_rows(self) -> Tensor:
        merged = self._merged()
        return (_normalized(merged, merged) if self.normalized else merged).to(self.weight.dtype)

    def inputs(self, x: Tensor) -> Tensor:
        """[n, hidden] -> [n, hidden], or [n, hidden + r] with an adapter: the factor of `rows` in the logits."""
        if self.active is None or self.whole:
            return x
        return torch.cat((x, self.active.lora.scale * F.linear(x, self.lora_a)), 1)

    def rows(self) -> Tensor:
        """Effective weight, differentiable: [vocab/tp, hidden], or [vocab/tp, hidden + r] with an adapter."""
        if self.cached is not None or not self.computed:
            return self.weight if self.cached is None else self.cached
        rows = self.weight if self.active is None else torch.cat((self.weight, self.lora_b), 1)
        return _normalized(rows, self._merged()).to(self.weight.dtype) if self.normalized else rows


def _normalized(rows: Tensor, merged: Tensor) -> Tensor:
    """Rows over the L2 norms of the whole rows `merged` [vocab/tp, hidden]."""
    return rows / torch.linalg.vector_norm(merged, dim=1, keepdim=True).clamp_min(1e-12)


class Decoder(nn.Module):
    """One pipeline stage: its chunks of layers, the embedding with the first chunk, norm and head with the last.

    Without parameters on ranks outside the mesh.

    Args:
        head: "lm": logits over the vocabulary; "score": one number per token (critic, reward model).
        recompute: activation checkpointing of whole layers.
        lora: adapters in the linears, the weights frozen; a "score" head is trained in full.
        stage: None: one chunk, layers split as evenly as possible.

    Attributes:
        fill: fills slots with the parameters' initial values in their stored precision (roles/build.py); or None.
    """

    fill: Callable[[Decoder, Sequence[Slot]], None] | None = None

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        dtype: torch.dtype,
        head: HeadKind = "lm",
        recompute: bool = False,
        lora: LoRA | None = None,
        stage: Stage | None = None,
    ):
        super().__init__()
        self.config, self.mesh, self.dtype, self.recompute = config, mesh, dtype, recompute
        self.stage = stage_of(mesh, config.num_layers) if stage is None else stage
        self.kind: HeadKind = head
        self.lora = lora
        self.vocab = split(config.vocab_size, mesh.tp)
        self.embedding = None
        if self.stage.has_embedding:
            self.embedding = VocabParallelEmbedding(self.vocab, config.hidden_size, mesh, dtype)
        self.layers = nn.ModuleDict({str(i): Layer(config, i, mesh, dtype, lora) for i in self.stage.layers})
        self.norm = self.head = None
        if self.stage.has_head:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps, mesh, dtype)
            tied = head == "lm" and config.tie_embeddings
            rows = Shard((shard_along(self.vocab, 0, (config.vocab_size, config.hidden_size)),), "tp", duplicate=tied)
            shard = rows if head == "lm" else replicated(1, config.hidden_size)
            self.head = Head(shard, mesh, dtype, normalized=head == "lm" and config.norm_head)
            if tied and self.embedding is not None:
                self.head.weight = self.embedding.weight
            if lora is not None and head == "lm" and lora.adapts("head"):
                a = Shard((full_piece((lora.rank, config.hidden_size)),), adapter=True)
                b = Shard((shard_along(self.vocab, 0, (config.vocab_size, lora.rank)),), "tp", adapter=True)
                adapter = Adapter(lora, {"": self.vocab.size}, [""], "out", mesh.tp)
                self.head.add_adapter(adapter, a, b, mesh, dtype)
        if lora is not None:
            for parameter in self.parameters():
                parameter.requires_grad_(shard_of(parameter).adapter)
            if self.head is not None and head == "score":
                self.head.requires_grad_(True)
        inverse, self.rotary_scale = config.rope.frequencies(config.rope_theta, config.head_dim)
        self.inverse_frequencies: Tensor  # [head_dim/2]
        self.register_buffer("inverse_frequencies", inverse.to(mesh.device), persistent=False)
        self.alibi_slopes: Tensor | None  # [heads/tp] fp32
        self.heads = Heads.of(config, mesh.tp)
        queries = self.heads.queries
        slopes = alibi_slopes(config.num_heads).narrow(0, queries.start, queries.size).to(mesh.device)
        self.register_buffer("alibi_slopes", slopes if config.alibi else None, persistent=False)

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Shape per token of this stage's KV cache: (local layers, key/value heads in use, head_dim)."""
        return len(self.layers), len(self.heads.used), self.config.head_dim

    def attention_options(self, layer: int) -> dict[str, Any]:
        """Arguments of attention in a local layer: scale, window, alibi_slopes (kernels/attention.py)."""
        return {
            "scale": self.config.head_dim**-0.5,
            "window": self.config.window_of(self.stage.layers[layer]),
            "alibi_slopes": self.alibi_slopes,
        }

    @property
    def merged_bytes(self) -> int:
        """Size of a copy of all weights that have an adapter or are in NF4, merged and unpacked, on this rank."""
        return sum(module.merged_bytes for module in self.modules() if isinstance(module, MergeableLinear))

    def freeze_weights(self, spare: int | None = None) -> None:
        """Caches derived weights for generation and chooses kernels without gradients, until `thaw_weights`; the
        weights must not change meanwhile.

        Args:
            spare: bytes that copies with adapters merged and NF4 unpacked may take, layer after layer; the same on all
                ranks of tp. Adapters left over are one product each. None: as training computes;
                bit for bit in fp32.
        """
        for module in self.modules():
            if isinstance(module, ParallelLinear):
                module.freeze()
            if isinstance(module, Head):
                module.freeze(merge=spare is not None)
            if isinstance(module, MergeableLinear) and spare is not None:
                spare -= module.freeze_adapter(spare)

    def thaw_weights(self) -> None:
        """Drops the caches of `freeze_weights`."""
        for module in self.modules():
            if isinstance(module, MergeableLinear | Head):
                module.thaw()

    @property
    def frozen_copies(self) -> list[Tensor]:
        """Tensors that `freeze_weights` holds."""
        linears = [module for module in self.modules() if isinstance(module, MergeableLinear)]
        copies = [copy for linear in linears for copy in (linear.merged, linear.wide)]
        copies.append(None if self.head is None else self.head.cached)
        return [copy for copy in copies if copy is not None]

    def forward_flops(self, lengths: Sequence[int], logits: int = 0) -> float:
        """FLOPs of a forward of the whole model, over all ranks (models/flops.py)."""
        return forward_flops(self.config, lengths, logits)

    def set_router_coefs(self, aux_coef: float, z_coef: float) -> None:
        """Sets the coefficients of the router losses (models/moe.py); MoE models only."""
        assert self.config.moe is not None
        moe = replace(self.config.moe, aux_coef=aux_coef, z_coef=z_coef)
        self.config = replace(self.config, moe=moe)
        for module in self.modules():
            if isinstance(module, MoE):
                module.moe = moe

    def head_weight(self) -> Tensor:
        """Weight of the head as used in the logits, [vocab/tp, width], differentiable; last stage only."""
        assert self.head is not None
        return self.head.rows()

    def head_inputs(self, hidden: Tensor) -> Tensor:
        """Inputs that go with `head_weight`: [tokens, hidden] -> [tokens, width]; last stage only."""
        assert self.head is not None
        return self.head.inputs(hidden)

    def tied_parameter(self) -> nn.Parameter | None:
        """The tied weight of which the other end of the pipeline has a copy; None where there is none."""
        module = self.head if self.embedding is None else self.embedding
        if self.kind != "lm" or not self.config.tie_embeddings or self.mesh.embedding.size == 1 or module is None:
            return None
        return module.weight

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Context in which the adapters are disabled: the base model."""
        linears = adapted_linears(self)
        try:
            for linear_ in linears:
                linear_.adapted = False
            yield
        finally:
            for linear_ in linears:
                linear_.adapted = True

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        attend: Attend,
        routing: Routing | None = None,
        lengths: Tensor | None = None,
        chunk: Chunk | None = None,
    ) -> Tensor:
        """Runs a chunk of this stage.

        Args:
            x: token ids [tokens] for the first chunk, else hidden states [tokens, hidden] of the chunk before.
            positions: [tokens], of each token in its own document.
            routing: state of the router losses in an update's micro-batch; None without experts or outside updates.
            lengths: [tokens], of each token's document, for dynamic NTK; None where none exceeds the trained length.
            chunk: None: the only one.

        Returns:
            hidden states [tokens, hidden], after the final norm of the last chunk.
        """
        (chunk,) = self.stage.chunks if chunk is None else (chunk,)
        if chunk.has_embedding:
            assert self.embedding is not None
            x = self.embedding(x)
        rotary = self._rotary(positions, lengths)
        for i, number in enumerate(chunk.layers, self.stage.layers.index(chunk.layers.start)):
            layer, arguments = self.layers[str(number)], (rotary, partial(attend, i), routing)
            if self.recompute and torch.is_grad_enabled():
                # Without dropout there is no RNG state to preserve.
                x = checkpoint(layer, x, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, *arguments)
        if not chunk.has_head:
            return x
        assert self.norm is not None
        return self.norm(x)

    def _rotary(self, positions: Tensor, lengths: Tensor | None) -> RotaryEmbedding:
        cos = sin = query_scale = None
        if not self.config.alibi:
            inverse, config = self.inverse_frequencies, self.config
            if lengths is not None and config.rope.kind == "dynamic":
                inverse = config.rope.by_length(config.rope_theta, config.head_dim, lengths)
            angles = positions[:, None] * inverse  # [tokens, head_dim/2] fp32
            cos, sin = angles.cos() * self.rotary_scale, angles.sin() * self.rotary_scale
        if self.config.logn is not None:
            logs = (positions + 1).clamp_min(self.config.logn).float().log()
            query_scale = (logs / math.log(self.config.logn))[:, None, None]
        return RotaryEmbedding(cos, sin, query_scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, vocab/tp]; last stage only."""
        assert self.head is not None and self.kind == "lm"
        return linear(self.head_inputs(hidden), self.head_weight(), self.head.frozen)

    def scores(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens] fp32; a "score" head, last stage only."""
        assert self.head is not None and self.kind == "score"
        return F.linear(hidden.float(), self.head.weight.float()).squeeze(-1)
