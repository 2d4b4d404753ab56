"""The Triton kernels of mixture of experts: routing, sorting, gather and weighted sum, and products, under the law."""

import pytest
import torch
from law import assert_law
from planted import planted
from trialign.kernels import grouped_matmul, moe
from trialign.kernels.grouped_matmul import (
    grouped_matmul_ref,
    grouped_matmul_triton,
    grouped_outer_ref,
    grouped_outer_triton,
)
from triton_case import DEVICE, INTERPRET, needs_triton

pytestmark = needs_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_grads(function, leaves, upstream):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n, k, num, shift", [(0, 2, 3, 0.0), (1, 1, 1, 0.0), (19, 2, 5, 1e4), (17, 6, 40, 0.0)])
def test_route(dtype, normalize, n, k, num, shift):
    torch.manual_seed(0)
    logits = (torch.randn(n, num, device=DEVICE) * 3 + shift).to(dtype)
    logits[:1] = 0.5  # equals rank by index
    logits[1:2, 1:] = -torch.inf
    grad = torch.randn(n, k, device=DEVICE)
    weights, experts = moe.route_triton(logits, k, normalize)
    assert torch.equal(experts, moe.route_ref(logits, k, normalize)[1])
    ours = weights, moe.route_backward_triton(grad, logits, weights, experts, normalize)
    eager, exact = (
        with_grads(lambda z: moe.route_ref(z, k, normalize)[0], (z,), grad) for z in (logits, logits.double())
    )
    for name, got, plain, right in zip(("weights", "dlogits"), ours, eager, exact, strict=True):
        assert_law(got, plain, right, name)


def test_a_row_without_a_number_stays_nan():
    logits = torch.tensor([[1.0, torch.nan, 0.5], [-torch.inf] * 3, [0.0, 1.0, 2.0]], device=DEVICE)
    for normalize in (True, False):
        weights, experts = moe.route_triton(logits, 2, normalize)
        assert experts.tolist() == [[1, 0], [0, 1], [2, 1]]
        assert weights.isnan().any(1).tolist() == [True, True, False]


@pytest.mark.parametrize("n, k, num", [(0, 2, 3), (1, 1, 1), (150, 2, 8), (90, 3, 20), (70, 2, 300)])
def test_sort_by_expert(n, k, num):
    experts = torch.randint(num, (n, k), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ours, right = moe.sort_by_expert_triton(experts, num), moe.sort_by_expert_ref(experts, num)
    for got, expected in zip(ours, right, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k, h", [(0, 2, 8), (1, 1, 1), (7, 3, 70), (3, 2, 1100)])
def test_permute_and_unpermute(dtype, n, k, h):
    torch.manual_seed(0)
    order = torch.randperm(n * k, device=DEVICE)
    x, rows, grad = (torch.randn(m, h, device=DEVICE).to(dtype) for m in (n, n * k, n * k))
    weights, upstream = torch.rand(n, k, device=DEVICE), torch.randn(n, h, device=DEVICE).to(dtype)
    assert torch.equal(moe.permute_triton(x, order, k), moe.permute_ref(x, order, k))
    eager, exact = (with_grads(lambda x: moe.permute_ref(x, order, k), (t,), grad) for t in (x, x.double()))
    assert_law(moe.unpermute_triton(grad, order, None, k), eager[1], exact[1], "dx")
    ours = (moe.unpermute_triton(rows, order, weights, k),)
    ours += moe.unpermute_backward_triton(upstream, rows, order, weights)
    eager, exact = (
        with_grads(lambda r, w: moe.unpermute_ref(r, order, w), pair, upstream)
        for pair in ((rows, weights), (rows.double(), weights.double()))
    )
    for name, got, plain, right in zip(("y", "drows", "dweights"), ours, eager, exact, strict=True):
        assert_law(got, plain, right, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts, h, f", [([3, 0, 70, 1], 24, 40), ([0, 0], 16, 16), ([33], 40, 130)])
def test_grouped_products(dtype, counts, h, f):
    torch.manual_seed(0)
    offsets = torch.tensor([0, *counts], device=DEVICE).cumsum(0)
    x = torch.randn(sum(counts), h, device=DEVICE).to(dtype)
    grad = torch.randn(sum(counts), f, device=DEVICE).to(dtype)
    weight = torch.randn(len(counts), h, f, device=DEVICE).to(dtype)
    for ours, reference, a, b in (
        (grouped_matmul_triton, grouped_matmul_ref, x, weight),
        (grouped_matmul_triton, grouped_matmul_ref, grad, weight.transpose(1, 2)),
        # A slice of a fused projection, whose experts lie further apart than a weight is large.
        (grouped_matmul_triton, grouped_matmul_ref, grad, weight.transpose(1, 2)[:, :, 3:-2]),
        (grouped_outer_triton, grouped_outer_ref, x, grad),
    ):
        eager, exact = reference(a, b, offsets), reference(a.double(), b.double(), offsets)
        assert_law(ours(a, b, offsets), eager, exact)


@pytest.mark.skipif(not INTERPRET, reason="faults are planted under the interpreter only")
def test_a_weight_taken_for_packed_is_caught(tmp_path, monkeypatch):
    faulty = planted(grouped_matmul, "mine.to(tl.int64) * e_stride", "mine.to(tl.int64) * h * f", tmp_path, monkeypatch)
    weight, offsets = torch.randn(2, 16, 40)[:, :, 8:24], torch.tensor([0, 3, 6])
    x = torch.randn(6, 16)
    right = grouped_matmul_ref(x, weight, offsets)
    torch.testing.assert_close(grouped_matmul_triton(x, weight, offsets), right, rtol=1e-5, atol=1e-5)
    wrong = faulty.grouped_matmul_triton(x, weight, offsets)
    assert torch.allclose(wrong[:3], right[:3], atol=1e-5) and not torch.allclose(wrong[3:], right[3:], atol=1e-2)
