"""Proximal policy optimization (https://arxiv.org/abs/1707.06347) as RLHF uses it (https://arxiv.org/abs/2203.02155).

The phases of the loop in launch/ppo.py, in its order. t is a token of a response; π the actor, V the critic, both "old"
before the update:

    score            a reward for each response; log π_ref, log π_old and V_old of each token
    with_advantages  r_t = −β·kl_t + 1[t is the last token]·reward            KL penalty: advantages.token_rewards
                     δ_t = r_t + γ·V_old(t+1) − V_old(t)
                     A_t = Σ_l (γλ)^l·δ_{t+l},  R_t = A_t + V_old(t)          GAE, https://arxiv.org/abs/1506.02438
                     A whitened over all response tokens of the batch
    update           critic: coef·max((V − R)², (clip(V, V_old ± c) − R)²)
                     actor:  −min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A),  ρ = π / π_old
                     with entropy bonus and pretraining loss where they are on

kl_t estimates log π_old − log π_ref. Every rank holds the whole batch, so its statistics are local sums. `policy_step`
takes the actor's optimizer step and checks that the first ratio ρ of every update is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from .advantages import gae, token_rewards, whiten
from .batch import Batch, pack
from .config.ppo import ActorConfig, PPOConfig
from .extensions import check_shape, load_function
from .losses.aggregation import Segments
from .losses.kl import KLController, kl_estimate
from .losses.policy import log_ratio, ppo_loss
from .losses.value import value_loss
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
    target_count,
    truncated,
    user_losses,
    without_unscored,
)
from .rewards.rewards import Rewards
from .roles.learner import Learner, Roles, Stats
from .roles.role import target_logprobs
from .rollout.source import Rollouts


def score(rollouts: Rollouts, roles: Roles, rewards: Rewards, config: PPOConfig) -> Batch:
    """Rollouts packed into a batch, with rewards, reference logprobs, old values and old logprobs."""
    batch = rollouts.batch(config.ppo, config.run.seed).to(roles.actor.mesh.device)
    with roles.profiler("score", tokens=len(batch.tokens)):
        batch = without_unscored(batch, torch.tensor(rewards(rollouts.samples, batch).shaped))
        return with_forward_passes(batch, roles, config)


def with_forward_passes(batch: Batch, roles: Roles, config: PPOConfig) -> Batch:
    """Forward passes: reference logprobs, old values, old logprobs.

    A batch used for a single optimizer step skips the critic's and the actor's: that step's own forward gives the same
    numbers. The KL penalty then reads the sampler's logprobs, which come from the same weights, unless top-k, top-p or
    a minimum length truncated the sampler's distribution, or ppo.tis_clip corrects for its difference.
    """
    assert roles.reference is not None and roles.critic is not None
    single = single_update(config.ppo)
    batch = batch.with_(ref_logprobs=roles.reference.logprobs(batch))
    if not single or config.ppo.advantage_estimator != "gae":  # a user's estimator may mix the batch's samples
        batch = batch.with_(values=roles.critic.values(batch))
    if not single or truncated(config.rollout) or config.ppo.tis_clip:
        batch = batch.with_(logprobs=roles.actor.logprobs(batch))
    return batch


def with_advantages(batch: Batch, config: PPOConfig, kl: KLController) -> tuple[Batch, dict[str, float]]:
    """Token rewards with the KL penalty, then advantages and returns; adapts β.

    Without old values (a batch used for a single step) advantages are left to `update`.
    """
    assert batch.scores is not None
    batch, metrics = with_rewards(batch, batch.scores, config, kl.coef)
    kl.update(metrics["kl"], len(batch))
    if batch.values is None:
        return batch, metrics
    batch, numbers = with_gae(batch, config)
    return batch, metrics | numbers


def with_rewards(batch: Batch, scores: Tensor, config: PPOConfig, kl_coef: float) -> tuple[Batch, dict[str, float]]:
    """Token rewards r_t = −β·kl_t + 1[t is the last token]·score.

    Args:
        scores: [samples] fp32, the reward of each response; ignored for samples without targets.
        kl_coef: β.
    """
    assert batch.ref_logprobs is not None and batch.rollout_logprobs is not None
    logprobs = batch.rollout_logprobs if batch.logprobs is None else batch.logprobs
    limits = config.ppo.kl_input_limit, config.ppo.kl_output_limit
    kl = kl_estimate(logprobs, batch.ref_logprobs, config.ppo.kl_estimator, *limits)  # [total]
    rewards = token_rewards(scores.to(kl), kl, batch.segments, kl_coef, clip=config.reward.token_clip)
    metrics = kl_metrics(batch, kl, logprobs) | {"kl_coef": kl_coef}
    return batch.with_(rewards=rewards), metrics | sampler_mismatch(batch, config.rollout)


def with_gae(batch: Batch, config: PPOConfig) -> tuple[Batch, dict[str, float]]:
    """Advantages and returns; the advantages whitened over the batch's response tokens."""
    assert batch.values is not None
    advantages, returns = estimate_advantages(batch, batch.values, config)
    metrics = value_metrics(batch, returns)
    if config.ppo.whiten != "off":
        advantages = whiten(advantages, batch.segments, config.ppo.whiten)
    return batch.with_(advantages=advantages, returns=returns), metrics


