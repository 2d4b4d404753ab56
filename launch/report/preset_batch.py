"""One recorded batch under a preset: KL, rewards, advantages and losses as PPO, GRPO and kin compute them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from trialign.algorithms import grpo, ppo
from trialign.algorithms.batch import Batch
from trialign.algorithms.config.grpo import GRPOConfig
from trialign.algorithms.config.ppo import PPOConfig
from trialign.algorithms.config.preference import DPOConfig
from trialign.algorithms.config.scripts import SCRIPTS
from trialign.algorithms.losses.aggregation import Aggregation, token_weights
from trialign.algorithms.losses.kl import kl_estimate
from trialign.algorithms.losses.preference import pair_loss
from trialign.algorithms.losses.value import value_loss
from trialign.algorithms.rewards.shaping import RewardShaper
from trialign.engine.config import load

ALGORITHMS = {
    "GRPO": (),
    "GSPO": ("presets/gspo.toml",),
    "CISPO": ("presets/cispo.toml",),
    "RLOO": ("presets/rloo.toml",),
    "REINFORCE++": ("presets/reinforce++.toml",),
    "REINFORCE++ baseline": ("presets/reinforce++_baseline.toml",),
}
OWN_CLIP = ("GSPO", "CISPO")


@dataclass(frozen=True)
class RecordedBatch:
    """One batch of a trainer, in fp64."""

    batch: Batch  # with rollout_logprobs, logprobs ("old"), ref_logprobs and values ("old")
    group: Tensor  # [samples] int64: responses to one prompt share a number
    scores: Tensor  # [samples]
    logprobs: Tensor  # [total] of the policy that is trained
    values: Tensor  # [total] of the critic that is trained


def quantities(files: Sequence[str], recorded: RecordedBatch, *, kl_coef: float, clip: float) -> dict[str, float]:
    """KL, rewards, advantages and losses of a batch under config files, each as one number.

    Args:
        kl_coef: of the KL in the reward or in the advantage.
        clip: of the ratio on both sides; GSPO and CISPO have their own.
    """
    batch, at = recorded.batch, recorded.batch.response
    assert batch.logprobs is not None and batch.ref_logprobs is not None and batch.values is not None
    config = load(PPOConfig, *files, scripts=SCRIPTS)
    config = replace(
        config, actor=replace(config.actor, clip_low=clip, clip_high=clip), ppo=replace(config.ppo, kl_coef=kl_coef)
    )
    segments, targets = batch.segments, batch.target_segments
    shaped = RewardShaper(config.reward.score_clip)(recorded.scores.tolist(), [True] * len(batch))
    scores = recorded.scores.new_tensor(shaped)
    scored, _ = ppo.with_rewards(batch, scores, config, kl_coef)
    assert scored.rewards is not None
    advantages, _ = ppo.estimate_advantages(scored, batch.values, config)
    white, _ = ppo.with_gae(scored, config)
    assert white.advantages is not None and white.returns is not None

    def mean(losses: Tensor, how: Aggregation, constant: float = 1.0) -> float:
        weights = token_weights(targets, how, constant=constant, dtype=losses.dtype)
        return (losses * weights).sum().item()

    def kl(kind: str, limits: tuple[float, float]) -> float:
        assert batch.logprobs is not None and batch.ref_logprobs is not None
        return kl_estimate(batch.logprobs, batch.ref_logprobs, kind, *limits)[at].mean().item()  # pyright: ignore[reportArgumentType]

    options, of_groups = config.ppo, load(GRPOConfig, *files, scripts=SCRIPTS).grpo
    logprobs, old, critic = recorded.logprobs[at], batch.logprobs[at], config.critic
    policy = ppo.policy_losses(logprobs, old, white.advantages[at], targets, config.actor)[0]
    before, returns = batch.values[at], white.returns[at]
    values = value_loss(recorded.values[at], before, returns, critic.value_clip, critic.loss_coef)[0]
    found = {
        "kl k1": kl("k1", (options.kl_input_limit, options.kl_output_limit)),
        "kl k3": kl("k3", (of_groups.kl_input_limit, of_groups.kl_output_limit)),
        "reward, summed": segments.sums(scored.rewards).mean().item(),
        "advantage (GAE)": advantages[at].mean().item(),
        "return": white.returns[at].mean().item(),
        "whitened, largest": white.advantages[at].abs().max().item(),
        "policy loss (PPO)": mean(policy, options.loss_aggregation),
        "value loss": mean(values, options.loss_aggregation),
    }
    for title, recipe in ALGORITHMS.items():
        own = load(GRPOConfig, *files, *recipe, scripts=SCRIPTS)
        changes = {} if title in OWN_CLIP else {"clip_low": clip, "clip_high": clip}
        own = replace(own, grpo=replace(own.grpo, kl_coef=kl_coef, **changes))
        advantages, losses = _policy_losses(own, recorded, scores)
        if title not in OWN_CLIP:  # those have GRPO's
            found[f"advantage ({title}), largest"] = advantages.max().item()
            found[f"advantage ({title}), least"] = advantages.min().item()
        constant = float(own.rollout.max_new_tokens)
        found[f"policy loss ({title})"] = mean(losses, own.grpo.loss_aggregation, constant)
    correction = of_groups if of_groups.rollout_correction != "off" else replace(of_groups, rollout_correction="tis")
    assert batch.rollout_logprobs is not None
    weights = grpo.corrected(torch.ones_like(old), old, batch.rollout_logprobs[at], targets, correction)[1]
    return found | {"importance weight": weights.mean().item()} | _ipo(files, recorded)


def _policy_losses(config: GRPOConfig, recorded: RecordedBatch, scores: Tensor) -> tuple[Tensor, Tensor]:
    """(advantages, losses), [targets] each, of an algorithm without a critic."""
    batch, at, targets = recorded.batch, recorded.batch.response, recorded.batch.target_segments
    assert batch.logprobs is not None and batch.rollout_logprobs is not None
    scored, _ = grpo.with_advantages(batch.with_(scores=scores, group=recorded.group), config)
    assert scored.advantages is not None
    advantages, old = scored.advantages[at], batch.logprobs[at]
    losses = grpo.policy_losses(recorded.logprobs[at], old, advantages, targets, config.grpo)[0]
    return advantages, grpo.corrected(losses, old, batch.rollout_logprobs[at], targets, config.grpo)[0]


def _ipo(files: Sequence[str], recorded: RecordedBatch) -> dict[str, float]:
    """IPO's mean loss on the best against the worst response of each group; nothing where no group has two rewards."""
    batch, at = recorded.batch, recorded.batch.response
    assert batch.ref_logprobs is not None
    loss, segments = load(DPOConfig, *files, "presets/ipo.toml", scripts=SCRIPTS).loss, batch.target_segments
    d = recorded.logprobs[at] - batch.ref_logprobs[at]
    ratios = segments.means(d) if loss.average_log_probs else segments.sums(d)  # [samples]
    pairs = []
    for group in recorded.group.unique():
        members = (recorded.group == group).nonzero().squeeze(1)
        best, worst = (members[getattr(recorded.scores[members], end)()] for end in ("argmax", "argmin"))
        if recorded.scores[best] > recorded.scores[worst]:
            pairs.append((best, worst))
    if not pairs:
        return {}
    best, worst = (torch.stack(side) for side in zip(*pairs, strict=True))
    return {"loss (IPO)": pair_loss(ratios[best], ratios[worst], loss.beta, loss.kind).mean().item()}
