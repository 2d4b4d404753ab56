"""Sections that PPO and GRPO share: a run in steps of prompts, and how a step's responses are cut."""

from __future__ import annotations

from dataclasses import dataclass, field

from .common import LoRAConfig, RolloutConfig, require
from .data import PromptData
from .reward import PolicyReward
from .run import RunConfig, ScriptConfig


@dataclass(frozen=True)
class OnlineRun(RunConfig):
    """Run in steps of prompts: folder, length, checkpoints, logs, seed, time limits."""

    steps: int = 100
    """steps of the run; each samples, scores and learns from one batch"""
    prompts_per_step: int = 128
    """prompts of a step, over all ranks: the global batch is this many times rollout.samples_per_prompt"""
    show: int = 4
    """prompts answered greedily before and after, for the table at the end"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "prompts_per_step"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.show >= 0, "show", self.show, "0 or more")


@dataclass(frozen=True)
class OnlineConfig(ScriptConfig):
    """Sections of a script that learns from rewards of its own responses."""

    noun = "prompts"

    data: PromptData = field(default_factory=PromptData)
    run: OnlineRun = field(default_factory=OnlineRun)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: PolicyReward = field(default_factory=PolicyReward)
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    @property
    def batch_size(self) -> int:
        """Samples of a step over all ranks."""
        return self.run.prompts_per_step * self.rollout.samples_per_prompt

    def check_batch(self, world: int, section: str, minibatches: int, micro_batch_tokens: int) -> int:
        """`ScriptConfig.check`, and that the batch divides.

        Args:
            section: of the options `minibatches` and `micro_batch_tokens`, for messages.
        """
        dp = super().check(world)
        self.reward.check_given()
        samples = self.batch_size
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
        if 0 < micro_batch_tokens < longest:
            raise ValueError(
                f"{section}.micro_batch_tokens={micro_batch_tokens} is less than one sample may have:"
                f" data.max_prompt_tokens + rollout.max_new_tokens = {longest}"
            )
        return dp


@dataclass(frozen=True)
class UpdateOptions:
    """How a batch of responses becomes updates."""

    epochs: int = 1
    """passes over each batch"""
    minibatches: int = 1
    """optimizer steps in a pass: the batch is cut into this many equal parts"""
    micro_batch_size: int = 8
    """samples in one forward and backward of a DP rank; changes speed and memory only"""
    micro_batch_tokens: int = 0
    """instead of a number of samples, at most this many tokens in a micro-batch (0: by samples)"""

    def __post_init__(self) -> None:
        for name in ("epochs", "minibatches", "micro_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.micro_batch_tokens >= 0, "micro_batch_tokens", self.micro_batch_tokens, "0 (off) or more")
