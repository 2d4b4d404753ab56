"""Advantages out of rewards: the KL penalty, GAE, whitening, group baselines, REINFORCE++'s returns.

Pure functions over a packed batch (losses/aggregation.py: `Segments`). Where trainers in wide use differ, the
difference is an argument, and each trainer's choice is in launch/configs/presets.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..kernels.gae import gae as gae_carrying
from .losses.aggregation import Segments

Gaps = Literal["carry", "zero"]
Whitening = Literal["population", "unbiased", "unbiased_eps"]
Baseline = Literal["mean", "leave-one-out", "none"]
Scale = Literal["none", "unbiased", "population", "leave-one-out", "batch"]
WHITEN_EPS = 1e-8


def token_rewards(scores: Tensor, kl: Tensor, segments: Segments, kl_coef: float, *, clip: float = 0.0) -> Tensor:
    """r_t = -kl_coef kl_t + 1[t is the sample's last counted token] clip(score, -c, c): [total].

    Args:
        scores: [samples]; a sample without counted tokens gets none.
        kl: [total].
        clip: c; 0 for none.
    """
    rewards = -kl_coef * torch.where(segments.mask, kl, 0)
    last = segments.last()
    there = last >= 0
    given = scores.clamp(-clip, clip) if clip else scores
    return rewards.index_add(0, last[there], given[there].to(rewards.dtype))


def whiten(x: Tensor, segments: Segments, how: Whitening = "population") -> Tensor:
    """x [total] with mean 0 and deviation 1 over the counted tokens, 0 elsewhere; statistics in float64.

    One counted token, or equal ones, become 0.

    Args:
        how: population: by the population variance, 1e-8 at least; unbiased: with Bessel's correction, + 1e-8;
            unbiased_eps: the same with 1e-8 added to the number of tokens in every mean.
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
    """GAE (https://arxiv.org/abs/1506.02438) -> advantages and returns [total], 0 on tokens that do not count.

    Args:
        gaps: what a token sees across tokens that do not count (a tool's words in a dialogue): "carry", the next
            counted token as if it came right after; "zero", a state with reward and value 0.
    """
    mask = segments.mask
    if gaps == "carry":
        return gae_carrying(rewards, values, mask, cu_seqlens, gamma, lam)
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    advantages, returns = gae_carrying(rewards, values, torch.ones_like(mask), cu_seqlens, gamma, lam)
    return torch.where(mask, advantages, 0), torch.where(mask, returns, 0)


def discounted_returns(
    rewards: Tensor, segments: Segments, cu_seqlens: Tensor, gamma: float, gaps: Gaps = "zero"
) -> Tensor:
    """G_t = r_t + gamma G_t', [total]: GAE without values and with lambda 1."""
    return gae(rewards, torch.zeros_like(rewards), segments, cu_seqlens, gamma, 1.0, gaps)[1]


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    baseline: Baseline = "mean",
    scale: Scale = "unbiased",
    eps: float = 1e-6,
    single: Literal["zero", "reward"] = "zero",
) -> Tensor:
    """One advantage a sample, against its group: GRPO (https://arxiv.org/abs/2402.03300), Dr. GRPO, RLOO and kin.

    Args:
        rewards: [samples]; NaN marks a response that could not be scored: it counts nowhere and gets advantage 0.
        group: [samples] int64: responses to one prompt share a number.
        baseline: the mean of the group or of the other responses (RLOO, https://arxiv.org/abs/2402.14740).
        scale: the deviation advantages are divided by: the group's, that of the other responses, that of all rewards.
        eps: added to the deviation; where that is 0, for the rewards are equal, nothing is divided.
        single: the advantage of the only response to a prompt; without a baseline always its reward.
    """
    scored = ~rewards.isnan()
    wide = torch.where(scored, rewards, 0).double()
    members, there = _members(group)  # [samples, largest group] each
    there = there & scored[members]
    others = there & (members != torch.arange(len(group), device=group.device)[:, None])
    mean, deviation, count = _moments(wide[members], there, 0 if scale == "population" else 1)
    mean_others, deviation_others, _ = _moments(wide[members], others)
    if scale == "leave-one-out":
        deviation = deviation_others
    elif scale == "batch":
        deviation = _moments(wide[None], scored[None])[1].expand_as(wide)
    advantages = wide - {"mean": mean, "leave-one-out": mean_others, "none": torch.zeros_like(mean)}[baseline]
    if scale != "none":
        advantages = torch.where(deviation > 0, advantages / (deviation + eps), advantages)
    alone = wide if single == "reward" or baseline == "none" else torch.zeros_like(wide)
    advantages = torch.where(count == 1, alone, advantages)
    return torch.where(scored, advantages, 0).to(rewards.dtype)


def _members(group: Tensor) -> tuple[Tensor, Tensor]:
    """Whose group each sample is in: sample numbers, and which of them are there; [samples, largest group] both."""
    sizes = torch.bincount(group)  # [groups]
    begin, size = (sizes.cumsum(0) - sizes)[group, None], sizes[group, None]  # [samples, 1]
    step = torch.arange(int(sizes.max()) if len(group) else 1, device=group.device)
    there = step < size
    return group.argsort(stable=True)[torch.where(there, begin + step, begin)], there


def _moments(x: Tensor, there: Tensor, correction: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, deviation and count of the numbers that are there in each row of x [rows, numbers]: [rows] each.

    The deviation of equal numbers, and of one alone, is 0 to the last bit, whatever the rounding of their mean; hence
    each row's sums are its own: a group's sums less one number would have lost the digits that tell.
    """
    count = there.sum(1)
    mean = torch.where(there, x, 0).sum(1) / count.clamp(min=1)
    squares = torch.where(there, x - mean[:, None], 0).square().sum(1)
    deviation = (squares / (count - correction).clamp(min=1)).sqrt()
    least, most = x.masked_fill(~there, torch.inf).amin(1), x.masked_fill(~there, -torch.inf).amax(1)
    return mean, deviation.masked_fill(most <= least, 0), count


def soft_overlong_penalty(lengths: Tensor, limit: int, buffer: int, factor: float = 1.0) -> Tensor:
    """DAPO's length penalty (https://arxiv.org/abs/2503.14476, eq. 13): [samples], 0 up to limit - buffer tokens, then
    falling to -factor at the limit."""
    over = (lengths - (limit - buffer)).clamp(min=0).to(torch.get_default_dtype())
    return -over / buffer * factor
