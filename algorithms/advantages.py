"""Advantages out of rewards: KL penalties, whitening, GAE under every convention, group baselines, REINFORCE++.

Pure functions over a packed batch (segments.py). Where trainers in wide use differ, the difference is an argument;
convention.py names each trainer's choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kernels.gae import gae as gae_carrying
from ..kernels.ppo_loss import kl_estimate as kl_unlimited
from .losses.aggregation import Segments

Gaps = Literal["carry", "zero"]
KLKind = Literal["k1", "k2", "k3", "abs", "k1+", "k3+"]


@dataclass(frozen=True)
class KLRule:
    """Limits some trainers put on the KL estimators (http://joschu.net/blog/kl-approx.html)."""

    clamped: tuple[KLKind, ...] = ()
    """estimators that the limits apply to"""
    input_limit: float = 0.0
    """of |log-ratio| before the estimator; 0 for none"""
    output_limit: float = 0.0
    """of |estimate|; 0 for none"""
    weighted: bool = False
    """as a loss, times the probability ratio to the sampling policy, which makes its gradient that of the KL"""


def kl_estimate(
    logp: Tensor, logp_ref: Tensor, kind: KLKind, rule: KLRule = KLRule(), old_logp: Tensor | None = None
) -> Tensor:
    """k1 = d, k2 = d^2/2, k3 = e^-d - 1 + d, abs = |d| with d = logp - logp_ref, limited as `rule` says. Same shape.

    "k1+" and "k3+" have the gradient of k2, which is that of the KL itself (https://arxiv.org/abs/2505.17508).

    Args:
        old_logp: of the policy that sampled, for `rule.weighted`; None where it is the same policy.
    """
    if kind == "k1+" or kind == "k3+":
        told = kl_estimate(logp, logp_ref, "k1" if kind == "k1+" else "k3", rule)
        led = kl_estimate(logp, logp_ref, "k2", rule)
        return told.detach() + led - led.detach()
    d = logp - logp_ref
    limited = kind in rule.clamped
    if limited and rule.input_limit:
        d = d.clamp(-rule.input_limit, rule.input_limit)
    estimate = d.abs() if kind == "abs" else kl_unlimited(d, torch.zeros_like(d), kind)
    if rule.weighted:
        estimate = (logp - (logp if old_logp is None else old_logp).detach()).exp() * estimate
    return estimate.clamp(-rule.output_limit, rule.output_limit) if limited and rule.output_limit else estimate


def token_rewards(
    scores: Tensor,
    kl: Tensor,
    segments: Segments,
    kl_coef: float,
    *,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """r_t = -kl_coef kl_t + 1[t is the sample's last counted token] clip(score): [total].

    Args:
        scores: [samples]; a sample without counted tokens gets none.
        kl: [total].
    """
    rewards = -kl_coef * torch.where(segments.mask, kl, 0)
    last = segments.last()
    there = last >= 0
    given = scores if clip is None else scores.clamp(*clip)
    return rewards.index_add(0, last[there], given[there].to(rewards.dtype))


@dataclass(frozen=True)
class WhitenRule:
    """How (x - mean) / deviation is made."""

    unbiased: bool = False
    """Bessel's correction of the variance"""
    eps: float = 1e-8
    floor: Literal["clamp", "add"] = "clamp"
    """eps is the least variance, or added to it"""
    count_eps: float = 0.0
    """added to the number of tokens in every mean"""
    scale: bool = True
    """false only takes the mean off"""


def whiten(x: Tensor, segments: Segments, rule: WhitenRule = WhitenRule(), *, shift_mean: bool = True) -> Tensor:
    """x [total] with mean 0 and deviation 1 over the counted tokens, 0 elsewhere; statistics in float64.

    One counted token, or equal ones, become 0 (unbiased variances of a single token count as 0).
    """
    wide, mask = x.double(), segments.mask
    count = mask.sum().double()
    mean = torch.where(mask, wide, 0).sum() / (count + rule.count_eps).clamp(min=1)
    variance = torch.where(mask, (wide - mean).square(), 0).sum() / (count + rule.count_eps).clamp(min=1)
    if rule.unbiased:
        variance = variance * count / (count - 1).clamp(min=1)
    variance = variance.clamp(min=rule.eps) if rule.floor == "clamp" else variance + rule.eps
    white = (wide - mean) * (variance.rsqrt() if rule.scale else 1) + (0 if shift_mean else mean)
    return torch.where(mask & (count > 1), white, 0 if shift_mean else x).to(x.dtype) * mask


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


@dataclass(frozen=True)
class GroupRule:
    """What a reward is measured against: the other answers to the same prompt."""

    baseline: Literal["mean", "others", "none"] = "mean"
    """the group's mean, or that of the other answers (RLOO, https://arxiv.org/abs/2402.14740)"""
    scale: Literal["none", "unbiased", "population", "others", "batch"] = "unbiased"
    """the deviation advantages are divided by; "others" leaves the answer itself out, "batch" is over all rewards"""
    eps: float = 1e-6
    """added to the deviation; where that is 0, for the rewards are equal, nothing is divided"""
    alone: Literal["zero", "reward"] = "zero"
    """the advantage of an answer without siblings"""


def group_advantages(rewards: Tensor, group: Tensor, rule: GroupRule = GroupRule()) -> Tensor:
    """One advantage a sample, against its group: GRPO (https://arxiv.org/abs/2402.03300), Dr. GRPO, RLOO and kin.

    Args:
        rewards: [samples]; NaN marks an answer that could not be scored: it counts nowhere and gets advantage 0.
        group: [samples] int64: answers to one prompt share a number.
    """
    scored = ~rewards.isnan()
    wide = torch.where(scored, rewards, 0).double()
    members, there = _members(group)  # [samples, largest group] each
    there = there & scored[members]
    others = there & (members != torch.arange(len(group), device=group.device)[:, None])
    mean, deviation, count = _moments(wide[members], there, 0 if rule.scale == "population" else 1)
    mean_others, deviation_others, _ = _moments(wide[members], others)
    if rule.scale == "others":
        deviation = deviation_others
    elif rule.scale == "batch":
        deviation = _moments(wide[None], scored[None])[1].expand_as(wide)
    advantages = wide - {"mean": mean, "others": mean_others, "none": torch.zeros_like(mean)}[rule.baseline]
    if rule.scale != "none":
        advantages = torch.where(deviation > 0, advantages / (deviation + rule.eps), advantages)
    single = count == 1
    if rule.alone == "reward":
        advantages = torch.where(single, wide, advantages)
    else:
        advantages = torch.where(single, 0, advantages)
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


def soft_overlong_penalty(lengths: Tensor, limit: int, buffer: int, factor: float = 1.0, floor: float = 0.0) -> Tensor:
    """DAPO's length penalty (https://arxiv.org/abs/2503.14476, eq. 13): [samples], 0 up to limit - buffer tokens, then
    falling to -factor at the limit.

    Args:
        floor: the least penalty; 0 lets answers past the limit fall below -factor.
    """
    over = (lengths - (limit - buffer)).clamp(min=0).to(torch.get_default_dtype())
    penalty = -over / buffer * factor
    return penalty.clamp(min=floor) if floor else penalty
