"""What the configs of PPO and GRPO share: a run in steps of prompts, and how a step's answers are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .common import ModelPaths, ParallelConfig, PromptData, RewardConfig, RolloutConfig, RunConfig, check_given, require


@dataclass(frozen=True)
class OnlineRunConfig(RunConfig):
    """The run itself."""

    steps: int = 100
    """steps of the run; each answers, scores and learns from one batch"""
    prompts_per_step: int = 128
    """prompts of a step, over all ranks: the global batch is this many times rollout.samples_per_prompt"""
    show: int = 4
    """prompts answered greedily before and after, for the table at the end"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "prompts_per_step"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.show >= 0, "show", self.show, "0 or more")


class Cuts(Protocol):
    """The knobs of an algorithm's section that say how a batch is cut."""

    @property
    def minibatches(self) -> int: ...
    @property
    def micro_batch_tokens(self) -> int: ...


class Online(Protocol):
    """The sections that a config has whose steps answer prompts."""

    @property
    def model(self) -> ModelPaths: ...
    @property
    def data(self) -> PromptData: ...
    @property
    def rollout(self) -> RolloutConfig: ...
    @property
    def reward(self) -> RewardConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def run(self) -> OnlineRunConfig: ...
    @property
    def batch_size(self) -> int: ...


def check_online(config: Online, world: int, section: str, cuts: Cuts) -> int:
    """What must be given, and the sizes that must divide.

    Args:
        section: the name under which the config has `cuts`.

    Returns:
        The size of the data axis.

    Raises:
        ValueError: naming the knobs and numbers that do not fit.
    """
    dp = check_given(config.model, config.data, config.parallel, world, rows="prompts")
    config.reward.check_given()
    samples, parts = config.batch_size, cuts.minibatches
    batch = (
        f"run.prompts_per_step x rollout.samples_per_prompt = {config.run.prompts_per_step} x"
        f" {config.rollout.samples_per_prompt} = {samples} samples"
    )
    if samples % parts:
        raise ValueError(f"{batch} do not divide by {section}.minibatches={parts}")
    if samples // parts % dp:
        raise ValueError(
            f"{batch} in {section}.minibatches={parts} parts of {samples // parts} do not divide by dp={dp}"
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if 0 < cuts.micro_batch_tokens < longest:
        raise ValueError(
            f"{section}.micro_batch_tokens={cuts.micro_batch_tokens} is less than one sample may have:"
            f" data.max_prompt_tokens + rollout.max_new_tokens = {longest}"
        )
    return dp
