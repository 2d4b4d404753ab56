"""Preference losses, one number a pair or a labeled response: DPO and its kin, KTO, Bradley-Terry.

w, l: chosen and rejected. h = (log pi(w) - log ref(w)) - (log pi(l) - log ref(l)), summed over a response's tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PairLoss = Literal["dpo", "robust", "ipo", "hinge", "exo", "apo_zero", "apo_down"]


def ranked_right(chosen: Tensor, rejected: Tensor) -> Tensor:
    """[pairs]: 1 where the chosen response is above the rejected one, 0.5 at a tie (the chance level), else 0."""
    return (chosen > rejected).to(chosen.dtype) + 0.5 * (chosen == rejected).to(chosen.dtype)


def pair_loss(
    chosen: Tensor, rejected: Tensor, beta: float, kind: PairLoss = "dpo", label_smoothing: float = 0.0
) -> Tensor:
    """Loss of each pair, [pairs], from the log-ratios log pi - log ref of its responses.

    dpo: -(1 - e) log s(beta h) - e log s(-beta h); e > 0 is conservative DPO (https://arxiv.org/abs/2305.18290 and
    https://ericmitchell.ai/cdpo.pdf). robust: the unbiased form of the same (https://arxiv.org/abs/2403.00409).
    ipo: (h - 1/(2 beta))^2 (https://arxiv.org/abs/2310.12036, eq. 17), averaged if given per-token means.
    hinge: max(0, 1 - beta h) (https://arxiv.org/abs/2305.10425). apo_zero, apo_down: https://arxiv.org/abs/2408.06266.
    exo: the reverse KL of https://arxiv.org/abs/2402.00856, eq. 16, with e > 0.

    Args:
        chosen, rejected: [pairs].
        label_smoothing: e in [0, 0.5), the assumed fraction of pairs with swapped labels; of dpo, robust and exo.
    """
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
    """KTO (https://arxiv.org/abs/2402.01306, eq. 8): w (1 - s(beta (r - z))) of a desirable response, else
    w (1 - s(beta (z - r))); [responses].

    Args:
        ratios: r, [responses]: log pi - log ref, summed over tokens.
        desirable: [responses] bool.
        kl: z, the reference point (`kto_reference`); no gradient.
    """
    sign = torch.full_like(ratios, -1.0).masked_fill(desirable, 1.0)
    weight = torch.full_like(ratios, undesirable_weight).masked_fill(desirable, desirable_weight)
    reference = kl.detach() if isinstance(kl, Tensor) else kl
    return weight * torch.sigmoid(-sign * beta * (ratios - reference))


def kto_reference(mismatched: Tensor) -> Tensor:
    """z of `kto_loss`: max(0, mean) of the log-ratios [pairs] of responses paired with other prompts; no gradient."""
    return mismatched.detach().mean().clamp(min=0)


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, center_coef: float = 0.0) -> Tensor:
    """Bradley-Terry: -log s(r_w - r_l - margin), [pairs] (https://arxiv.org/abs/2203.02155, eq. 1; the margin
    https://arxiv.org/abs/2307.09288), plus center_coef (r_w + r_l)^2 (https://arxiv.org/abs/2312.09244)."""
    loss = -F.logsigmoid(chosen - rejected - margin)
    return loss + center_coef * (chosen + rejected).square() if center_coef else loss