def estimate_advantages(batch: Batch, values: Tensor, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """(advantages, returns), [total] each, by `ppo.advantage_estimator`; under GAE every sample's are its own."""
    assert batch.rewards is not None
    gamma, lam, estimator = config.ppo.gamma, config.ppo.lam, config.ppo.advantage_estimator
    if estimator == "gae":
        return gae(batch.rewards, values, batch.segments, batch.cu_seqlens, gamma, lam, config.ppo.turn_gaps)
    result = load_function(estimator)(batch.rewards, values, batch.mask, batch.cu_seqlens, gamma, lam)
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"{estimator}: must return (advantages, returns), returned {type(result).__name__}")
    optimizers = config.actor.optimizer, config.critic.optimizer
    for name, numbers, optimizer in zip(("advantages", "returns"), result, optimizers, strict=True):
        check_shape(estimator, name, numbers, values)
        check_estimate(estimator, name, numbers, batch, (batch.rewards, values), optimizer)
    return result


def update(
    roles: Roles, batch: Batch, config: PPOConfig, step: int = 0, documents: Sequence[Sequence[int]] = ()
) -> dict[str, float]:
    """All epochs and minibatches; returns the means of their metrics (of minima the minimum, of maxima the maximum).

    Losses are normalized over the whole minibatch, so micro-batches and layout do not change them.

    Args:
        batch: with advantages and returns or, for a single step, with token rewards alone.
        step: of the run; only the critic learns in the first critic.warmup_steps.
        documents: of the pretraining mix, the same on every rank; they join every minibatch.

    Raises:
        RuntimeError: a ratio before the first step of the update is not 1 (`policy_step.check_first_ratio`).
    """
    assert roles.critic is not None
    assert batch.values is not None or single_update(config.ppo)
    history, metrics = [], {}
    with roles.profiler("update", tokens=len(batch.tokens), epochs=config.ppo.epochs):
        for samples in chain(*batch.minibatches):
            step_metrics, values = critic_step(roles.critic, batch, samples, config)
            if batch.advantages is None:  # a single step: the values are those of the critic's own forward
                batch, metrics = with_gae(batch.with_(values=values), config)
            if step >= config.critic.warmup_steps:
                step_metrics |= actor_step(roles.actor, batch, samples, config, documents, first=not history)
            history.append(step_metrics)
    return metrics | mean_metrics(history)


