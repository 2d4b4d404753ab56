"""Proximal policy optimization (https://arxiv.org/abs/1707.06347) as RLHF uses it (https://arxiv.org/abs/2203.02155).

One batch goes through `score` (rewards, reference logprobs, values), `with_advantages` and `update`. Everything that is
a statistic of the batch is a local computation, for every rank holds the whole batch.
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
    mean_metrics,
    policy_step,
    sampler_mismatch,
    set_loss_weights,
    single_update,
    target_count,
    truncated,
    without_unscored,
)
from .rewards.rewards import Rewards
from .roles.learner import Learner, Roles, Stats
from .roles.role import target_logprobs
from .rollout.source import Rollouts


def score(rollouts: Rollouts, roles: Roles, rewards: Rewards, config: PPOConfig) -> Batch:
    """The batch of these rollouts: rewards, reference logprobs, and values and logprobs before the update."""
    batch = rollouts.batch(config.ppo, config.run.seed).to(roles.actor.mesh.device)
    with roles.profiler("score", tokens=len(batch.tokens)):
        batch = without_unscored(batch, torch.tensor(rewards(rollouts.samples, batch).shaped))
        return with_passes(batch, roles, config)


def with_passes(batch: Batch, roles: Roles, config: PPOConfig) -> Batch:
    """Fills in reference logprobs, values and the actor's own logprobs.

    The passes of actor and critic are left out where one pass over the batch makes old and new equal by definition. The
    KL penalty then takes the sampler's logprobs, which are of the same weights. Where top-k, top-p or a least length
    cut the sampler's distribution those would not do, and the actor's pass is run.
    """
    assert roles.reference is not None and roles.critic is not None
    batch = batch.with_(ref_logprobs=roles.reference.logprobs(batch))
    if not single_update(config.ppo) or config.ppo.advantage_estimator != "gae":  # which may mix the batch's samples
        batch = batch.with_(values=roles.critic.values(batch))
    if single_update(config.ppo) and not truncated(config.rollout) and not config.ppo.tis_clip:
        return batch
    return batch.with_(logprobs=roles.actor.logprobs(batch))


def with_advantages(batch: Batch, config: PPOConfig, kl: KLController) -> tuple[Batch, dict[str, float]]:
    """Token rewards, then advantages and returns; the KL penalty's weight moves on.

    A batch that is used once has no values yet: they come from the critic's own step, and `update` goes on from there.
    """
    assert batch.scores is not None
    batch, metrics = with_rewards(batch, batch.scores, config, kl.coef)
    kl.update(metrics["kl"], len(batch))
    if batch.values is None:
        return batch, metrics
    batch, more = with_gae(batch, config)
    return batch, metrics | more


def with_rewards(batch: Batch, scores: Tensor, config: PPOConfig, kl_coef: float) -> tuple[Batch, dict[str, float]]:
    """Token rewards: r_t = −β·kl_t + 1[t is the last token]·score.

    Args:
        scores: [samples] fp32, one reward for each response; of samples without targets none is used.
        kl_coef: β.
    """
    assert batch.ref_logprobs is not None and batch.rollout_logprobs is not None
    logprobs = batch.rollout_logprobs if batch.logprobs is None else batch.logprobs
    options, segments = config.ppo, batch.segments
    limits = options.kl_input_limit, options.kl_output_limit
    kl = kl_estimate(logprobs, batch.ref_logprobs, options.kl_estimator, *limits)  # [total]
    rewards = token_rewards(scores.to(kl), kl, segments, kl_coef, clip=config.reward.token_clip)
    metrics = {
        "kl": segments.sums(kl).sum().item() / segments.filled,  # nats a sequence, by the chosen estimator
        "kl_per_token": (logprobs - batch.ref_logprobs)[batch.response].mean().item(),
        "kl_coef": kl_coef,
    }
    return batch.with_(rewards=rewards), metrics | sampler_mismatch(batch, config.rollout)


def advantages_of(batch: Batch, values: Tensor, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Advantages and returns, [total] each; by GAE a sample's depend on no other sample."""
    assert batch.rewards is not None
    options, spec = config.ppo, config.ppo.advantage_estimator
    if spec == "gae":
        how = options.gamma, options.lam, options.turn_gaps
        return gae(batch.rewards, values, batch.segments, batch.cu_seqlens, *how)
    estimate = load_function(spec)
    advantages, returns = estimate(batch.rewards, values, batch.mask, batch.cu_seqlens, options.gamma, options.lam)
    return check_shape(spec, "advantages", advantages, values), check_shape(spec, "returns", returns, values)


def with_gae(batch: Batch, config: PPOConfig) -> tuple[Batch, dict[str, float]]:
    """Advantages and returns by GAE; the advantages whitened over the batch's response tokens."""
    assert batch.values is not None
    advantages, returns = advantages_of(batch, batch.values, config)
    residual = (returns - batch.values)[batch.response]
    spread = returns[batch.response].var(correction=0)
    metrics = {
        "value_mean": batch.values[batch.response].mean().item(),
        "return_mean": returns[batch.response].mean().item(),
        "explained_variance": (1 - residual.var(correction=0) / spread.clamp_min(1e-8)).item(),
    }
    if config.ppo.whiten != "off":
        advantages = whiten(advantages, batch.segments, config.ppo.whiten)
    return batch.with_(advantages=advantages, returns=returns), metrics


