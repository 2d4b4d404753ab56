"""What answers and models are worth, in numbers with how sure they are: pure functions of rewards, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .batch import Batch
from .roles.role import Role
from .sft import target_nats

Z = 1.959963984540054  # two-sided 95 % of a normal distribution


class Estimate(NamedTuple):
    """A number with the interval that covers it 95 times out of 100."""

    value: float
    low: float
    high: float


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that at least one of k answers passes, out of `samples` answers to a prompt of which `passed` did.

    1 − C(n − c, k) / C(n, k), the unbiased estimator of https://arxiv.org/abs/2107.03374, equation 1.

    Raises:
        ValueError: fewer samples than k.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples: k must be 1 to the number of samples")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def mean_of_prompts(values: Sequence[float]) -> Estimate:
    """The mean of one number a prompt, with the interval of its standard error: answers to one prompt are not
    independent, so the prompt is the unit. A single prompt says nothing of the spread: the interval is NaN."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean, math.nan, math.nan)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return Estimate(mean, mean - Z * error, mean + Z * error)


def wilson(share: float, count: int) -> Estimate:
    """A share of `count` trials with Wilson's score interval (1927), which holds at shares of 0 and 1 too."""
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def prompt_wins(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How often an answer of ours beats one of theirs to the same prompt, over all pairs; a tie counts half."""
    wins = sum((a > b) + 0.5 * (a == b) for a in ours for b in theirs)
    return wins / (len(ours) * len(theirs))


def win_rate(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Estimate:
    """The share of prompts won, each counted by `prompt_wins`, with Wilson's interval over the prompts.

    Args:
        ours, theirs: rewards of the answers, prompt by prompt, in the same order.
    """
    shares = [prompt_wins(a, b) for a, b in zip(ours, theirs, strict=True)]
    return wilson(math.fsum(shares) / len(shares), len(shares))


def nats_a_token(role: Role, batches: Iterable[Batch]) -> tuple[float, int]:
    """−log π, a mean over all targets of the batches, and how many they are; perplexity is exp of the first.

    Collective; the same on every rank and in every layout within rounding.

    Raises:
        ValueError: one is not finite; names the row.
    """
    nats, targets = 0.0, 0
    for batch in batches:
        batch = batch.to(role.mesh.device)
        nats += target_nats(role, batch).sum().item()
        targets += len(batch.response)
    return nats / targets, targets


def perplexity(nats: float) -> float:
    """Of a mean of −log π; of a model that is as far off as no float says, the largest."""
    return math.exp(min(nats, 709.0))
