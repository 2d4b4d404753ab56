"""Groups of responses to one prompt, with DAPO's dynamic sampling (https://arxiv.org/abs/2503.14476, section 3.2).

A group whose rewards are all equal has no advantages. Such groups are set aside; when no more prompts may be drawn they
fill up the batch, so that its size never changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from ..advantages import soft_overlong_penalty
from ..batch import Rollout, from_rollouts
from ..config.grpo import GRPOConfig
from ..rewards.rewards import Rewards
from .source import OnPolicySource, Rollouts, RolloutSource


@dataclass(frozen=True)
class Group:
    """The responses to one prompt and their rewards; NaN for an unscored one."""

    rollouts: list[Rollout]
    scores: list[float]  # combined over all scorers
    rewards: list[float]  # after shaping and length penalty

    @property
    def has_spread(self) -> bool:
        """Whether any two scores differ."""
        scored = [score for score in self.scores if score == score]  # not NaN
        return bool(scored) and max(scored) - min(scored) > 1e-8


def make_groups(
    rollouts: Sequence[Rollout], scores: Sequence[float], rewards: Sequence[float], config: GRPOConfig
) -> list[Group]:
    """Groups of neighboring rollouts, with DAPO's length penalty on their rewards.

    Raises:
        ValueError: a prompt has more or fewer responses than rollout.samples_per_prompt; names its row.
    """
    size, limit = config.rollout.samples_per_prompt, config.rollout.max_new_tokens
    buffer = int(config.grpo.overlong_buffer * limit)
    for _, group in groupby((rollout.prompt for rollout in rollouts), key=lambda prompt: prompt.index):
        first, *others = group
        if len(others) + 1 != size:
            raise ValueError(
                f"{first.where}: {len(others) + 1} responses, but rollout.samples_per_prompt={size} in every group"
            )
    rewards = list(rewards)
    if buffer:
        lengths = torch.tensor([rollout.length for rollout in rollouts])
        penalties = soft_overlong_penalty(lengths, limit, buffer, config.grpo.overlong_penalty).tolist()
        rewards = [reward + penalty for reward, penalty in zip(rewards, penalties, strict=True)]
    return [
        Group(list(rollouts[i : i + size]), list(scores[i : i + size]), rewards[i : i + size])
        for i in range(0, len(rollouts), size)
    ]


class GroupSource(RolloutSource):
    """Groups of scored responses, drawn until enough have spread (dynamic sampling) or the draws run out.

    Args:
        source: of the responses.
        rewards: scores every draw; takes the metrics of the sampling.
    """

    def __init__(self, source: OnPolicySource, rewards: Rewards, config: GRPOConfig):
        self.source, self.rewards, self.config = source, rewards, config

    def next(self, step: int) -> Rollouts:
        options, wanted = self.config.grpo, self.config.run.prompts_per_step
        kept: list[Group] = []
        aside: list[Group] = []  # without spread
        draws = 0
        while len(kept) < wanted and draws < options.max_draws:
            drawn = self.source.draw(step, wanted - len(kept)).samples
            draws += 1
            with self.source.profiler("score"):
                combined, shaped = self.rewards(drawn, from_rollouts(drawn).to(self.source.generator.mesh.device))
            for group in make_groups(drawn, combined, shaped, self.config):
                (kept if group.has_spread or not options.dynamic_sampling else aside).append(group)
        groups = kept + aside[: wanted - len(kept)]
        spread = sum(group.has_spread for group in kept + aside)
        self.rewards.metrics["groups_with_spread"] = spread / len(kept + aside)
        if options.dynamic_sampling:
            self.rewards.metrics |= {"draws": draws, "groups_filled": wanted - len(kept)}
        rewards = torch.tensor([reward for group in groups for reward in group.rewards])
        samples = [rollout for group in groups for rollout in group.rollouts]
        return Rollouts(step, samples, self.config.rollout.samples_per_prompt, rewards)
