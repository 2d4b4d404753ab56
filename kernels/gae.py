"""Generalized advantage estimation (Schulman et al. 2016, eq. 16) over packed sequences.

delta_t = r_t + gamma V_t' - V_t,   A_t = delta_t + gamma lambda A_t',   R_t = A_t + V_t
t' is the next unmasked token of the same sequence (V = A = 0 after the last one): the recursion carries over gaps.
"""

from __future__ import annotations

import torch

from .backends.triton_runtime import Spec, jit, tl
from .dispatch import choose, holds_data, register


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


@jit
def _compose(c_later, o_later, c, o):
    """x -> c (c_later x + o_later) + o: a token's map applied after that of the later tokens."""
    return c * c_later, c * o_later + o


@jit
def _scan(rewards, values, mask, cu_seqlens, advantages, returns, gamma, lam, BLOCK: tl.constexpr):
    """Each program handles one sequence, from its end, a block at a time.

    A token's next value and next advantage are affine maps of those after the block; a masked token's map is the
    identity. Both recursions are then reverse scans of maps.
    """
    sequence = tl.program_id(0)
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    later_value, later_advantage = 0.0, 0.0
    for block in range(tl.cdiv(end - start, BLOCK)):
        low = end - (block + 1) * BLOCK  # may lie before the start: those lanes are masked
        token = low + tl.arange(0, BLOCK)
        here = token >= start
        kept = tl.load(mask + token, here, 0) != 0
        # The next token's value, unless it is masked; for the block's last token, the carried one.
        inner = (tl.arange(0, BLOCK) < BLOCK - 1) & (token + 1 >= start)
        kept_next = tl.load(mask + token + 1, inner, 0) != 0
        value_after = tl.load(values + token + 1, kept_next, 0.0)
        pass_on, given = tl.associative_scan((tl.where(kept_next, 0.0, 1.0), value_after), 0, _compose, reverse=True)
        next_value = pass_on * later_value + given
        value = tl.load(values + token, kept, 0.0)
        delta = tl.load(rewards + token, kept, 0.0) + gamma * next_value - value
        slope, offset = tl.where(kept, gamma * lam, 1.0), tl.where(kept, delta, 0.0)
        slope, offset = tl.associative_scan((slope, offset), 0, _compose, reverse=True)
        advantage = slope * later_advantage + offset
        tl.store(advantages + token, tl.where(kept, advantage, 0.0), here)
        tl.store(returns + token, tl.where(kept, advantage + value, 0.0), here)
        first = tl.arange(0, BLOCK) == 0
        later_advantage = tl.sum(tl.where(first, advantage, 0.0), 0)
        later_value = tl.sum(tl.where(first, tl.where(kept, value, next_value), 0.0), 0)


def gae_triton(rewards, values, mask, cu_seqlens, gamma, lam):
    """(advantages, returns) by Triton; arguments as those of torch.ops.trialign.gae."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)  # 0 outside of every sequence too
    if len(cu_seqlens) > 1:
        _scan[(len(cu_seqlens) - 1,)](
            rewards, values, mask.view(torch.uint8), cu_seqlens, advantages, returns, gamma, lam, **_CONFIG
        )
    return advantages, returns


_CONFIG = {"BLOCK": 512, "num_warps": 4, "num_stages": 3}
SPECS = {
    "scan": Spec(
        _scan,
        dict.fromkeys(("rewards", "values", "advantages", "returns"), "*fp32")
        | {"mask": "*u8", "cu_seqlens": "*i64", "gamma": "fp32", "lam": "fp32"},
        (_CONFIG,),
    )
}


register(
    "gae",
    lambda rewards, values, mask, cu_seqlens, gamma, lam: (torch.empty_like(rewards), torch.empty_like(rewards)),
    triton=gae_triton,
)


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns), each [total] fp32 and 0 where the mask is False. Not differentiable.

    rewards, values [total] fp32, mask [total] bool, cu_seqlens [n + 1] int: sequence i is tokens
    cu_seqlens[i] : cu_seqlens[i + 1]. ValueError where the lengths differ, and on the CPU (a GPU is not waited for)
    where the sequences do not run from 0 to total.
    """
    if not rewards.shape == values.shape == mask.shape:
        shapes = [list(t.shape) for t in (rewards, values, mask)]
        raise ValueError(f"rewards {shapes[0]}, values {shapes[1]} and mask {shapes[2]} differ in length")
    if cu_seqlens.device.type == "cpu" and holds_data(cu_seqlens):
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if (first, last) != (0, len(rewards)):
            raise ValueError(f"cu_seqlens run from {first} to {last}, must run from 0 to {len(rewards)}")
    rewards, values = rewards.detach(), values.detach()
    if not rewards.dtype == values.dtype == torch.float32 or choose("gae", rewards) == "reference":
        return gae_ref(rewards, values, mask, cu_seqlens, gamma, lam)
    return torch.ops.trialign.gae(
        rewards.contiguous(), values.contiguous(), mask.contiguous(), cu_seqlens.long().contiguous(), gamma, lam
    )