def critic_step(
    critic: Learner, batch: Batch, samples: Sequence[int], config: PPOConfig
) -> tuple[dict[str, float], Tensor]:
    """One step on the clipped value loss; returns its metrics and the old values, [total] fp32.

    Without old values in the batch they are this forward's own, and returns are computed from them sample by sample.
    """
    stats, options, targets = Stats(), config.critic, target_count(batch, samples)
    forward_values: list[Tensor] = []

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        at = part.response
        values = critic.model.scores(hidden[at - 1])  # [targets]
        forward_values.append(values.detach())
        old = part.scatter(values.detach()) if part.values is None else part.values
        returns = estimate_advantages(part, old, config)[1] if part.returns is None else part.returns
        losses, clipped = value_loss(values, old[at], returns[at], options.value_clip, options.loss_coef)
        losses = apply_loss_weights(losses, part)
        stats.add(value_loss=losses, value_clip_fraction=clipped)
        return losses.sum() / targets

    weighted = set_loss_weights(batch, samples, config.ppo.loss_aggregation, config.rollout)
    step = critic.step(weighted, loss, stats, samples=samples)
    values = critic.gather_targets(batch, samples, forward_values) if batch.values is None else batch.values
    means = stats.means(critic.mesh, targets)
    return means | {f"critic_{name}": value for name, value in step.items()}, values


def actor_step(
    actor: Learner,
    batch: Batch,
    samples: Sequence[int],
    config: PPOConfig,
    documents: Sequence[Sequence[int]] = (),
    *,
    first: bool,
) -> dict[str, float]:
    """One step on the clipped policy loss, the entropy bonus and the pretraining mix (PPO-ptx).

    Args:
        first: this is the first step of the update, so every ratio must be 1.
    """
    stats, mix = Stats(), pack(documents).to(actor.mesh.device) if documents else None

    def token_losses(part: Batch, logprobs: Tensor, old: Tensor) -> TokenLosses:
        assert part.advantages is not None and part.rollout_logprobs is not None
        at = part.response
        losses, ratio, clipped = policy_losses(logprobs, old, part.advantages[at], part.target_segments, config.actor)
        if config.ppo.tis_clip:  # truncated importance sampling: the sampler's distribution is not quite the actor's
            losses = losses * torch.exp(old - part.rollout_logprobs[at]).clamp_max(config.ppo.tis_clip)
        return TokenLosses(losses, ratio, clipped)

    def ptx_loss(part: Batch, hidden: Tensor) -> Tensor:
        assert mix is not None
        logprobs, _ = target_logprobs(actor.model, part, hidden, temperature=1.0)
        stats.add(ptx_loss=-logprobs)
        return -config.actor.ptx_coef * logprobs.sum() / len(mix.response)

    metrics, step = policy_step(
        actor,
        set_loss_weights(batch, samples, config.ppo.loss_aggregation, config.rollout),
        samples,
        token_losses,
        stats,
        config.rollout,
        first=first,
        first_ratio_limit=config.ppo.first_ratio_limit,
        entropy_coef=config.actor.entropy_coef,
        extra_losses=[(mix, ptx_loss)] if mix else [],
        counts={"ptx_loss": len(mix.response)} if mix else {},
    )
    return metrics | {f"actor_{name}": value for name, value in step.items()}


def policy_losses(
    logprobs: Tensor, old: Tensor, advantages: Tensor, segments: Segments, options: ActorConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ratio, clipped) of each target by `actor.policy_loss`, all [targets]. Differentiable in `logprobs`.

    Args:
        segments: of the targets of whole samples.
    """
    d = log_ratio(logprobs, old, options.log_ratio_limit)
    if options.policy_loss == "clip":
        return ppo_loss(d, advantages, options.clip_low, options.clip_high, options.dual_clip)
    return user_losses(options.policy_loss, logprobs, old, d, advantages, segments)


def value_metrics(batch: Batch, returns: Tensor) -> dict[str, float]:
    """Means of values and returns over the targets, and the fraction of the returns' variance explained by values."""
    assert batch.values is not None
    values, returns = batch.values[batch.response], returns[batch.response]
    unexplained = (returns - values).var(correction=0) / returns.var(correction=0).clamp_min(1e-8)
    return {
        "value_mean": values.mean().item(),
        "return_mean": returns.mean().item(),
        "explained_variance": (1 - unexplained).item(),
    }
