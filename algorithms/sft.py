"""Supervised fine-tuning: −log π(y_t) of what the assistant said, a mean over all target tokens of a step.

The mean is over the whole batch, all DP ranks and micro-batches: neither micro-batches, packing, layout nor the order
of the rows changes the loss.
"""

from __future__ import annotations

from torch import Tensor

from .batch import Batch
from .roles.learner import Learner, Stats
from .roles.role import Role, target_logprobs


def sft_step(learner: Learner, batch: Batch) -> dict[str, float]:
    """One optimizer step on the whole batch.

    Returns:
        loss and entropy in nats a target token, before the step; target_tokens; and what `Learner.step` gives.
    """
    stats, targets = Stats(), len(batch.response)

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        logprobs, entropy = target_logprobs(learner.model, part, hidden, learner.temperature)  # [targets] each
        stats.add(loss=-logprobs, entropy=entropy)
        return -logprobs.sum() / targets

    step = learner.step(batch, loss, stats)
    means = {name: value / targets for name, value in stats.reduce(learner.mesh).items()}
    return means | {"target_tokens": targets} | step


def held_out_loss(role: Role, batch: Batch) -> float:
    """The loss on rows that are not learned from, the same on every rank; nothing is divided by the DP ranks.

    Raises:
        ValueError: it is not finite; names the row.
    """
    return target_nats(role, batch).mean().item()


def target_nats(role: Role, batch: Batch) -> Tensor:
    """[targets] float64: −log π of each target, the same on every rank.

    Raises:
        ValueError: one is not finite; names the row.
    """
    nats = -role.logprobs(batch)[batch.response].double()
    bad = (~nats.isfinite()).nonzero().flatten()
    if len(bad):
        sample = int(batch.target_segments.sample[bad[0]])
        raise ValueError(
            f"{batch.name(sample)}: the model gives it the loss {nats[bad[0]].item()} at a token: must be a finite"
            f" number ({len(bad)} of {len(nats)} are not)"
        )
    return nats
