"""The per-token losses of PPO (Schulman et al. 2017) and the KL estimators (Schulman 2020). No masks, no means here.

rho = exp(logp - old_logp), the exponent held at 88 so that a wild ratio stays finite in fp32 (and 0 advantage gives 0)
policy: L = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high));  dual clip (Ye et al. 2020), A < 0: L = min(L, -A c)
value:  L = 1/2 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2)
KL, d = logp - logp_ref:  k1 = d,  k2 = d^2 / 2,  k3 = e^-d - 1 + d
"""

from __future__ import annotations

import torch

from .dispatch import choose, register

KL_KINDS = ("k1", "k2", "k3")
LOG_RATIO_MAX = 88.0


def kl_estimate_ref(logp, logp_ref, kind):
    """The formula in plain torch. Shapes as in `kl_estimate`."""
    d = logp - logp_ref.detach()
    if kind == "k1":
        return d
    return 0.5 * d.square() if kind == "k2" else torch.expm1(-d) + d


def policy_loss_ref(logp, old_logp, advantages, clip_low, clip_high, dual_clip=None):
    """The formula in plain torch. Shapes as in `policy_loss`."""
    old_logp, advantages = old_logp.detach(), advantages.detach()
    ratio = (logp - old_logp).clamp(max=LOG_RATIO_MAX).exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(free, held)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss, ratio.detach(), (held > free).to(loss.dtype)


def value_loss_ref(values, old_values, returns, clip=None):
    """The formula in plain torch. Shapes as in `value_loss`."""
    old_values, returns = old_values.detach(), returns.detach()
    free = (values - returns).square()
    if clip is None:
        return 0.5 * free, torch.zeros_like(free)
    held = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    return 0.5 * torch.maximum(free, held), (held > free).to(free.dtype)


def _save(ctx, inputs, output):
    """The op has computed d loss / d first input already: its last output."""
    ctx.save_for_backward(output[-1])
    ctx.inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    (slope,) = ctx.saved_tensors
    return grad * slope, *(None,) * (ctx.inputs - 1)


def _fakes(count: int):
    return lambda first, *_: tuple(torch.empty_like(first) for _ in range(count))


register("policy_loss", _fakes(4), _save, _backward)
register("value_loss", _fakes(3), _save, _backward)
register("kl_estimate", _fakes(2), _save, _backward)


def _compiled(op: str, *tensors: torch.Tensor) -> bool:
    return all(t.dtype == torch.float32 and t.dim() == 1 for t in tensors) and choose(op, tensors[0]) != "reference"


def kl_estimate(logp: torch.Tensor, logp_ref: torch.Tensor, kind: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) [total] from logprobs [total] of the policy's own samples.

    kind "k1" (unbiased, noisy), "k2" (its gradient is that of the KL) or "k3" (unbiased, never negative); ValueError
    else. Differentiable in logp.
    """
    if kind not in KL_KINDS:
        raise ValueError(f"KL estimator {kind!r}: allowed are {', '.join(KL_KINDS)}")
    if not _compiled("kl_estimate", logp, logp_ref):
        return kl_estimate_ref(logp, logp_ref, kind)
    estimate, _ = torch.ops.trialign.kl_estimate(logp.contiguous(), logp_ref.contiguous(), int(kind[1]))
    return estimate


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, ratio, clipped), each [total] fp32: the clipped surrogate, exp(logp - old_logp), 1.0 where the clip ruled.

    All inputs [total] fp32. Only the loss is differentiable, and only in logp.
    """
    if not _compiled("policy_loss", logp, old_logp, advantages):
        return policy_loss_ref(logp, old_logp, advantages, clip_low, clip_high, dual_clip)
    tensors = logp.contiguous(), old_logp.contiguous(), advantages.contiguous()
    loss, ratio, clipped, _ = torch.ops.trialign.policy_loss(*tensors, clip_low, clip_high, dual_clip)
    return loss, ratio, clipped


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, clipped), each [total] fp32; clip None: the plain squared error. Differentiable in values only."""
    if not _compiled("value_loss", values, old_values, returns):
        return value_loss_ref(values, old_values, returns, clip)
    tensors = values.contiguous(), old_values.contiguous(), returns.contiguous()
    loss, clipped, _ = torch.ops.trialign.value_loss(*tensors, clip)
    return loss, clipped
