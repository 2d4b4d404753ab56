"""Generalised advantage estimation (Schulman et al. 2016, eq. 16) over packed sequences.

delta_t = r_t + gamma V_t' - V_t,   A_t = delta_t + gamma lambda A_t',   R_t = A_t + V_t
t' is the next unmasked token of the same sequence (V = A = 0 after the last one): the recursion carries over gaps.
"""

from __future__ import annotations

import torch

from .dispatch import choose, register


def gae_ref(rewards, values, mask, cu_seqlens, gamma, lam):
    """The recursion, one step of every sequence at a time. Shapes as in `gae`."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    running = rewards.new_zeros(starts.shape)  # [n]
    next_value = rewards.new_zeros(starts.shape)
    for step in reversed(range(int(lengths.max()) if len(lengths) else 0)):
        here = (step < lengths).nonzero()[:, 0]  # the sequences that are this long
        here = here[mask[starts[here] + step]]
        token = starts[here] + step
        delta = rewards[token] + gamma * next_value[here] - values[token]
        running[here] = delta + gamma * lam * running[here]
        next_value[here] = values[token]
        advantages[token] = running[here]
        returns[token] = running[here] + values[token]
    return advantages, returns


register(
    "gae",
    lambda rewards, values, mask, cu_seqlens, gamma, lam: (torch.empty_like(rewards), torch.empty_like(rewards)),
)


@torch.no_grad()
def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns), each [total] fp32 and 0 where the mask is False. Not differentiable.

    rewards, values [total] fp32, mask [total] bool, cu_seqlens [n + 1] int: sequence i is tokens
    cu_seqlens[i] : cu_seqlens[i + 1].
    """
    if values.dtype != rewards.dtype or choose("gae", rewards) == "reference":
        return gae_ref(rewards, values, mask, cu_seqlens, gamma, lam)
    return torch.ops.trialign.gae(
        rewards.contiguous(), values.contiguous(), mask.contiguous(), cu_seqlens.long().contiguous(), gamma, lam
    )
