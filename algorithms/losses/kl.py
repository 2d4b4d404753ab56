"""The weight of the KL penalty: fixed, or steered to a target (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593)."""

from __future__ import annotations

import math


class KLController:
    """β of the penalty −β·KL in the reward.

    With a target above 0: e = clip(KL/target − 1, ±0.2), β ← β (1 + e·n/horizon) after a batch of n samples whose mean
    KL of a sequence was KL. With target 0 β stays.
    """

    def __init__(self, coef: float, target: float = 0.0, horizon: int = 10_000):
        self.coef = self.start = coef
        self.target, self.horizon = target, horizon

    def update(self, kl: float, samples: int) -> None:
        """Moves β by the mean KL of a sequence (nats) over a batch."""
        if self.target > 0 and math.isfinite(kl):
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * samples / self.horizon

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"coef": self.coef, "start": self.start}

    def load_state(self, state: dict[str, float]) -> None:
        """Goes on with the weight that was reached, where it adapts and was begun with the same."""
        if self.target > 0 and state.get("start", self.start) == self.start:
            self.coef = state["coef"]
