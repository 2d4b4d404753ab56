"""Mixture of experts: routing, sorting, grouped matmul, and the whole layer against a loop over tokens in float64."""

import pytest
import torch
from kernel_law import assert_law
from trialign.kernels.moe import grouped_matmul, permute, route, sort_by_expert, unpermute


@pytest.mark.parametrize("normalise", [True, False])
def test_route(normalise):
    torch.manual_seed(0)
    logits = torch.randn(7, 5, dtype=torch.float64)
    logits[3] = 0.25  # equals rank by index
    weights, experts = route(logits, 2, normalise)
    p = logits.softmax(1)
    for n in range(7):
        best = sorted(range(5), key=lambda e: (-p[n, e].item(), e))[:2]
        expected = p[n, best] / (p[n, best].sum() if normalise else 1)
        assert experts[n].tolist() == best
        assert torch.allclose(weights[n].double(), expected, atol=1e-6)
    leaf = logits.float().requires_grad_()
    chosen = torch.zeros(7, 5).scatter_(1, experts, 1.0)
    grad = torch.randn(7, 2)
    (ours,) = torch.autograd.grad(route(leaf, 2, normalise)[0], leaf, grad)
    right = leaf.detach().double().requires_grad_()
    masked = right.softmax(1) * chosen
    dense = masked / masked.sum(1, keepdim=True) if normalise else masked
    (exact,) = torch.autograd.grad(dense.gather(1, experts), right, grad.double())
    assert torch.allclose(ours.double(), exact, atol=1e-6)
    with pytest.raises(ValueError, match="top-6 of 5 experts"):
        route(logits, 6)


@pytest.mark.parametrize("n, k, num", [(0, 2, 3), (1, 1, 1), (50, 2, 8), (33, 3, 5)])
def test_sort_by_expert(n, k, num):
    experts = torch.randint(num, (n, k), generator=torch.Generator().manual_seed(0))
    experts[:, 0] = experts[:, 0].clamp(max=max(0, num - 2))
    order, offsets = sort_by_expert(experts, num)
    expected = sorted(range(n * k), key=lambda s: (experts.flatten()[s].item(), s))
    assert order.tolist() == expected
    assert offsets.tolist() == [sum(e < i for e in experts.flatten().tolist()) for i in range(num + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_equals_a_loop_over_tokens(dtype):
    torch.manual_seed(0)
    n, k, num, h, f = 19, 2, 6, 24, 40
    x, up, down = torch.randn(n, h).to(dtype), torch.randn(num, h, f).to(dtype), torch.randn(num, f, h).to(dtype)
    logits, grad = torch.randn(n, num), torch.randn(n, h).to(dtype)
    logits[:, 4] = -50.0  # an expert nobody chooses

    def layer(x, up, down, logits):
        weights, experts = route(logits, k)
        order, offsets = sort_by_expert(experts, num)
        rows = grouped_matmul(grouped_matmul(permute(x, order, k), up, offsets).relu(), down, offsets)
        return unpermute(rows, order, weights)

    def loop(x, up, down, logits):
        chosen = logits.argsort(dim=1, descending=True, stable=True)[:, :k]
        weights = logits.gather(1, chosen).softmax(1).to(x.dtype)
        rows = [
            sum(weights[t, j] * ((x[t] @ up[e]).relu() @ down[e]) for j, e in enumerate(chosen[t].tolist()))
            for t in range(n)
        ]
        return torch.stack(rows)  # pyright: ignore[reportArgumentType] (a sum of tensors is one)

    def with_grads(function, *tensors):
        *leaves, upstream = (t.clone().requires_grad_() for t in tensors)
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    ours = with_grads(layer, x, up, down, logits, grad)
    eager = with_grads(loop, x, up, down, logits, grad)
    exact = with_grads(loop, *(t.double() for t in (x, up, down, logits, grad)))
    for name, got, plain, right in zip(("out", "dx", "dup", "ddown", "dlogits"), ours, eager, exact, strict=True):
        assert_law(got, plain, right, name)
    assert not ours[2][4].any()


def test_refusals_and_opcheck():
    x, weight, offsets = torch.randn(5, 8), torch.randn(3, 8, 4), torch.tensor([0, 2, 2, 5])
    with pytest.raises(ValueError, match=r"x \[5, 8\] and 3 offsets do not fit weights \[3, 8, 4\]"):
        grouped_matmul(x, weight, offsets[:3])
    args = (x.requires_grad_(), weight.requires_grad_(), offsets)
    torch.library.opcheck(torch.ops.trialign.grouped_matmul.default, args)
