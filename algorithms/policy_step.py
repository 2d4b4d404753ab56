"""The optimizer step of a policy, shared by PPO and GRPO, with the check that the first ratio is 1."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .config.common import OptimizerConfig, RolloutConfig
from .extensions import check_shape, load_function
from .losses.aggregation import Aggregation, Segments, token_weights
from .micro_batch import Passes
from .roles.learner import Learner, Stats
from .roles.nonfinite import check_finite
from .roles.role import Readout, target_logprobs


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
    first_ratio_limit: float,
    entropy_coef: float = 0.0,
    extra_losses: Sequence[tuple[Batch, Readout]] = (),
    counts: Mapping[str, int] | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """One optimizer step of the policy on a minibatch: its weighted token losses minus the entropy bonus.

    Args:
        batch: with the loss weights of the minibatch (`set_loss_weights`).
        token_losses: (micro-batch, logprobs, old logprobs) -> terms, differentiable in the logprobs.
        stats: further sums that the losses add to.
        first: this is the first step of the update, so every ratio must be 1 (`check_first_ratio`).
        first_ratio_limit: largest distance of these ratios from 1 on CUDA; on the CPU it must be 0.
        extra_losses: further batches that join the step, each with its own loss.
        counts: divisors of statistics that are not means over the minibatch's targets.

    Returns:
        (statistics of the losses, metrics of `Learner.step`).

    Raises:
        RuntimeError: a ratio before the first step of the update is further from 1.
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

    step = actor.step(batch, loss, stats, samples=samples, extra_losses=extra_losses)
    sums = stats.reduce(actor.mesh)
    extremes = {name: sums.pop(name) for name in ("ratio_max", "ratio_min", "sampler_mismatch_max") if name in sums}
    if "ratio_min" in extremes:
        extremes["ratio_min"] *= -1
    if first and not step.get("skipped"):
        extremes["first_ratio_error"] = check_first_ratio(extremes, first_ratio_limit, actor.mesh.device)
    return {name: value / (counts or {}).get(name, targets) for name, value in sums.items()} | extremes, step


def check_first_ratio(extremes: Mapping[str, float], limit: float, device: torch.device) -> float:
    """The largest distance from 1 of the ratios before the first step of an update: at most `limit` on CUDA, else 0.

    Old logprobs come from the micro-batches of the update itself. On the CPU the same forward gives the same bits; on
    CUDA cuBLAS and NCCL choose their algorithms, perhaps another one for an equal call.

    Raises:
        RuntimeError: a ratio is further from 1; names the smallest and the largest.
    """
    low, high = extremes.get("ratio_min", 1.0), extremes.get("ratio_max", 1.0)
    error, allowed = max(abs(low - 1), abs(high - 1)), limit if device.type == "cuda" else 0.0
    if not error <= allowed:  # NaN too
        raise RuntimeError(
            f"the ratios before the first step of an update are up to {error:.3g} from 1 (they lie in [{low}, {high}]);"
            f" allowed is {allowed:g} (first_ratio_limit on CUDA, 0 on the CPU). The old logprobs are not those of the"
            " actor in the micro-batches of the update: other weights, temperature, samples or kernels computed them"
        )
    return error


def single_update(passes: Passes) -> bool:
    """Whether a batch is used for one optimizer step, so that old logprobs and values are those of its own forward."""
    return passes.epochs == passes.minibatches == 1


def truncated(rollout: RolloutConfig) -> bool:
    """Whether top-k, top-p or a minimum length truncate the sampler's distribution, so that it is not the actor's."""
    return rollout.top_k > 0 or rollout.top_p < 1 or rollout.min_new_tokens > 0


def without_unscored(batch: Batch, scores: Tensor) -> Batch:
    """The batch with these scores [samples]; samples whose score is NaN lose their targets and count in no statistic.

    Call it before the actor's first pass: all of its passes must see the same targets.

    Raises:
        ValueError: every score is NaN.
    """
    scored, batch = ~scores.isnan(), batch.with_(scores=scores.to(batch.tokens.device))
    if scored.all():
        return batch
    if not scored.any():
        raise ValueError("no response of the step has a score: nothing is left to learn from")
    kept = scored.cpu().repeat_interleave(torch.tensor(batch.lengths)).to(batch.mask.device)  # [total]
    return batch.with_(mask=batch.mask & kept)


