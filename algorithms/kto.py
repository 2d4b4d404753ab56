"""Kahneman-Tversky optimization (https://arxiv.org/abs/2402.01306): one optimizer step on responses with a label.

The reference point z is the mean log-ratio of responses paired with other rows' prompts, at least 0. Each row's partner
is the next row of its pool with another prompt, independent of the batch, so z has samples for odd batches, one row a
rank and any layout; it is a mean over the whole batch of all DP ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import Batch
from .config.preference import KTOLoss
from .data.dialogues import Sample, pack_samples
from .dpo import reference_sums, response_logprobs
from .losses.preference import kto_loss, kto_reference, ranked_right
from .roles.learner import Learner, Stats
from .roles.role import Role, target_logprobs


def pack_labeled(samples: Sequence[Sample], labels: Sequence[bool]) -> Batch:
    """The batch of these responses; the reward at each last token is +1 for a desirable one, else -1."""
    batch = pack_samples(samples)
    rewards = torch.zeros(len(batch.tokens))
    rewards[batch.last] = torch.tensor([1.0 if label else -1.0 for label in labels])
    return batch.with_(rewards=rewards)


def reference_point(role: Role, samples: Sequence[Sample], reference: Tensor, batch_size: int) -> float:
    """z of a batch: `samples` are its mismatched responses, `reference` [samples] their reference log-probabilities."""
    return kto_reference(reference_sums(role, samples, batch_size, pack_samples) - reference).item()


def kto_step(learner: Learner, batch: Batch, loss: KTOLoss, reference_point: float) -> dict[str, float]:
    """One optimizer step on labeled responses with their reference (dpo.with_reference).

    Returns:
        loss; chosen and rejected, the mean reward β·log-ratio of either label, and margin, their difference; kl, the
        reference point; and the metrics of `Learner.step`.
    """
    stats, count = Stats(), len(batch)

    def read(part: Batch, hidden: Tensor) -> Tensor:
        assert part.ref_logprobs is not None and part.rewards is not None
        logprobs, _ = target_logprobs(learner.model, part, hidden, learner.temperature)
        ratios = part.target_segments.sums(logprobs) - part.ref_logprobs[part.last]
        desirable = part.rewards[part.last] > 0
        losses = kto_loss(ratios, desirable, reference_point, loss.beta, loss.desirable_weight, loss.undesirable_weight)
        rewards = loss.beta * ratios
        stats.add(loss=losses, desirable=desirable.float(), chosen=rewards * desirable, rejected=rewards * ~desirable)
        return losses.sum() / count

    step = learner.step(batch, read, stats)
    return summary(stats.reduce(learner.mesh), count) | {"kl": reference_point} | step


def summary(sums: dict[str, float], count: int) -> dict[str, float]:
    """Means out of sums; without a response of one label its mean and the margin are left out."""
    desirable = sums["desirable"]
    metrics = {"loss": sums["loss"] / count}
    if desirable:
        metrics["chosen"] = sums["chosen"] / desirable
    if count - desirable:
        metrics["rejected"] = sums["rejected"] / (count - desirable)
    if desirable and count - desirable:
        metrics["margin"] = metrics["chosen"] - metrics["rejected"]
    return metrics


def kto_eval(role: Role, batch: Batch, loss: KTOLoss) -> dict[str, float]:
    """eval_margin and eval_accuracy of labeled responses of the eval split, on every rank.

    Accuracy is how often a desirable response's implicit reward is above an undesirable one's, the area under the ROC
    curve. Without a response of one label there are no metrics.
    """
    assert batch.ref_logprobs is not None and batch.rewards is not None
    ratios = (response_logprobs(role, batch) - batch.ref_logprobs[batch.last]).double()
    desirable = batch.rewards[batch.last] > 0
    good, bad = loss.beta * ratios[desirable], loss.beta * ratios[~desirable]
    if not len(good) or not len(bad):
        return {}
    above = ranked_right(good[:, None], bad[None])
    return {"eval_margin": (good.mean() - bad.mean()).item(), "eval_accuracy": above.mean().item()}
