"""Reward models: −log σ(r_w − r_l − margin) over pairs (Bradley-Terry), or right steps told from wrong ones.

A pair's score is read at the last target of each response, its end of turn, as that of a rollout is; a step's at its
own last token. Means are over the whole batch, all DP ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Batch
from .data.dialogues import pack_samples
from .data.preferences import Pair, Steps
from .losses.preference import ranked_right, reward_loss
from .roles.learner import Learner, Stats
from .roles.role import Role

BINS = 10


def pack_pairs(pairs: Sequence[Pair]) -> Batch:
    """Samples chosen, rejected, chosen, rejected, ...; a pair's margin stands at its chosen answer's last token."""
    samples = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    batch = pack_samples(samples)
    assert batch.mask[batch.last].all(), "a response without targets"
    margins = torch.zeros(len(batch.tokens))
    margins[batch.last[::2]] = torch.tensor([pair.margin for pair in pairs])
    return batch.with_(rewards=margins, row_sizes=(2,) * len(pairs))


def pack_steps(rows: Sequence[Steps]) -> Batch:
    """Samples whose targets are the last tokens of their steps; the reward there is 1 where the step is right."""
    batch = pack_samples([row.sample for row in rows])
    labels = torch.tensor([float(label) for row in rows for label in row.labels])
    return batch.with_(rewards=batch.scatter(labels))


def pair_step(learner: Learner, batch: Batch, center_coef: float) -> dict[str, float]:
    """One optimizer step on pairs.

    Returns:
        loss, accuracy (share of pairs whose chosen answer scores higher; a tie is half), the mean scores, and what
        `Learner.step` gives.
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
    return {name: value / pairs for name, value in stats.reduce(learner.mesh).items()} | step


def pair_quality(scores: Tensor, margins: Tensor, center_coef: float) -> dict[str, float]:
    """What scores [2 pairs], chosen and rejected in turn, are worth: eval_loss, eval_accuracy and eval_calibration, the
    expected calibration error (https://arxiv.org/abs/1706.04599) of σ(|r_w − r_l|) as the chance to be right."""
    chosen, rejected = scores[::2].double(), scores[1::2].double()
    right = ranked_right(chosen, rejected)
    sure = torch.sigmoid((chosen - rejected).abs())
    bins = ((sure - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64, device=scores.device).index_add(0, bins, right - sure)
    return {
        "eval_loss": reward_loss(chosen, rejected, margins.double(), center_coef).mean().item(),
        "eval_accuracy": right.mean().item(),
        "eval_calibration": (gaps.abs().sum() / len(right)).item(),
    }


def check_scores(scores: Tensor, names: Sequence[str]) -> None:
    """Refuses scores that are no finite numbers.

    Args:
        names: what each score is of, by row; none: it is called by its number.

    Raises:
        ValueError: one is NaN or infinite; names the first and says how many there are.
    """
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        name = names[bad[0]] if names else f"held-out score {bad[0] + 1}"
        raise ValueError(
            f"{name}: the reward model gives it {scores[bad[0]].item()}: must be a finite number"
            f" ({len(bad)} of {len(scores)} held-out scores are not)"
        )


def held_out_pairs(role: Role, batch: Batch, center_coef: float, names: Sequence[str] = ()) -> dict[str, float]:
    """`pair_quality` of pairs that are not learned from, the same on every rank.

    Args:
        names: of the responses, chosen and rejected in turn, for messages.

    Raises:
        ValueError: a score is no finite number.
    """
    assert batch.rewards is not None
    scores = role.scores(batch)
    check_scores(scores, names)
    return pair_quality(scores, batch.rewards[batch.last[::2]], center_coef)


def process_step(learner: Learner, batch: Batch) -> dict[str, float]:
    """One optimizer step on labeled steps: binary cross-entropy at the last token of each
    (https://arxiv.org/abs/2305.20050)."""
    stats, count = Stats(), len(batch.response)

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        assert part.rewards is not None
        scores, labels = learner.model.scores(hidden[part.response]), part.rewards[part.response]
        losses = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
        stats.add(loss=losses, accuracy=((scores > 0) == (labels > 0)).float())
        return losses.sum() / count

    step = learner.step(batch, loss, stats)
    return {name: value / count for name, value in stats.reduce(learner.mesh).items()} | step


def held_out_process(role: Role, batch: Batch, names: Sequence[str] = ()) -> dict[str, float]:
    """eval_loss and eval_accuracy of steps that are not learned from, the same on every rank.

    Args:
        names: of the steps, for messages.

    Raises:
        ValueError: a score is no finite number.
    """
    assert batch.rewards is not None
    scores = role.token_scores(batch)[batch.response].double()
    labels = batch.rewards[batch.response].double()
    check_scores(scores, names)
    losses = F.binary_cross_entropy_with_logits(scores, labels)
    return {"eval_loss": losses.item(), "eval_accuracy": ((scores > 0) == (labels > 0)).double().mean().item()}
