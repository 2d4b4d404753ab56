"""Policy gradients from groups of responses to one prompt, without a critic: GRPO (https://arxiv.org/abs/2402.03300),
DAPO, Dr. GRPO, RLOO, REINFORCE++, GSPO, CISPO, each an overlay in launch/configs/presets.

The phases of the loop in launch/grpo.py, in its order. i is a response to a prompt, t a token of it:

    score            log π_ref and log π_old of each token; the groups come with their rewards
    with_advantages  A_i = (reward_i − baseline of the group) / deviation of the group      group_advantages
                     r_t = −β·kl_t + 1[t is the last token]·A_i                             kl_in = "reward"
                     A_t = Σ_k γ^k·r_{t+k}, whitened if asked for
    update           −min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A) + β·kl,  ρ = π / π_old     kl_in = "loss"

A group's samples may lie in different micro-batches: advantages come from the whole batch, which every rank holds.
`policy_step` takes the optimizer step and checks that the first ratio ρ of every update is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from .advantages import discounted_returns, group_advantages, token_rewards, whiten
from .batch import Batch
from .config.grpo import GRPOConfig, GRPOOptions
from .extensions import check_shape, load_function
from .losses.aggregation import Segments
from .losses.kl import kl_estimate
from .losses.policy import CORRECTIONS, cispo_loss, importance_weights, log_ratio, ppo_loss, sequence_log_ratio
from .policy_step import (
    TokenLosses,
    apply_loss_weights,
    check_estimate,
    kl_metrics,
    mean_metrics,
    policy_step,
    sampler_mismatch,
    set_loss_weights,
    single_update,
    truncated,
    user_losses,
    without_unscored,
)
from .roles.learner import Learner, Roles, Stats
from .rollout.source import Rollouts


def score(rollouts: Rollouts, roles: Roles, config: GRPOConfig) -> Batch:
    """Groups of scored rollouts packed into a batch, with reference logprobs and old logprobs."""
    batch = rollouts.batch(config.grpo, config.run.seed).to(roles.actor.mesh.device)
    with roles.profiler("score", tokens=len(batch.tokens)):
        return with_forward_passes(without_unscored(batch, rollouts.rewards), roles, config)


def with_forward_passes(batch: Batch, roles: Roles, config: GRPOConfig) -> Batch:
    """Forward passes: reference logprobs, old logprobs.

    A batch used for a single optimizer step skips the actor's: that step's own forward gives the same numbers. A KL in
    the reward then reads the sampler's logprobs, which come from the same weights, unless top-k, top-p or a minimum
    length truncated the sampler's distribution.
    """
    if roles.reference is not None:
        batch = batch.with_(ref_logprobs=roles.reference.logprobs(batch))
    kl_before_update = config.grpo.kl_in in ("score", "reward", "advantage")
    if not single_update(config.grpo) or (kl_before_update and truncated(config.rollout)):
        batch = batch.with_(logprobs=roles.actor.logprobs(batch))
    return batch


def with_advantages(batch: Batch, config: GRPOConfig) -> tuple[Batch, dict[str, float]]:
    """Token rewards and advantages.

    Args:
        batch: with scores [samples] and groups.
    """
    assert batch.rollout_logprobs is not None and batch.scores is not None and batch.group is not None
    options, segments = config.grpo, batch.segments
    logprobs = batch.rollout_logprobs if batch.logprobs is None else batch.logprobs
    scores, group = batch.scores.to(logprobs), batch.group.to(logprobs.device)
    kl, metrics = torch.zeros_like(logprobs), sampler_mismatch(batch, config.rollout)
    if batch.ref_logprobs is not None:
        limits = options.kl_input_limit, options.kl_output_limit
        kl = kl_estimate(logprobs, batch.ref_logprobs, options.kl_estimator, *limits)  # [total]
        if batch.logprobs is not None:  # otherwise the update's forward measures it, by the actor's own logprobs
            metrics |= kl_metrics(batch, kl, logprobs)
    clip = config.reward.token_clip
    rewards, advantages = estimate_advantages(scores, group, kl, segments, batch.cu_seqlens, options, clip)
    if options.advantage_estimator != "group":  # the reward of a response's last token is its advantage
        check_estimate(options.advantage_estimator, "advantages", rewards, batch, (kl,), config.optimizer)
    at = batch.response
    metrics |= {"advantage_max": advantages[at].max().item(), "advantage_min": advantages[at].min().item()}
    return batch.with_(rewards=rewards, advantages=advantages), metrics


def estimate_advantages(
    scores: Tensor,
    group: Tensor,
    kl: Tensor,
    segments: Segments,
    cu_seqlens: Tensor,
    options: GRPOOptions,
    clip: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(token rewards, advantages), [total] each.

    Args:
        scores: [samples], the reward of each response; NaN where it has none.
        group: [samples] int64; responses to one prompt share a number.
        kl: [total], estimates of the KL to the reference.
        cu_seqlens: [samples + 1] int32.
        clip: limit of the reward at a response's last token; 0 for none.
    """
    if options.kl_in == "score":
        scores = scores - options.kl_coef * segments.sums(kl)
    estimator = options.advantage_estimator
    if estimator == "group":
        scaling = options.baseline, options.scale_rewards, options.scale_eps, options.single_response
        relative = group_advantages(scores, group, *scaling)  # [samples]
    else:
        relative = check_shape(estimator, "advantages", load_function(estimator)(scores, group), scores)
    kl_coef = options.kl_coef if options.kl_in == "reward" else 0.0
    rewards = token_rewards(relative, kl, segments, kl_coef, clip=clip)
    advantages = discounted_returns(rewards, segments, cu_seqlens, options.gamma, options.turn_gaps)
    if options.kl_in == "advantage":
        advantages = advantages - options.kl_coef * torch.where(segments.mask, kl, 0)
    return rewards, advantages if options.whiten == "off" else whiten(advantages, segments, options.whiten)


