"""The public functions on the CPU and, with `pytest -m gpu`, on a GPU: the law, whatever implementation serves."""

import pytest
import torch
from law import assert_law, check_law
from trialign.kernels import moe
from trialign.kernels.adamw import adamw_, adamw_ref_
from trialign.kernels.attention import packed_attention, packed_attention_ref
from trialign.kernels.gae import gae, gae_ref
from trialign.kernels.linear_logprob import linear_logprob, linear_logprob_ref
from trialign.kernels.logprob import logprob, logprob_ref
from trialign.kernels.nf4 import nf4_linear, nf4_linear_ref, quantize_nf4
from trialign.kernels.paged_attention import paged_attention, paged_attention_ref, write_kv, write_kv_ref
from trialign.kernels.ppo_loss import (
    clipped_policy_loss,
    clipped_policy_loss_ref,
    clipped_value_loss,
    clipped_value_loss_ref,
    kl_estimate,
    kl_estimate_ref,
)
from trialign.kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from trialign.kernels.rope import rope_, rope_ref
from trialign.kernels.sampling import sample, sample_ref
from trialign.kernels.swiglu import swiglu, swiglu_ref

on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


@pytest.fixture(params=DEVICES)
def device(request):
    torch.manual_seed(0)
    return torch.device(request.param)


@pytest.fixture(params=DTYPES)
def draw(request, device):
    """draw(*shape, spread) of one dtype; on the CPU plain torch serves fp16."""
    return lambda *shape, spread=1.0: (torch.randn(shape) * spread).to(request.param).to(device)


def labels(n, v, device):
    return torch.randint(0, v, (n,)).to(device)


def test_logprob(draw, device):
    target = labels(33, 5003, device)
    check_law(
        lambda x: logprob(x, target, 0.7), lambda x: logprob_ref(x, target, 0.7), (draw(33, 5003, spread=3),), (0,)
    )


def test_linear_logprob(draw, device):
    target = labels(70, 3001, device)
    inputs = (draw(70, 96), draw(3001, 96, spread=0.2))
    check_law(lambda x, w: linear_logprob(x, w, target), lambda x, w: linear_logprob_ref(x, w, target), inputs, (0, 1))


