"""Supervised fine-tuning: −log π(y_t), a mean over all target tokens of a step.

The mean is over the whole batch of all DP ranks, so micro-batches, packing, layout and row order do not change it.
"""

from __future__ import annotations

from torch import Tensor

from .batch import Batch
from .roles.learner import Learner, Stats
from .roles.nonfinite import check_finite
from .roles.role import Role, target_logprobs


def sft_step(learner: Learner, batch: Batch) -> dict[str, float]:
    """One optimizer step on the whole batch.

    Returns:
        loss and entropy in nats a target token, before the step; target_tokens; and the metrics of `Learner.step`.
    """
    stats, targets = Stats(), len(batch.response)

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        logprobs, entropy = target_logprobs(learner.model, part, hidden, learner.temperature)  # [targets] each
        stats.add(loss=-logprobs, entropy=entropy)
        return -logprobs.sum() / targets

    step = learner.step(batch, loss, stats)
    return stats.means(learner.mesh, targets) | {"target_tokens": targets} | step


def eval_loss(role: Role, batch: Batch) -> float:
    """The mean loss of rows of the eval split, on every rank; raises as `target_nats`."""
    return target_nats(role, batch).mean().item()


def target_nats(role: Role, batch: Batch) -> Tensor:
    """[targets] float64: −log π of each target, on every rank.

    Raises:
        ValueError: one is not finite; names the row.
    """
    nats = -role.logprobs(batch)[batch.response].double()
    check_finite(nats, "loss of a token", lambda i: batch.name(int(batch.target_segments.sample[i])))
    return nats
