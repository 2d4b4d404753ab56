"""Config of launch/grpo.py. Dr. GRPO, RLOO, REINFORCE++, DAPO, GSPO, CISPO, other trainers: launch/configs/presets.

[G] GRPO (Shao et al. 2024), [R] RLOO (Ahmadian et al. 2024), [A] DAPO (Yu et al. 2025), [O] OpenRLHF, [V] verl, [T]
TRL.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...engine.config import FunctionPath
from ..advantages import Baseline, Scale
from ..extensions import GROUP_ESTIMATOR, TOKEN_LOSS, check_function
from ..losses.kl import KLKind
from ..losses.policy import Correction, Level
from .common import OptimizerConfig, RolloutConfig, require, require_at_least, require_fraction
from .online import OnlineConfig, OnlineRunConfig, PolicyLossConfig, UpdateOptions


@dataclass(frozen=True)
class GRPOOptions(PolicyLossConfig, UpdateOptions):
    """Advantages, policy loss, KL penalty, dynamic sampling, and updates from a batch."""

    advantage_estimator: FunctionPath = "group"
    """group: rewards relative to the other responses to the prompt (baseline, scale_rewards), or a custom advantage
    estimator, path/to/file.py:function (docs/extending.md)"""
    baseline: Baseline = "mean"
    """baseline subtracted from a reward: the mean of its group, of the other responses (leave-one-out [R]), or none"""
    scale_rewards: Scale = "unbiased"
    """standard deviation that advantages are divided by: of the group, of the other responses, of the batch, or none"""
    scale_eps: float = 1e-6
    """ε added to the standard deviation"""
    single_response: Literal["zero", "reward"] = "zero"
    """advantage of the only scored response to a prompt: 0 or its reward"""
    ratio_level: Level = "token"
    """probability ratio of tokens, or of sequences: the geometric mean (GSPO) or the product (RLOO in [T])"""
    gspo_token: bool = False
    """GSPO-token: each token gets the gradient of its own log-ratio instead of the mean's [V]"""
    sequence_log_ratio_limit: float = 0.0
    """maximum log-ratio of a sequence before the exponential (0: off)"""
    kl_in: Literal["off", "score", "reward", "advantage", "loss"] = "loss"
    """placement of the KL penalty: subtracted from a response's score before the baseline [R], from token rewards [O],
    from token advantages, or added to the loss [G]"""
    kl_estimator: KLKind = "k3"
    """estimator of the KL to the reference; k1+ and k3+ have the gradient of k2"""
    kl_coef: float = 0.04
    """weight of the KL penalty (GRPO 0.04 [G], RLOO 0.05 [T], REINFORCE++ 0.01 [O])"""
    kl_unbiased: bool = False
    """weight a KL in the loss by the probability ratio, for the gradient of the KL itself"""
    rollout_correction: Correction = "off"
    """importance weights π_old / π_sampler of tokens or sequences: tis truncates them to rollout_ratio_low and _high,
    icepop masks those outside; or sequences outside are masked"""
    rollout_ratio_low: float = 0.0
    """minimum importance weight"""
    rollout_ratio_high: float = 2.0
    """maximum importance weight"""
    dynamic_sampling: bool = False
    """drop groups whose rewards are all equal, and sample more prompts [A]"""
    max_draws: int = 4
    """maximum number of generation batches per step; then dropped groups fill the batch"""
    overlong_buffer: float = 0.0
    """fraction of rollout.max_new_tokens at its end with a growing length penalty (0: off; [A] 0.2)"""
    overlong_penalty: float = 1.0
    """length penalty at rollout.max_new_tokens [A]"""

    def __post_init__(self) -> None:
        UpdateOptions.__post_init__(self)
        PolicyLossConfig.__post_init__(self)
        require_fraction(self, "overlong_buffer")
        require_at_least(self, 0, "scale_eps", "sequence_log_ratio_limit", "rollout_ratio_low", "overlong_penalty")
        require_at_least(self, 1, "max_draws")
        low, high = self.rollout_ratio_low, self.rollout_ratio_high
        require(0 < high >= low, "rollout_ratio_high", high, f"above 0, and rollout_ratio_low={low} or more")


@dataclass(frozen=True)
class GRPOConfig(OnlineConfig):
    """Group relative policy optimization (GRPO) from rewards, without a critic; variants: launch/configs/presets.

    Sources of defaults: [G] GRPO, [R] RLOO, [A] DAPO, [O] OpenRLHF, [V] verl, [T] TRL.
    """

    run: OnlineRunConfig = field(default_factory=lambda: OnlineRunConfig(output="runs/grpo", prompts_per_step=32))
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(samples_per_prompt=8))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    grpo: GRPOOptions = field(default_factory=GRPOOptions)

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model is loaded."""
        return self.grpo.kl_in != "off"

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`. Sizes of the model (heads by tp) are checked later, against its config.json."""
        options, samples = self.grpo, self.rollout.samples_per_prompt
        dp = self.check_batch(world, "grpo", options)
        for option, value, off in (
            ("baseline", options.baseline, "none"),
            ("dynamic_sampling", options.dynamic_sampling, False),
        ):
            if samples < 2 and value != off:
                raise ValueError(f"rollout.samples_per_prompt={samples}: must be at least 2 with grpo.{option}={value}")
        low, high = options.clip_low, options.clip_high
        if options.policy_loss == "clip" and low >= 1:
            raise ValueError(f"grpo.clip_low={low}: must be below 1 with grpo.policy_loss=clip")
        if options.policy_loss == "cispo" and low + high == 0:
            raise ValueError(
                f"grpo.clip_low={low}, grpo.clip_high={high}: must not both be 0 with grpo.policy_loss=cispo"
            )
        check_function("grpo.policy_loss", options.policy_loss, TOKEN_LOSS, own=("clip", "cispo"))
        check_function("grpo.advantage_estimator", options.advantage_estimator, GROUP_ESTIMATOR, own=("group",))
        return dp
