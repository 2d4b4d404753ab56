"""Reward models: −log σ(r_w − r_l − margin) on pairs (Bradley-Terry), or cross-entropy on labeled steps (PRM).

A pair's scores are read at the last target of each response, its end of turn, as for a rollout; a step's at its own
last token. Losses are means over the whole batch of all DP ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Batch
from .data.dialogues import pack_samples
from .data.preferences import Pair, Steps
from .losses.aggregation import Segments
from .losses.preference import ranked_right, reward_loss
from .roles.learner import Learner, Stats
from .roles.nonfinite import check_finite
from .roles.role import Role

BINS = 10


def pack_pairs(pairs: Sequence[Pair]) -> Batch:
    """Samples chosen, rejected, chosen, rejected, ...; a pair's margin is the reward at the chosen one's last token."""
    batch = pack_samples([side for pair in pairs for side in (pair.chosen, pair.rejected)])
    assert batch.mask[batch.last].all(), "a response without targets"
    margins = torch.zeros(len(batch.tokens))
    margins[batch.last[::2]] = torch.tensor([pair.margin for pair in pairs])
    return batch.with_(rewards=margins, row_sizes=(2,) * len(pairs))


def pack_steps(rows: Sequence[Steps]) -> Batch:
    """Samples whose targets are the last tokens of their steps; the reward there is 1 for a right step, else 0."""
    batch = pack_samples([row.sample for row in rows])
    labels = torch.tensor([float(label) for row in rows for label in row.labels])
    return batch.with_(rewards=batch.scatter(labels))


def pair_step(learner: Learner, batch: Batch, center_coef: float) -> dict[str, float]:
    """One optimizer step on pairs.

    Returns:
        loss; accuracy, the fraction of pairs whose chosen response scores higher (a tie is half); chosen and rejected,
        the mean scores; and the metrics of `Learner.step`.
    """
    stats, pairs = Stats(), len(batch) // 2

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        assert part.rewards is not None
        scores = learner.model.scores(hidden[part.last])  # [samples]
        chosen, rejected = scores[::2], scores[1::2]
        losses = reward_loss(chosen, rejected, part.rewards[part.last[::2]], center_coef)
        stats.add(loss=losses, accuracy=ranked_right(chosen, rejected), chosen=chosen, rejected=rejected)
        return losses.sum() / pairs

    step = learner.step(batch, loss, stats, unit=2)
    return stats.means(learner.mesh, pairs) | step


def pair_eval(role: Role, batch: Batch, center_coef: float) -> dict[str, float]:
    """`pair_quality` of pairs of the eval split, on every rank.

    Raises:
        ValueError: a score is not finite; names the response.
    """
    assert batch.rewards is not None
    scores = role.scores(batch)
    check_finite(scores, "score", lambda i: f"{batch.name(i)} ({('chosen', 'rejected')[i % 2]})")
    return pair_quality(scores, batch.rewards[batch.last[::2]], center_coef)


def pair_quality(scores: Tensor, margins: Tensor, center_coef: float) -> dict[str, float]:
    """eval_loss, eval_accuracy and eval_calibration of scores [2 pairs], chosen and rejected in turn.

    Calibration is the expected calibration error (https://arxiv.org/abs/1706.04599) of σ(|r_w − r_l|) as the
    probability to be right, in bins of equal width.
    """
    chosen, rejected = scores[::2].double(), scores[1::2].double()
    right = ranked_right(chosen, rejected)
    confidence = torch.sigmoid((chosen - rejected).abs())
    bins = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    bins, order = bins.sort(stable=True)
    ends = torch.searchsorted(bins, torch.arange(BINS + 1, device=bins.device))
    gaps = Segments(torch.ones_like(bins, dtype=torch.bool), ends).sums((right - confidence)[order])  # [bins]
    return {
        "eval_loss": reward_loss(chosen, rejected, margins.double(), center_coef).mean().item(),
        "eval_accuracy": right.mean().item(),
        "eval_calibration": (gaps.abs().sum() / len(right)).item(),
    }


def process_step(learner: Learner, batch: Batch) -> dict[str, float]:
    """One optimizer step on labeled steps: cross-entropy at each one's last token (https://arxiv.org/abs/2305.20050)."""
    stats, count = Stats(), len(batch.response)

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        assert part.rewards is not None
        scores, labels = learner.model.scores(hidden[part.response]), part.rewards[part.response]
        losses = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
        stats.add(loss=losses, accuracy=((scores > 0) == (labels > 0)).float())
        return losses.sum() / count

    step = learner.step(batch, loss, stats)
    return stats.means(learner.mesh, count) | step


def process_eval(role: Role, batch: Batch) -> dict[str, float]:
    """eval_loss and eval_accuracy of labeled steps of the eval split, on every rank.

    Raises:
        ValueError: a score is not finite; names the step.
    """
    assert batch.rewards is not None
    scores, labels = (x[batch.response].double() for x in (role.token_scores(batch), batch.rewards))
    row = batch.target_segments.sample.tolist()  # of each step
    check_finite(scores, "score", lambda i: f"{batch.name(row[i])} (step {row[: i + 1].count(row[i])})")
    losses = F.binary_cross_entropy_with_logits(scores, labels)
    return {"eval_loss": losses.item(), "eval_accuracy": ((scores > 0) == (labels > 0)).double().mean().item()}
