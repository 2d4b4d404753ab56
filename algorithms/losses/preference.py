"""Losses on pairs and on labeled answers: DPO and its kin, KTO, Bradley-Terry reward models. One number a pair each.

x_w, x_l: chosen and rejected. h = (log pi(w) - log ref(w)) - (log pi(l) - log ref(l)), summed over the answer's tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PairLoss = Literal["dpo", "robust", "ipo", "hinge", "exo", "apo_zero", "apo_down"]


def ranked_right(chosen: Tensor, rejected: Tensor) -> Tensor:
    """[pairs]: 1 where the chosen answer is above the rejected one, 0.5 where they tie, as a guess would be, else 0."""
    return (chosen > rejected).to(chosen.dtype) + 0.5 * (chosen == rejected).to(chosen.dtype)


def pair_loss(
    chosen: Tensor, rejected: Tensor, beta: float, kind: PairLoss = "dpo", label_smoothing: float = 0.0
) -> Tensor:
    """Loss of each pair, [pairs], out of log-ratios to the reference: log pi - log ref of each answer.

    dpo: -(1 - e) log s(beta h) - e log s(-beta h); e > 0 is conservative DPO (https://arxiv.org/abs/2305.18290 and
    https://ericmitchell.ai/cdpo.pdf). robust: the unbiased form of the same (https://arxiv.org/abs/2403.00409).
    ipo: (h - 1/(2 beta))^2 (https://arxiv.org/abs/2310.12036, eq. 17); hand it per-token means for the averaged form.
    hinge: max(0, 1 - beta h) (https://arxiv.org/abs/2305.10425). apo_zero, apo_down: https://arxiv.org/abs/2408.06266.
    exo: the reverse KL of https://arxiv.org/abs/2402.00856, eq. 16, label_smoothing above 0.

    Args:
        chosen, rejected: [pairs].
        label_smoothing: e, the share of pairs thought to be labeled the wrong way round.

    Raises:
        ValueError: a label_smoothing outside [0, 0.5), or given to a loss that has none.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: must lie in [0, 0.5)")
    if label_smoothing and kind not in ("dpo", "robust", "exo"):
        raise ValueError(f"label_smoothing={label_smoothing}: {kind} has none")
    h, e = chosen - rejected, label_smoothing
    if kind == "dpo":
        return -(1 - e) * F.logsigmoid(beta * h) - e * F.logsigmoid(-beta * h)
    if kind == "robust":
        return (-(1 - e) * F.logsigmoid(beta * h) + e * F.logsigmoid(-beta * h)) / (1 - 2 * e)
    if kind == "ipo":
        return (h - 1 / (2 * beta)).square()
    if kind == "hinge":
        return F.relu(1 - beta * h)
    if kind == "apo_zero":
        return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    if kind == "apo_down":
        return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * h)
    if not e:
        raise ValueError("label_smoothing=0: exo needs a number above 0, its paper takes 0.001")
    up, down = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
    smoothing = torch.tensor(e, dtype=h.dtype, device=h.device)
    return up.exp() * (up - torch.log1p(-smoothing)) + down.exp() * (down - smoothing.log())


def kto_loss(
    ratios: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (https://arxiv.org/abs/2402.01306, eq. 8), one loss an answer: w (1 - s(beta (r - z))) where desirable, else
    w (1 - s(beta (z - r))).

    Args:
        ratios: [answers] log pi - log ref, summed over tokens.
        desirable: [answers] bool.
        kl: z, the reference point: max(0, mean of the log-ratios of mismatched answers); no gradient goes into it.
    """
    sign = torch.full_like(ratios, -1.0).masked_fill(desirable, 1.0)
    weight = torch.full_like(ratios, undesirable_weight).masked_fill(desirable, desirable_weight)
    reference = kl.detach() if isinstance(kl, Tensor) else kl
    return weight * torch.sigmoid(-sign * beta * (ratios - reference))


def kto_reference(mismatched: Tensor) -> Tensor:
    """z of `kto_loss`: max(0, mean) of the log-ratios [pairs] of answers put to other prompts; no gradient."""
    return mismatched.detach().mean().clamp(min=0)


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, center_coef: float = 0.0) -> Tensor:
    """Bradley-Terry, -log s(r_w - r_l - margin) a pair [pairs] (https://arxiv.org/abs/2203.02155, eq. 1; the margin
    https://arxiv.org/abs/2307.09288), plus center_coef (r_w + r_l)^2 (https://arxiv.org/abs/2312.09244)."""
    loss = -F.logsigmoid(chosen - rejected - margin)
    return loss + center_coef * (chosen + rejected).square() if center_coef else loss
