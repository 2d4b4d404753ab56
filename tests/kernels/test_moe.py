"""Mixture of experts: routing, sorting, permutation and grouped products against float64, and a whole layer against a
loop over tokens."""

import pytest
import torch
from accuracy import FLOOR, check_accuracy
from implementations import DTYPES, cpp_only, device, interpreted_only  # noqa: F401 (a fixture)
from planted import planted
from trialign.kernels import grouped_matmul as G
from trialign.kernels import moe
from trialign.kernels.moe import grouped_matmul, permute, route, sort_by_expert, unpermute

SIZES = [(0, 2, 3, 8), (1, 1, 1, 1), (33, 3, 5, 77), (17, 6, 40, 130), (3, 2, 300, 1100)]  # tokens, k, experts, width


def slots(n, k, num):
    """A random order of n * k slots, sorted by expert."""
    return sort_by_expert(torch.randint(num, (n, k)), num)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n, k, num, _", SIZES)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_route_error_against_float64(n, k, num, _, normalize, dtype, shift):
    logits = (torch.randn(n, num) * 3 + shift).to(dtype)
    logits[:1] = 0.5  # ties rank by index
    logits[1:2, 1:] = -torch.inf
    check_accuracy(lambda x: route(x, k, normalize), lambda x: moe.route_ref(x, k, normalize), (logits,), (0,))


@pytest.mark.parametrize("normalize", [True, False])
def test_route_of_rows_with_nan_or_without_an_expert(normalize):
    logits = torch.tensor([[1.0, torch.nan, 0.5], [-torch.inf] * 3, [0.0, 1.0, 2.0]], requires_grad=True)
    weights, experts = route(logits, 2, normalize)
    reference = moe.route_ref(logits, 2, normalize)
    assert experts.tolist() == reference[1].tolist() == [[1, 0], [0, 1], [2, 1]]
    assert weights.isnan().any(1).tolist() == reference[0].isnan().any(1).tolist() == [True, True, False]
    (grad,) = torch.autograd.grad(weights[:, 0].sum(), logits)
    assert grad[2].isfinite().all() and grad[0].isnan().any()


@pytest.mark.parametrize("n, k, num", [*(size[:3] for size in SIZES), (150, 2, 8)])
def test_sort_by_expert_is_stable(n, k, num):
    experts = torch.randint(num, (n, k))
    experts[:, 0] = experts[:, 0].clamp(max=max(0, num - 2))
    order, offsets = sort_by_expert(experts, num)
    flat = experts.flatten().tolist()
    assert order.tolist() == sorted(range(n * k), key=lambda s: (flat[s], s))
    assert offsets.tolist() == [sum(e < i for e in flat) for i in range(num + 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k, num, h", SIZES)
def test_permute_and_unpermute_error_against_float64(n, k, num, h, dtype):
    order = slots(n, k, num)
    x, rows, weights = torch.randn(n, h).to(dtype), torch.randn(n * k, h).to(dtype), torch.rand(n, k).to(dtype)
    check_accuracy(lambda x: permute(x, order, k), lambda x: moe.permute_ref(x, order, k), (x,), (0,))
    fn, ref = (lambda r, w, f=f: f(r, order, w) for f in (unpermute, moe.unpermute_ref))
    check_accuracy(fn, ref, (rows, weights), (0, 1), None if dtype != torch.float16 else FLOOR[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts, h, f", [([3, 0, 70, 1], 24, 40), ([0, 0], 16, 16), ([33], 40, 130)])
def test_grouped_matmul_error_against_float64(dtype, counts, h, f):
    """The whole weight, and a transposed slice, whose experts lie further apart than a weight is large."""
    offsets = torch.tensor([0, *counts]).cumsum(0)
    weight = torch.randn(len(counts), h, f).to(dtype)

    def loop(x, w):
        return torch.cat([part @ each for part, each in zip(x.split(counts), w, strict=True)])

    for width, view in ((h, lambda w: w), (f, lambda w: w[:, 3:-2].transpose(1, 2))):
        x = torch.randn(sum(counts), width).to(dtype)
        fn, ref = (
            lambda x, w, g=g, view=view: g(x, view(w)) for g in (lambda x, w: grouped_matmul(x, w, offsets), loop)
        )
        check_accuracy(fn, ref, (x, weight), (0, 1), FLOOR[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_layer_equals_a_loop_over_tokens(dtype, normalize):
    n, k, num, h, f = 19, 2, 6, 24, 40
    x, up, down = torch.randn(n, h).to(dtype), torch.randn(num, h, f).to(dtype), torch.randn(num, f, h).to(dtype)
    logits = torch.randn(n, num)
    logits[:, 4] = -50.0  # an expert that no token chooses

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

    check_accuracy(layer, loop, (x, up, down, logits), (0, 1, 2, 3), FLOOR[dtype])
    leaf = up.requires_grad_()
    assert not torch.autograd.grad(layer(x, leaf, down, logits).sum(), leaf)[0][4].any()


@cpp_only
def test_invalid_orders_and_experts_are_refused():
    x, order = torch.randn(2, 4), torch.tensor([0, 1, 2, 3])
    with pytest.raises(RuntimeError, match="expert 3, allowed are 0 to 2"):
        sort_by_expert(torch.tensor([[0, 3]]), 3)
    with pytest.raises(RuntimeError, match=r"order has 3 slots, allowed are 2 \* 2"):
        torch.ops.trialign.permute(x, order[:3], 2)
    with pytest.raises(RuntimeError, match="slot 7 in order, allowed are 0 to 3"):
        permute(x, torch.tensor([0, 1, 2, 7]), 2)
    with pytest.raises(RuntimeError, match="slot 1 .*twice"):
        unpermute(torch.randn(4, 4), torch.tensor([0, 1, 1, 3]), torch.rand(2, 2))


@interpreted_only
def test_planted_wrong_stride_is_caught(tmp_path, monkeypatch):
    faulty = planted(G, "own.to(tl.int64) * e_stride", "own.to(tl.int64) * h * f", tmp_path, monkeypatch)
    x, weight, offsets = torch.randn(6, 16), torch.randn(2, 16, 40)[:, :, 8:24], torch.tensor([0, 3, 6])
    wrong, expected = faulty.grouped_matmul_triton(x, weight, offsets), G.grouped_matmul_ref(x, weight, offsets)
    assert torch.allclose(wrong[:3], expected[:3], atol=1e-5) and not torch.allclose(wrong, expected, atol=1e-2)
