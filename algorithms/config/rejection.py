"""Config of launch/rejection.py: rejection sampling and iterative DPO.

[O] OpenRLHF, [T] TRL, [L] Llama 2 (Touvron et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .common import LoRAConfig, OptimizerConfig, RolloutConfig, require
from .data import PromptData
from .preference import DPOLoss
from .reward import ShapedReward
from .run import RunConfig, ScriptConfig
from .supervised import UpdateConfig


@dataclass(frozen=True)
class RoundConfig:
    """Rounds: the model responds, the best responses are selected, and it learns from them."""

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
    """Run: folder, checkpoints, logs, seed, time limits, responses to show at its end."""

    show: int = 3
    """prompts answered greedily before and after, for the table at the end"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.show >= 0, "show", self.show, "0 or more")


@dataclass(frozen=True)
class RejectionConfig(ScriptConfig):
    """Rejection sampling: in rounds, the model responds, a reward selects, and the model learns the selected responses.

    Where defaults come from: [O] OpenRLHF, [V] verl, [T] TRL, [L] Llama 2.
    """

    noun = "prompts"

    data: PromptData = field(default_factory=PromptData)
    run: RejectionRun = field(default_factory=lambda: RejectionRun(output="runs/rejection"))
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(samples_per_prompt=4))
    reward: ShapedReward = field(default_factory=ShapedReward)
    round: RoundConfig = field(default_factory=RoundConfig)
    loss: DPOLoss = field(default_factory=DPOLoss)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6))
    update: UpdateConfig = field(default_factory=UpdateConfig)

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps of a round."""
        return -(-self.round.epochs * self.round.prompts // self.update.batch_size)

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`."""
        dp = super().check(world)
        self.reward.check_given()
        if self.rollout.samples_per_prompt < 2:
            raise ValueError("rollout.samples_per_prompt=1: the best of one response is no choice, 2 at least")
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        self.update.check(dp, longest, "data.max_prompt_tokens + rollout.max_new_tokens")
        return dp
