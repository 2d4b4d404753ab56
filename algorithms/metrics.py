"""Evaluation metrics with 95% confidence intervals: pass@k, mean reward, win rate; and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .batch import Batch
from .roles.role import Role
from .sft import target_nats

Z = 1.959963984540054  # two-sided 95 % of a normal distribution


class Estimate(NamedTuple):
    """A number with its 95% confidence interval."""

    value: float
    low: float
    high: float


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that at least one of k responses passes, given `passed` of `samples` responses to a prompt.

    1 − C(n − c, k) / C(n, k), the unbiased estimator of https://arxiv.org/abs/2107.03374, equation 1.

    Raises:
        ValueError: fewer samples than k.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples: k must be 1 to the number of samples")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def mean_of_prompts(values: Sequence[float]) -> Estimate:
    """Mean of one number a prompt, with the interval of its standard error; NaN bounds for a single prompt.

    Responses to one prompt are not independent, so the prompt is the unit.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean, math.nan, math.nan)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return Estimate(mean, mean - Z * error, mean + Z * error)


def wilson(rate: float, count: int) -> Estimate:
    """A rate over `count` trials with Wilson's score interval (1927), which is valid at rates of 0 and 1 too."""
    middle = (rate + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    return Estimate(rate, max(0.0, middle - half), min(1.0, middle + half))


def prompt_wins(rewards: Sequence[float], baseline: Sequence[float]) -> float:
    """Fraction of all pairs of responses to one prompt in which the reward is above the baseline's; a tie is half."""
    wins = sum((a > b) + 0.5 * (a == b) for a in rewards for b in baseline)
    return wins / (len(rewards) * len(baseline))


def win_rate(rewards: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> Estimate:
    """Mean of `prompt_wins` over the prompts, with Wilson's interval.

    Args:
        rewards, baseline: rewards of the responses, prompt by prompt, in the same order.
    """
    wins = [prompt_wins(a, b) for a, b in zip(rewards, baseline, strict=True)]
    return wilson(math.fsum(wins) / len(wins), len(wins))


def nats_a_token(role: Role, batches: Iterable[Batch]) -> float:
    """Mean −log π over all targets of the batches.

    Collective; the same on every rank and, within rounding, in every layout.

    Raises:
        ValueError: one is not finite; names the row.
    """
    nats, targets = 0.0, 0
    for batch in batches:
        batch = batch.to(role.mesh.device)
        nats += target_nats(role, batch).sum().item()
        targets += len(batch.response)
    return nats / targets


def perplexity(nats: float) -> float:
    """exp of a mean −log π, at most the largest float."""
    return math.exp(min(nats, 709.0))
