"""Mixture of experts: routing, sorting, gather and weighted sum under the law, and the whole layer against a loop over
tokens in float64."""

import pytest
import torch
from law import assert_law, check_law
from trialign.kernels import moe
from trialign.kernels.dispatch import has_op
from trialign.kernels.grouped_matmul import grouped_matmul_ref, grouped_outer_ref
from trialign.kernels.moe import grouped_matmul, permute, route, sort_by_expert, unpermute

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(0, 2, 3, 8), (1, 1, 1, 1), (33, 3, 5, 77), (50, 8, 64, 130)]  # tokens, k, experts, width
needs_extension = pytest.mark.skipif(not has_op("route"), reason="trialign._C is not usable")


def slots(n, k, num, seed=0):
    """A random order of n * k slots, sorted by expert."""
    experts = torch.randint(num, (n, k), generator=torch.Generator().manual_seed(seed))
    return sort_by_expert(experts, num)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n, k, num, _", SIZES)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_route_law(n, k, num, _, normalize, dtype, shift):
    torch.manual_seed(n)
    logits = (torch.randn(n, num) * 3 + shift).to(dtype)
    check_law(lambda x: route(x, k, normalize), lambda x: moe.route_ref(x, k, normalize), (logits,), (0,))


@pytest.mark.parametrize("normalize", [True, False])
def test_route_by_hand(normalize):
    torch.manual_seed(0)
    logits = torch.randn(7, 5)
    logits[3] = 0.25  # equals rank by index
    logits[4, :3] = -torch.inf
    weights, experts = route(logits, 2, normalize)
    p = logits.double().softmax(1)
    for n in range(7):
        best = sorted(range(5), key=lambda e: (-p[n, e].item(), e))[:2]
        expected = p[n, best] / (p[n, best].sum() if normalize else 1)
        assert experts[n].tolist() == best
        assert torch.allclose(weights[n].double(), expected, atol=1e-6)
    leaf = logits.requires_grad_()
    (grad,) = torch.autograd.grad(route(leaf, 2, normalize)[0], leaf, torch.randn(7, 2))
    assert grad.isfinite().all() and not grad[4, :3].any()
    with pytest.raises(ValueError, match="top-6 of 5 experts"):
        route(logits, 6)
    with pytest.raises(ValueError, match="top-0 of 5 experts"):
        route(logits, 0)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_row_without_a_number_or_without_an_expert_stays_nan(normalize):
    logits = torch.tensor([[1.0, torch.nan, 0.5], [-torch.inf] * 3, [0.0, 1.0, 2.0]], requires_grad=True)
    weights, experts = route(logits, 2, normalize)
    reference = moe.route_ref(logits, 2, normalize)
    assert experts.tolist() == reference[1].tolist() == [[1, 0], [0, 1], [2, 1]]
    assert weights.isnan().tolist() == reference[0].isnan().tolist() == [[True] * 2, [True] * 2, [False] * 2]
    (grad,) = torch.autograd.grad(weights[:, 0].sum(), logits)
    assert grad[2].isfinite().all() and grad[0].isnan().any()


