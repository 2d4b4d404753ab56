"""Rewards of rollouts: combined and shaped scores, and their metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from ..batch import Batch, Rollout, Score
from .scorer import Scorer
from .shaping import RewardShaper

if TYPE_CHECKING:
    from ..roles.role import Role


class Scored(NamedTuple):
    """One number for each response; NaN without a score."""

    combined: list[float]  # weighted sum of the scores
    shaped: list[float]  # rewards of the algorithm


class Rewards:
    """Scorers, reward shaping, and metrics of all responses since the last `take_metrics`.

    Args:
        models: reward models, in the order of the config.
        warn: prints reasons for responses without a score.
    """

    def __init__(self, scorer: Scorer, shaper: RewardShaper, models: Sequence[Role], warn: Callable[[str], None]):
        self.scorer, self.shaper, self.models, self.warn = scorer, shaper, models, warn
        self.metrics: dict[str, float] = {}
        self._reset()

    def __call__(self, rollouts: Sequence[Rollout], batch: Batch) -> Scored:
        """Rewards of responses. Collective.

        Args:
            batch: of these rollouts.

        Raises:
            ValueError: a scorer failed, on every rank; names scorer and rows.
        """
        scores = self.scorer(rollouts, batch, self.models)
        combined = self.scorer.combined(scores)
        for reason in self.scorer.failures():  # before the error if no response has a score
            self.warn(f"not scored: {reason}")
        shaped = self.shaper(combined, [rollout.finish == "stop" for rollout in rollouts])
        self._rollouts += rollouts
        self._combined += combined
        self._shaped += shaped
        for name, values in scores.items():
            self._scores.setdefault(name, []).extend(values)
        return Scored(combined, shaped)

    def take_metrics(self) -> dict[str, float]:
        """`reward_metrics` of all responses since the last call, and the entries of `metrics`."""
        metrics = self.metrics | reward_metrics(self._rollouts, self._scores, self._combined, self._shaped)
        self.metrics = {}
        self._reset()
        return metrics

    def _reset(self) -> None:
        self._rollouts: list[Rollout] = []
        self._scores: dict[str, list[Score]] = {}
        self._combined: list[float] = []
        self._shaped: list[float] = []


def reward_metrics(
    rollouts: Sequence[Rollout], scores: dict[str, list[Score]], combined: Sequence[float], rewards: Sequence[float]
) -> dict[str, float]:
    """Metrics of responses: reward before and after shaping, mean of each scorer, lengths.

    Means are over responses with a score; `unscored` counts the others. A scorer that applies to no response has no
    metric.
    """
    by_name = {f"reward/{name}": _mean(v) for name, v in zip(short_names(list(scores)), scores.values(), strict=True)}
    count = len(rollouts)
    lengths = [rollout.length for rollout in rollouts]
    missing = sum(score != score for score in combined)
    return {
        "reward": _mean(combined),
        "reward_shaped": _mean(rewards),
        **{name: mean for name, mean in by_name.items() if mean == mean},
        **({"unscored": missing} if missing else {}),
        "response_length": sum(lengths) / count,
        "response_length_max": max(lengths),
        "finished": sum(rollout.finish == "stop" for rollout in rollouts) / count,
    }


def short_names(names: Sequence[str]) -> list[str]:
    """Shortest unique ends of paths and URLs (most reward models are in a folder `model`)."""
    parts = [Path(name).parts for name in names]
    ends = [["/".join(own[-count:]) for own in parts] for count in range(1, max(map(len, parts), default=1) + 1)]
    return next((short for short in ends if len(set(short)) == len(names)), list(names))


def _mean(values: Sequence[Score]) -> float:
    known = [value for value in values if value is not None and value == value]
    return fmean(known) if known else float("nan")
