"""Config sections that PPO and GRPO share: run, rewards, policy loss, advantages, and updates from a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ...engine.config import FunctionPath
from ..advantages import Gaps
from ..losses.aggregation import Aggregation
from .common import LoRAConfig, MicroBatchConfig, RolloutConfig, require, require_at_least, require_fraction
from .data import PromptData
from .reward import PolicyReward
from .run import PolicyRun, ScriptConfig


@dataclass(frozen=True)
class OnlineRunConfig(PolicyRun):
    """Run in steps of rollouts: folder, length, checkpoints, loggers, seed, timeouts."""

    steps: int = 100
    """number of steps; each samples, scores and learns from one batch"""
    prompts_per_step: int = 128
    """prompts per step, over all ranks: the global batch size is this times rollout.samples_per_prompt"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "steps", "prompts_per_step")


@dataclass(frozen=True)
class PolicyLossConfig:
    """Policy loss."""

    policy_loss: FunctionPath = "clip"
    """clip: the clipped surrogate of PPO; cispo (GRPO only): the clipped weight times log π; or a custom function,
    path/to/file.py:function (docs/extending.md)"""
    clip_low: float = 0.2
    """the probability ratio is clipped to at least 1 - clip_low (GSPO: 3e-4; CISPO: 1, no bound)"""
    clip_high: float = 0.2
    """the probability ratio is clipped to at most 1 + clip_high (DAPO clip-higher: 0.28; GSPO: 4e-4; CISPO: 4)"""
    dual_clip: float = 0.0
    """dual clip: maximum loss of a negative advantage as a multiple of it, token ratios only (0: off; its paper: 3)"""
    log_ratio_limit: float = 0.0
    """clamp |log π - log π_old| to this before the exponential, token ratios only (0: off)"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus (0: off)"""
    ema_decay: float = 0.0
    """decay of an exponential moving average of the weights, exported too (0: off; [O] 0.992)"""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "clip_low", "clip_high", "log_ratio_limit")
        require_fraction(self, "ema_decay", below_1=True)
        dual = self.dual_clip
        require(dual == 0 or 1 < dual < math.inf, "dual_clip", dual, "0 (off) or above 1")
        require(math.isfinite(self.entropy_coef), "entropy_coef", self.entropy_coef, "a finite number")


@dataclass(frozen=True)
class UpdateOptions(MicroBatchConfig):
    """Advantages, KL penalty, and updates from a batch."""

    epochs: int = 1
    """passes over each batch"""
    minibatches: int = 1
    """optimizer steps per pass: the batch is split into this many equal minibatches"""
    gamma: float = 1.0
    """γ: discount factor of token rewards"""
    turn_gaps: Gaps = "carry"
    """returns across environment tokens between turns: carry skips them to the policy's next token, zero takes them as
    states with reward and value 0 [O]"""
    whiten: Literal["off", "population", "unbiased", "unbiased_eps"] = "off"
    """whiten advantages to mean 0 and variance 1 over the response tokens of the global batch: population variance, at
    least 1e-8 [O]; unbiased variance + 1e-8 [T]; the same with 1e-8 added to the token count [V]"""
    kl_coef: float = 0.01
    """weight of the KL penalty"""
    kl_input_limit: float = 0.0
    """clamp |log-ratio| to this before the KL estimator (0: off)"""
    kl_output_limit: float = 0.0
    """clamp the absolute KL estimate to this (0: off)"""
    loss_aggregation: Aggregation = "token-mean"
    """aggregation of per-token losses (docs/grpo.md); constant: sum / (samples x rollout.max_new_tokens)"""
    first_ratio_limit: float = 1e-3
    """on CUDA: maximum distance of a probability ratio from 1 before the first optimizer step of an update, above which
    the run stops; on the CPU it must be 0"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "epochs", "minibatches")
        require_fraction(self, "gamma")
        require_at_least(self, 0, "kl_coef", "kl_input_limit", "kl_output_limit", "first_ratio_limit")


@dataclass(frozen=True)
class OnlineConfig(ScriptConfig):
    """Sections of a script that learns from rewards of its own responses."""

    noun = "prompts"

    data: PromptData = field(default_factory=PromptData)
    run: OnlineRunConfig = field(default_factory=OnlineRunConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: PolicyReward = field(default_factory=PolicyReward)
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    @property
    def batch_size(self) -> int:
        """Samples of a step over all ranks."""
        return self.run.prompts_per_step * self.rollout.samples_per_prompt

    def check_batch(self, world: int, section: str, options: UpdateOptions) -> int:
        """`ScriptConfig.check`, and that the batch divides; `section` is that of `options`."""
        dp = super().check(world)
        self.reward.check_given()
        samples, minibatches = self.batch_size, options.minibatches
        batch = (
            f"run.prompts_per_step x rollout.samples_per_prompt = {self.run.prompts_per_step} x"
            f" {self.rollout.samples_per_prompt} = {samples} samples"
        )
        if samples % minibatches:
            raise ValueError(f"{batch} do not divide by {section}.minibatches={minibatches}")
        size = samples // minibatches
        if size % dp:
            raise ValueError(f"{batch} in {section}.minibatches={minibatches} parts of {size} do not divide by dp={dp}")
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        options.check_longest(section, longest, "data.max_prompt_tokens + rollout.max_new_tokens")
        return dp
