"""Config sections of most scripts: model, rollout, parallel, lora, optimizer, micro-batches.

Defaults are those of the first paper or of widely used trainers: [O] OpenRLHF, [V] verl, [T] TRL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ...engine.config import ContentPath
from ...engine.parallel.lora import LoRA
from ...models.config import ModelConfig
from ...models.lora import MOE_TARGETS, TARGETS, Choice


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Refuse an impossible value, naming it and what is allowed. NaN fails every comparison, so it is refused too."""
    if not holds:
        raise ValueError(f"{name}={value}: must be {allowed}")


def require_at_least(section: object, least: float, *names: str) -> None:
    """Refuse options of a section that are below `least`, infinite or NaN."""
    for name in names:
        require(least <= getattr(section, name) < math.inf, name, getattr(section, name), f"{least:g} or more")


def require_fraction(section: object, *names: str, below_1: bool = False) -> None:
    """Refuse options of a section outside [0, 1], or [0, 1)."""
    allowed = "0 or more and below 1" if below_1 else "from 0 to 1"
    for name in names:
        value = getattr(section, name)
        require(0 <= value < 1 or value == 1 and not below_1, name, value, allowed)


@dataclass(frozen=True)
class ModelPaths:
    """Model to train."""

    path: ContentPath = ""
    """folder of the initial weights in Hugging Face format, tokenizer included"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """compute dtype; optimizer states and master weights are always float32"""


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of responses."""

    temperature: float = 1.0
    """sampling temperature; the losses divide logits by it too, so that ratios compare the distribution sampled from"""
    top_k: int = 0
    """sample from the k most likely tokens (0: all)"""
    top_p: float = 1.0
    """nucleus sampling: sample from the most likely tokens that sum to this probability (1: all)"""
    max_new_tokens: int = 1024
    """maximum response length in tokens"""
    min_new_tokens: int = 0
    """minimum response length: end of sequence is not sampled before"""
    samples_per_prompt: int = 1
    """responses per prompt"""
    kv_block: int = 16
    """block size of the paged KV cache in tokens"""
    max_running: int = 256
    """maximum number of sequences decoded at once on a DP rank; others are queued"""
    cache_gib: float = 0.0
    """size of the KV cache on a rank in GiB (0: cache_fraction decides); sequences beyond it wait or are preempted"""
    cache_fraction: float = 0.5
    """size of the KV cache as a fraction of the memory that is free before the first rollout"""

    def __post_init__(self) -> None:
        require(0 < self.temperature < math.inf, "temperature", self.temperature, "above 0 (greedy explores nothing)")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require_at_least(self, 0, "top_k")
        require_at_least(self, 1, "max_new_tokens", "samples_per_prompt", "kv_block", "max_running")
        require_at_least(self, 0, "cache_gib")
        require(0 < self.cache_fraction < 1, "cache_fraction", self.cache_fraction, "above 0 and below 1")
        limit = self.max_new_tokens
        require(
            0 <= self.min_new_tokens <= limit, "min_new_tokens", self.min_new_tokens, f"0 to max_new_tokens={limit}"
        )


