"""The per-token losses of PPO (Schulman et al. 2017) and the KL estimators (Schulman 2020). No masks, no means here.

rho = exp(logp - old_logp), the exponent capped at 80 so that a large ratio times its advantage stays finite in fp32
policy: L = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high));  dual clip (Ye et al. 2020), A < 0: L = min(L, -A c)
value:  L = 1/2 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2)
KL, d = logp - logp_ref:  k1 = d,  k2 = d^2 / 2,  k3 = e^-d - 1 + d
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .backends.triton_runtime import Spec, cdiv, jit, tl
from .dispatch import choose, register

KL_KINDS = ("k1", "k2", "k3")
LOG_RATIO_MAX = 80.0


def kl_estimate_ref(logp, logp_ref, kind):
    """The formula in plain torch. Shapes as in `kl_estimate`."""
    d = logp - logp_ref.detach()
    if kind == "k1":
        return d
    return 0.5 * d.square() if kind == "k2" else torch.expm1(-d) + d


def clipped_policy_loss_ref(logp, old_logp, advantages, clip_low, clip_high, dual_clip=None):
    """The formula in plain torch. Shapes as in `clipped_policy_loss`."""
    old_logp, advantages = old_logp.detach(), advantages.detach()
    ratio = (logp - old_logp).clamp(max=LOG_RATIO_MAX).exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(free, held)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss, ratio.detach(), (held > free).to(loss.dtype)


def clipped_value_loss_ref(values, old_values, returns, clip=None):
    """The formula in plain torch. Shapes as in `clipped_value_loss`."""
    old_values, returns = old_values.detach(), returns.detach()
    free = (values - returns).square()
    if clip is None:
        return 0.5 * free, torch.zeros_like(free)
    held = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    # Within the clip old + (V - old) may round to more than V: that is not clipping.
    clipped = (held > free) & ((values - old_values).abs() > clip)
    return 0.5 * torch.maximum(free, held), clipped.to(free.dtype)


@jit
def _policy(
    logp, old_logp, advantages, loss, ratio, clipped, slope, n, low, high, dual, DUAL: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    d = tl.load(logp + i, inside, 0.0) - tl.load(old_logp + i, inside, 0.0)
    a = tl.load(advantages + i, inside, 0.0)
    r = tl.exp(tl.where(d > 80.0, 80.0, d))  # not tl.minimum, which drops a NaN
    kept = tl.where(r < low, low, tl.where(r > high, high, r))
    free, held = -a * r, -a * kept
    value = tl.where(free >= held, free, held)
    grad = tl.where((free >= held) & (d <= 80.0), free, 0.0)
    if DUAL:
        bound = -a * dual
        beyond = (a < 0.0) & (value > bound)
        value = tl.where(beyond, bound, value)
        grad = tl.where(beyond, 0.0, grad)
    tl.store(loss + i, value, inside)
    tl.store(ratio + i, r, inside)
    tl.store(clipped + i, tl.where(held > free, 1.0, 0.0), inside)
    tl.store(slope + i, grad, inside)


@jit
def _value(values, old_values, returns, loss, clipped, slope, n, clip, CLIP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    v, old = tl.load(values + i, inside, 0.0), tl.load(old_values + i, inside, 0.0)
    target = tl.load(returns + i, inside, 0.0)
    step, free = v - old, v - target
    near = v
    if CLIP:
        near = old + tl.where(step < -clip, -clip, tl.where(step > clip, clip, step))
    held = near - target
    free_wins = free * free >= held * held
    tl.store(loss + i, 0.5 * tl.where(free_wins, free * free, held * held), inside)
    tl.store(clipped + i, tl.where((held * held > free * free) & (tl.abs(step) > clip), 1.0, 0.0), inside)
    tl.store(slope + i, tl.where(free_wins, free, tl.where(tl.abs(step) <= clip, held, 0.0)), inside)


@jit
def _kl(logp, logp_ref, estimate, slope, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    d = tl.load(logp + i, inside, 0.0) - tl.load(logp_ref + i, inside, 0.0)
    if KIND == 1:
        value, grad = d, tl.full([BLOCK], 1.0, tl.float32)
    elif KIND == 2:
        value, grad = 0.5 * d * d, d
    else:
        e = tl.exp(-d)
        # Near 0 the direct form cancels: d^2 q(-d) with the series of (e^x - 1 - x) / x^2.
        q = 0.5 - d * (1.6666667e-1 - d * (4.1666667e-2 - d * (8.3333333e-3 - d * (1.3888889e-3 - d * 1.984127e-4))))
        small = tl.abs(d) < 0.5
        value = tl.where(small, d * d * q, e - 1.0 + d)
        grad = tl.where(small, d - d * d * q, 1.0 - e)
    tl.store(estimate + i, value, inside)
    tl.store(slope + i, grad, inside)


def _launch(kernel, outputs: int, *arguments):
    """Runs an elementwise kernel over tensors (the leading arguments), then numbers; returns its new outputs."""
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    results = tuple(torch.empty_like(tensors[0]) for _ in range(outputs))
    n = tensors[0].numel()
    if n:
        kernel[(cdiv(n, _CONFIG["BLOCK"]),)](*tensors, *results, n, *arguments[len(tensors) :], **_CONFIG)
    return results


def clipped_policy_loss_triton(logp, old_logp, advantages, clip_low, clip_high, dual_clip):
    """(loss, ratio, clipped, slope) by Triton; arguments as those of torch.ops.trialign.policy_loss."""
    dual = (dual_clip or 0.0, dual_clip is not None)
    return _launch(_policy, 4, logp, old_logp, advantages, 1 - clip_low, 1 + clip_high, *dual)


def clipped_value_loss_triton(values, old_values, returns, clip):
    """(loss, clipped, slope) by Triton; arguments as those of torch.ops.trialign.value_loss."""
    return _launch(_value, 3, values, old_values, returns, clip or 0.0, clip is not None)


def kl_estimate_triton(logp, logp_ref, kind):
    """(estimate, slope) by Triton; arguments as those of torch.ops.trialign.kl_estimate."""
    return _launch(_kl, 2, logp, logp_ref, kind)


_CONFIG = {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}


def _spec(kernel, tensors: tuple[str, ...], numbers: tuple[str, ...], choice: str, values: tuple) -> Spec:
    configs = tuple(_CONFIG | {choice: value} for value in values)
    signature = {**dict.fromkeys(tensors, "*fp32"), "n": "i32", **dict.fromkeys(numbers, "fp32")}
    return Spec(kernel, signature, configs, unaligned=("n",))


SPECS = {
    "policy": _spec(
        _policy, ("logp", "old_logp", "advantages", "loss", "ratio", "clipped", "slope"), ("low", "high", "dual"),
        "DUAL", (False, True),
    ),
    "value": _spec(
        _value, ("values", "old_values", "returns", "loss", "clipped", "slope"), ("clip",), "CLIP", (False, True)
    ),
    "kl": _spec(_kl, ("logp", "logp_ref", "estimate", "slope"), (), "KIND", (1, 2, 3)),
}  # fmt: skip


def _fakes(count: int):
    return lambda first, *_: tuple(torch.empty_like(first) for _ in range(count))


register("policy_loss", _fakes(4), triton=clipped_policy_loss_triton)
register("value_loss", _fakes(3), triton=clipped_value_loss_triton)
register("kl_estimate", _fakes(2), triton=kl_estimate_triton)


def _through_slope(ctx, grad, *_):
    (slope,) = ctx.saved_tensors
    return None, None if grad is None else grad * slope, *(None,) * (len(ctx.needs_input_grad) - 2)


class _Differentiable(torch.autograd.Function):
    """An op whose last output is the gradient of its first one in its first input.

    At 32k tokens autograd's own bookkeeping takes as long as the kernel, so it is kept short: a Function rather than
    torch.library.register_autograd, and `once_differentiable` only where a graph of the gradient is built.
    """

    @staticmethod
    def forward(ctx, op, *inputs):
        *outputs, slope = op(*inputs)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        return (once_differentiable(_through_slope) if torch.is_grad_enabled() else _through_slope)(ctx, *grads)


def _compiled(op: str, *tensors: torch.Tensor) -> bool:
    if any(t.shape != tensors[0].shape for t in tensors):
        raise ValueError(f"{op}: inputs differ in size: {', '.join(str(list(t.shape)) for t in tensors)}")
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
    op = torch.ops.trialign.kl_estimate.default
    return _Differentiable.apply(op, logp.contiguous(), logp_ref.detach().contiguous(), int(kind[1]))[0]


def clipped_policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, ratio, clipped), each [total] fp32: the clipped surrogate, exp(logp - old_logp), 1.0 where clipped.

    All inputs [total] fp32. Only the loss is differentiable, and only in logp.
    """
    if not _compiled("policy_loss", logp, old_logp, advantages):
        return clipped_policy_loss_ref(logp, old_logp, advantages, clip_low, clip_high, dual_clip)
    tensors = logp.contiguous(), old_logp.detach().contiguous(), advantages.detach().contiguous()
    return _Differentiable.apply(torch.ops.trialign.policy_loss.default, *tensors, clip_low, clip_high, dual_clip)


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, clipped), each [total] fp32; clip None: the plain squared error. Differentiable in values only."""
    if not _compiled("value_loss", values, old_values, returns):
        return clipped_value_loss_ref(values, old_values, returns, clip)
    tensors = values.contiguous(), old_values.detach().contiguous(), returns.detach().contiguous()
    return _Differentiable.apply(torch.ops.trialign.value_loss.default, *tensors, clip)
