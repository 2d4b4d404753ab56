"""Direct preference optimization (https://arxiv.org/abs/2305.18290) and its kin, one update on pairs.

The reference's log-probabilities are computed once, before the first step, by the policy as it then is: no second model
is held. A batch carries them summed over each answer, at its last token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import Batch
from .config.preference import DPOLoss
from .data.preferences import Pair
from .losses.preference import pair_loss, ranked_right
from .reward_model import pack_pairs
from .roles.learner import Learner, Stats
from .roles.role import Role, target_logprobs


def response_logprobs(role: Role, batch: Batch) -> Tensor:
    """[samples] fp32: log-probability of each response, the same on every rank. Collective."""
    return batch.target_segments.sums(role.logprobs(batch)[batch.response])


def with_reference(batch: Batch, sums: Tensor) -> Batch:
    """The batch with the reference's log-probability of each answer, sums [samples], at the answer's last token."""
    reference = torch.zeros(len(batch.tokens), device=batch.tokens.device)
    return batch.with_(ref_logprobs=reference.index_copy(0, batch.last, sums.to(reference)))


def reference_sums(role: Role, pairs: Sequence[Pair], batch_size: int) -> Tensor:
    """[2 pairs] fp32: the log-probability of every response under the reference, the same on every rank. Collective.

    Args:
        batch_size: pairs of one pass.
    """
    sums = []
    for start in range(0, len(pairs), batch_size):
        batch = pack_pairs(pairs[start : start + batch_size]).to(role.mesh.device)
        sums.append(response_logprobs(role, batch))
    return torch.cat(sums).cpu()


def log_ratios(batch: Batch, sums: Tensor, loss: DPOLoss) -> Tensor:
    """[samples]: log π − log ref of each answer, or its mean over the tokens where the loss asks for that."""
    reference = 0 if batch.ref_logprobs is None else batch.ref_logprobs[batch.last]
    ratios = sums - reference
    return ratios / batch.target_segments.sizes if loss.average_log_probs else ratios


def nll_term(batch: Batch, sums: Tensor, loss: DPOLoss) -> Tensor:
    """[pairs]: -log π of the chosen answers as the loss takes it, their sum or mean over the tokens."""
    logprobs = sums / batch.target_segments.sizes if loss.nll_average_log_probs else sums
    return -loss.nll_coef * logprobs[::2]


def dpo_step(learner: Learner, batch: Batch, loss: DPOLoss) -> dict[str, float]:
    """One optimizer step on pairs with their reference (`with_reference`; none where it is uniform).

    Returns:
        loss, accuracy (share of pairs whose chosen answer gained more than the rejected one; a tie is half), margin and
        rewards in units of the implicit reward β·log-ratio, nll (a token of the chosen answers), and what
        `Learner.step` gives.
    """
    stats, pairs = Stats(), len(batch) // 2

    def read(part: Batch, hidden: Tensor) -> Tensor:
        logprobs, _ = target_logprobs(learner.model, part, hidden, learner.temperature)  # [targets]
        sums = part.target_segments.sums(logprobs)
        ratios = log_ratios(part, sums, loss)
        chosen, rejected = ratios[::2], ratios[1::2]
        losses = pair_loss(chosen, rejected, loss.beta, loss.kind, loss.label_smoothing) + nll_term(part, sums, loss)
        rewards = loss.beta * ratios
        stats.add(
            loss=losses,
            accuracy=ranked_right(chosen, rejected),
            chosen=rewards[::2],
            rejected=rewards[1::2],
            margin=rewards[::2] - rewards[1::2],
            nll=-(sums / part.target_segments.sizes)[::2],
        )
        return losses.sum() / pairs

    step = learner.step(batch, read, stats, unit=2)
    return {name: value / pairs for name, value in stats.reduce(learner.mesh).items()} | step


def held_out(role: Role, batch: Batch, loss: DPOLoss) -> dict[str, float]:
    """eval_loss (with its NLL term, as the step's loss), eval_accuracy and eval_margin of pairs that are not learned
    from, the same on every rank."""
    sums = response_logprobs(role, batch)
    ratios = log_ratios(batch, sums, loss).double()
    chosen, rejected = ratios[::2], ratios[1::2]
    losses = pair_loss(chosen, rejected, loss.beta, loss.kind, loss.label_smoothing) + nll_term(batch, sums, loss)
    return {
        "eval_loss": losses.mean().item(),
        "eval_accuracy": ranked_right(chosen, rejected).mean().item(),
        "eval_margin": (loss.beta * (chosen - rejected)).mean().item(),
    }
