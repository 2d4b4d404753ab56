"""Sums over samples: one order of the terms, forward and backward, on every device."""

import pytest
import torch
from implementations import device  # noqa: F401 (a fixture)
from torch import Tensor
from trialign.algorithms.losses.aggregation import Segments

LENGTHS = [0, 3, 1, 0, 700, 64, 0]  # no token in the first, the last and one between


def drawn(lengths: list[int], kept: float, dtype: torch.dtype = torch.float32) -> tuple[Segments, Tensor]:
    """Segments, and numbers of many sizes, whose sum depends on its order."""
    segments = Segments.of_lengths(torch.tensor(lengths), torch.rand(sum(lengths)) < kept)
    return segments, torch.randn(sum(lengths), dtype=dtype) * torch.randn(sum(lengths)).mul(3).exp().to(dtype)


def by_hand(x: Tensor, segments: Segments) -> Tensor:
    """[samples]: one token after another, in the dtype of x."""
    sums = [x.new_zeros(()) for _ in range(segments.count)]
    for token, sample in enumerate(segments.sample.tolist()):
        if segments.mask[token]:
            sums[sample] = sums[sample] + x[token]
    return torch.stack(sums)


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_samples_of_tokens_and_last_counted_tokens(kept):
    segments, _ = drawn(LENGTHS, kept)
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    places = [[t for t in range(end - n, end) if segments.mask[t]] for n, end in zip(LENGTHS, ends, strict=True)]
    assert segments.sample.tolist() == [i for i, n in enumerate(LENGTHS) for _ in range(n)]
    assert segments.sizes.tolist() == [len(own) for own in places]
    assert segments.filled == max(1, sum(map(bool, places)))
    assert segments.last().tolist() == [own[-1] if own else -1 for own in places]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [0.5, 1.0])
def test_sums_have_one_order(kept, dtype):
    """The bits of a loop over the tokens on the CPU; on CUDA those of the run before."""
    segments, x = drawn(LENGTHS, kept, dtype)
    x.requires_grad_()
    each = torch.randn(segments.count, dtype=dtype).requires_grad_()  # [samples]
    upstream = torch.randn(len(x), dtype=dtype) * x.detach()

    def results() -> list[Tensor]:
        sums, wide = segments.sums(x), segments.broadcast(each)
        grads = torch.autograd.grad([sums, wide], [x, each], [each.detach(), upstream])
        return [sums.detach(), wide.detach(), *grads]

    sums, wide, grad_x, grad_each = results()
    every = Segments(torch.ones_like(segments.mask), segments.offsets)
    assert torch.equal(wide, each[segments.sample])
    assert torch.equal(grad_x, torch.where(segments.mask, wide, 0))
    for got, terms, of in ((sums, x.detach(), segments), (grad_each, upstream, every)):
        if got.is_cuda:
            torch.testing.assert_close(got.double(), by_hand(terms.double(), of), rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(got, by_hand(terms, of))
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(results(), (sums, wide, grad_x, grad_each), strict=True))


def test_batch_without_counted_tokens_sums_to_zero():
    """As a micro-batch whose responses are all unscored."""
    segments = Segments.of_lengths(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.bool))
    x = torch.zeros(0, requires_grad=True)
    assert segments.sums(x).tolist() == segments.means(x).tolist() == [0, 0] and segments.last().tolist() == [-1, -1]
    assert torch.autograd.grad(segments.sums(x).sum(), x)[0].shape == (0,)
