"""The public functions on the CPU and, with `pytest -m gpu`, on a GPU: the law, whatever implementation serves."""

import pytest
import torch
from law import check_law
from trialign.kernels.attention import packed_attention, packed_attention_ref
from trialign.kernels.cross_entropy import cross_entropy, cross_entropy_ref
from trialign.kernels.gae import gae, gae_ref
from trialign.kernels.linear_logprob import linear_logprob, linear_logprob_ref
from trialign.kernels.logprob import logprob, logprob_ref
from trialign.kernels.nf4 import nf4_linear, nf4_linear_ref, quantize_nf4
from trialign.kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from trialign.kernels.rope import rope, rope_ref
from trialign.kernels.swiglu import swiglu, swiglu_ref

on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5


@pytest.fixture(params=DEVICES)
def device(request):
    torch.manual_seed(0)
    return torch.device(request.param)


@pytest.fixture(params=DTYPES)
def draw(request, device):
    return lambda *shape, spread=1.0: (torch.randn(shape) * spread).to(request.param).to(device)


def labels(n, v, device):
    return torch.randint(0, v, (n,)).to(device)


def test_logprob(draw, device):
    target = labels(33, 5003, device)
    check_law(
        lambda x: logprob(x, target, 0.7), lambda x: logprob_ref(x, target, 0.7), (draw(33, 5003, spread=3),), (0,)
    )


def test_cross_entropy(draw, device):
    target = labels(33, 1003, device)
    numbers = (0.1, 1e-3)
    inputs = (draw(33, 1003, spread=3),)
    check_law(
        lambda x: cross_entropy(x, target, *numbers), lambda x: cross_entropy_ref(x, target, *numbers), inputs, (0,)
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
        lambda x: rope(x, cos, sin, interleaved), lambda x: rope_ref(x, cos, sin, interleaved), (draw(33, 9, 64),), (0,)
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
    # delta comes from the rounded output, as in every flash attention: a rounding more than twice eager's error
    check_law(fn, ref, inputs, (0, 1, 2), factor=4.0)


def test_gae(device):
    bounds = torch.tensor([0, 5, 5, 700], device=device)
    rewards, values = torch.randn(2, 700).to(device)
    mask = (torch.rand(700) < 0.5).to(device)
    exact = gae_ref(rewards.double(), values.double(), mask, bounds, 0.99, 0.95)
    for ours, right in zip(gae(rewards, values, mask, bounds, 0.99, 0.95), exact, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)
