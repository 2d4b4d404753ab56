"""Common parts of PPO's and GRPO's updates: weights of a minibatch's tokens, the check of the first ratio, metrics."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .batch import Batch
from .config.common import RolloutConfig
from .losses.aggregation import Aggregation, Segments, token_weights
from .micro_batch import Passes


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


def without(batch: Batch, scores: Tensor) -> Batch:
    """The batch where samples whose score, [samples], is NaN have no targets: they count in no loss and no statistic.

    To be called before the first pass of the actor, for all its passes must see the same targets.

    Raises:
        ValueError: no sample is left.
    """
    there = ~scores.isnan()
    if there.all():
        return batch
    if not there.any():
        raise ValueError("every answer of the step is without a score: nothing is left to learn from")
    lengths = torch.tensor(batch.lengths)
    keep = there.cpu().repeat_interleave(lengths).to(batch.mask.device)
    mask = batch.mask & keep
    return batch.with_(mask=mask)


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
