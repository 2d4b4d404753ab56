"""PPO's config: every knob with the default its first paper or the trainers in wide use publish.

Where they differ the choice is said beside the knob: [P] PPO (Schulman et al. 2017), [I] InstructGPT (Ouyang et al.
2022), [D] dual clip (Ye et al. 2020), [Z] fine-tuning from human preferences (Ziegler et al. 2019), [O] OpenRLHF,
[V] verl. A 0 or an empty string turns a thing off where the text says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ...engine.config import ContentPath, FilePath
from .common import (
    LoRAConfig,
    ModelPaths,
    OptimizerConfig,
    ParallelConfig,
    PromptData,
    RewardConfig,
    RolloutConfig,
    require,
)
from .convention import AS_PRESET, PPOConvention, check_preset_number
from .online import OnlineRunConfig, check_online
from .presets import Convention


@dataclass(frozen=True)
class PPOModels(ModelPaths):
    """The four roles' weights: the actor starts from `path`, the reference stays at it."""

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
    """The policy's update."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    clip_low: float = 0.2
    """the ratio is clipped below 1 - clip_low [P]"""
    clip_high: float = 0.2
    """the ratio is clipped above 1 + clip_high; larger than clip_low lets rare tokens rise [P]"""
    dual_clip: float = AS_PRESET
    """bounds the loss of a negative advantage at this many times it (0: off; the paper has 3; -1: preset) [D]"""
    entropy_coef: float = 0.0
    """entropy bonus"""
    ema_decay: float = 0.0
    """keeps an exponential moving average of the weights and exports it too (0: off; [O] has 0.992)"""
    ptx_coef: float = 0.0
    """weight of the pretraining loss mixed in, PPO-ptx (0: off; [I] has 27.8)"""

    def __post_init__(self) -> None:
        require(0 < self.clip_low < 1, "clip_low", self.clip_low, "above 0 and below 1")
        require(0 < self.clip_high < math.inf, "clip_high", self.clip_high, "above 0")
        check_preset_number(
            self, "dual_clip", self.dual_clip == 0 or 1 < self.dual_clip < math.inf, "0 (off) or above 1"
        )
        require(math.isfinite(self.entropy_coef), "entropy_coef", self.entropy_coef, "a finite number")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "0 (off) or more and below 1")
        require(0 <= self.ptx_coef < math.inf, "ptx_coef", self.ptx_coef, "0 (off) or more")


@dataclass(frozen=True)
class CriticConfig:
    """The value function's update."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6))
    value_clip: float = AS_PRESET
    """values move at most this far from their old ones (0: off; -1: as convention.preset says, ours 0.5) [O, V]"""
    warmup_steps: int = 0
    """first steps in which only the critic learns"""

    def __post_init__(self) -> None:
        check_preset_number(self, "value_clip", 0 <= self.value_clip < math.inf, "0 (off) or more")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")


@dataclass(frozen=True)
class PPOOptions:
    """Advantages, KL penalty, and how a batch becomes updates."""

    gamma: float = 1.0
    """discount [I]"""
    lam: float = AS_PRESET
    """GAE's lambda (-1: as convention.preset says, ours 0.95 [P, I]; [O] and [V] have 1)"""
    kl: Literal["k1", "k2", "k3"] = "k1"
    """estimator of the KL to the reference in the per-token reward [O]"""
    kl_coef: float = 0.01
    """weight of that penalty [O]; with kl_target only where it starts"""
    kl_target: float = 0.0
    """the weight adapts so that a sequence's KL stays near this (0: fixed; [Z] has 6)"""
    kl_horizon: int = 10000
    """samples over which the adaptive weight moves [Z]"""
    whiten: bool = True
    """advantages get mean 0 and deviation 1 over the response tokens of the global batch"""
    epochs: int = 1
    """passes over each batch"""
    minibatches: int = 1
    """optimizer steps a pass: the batch is cut into this many equal parts"""
    micro_batch_size: int = 8
    """samples in one forward and backward of a data-parallel rank; changes speed and memory only"""
    micro_batch_tokens: int = 0
    """instead of a number of samples, at most this many tokens a micro-batch (0: by samples)"""
    tis_clip: float = 0.0
    """weights tokens by the ratio of actor to sampler, truncated here (0: off; 2 is usual)"""

    def __post_init__(self) -> None:
        require(0 <= self.gamma <= 1, "gamma", self.gamma, "from 0 to 1")
        check_preset_number(self, "lam", 0 <= self.lam <= 1, "from 0 to 1")
        for name in ("kl_coef", "kl_target", "tis_clip"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        for name in ("kl_horizon", "epochs", "minibatches", "micro_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        adapts = self.kl_target > 0
        require(
            not adapts or self.kl_coef > 0, "kl_coef", self.kl_coef, f"above 0 to adapt to kl_target={self.kl_target}"
        )
        require(self.micro_batch_tokens >= 0, "micro_batch_tokens", self.micro_batch_tokens, "0 (off) or more")


@dataclass(frozen=True)
class PPORun(OnlineRunConfig):
    """The run itself."""

    output: str = "runs/ppo"
    """folder for logs, checkpoints and the exported model"""


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimization from rewards: actor, critic, reference and reward on one 3D-parallel mesh.

    Where defaults come from: [P] PPO, [I] InstructGPT, [D] dual clip, [Z] Ziegler et al., [O] OpenRLHF, [V] verl.
    """

    model: PPOModels = field(default_factory=PPOModels)
    data: PPOData = field(default_factory=PPOData)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    ppo: PPOOptions = field(default_factory=PPOOptions)
    convention: PPOConvention = field(default_factory=PPOConvention)
    run: PPORun = field(default_factory=PPORun)

    @property
    def rules(self) -> Convention:
        """Every choice where trainers differ: the preset's, or the knob's that is given."""
        return self.convention.resolved(
            reward_clip=self.reward.clip,
            lam=self.ppo.lam,
            dual_clip=self.actor.dual_clip,
            value_clip=self.critic.value_clip,
        )

    @property
    def batch_size(self) -> int:
        """Samples of a step over all ranks."""
        return self.run.prompts_per_step * self.rollout.samples_per_prompt


def check(config: PPOConfig, world: int) -> int:
    """Cross-checks that need no model: what must be given, and the sizes that must divide.

    The model's own sizes (heads by tp, layers by pp) are checked by models/config.py's check_layout.

    Returns:
        The size of the data axis.

    Raises:
        ValueError: naming the knobs and numbers that do not fit.
    """
    dp = check_online(config, world, "ppo", config.ppo)
    if config.actor.ptx_coef and not config.data.ptx_source:
        raise ValueError(f"actor.ptx_coef={config.actor.ptx_coef} needs text to learn from: give data.ptx_source")
    if config.critic.warmup_steps >= config.run.steps:
        raise ValueError(
            f"critic.warmup_steps={config.critic.warmup_steps} leaves the actor none of run.steps={config.run.steps}"
        )
    return dp
