"""The Triton kernels of norms, rotary, SwiGLU, logprob, GAE and PPO losses against float64, interpreted or on a GPU."""

import pytest
import torch
from law import assert_law
from trialign.kernels import gae as G
from trialign.kernels import logprob as P
from trialign.kernels import ppo_loss as L
from trialign.kernels import rms_norm as N
from trialign.kernels import rope as R
from trialign.kernels import swiglu as S
from triton_case import DEVICE, needs_triton

pytestmark = needs_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def draw(*shape, dtype=torch.float32, spread=1.0):
    return (torch.randn(shape) * spread).to(dtype).to(DEVICE)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def reference(fn, dtype, inputs, upstream):
    """Outputs and gradients of the reference at `dtype`, all inputs differentiable."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, leaves, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)])
    return [*outputs, *grads]


def law(ours, fn, inputs, upstream):
    eager, exact = (reference(fn, dtype, inputs, upstream) for dtype in (inputs[0].dtype, torch.float64))
    for place, (a, b, c) in enumerate(zip(ours, eager, exact, strict=True)):
        assert_law(a, b.detach(), c.detach(), f"result {place}")


@pytest.mark.parametrize("dtype", DTYPES)
# The last one is too long for the kernel of the gradient.
@pytest.mark.parametrize("n,h", [(3, 100), (18, 576), (0, 32), (2, 8200)])
def test_rms_norm(n, h, dtype):
    x, residual, weight = draw(n, h, dtype=dtype), draw(n, h, dtype=dtype), draw(h, dtype=dtype)
    g, through = draw(n, h, dtype=dtype), draw(n, h, dtype=dtype)
    y, rstd = N.rms_norm_triton(x, weight, EPS)
    grads = N.rms_norm_backward_triton(g, x, weight, rstd, None)
    law((y, *grads), lambda x, w: N.rms_norm_ref(x, w, EPS), (x, weight), [g])
    y, total, rstd = N.add_rms_norm_triton(x, residual, weight, EPS)
    d_x, d_weight = N.rms_norm_backward_triton(g, total, weight, rstd, through)
    fn = lambda x, r, w: N.add_rms_norm_ref(x, r, w, EPS)  # noqa: E731
    law((y, total, d_x, d_x, d_weight), fn, (x, residual, weight), [g, through])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("n,heads,d", [(3, 9, 64), (2, 1, 6)])
def test_rope(n, heads, d, interleaved, dtype):
    fused, angle = draw(n, heads + 2, d, dtype=dtype), draw(n, d // 2, spread=3.0)
    x, g = fused[:, 1:-1].clone(), draw(n, heads, d, dtype=dtype)
    ours, edges = [fused[:, 1:-1], g.clone()], fused[:, :: heads + 1].clone()
    for turned, back in zip(ours, (False, True), strict=True):
        R.rope_triton(turned, angle.cos(), angle.sin(), interleaved, back)
    assert torch.equal(fused[:, :: heads + 1], edges)
    law(ours, lambda x: R.rope_ref(x, angle.cos(), angle.sin(), interleaved), (x,), [g])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,f", [(3, 77), (2, 1536), (0, 5)])
def test_swiglu(n, f, dtype):
    gate_up, g = draw(n, 2 * f, dtype=dtype, spread=3.0), draw(n, f, dtype=dtype)
    law((S.swiglu_triton(gate_up), S.swiglu_backward_triton(g, gate_up)), S.swiglu_ref, (gate_up,), [g])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n,v,size", [(4, 1000, 0.0), (3, 9001, 0.0), (2, 1, 0.0), (3, 5000, 1e4), (0, 9, 0.0), (1, 151_936, 0.0)]
)
def test_logprob(n, v, size, dtype):
    logits = (draw(n, v, spread=3.0) + size).to(dtype)
    labels = torch.randint(0, v, (n,), device=DEVICE)
    g = [draw(n), draw(n)]
    scale = 1.0 if size else 0.7
    stats = P.logprob_stats_triton(logits, labels, scale, 0)
    grad = P.logprob_backward_triton(logits, labels, stats, *g, scale, 0)
    law((*P.finish(stats), grad), lambda x: P.logprob_ref(x, labels, scale), (logits,), g)
    for part in ((g[0], None), (None, g[1])):
        fresh = P.logprob_backward_triton(logits, labels, stats, *part, scale, 0)
        torch.testing.assert_close(fresh, P.gradient_ref(logits, labels, stats, *part, scale, 0), rtol=2e-2, atol=1e-5)
        P.logprob_backward_triton_(changed := logits.clone(), labels, stats, *part, scale, 0)
        assert torch.equal(changed, fresh)


@pytest.mark.parametrize("mask, masked", [(-torch.inf, slice(2000, 2500)), (torch.finfo().min, slice(0, 1100))])
def test_logprob_by_shards_with_masked_ones(mask, masked):
    logits, labels = draw(4, 3000), torch.tensor([0, 2999, 1500, 7], device=DEVICE)
    logits[:, masked] = mask
    stats = None
    for start, end in ((0, 1100), (1100, 2000), (2000, 2500), (2500, 3000)):
        if stats is None:
            stats = P.logprob_stats_triton(logits[:, :end], labels, 0.9, 0)
        else:
            P.logprob_update_triton_(stats, logits[:, start:end], labels, 0.9, start)
    whole = P.stats_ref(logits.double(), labels, 0.9, 0)
    torch.testing.assert_close(stats.double(), whole, rtol=1e-5, atol=1e-4)
    grad = P.logprob_backward_triton(logits, labels, stats, torch.ones(4, device=DEVICE), None, 0.9, 0)
    grad[range(4), labels] = 0  # a masked label has one
    assert grad.isfinite().all() and (grad[:, masked] == 0).all()


def test_logprob_keeps_nan():
    logits = draw(3, 5000)
    logits[0, 4500], logits[1] = torch.nan, torch.nan
    logp, entropy = P.finish(P.logprob_stats_triton(logits, torch.zeros(3, dtype=torch.long, device=DEVICE), 1.0, 0))
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [True, True, False]


def test_gae_is_0_outside_of_every_sequence():
    mask, cu_seqlens = torch.ones(9, device=DEVICE).bool(), torch.tensor([2, 7], device=DEVICE)
    for out in G.gae_triton(draw(9), draw(9), mask, cu_seqlens, 0.99, 0.95):
        assert (out != 0).tolist() == [False] * 2 + [True] * 5 + [False] * 2


@pytest.mark.parametrize("lengths", [[5, 0, 1, 40], [513], [512, 1100]])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.0])
def test_gae(lengths, kept):
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    total = sum(lengths)
    rewards, values = draw(total), draw(total)
    mask = torch.rand(total, device=DEVICE) < kept
    values[~mask] = torch.nan
    ours = G.gae_triton(rewards, values, mask, cu_seqlens, 0.99, 0.95)
    eager = G.gae_ref(rewards, values, mask, cu_seqlens, 0.99, 0.95)
    exact = G.gae_ref(rewards.double(), values.double(), mask, cu_seqlens, 0.99, 0.95)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert_law(a, b, c)


@pytest.mark.parametrize("n", [1, 1500])
@pytest.mark.parametrize("spread", [0.3, 20.0])
@pytest.mark.parametrize("bound", [None, 3.0])
def test_ppo_losses(n, spread, bound):
    logp, old, advantages = draw(n, spread=spread), draw(n, spread=spread), draw(n)
    clip = None if bound is None else bound / 10
    ones = [torch.ones(n, device=DEVICE)]
    loss, ratio, clipped, slope = L.clipped_policy_loss_triton(logp, old, advantages, 0.2, 0.3, bound)
    fixed = lambda x: (old.to(x.dtype), advantages.to(x.dtype))  # noqa: E731
    law((loss, slope), lambda x: L.clipped_policy_loss_ref(x, *fixed(x), 0.2, 0.3, bound)[0], (logp,), ones)
    _, ratio_ref, clipped_ref = L.clipped_policy_loss_ref(logp, old, advantages, 0.2, 0.3, bound)
    torch.testing.assert_close(ratio, ratio_ref)
    assert torch.equal(clipped, clipped_ref)
    loss, clipped, slope = L.clipped_value_loss_triton(logp, old, advantages, clip)
    law((loss, slope), lambda x: L.clipped_value_loss_ref(x, *fixed(x), clip)[0], (logp,), ones)
    assert torch.equal(clipped, L.clipped_value_loss_ref(logp, old, advantages, clip)[1])
    near = old + draw(n, spread=0.3)
    for kind in (1, 2, 3):
        law(
            L.kl_estimate_triton(near, old, kind),
            lambda x, k=kind: L.kl_estimate_ref(x, fixed(x)[0], f"k{k}"),
            (near,),
            ones,
        )


def test_the_slope_of_k1_is_1_at_an_infinite_difference():
    old, logp = torch.tensor([[0.0, torch.inf, -1.0], [-torch.inf, 0.0, -1.0]], device=DEVICE)
    estimate, slope = L.kl_estimate_triton(logp, old, 1)
    assert estimate.tolist() == [-torch.inf, -torch.inf, 0.0] and slope.tolist() == [1.0] * 3


def test_ppo_losses_keep_nan():
    nan, one = torch.full((1,), torch.nan, device=DEVICE), torch.ones(1, device=DEVICE)
    for args in ((nan, one, one), (one, nan, one), (one, one, nan)):
        assert L.clipped_policy_loss_triton(*args, 0.2, 0.2, None)[0].isnan().all()
        assert L.clipped_value_loss_triton(*args, 0.2)[0].isnan().all()
