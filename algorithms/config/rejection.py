"""The config of rejection sampling and of iterative DPO. [O] OpenRLHF, [T] TRL, [L] Llama 2 (Touvron et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .common import (
    LoRAConfig,
    ModelPaths,
    OptimizerConfig,
    ParallelConfig,
    PromptData,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    UpdateConfig,
    check_given,
    require,
)
from .convention import ConventionConfig, is_preset
from .preference import DPOLoss
from .presets import Convention


@dataclass(frozen=True)
class RoundConfig:
    """What a round is: the model answers, the best answers are picked, and it learns from them."""

    method: Literal["sft", "dpo"] = "sft"
    """sft learns each prompt's best answer (rejection sampling [L]); dpo learns best against worst (iterative DPO)"""
    count: int = 3
    """rounds of the run"""
    prompts: int = 128
    """prompts answered in a round, rollout.samples_per_prompt times each"""
    epochs: int = 1
    """passes of a round over its prompts; where some give nothing to learn, the others are met more often"""

    def __post_init__(self) -> None:
        for name in ("count", "prompts", "epochs"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@dataclass(frozen=True)
class RejectionRun(RunConfig):
    """The run itself."""

    output: str = "runs/rejection"
    """folder for logs, checkpoints, each round's answers and the exported model"""
    show: int = 3
    """prompts answered greedily before and after, for the table at the end"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.show >= 0, "show", self.show, "0 or more")


@dataclass(frozen=True)
class RejectionConfig:
    """Rejection sampling: in rounds, the model answers, a reward picks, and the model learns what was picked.

    Where defaults come from: [O] OpenRLHF, [V] verl, [T] TRL, [L] Llama 2.
    """

    model: ModelPaths = field(default_factory=ModelPaths)
    data: PromptData = field(default_factory=PromptData)
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(samples_per_prompt=4))
    reward: RewardConfig = field(default_factory=RewardConfig)
    round: RoundConfig = field(default_factory=RoundConfig)
    loss: DPOLoss = field(default_factory=DPOLoss)
    convention: ConventionConfig = field(default_factory=ConventionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6))
    update: UpdateConfig = field(default_factory=UpdateConfig)
    run: RejectionRun = field(default_factory=RejectionRun)

    @property
    def pair_loss(self) -> DPOLoss:
        """The loss of method dpo with every choice made."""
        return self.loss.made(self.convention)

    @property
    def rules(self) -> Convention:
        """The preset's choices; a clip of the rewards that is given acts where answers are compared."""
        at = "preset" if is_preset(self.reward.clip) else "score"
        return self.convention.resolved(reward_clip=self.reward.clip, reward_clip_at=at)

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps of a round."""
        return -(-self.round.epochs * self.round.prompts // self.update.batch_size)


def check_rejection(config: RejectionConfig, world: int) -> int:
    """Cross-checks that need no model; returns the size of the data axis. ValueError names the knobs."""
    dp = check_given(config.model, config.data, config.parallel, world, rows="prompts")
    config.reward.check_given()
    if config.rollout.samples_per_prompt < 2:
        raise ValueError("rollout.samples_per_prompt=1: the best of one answer is no choice, 2 at least")
    if config.reward.normalize:
        raise ValueError("reward.normalize=True: answers to one prompt are compared, which no scale changes")
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    config.update.check(dp, longest, "data.max_prompt_tokens + rollout.max_new_tokens")
    return dp
