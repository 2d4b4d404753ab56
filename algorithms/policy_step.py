"""What PPO and GRPO share: who computes what of a batch of answers, the weights of its tokens, and the first ratio."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..engine.mesh import Mesh
from .batch import Batch, deal_micro_batches
from .config.common import RolloutConfig
from .losses.aggregation import Aggregation, Segments, token_weights
from .roles.role import Share


class Passes(Protocol):
    """How often a batch is used, and in what pieces."""

    @property
    def epochs(self) -> int: ...
    @property
    def minibatches(self) -> int: ...
    @property
    def micro_batch_size(self) -> int: ...
    @property
    def micro_batch_tokens(self) -> int: ...


class Minibatch(NamedTuple):
    """What one optimizer step learns from."""

    samples: list[int]  # of all DP ranks
    shares: list[Share]  # this DP rank's, cut into micro-batches


def plan(batch: Batch, passes: Passes, mesh: Mesh, seed: int) -> list[list[Minibatch]]:
    """The minibatches of each epoch: the batch shuffled and cut, each part dealt to the DP ranks and cut again.

    Which samples make up a minibatch depends on the seed alone, not on the layout.
    """
    generator = torch.Generator().manual_seed(seed)
    size = len(batch) // passes.minibatches
    assert size * passes.minibatches == len(batch)

    def minibatch(samples: list[int]) -> Minibatch:
        sizes = (passes.micro_batch_size, passes.micro_batch_tokens)
        return Minibatch(samples, deal_micro_batches(samples, batch.lengths, mesh.dp, *sizes))

    epochs = []
    for _ in range(passes.epochs):
        order = torch.randperm(len(batch), generator=generator).tolist()
        epochs.append([minibatch(order[i : i + size]) for i in range(0, len(batch), size)])
    return epochs


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


def segments_of(batch: Batch) -> Segments:
    """The batch's samples and their targets, over all its tokens."""
    return Segments.of_lengths(torch.tensor(batch.lengths), batch.mask)


def target_segments(batch: Batch) -> Segments:
    """The batch's samples over its targets alone, [targets]."""
    sample = torch.bucketize(batch.response, batch.cu_seqlens[1:].long(), right=True)
    return Segments(torch.ones_like(sample, dtype=torch.bool), sample, len(batch))


def target_count(batch: Batch, minibatch: Minibatch) -> int:
    """Response tokens of a minibatch, over all DP ranks; 1 where there are none, for it divides."""
    return max(1, int(batch.mask[batch.rows(minibatch.samples)].sum()))


def set_loss_weights(batch: Batch, minibatch: Minibatch, how: Aggregation, constant: float = 1.0) -> Batch:
    """The batch with the weights of a minibatch's tokens, as multiples of 1 / its targets; none where all are 1."""
    if how == "token-mean":
        return batch
    rows = batch.rows(minibatch.samples)
    lengths = torch.tensor([batch.lengths[i] for i in minibatch.samples])
    segments = Segments.of_lengths(lengths, batch.mask[rows])
    made = token_weights(segments, how, constant=constant) * target_count(batch, minibatch)
    return batch.with_(weights=torch.zeros(len(batch.tokens), device=made.device).index_copy(0, rows, made))


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
