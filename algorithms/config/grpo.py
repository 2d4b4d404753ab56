"""Config of launch/grpo.py: GRPO and kin, which learn from groups of responses without a critic.

Where a default comes from: [G] GRPO (Shao et al. 2024), [R] RLOO (Ahmadian et al. 2024), [A] DAPO (Yu et al. 2025), [S]
GSPO (Zheng et al. 2025), [O] OpenRLHF, [V] verl, [T] TRL. Dr. GRPO, RLOO, REINFORCE++, DAPO, GSPO and CISPO, and the
choices of other trainers: launch/configs/presets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ...engine.config import FunctionPath
from ..advantages import Baseline, Gaps, Scale
from ..extensions import GROUP_ESTIMATOR, TOKEN_LOSS, check_function
from ..losses.aggregation import Aggregation
from ..losses.kl import KLKind
from ..losses.policy import Correction, Level
from .common import OptimizerConfig, RolloutConfig, require
from .online import OnlineConfig, OnlineRun, UpdateOptions


@dataclass(frozen=True)
class GRPOOptions(UpdateOptions):
    """Advantages, loss, KL penalty, dynamic sampling, and how a batch becomes updates."""

    advantage_estimator: FunctionPath = "group"
    """group, the reward against those of the other responses to the prompt (baseline, scale_rewards), or
    path/to/file.py:function (docs/extending.md)"""
    baseline: Baseline = "mean"
    """taken off a reward: the mean of its group, that of the other responses [R], nothing"""
    scale_rewards: Scale = "unbiased"
    """deviation that advantages are divided by: of the group, of the other responses, of the whole batch"""
    scale_eps: float = 1e-6
    """added to that deviation"""
    single_response: Literal["zero", "reward"] = "zero"
    """advantage of the only scored response to a prompt"""
    whiten: Literal["off", "population", "unbiased", "unbiased_eps"] = "off"
    """advantages get mean 0 and deviation 1 over the response tokens of the global batch: by the population variance,
    1e-8 at least [O], or the unbiased one + 1e-8 [T], with 1e-8 added to the number of tokens [V]"""
    gamma: float = 1.0
    """discount of a token's reward seen from the tokens before it"""
    turn_gaps: Gaps = "carry"
    """returns across tokens between turns, which the policy did not choose: carry goes on at its next token, zero takes
    them for states of reward 0 [O]"""
    policy_loss: FunctionPath = "clip"
    """clip, the clipped surrogate; cispo, the clipped weight times log π; or path/to/file.py:function
    (docs/extending.md)"""
    ratio_level: Level = "token"
    """probability ratio of each token, GSPO's geometric mean over the response, or the whole response's [T: RLOO]"""
    gspo_token: bool = False
    """GSPO-token: each token gets the gradient of its own log-ratio instead of the mean's [V]"""
    clip_low: float = 0.2
    """the ratio is clipped below 1 - clip_low (GSPO 3e-4 [S]; CISPO 1, which is no bound)"""
    clip_high: float = 0.2
    """the ratio is clipped above 1 + clip_high (DAPO 0.28 [A]; GSPO 4e-4 [S]; CISPO 4)"""
    dual_clip: float = 0.0
    """upper bound of the loss of a negative advantage, as a multiple of it, token ratios only (0: off)"""
    log_ratio_limit: float = 0.0
    """limit of |log π - log π_old| before the exponential, token ratios only (0: none)"""
    sequence_log_ratio_limit: float = 0.0
    """upper limit of a response's log-ratio before the exponential (0: none)"""
    loss_aggregation: Aggregation = "token-mean"
    """how per-token losses become one; constant is Dr. GRPO's sum over (samples x rollout.max_new_tokens)"""
    kl_in: Literal["off", "score", "reward", "advantage", "loss"] = "loss"
    """where the KL to the reference is subtracted: from a response's score before the baseline [R], from token rewards,
    whose returns gather that of later tokens [O], from each token's advantage; or it is added to the loss [G]"""
    kl_estimator: KLKind = "k3"
    """estimator of the KL; k1+ and k3+ have the gradient of k2"""
    kl_coef: float = 0.04
    """weight of the KL (GRPO 0.04 [G], RLOO 0.05 [T], REINFORCE++ 0.01 [O])"""
    kl_input_limit: float = 0.0
    """limit of |log-ratio| before the KL estimator (0: none)"""
    kl_output_limit: float = 0.0
    """limit of the KL estimate's size (0: none)"""
    kl_unbiased: bool = False
    """a KL in the loss is weighted by the probability ratio, which makes its gradient that of the KL"""
    rollout_correction: Correction = "off"
    """importance weights for a sampler that is not quite the actor: tis truncates the ratio of actor to sampler to the
    bounds, icepop drops what is outside them; of tokens or whole responses, or responses outside are masked"""
    rollout_ratio_low: float = 0.0
    """least importance weight"""
    rollout_ratio_high: float = 2.0
    """largest importance weight"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    dynamic_sampling: bool = False
    """set groups aside whose rewards are all equal, and sample further prompts [A]"""
    max_draws: int = 4
    """times prompts are drawn in a step before groups without spread fill up the batch"""
    overlong_buffer: float = 0.0
    """last share of rollout.max_new_tokens in which a response's length penalty grows (0: off; [A] has 0.2)"""
    overlong_penalty: float = 1.0
    """length penalty at max_new_tokens [A]"""
    ema_decay: float = 0.0
    """keeps an exponential moving average of the weights and exports it too (0: off)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma", "overlong_buffer"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        limits = ("log_ratio_limit", "sequence_log_ratio_limit", "kl_input_limit", "kl_output_limit")
        for name in ("scale_eps", "clip_low", "clip_high", *limits, "kl_coef", "rollout_ratio_low", "overlong_penalty"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        dual = self.dual_clip
        require(dual == 0 or 1 < dual < math.inf, "dual_clip", dual, "0 (off) or above 1")
        least = self.rollout_ratio_low
        require(
            0 < self.rollout_ratio_high >= least,
            "rollout_ratio_high",
            self.rollout_ratio_high,
            f"above 0, and rollout_ratio_low={least} or more",
        )
        require(math.isfinite(self.entropy_coef), "entropy_coef", self.entropy_coef, "a finite number")
        require(self.max_draws >= 1, "max_draws", self.max_draws, "at least 1")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "0 (off) or more and below 1")


@dataclass(frozen=True)
class GRPOConfig(OnlineConfig):
    """Policy gradients from groups of responses, without a critic: GRPO; Dr. GRPO, RLOO, REINFORCE++, DAPO, GSPO, CISPO
    by launch/configs/presets.

    Where defaults come from: [G] GRPO, [R] RLOO, [A] DAPO, [S] GSPO, [O] OpenRLHF, [V] verl, [T] TRL.
    """

    run: OnlineRun = field(default_factory=lambda: OnlineRun(output="runs/grpo", prompts_per_step=32))
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(samples_per_prompt=8))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    grpo: GRPOOptions = field(default_factory=GRPOOptions)

    @property
    def needs_reference(self) -> bool:
        """Whether anything is compared with the reference."""
        return self.grpo.kl_in != "off"

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`. The model's own sizes (heads by tp) are checked against its config.json later."""
        options, samples = self.grpo, self.rollout.samples_per_prompt
        dp = self.check_batch(world, "grpo", options.minibatches, options.micro_batch_tokens)
        if samples < 2 and options.baseline != "none":
            raise ValueError(
                f"rollout.samples_per_prompt={samples}: grpo.baseline={options.baseline} is of the other responses to a"
                " prompt, 2 at least"
            )
        if samples < 2 and options.dynamic_sampling:
            raise ValueError(f"rollout.samples_per_prompt={samples}: grpo.dynamic_sampling needs groups, 2 at least")
        if options.policy_loss == "clip" and options.clip_low >= 1:
            raise ValueError(f"grpo.clip_low={options.clip_low}: must be below 1 for grpo.policy_loss=clip")
        if options.policy_loss == "cispo" and options.clip_low + options.clip_high == 0:
            low, high = options.clip_low, options.clip_high
            raise ValueError(f"grpo.clip_low={low}, grpo.clip_high={high}: CISPO's bounds leave no ratio between them")
        check_function("grpo.policy_loss", options.policy_loss, TOKEN_LOSS, own=("clip", "cispo"))
        check_function("grpo.advantage_estimator", options.advantage_estimator, GROUP_ESTIMATOR, own=("group",))
        return dp