def test_rms_norm(draw):
    inputs = (draw(33, 576), draw(33, 576), draw(576))
    check_law(lambda x, _, w: rms_norm(x, w, EPS), lambda x, _, w: rms_norm_ref(x, w, EPS), inputs, (0, 2))
    check_law(
        lambda x, r, w: add_rms_norm(x, r, w, EPS), lambda x, r, w: add_rms_norm_ref(x, r, w, EPS), inputs, (0, 1, 2)
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(draw, device, interleaved):
    angle = (torch.randn(33, 32) * 3).to(device)
    cos, sin = angle.cos(), angle.sin()
    check_law(
        lambda x: rope_(x.clone(), cos, sin, interleaved),
        lambda x: rope_ref(x, cos, sin, interleaved),
        (draw(33, 9, 64),),
        (0,),
    )


def test_swiglu(draw):
    check_law(swiglu, swiglu_ref, (draw(33, 2 * 77),), (0,))


def test_nf4_linear(draw, device):
    codes, absmax = (t.to(device) for t in quantize_nf4(torch.randn(70, 128)))
    check_law(
        lambda x: nf4_linear(x, codes, absmax), lambda x: nf4_linear_ref(x, codes, absmax), (draw(33, 128),), (0,)
    )


def test_packed_attention(draw, device):
    bounds = torch.tensor([0, 33, 34, 34, 90], device=device)
    rest = (bounds, 56, 0.125)
    inputs = (draw(90, 6, 64), draw(90, 2, 64), draw(90, 2, 64))
    fn, ref = (lambda *qkv, f=f: f(*qkv, *rest) for f in (packed_attention, packed_attention_ref))
    check_law(fn, ref, inputs, (0, 1, 2))


def test_gae(device):
    bounds = torch.tensor([0, 5, 5, 700], device=device)
    rewards, values = torch.randn(2, 700).to(device)
    mask = (torch.rand(700) < 0.5).to(device)
    exact = gae_ref(rewards.double(), values.double(), mask, bounds, 0.99, 0.95)
    for ours, right in zip(gae(rewards, values, mask, bounds, 0.99, 0.95), exact, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)


def same(fn, ref, tensors, *rest):
    """The law for a function without a gradient."""
    exact = ref(*(t.double() if t.is_floating_point() else t for t in tensors), *rest)
    assert_law(fn(*tensors, *rest), ref(*tensors, *rest), exact)


@pytest.mark.parametrize("slopes, window", [(False, None), (True, 20)])
def test_paged_attention(draw, device, slopes, window):
    q, k, v = draw(2, 6, 64), draw(70, 2, 64), draw(70, 2, 64)
    caches = [[draw(6, 16, 2, 64) for _ in range(2)]]
    caches.append([cache.clone() for cache in caches[0]])
    tables = torch.tensor([[5, 0, 3, 1, 4], [2, 2, 2, 2, 2]], dtype=torch.int32, device=device)
    slots = torch.cat([16 * block + torch.arange(16) for block in (5, 0, 3, 1, 4)])[:70].to(device)
    for write, cache in zip((write_kv, write_kv_ref), caches, strict=True):
        write(k, v, *cache, slots)
    assert all(torch.equal(ours, right) for ours, right in zip(*caches, strict=True))
    lengths = torch.tensor([70, 9], dtype=torch.int32, device=device)
    falling = 2.0 ** -torch.arange(1.0, 7, device=device) if slopes else None
    same(paged_attention, paged_attention_ref, (q, *caches[0]), tables, lengths, 0.125, falling, window)


@pytest.mark.parametrize("normalize", [True, False])
def test_moe(draw, device, normalize):
    n, k, experts = 33, 3, 10
    logits, weights = draw(n, experts, spread=3), torch.rand(n, k, device=device)
    check_law(lambda x: moe.route(x, k, normalize), lambda x: moe.route_ref(x, k, normalize), (logits,), (0,))
    order, offsets = moe.sort_by_expert(chosen := moe.route(logits, k)[1], experts)
    for ours, right in zip((order, offsets), moe.sort_by_expert_ref(chosen, experts), strict=True):
        assert torch.equal(ours, right)
    check_law(lambda x: moe.permute(x, order, k), lambda x: moe.permute_ref(x, order, k), (draw(n, 70),), (0,))
    there, back = (lambda r, f=f: f(r, order, weights) for f in (moe.unpermute, moe.unpermute_ref))
    check_law(there, back, (draw(n * k, 70),), (0,))
    inputs = (draw(n * k, 64), draw(experts, 64, 48))
    bounds = offsets.tolist()

    def loop(x, weight):
        return torch.cat([x[a:b] @ w for a, b, w in zip(bounds, bounds[1:], weight, strict=False)])

    check_law(lambda x, w: moe.grouped_matmul(x, w, offsets), loop, inputs, (0, 1))
    check_law(
        lambda x, w: moe.grouped_matmul(x, w[:, 5:37].transpose(1, 2), offsets),  # half of a fused projection
        lambda x, w: loop(x, w[:, 5:37].transpose(1, 2)),
        (draw(n * k, 48), inputs[1]),
        (0, 1),
    )


def test_sample(draw, device):
    logits = draw(5, 3001, spread=3)
    temperature, top_p = (torch.tensor(x, device=device) for x in ([1.0, 0, 0.7, 1.3, 0.5], [1.0, 1, 1, 0.8, 0.6]))
    top_k = torch.tensor([0, 0, 5, 0, 9], dtype=torch.int32, device=device)
    settings = (temperature, top_k, top_p, torch.arange(5, device=device) * 2**40, torch.arange(5, device=device))
    (tokens, logprobs), (right, expected) = sample(logits, *settings), sample_ref(logits, *settings)
    assert torch.equal(tokens, right)
    torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=2e-6)


def test_ppo_losses(device):
    old, advantages = torch.randn(2, 700).to(device)
    logp = old + 0.3 * torch.randn(700).to(device)
    pair, policy = (old, advantages), (0.2, 0.3, 3.0)

    def first(function, *numbers):
        return lambda x: function(x, *(t.to(x.dtype) for t in pair), *numbers)[0]

    check_law(first(clipped_policy_loss, *policy), first(clipped_policy_loss_ref, *policy), (logp,), (0,))
    check_law(first(clipped_value_loss, 0.2), first(clipped_value_loss_ref, 0.2), (logp,), (0,))
    for kind in ("k1", "k2", "k3"):
        ours, right = (lambda x, f=f, k=kind: f(x, old.to(x.dtype), k) for f in (kl_estimate, kl_estimate_ref))
        check_law(ours, right, (logp,), (0,))


@pytest.mark.parametrize("out", [None, *DTYPES])
def test_adamw(device, out):
    numbers = (3e-3, 0.9, 0.95, 1e-8, 0.1, 7, 0.37)
    ours = [torch.randn(1027).to(device), torch.randn(1027).to(device), torch.rand(1027).to(device)]
    grad = torch.randn(1027).to(device)
    eager, exact = [t.clone() for t in ours], [t.double() for t in ours]
    param = None if out is None else torch.empty(1027, dtype=out, device=device)
    adamw_(*ours, grad, param, *numbers)
    adamw_ref_(*eager, grad, None, *numbers)
    adamw_ref_(*exact, grad.double(), None, *numbers)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert_law(a, b, c)
    assert param is None or torch.equal(param, ours[0].to(param.dtype))
