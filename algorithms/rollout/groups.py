"""Groups of answers to one prompt, drawn until enough of them have something to learn from (DAPO's dynamic sampling).

A group whose rewards are all equal has no advantages. Such groups are set aside; when no more prompts may be drawn they
fill up the batch, so that its size never changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from ..advantages import soft_overlong_penalty
from ..batch import Rollout, from_rollouts
from ..config.grpo import GRPOConfig
from ..rewards.rewards import Rewards
from .source import OnPolicySource, Rollouts


@dataclass(frozen=True)
class Group:
    """The answers to one prompt and what they earned; NaN where there is no score."""

    rollouts: list[Rollout]
    scores: list[float]  # of all scorers together
    rewards: list[float]  # what is learned from

    @property
    def has_spread(self) -> bool:
        """Whether any two scores differ."""
        known = [score for score in self.scores if score == score]
        return bool(known) and max(known) - min(known) > 1e-8


@dataclass
class GroupPool:
    """The groups of one step while they are drawn.

    Args:
        wanted: groups of the batch.
        dynamic: whether groups without spread are set aside.
        max_draws: times prompts may be drawn.
    """

    wanted: int
    dynamic: bool
    max_draws: int
    kept: list[Group] = field(default_factory=list)
    aside: list[Group] = field(default_factory=list)
    draws: int = 0

    @property
    def missing(self) -> int:
        """Prompts to draw next; 0 when the pool is done."""
        return 0 if self.draws == self.max_draws else self.wanted - len(self.kept)

    def add(self, groups: Sequence[Group]) -> None:
        """The groups of a draw."""
        self.draws += 1
        for group in groups:
            (self.kept if group.has_spread or not self.dynamic else self.aside).append(group)

    def take(self) -> tuple[list[Group], dict[str, float]]:
        """The groups of the batch, and how they came about: share with spread, draws, groups that only fill up."""
        drawn = self.kept + self.aside
        short = self.wanted - len(self.kept)
        metrics = {"groups_with_spread": sum(group.has_spread for group in drawn) / len(drawn)}
        if self.dynamic:
            metrics |= {"draws": self.draws, "groups_filled": short}
        return self.kept + self.aside[:short], metrics


def make_groups(
    rollouts: Sequence[Rollout], scores: Sequence[float], rewards: Sequence[float], config: GRPOConfig
) -> list[Group]:
    """Groups of neighbors; their rewards less the penalty of answers that come near the longest there may be.

    Raises:
        ValueError: a prompt has more or fewer answers than the others; names its row.
    """
    size, limit = config.rollout.samples_per_prompt, config.rollout.max_new_tokens
    buffer = int(config.grpo.overlong_buffer * limit)
    for _, group in groupby((rollout.prompt for rollout in rollouts), key=lambda prompt: prompt.index):
        first, *others = group
        if len(others) + 1 != size:
            where = first.source or f"prompt {first.index}"
            raise ValueError(
                f"{where}: {len(others) + 1} answers, but rollout.samples_per_prompt={size} in every group"
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


class GroupSource:
    """Groups of scored responses, drawn until enough of them have spread (DAPO's dynamic sampling) or draws run out.

    Args:
        source: of the responses.
        rewards: scores every draw; its metrics get those of the pool.
    """

    def __init__(self, source: OnPolicySource, rewards: Rewards, config: GRPOConfig):
        self.source, self.rewards, self.config = source, rewards, config

    def next(self, step: int) -> Rollouts:
        config = self.config
        pool = GroupPool(config.run.prompts_per_step, config.grpo.dynamic_sampling, config.grpo.max_draws)
        while pool.missing:
            drawn = self.source.draw(step, pool.missing).samples
            with self.source.profiler("score"):
                combined, shaped = self.rewards(drawn, from_rollouts(drawn).to(self.source.generator.mesh.device))
            pool.add(make_groups(drawn, combined, shaped, config))
        groups, metrics = pool.take()
        self.rewards.metrics |= metrics
        rewards = torch.tensor([reward for group in groups for reward in group.rewards])
        samples = [rollout for group in groups for rollout in group.rollouts]
        return Rollouts(step, samples, config.rollout.samples_per_prompt, rewards)
