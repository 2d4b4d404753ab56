"""What is learned from several answers to a prompt: the best, the best against the worst, or all with their reward."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from ..config.conditional import CONDITION


class Scored(NamedTuple):
    """An answer with its reward."""

    prompt: str
    answer: str
    reward: float


class Pair(NamedTuple):
    """The best and the worst answer to one prompt."""

    chosen: Scored
    rejected: Scored


def _by_prompt(answers: Sequence[Scored]) -> dict[str, list[Scored]]:
    groups: dict[str, list[Scored]] = {}
    for answer in answers:
        groups.setdefault(answer.prompt, []).append(answer)
    return groups


def best_of_n(answers: Sequence[Scored]) -> list[Scored]:
    """The answer of the highest reward to each prompt, the first among equals; prompts in the order they came in.

    Rejection sampling as in https://arxiv.org/abs/2307.09288, section 3.2.3.
    """
    return [max(group, key=lambda answer: answer.reward) for group in _by_prompt(answers).values()]


def best_against_worst(answers: Sequence[Scored], count: int = 1) -> list[Pair]:
    """Each prompt's best answer against its worst, for iterative DPO; answers that score the same say nothing and are
    left out.

    Args:
        count: pairs of a prompt with twice as many answers: the second best against the second worst, and so on.
    """
    pairs = []
    for group in _by_prompt(answers).values():
        best, worst = sorted(group, key=lambda a: -a.reward), sorted(group, key=lambda a: a.reward)
        matches = map(Pair, best[:count], worst[:count])
        pairs += [pair for pair in matches if pair.chosen.reward > pair.rejected.reward]
    return pairs


def conditioned(answers: Sequence[Scored], normalize: bool = False, template: str = CONDITION) -> list[Scored]:
    """The same answers with their reward written into the prompt: conditional SFT (https://arxiv.org/abs/2308.12050).

    Args:
        normalize: rewards less their mean, over their deviation (unbiased).
        template: with {input} and {reward}, which is written with two decimals.

    Raises:
        ValueError: a template without {input} or {reward}; rewards that do not differ, so that they cannot be scaled.
    """
    for field in ("{input}", "{reward}"):
        if field not in template:
            raise ValueError(f"template={template!r}: {field} must stand in it")
    rewards = [answer.reward for answer in answers]
    if normalize:
        deviation = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
        if deviation == 0:
            raise ValueError(f"{len(rewards)} rewards are all {rewards[:1]}: they have no deviation to divide by")
        mean = statistics.fmean(rewards)
        rewards = [(reward - mean) / deviation for reward in rewards]
    return [
        Scored(template.replace("{input}", answer.prompt).replace("{reward}", f"{reward:.2f}"), answer.answer, reward)
        for answer, reward in zip(answers, rewards, strict=True)
    ]
