"""Direct preference optimization (https://arxiv.org/abs/2305.18290) and its kin, one update on pairs.

The reference's log-probabilities are computed once, before the first step, by the policy as it then is: no second model
is held. A batch carries them summed over each answer, at its last token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import Batch
from .config.common import UpdateConfig
from .config.preference import DPOLoss
from .data.preferences import Pair
from .losses.preference import pair_loss, ranked_right
from .micro_batch import plan_scoring
from .reward_model import pack_pairs
from .roles.role import Learner, Role, Share, Stats, target_logprobs


def answer_sums(batch: Batch, targets: Tensor) -> Tensor:
    """[targets], one number for each target token -> [samples], summed over each sample's. Differentiable."""
    sample = torch.bucketize(batch.response, batch.cu_seqlens[1:].long(), right=True)
    return targets.new_zeros(len(batch)).index_add(0, sample, targets)


def answer_lengths(batch: Batch) -> Tensor:
    """[samples] fp32: target tokens of each sample."""
    return answer_sums(batch, torch.ones(len(batch.response), device=batch.tokens.device))


def with_reference(batch: Batch, sums: Tensor) -> Batch:
    """The batch with the reference's log-probability of each answer, sums [samples], at the answer's last token."""
    reference = torch.zeros(len(batch.tokens), device=batch.tokens.device)
    return batch.with_(ref_logprobs=reference.index_copy(0, batch.last, sums.to(reference)))


def reference_sums(role: Role, pairs: Sequence[Pair], update: UpdateConfig) -> Tensor:
    """[2 pairs] fp32: the log-probability of every answer under the reference, the same on every rank. Collective."""
    sums = []
    for start in range(0, len(pairs), update.batch_size):
        batch = pack_pairs(pairs[start : start + update.batch_size]).to(role.mesh.device)
        logprobs = role.logprobs(batch, plan_scoring(batch, update, role.mesh, 2))
        sums.append(answer_sums(batch, logprobs[batch.response]))
    return torch.cat(sums).cpu()


def log_ratios(batch: Batch, sums: Tensor, loss: DPOLoss) -> Tensor:
    """[samples]: log π − log ref of each answer, or its mean over the tokens where the loss asks for that."""
    reference = 0 if batch.ref_logprobs is None else batch.ref_logprobs[batch.last]
    ratios = sums - reference
    return ratios / answer_lengths(batch) if loss.average == "mean" else ratios


def nll_term(batch: Batch, sums: Tensor, loss: DPOLoss) -> Tensor:
    """[pairs]: -log π of the chosen answers as the loss takes it, their sum or mean over the tokens."""
    told = sums if loss.nll_average == "sum" else sums / answer_lengths(batch)
    return -loss.nll_coef * told[::2]


def dpo_step(learner: Learner, batch: Batch, shares: Sequence[Share], loss: DPOLoss) -> dict[str, float]:
    """One optimizer step on pairs with their reference (`with_reference`; none where it is uniform).

    Returns:
        loss, accuracy (share of pairs whose chosen answer gained more than the rejected one; a tie is half), margin and
        rewards in units of the implicit reward β·log-ratio, nll (a token of the chosen answers), and what
        `Learner.step` gives.
    """
    stats, pairs = Stats(), len(batch) // 2

    def read(part: Batch, hidden: Tensor) -> Tensor:
        logprobs, _ = target_logprobs(learner.model, part, hidden, learner.temperature)  # [targets]
        sums = answer_sums(part, logprobs)
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
            nll=-(sums / answer_lengths(part))[::2],
        )
        return losses.sum() / pairs

    step = learner.step([(batch.select(share), read) for share in shares], stats, unit=2)
    return {name: value / pairs for name, value in stats.reduce(learner.mesh).items()} | step


def held_out(role: Role, batch: Batch, update: UpdateConfig, loss: DPOLoss) -> dict[str, float]:
    """eval_loss (with its NLL term, as the step's loss), eval_accuracy and eval_margin of pairs that are not learned
    from, the same on every rank."""
    logprobs = role.logprobs(batch, plan_scoring(batch, update, role.mesh, 2))
    sums = answer_sums(batch, logprobs[batch.response])
    ratios = log_ratios(batch, sums, loss).double()
    chosen, rejected = ratios[::2], ratios[1::2]
    losses = pair_loss(chosen, rejected, loss.beta, loss.kind, loss.label_smoothing) + nll_term(batch, sums, loss)
    return {
        "eval_loss": losses.mean().item(),
        "eval_accuracy": ranked_right(chosen, rejected).mean().item(),
        "eval_margin": (loss.beta * (chosen - rejected)).mean().item(),
    }
