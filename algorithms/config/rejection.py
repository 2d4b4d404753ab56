"""Config of launch/rejection.py: rejection sampling and iterative DPO. [L] Llama 2 (Touvron et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .common import LoRAConfig, OptimizerConfig, RolloutConfig, require_at_least
from .data import PromptData
from .preference import DPOLoss
from .reward import ShapedReward
from .run import PolicyRun, ScriptConfig
from .supervised import UpdateConfig


@dataclass(frozen=True)
class RejectionOptions:
    """Rounds: responses are sampled, the best are selected by their rewards, and the policy learns them."""

    method: Literal["sft", "dpo"] = "sft"
    """sft: learn the best response to each prompt (rejection sampling [L]); dpo: best against worst (iterative DPO)"""
    rounds: int = 3
    """number of rounds"""
    prompts_per_round: int = 128
    """prompts per round, with rollout.samples_per_prompt responses each"""
    epochs: int = 1
    """passes per round over its prompts; those without a selected response are replaced by others"""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "rounds", "prompts_per_round", "epochs")


@dataclass(frozen=True)
class RejectionConfig(ScriptConfig):
    """Rejection sampling (best of n) or iterative DPO: rounds of sampling, selection by a reward, and training.

    Sources of defaults: [O] OpenRLHF, [V] verl, [T] TRL, [L] Llama 2.
    """

    noun = "prompts"

    data: PromptData = field(default_factory=PromptData)
    run: PolicyRun = field(default_factory=lambda: PolicyRun(output="runs/rejection"))
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(samples_per_prompt=4))
    reward: ShapedReward = field(default_factory=ShapedReward)
    rejection: RejectionOptions = field(default_factory=RejectionOptions)
    loss: DPOLoss = field(default_factory=DPOLoss)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6))
    update: UpdateConfig = field(default_factory=UpdateConfig)

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps of a round."""
        return -(-self.rejection.epochs * self.rejection.prompts_per_round // self.update.batch_size)

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`."""
        dp = super().check(world)
        self.reward.check_given()
        if self.rollout.samples_per_prompt < 2:
            raise ValueError("rollout.samples_per_prompt=1: must be at least 2 to select from")
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        self.update.check(dp, longest, "data.max_prompt_tokens + rollout.max_new_tokens")
        return dp
