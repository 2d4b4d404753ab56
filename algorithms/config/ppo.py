"""Config of launch/ppo.py.

Defaults are those of the first paper or of the trainers in wide use: [P] PPO (Schulman et al. 2017), [I] InstructGPT
(Ouyang et al. 2022), [D] dual clip (Ye et al. 2020), [Z] fine-tuning from human preferences (Ziegler et al. 2019), [O]
OpenRLHF, [V] verl. Choices of other trainers: launch/configs/presets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ...engine.config import ContentPath, FilePath, FunctionPath
from ..advantages import Gaps
from ..extensions import PPO_ESTIMATOR, TOKEN_LOSS, check_function
from ..losses.aggregation import Aggregation
from .common import ModelPaths, OptimizerConfig, require
from .data import PromptData
from .online import OnlineConfig, OnlineRun, UpdateOptions


@dataclass(frozen=True)
class PPOModels(ModelPaths):
    """Model to train: the actor starts from `path`, the reference stays at it."""

    critic: ContentPath = ""
    """folder the critic's body starts from, a reward model's for instance ("": the actor's)"""


@dataclass(frozen=True)
class PPOData(PromptData):
    """Prompts, and text for the pretraining mix."""

    ptx_source: FilePath = ""
    """text for the pretraining mix (actor.ptx_coef), given like a source"""
    ptx_key: str = "text"
    """column of ptx_source that holds the text"""
    ptx_tokens: int = 512
    """tokens of a sequence of the pretraining mix; each minibatch takes as many sequences as it has samples"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.ptx_tokens >= 2, "ptx_tokens", self.ptx_tokens, "at least 2")


@dataclass(frozen=True)
class ActorConfig:
    """Update of the policy."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    policy_loss: FunctionPath = "clip"
    """clip, the clipped surrogate [P], or path/to/file.py:function (docs/extending.md)"""
    clip_low: float = 0.2
    """the probability ratio is clipped below 1 - clip_low [P]"""
    clip_high: float = 0.2
    """the ratio is clipped above 1 + clip_high; larger than clip_low lets rare tokens rise [P]"""
    dual_clip: float = 0.0
    """upper bound of the loss of a negative advantage, as a multiple of it (0: off; the paper has 3) [D]"""
    log_ratio_limit: float = 0.0
    """limit of |log π - log π_old| before the exponential (0: none)"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    ema_decay: float = 0.0
    """keeps an exponential moving average of the weights and exports it too (0: off; [O] has 0.992)"""
    ptx_coef: float = 0.0
    """weight of the pretraining loss mixed in, PPO-ptx (0: off; [I] has 27.8)"""

    def __post_init__(self) -> None:
        require(0 < self.clip_low < 1, "clip_low", self.clip_low, "above 0 and below 1")
        require(0 < self.clip_high < math.inf, "clip_high", self.clip_high, "above 0")
        dual = self.dual_clip
        require(dual == 0 or 1 < dual < math.inf, "dual_clip", dual, "0 (off) or above 1")
        require(math.isfinite(self.entropy_coef), "entropy_coef", self.entropy_coef, "a finite number")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "0 (off) or more and below 1")
        for name in ("log_ratio_limit", "ptx_coef"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 (off) or more")


@dataclass(frozen=True)
class CriticConfig:
    """Update of the value function."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6))
    value_clip: float = 0.5
    """values are clipped to at most this far from their old ones (0: off) [O, V]"""
    loss_coef: float = 0.5
    """weight of the squared error of the values"""
    warmup_steps: int = 0
    """first steps in which only the critic learns"""

    def __post_init__(self) -> None:
        require(0 <= self.value_clip < math.inf, "value_clip", self.value_clip, "0 (off) or more")
        require(0 < self.loss_coef < math.inf, "loss_coef", self.loss_coef, "above 0")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")


@dataclass(frozen=True)
class PPOOptions(UpdateOptions):
    """Advantages, KL penalty, and how a batch becomes updates."""

    advantage_estimator: FunctionPath = "gae"
    """gae, or path/to/file.py:function (docs/extending.md)"""
    gamma: float = 1.0
    """discount [I]"""
    lam: float = 0.95
    """λ of GAE ([P, I]; [O] and [V] have 1)"""
    turn_gaps: Gaps = "carry"
    """GAE across tokens between turns, which the policy did not choose: carry goes on at its next token, zero takes
    them for states of reward and value 0 [O]"""
    whiten: Literal["off", "population", "unbiased", "unbiased_eps"] = "population"
    """advantages get mean 0 and deviation 1 over the response tokens of the global batch: by the population variance,
    1e-8 at least [O], or the unbiased one + 1e-8 [T], with 1e-8 added to the number of tokens [V]"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """estimator of the KL to the reference in the per-token reward [O]"""
    kl_coef: float = 0.01
    """weight of the KL penalty [O]; with kl_target the weight it starts from"""
    kl_target: float = 0.0
    """adaptive KL: the weight moves so that a sequence's KL stays near this (0: fixed; [Z] has 6)"""
    kl_horizon: int = 10000
    """samples over which the adaptive weight moves [Z]"""
    kl_input_limit: float = 0.0
    """limit of |log-ratio| before the KL estimator (0: none)"""
    kl_output_limit: float = 0.0
    """limit of the KL estimate's size (0: none)"""
    loss_aggregation: Aggregation = "token-mean"
    """how the per-token losses of actor and critic become one (docs/grpo.md; constant: rollout.max_new_tokens)"""
    tis_clip: float = 0.0
    """truncated importance sampling: weights tokens by π_old / sampler, at most this (0: off; 2 is usual)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.gamma <= 1, "gamma", self.gamma, "from 0 to 1")
        require(0 <= self.lam <= 1, "lam", self.lam, "from 0 to 1")
        for name in ("kl_coef", "kl_target", "kl_input_limit", "kl_output_limit", "tis_clip"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        require(self.kl_horizon >= 1, "kl_horizon", self.kl_horizon, "at least 1")
        adapts = self.kl_target > 0
        require(
            not adapts or self.kl_coef > 0, "kl_coef", self.kl_coef, f"above 0 to adapt to kl_target={self.kl_target}"
        )


@dataclass(frozen=True)
class PPOConfig(OnlineConfig):
    """Proximal policy optimization from rewards: actor, critic, reference and reward models.

    Where defaults come from: [P] PPO, [I] InstructGPT, [D] dual clip, [Z] Ziegler et al., [O] OpenRLHF, [V] verl.
    """

    model: PPOModels = field(default_factory=PPOModels)
    data: PPOData = field(default_factory=PPOData)
    run: OnlineRun = field(default_factory=lambda: OnlineRun(output="runs/ppo"))
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    ppo: PPOOptions = field(default_factory=PPOOptions)

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`. The model's own sizes (heads by tp) are checked against its config.json later."""
        dp = self.check_batch(world, "ppo", self.ppo.minibatches, self.ppo.micro_batch_tokens)
        if self.actor.ptx_coef and not self.data.ptx_source:
            raise ValueError(f"actor.ptx_coef={self.actor.ptx_coef} needs text to learn from: give data.ptx_source")
        if self.critic.warmup_steps >= self.run.steps:
            raise ValueError(
                f"critic.warmup_steps={self.critic.warmup_steps} leaves the actor none of run.steps={self.run.steps}"
            )
        check_function("actor.policy_loss", self.actor.policy_loss, TOKEN_LOSS, own=("clip",))
        check_function("ppo.advantage_estimator", self.ppo.advantage_estimator, PPO_ESTIMATOR, own=("gae",))
        return dp
