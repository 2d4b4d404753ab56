"""Rewards and advantages of tokens: KL penalty, GAE, whitening, group baselines, returns.

Pure functions over a packed batch (losses/aggregation.py: `Segments`). Arguments cover the differences between
trainers; launch/configs/presets has the choice of each.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..kernels.gae import gae as gae_over_mask
from .losses.aggregation import Segments

Gaps = Literal["carry", "zero"]
Whitening = Literal["population", "unbiased", "unbiased_eps"]
Baseline = Literal["mean", "leave-one-out", "none"]
Scale = Literal["none", "unbiased", "population", "leave-one-out", "batch"]
WHITEN_EPS = 1e-8


def token_rewards(scores: Tensor, kl: Tensor, segments: Segments, kl_coef: float, *, clip: float = 0.0) -> Tensor:
    """Token rewards with the KL penalty, [total]: r_t = -kl_coef kl_t + 1[t is the last counted token] clip(score, ±c).

    Args:
        scores: [samples]; unused for a sample without counted tokens.
        kl: [total].
        clip: c; 0 for none.
    """
    rewards = -kl_coef * torch.where(segments.mask, kl, 0)
    scores = scores.clamp(-clip, clip) if clip else scores
    place = torch.arange(len(rewards), device=rewards.device)
    ends = place == segments.broadcast(segments.last())  # [total]: True at each sample's last counted token
    return torch.where(ends, rewards + segments.broadcast(scores.to(rewards.dtype)), rewards)


def whiten(x: Tensor, segments: Segments, how: Whitening = "population") -> Tensor:
    """x [total] scaled to mean 0 and deviation 1 over the counted tokens, 0 elsewhere; statistics in float64.

    A single counted token, or equal ones, become 0.

    Args:
        how: population: by the population variance, at least 1e-8; unbiased: with Bessel's correction, plus 1e-8;
            unbiased_eps: as unbiased, with 1e-8 added to the number of tokens in every mean.
    """
    wide, mask = x.double(), segments.mask
    count = mask.sum().double()
    divisor = (count + (WHITEN_EPS if how == "unbiased_eps" else 0)).clamp(min=1)
    mean = torch.where(mask, wide, 0).sum() / divisor
    variance = torch.where(mask, (wide - mean).square(), 0).sum() / divisor
    if how == "population":
        variance = variance.clamp(min=WHITEN_EPS)
    else:
        variance = variance * count / (count - 1).clamp(min=1) + WHITEN_EPS
    return torch.where(mask & (count > 1), (wide - mean) * variance.rsqrt(), 0).to(x.dtype)


def gae(
    rewards: Tensor,
    values: Tensor,
    segments: Segments,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
    gaps: Gaps = "carry",
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) by GAE (https://arxiv.org/abs/1506.02438), [total] each, 0 on tokens that do not count.

    Args:
        gaps: tokens between two turns of a sample that do not count (of a tool, say): "carry" skips them, so that the
            next counted token follows; "zero" takes them as states with reward and value 0.
    """
    mask = segments.mask
    if gaps == "carry":
        return gae_over_mask(rewards, values, mask, cu_seqlens, gamma, lam)
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    advantages, returns = gae_over_mask(rewards, values, torch.ones_like(mask), cu_seqlens, gamma, lam)
    return torch.where(mask, advantages, 0), torch.where(mask, returns, 0)


def discounted_returns(
    rewards: Tensor, segments: Segments, cu_seqlens: Tensor, gamma: float, gaps: Gaps = "zero"
) -> Tensor:
    """G_t = r_t + gamma G_{t+1}, [total]: the returns of GAE with values 0 and lambda 1."""
    return gae(rewards, torch.zeros_like(rewards), segments, cu_seqlens, gamma, 1.0, gaps)[1]


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    baseline: Baseline = "mean",
    scale: Scale = "unbiased",
    eps: float = 1e-6,
    single: Literal["zero", "reward"] = "zero",
) -> Tensor:
    """Advantage of each sample in its group, [samples]: GRPO (https://arxiv.org/abs/2402.03300), Dr. GRPO, RLOO.

    Args:
        rewards: [samples]; NaN marks an unscored response, which counts in no statistic and gets advantage 0.
        group: [samples] int64; responses to one prompt share a number.
        baseline: mean of the group, or of the other responses (RLOO, https://arxiv.org/abs/2402.14740).
        scale: the deviation to divide by: of the group, of the other responses, of all rewards.
        eps: added to the deviation; equal rewards (deviation 0) are not divided.
        single: advantage of the only response to a prompt; without a baseline always its reward.
    """
    scored = ~rewards.isnan()
    wide = torch.where(scored, rewards, 0).double()
    members, present = _members(group)  # [samples, largest group] each
    present = present & scored[members]
    others = present & (members != torch.arange(len(group), device=group.device)[:, None])
    mean, deviation, count = _moments(wide[members], present, 0 if scale == "population" else 1)
    mean_others, deviation_others, _ = _moments(wide[members], others)
    if scale == "leave-one-out":
        deviation = deviation_others
    elif scale == "batch":
        deviation = _moments(wide[None], scored[None])[1].expand_as(wide)
    advantages = wide - {"mean": mean, "leave-one-out": mean_others, "none": torch.zeros_like(mean)}[baseline]
    if scale != "none":
        advantages = torch.where(deviation > 0, advantages / (deviation + eps), advantages)
    lone = wide if single == "reward" or baseline == "none" else torch.zeros_like(wide)
    advantages = torch.where(count == 1, lone, advantages)
    return torch.where(scored, advantages, 0).to(rewards.dtype)


def _members(group: Tensor) -> tuple[Tensor, Tensor]:
    """(members, present): sample numbers of each sample's group, padded; [samples, largest group] each."""
    ordered, order = group.sort(stable=True)
    begin, end = (torch.searchsorted(ordered, group, right=right)[:, None] for right in (False, True))  # [samples, 1]
    step = torch.arange(int((end - begin).max()) if len(group) else 1, device=group.device)
    present = begin + step < end
    return order[torch.where(present, begin + step, begin)], present


def _moments(x: Tensor, present: Tensor, correction: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, deviation and count of the present numbers in each row of x [rows, numbers]: [rows] each.

    The deviation of equal numbers, and of a single one, is exactly 0 however their mean is rounded. Each row is summed
    on its own: subtracting one number from a group's sums would lose the digits that matter.
    """
    count = present.sum(1)
    mean = torch.where(present, x, 0).sum(1) / count.clamp(min=1)
    squares = torch.where(present, x - mean[:, None], 0).square().sum(1)
    deviation = (squares / (count - correction).clamp(min=1)).sqrt()
    least, most = x.masked_fill(~present, torch.inf).amin(1), x.masked_fill(~present, -torch.inf).amax(1)
    return mean, deviation.masked_fill(most <= least, 0), count


def soft_overlong_penalty(lengths: Tensor, limit: int, buffer: int, factor: float = 1.0) -> Tensor:
    """DAPO's length penalty (https://arxiv.org/abs/2503.14476, eq. 13), [samples]: 0 up to limit - buffer tokens, then
    linear to -factor at the limit."""
    over = (lengths - (limit - buffer)).clamp(min=0).to(torch.get_default_dtype())
    return -over / buffer * factor
