"""Rollouts of a step, and the interface of their sources."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ...engine.generation.interface import Generator, SamplingParams
from ...engine.profiler import Profiler
from ..batch import Batch, Rollout, from_rollouts
from ..data.prompts import PromptDataset
from ..micro_batch import Passes, draw_minibatches
from .sync import sample


@dataclass(frozen=True)
class Rollouts:
    """Responses of one step, the same on every rank; those to one prompt are neighbors, `samples_per_prompt` each."""

    step: int
    samples: list[Rollout]
    samples_per_prompt: int = 1
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))  # [samples] if the source scores them, else [0]

    def batch(self, passes: Passes, seed: int) -> Batch:
        """The packed samples with their groups and the minibatches of their update, drawn by `seed` and step."""
        count = len(self.samples)
        minibatches = draw_minibatches(count, passes, seed=(seed << 32) + self.step)
        group = torch.arange(count) // self.samples_per_prompt
        return from_rollouts(self.samples).with_(group=group, minibatches=minibatches)


class RolloutSource(Protocol):
    """Source of a run's rollouts. Collective: every rank calls `next` for every step."""

    def next(self, step: int) -> Rollouts: ...


class OnPolicySource(RolloutSource):
    """Responses of the current weights to the next prompts of the data.

    Args:
        prompts: number of prompts a step.
        profiler: times the phase "rollout"; the generator adds its FLOPs and tokens.
    """

    def __init__(
        self,
        dataset: PromptDataset,
        generator: Generator,
        params: SamplingParams,
        prompts: int,
        samples_per_prompt: int,
        profiler: Profiler,
    ):
        self.dataset, self.generator, self.params, self.profiler = dataset, generator, params, profiler
        self.prompts, self.samples_per_prompt = prompts, samples_per_prompt

    def next(self, step: int) -> Rollouts:
        return self.draw(step, self.prompts)

    def draw(self, step: int, prompts: int) -> Rollouts:
        """Responses to the next `prompts` prompts."""
        with self.profiler("rollout"):
            samples = sample(self.generator, self.dataset.next(prompts), self.params, self.samples_per_prompt)
        return Rollouts(step, samples, self.samples_per_prompt)