@dataclass(frozen=True)
class ParallelConfig:
    """Parallel layout: world size = tp x pp x dp."""

    tp: int = 1
    """tensor parallel size"""
    pp: int = 1
    """pipeline parallel size: number of stages"""
    pp_layers: tuple[int, ...] = ()
    """number of layers of each pipeline stage (empty: balanced, the last stage never the largest)"""
    dp: int = 0
    """data parallel size (0: world size / (tp x pp))"""
    ep: int = 1
    """expert parallel size of MoE models: the experts are sharded over this many DP ranks"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device; auto is CUDA if available"""
    recompute: Literal["auto", "none", "full"] = "auto"
    """activation (gradient) checkpointing: full stores each layer's input only and recomputes the rest in the backward
    pass; auto is full on CUDA, where memory is short, and none on a CPU"""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "tp", "pp", "ep")
        require_at_least(self, 0, "dp")

    def recompute_on(self, device_type: str) -> Literal["none", "full"]:
        """The choice of `recompute` on a device: "auto" resolved."""
        if self.recompute == "auto":
            return "full" if device_type == "cuda" else "none"
        return self.recompute


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on frozen weights (LoRA), optionally quantized to 4 bits (QLoRA)."""

    rank: int = 0
    """rank of the adapters (0: off, all weights are trained)"""
    alpha: float = 32.0
    """scaling: adapters are multiplied by alpha / rank [T]"""
    rslora: bool = False
    """rank-stabilized LoRA: scale by alpha / √rank, for large ranks"""
    targets: tuple[Choice, ...] = ()
    """target modules (docs/lora.md), or all (empty: q k v output, and gate up down in models without experts)"""
    quantize: bool = False
    """QLoRA: frozen weights in NF4 with double quantization, 4.13 bits a weight"""
    adapter: ContentPath = ""
    """PEFT folder of the initial adapters, of the same rank, scaling and targets (empty: new adapters)"""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "rank")
        for name in ("quantize", "adapter"):
            require(not getattr(self, name) or self.rank > 0, name, getattr(self, name), "off where rank is 0")
        LoRA(max(self.rank, 1), self.alpha, self.targets or TARGETS)

    def adapters(self, shape: ModelConfig) -> LoRA | None:
        """Adapters of a model of this shape; None if off."""
        targets = self.targets or (TARGETS if shape.moe is None else MOE_TARGETS)
        return LoRA(self.rank, self.alpha, targets, self.rslora, self.quantize) if self.rank else None


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, learning rate schedule, gradient clipping, and weights of the router losses of MoE models."""

    lr: float = 1e-6
    """peak learning rate [O, V]"""
    betas: tuple[float, float] = (0.9, 0.95)
    """β1 and β2: decay of the first and second moments [O]"""
    eps: float = 1e-8
    """ε, added to the root of the second moment"""
    weight_decay: float = 0.0
    """decoupled weight decay of matrices, not of norms and biases [O]"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """learning rate schedule after the warmup [O]"""
    warmup_ratio: float = 0.03
    """fraction of the updates with linear warmup from 0 to lr [O]"""
    min_lr_ratio: float = 0.1
    """final learning rate as a fraction of lr [O]"""
    max_grad_norm: float = 1.0
    """gradient clipping: maximum global norm (0: off)"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """on NaN or infinity in rewards, advantages, losses or gradients: stop the run, or skip the step, which leaves
    weights, optimizer state and schedule unchanged"""
    max_skipped: int = 10
    """maximum number of consecutive skipped steps; one more stops the run"""
    router_aux_coef: float = 0.001
    """weight of the load-balancing loss of MoE models (0: off)"""
    router_z_coef: float = 0.0
    """weight of the router z-loss of MoE models (0: off; ST-MoE: 0.001)"""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "lr", "weight_decay", "max_grad_norm", "router_aux_coef", "router_z_coef")
        require_at_least(self, 1, "max_skipped")
        require_fraction(self, "warmup_ratio", "min_lr_ratio")
        require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "0 or more and below 1")
        require(0 < self.eps < math.inf, "eps", self.eps, "above 0")


@dataclass(frozen=True)
class MicroBatchConfig:
    """Size of a micro-batch: memory and speed, not results."""

    micro_batch_size: int = 8
    """samples (rows) per forward and backward pass of a DP rank"""
    micro_batch_tokens: int = 0
    """maximum tokens per micro-batch, in place of micro_batch_size (0: off)"""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "micro_batch_size")
        require_at_least(self, 0, "micro_batch_tokens")

    def check_longest(self, section: str, longest: int, options: str) -> None:
        """Refuse micro-batches of fewer tokens than one sample may have, which `options` limit to `longest`."""
        if 0 < self.micro_batch_tokens < longest:
            raise ValueError(
                f"{section}.micro_batch_tokens={self.micro_batch_tokens} is less than one sample may have:"
                f" {options} = {longest}"
            )
