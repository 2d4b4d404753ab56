"""Kahneman-Tversky optimization (https://arxiv.org/abs/2402.01306), one update on answers that are wanted or not.

The reference point z is the mean log-ratio of answers put to other rows' prompts, at least 0. Each row's partner is
the next row of its pool that answers another prompt, whatever the batch, so z's samples exist for odd batches, one row
a rank and any layout; z itself is the mean over the whole batch, of all DP ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import Batch
from .config.preference import KTOLoss
from .data.dialogues import Sample, pack_samples
from .dpo import response_logprobs
from .losses.preference import kto_loss, kto_reference, ranked_right
from .roles.learner import Learner, Stats
from .roles.role import Role, target_logprobs


def pack_labeled(samples: Sequence[Sample], labels: Sequence[bool]) -> Batch:
    """The batch of these answers; the reward at each last token is +1 where the answer is wanted, else -1."""
    batch = pack_samples(samples)
    rewards = torch.zeros(len(batch.tokens))
    rewards[batch.last] = torch.tensor([1.0 if label else -1.0 for label in labels])
    return batch.with_(rewards=rewards)


def sums_of(role: Role, samples: Sequence[Sample], batch_size: int) -> Tensor:
    """[samples] fp32: log-probability of each response, the same on every rank. Collective.

    Args:
        batch_size: responses of one pass.
    """
    sums = []
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        batch = pack_labeled(part, [True] * len(part)).to(role.mesh.device)
        sums.append(response_logprobs(role, batch))
    return torch.cat(sums).cpu()


def reference_point(role: Role, samples: Sequence[Sample], reference: Tensor, batch_size: int) -> float:
    """z of a batch: `samples` are its mismatched answers, `reference` [samples] their log-probability there."""
    return kto_reference(sums_of(role, samples, batch_size) - reference).item()


def kto_step(learner: Learner, batch: Batch, loss: KTOLoss, reference_point: float) -> dict[str, float]:
    """One optimizer step on labeled answers with their reference (dpo.with_reference).

    Returns:
        loss; rewards β·log-ratio of the two kinds and their difference, margin; kl, the reference point; and what
        `Learner.step` gives.
    """
    stats, count = Stats(), len(batch)

    def read(part: Batch, hidden: Tensor) -> Tensor:
        assert part.ref_logprobs is not None and part.rewards is not None
        logprobs, _ = target_logprobs(learner.model, part, hidden, learner.temperature)
        ratios = part.target_segments.sums(logprobs) - part.ref_logprobs[part.last]
        wanted = part.rewards[part.last] > 0
        losses = kto_loss(ratios, wanted, reference_point, loss.beta, loss.desirable_weight, loss.undesirable_weight)
        rewards = loss.beta * ratios
        stats.add(loss=losses, wanted=wanted.float(), chosen=rewards * wanted, rejected=rewards * ~wanted)
        return losses.sum() / count

    step = learner.step(batch, read, stats)
    sums = stats.reduce(learner.mesh)
    return summary(sums, count) | {"kl": reference_point} | step


def summary(sums: dict[str, float], count: int) -> dict[str, float]:
    """Means out of sums; of a kind that the batch has none of there is no mean."""
    wanted = sums["wanted"]
    metrics = {"loss": sums["loss"] / count}
    if wanted:
        metrics["chosen"] = sums["chosen"] / wanted
    if count - wanted:
        metrics["rejected"] = sums["rejected"] / (count - wanted)
    if wanted and count - wanted:
        metrics["margin"] = metrics["chosen"] - metrics["rejected"]
    return metrics


def held_out(role: Role, batch: Batch, loss: KTOLoss) -> dict[str, float]:
    """Of labeled answers that are not learned from: eval_margin, and eval_accuracy, how often a wanted answer's
    implicit reward is above an unwanted one's (the area under the ROC curve). The same on every rank."""
    assert batch.ref_logprobs is not None and batch.rewards is not None
    ratios = (response_logprobs(role, batch) - batch.ref_logprobs[batch.last]).double()
    wanted = batch.rewards[batch.last] > 0
    good, bad = loss.beta * ratios[wanted], loss.beta * ratios[~wanted]
    if not len(good) or not len(bad):
        return {}
    above = ranked_right(good[:, None], bad[None])
    return {"eval_margin": (good.mean() - bad.mean()).item(), "eval_accuracy": above.mean().item()}