def update(
    roles: Roles, batch: Batch, config: PPOConfig, step: int = 0, documents: Sequence[Sequence[int]] = ()
) -> dict[str, float]:
    """All epochs and minibatches; returns the means of their metrics (extremes of extremes).

    Losses are weighted by the response tokens of the whole minibatch, so micro-batches and layout do not change them.
    Where the batch has no values yet, for there is one pass over it, the critic's step comes first and gives them.

    Args:
        batch: with token rewards.
        step: of the run: only the critic learns in the first critic.warmup_steps.
        documents: of the pretraining mix, the same on every rank; they join every minibatch.

    Raises:
        RuntimeError: a ratio before the first step of the update is not exactly 1.
    """
    assert roles.critic is not None
    history: list[dict[str, float]] = []
    learned, metrics = None, {}
    with roles.profiler("update", tokens=len(batch.tokens), epochs=config.ppo.epochs):
        if batch.values is None:
            assert single_update(config.ppo)
            learned, values = critic_step(roles.critic, batch, batch.minibatches[0][0], config)
            batch = batch.with_(values=values)
        if batch.advantages is None:
            batch, metrics = with_gae(batch, config)
        for samples in chain(*batch.minibatches):
            history.append(learned or critic_step(roles.critic, batch, samples, config)[0])
            if step >= config.critic.warmup_steps:
                first = len(history) == 1
                history[-1] |= actor_step(roles.actor, batch, samples, config, documents, first=first)
    return metrics | mean_metrics(history)


def loss_weights(batch: Batch, samples: Sequence[int], config: PPOConfig) -> Batch:
    """The batch with the weights of a minibatch's tokens under `ppo.loss_aggregation`."""
    return set_loss_weights(batch, samples, config.ppo.loss_aggregation, float(config.rollout.max_new_tokens))


def policy_losses(
    logprobs: Tensor, old: Tensor, advantages: Tensor, segments: Segments, options: ActorConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ratio, clipped) of each target, all [targets]; whole samples only. Differentiable in `logprobs`.

    Args:
        segments: of the targets.
    """
    d = log_ratio(logprobs, old, options.log_ratio_limit)
    if options.policy_loss == "clip":
        return ppo_loss(d, advantages, options.clip_low, options.clip_high, options.dual_clip)
    losses = load_function(options.policy_loss)(logprobs, old, advantages, segments.sample)
    return check_shape(options.policy_loss, "losses", losses, logprobs), d.detach().exp(), torch.zeros_like(d)


def critic_step(
    critic: Learner, batch: Batch, samples: Sequence[int], config: PPOConfig
) -> tuple[dict[str, float], Tensor]:
    """One step on the clipped value loss; returns its metrics and the values before it, [total] fp32.

    Where the batch has no old values they are this forward's own, and so are the returns made of them: a sample's
    returns need the values of no other.
    """
    stats, options, targets = Stats(), config.critic, target_count(batch, samples)
    weighted = loss_weights(batch, samples, config)
    seen: list[Tensor] = []

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        at = part.response
        values = critic.model.scores(hidden[at - 1])
        seen.append(values.detach())
        old = part.scatter(values.detach()) if part.values is None else part.values
        returns = advantages_of(part, old, config)[1] if part.returns is None else part.returns
        losses, clipped = value_loss(values, old[at], returns[at], options.value_clip, options.loss_coef)
        losses = apply_loss_weights(losses, part)
        stats.add(value_loss=losses, value_clip_fraction=clipped)
        return losses.sum() / targets

    step = critic.step(weighted, loss, stats, samples=samples)
    means = {name: value / targets for name, value in stats.reduce(critic.mesh).items()}
    return means | {f"critic_{name}": value for name, value in step.items()}, critic.gather_targets(
        batch, samples, seen
    )


def actor_step(
    actor: Learner,
    batch: Batch,
    samples: Sequence[int],
    config: PPOConfig,
    documents: Sequence[Sequence[int]] = (),
    *,
    first: bool,
) -> dict[str, float]:
    """One step on the clipped policy loss, the entropy bonus and the pretraining mix.

    Args:
        first: no step of this update has been made yet, so every ratio must be exactly 1.
    """
    stats = Stats()

    def token_losses(part: Batch, logprobs: Tensor, old: Tensor) -> TokenLosses:
        assert part.advantages is not None and part.rollout_logprobs is not None
        at = part.response
        losses, ratio, clipped = policy_losses(logprobs, old, part.advantages[at], part.target_segments, config.actor)
        if config.ppo.tis_clip:  # truncated importance sampling: the sampler is not quite the actor
            losses = losses * torch.exp(old - part.rollout_logprobs[at]).clamp_max(config.ppo.tis_clip)
        return TokenLosses(losses, ratio, clipped)

    mix = pack(documents).to(actor.mesh.device) if documents else None

    def ptx_loss(part: Batch, hidden: Tensor) -> Tensor:
        assert mix is not None
        logprobs, _ = target_logprobs(actor.model, part, hidden, temperature=1.0)
        stats.add(ptx_loss=-logprobs)
        return -config.actor.ptx_coef * logprobs.sum() / len(mix.response)

    metrics, step = policy_step(
        actor,
        batch,
        samples,
        token_losses,
        stats,
        config.rollout,
        first=first,
        aggregation=config.ppo.loss_aggregation,
        constant=float(config.rollout.max_new_tokens),
        entropy_coef=config.actor.entropy_coef,
        also=[(mix, ptx_loss)] if mix else [],
        counts={"ptx_loss": len(mix.response)} if mix else {},
    )
    return metrics | {f"actor_{name}": value for name, value in step.items()}
