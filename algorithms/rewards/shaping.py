"""Reward shaping: weighted sum of scores, normalization by running moments, clip, penalty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..batch import Score


def combine(scores: Mapping[str, Sequence[Score]], weights: Sequence[float] = ()) -> list[float]:
    """Weighted sum of the applicable scores of each sample; NaN if one is NaN or none applies.

    Args:
        scores: of each scorer, in the order of the weights.
        weights: empty: 1 each.
    """
    factors = weights or [1.0] * len(scores)
    combined = []
    for column in zip(*scores.values(), strict=True):
        parts = [weight * value for weight, value in zip(factors, column, strict=True) if value is not None]
        combined.append(sum(parts) if parts else math.nan)
    return combined


class RewardShaper:
    """Scores -> rewards: normalized by running moments, clipped, minus the penalty for a missing end of sequence.

    The penalty comes last: it does not enter the moments and is not clipped. clip=0 is off.
    """

    def __init__(self, clip: float = 10.0, missing_eos_penalty: float = 0.0, normalize: bool = False):
        self.clip, self.missing_eos_penalty, self.normalize = clip, missing_eos_penalty, normalize
        self.moments = RunningMoments()

    def __call__(self, scores: Sequence[float], finished: Sequence[bool]) -> list[float]:
        """One reward for each sample.

        Args:
            scores: of the global batch; NaN (no score) stays NaN and does not enter the moments.
            finished: whether the response has an end of sequence.
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
        """The running moments, for a checkpoint."""
        return self.moments.state()

    def load_state(self, state: Mapping[str, float]) -> None:
        self.moments.load_state(state)


class RunningMoments:
    """Mean and standard deviation of all numbers so far, batch by batch (Chan, Golub and LeVeque 1979)."""

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
        """Population standard deviation; 1 if all numbers are equal up to rounding."""
        deviation = math.sqrt(self.squares / self.count) if self.count else 0.0
        return deviation if deviation > 1e-8 * max(1.0, abs(self.mean)) else 1.0

    def state(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state(self, state: Mapping[str, float]) -> None:
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]