def update(roles: Roles, batch: Batch, config: GRPOConfig) -> dict[str, float]:
    """All epochs and minibatches; returns the means of their metrics (extremes of extremes).

    Losses are normalized over the whole minibatch, so micro-batches and layout do not change them.

    Args:
        batch: with advantages.

    Raises:
        RuntimeError: a ratio before the first step of the update is not 1 (`policy_step.check_first_ratio`).
    """
    history: list[dict[str, float]] = []
    with roles.profiler("update", tokens=len(batch.tokens), epochs=config.grpo.epochs):
        for samples in chain(*batch.minibatches):
            history.append(actor_step(roles.actor, batch, samples, config, first=not history))
    metrics = mean_metrics(history)
    if "kl_of_target" in metrics:
        metrics["kl"] = metrics.pop("kl_of_target") * len(batch.response) / batch.segments.filled  # nats a sequence
    return metrics


def actor_step(
    actor: Learner, batch: Batch, samples: Sequence[int], config: GRPOConfig, *, first: bool
) -> dict[str, float]:
    """One step on the policy loss, the KL where it is a loss, and the entropy bonus.

    Args:
        first: this is the first step of the update, so every ratio must be 1.
    """
    stats, options = Stats(), config.grpo
    estimator = options.kl_estimator, options.kl_input_limit, options.kl_output_limit

    def token_losses(part: Batch, logprobs: Tensor, old: Tensor) -> TokenLosses:
        assert part.advantages is not None and part.rollout_logprobs is not None
        at, segments = part.response, part.target_segments
        losses, ratio, clipped = policy_losses(logprobs, old, part.advantages[at], segments, options)
        losses, importance = corrected(losses, old, part.rollout_logprobs[at], segments, options)
        if options.rollout_correction != "off":
            stats.add(importance_weight=importance)
        if part.logprobs is None and part.ref_logprobs is not None:  # a single step: old logprobs are this forward's
            reference = part.ref_logprobs[at]
            stats.add(kl_of_target=kl_estimate(old, reference, *estimator), kl_per_token=old - reference)
        if options.kl_in != "loss":
            return TokenLosses(losses, ratio, clipped)
        assert part.ref_logprobs is not None
        kl_ratio = (logprobs - old.detach()).exp() if options.kl_unbiased else None
        kl = kl_estimate(logprobs, part.ref_logprobs[at], *estimator, ratio=kl_ratio)
        stats.add(kl_loss=apply_loss_weights(kl, part))
        return TokenLosses(losses, ratio, clipped, options.kl_coef * kl)

    metrics, step = policy_step(
        actor,
        set_loss_weights(batch, samples, options.loss_aggregation, config.rollout),
        samples,
        token_losses,
        stats,
        config.rollout,
        first=first,
        first_ratio_limit=options.first_ratio_limit,
        entropy_coef=options.entropy_coef,
    )
    return metrics | step


def policy_losses(
    logprobs: Tensor, old: Tensor, advantages: Tensor, segments: Segments, options: GRPOOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ratio, clipped) of each target by `grpo.policy_loss`, all [targets]. Differentiable in `logprobs`.

    Args:
        segments: of the targets of whole samples.
    """
    if options.ratio_level == "token":
        d = log_ratio(logprobs, old, options.log_ratio_limit)
    else:
        length = "mean" if options.ratio_level == "sequence" else "sum"
        gradient = "own" if options.gspo_token else "shared"
        d = sequence_log_ratio(log_ratio(logprobs, old), segments, gradient, length, options.sequence_log_ratio_limit)
    if options.policy_loss == "cispo":
        return cispo_loss(logprobs, d, advantages, options.clip_low, options.clip_high)
    if options.policy_loss == "clip":
        dual_clip = options.dual_clip if options.ratio_level == "token" else 0.0
        return ppo_loss(d, advantages, options.clip_low, options.clip_high, dual_clip)
    return user_losses(options.policy_loss, logprobs, old, d, advantages, segments)


def corrected(
    losses: Tensor, old: Tensor, sampled: Tensor, segments: Segments, options: GRPOOptions
) -> tuple[Tensor, Tensor]:
    """(losses times importance weights, these weights), [targets] each: corrects for a sampler that is not the actor.

    Args:
        old, sampled: [targets] logprobs under the actor before the update and under the sampler.
    """
    if options.rollout_correction == "off":
        return losses, torch.ones_like(losses)
    bounds = {"low": options.rollout_ratio_low, "high": options.rollout_ratio_high}
    weights = importance_weights(old, sampled, segments, **bounds, **CORRECTIONS[options.rollout_correction])
    return losses * weights, weights
