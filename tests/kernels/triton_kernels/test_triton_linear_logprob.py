"""The Triton kernels of the fused head, by the public function: the law, shards, extreme logits, planted faults."""

from itertools import pairwise

import pytest
import torch
from law import check_law
from planted import planted
from test_logprob import merge_of
from trialign.kernels import linear_logprob as L
from trialign.kernels.linear_logprob import linear_logprob, linear_logprob_ref
from trialign.kernels.logprob import gradient_ref, stats_ref
from triton_case import DEVICE, FAULT, INTERPRET, needs_triton

pytestmark = needs_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several shares and chunks of the vocabulary in tests that stay small."""
    monkeypatch.setattr(L, "SHARE", 256)
    monkeypatch.setattr(L, "CHUNK_ELEMENTS", dict.fromkeys(L.CHUNK_ELEMENTS, 1))


def draw(n, h, v, dtype=torch.float32):
    generator = torch.Generator().manual_seed(v)
    hidden = torch.randn(n, h, generator=generator).to(dtype)
    weight = (torch.randn(v, h, generator=generator) * 2 * h**-0.5).to(dtype)
    return hidden.to(DEVICE), weight.to(DEVICE), torch.randint(0, v, (n,), generator=generator).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,h,v", [(1, 1, 1), (3, 40, 300), (66, 70, 1100), (0, 8, 30)])
def test_law(n, h, v, dtype):
    hidden, weight, labels = draw(n, h, v, dtype)
    check_law(
        lambda x, w: linear_logprob(x, w, labels, 0.7),
        lambda x, w: linear_logprob_ref(x, w, labels, 0.7),
        (hidden, weight),
        (0, 1),
    )


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_law_with_huge_logits(size):
    hidden, weight, labels = draw(4, 8, 600)
    weight[:, 0], hidden[:, 0] = size, 1.0
    check_law(
        lambda x, w: linear_logprob(x, w, labels),
        lambda x, w: linear_logprob_ref(x, w, labels),
        (hidden, weight),
        (0, 1),
    )


@pytest.mark.parametrize("mask, masked", [(-torch.inf, slice(200, 600)), (torch.finfo().min, slice(0, 600))])
def test_a_masked_vocabulary_weighs_nothing(mask, masked):
    """Logits of -inf or of the least number, whole tiles of them too, and a NaN that has to come out."""
    hidden, weight = torch.ones(3, 1, device=DEVICE), torch.randn(900, 1).to(DEVICE)
    weight[masked] = mask
    labels = torch.tensor([0, 899, 300], device=DEVICE)
    stats = L.linear_logprob_stats(hidden, weight, labels, 1.0, 0)
    logits = hidden @ weight.T
    torch.testing.assert_close(stats.double(), stats_ref(logits.double(), labels, 1.0, 0), rtol=1e-5, atol=1e-5)
    g = torch.randn(2, 3).to(DEVICE)
    out = torch.empty_like(logits)
    L.linear_logprob_gradient_(out, hidden, weight, labels, stats, *g, 1.0, 0)
    torch.testing.assert_close(out, gradient_ref(logits, labels, stats, *g, 1.0, 0), rtol=1e-4, atol=1e-6)
    weight[700] = torch.nan
    assert not any(part.isfinite().any() for part in linear_logprob(hidden, weight, labels))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_shards_of_the_vocabulary_make_the_whole(wanted):
    hidden, weight, labels = draw(5, 24, 1300)
    labels[:2] = torch.tensor([0, 1299])
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    whole = linear_logprob_ref(*leaves, labels, 0.8)
    upstream = [torch.randn(5).to(DEVICE) if w else None for w in wanted]
    pick = lambda outputs: [o for o, w in zip(outputs, wanted, strict=True) if w]  # noqa: E731
    grad_hidden, grad_weight = torch.autograd.grad(pick(whole), leaves, pick(upstream))
    met, sums = [], torch.zeros_like(hidden)
    bounds = [0, 0, 700, 1300]  # the first rank has no part of the vocabulary
    parts = [(a, weight[a:b].detach().requires_grad_()) for a, b in pairwise(bounds)]
    for start, part in parts:
        linear_logprob(hidden, part, labels, 0.8, merge=lambda s: met.append(s) or s, vocab_start=start)
    merged = merge_of(met)
    for start, part in parts:
        outputs = linear_logprob(hidden, part, labels, 0.8, merge=lambda _: merged, vocab_start=start)
        torch.testing.assert_close(outputs, whole, rtol=1e-5, atol=1e-5)
        d_hidden, d_weight = torch.autograd.grad(pick(outputs), (hidden, part), pick(upstream))
        sums += d_hidden
        torch.testing.assert_close(d_weight, grad_weight[start : start + len(part)], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums, grad_hidden, rtol=1e-4, atol=1e-5)


def test_it_repeats_bit_for_bit():
    """The interpreter shuffles the programs, a GPU runs them as it likes: sums must not depend on it."""
    hidden, weight, labels = draw(33, 40, 1500)
    stats = [L.linear_logprob_stats(hidden, weight, labels, 1.0, 0) for _ in range(2)]
    assert torch.equal(*stats)


def test_opcheck():
    hidden, weight, labels = draw(3, 16, 130)
    stats = L.linear_logprob_stats(hidden, weight, labels, 1.0, 0)
    torch.library.opcheck(L.linear_logprob_stats, (hidden, weight, labels, 0.5, 7))
    out, g = torch.empty(3, 130, device=DEVICE), torch.randn(3).to(DEVICE)
    for grads in ((g, None), (None, g), (g, g)):
        torch.library.opcheck(L.linear_logprob_gradient_, (out, hidden, weight, labels, stats, *grads, 0.5, 7))
    torch.library.opcheck(L.add_product_, (torch.zeros_like(hidden), out.zero_(), weight))


FAULTS = {
    "a mask is missing": ("(columns < v)[:, None] & (k < h)[None, :]", "(columns < v)[:, None]", "out of bounds"),
    "shares at one place": ("part_ptr += share * 4 * n + rows", "part_ptr += rows", "also stores to"),
    "no rescaling": ("s = s * factor + tl.sum(p, 1)", "s = s + tl.sum(p, 1)", None),
    "a share is left out": ("range(shares)", "range(shares - 1)", None),
    "a chunk replaces the others": ("tl.load(place, mask, 0.0) + acc", "acc", None),
    "the wrong sign": ("0.0) - common", "0.0) + common", None),
}


@pytest.mark.skipif(not INTERPRET, reason="faults are planted under the interpreter only")
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name, tmp_path, monkeypatch):
    old, new, message = FAULTS[name]
    faulty = planted(L, old, new, tmp_path, monkeypatch)
    faulty.SHARE, faulty.CHUNK_ELEMENTS = L.SHARE, L.CHUNK_ELEMENTS
    hidden, weight, labels = draw(3, 40, 1100)
    with pytest.raises((AssertionError,) if message is None else FAULT, match=message):
        check_law(
            lambda x, w: faulty.linear_logprob(x, w, labels),
            lambda x, w: linear_logprob_ref(x, w, labels),
            (hidden, weight),
            (0, 1),
        )
