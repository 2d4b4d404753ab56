"""The decoder of the LLaMA family, in the paper's order, for one pipeline stage of a mesh.

Attention itself is an argument: training passes packed attention, the generator its paged cache, so both run this one
forward. Parameters are uninitialised until models/hf.py fills them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..engine.mesh import Mesh
from ..engine.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    cut,
    sharded_parameter,
    whole,
)
from ..engine.parallel.lora import LoRA, adapted_linears
from ..engine.parallel.shard import Shard, shard_of
from ..kernels.linear import linear
from ..kernels.rms_norm import add_rms_norm, rms_norm
from ..kernels.rope import rope
from ..kernels.swiglu import swiglu
from .config import HeadKind, ModelConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(local layer, q [n, heads/tp, d], k [n, kv/tp, d], v [n, kv/tp, d]) -> [n, heads/tp, d]."""


class RMSNorm(nn.Module):
    """Root mean square norm, https://arxiv.org/abs/1910.07467; the weight is whole on every rank of tp."""

    def __init__(self, size: int, eps: float, mesh: Mesh, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = sharded_parameter(whole(size), dtype=dtype, device=mesh.device)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, mesh: Mesh, dtype: torch.dtype, lora: LoRA | None = None):
        super().__init__()
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.num_heads // mesh.tp.size, config.num_kv_heads // mesh.tp.size
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        sizes = {"q": q, "k": kv, "v": kv}
        self.qkv = ColumnParallelLinear(config.hidden_size, sizes, mesh, dtype, bias=config.qkv_bias, lora=lora)
        self.output = RowParallelLinear(
            q, config.hidden_size, mesh, dtype, bias=config.output_bias, lora=lora, target="output"
        )

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_dim)  # [tokens, (heads + 2 kv)/tp, d]
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], 1)
        q, k = rope(qk, cos, sin).split([self.heads, self.kv_heads], 1)
        return self.output(attend(q, k, v).reshape(x.shape[0], -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, mesh: Mesh, dtype: torch.dtype, lora: LoRA | None = None):
        super().__init__()
        sizes = {"gate": config.ffn_size, "up": config.ffn_size}
        options = {"bias": config.mlp_bias, "lora": lora}
        self.gate_up = ColumnParallelLinear(config.hidden_size, sizes, mesh, dtype, **options)
        self.down = RowParallelLinear(config.ffn_size, config.hidden_size, mesh, dtype, **options, target="down")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, mesh: Mesh, dtype: torch.dtype, lora: LoRA | None = None):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, mesh, dtype)
        self.attention = Attention(config, mesh, dtype, lora)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, mesh, dtype)
        self.mlp = MLP(config, mesh, dtype, lora)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        attended = self.attention(self.attention_norm(x), cos, sin, attend)
        normed, x = add_rms_norm(attended, x, self.mlp_norm.weight, self.mlp_norm.eps)
        return x + self.mlp(normed)


class Head(nn.Module):
    """The last projection: rows of the vocabulary cut over tp ("lm"), or one whole row ("score")."""

    packed: Tensor | None = None

    def __init__(self, shard: Shard, mesh: Mesh, dtype: torch.dtype):
        super().__init__()
        self.weight = sharded_parameter(shard, dtype=dtype, device=mesh.device)


class Decoder(nn.Module):
    """One pipeline stage: the embedding on the first, its share of the layers, norm and head on the last.

    Args:
        head: "lm" predicts tokens; "score" gives one number a token (critic, reward model).
        recompute: keep only each layer's input and run its forward again in the backward.
        lora: adapters in the linears, and the weights frozen; a "score" head is trained in full beside them.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        dtype: torch.dtype,
        head: HeadKind = "lm",
        recompute: bool = False,
        lora: LoRA | None = None,
    ):
        super().__init__()
        self.config, self.mesh, self.dtype, self.recompute = config, mesh, dtype, recompute
        self.kind: HeadKind = head
        share = config.num_layers // mesh.pp.size
        numbers = range(mesh.pp.rank * share, (mesh.pp.rank + 1) * share)
        vocab_by_hidden = (config.vocab_size, config.hidden_size)
        self.embedding = VocabParallelEmbedding(*vocab_by_hidden, mesh, dtype) if mesh.is_first_stage else None
        self.layers = nn.ModuleDict({str(i): Layer(config, mesh, dtype, lora) for i in numbers})
        self.norm = self.head = None
        if mesh.is_last_stage:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps, mesh, dtype)
            tied = head == "lm" and config.tie_embeddings
            rows = Shard((cut(mesh.tp, 0, vocab_by_hidden),), "tp", duplicate=tied)
            self.head = Head(rows if head == "lm" else whole(1, config.hidden_size), mesh, dtype)
            if tied and self.embedding is not None:
                self.head.weight = self.embedding.weight
        if lora is not None:
            for parameter in self.parameters():
                parameter.requires_grad_(shard_of(parameter).adapter)
            if self.head is not None and head == "score":
                self.head.requires_grad_(True)
        # In fp32 as the published models were trained: at large positions float64 would turn by other angles.
        exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        inverse = (1.0 / config.rope_theta**exponents).to(mesh.device)
        self.inverse_frequencies: Tensor  # [head_dim/2]
        self.register_buffer("inverse_frequencies", inverse, persistent=False)

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """What a key/value cache of this stage holds: (local layers, key/value heads / tp, head_dim)."""
        return len(self.layers), self.config.num_kv_heads // self.mesh.tp.size, self.config.head_dim

    def tied_parameter(self) -> nn.Parameter | None:
        """The weight this stage shares with the other end of the pipeline, if it does."""
        if self.kind != "lm" or not self.config.tie_embeddings or self.mesh.embedding.size == 1:
            return None
        module = self.embedding if self.embedding is not None else self.head
        assert module is not None
        return module.weight

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Within, the model is the one its adapters were put on. Nothing changes where it has none."""
        linears = adapted_linears(self)
        try:
            for linear_ in linears:
                linear_.adapted = False
            yield
        finally:
            for linear_ in linears:
                linear_.adapted = True

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Runs this stage.

        Args:
            x: token ids [tokens] on the first stage, else hidden states [tokens, hidden] of the stage before.
            positions: [tokens], each token's place in its own document.

        Returns:
            hidden states [tokens, hidden], after the final norm on the last stage.
        """
        if self.embedding is not None:
            x = self.embedding(x)
        angles = positions[:, None] * self.inverse_frequencies  # [tokens, head_dim/2] fp32
        cos, sin = angles.cos(), angles.sin()
        for i, layer in enumerate(self.layers.values()):
            if self.recompute and torch.is_grad_enabled():
                # preserve_rng_state: there is no dropout, so no random state to put back.
                x = checkpoint(layer, x, cos, sin, partial(attend, i), use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, partial(attend, i))
        return x if self.norm is None else self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, vocab/tp]: this rank's part of the vocabulary; last stage only."""
        assert self.head is not None and self.kind == "lm"
        return linear(hidden, self.head.weight, self.head.packed)

    def scores(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens] fp32, of a "score" head; last stage only."""
        assert self.head is not None and self.kind == "score"
        return F.linear(hidden.float(), self.head.weight.float()).squeeze(-1)
