"""Scores to rewards: the weighted sum of all scorers, normalized by running statistics, clipped, penalized."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..batch import Score


def combine(scores: Mapping[str, Sequence[Score]], weights: Sequence[float] = ()) -> list[float]:
    """The weighted sum of the rewards that apply, sample by sample; NaN where one of them is, or none applies.

    Args:
        scores: by name (a function's spec, a model's folder), in the order of the weights; one each sample.
        weights: none: 1 each.
    """
    factors = weights or [1.0] * len(scores)
    combined = []
    for column in zip(*scores.values(), strict=True):
        parts = [weight * value for weight, value in zip(factors, column, strict=True) if value is not None]
        combined.append(sum(parts) if parts else math.nan)
    return combined


class RewardShaper:
    """Combined scores -> rewards: normalized by all scores so far, clipped, less the penalty for no end of sequence.

    In this order, so that the penalty is in units of the final reward and neither moves the statistics nor is clipped.

    Args:
        clip: limit of a score's size; 0 for none.
    """

    def __init__(self, clip: float = 10.0, missing_eos_penalty: float = 0.0, normalize: bool = False):
        self.clip, self.missing_eos_penalty, self.normalize = clip, missing_eos_penalty, normalize
        self.moments = RunningMoments()

    def __call__(self, scores: Sequence[float], finished: Sequence[bool]) -> list[float]:
        """One reward for each sample.

        Args:
            scores: of the whole global batch; NaN, which a sample without a score has, stays and moves nothing.
            finished: the answer ended by itself (end of sequence), rather than at max_new_tokens.
        """
        rewards = list(scores)
        if self.normalize:
            self.moments.update([reward for reward in rewards if not math.isnan(reward)])
            rewards = [(reward - self.moments.mean) / self.moments.deviation for reward in rewards]
        if self.clip:
            rewards = [r if math.isnan(r) else max(-self.clip, min(self.clip, r)) for r in rewards]
        penalty = self.missing_eos_penalty
        return [reward - (0.0 if end else penalty) for reward, end in zip(rewards, finished, strict=True)]

    def state(self) -> dict[str, float]:
        """The running statistics, for a checkpoint."""
        return self.moments.state()

    def load_state(self, state: Mapping[str, float]) -> None:
        self.moments.load_state(state)


class RunningMoments:
    """Mean and deviation of all numbers seen so far, batch by batch (Chan, Golub and LeVeque 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, values: Sequence[float]) -> None:
        count = len(values)
        if not count:
            return
        mean = math.fsum(values) / count
        squares = math.fsum((value - mean) ** 2 for value in values)
        total = self.count + count
        apart = mean - self.mean
        self.squares += squares + apart**2 * self.count * count / total
        self.mean += apart * count / total
        self.count = total

    @property
    def deviation(self) -> float:
        """Of the population; 1 while all numbers are equal but for rounding, which leaves them at 0."""
        deviation = math.sqrt(self.squares / self.count) if self.count else 0.0
        return deviation if deviation > 1e-8 * max(1.0, abs(self.mean)) else 1.0

    def state(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state(self, state: Mapping[str, float]) -> None:
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]