@pytest.mark.parametrize("n, k, num, _", SIZES)
def test_sort_by_expert(n, k, num, _):
    experts = torch.randint(num, (n, k), generator=torch.Generator().manual_seed(0))
    experts[:, 0] = experts[:, 0].clamp(max=max(0, num - 2))
    order, offsets = sort_by_expert(experts, num)
    flat = experts.flatten().tolist()
    assert order.tolist() == sorted(range(n * k), key=lambda s: (flat[s], s))
    assert offsets.tolist() == [sum(e < i for e in flat) for i in range(num + 1)]
    for got, right in zip((order, offsets), moe.sort_by_expert_ref(experts, num), strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k, num, h", SIZES)
def test_permute_and_unpermute_law(n, k, num, h, dtype):
    torch.manual_seed(n)
    order = slots(n, k, num)
    x, rows, weights = torch.randn(n, h).to(dtype), torch.randn(n * k, h).to(dtype), torch.rand(n, k).to(dtype)
    check_law(lambda x: permute(x, order, k), lambda x: moe.permute_ref(x, order, k), (x,), (0,))
    there, back = (lambda r, w, f=f: f(r, order, w) for f in (unpermute, moe.unpermute_ref))
    check_law(there, back, (rows, weights), (0, 1))


def test_there_and_back():
    torch.manual_seed(0)
    x, order = torch.randn(9, 20), slots(9, 3, 4)
    once = torch.zeros(9, 3)
    once[:, 1] = 1.0
    assert torch.equal(unpermute(permute(x, order, 3), order, once), x)
    turned = x.t().contiguous().t()  # rows that are not packed
    assert torch.equal(permute(turned, order, 3), permute(x, order, 3))


def test_reference_gradients():
    torch.manual_seed(0)
    order, weights = slots(4, 2, 3), torch.rand(4, 2).double().requires_grad_()
    x, rows = torch.randn(4, 5).double().requires_grad_(), torch.randn(8, 5).double().requires_grad_()
    for normalize in (True, False):
        assert torch.autograd.gradcheck(lambda z, flag=normalize: moe.route_ref(z, 2, flag)[0], (x,))
    assert torch.autograd.gradcheck(lambda x: moe.permute_ref(x, order, 2), (x,))
    assert torch.autograd.gradcheck(lambda r, w: moe.unpermute_ref(r, order, w), (rows, weights))
    weight, offsets = torch.randn(3, 5, 4).double().requires_grad_(), torch.tensor([0, 2, 2, 8])
    assert torch.autograd.gradcheck(lambda r, w: grouped_matmul(r, w, offsets), (rows, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_layer_equals_a_loop_over_tokens(dtype, normalize):
    torch.manual_seed(0)
    n, k, num, h, f = 19, 2, 6, 24, 40
    x, up, down = torch.randn(n, h).to(dtype), torch.randn(num, h, f).to(dtype), torch.randn(num, f, h).to(dtype)
    logits, grad = torch.randn(n, num), torch.randn(n, h).to(dtype)
    logits[:, 4] = -50.0  # an expert nobody chooses

    def layer(x, up, down, logits):
        weights, experts = route(logits, k, normalize)
        order, offsets = sort_by_expert(experts, num)
        rows = grouped_matmul(grouped_matmul(permute(x, order, k), up, offsets).relu(), down, offsets)
        return unpermute(rows, order, weights)

    def loop(x, up, down, logits):
        chosen = logits.argsort(dim=1, descending=True, stable=True)[:, :k]
        p = logits.softmax(1).gather(1, chosen)
        weights = (p / p.sum(1, keepdim=True) if normalize else p).to(x.dtype)
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


def test_grouped_matmul_refuses_what_does_not_fit():
    x, weight, offsets = torch.randn(5, 8), torch.randn(3, 8, 4), torch.tensor([0, 2, 2, 5])
    with pytest.raises(ValueError, match=r"x \[5, 8\] and 3 offsets do not fit weights \[3, 8, 4\]"):
        grouped_matmul(x, weight, offsets[:3])
    args = (x.requires_grad_(), weight.requires_grad_(), offsets)
    torch.library.opcheck(torch.ops.trialign.grouped_matmul.default, args)
    args = (x.detach(), torch.randn(5, 4), offsets)
    torch.library.opcheck(torch.ops.trialign.grouped_outer.default, args)


def test_an_empty_batch_through_every_expert():
    offsets = torch.zeros(4, dtype=torch.long)
    assert grouped_matmul_ref(torch.empty(0, 8), torch.randn(3, 8, 4), offsets).shape == (0, 4)
    assert not grouped_outer_ref(torch.empty(0, 8), torch.empty(0, 4), offsets).any()


@needs_extension
def test_compiled_ops_refuse_orders_and_experts_that_are_none():
    x, order = torch.randn(2, 4), torch.tensor([0, 1, 2, 3])
    with pytest.raises(RuntimeError, match="expert 3, allowed are 0 to 2"):
        sort_by_expert(torch.tensor([[0, 3]]), 3)
    with pytest.raises(RuntimeError, match=r"order has 3 slots, allowed are 2 \* 2"):
        torch.ops.trialign.permute(x, order[:3], 2)
    with pytest.raises(RuntimeError, match="slot 7 in order, allowed are 0 to 3"):
        permute(x, torch.tensor([0, 1, 2, 7]), 2)
    with pytest.raises(RuntimeError, match="slot 1 is twice in order"):
        unpermute(torch.randn(4, 4), torch.tensor([0, 1, 1, 3]), torch.rand(2, 2))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    torch.manual_seed(0)
    ops, check, order = torch.ops.trialign, torch.library.opcheck, slots(6, 2, 5)
    logits, x, rows = (torch.randn(*s).to(dtype).requires_grad_() for s in ((6, 5), (6, 9), (12, 9)))
    weights, experts = (t.detach() for t in route(logits, 2, False))
    for normalize in (True, False):
        check(ops.route.default, (logits, 2, normalize))
        check(ops.route_backward.default, (torch.randn(6, 2), logits.detach(), weights, experts, normalize))
    check(ops.sort_by_expert.default, (experts, 5))
    check(ops.permute.default, (x, order, 2))
    check(ops.unpermute.default, (rows, order, weights.requires_grad_(), 2))
    check(ops.unpermute.default, (rows, order, None, 2))
    args = (torch.randn(6, 9).to(dtype), rows.detach(), order, weights.detach())
    check(ops.unpermute_backward.default, args)


def test_meta_run():
    logits, x = torch.randn(6, 5, device="meta"), torch.randn(6, 9, device="meta")
    weights, experts = route(logits, 2)
    order, offsets = sort_by_expert(experts, 5)
    rows = grouped_matmul(permute(x, order, 2), torch.randn(5, 9, 7, device="meta"), offsets)
    assert rows.shape == (12, 7) and unpermute(rows, order, weights).shape == (6, 7)
