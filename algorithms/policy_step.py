"""The policy's optimizer step, of PPO and GRPO alike, with the check that the first ratios are exactly 1."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .config.common import RolloutConfig
from .losses.aggregation import Aggregation, Segments, token_weights
from .micro_batch import Passes
from .roles.learner import Learner, Stats
from .roles.role import Readout, target_logprobs


def single_update(passes: Passes) -> bool:
    """True where the weights do not change before the last use of the batch: old and new logprobs, and old and new
    values, are one forward."""
    return passes.epochs == passes.minibatches == 1


def truncated(rollout: RolloutConfig) -> bool:
    """Whether the sampler's logprobs speak of a distribution that is cut: not the actor's."""
    return rollout.top_k > 0 or rollout.top_p < 1 or rollout.min_new_tokens > 0


def sampler_mismatch(batch: Batch, rollout: RolloutConfig) -> dict[str, float]:
    """How far the sampler's logprobs are from the actor's, where both are known and of the same distribution."""
    if batch.logprobs is None or batch.rollout_logprobs is None or truncated(rollout):
        return {}
    difference = (batch.logprobs - batch.rollout_logprobs)[batch.response].abs()
    return {"sampler_mismatch": difference.mean().item(), "sampler_mismatch_max": difference.max().item()}


def target_count(batch: Batch, samples: Sequence[int]) -> int:
    """Response tokens of a minibatch, over all DP ranks; 1 where there are none, for it divides."""
    return max(1, int(batch.mask[batch.places(samples)].sum()))


def set_loss_weights(batch: Batch, samples: Sequence[int], how: Aggregation, constant: float = 1.0) -> Batch:
    """The batch with the weights of a minibatch's tokens, as multiples of 1 / its targets; none where all are 1."""
    if how == "token-mean":
        return batch
    places = batch.places(samples)
    lengths = torch.tensor([batch.lengths[i] for i in samples])
    segments = Segments.of_lengths(lengths, batch.mask[places])
    weights = token_weights(segments, how, constant=constant) * target_count(batch, samples)
    return batch.with_(weights=torch.zeros(len(batch.tokens), device=weights.device).index_copy(0, places, weights))


def apply_loss_weights(losses: Tensor, part: Batch) -> Tensor:
    """[targets]: the losses times their weights; their sum over 1 / targets is the loss."""
    return losses if part.weights is None else losses * part.weights[part.response]


def without_unscored(batch: Batch, scores: Tensor) -> Batch:
    """The batch with these scores [samples]; samples whose score is NaN have no targets: they count in no loss and no
    statistic.

    To be called before the first pass of the actor, for all its passes must see the same targets.

    Raises:
        ValueError: no sample is left.
    """
    there, batch = ~scores.isnan(), batch.with_(scores=scores.to(batch.tokens.device))
    if there.all():
        return batch
    if not there.any():
        raise ValueError("every answer of the step is without a score: nothing is left to learn from")
    lengths = torch.tensor(batch.lengths)
    keep = there.cpu().repeat_interleave(lengths).to(batch.mask.device)
    mask = batch.mask & keep
    return batch.with_(mask=mask)


class TokenLosses(NamedTuple):
    """Terms of the policy loss at a micro-batch's targets, [targets] each."""

    losses: Tensor
    ratio: Tensor
    clipped: Tensor  # 1 where the clip decides
    penalty: Tensor | None = None  # added to the losses, not to the reported policy loss


def policy_step(
    actor: Learner,
    batch: Batch,
    samples: Sequence[int],
    token_losses: Callable[[Batch, Tensor, Tensor], TokenLosses],
    stats: Stats,
    rollout: RolloutConfig,
    *,
    first: bool,
    aggregation: Aggregation,
    constant: float = 1.0,
    entropy_coef: float = 0.0,
    also: Sequence[tuple[Batch, Readout]] = (),
    counts: Mapping[str, int] | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """One optimizer step of the policy on a minibatch: its token losses, weighted, less the entropy bonus.

    Args:
        token_losses: (micro-batch, logprobs, old logprobs) -> its terms; differentiable in the logprobs.
        stats: further sums that the losses add to.
        first: no step of this update has been made yet, so every ratio must be exactly 1.
        also: further batches that join the step, each with its own loss.
        counts: divisors of sums that are no means over the minibatch's targets.

    Returns:
        (statistics of the losses, metrics of `Learner.step`).

    Raises:
        RuntimeError: a ratio before the first step of the update is not exactly 1.
    """
    targets = target_count(batch, samples)

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        assert part.rollout_logprobs is not None
        logprobs, entropy = target_logprobs(actor.model, part, hidden, actor.temperature)  # [targets] each
        old = logprobs.detach() if part.logprobs is None else part.logprobs[part.response]
        losses, ratio, clipped, penalty = token_losses(part, logprobs, old)
        stats.add(
            policy_loss=apply_loss_weights(losses, part),
            clip_fraction=clipped,
            entropy=entropy,
            approx_kl=old - logprobs,
        )
        stats.largest(ratio_max=ratio, ratio_min=-ratio)
        if part.logprobs is None and not truncated(rollout):
            mismatch = (logprobs - part.rollout_logprobs[part.response]).abs()
            stats.add(sampler_mismatch=mismatch)
            stats.largest(sampler_mismatch_max=mismatch)
        if penalty is not None:
            losses = losses + penalty
        return apply_loss_weights(losses - entropy_coef * entropy, part).sum() / targets

    weighted = set_loss_weights(batch, samples, aggregation, constant)
    step = actor.step(weighted, loss, stats, samples=samples, also=also)
    sums = stats.reduce(actor.mesh)
    extremes = {name: sums.pop(name) for name in ("ratio_max", "ratio_min", "sampler_mismatch_max") if name in sums}
    if "ratio_min" in extremes:
        extremes["ratio_min"] *= -1
    if first and not step.get("skipped"):
        check_first_ratio(extremes)
    return {name: value / (counts or {}).get(name, targets) for name, value in sums.items()} | extremes, step


def check_first_ratio(extremes: Mapping[str, float]) -> None:
    """Refuses ratios before the first step of an update that are not exactly 1.

    Raises:
        RuntimeError: they are not.
    """
    if any(extremes.get(name, 1.0) != 1.0 for name in ("ratio_min", "ratio_max")):
        raise RuntimeError(
            f"the ratios before the first step of an update lie in [{extremes['ratio_min']}, {extremes['ratio_max']}],"
            " not at exactly 1: old logprobs are not those of the actor in the micro-batches of the update"
        )


def mean_metrics(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The means of the steps' metrics, the extremes of their extremes, how many were skipped."""
    reduce = {"ratio_max": max, "ratio_min": min} | dict.fromkeys(("skipped", "actor_skipped", "critic_skipped"), sum)
    names = dict.fromkeys(name for metrics in history for name in metrics)
    named = {name: [metrics[name] for metrics in history if name in metrics] for name in names}
    return {name: reduce.get(name, statistics.fmean)(values) for name, values in named.items()}
