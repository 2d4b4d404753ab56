"""Policy-gradient losses per token: PPO's clip at token or sequence level, CISPO, importance weights.

Neither masks nor means: losses are aggregated by aggregation.token_weights.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ...kernels.ppo_loss import clipped_policy_loss
from .aggregation import Segments

Level = Literal["token", "sequence", "sequence-sum"]
Correction = Literal["off", "tis", "icepop", "sequence-tis", "sequence-icepop", "sequence-mask", "geometric-mask"]
CORRECTIONS: dict[Correction, dict[str, Any]] = {
    "tis": {"level": "token"},
    "icepop": {"level": "token", "outside": "zero"},
    "sequence-tis": {"level": "sequence"},
    "sequence-icepop": {"level": "sequence", "outside": "zero"},
    "sequence-mask": {"level": "sequence-mask"},
    "geometric-mask": {"level": "geometric-mask"},
}
"""Arguments of `importance_weights` for each correction."""


def log_ratio(logp: Tensor, old_logp: Tensor, limit: float = 0.0) -> Tensor:
    """log pi - log pi_old per token, clamped to +-limit (no gradient beyond it); 0 for no limit."""
    d = logp - old_logp.detach()
    return d.clamp(-limit, limit) if limit else d


def sequence_log_ratio(
    d: Tensor,
    segments: Segments,
    gradient: Literal["shared", "own"] = "shared",
    length: Literal["mean", "sum"] = "mean",
    limit: float = 0.0,
) -> Tensor:
    """GSPO's log-ratio (https://arxiv.org/abs/2507.18071, eq. 7): each sample's mean on all its tokens, [total].

    Args:
        gradient: "shared" flows through the mean; "own" gives each token that of its own log-ratio (GSPO-token, eq.
            14), which is the same while a sample has one advantage.
        length: "sum" is the log-ratio of whole sequences (RLOO).
        limit: upper limit (no gradient beyond it); 0 for none.
    """
    ratio = segments.broadcast(segments.means(d) if length == "mean" else segments.sums(d))
    if gradient == "own":
        ratio = d - d.detach() + ratio.detach()
    return ratio.clamp(max=limit) if limit else ratio


def ppo_loss(
    d: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ratio, clipped) per token of PPO's clipped surrogate (https://arxiv.org/abs/1707.06347), asymmetric as in
    DAPO, with dual clip (https://arxiv.org/abs/1912.09729) above 0. d [total] is the log-ratio."""
    return clipped_policy_loss(d, torch.zeros_like(d), advantages, clip_low, clip_high, dual_clip or None)


def cispo_loss(
    logp: Tensor, d: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ratio, clipped) per token: -sg(clip(ratio, 1 - low, 1 + high)) A log pi (https://arxiv.org/abs/2506.13585,
    eq. 4): no token is dropped. d [total] is the log-ratio."""
    low, high, ratio = 1 - clip_low, 1 + clip_high, d.detach().exp()
    outside = (ratio < low) | (ratio > high)
    return -ratio.clamp(low, high) * advantages * logp, ratio, outside.to(d.dtype)


def importance_weights(
    trained: Tensor,
    sampled: Tensor,
    segments: Segments,
    *,
    low: float = 0.0,
    high: float = float("inf"),
    outside: Literal["clamp", "zero"] = "clamp",
    level: Literal["token", "sequence", "geometric", "sequence-mask", "geometric-mask"] = "token",
    limit: float = 0.0,
) -> Tensor:
    """Importance weights [total] of a sampler that differs slightly from the trained policy; no gradient.

    exp(trained - sampled), clamped to [low, high] (truncated importance sampling) or 0 outside of it (IcePop,
    https://arxiv.org/abs/2510.18855).

    Args:
        trained, sampled: [total] log-probabilities.
        level: the ratio of each token, of the whole sequence, or the sequence's geometric mean; "-mask": the sequence's
            ratio decides whether its tokens count, which keep their own ratios.
        limit: largest |log-ratio| before the exponential; 0 for none.
    """
    d = (trained - sampled).detach()
    level_d = d
    if level.startswith("sequence"):
        level_d = segments.broadcast(segments.sums(d))
    elif level.startswith("geometric"):
        level_d = segments.broadcast(segments.means(d))
    if limit:
        d, level_d = d.clamp(-limit, limit), level_d.clamp(-limit, limit)
    ratio = level_d.exp()
    inside = (ratio >= low) & (ratio <= high)
    if level.endswith("-mask"):
        return torch.where(inside, d.exp(), 0)
    return ratio.clamp(low, high) if outside == "clamp" else torch.where(inside, ratio, 0)
