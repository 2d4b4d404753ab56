"""One recorded batch under a convention: what PPO, GRPO and kin make of it there, by their own functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import grpo, ppo
from .advantages import kl_estimate
from .batch import Batch
from .config.common import RewardConfig
from .config.convention import AS_PRESET, ConventionConfig, GroupConvention, PPOConvention
from .config.grpo import Algorithm, GRPOConfig, GRPOOptions
from .config.ppo import ActorConfig, PPOConfig, PPOOptions
from .config.preference import DPOLoss
from .config.presets import ConventionName
from .losses.aggregation import Aggregation, token_weights
from .losses.policy import CORRECTIONS, importance_weights
from .losses.preference import pair_loss
from .rewards.shaping import RewardShaper


@dataclass(frozen=True)
class Recorded:
    """One batch as a trainer saw it, in fp64."""

    batch: Batch  # with rollout_logprobs, logprobs ("old"), ref_logprobs and values ("old")
    group: Tensor  # [samples] int64: answers to one prompt share a number
    scores: Tensor  # [samples]
    logprobs: Tensor  # [total] of the policy that is trained
    values: Tensor  # [total] of the critic that is trained


def under(name: ConventionName, recorded: Recorded, *, kl_coef: float, clip: float) -> dict[str, float]:
    """What a convention makes of a batch: KL, rewards, advantages and losses, each as one number.

    Args:
        kl_coef: of the KL, where it is in the reward or taken off the advantage.
        clip: of the ratio on both sides; GSPO and CISPO have their own.
    """
    batch, at = recorded.batch, recorded.batch.response
    assert batch.logprobs is not None and batch.ref_logprobs is not None and batch.values is not None
    config = PPOConfig(
        actor=ActorConfig(clip_low=clip, clip_high=clip),
        ppo=PPOOptions(kl_coef=kl_coef),
        convention=PPOConvention(name),
    )
    rules, segments, targets = config.rules, batch.segments, batch.target_segments
    scores = recorded.scores.new_tensor(
        RewardShaper(RewardConfig(), rules)(recorded.scores.tolist(), [True] * len(batch))
    )
    kl = {kind: kl_estimate(batch.logprobs, batch.ref_logprobs, kind, rules.kl)[at] for kind in ("k1", "k3")}
    scored, _ = ppo.with_rewards(batch, scores, config, kl_coef)
    assert scored.rewards is not None
    advantages, _ = ppo.advantages_of(scored, batch.values, config)
    white, _ = ppo.with_advantages(scored, config)
    assert white.advantages is not None and white.returns is not None

    def mean(losses: Tensor, how: Aggregation, constant: float = 1.0) -> float:
        weights = token_weights(targets, how, constant=constant, dtype=losses.dtype)
        return (losses * weights).sum().item()

    policy = ppo.policy_losses(recorded.logprobs[at], batch.logprobs[at], white.advantages[at], config.actor, rules)[0]
    values = ppo.value_losses(recorded.values[at], batch.values[at], white.returns[at], rules)[0]
    told = {
        "kl k1": kl["k1"].mean().item(),
        "kl k3": kl["k3"].mean().item(),
        "reward, summed": segments.sums(scored.rewards).mean().item(),
        "advantage (GAE)": advantages[at].mean().item(),
        "return": white.returns[at].mean().item(),
        "whitened, largest": white.advantages[at].abs().max().item(),
        "policy loss (PPO)": mean(policy, rules.aggregation),
        "value loss": mean(values, rules.value_aggregation),
    }
    for title, algorithm in TITLES.items():
        made, choices, losses = _learned(name, algorithm, recorded, scores, kl_coef, clip)
        if algorithm not in OWN_CLIP:  # those have GRPO's
            told[f"advantage ({title}), largest"] = made.max().item()
            told[f"advantage ({title}), least"] = made.min().item()
        told[f"policy loss ({title})"] = mean(losses, choices.aggregation, choices.constant)
    return told | {"importance weight": _importance(name, batch)} | _ipo(name, recorded)


TITLES: dict[str, Algorithm] = {
    "GRPO": "grpo",
    "GSPO": "gspo",
    "CISPO": "cispo",
    "RLOO": "rloo",
    "REINFORCE++": "reinforce++",
    "REINFORCE++ baseline": "reinforce++_baseline",
}
OWN_CLIP = ("gspo", "cispo")


def _learned(
    name: ConventionName, algorithm: Algorithm, recorded: Recorded, scores: Tensor, kl_coef: float, clip: float
) -> tuple[Tensor, grpo.Choices, Tensor]:
    """(advantages [targets], choices, losses [targets]) of an algorithm without a critic."""
    batch, at = recorded.batch, recorded.batch.response
    assert batch.logprobs is not None and batch.rollout_logprobs is not None
    given = AS_PRESET if algorithm in OWN_CLIP else clip
    knobs = GRPOOptions(algorithm=algorithm, kl_coef=kl_coef, clip_low=given, clip_high=given)
    config = GRPOConfig(grpo=knobs, convention=GroupConvention(name))
    choices, targets = config.choices, batch.target_segments
    scored, _ = grpo.with_advantages(batch, scores, recorded.group, config)
    assert scored.advantages is not None
    advantages, old = scored.advantages[at], batch.logprobs[at]
    losses = grpo.token_losses(recorded.logprobs[at], old, advantages, targets, choices)[0]
    return advantages, choices, grpo.corrected(losses, old, batch.rollout_logprobs[at], targets, choices)[0]


def _importance(name: ConventionName, batch: Batch) -> float:
    """Mean weight of a token under the convention's correction, or tis where it has none."""
    assert batch.logprobs is not None and batch.rollout_logprobs is not None
    rules, at = GroupConvention(name).resolved(), batch.response
    how = CORRECTIONS["tis" if rules.importance == "off" else rules.importance]
    bounds = {"low": rules.importance_low, "high": rules.importance_high}
    weights = importance_weights(batch.logprobs[at], batch.rollout_logprobs[at], batch.target_segments, **bounds, **how)
    return weights.mean().item()


def _ipo(name: ConventionName, recorded: Recorded) -> dict[str, float]:
    """IPO's mean loss on the best against the worst answer of each group; nothing where no group has two rewards."""
    batch, at = recorded.batch, recorded.batch.response
    assert batch.ref_logprobs is not None
    loss, segments = DPOLoss(kind="ipo").made(ConventionConfig(name)), batch.target_segments
    d = recorded.logprobs[at] - batch.ref_logprobs[at]
    ratios = segments.sums(d) if loss.average == "sum" else segments.means(d)  # [samples]
    pairs = []
    for group in recorded.group.unique():
        answers = (recorded.group == group).nonzero().squeeze(1)
        best, worst = (answers[getattr(recorded.scores[answers], which)()] for which in ("argmax", "argmin"))
        if recorded.scores[best] > recorded.scores[worst]:
            pairs.append((best, worst))
    if not pairs:
        return {}
    best, worst = (torch.stack(side) for side in zip(*pairs, strict=True))
    return {"loss (IPO)": pair_loss(ratios[best], ratios[worst], loss.beta, "ipo").mean().item()}
