"""Rollouts of a step, and the interface of what yields them."""

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
    """Responses to learn from in one step, the same on every rank. Those to one prompt are neighbors, equally many."""

    step: int
    samples: list[Rollout]
    samples_per_prompt: int = 1
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))  # [samples] where the source scores them, or [0]

    def batch(self, passes: Passes, seed: int) -> Batch:
        """The packed samples with their groups and the minibatches of their update, which `seed` and step draw."""
        count = len(self.samples)
        minibatches = draw_minibatches(count, passes, seed=(seed << 32) + self.step)
        group = torch.arange(count) // self.samples_per_prompt
        return from_rollouts(self.samples).with_(group=group, minibatches=minibatches)


class RolloutSource(Protocol):
    """Source of a run's rollouts. Collective: every rank asks for every step."""

    def next(self, step: int) -> Rollouts: ...


class OnPolicySource:
    """Responses of the weights as they are, to the next prompts of the data.

    Args:
        prompts: drawn for a step.
        profiler: takes the phase "rollout"; the generator reports its work to it.
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
        """Responses to so many prompts."""
        with self.profiler("rollout"):
            samples = sample(self.generator, self.dataset.next(prompts), self.params, self.samples_per_prompt)
        return Rollouts(step, samples, self.samples_per_prompt)
