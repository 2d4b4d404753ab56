"""Policy gradients from groups of answers to one prompt, without a critic: GRPO and kin.

One batch goes through `score` (reference logprobs), `with_advantages` and `update`. Groups may lie in different
micro-batches: advantages are made of the whole batch, which every rank holds.
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
    mean_metrics,
    policy_step,
    sampler_mismatch,
    single_update,
    truncated,
    without_unscored,
)
from .roles.learner import Learner, Roles, Stats
from .rollout.source import Rollouts


def score(rollouts: Rollouts, roles: Roles, config: GRPOConfig) -> Batch:
    """The batch of these rollouts, whose groups have their rewards: reference logprobs, logprobs before the update."""
    batch = rollouts.batch(config.grpo, config.run.seed).to(roles.actor.mesh.device)
    with roles.profiler("score", tokens=len(batch.tokens)):
        return with_passes(without_unscored(batch, rollouts.rewards), roles, config)


def with_passes(batch: Batch, roles: Roles, config: GRPOConfig) -> Batch:
    """Fills in the reference's and the actor's logprobs.

    The actor's pass is left out where one pass over the batch makes old and new equal by definition. A KL in the
    reward then takes the sampler's logprobs, which are of the same weights, unless its distribution was cut.
    """
    if roles.reference is not None:
        batch = batch.with_(ref_logprobs=roles.reference.logprobs(batch))
    before_update = config.grpo.kl_in in ("score", "reward", "advantage")
    if single_update(config.grpo) and not (before_update and truncated(config.rollout)):
        return batch
    return batch.with_(logprobs=roles.actor.logprobs(batch))


def with_advantages(batch: Batch, config: GRPOConfig) -> tuple[Batch, dict[str, float]]:
    """Advantages of every token: score - KL -> against its group -> token rewards -> returns -> whitened.

    Args:
        batch: with the scores and groups of its samples.
    """
    assert batch.rollout_logprobs is not None and batch.scores is not None and batch.group is not None
    options, segments = config.grpo, batch.segments
    logprobs = batch.rollout_logprobs if batch.logprobs is None else batch.logprobs
    scores, group = batch.scores.to(logprobs), batch.group.to(logprobs.device)
    kl, metrics = torch.zeros_like(logprobs), sampler_mismatch(batch, config.rollout)
    if batch.ref_logprobs is not None:
        limits = options.kl_input_limit, options.kl_output_limit
        kl = kl_estimate(logprobs, batch.ref_logprobs, options.kl_estimator, *limits)  # [total]
        if batch.logprobs is not None:  # else the update's forward has the actor's own
            metrics["kl"] = segments.sums(kl).sum().item() / segments.filled  # nats a sequence
            metrics["kl_per_token"] = (logprobs - batch.ref_logprobs)[batch.response].mean().item()
    clip = config.reward.token_clip
    rewards, advantages = advantages_of(scores, group, kl, segments, batch.cu_seqlens, options, clip)
    at = batch.response
    metrics |= {"advantage_max": advantages[at].max().item(), "advantage_min": advantages[at].min().item()}
    return batch.with_(rewards=rewards, advantages=advantages), metrics


def advantages_of(
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
        scores: [samples] one reward for each answer; NaN where there is none.
        group: [samples] int64: answers to one prompt share a number.
        kl: [total] estimates of the KL to the reference.
        cu_seqlens: [samples + 1] int32.
        clip: limit of the reward that a response's last token gets; 0 for none.
    """
    if options.kl_in == "score":
        scores = scores - options.kl_coef * segments.sums(kl)
    spec = options.advantage_estimator
    if spec == "group":
        how = options.baseline, options.scale_rewards, options.scale_eps, options.single_response
        against = group_advantages(scores, group, *how)  # [samples]
    else:
        against = check_shape(spec, "advantages", load_function(spec)(scores, group), scores)
    coef = options.kl_coef if options.kl_in == "reward" else 0.0
    rewards = token_rewards(against, kl, segments, coef, clip=clip)
    advantages = discounted_returns(rewards, segments, cu_seqlens, options.gamma, options.turn_gaps)
    if options.kl_in == "advantage":
        advantages = advantages - options.kl_coef * torch.where(segments.mask, kl, 0)
    return rewards, advantages if options.whiten == "off" else whiten(advantages, segments, options.whiten)


def policy_losses(
    logprobs: Tensor, old: Tensor, advantages: Tensor, segments: Segments, options: GRPOOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ratio, clipped) of each target, all [targets]; whole samples only. Differentiable in `logprobs`.

    Args:
        old: log-probabilities under the actor before the update.
        segments: of the targets.
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
    losses = load_function(options.policy_loss)(logprobs, old, advantages, segments.sample)
    return check_shape(options.policy_loss, "losses", losses, logprobs), d.detach().exp(), torch.zeros_like(d)


def corrected(
    losses: Tensor, old: Tensor, sampled: Tensor, segments: Segments, options: GRPOOptions
) -> tuple[Tensor, Tensor]:
    """The losses times what corrects for a sampler that is not quite the actor, and those weights; both [targets]."""
    if options.rollout_correction == "off":
        return losses, torch.ones_like(losses)
    bounds = {"low": options.rollout_ratio_low, "high": options.rollout_ratio_high}
    weights = importance_weights(old, sampled, segments, **bounds, **CORRECTIONS[options.rollout_correction])
    return losses * weights, weights


def update(roles: Roles, batch: Batch, config: GRPOConfig) -> dict[str, float]:
    """All epochs and minibatches; returns the means of their metrics (extremes of extremes).

    Losses are weighted by the whole minibatch, so micro-batches and layout do not change them.

    Args:
        batch: with advantages.

    Raises:
        RuntimeError: a ratio before the first step of the update is not exactly 1.
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
    """One optimizer step on the policy loss, the KL where it is a loss, and the entropy bonus.

    Args:
        first: no step of this update has been made yet, so every ratio must be exactly 1.
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
        if part.logprobs is None and part.ref_logprobs is not None:  # the only step of the update
            reference = part.ref_logprobs[at]
            stats.add(kl_of_target=kl_estimate(old, reference, *estimator), kl_per_token=old - reference)
        if options.kl_in != "loss":
            return TokenLosses(losses, ratio, clipped)
        assert part.ref_logprobs is not None
        weight = (logprobs - old.detach()).exp() if options.kl_unbiased else None
        kl = kl_estimate(logprobs, part.ref_logprobs[at], *estimator, ratio=weight)
        stats.add(kl_loss=apply_loss_weights(kl, part))
        return TokenLosses(losses, ratio, clipped, options.kl_coef * kl)

    metrics, step = policy_step(
        actor,
        batch,
        samples,
        token_losses,
        stats,
        config.rollout,
        first=first,
        aggregation=options.loss_aggregation,
        constant=float(config.rollout.max_new_tokens),
        entropy_coef=options.entropy_coef,
    )
    return metrics | step
