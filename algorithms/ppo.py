"""Proximal policy optimization (https://arxiv.org/abs/1707.06347) as RLHF uses it (https://arxiv.org/abs/2203.02155).

One batch: `score` fills in what the frozen models and the critic think of
it, `with_rewards` and `with_advantages` turn that into advantages, `update` into new weights. Everything that is a
statistic of the batch is a local computation, for every rank holds the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from .advantages import gae, token_rewards, whiten
from .batch import Batch, pack
from .config.ppo import ActorConfig, PPOConfig
from .extensions import check_shape, load_function
from .losses.aggregation import Segments
from .losses.kl import kl_estimate
from .losses.policy import log_ratio, ppo_loss
from .losses.value import value_loss
from .policy_step import (
    apply_loss_weights,
    check_first_ratio,
    mean_metrics,
    sampler_mismatch,
    set_loss_weights,
    single_update,
    target_count,
    truncated,
)
from .roles.role import Learner, Role, Stats, target_logprobs


@dataclass
class Roles:
    """Who takes part; `rewards` are the reward models, in the order of the config."""

    actor: Learner
    critic: Learner
    reference: Role
    rewards: list[Role] = field(default_factory=list)


def score(batch: Batch, roles: Roles, config: PPOConfig) -> Batch:
    """Fills in reference logprobs, values and the actor's own logprobs.

    The passes of actor and critic are left out where one pass over the batch makes old and new equal by definition. The
    KL penalty then takes the sampler's logprobs, which are of the same weights. Where top-k, top-p or a least length
    cut the sampler's distribution those would not do, and the actor's pass is run.
    """
    batch = batch.with_(ref_logprobs=roles.reference.logprobs(batch))
    if not single_update(config.ppo) or config.ppo.advantage_estimator != "gae":  # which may mix the batch's samples
        batch = batch.with_(values=roles.critic.values(batch))
    if single_update(config.ppo) and not truncated(config.rollout) and not config.ppo.tis_clip:
        return batch
    return batch.with_(logprobs=roles.actor.logprobs(batch))


def with_rewards(batch: Batch, scores: Tensor, config: PPOConfig, kl_coef: float) -> tuple[Batch, dict[str, float]]:
    """Token rewards: r_t = −β·kl_t + 1[t is the last token]·score.

    Args:
        scores: [samples] fp32, one reward for each answer; of samples without targets (`without`) none is used.
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


def with_advantages(batch: Batch, config: PPOConfig) -> tuple[Batch, dict[str, float]]:
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
    roles: Roles,
    batch: Batch,
    config: PPOConfig,
    *,
    train_actor: bool = True,
    ptx: Sequence[Sequence[int]] = (),
) -> dict[str, float]:
    """Advantages, then all epochs and minibatches; returns the means of their metrics (extremes of extremes).

    Losses are weighted by the response tokens of the whole minibatch, so micro-batches and layout do not change them.
    Where the batch has no values yet, for there is one pass over it, the critic's step comes first and gives them.

    Args:
        batch: with token rewards.
        train_actor: False while only the critic learns.
        ptx: documents of the pretraining mix, the same on every rank; they join every minibatch.

    Raises:
        RuntimeError: a ratio before the first step of the update is not exactly 1.
    """
    history: list[dict[str, float]] = []
    learned = None
    if batch.values is None:
        assert single_update(config.ppo)
        learned, values = critic_step(roles.critic, batch, batch.minibatches[0][0], config)
        batch = batch.with_(values=values)
    batch, about_values = with_advantages(batch, config)
    for samples in chain(*batch.minibatches):
        metrics = learned or critic_step(roles.critic, batch, samples, config)[0]
        if train_actor:
            metrics |= actor_step(roles.actor, batch, samples, config, ptx, first=not history)
        history.append(metrics)
    return about_values | mean_metrics(history)


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
        old = part.spread(values.detach()) if part.values is None else part.values
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
    ptx: Sequence[Sequence[int]] = (),
    *,
    first: bool,
) -> dict[str, float]:
    """One step on the clipped policy loss, the entropy bonus and the pretraining mix.

    Args:
        first: no step of this update has been made yet, so every ratio must be exactly 1.
    """
    stats, targets = Stats(), target_count(batch, samples)
    weighted = loss_weights(batch, samples, config)

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        assert part.advantages is not None and part.rollout_logprobs is not None
        at = part.response
        logprobs, entropy = target_logprobs(actor.model, part, hidden, actor.temperature)  # [targets] each
        old = logprobs.detach() if part.logprobs is None else part.logprobs[at]
        sampled = part.rollout_logprobs[at]
        losses, ratio, clipped = policy_losses(logprobs, old, part.advantages[at], part.target_segments, config.actor)
        if config.ppo.tis_clip:  # truncated importance sampling: the sampler is not quite the actor
            losses = losses * torch.exp(old - sampled).clamp_max(config.ppo.tis_clip)
        stats.add(
            policy_loss=apply_loss_weights(losses, part),
            clip_fraction=clipped,
            entropy=entropy,
            approx_kl=old - logprobs,
        )
        stats.largest(ratio_max=ratio, ratio_min=-ratio)
        if part.logprobs is None:
            stats.add(sampler_mismatch=(logprobs - sampled).abs())
            stats.largest(sampler_mismatch_max=(logprobs - sampled).abs())
        return apply_loss_weights(losses - config.actor.entropy_coef * entropy, part).sum() / targets

    documents = pack(ptx).to(actor.mesh.device) if ptx else None

    def ptx_loss(part: Batch, hidden: Tensor) -> Tensor:
        assert documents is not None
        logprobs, _ = target_logprobs(actor.model, part, hidden, temperature=1.0)
        stats.add(ptx_loss=-logprobs)
        return -config.actor.ptx_coef * logprobs.sum() / len(documents.response)

    step = actor.step(weighted, loss, stats, samples=samples, also=[(documents, ptx_loss)] if documents else [])
    sums = stats.reduce(actor.mesh)
    extremes = {name: sums.pop(name) for name in ("ratio_max", "ratio_min", "sampler_mismatch_max") if name in sums}
    if "ratio_min" in extremes:
        extremes["ratio_min"] *= -1
    counts = {"ptx_loss": len(documents.response)} if documents else {}
    means = {name: value / counts.get(name, targets) for name, value in sums.items()}
    if first and not step.get("skipped"):
        check_first_ratio(extremes)
    return means | extremes | {f"actor_{name}": value for name, value in step.items()}