def target_count(batch: Batch, samples: Sequence[int]) -> int:
    """Response tokens of a minibatch over all DP ranks; at least 1, since losses are divided by it."""
    return max(1, int(batch.mask[batch.places(samples)].sum()))


def set_loss_weights(batch: Batch, samples: Sequence[int], how: Aggregation, rollout: RolloutConfig) -> Batch:
    """The batch with loss weights for a minibatch's tokens, in units of 1 / its targets; none where all are 1."""
    if how == "token-mean":
        return batch
    places = batch.places(samples)
    lengths = torch.tensor([batch.lengths[i] for i in samples])
    segments = Segments.of_lengths(lengths, batch.mask[places])
    weights = token_weights(segments, how, constant=float(rollout.max_new_tokens)) * target_count(batch, samples)
    return batch.with_(weights=torch.zeros(len(batch.tokens), device=weights.device).index_copy(0, places, weights))


def apply_loss_weights(losses: Tensor, part: Batch) -> Tensor:
    """[targets]: the losses times their weights; their sum over the number of targets is the loss."""
    return losses if part.weights is None else losses * part.weights[part.response]


def user_losses(
    spec: str, logprobs: Tensor, old: Tensor, d: Tensor, advantages: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ratio, clipped) of each target by a user's function, which clips nothing; d is the log-ratio.

    Raises:
        ValueError: losses of another shape or dtype, or without a gradient in `logprobs`.
    """
    losses = check_shape(spec, "losses", load_function(spec)(logprobs, old, advantages, segments.sample), logprobs)
    if len(losses) and logprobs.requires_grad and not losses.requires_grad:
        raise ValueError(f"{spec}: losses must depend on logprobs; they have no gradient, so nothing would be learned")
    return losses, d.detach().exp(), torch.zeros_like(d)


def check_estimate(
    spec: str, name: str, numbers: Tensor, batch: Batch, given: Sequence[Tensor], optimizer: OptimizerConfig
) -> None:
    """Refuses numbers [total] of a user's estimator that are not finite at targets.

    Not where the step may be skipped, or where the numbers that it was `given` are not finite either: the update names
    those.

    Raises:
        ValueError: names the function and the first such sample.
    """
    if optimizer.on_nonfinite == "stop" and all(own.isfinite().all() for own in given):
        sample = batch.target_segments.sample
        check_finite(numbers[batch.response], f"{name} of {spec}", lambda i: batch.name(int(sample[i])))


def kl_metrics(batch: Batch, kl: Tensor, logprobs: Tensor) -> dict[str, float]:
    """KL to the reference: nats a sequence by the chosen estimator `kl` [total], and nats a token by k1."""
    assert batch.ref_logprobs is not None
    return {
        "kl": batch.segments.sums(kl).sum().item() / batch.segments.filled,
        "kl_per_token": (logprobs - batch.ref_logprobs)[batch.response].mean().item(),
    }


def sampler_mismatch(batch: Batch, rollout: RolloutConfig) -> dict[str, float]:
    """Mean and largest distance of the sampler's logprobs from the actor's, where the batch has both untruncated."""
    if batch.logprobs is None or batch.rollout_logprobs is None or truncated(rollout):
        return {}
    difference = (batch.logprobs - batch.rollout_logprobs)[batch.response].abs()
    return {"sampler_mismatch": difference.mean().item(), "sampler_mismatch_max": difference.max().item()}


def mean_metrics(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of the steps' metrics, extremes of their extremes, and the number of skipped steps."""
    reduce = {"ratio_max": max, "ratio_min": min} | dict.fromkeys(("skipped", "actor_skipped", "critic_skipped"), sum)
    names = dict.fromkeys(name for metrics in history for name in metrics)
    named = {name: [metrics[name] for metrics in history if name in metrics] for name in names}
    return {name: reduce.get(name, statistics.fmean)(values) for name, values in named.items()}
