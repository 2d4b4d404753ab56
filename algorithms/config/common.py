"""Sections that most scripts share: model, rollout, parallel, lora, optimizer.

What is one script's own is in the file of its name. Defaults are those of the first paper or of the trainers in wide
use: [O] OpenRLHF, [V] verl, [T] TRL. 0 or an empty string turns an option off where its text says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ...engine.config import ContentPath
from ...engine.parallel.lora import LoRA
from ...models.config import ModelConfig
from ...models.lora import MOE_TARGETS, TARGETS, Choice

AS_CONFIG = -1.0
"""`router_aux_coef` of config.json."""


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Refuse an impossible value, naming it and what is allowed. NaN fails every comparison, so it is refused too."""
    if not holds:
        raise ValueError(f"{name}={value}: must be {allowed}")


@dataclass(frozen=True)
class ModelPaths:
    """Model to train."""

    path: ContentPath = ""
    """folder in Hugging Face format, tokenizer included, from which training starts"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """compute type; optimizer states and master weights are float32 in any case, and begin as precise as the folder"""


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of responses."""

    temperature: float = 1.0
    """sampling temperature; training uses the same, so that old and new logprobs are of one distribution"""
    top_k: int = 0
    """sample among the k likeliest tokens (0: all)"""
    top_p: float = 1.0
    """sample among the likeliest tokens that hold this probability (1: all)"""
    max_new_tokens: int = 1024
    """longest response in tokens"""
    min_new_tokens: int = 0
    """no end of sequence before this many tokens"""
    samples_per_prompt: int = 1
    """responses to each prompt"""
    kv_block: int = 16
    """tokens in a block of the paged KV cache"""
    max_running: int = 256
    """sequences decoded at once on a DP rank; the others wait"""

    def __post_init__(self) -> None:
        require(0 < self.temperature < math.inf, "temperature", self.temperature, "above 0 (greedy explores nothing)")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        limit = self.max_new_tokens
        require(
            0 <= self.min_new_tokens <= limit, "min_new_tokens", self.min_new_tokens, f"0 to max_new_tokens={limit}"
        )
        for name in ("samples_per_prompt", "kv_block", "max_running"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@dataclass(frozen=True)
class ParallelConfig:
    """Parallel layout: world size = tp x pp x dp."""

    tp: int = 1
    """tensor parallelism: ranks that share every matrix"""
    pp: int = 1
    """pipeline parallelism: stages of layers"""
    pp_layers: tuple[int, ...] = ()
    """layers of each pipeline stage (none given: as equal as they can be, the last never the largest)"""
    dp: int = 0
    """data parallelism: copies that share the batch (0: what tp x pp leaves)"""
    ep: int = 1
    """expert parallelism: DP ranks that share one set of experts; of no use to models without"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one"""
    recompute: bool = False
    """activation checkpointing: keep only each layer's input and recompute the rest in the backward pass"""

    def __post_init__(self) -> None:
        for name, least in (("tp", 1), ("pp", 1), ("dp", 0), ("ep", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on frozen weights (LoRA), which may be kept in 4 bits (QLoRA)."""

    rank: int = 0
    """rank of the adapters (0: off, the weights themselves are trained)"""
    alpha: float = 32.0
    """adapters are scaled by alpha / rank [T]"""
    rslora: bool = False
    """scale by alpha / √rank instead, which keeps large ranks from learning too slowly"""
    targets: tuple[Choice, ...] = ()
    """matrices that get an adapter (docs/lora.md), or all (none: q k v output, and gate up down if without experts)"""
    quantize: bool = False
    """keep the frozen matrices in NF4 with double quantization, 4.13 bits a weight"""
    adapter: ContentPath = ""
    """PEFT folder with adapters of this very kind that the actor's begin from ("": from none)"""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "rank", self.rank, "0 (off) or more")
        for name in ("quantize", "adapter"):
            require(not getattr(self, name) or self.rank > 0, name, getattr(self, name), "off where rank is 0")
        LoRA(max(self.rank, 1), self.alpha, self.targets or TARGETS)

    def adapters(self, shape: ModelConfig) -> LoRA | None:
        """Adapters of a trained model of this shape; None for none."""
        targets = self.targets or (TARGETS if shape.moe is None else MOE_TARGETS)
        return LoRA(self.rank, self.alpha, targets, self.rslora, self.quantize) if self.rank else None


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule over the updates of the whole run; weights of the router losses of a MoE."""

    lr: float = 1e-6
    """peak learning rate [O, V]"""
    betas: tuple[float, float] = (0.9, 0.95)
    """decay of the first and second moments [O]"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float = 0.0
    """decoupled decay of matrices; norms and biases are spared [O]"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """decay of the learning rate after the warm-up [O]"""
    warmup_ratio: float = 0.03
    """share of the updates in which lr climbs from 0 to its peak [O]"""
    min_lr_ratio: float = 0.1
    """where the decay ends, as a share of lr [O]"""
    max_grad_norm: float = 1.0
    """gradient clipping by global norm (0: off)"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """on a NaN or an infinity in rewards, advantages, losses or gradients: stop the run, naming it, or skip the step:
    weights, moments, average and schedule stay as they are"""
    max_skipped: int = 10
    """skipped steps in a row; one more stops the run"""
    router_aux_coef: float = AS_CONFIG
    """weight of the load-balancing loss of a MoE (-1: router_aux_loss_coef of its config.json)"""
    router_z_coef: float = 0.0
    """weight of the router z-loss of a MoE (0: off; ST-MoE has 0.001)"""

    def __post_init__(self) -> None:
        require(0 <= self.lr < math.inf, "lr", self.lr, "0 or more")
        require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "0 or more and below 1")
        require(0 < self.eps < math.inf, "eps", self.eps, "above 0")
        require(self.max_skipped >= 1, "max_skipped", self.max_skipped, "at least 1")
        for name in ("weight_decay", "max_grad_norm"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        for name in ("warmup_ratio", "min_lr_ratio"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        aux, z = self.router_aux_coef, self.router_z_coef
        require(
            aux == AS_CONFIG or 0 <= aux < math.inf, "router_aux_coef", aux, "-1 (as config.json has it) or 0 or more"
        )
        require(0 <= z < math.inf, "router_z_coef", z, "0 (off) or more")
