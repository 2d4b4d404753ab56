"""The choices on which trainers in wide use differ, each named, and what each trainer chose.

`trialign` is what this project does where nothing else is asked. The other presets give the numbers of OpenRLHF 0.11,
TRL 1.10, verl 0.10, NeMo-RL and slime as of August 2026; tests/test_golden.py holds them to what those compute.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from ..kernels.ppo_loss import value_loss
from .advantages import (
    Gaps,
    GroupRule,
    KLRule,
    WhitenRule,
    gae,
    group_advantages,
    kl_estimate,
    token_rewards,
    whiten,
)
from .policy_loss import log_ratio, ppo_loss, sequence_log_ratio
from .segments import Aggregation, Segments, token_weights

ConventionName = Literal["trialign", "openrlhf", "trl", "verl", "nemo", "slime"]
ALL_KINDS = ("k1", "k2", "k3", "abs")


@dataclass(frozen=True)
class Convention:
    """One set of choices. A 0 turns a limit off."""

    kl: KLRule = field(default_factory=KLRule)
    """limits of the KL estimators"""
    reward_clip: tuple[float, float] | None = None
    """of the score before it becomes a token's reward"""
    gaps: Gaps = "carry"
    """what GAE sees across tokens that are not the model's own, in a dialogue of several turns"""
    lam: float = 0.95
    """GAE's lambda"""
    gamma: float = 1.0
    """GAE's discount"""
    whiten: WhitenRule = field(default_factory=WhitenRule)
    """of advantages"""
    group: GroupRule = field(default_factory=GroupRule)
    """GRPO's baseline and deviation"""
    log_ratio_limit: float = 0.0
    """of |log pi - log pi_old| before the exponential"""
    dual_clip: float = 0.0
    """bound of the loss of negative advantages"""
    gspo_gradient: Literal["shared", "own"] = "shared"
    """through the sequence's mean, or to each token its own"""
    cispo_bounds: Literal["relative", "absolute"] = "relative"
    """what CISPO's numbers mean: 1 - low and 1 + high, or the ratio itself"""
    aggregation: Aggregation = "token-mean"
    """of per-token policy losses"""
    value_loss_factor: float = 0.5
    """of max((V - R)^2, clipped)"""
    value_clip: float = 0.2
    """of the value's change"""
    ipo: Literal["sum", "mean"] = "sum"
    """of an answer's log-ratio over its tokens"""
    importance_low: float = 0.0
    """least weight of an off-policy token"""
    importance_high: float = 2.0
    """largest weight of an off-policy token"""


PRESETS: dict[ConventionName, Convention] = {
    "trialign": Convention(value_clip=0.5),
    "openrlhf": Convention(
        kl=KLRule(ALL_KINDS, output_limit=10.0),
        reward_clip=(-10.0, 10.0),
        gaps="zero",
        lam=1.0,
        group=GroupRule(eps=1e-9),
        log_ratio_limit=20.0,
        value_clip=0.5,
        importance_low=0.5,
        importance_high=5.0,
    ),
    "trl": Convention(
        whiten=WhitenRule(unbiased=True, floor="add"),
        group=GroupRule(eps=1e-4),
        cispo_bounds="absolute",
        ipo="mean",
        importance_high=3.0,
    ),
    "verl": Convention(
        kl=KLRule(("k3",), input_limit=20.0, output_limit=10.0),
        lam=1.0,
        whiten=WhitenRule(unbiased=True, floor="add", count_eps=1e-8),
        group=GroupRule(eps=1e-6, alone="reward"),
        log_ratio_limit=20.0,
        dual_clip=3.0,
        gspo_gradient="own",
        value_clip=0.5,
    ),
    "nemo": Convention(
        kl=KLRule(ALL_KINDS, input_limit=20.0, output_limit=10.0, weighted=True),
        whiten=WhitenRule(unbiased=True, floor="add", count_eps=1e-8),
        group=GroupRule("others", "others", eps=1e-6, unscaled_at_zero=True),
    ),
    "slime": Convention(
        kl=KLRule(("k3",), output_limit=10.0),
        lam=1.0,
        whiten=WhitenRule(unbiased=True, floor="add"),
        group=GroupRule(eps=1e-6),
        aggregation="sample-mean",
        value_loss_factor=1.0,
    ),
}
assert set(PRESETS) == set(get_args(ConventionName))


@dataclass(frozen=True)
class Recorded:
    """One batch as a trainer saw it: what `under` puts to a convention. Samples are packed end to end."""

    lengths: Tensor  # [samples] tokens of each answer
    mask: Tensor  # [total] bool: tokens the policy wrote
    group: Tensor  # [samples] int64: answers to one prompt share a number
    rewards: Tensor  # [samples] fp64
    logprobs: Tensor  # [total] fp64, of the policy that is trained
    old_logprobs: Tensor  # [total] fp64, of the policy that sampled
    ref_logprobs: Tensor  # [total] fp64
    values: Tensor  # [total] fp64
    old_values: Tensor  # [total] fp64


def under(convention: Convention, batch: Recorded, *, kl_coef: float, clip: float) -> dict[str, float]:
    """What a convention makes of a batch: KL, rewards, advantages and losses, each as one number.

    Args:
        kl_coef: of the KL in the reward.
        clip: PPO's, on both sides.
    """
    segments = Segments.of_lengths(batch.lengths, batch.mask)
    cu_seqlens = torch.nn.functional.pad(batch.lengths.cumsum(0), (1, 0)).int()
    mask = batch.mask
    weights = token_weights(segments, convention.aggregation, dtype=torch.float64)
    rule = dataclasses.replace(convention.kl, weighted=False)
    kl: dict[str, Tensor] = {
        "k1": kl_estimate(batch.old_logprobs, batch.ref_logprobs, "k1", rule),
        "k3": kl_estimate(batch.old_logprobs, batch.ref_logprobs, "k3", rule),
    }
    rewards = token_rewards(batch.rewards, kl["k1"], segments, kl_coef, clip=convention.reward_clip)
    advantages, returns = gae(
        rewards, batch.old_values, segments, cu_seqlens, convention.gamma, convention.lam, convention.gaps
    )
    white = whiten(advantages, segments, convention.whiten)
    grouped = group_advantages(batch.rewards, batch.group, convention.group)
    d = log_ratio(batch.logprobs, batch.old_logprobs, convention.log_ratio_limit)
    dual = convention.dual_clip or None
    values, _ = value_loss(batch.values, batch.old_values, returns, convention.value_clip or None)
    sequences = sequence_log_ratio(d, segments, convention.gspo_gradient)

    def mean(x: Tensor) -> float:
        return x[mask].mean().item()

    return {
        "kl k1": mean(kl["k1"]),
        "kl k3": mean(kl["k3"]),
        "reward, summed": segments.sums(rewards).mean().item(),
        "advantage (GAE)": mean(advantages),
        "return": mean(returns),
        "whitened, largest": white[mask].abs().max().item(),
        "group advantage, largest": grouped.max().item(),
        "group advantage, least": grouped.min().item(),
        "policy loss (PPO)": (ppo_loss(d, white, clip, clip, dual)[0] * weights).sum().item(),
        "policy loss (GRPO)": (ppo_loss(d, segments.spread(grouped), clip, clip, dual)[0] * weights).sum().item(),
        "policy loss (GSPO)": (ppo_loss(sequences, segments.spread(grouped), clip, clip)[0] * weights).sum().item(),
        "value loss": (values * convention.value_loss_factor / 0.5)[mask].mean().item(),
    }
