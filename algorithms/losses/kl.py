"""KL to the reference: per-token estimators (http://joschu.net/blog/kl-approx.html) and the penalty's coefficient."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ...kernels.ppo_loss import kl_estimate as estimator

KLKind = Literal["k1", "k2", "k3", "abs", "k1+", "k3+"]


def kl_estimate(
    logp: Tensor,
    logp_ref: Tensor,
    kind: KLKind,
    input_limit: float = 0.0,
    output_limit: float = 0.0,
    ratio: Tensor | None = None,
) -> Tensor:
    """k1 = d, k2 = d^2/2, k3 = e^-d - 1 + d, abs = |d| per token with d = logp - logp_ref, in the shape of `logp`.

    "k1+" and "k3+" have the gradient of k2, which is that of the KL itself (https://arxiv.org/abs/2505.17508).

    Args:
        input_limit, output_limit: largest |d| and largest |estimate|; 0 for none.
        ratio: pi / pi_old, the factor that makes the gradient of the estimate that of the KL; None for 1.
    """
    if kind == "k1+" or kind == "k3+":
        value = kl_estimate(logp, logp_ref, "k1" if kind == "k1+" else "k3", input_limit, output_limit, ratio)
        surrogate = kl_estimate(logp, logp_ref, "k2", ratio=ratio)
        return value.detach() + surrogate - surrogate.detach()
    d = logp - logp_ref
    if input_limit:
        d = d.clamp(-input_limit, input_limit)
    estimate = d.abs() if kind == "abs" else estimator(d, torch.zeros_like(d), kind)
    if ratio is not None:
        estimate = ratio * estimate
    return estimate.clamp(-output_limit, output_limit) if output_limit else estimate


class KLController:
    """β of the KL penalty −β·kl_t: fixed, or adapted to a target (https://arxiv.org/abs/1909.08593, section 2.2).

    With a target above 0, after a batch of n samples: e = clip(KL/target − 1, ±0.2), β ← β (1 + e·n/horizon), where KL
    is the mean over sequences. With target 0 β is fixed.
    """

    def __init__(self, coef: float, target: float = 0.0, horizon: int = 10_000):
        self.coef = self.start = coef
        self.target, self.horizon = target, horizon

    def update(self, kl: float, samples: int) -> None:
        """Adapts β to the mean KL of a batch, in nats a sequence."""
        if self.target > 0 and math.isfinite(kl):
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * samples / self.horizon

    def state(self) -> dict[str, float]:
        """Current and initial β, for a checkpoint."""
        return {"coef": self.coef, "start": self.start}

    def load_state(self, state: dict[str, float]) -> None:
        """Restores β from a checkpoint if it is adaptive and its initial value is unchanged."""
        if self.target > 0 and state.get("start", self.start) == self.start:
            self.coef = state["coef"]
