"""Config of launch/ppo.py. Defaults of other trainers: launch/configs/presets.

[P] PPO (Schulman et al. 2017), [I] InstructGPT (Ouyang et al. 2022), [Z] fine-tuning from human preferences (Ziegler et
al. 2019), [O] OpenRLHF, [V] verl, [T] TRL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ...engine.config import ContentPath, FilePath, FunctionPath
from ..extensions import PPO_ESTIMATOR, TOKEN_LOSS, check_function
from .common import ModelPaths, OptimizerConfig, require, require_at_least, require_fraction
from .data import PromptData
from .online import OnlineConfig, OnlineRunConfig, PolicyLossConfig, UpdateOptions


@dataclass(frozen=True)
class PPOModels(ModelPaths):
    """Initial weights: the actor and the reference start from `path`."""

    critic: ContentPath = ""
    """folder of the critic's initial weights, for instance a reward model's (empty: the actor's)"""


@dataclass(frozen=True)
class PPOData(PromptData):
    """Prompts, and text of the pretraining mix."""

    ptx_source: FilePath = ""
    """text of the pretraining mix (actor.ptx_coef), a source as in data.sources"""
    ptx_key: str = "text"
    """column of the text in ptx_source"""
    ptx_tokens: int = 512
    """sequence length of the pretraining mix in tokens; a minibatch has as many sequences as samples"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 2, "ptx_tokens")


@dataclass(frozen=True)
class ActorConfig(PolicyLossConfig):
    """Actor: optimizer and policy loss."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ptx_coef: float = 0.0
    """weight of the pretraining loss, PPO-ptx (0: off; [I] 27.8)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.clip_low < 1, "clip_low", self.clip_low, "above 0 and below 1")
        require(self.clip_high > 0, "clip_high", self.clip_high, "above 0")
        require_at_least(self, 0, "ptx_coef")


@dataclass(frozen=True)
class CriticConfig:
    """Critic: optimizer and value loss."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6))
    value_clip: float = 0.5
    """value clipping: maximum distance from the old values (0: off) [O, V]"""
    loss_coef: float = 0.5
    """weight of the squared error of the values"""
    warmup_steps: int = 0
    """number of initial steps that update only the critic"""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "value_clip", "warmup_steps")
        require(0 < self.loss_coef < math.inf, "loss_coef", self.loss_coef, "above 0")


@dataclass(frozen=True)
class PPOOptions(UpdateOptions):
    """Advantages, KL penalty, and updates from a batch."""

    advantage_estimator: FunctionPath = "gae"
    """gae, or a custom advantage estimator, path/to/file.py:function (docs/extending.md)"""
    lam: float = 0.95
    """λ of GAE ([P, I]; [O, V] 1)"""
    whiten: Literal["off", "population", "unbiased", "unbiased_eps"] = "population"
    """whiten advantages to mean 0 and variance 1 over the response tokens of the global batch: population variance, at
    least 1e-8 [O]; unbiased variance + 1e-8 [T]; the same with 1e-8 added to the token count [V]"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """estimator of the KL to the reference in the token rewards [O]"""
    kl_coef: float = 0.01
    """weight of the KL penalty [O]; with kl_target the initial weight"""
    kl_target: float = 0.0
    """adaptive KL controller: target KL of a sequence (0: off, constant weight; [Z] 6)"""
    kl_horizon: int = 10000
    """horizon of the adaptive KL controller in samples [Z]"""
    tis_clip: float = 0.0
    """truncated importance sampling: weight tokens by min(π_old / π_sampler, this) (0: off; usually 2)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction(self, "lam")
        require_at_least(self, 0, "kl_target", "tis_clip")
        require_at_least(self, 1, "kl_horizon")
        allowed = f"above 0 with kl_target={self.kl_target}"
        require(not self.kl_target or self.kl_coef > 0, "kl_coef", self.kl_coef, allowed)


@dataclass(frozen=True)
class PPOConfig(OnlineConfig):
    """Proximal policy optimization (PPO) from rewards: actor, critic, reference and reward models.

    Sources of defaults: [P] PPO, [I] InstructGPT, [Z] Ziegler et al. 2019, [O] OpenRLHF, [V] verl, [T] TRL.
    """

    model: PPOModels = field(default_factory=PPOModels)
    data: PPOData = field(default_factory=PPOData)
    run: OnlineRunConfig = field(default_factory=lambda: OnlineRunConfig(output="runs/ppo"))
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    ppo: PPOOptions = field(default_factory=PPOOptions)

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`. Sizes of the model (heads by tp) are checked later, against its config.json."""
        dp = self.check_batch(world, "ppo", self.ppo)
        if self.actor.ptx_coef and not self.data.ptx_source:
            raise ValueError(f"actor.ptx_coef={self.actor.ptx_coef}: needs text in data.ptx_source")
        if self.critic.warmup_steps >= self.run.steps:
            raise ValueError(
                f"critic.warmup_steps={self.critic.warmup_steps}: must be below run.steps={self.run.steps}"
            )
        check_function("actor.policy_loss", self.actor.policy_loss, TOKEN_LOSS, own=("clip",))
        check_function("ppo.advantage_estimator", self.ppo.advantage_estimator, PPO_ESTIMATOR, own=("gae",))
        return dp
