"""Direct preference optimization (https://arxiv.org/abs/2305.18290) and its kin: one optimizer step on pairs.

The reference is the policy before the first step: its logprobs are computed once and no second model is held. A batch
carries them summed over each response, at the response's last token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .batch import Batch
from .config.preference import DPOLoss
from .losses.preference import pair_loss, ranked_right
from .reward_model import pack_pairs
from .roles.learner import Learner, Stats
from .roles.role import Role, target_logprobs

Row = TypeVar("Row")


def response_logprobs(role: Role, batch: Batch) -> Tensor:
    """[samples] fp32: log-probability of each response, on every rank. Collective."""
    return batch.target_segments.sums(role.logprobs(batch)[batch.response])


def reference_sums(
    role: Role, rows: Sequence[Row], batch_size: int, pack: Callable[[Sequence[Row]], Batch] = pack_pairs
) -> Tensor:
    """[samples] fp32: log-probability of each response under the reference, on every rank. Collective.

    Args:
        batch_size: rows of one pass.
    """
    passes = (pack(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size))
    return torch.cat([response_logprobs(role, batch.to(role.mesh.device)) for batch in passes]).cpu()


def with_reference(batch: Batch, sums: Tensor) -> Batch:
    """The batch with the reference's log-probability of each response, sums [samples], at the response's last token."""
    reference = torch.zeros(len(batch.tokens), device=batch.tokens.device)
    return batch.with_(ref_logprobs=reference.index_copy(0, batch.last, sums.to(reference)))


def log_ratios(batch: Batch, sums: Tensor, loss: DPOLoss) -> Tensor:
    """[samples]: log π − log π_ref of each response, or its mean over the tokens where the loss asks for that."""
    reference = 0 if batch.ref_logprobs is None else batch.ref_logprobs[batch.last]
    ratios = sums - reference
    return ratios / batch.target_segments.sizes if loss.average_log_probs else ratios


def pair_losses(batch: Batch, sums: Tensor, ratios: Tensor, loss: DPOLoss) -> Tensor:
    """[pairs]: the preference loss, plus nll_coef times −log π of the chosen response (a sum or a mean over tokens)."""
    losses = pair_loss(ratios[::2], ratios[1::2], loss.beta, loss.kind, loss.label_smoothing)
    logprobs = sums / batch.target_segments.sizes if loss.nll_average_log_probs else sums
    return losses + -loss.nll_coef * logprobs[::2]


def dpo_step(learner: Learner, batch: Batch, loss: DPOLoss) -> dict[str, float]:
    """One optimizer step on pairs with their reference (`with_reference`; none where it is uniform).

    Returns:
        loss; accuracy, the fraction of pairs whose chosen response gained more than the rejected one (a tie is half);
        chosen, rejected and margin in units of the implicit reward β·log-ratio; nll of the chosen responses per token;
        and the metrics of `Learner.step`.
    """
    stats, pairs = Stats(), len(batch) // 2

    def read(part: Batch, hidden: Tensor) -> Tensor:
        logprobs, _ = target_logprobs(learner.model, part, hidden, learner.temperature)  # [targets]
        sums = part.target_segments.sums(logprobs)
        ratios = log_ratios(part, sums, loss)
        losses = pair_losses(part, sums, ratios, loss)
        rewards = loss.beta * ratios
        stats.add(
            loss=losses,
            accuracy=ranked_right(ratios[::2], ratios[1::2]),
            chosen=rewards[::2],
            rejected=rewards[1::2],
            margin=rewards[::2] - rewards[1::2],
            nll=-(sums / part.target_segments.sizes)[::2],
        )
        return losses.sum() / pairs

    step = learner.step(batch, read, stats, unit=2)
    return stats.means(learner.mesh, pairs) | step


def dpo_eval(role: Role, batch: Batch, loss: DPOLoss) -> dict[str, float]:
    """eval_loss, eval_accuracy and eval_margin of pairs of the eval split, defined as in `dpo_step`, on every rank."""
    sums = response_logprobs(role, batch)
    ratios = log_ratios(batch, sums, loss).double()
    return {
        "eval_loss": pair_losses(batch, sums, ratios, loss).mean().item(),
        "eval_accuracy": ranked_right(ratios[::2], ratios[1::2]).mean().item(),
        "eval_margin": (loss.beta * (ratios[::2] - ratios[1::2])).mean().item(),
    }
