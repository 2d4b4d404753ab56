"""Cases of bench_kernels.py, one an op: those of GAE, the losses and the optimizer, and the table of all.

"eager" is the textbook formula in plain torch; "compile" is torch.compile of the same function; "liger" is the
algorithm of liger-kernel (Hsu et al. 2024) in plain torch: gradients computed in the forward pass or by a custom
backward, and heads in chunks of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import contenders_head as head
import contenders_layer as layer
import torch
from case import Case, case, compiled
from trialign.kernels.adamw import adamw_
from trialign.kernels.gae import gae
from trialign.kernels.ppo_loss import clipped_policy_loss, clipped_value_loss, kl_estimate


def gae_forward(_dtype: torch.dtype) -> Case:
    rows, steps, gamma, lam = 64, 512, 0.99, 0.95
    rewards, values = torch.randn(2, rows, steps)
    mask, cu_seqlens = torch.ones(rows * steps, dtype=torch.bool), torch.arange(rows + 1) * steps

    def fused(rewards, values):
        return gae(rewards.view(-1), values.view(-1), mask, cu_seqlens, gamma, lam)

    def loop(rewards, values):
        """Padded rows, one time step after another, as in TRL and OpenRLHF."""
        last, backwards = 0.0, []
        for t in reversed(range(steps)):
            following = values[:, t + 1] if t < steps - 1 else 0.0
            last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
            backwards.append(last)
        advantages = torch.stack(backwards[::-1], 1)
        return advantages.view(-1), (advantages + values).view(-1)

    return case(f"[{rows}, {steps}] against a loop over the steps", (rewards, values), (), trialign=fused, eager=loop)


def per_token(fused: Callable, eager: Callable, count: int = 3) -> Case:
    inputs = tuple(0.3 * torch.randn(32_768) for _ in range(count))
    return case("[32768] fp32", inputs, (0,), trialign=fused, eager=eager, compile=compiled(eager))


def policy(dtype: torch.dtype) -> Case:
    def eager(logp, old, advantages):
        ratio = (logp - old).exp()
        free, held = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.28)
        return torch.maximum(free, held), ratio.detach(), (held > free).float()

    return per_token(lambda logp, old, a: clipped_policy_loss(logp, old, a, 0.2, 0.28), eager)


def value(dtype: torch.dtype) -> Case:
    def eager(values, old, returns):
        free, held = (values - returns).square(), (old + (values - old).clamp(-0.2, 0.2) - returns).square()
        return 0.5 * torch.maximum(free, held), (held > free).float()

    case = per_token(lambda v, old, returns: clipped_value_loss(v, old, returns, 0.2), eager)
    case.compare = lambda results: (results[0], results[2])  # the flags may differ by rounding
    return case


def kl(dtype: torch.dtype) -> Case:
    def eager(logp, ref):
        return torch.exp(ref - logp) - 1 + logp - ref

    return per_token(lambda logp, ref: kl_estimate(logp, ref, "k3"), eager, 2)


def optimizer(dtype: torch.dtype) -> Case:
    """Gradient scale, step and copy to the compute dtype, as the engine needs them."""
    size, lr, beta1, beta2, eps, decay, scale = 8_000_000, 1e-6, 0.9, 0.95, 1e-8, 0.1, 0.5
    start, grad = torch.randn(size), torch.randn(size)
    master, first, second = start.clone(), torch.zeros(size), torch.zeros(size)
    copy, scaled, peer_copy = start.to(dtype), torch.empty(size), start.to(dtype)
    parameter = torch.nn.Parameter(start.clone())
    peer = torch.optim.AdamW([parameter], lr, (beta1, beta2), eps, decay, fused=True)
    steps = [0]

    def fused():
        steps[0] += 1
        adamw_(master, first, second, grad, copy, lr, beta1, beta2, eps, decay, steps[0], scale)
        return master, copy

    def eager():
        parameter.grad = torch.mul(grad, scale, out=scaled)
        peer.step()
        peer_copy.copy_(parameter.detach())
        return parameter.detach(), peer_copy

    return Case(f"{size:,} parameters, against fused=True", {"trialign": fused, "eager": eager})


CASES: dict[str, Callable[[torch.dtype], Case]] = {
    "logprob_fwd": head.logprob_forward,
    "logprob": head.logprob_both,
    "linear_logprob": head.linear_logprob_both,
    "gae": gae_forward,
    "policy_loss": policy,
    "value_loss": value,
    "kl_estimate": kl,
    "rms_norm": layer.norm,
    "add_rms_norm": layer.add_norm,
    "rope": layer.rotary,
    "swiglu": layer.gated,
    "linear": layer.decode_product,
    "nf4_linear": layer.quantized,
    "packed_attention": layer.packed,
    "paged_attention": layer.decode,
    "write_kv": partial(layer.write, length=1),
    "write_kv_prompts": partial(layer.write, length=128),
    "sampling": head.draw,
    "adamw": optimizer,
    "route": layer.routing,
    "moe": layer.experts,
}
