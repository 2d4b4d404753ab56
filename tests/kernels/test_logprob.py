"""Log-probability and entropy from logits: accuracy, extreme and masked logits, vocabulary shards."""

import pytest
import torch
from accuracy import check_accuracy
from implementations import DTYPES, INTERPRET, by_mode, cpp_only, device, untouched  # noqa: F401 (a fixture)
from trialign.kernels import logprob as L
from trialign.kernels.logprob import logprob, logprob_ref

LEAST = torch.finfo(torch.float32).min  # another common mask than -inf


def merge_of(pieces: list[torch.Tensor]) -> torch.Tensor:
    """The engine's all-reduce of the shards' (max, sum, sum of exp * logit, label logit), written out."""
    top = torch.stack([piece[0] for piece in pieces]).amax(0)
    factors = [(piece[0] - top).exp() for piece in pieces]
    sums = [sum(piece[row] * factor for piece, factor in zip(pieces, factors, strict=True)) for row in (1, 2)]
    return torch.stack((top, *map(torch.as_tensor, sums), torch.stack([piece[3] for piece in pieces]).sum(0)))


def shards(logits, labels, scale, cuts):
    """(vocabulary shards as leaves, `logprob` of each with the statistics of all)."""
    parts = [part.detach().requires_grad_() for part in logits.tensor_split(cuts, 1)]
    starts, seen = [0, *cuts], []
    for part, start in zip(parts, starts, strict=True):
        logprob(part, labels, scale, merge=lambda stats: seen.append(stats) or stats, vocab_start=start)
    whole = merge_of(seen)
    merged = (logprob(p, labels, scale, lambda _: whole, start) for p, start in zip(parts, starts, strict=True))
    return parts, list(merged)


def check(logits, labels, scale=1.0):
    check_accuracy(lambda x: logprob(x, labels, scale), lambda x: logprob_ref(x, labels, scale), (logits,), (0,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize(
    "n, v", [*by_mode([(3, 2), (7, 1000), (2, 4099), (3, 49152)], [(4, 1000)]), (1, 1), (3, 9001), (1, 151936), (0, 50)]
)
def test_error_against_float64(n, v, scale, dtype):
    torch.manual_seed(v)
    check((torch.randn(n, v) * 3).to(dtype), torch.randint(0, v, (n,)), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_error_with_huge_logits(size, dtype):
    logits = torch.randn(5, 5000)
    logits[:, :6] += 3  # a few near the top, so that the entropy is not 0
    logits += torch.tensor([size, -size, size, 0.0, size])[:, None]
    check(logits.to(dtype), torch.tensor([0, 5, 2999, 1, 3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [2, 700, 5000])
def test_least_number_masks_as_minus_infinity(kept, dtype):
    logits, labels = torch.randn(3, 10_000).to(dtype), torch.tensor([9999, 9998, 9999])
    results = []
    for mask in (-torch.inf, torch.finfo(dtype).min):
        logits[:, :-kept] = mask
        leaf = logits.clone().requires_grad_()
        logp, entropy = logprob(leaf, labels)
        results.append((logp, entropy, *torch.autograd.grad(logp.sum() + entropy.sum(), leaf)))
    torch.testing.assert_close(*results)


def test_minus_infinity():
    logits = torch.randn(4, 70)
    logits[:, 10:40] = -torch.inf
    logits[1, 1:] = -torch.inf  # one choice left: certain
    labels = torch.tensor([0, 0, 50, 20])  # the last label is impossible
    logits.requires_grad_()
    logp, entropy = logprob(logits, labels)
    exact = logits.detach().double().log_softmax(-1)
    torch.testing.assert_close(logp[:3].double(), exact.gather(1, labels[:, None])[:3, 0], rtol=1e-6, atol=1e-6)
    assert logp[3] == -torch.inf and logp[1] == 0 and entropy[1].abs() < 1e-30
    expected = -(exact.exp() * exact.nan_to_num(neginf=0)).sum(-1)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad((logp[:3].sum() + entropy.sum()), logits)
    assert grad.isfinite().all() and grad[:, 10:40].abs().max() < 1e-30


def test_rows_with_nan_or_without_a_finite_logit():
    logits = torch.randn(5, 5000)
    logits[0, 4500], logits[1], logits[2, 7], logits[3] = torch.nan, torch.nan, torch.inf, -torch.inf
    labels = torch.tensor([0, 1, 0, 2, 3])
    for actual, expected in zip(logprob(logits, labels), logprob_ref(logits, labels), strict=True):
        assert not actual[:4].isfinite().any() and actual[3].isnan()
        torch.testing.assert_close(actual[4], expected[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cuts", [[500], [1, 900]])
def test_vocabulary_shards_equal_the_whole(cuts, dtype):
    logits, labels = (torch.randn(9, 1003) * 2).to(dtype), torch.randint(0, 1003, (9,))
    labels[:2] = torch.tensor([0, 1002])
    logits.requires_grad_()
    whole = logprob(logits, labels, 0.8)
    upstream = list(torch.randn(2, 9, dtype=whole[0].dtype))
    (grad,) = torch.autograd.grad(whole, logits, upstream)
    parts, outputs = shards(logits, labels, 0.8, cuts)
    grads = [torch.autograd.grad(out, part, upstream)[0] for part, out in zip(parts, outputs, strict=True)]
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float64: 1e-12}[dtype]
    for out in outputs:
        torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(grads, 1), grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mask, masked", [(-torch.inf, slice(2000, 2500)), (LEAST, slice(0, 1100))])
def test_stats_added_piece_by_piece_equal_the_whole(mask, masked):
    logits, labels = torch.randn(4, 3000), torch.tensor([0, 2999, 1500, 7])
    logits[:, masked] = mask
    bounds = [0, 1100, 2000, 2500, 3000]
    stats = L.piece_stats(logits[:, : bounds[1]], labels, 0.9, 0)
    for start, end in zip(bounds[1:], bounds[2:], strict=False):
        piece = logits[:, start:end]
        stats = L.add_piece_(stats, piece if INTERPRET else piece.contiguous(), labels, 0.9, start)
    torch.testing.assert_close(stats.double(), L.stats_ref(logits.double(), labels, 0.9, 0), rtol=1e-5, atol=1e-4)
    grad = L.piece_gradient(logits, labels, stats, torch.ones(4), None, 0.9, 0)
    grad[range(4), labels] = 0  # a masked label has a gradient
    assert grad.isfinite().all() and grad[:, masked].abs().max() < 1e-30


@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)])
def test_in_place_gradient_equals_the_new_one(given):
    """With one or both of the outputs' gradients; a label's own logit must be read before it is overwritten."""
    logits, labels = torch.randn(4, 1111), torch.tensor([0, 1110, 500, 2000])
    stats = L.piece_stats(logits, labels, 1.0, 0)
    rest = labels, stats, *(torch.randn(4) if each else None for each in given), 1.0, 0
    new = L.piece_gradient(logits, *rest)
    torch.testing.assert_close(new, L.gradient_ref(logits, *rest), rtol=1e-5, atol=1e-7)
    assert torch.equal(L.piece_gradient_(logits, *rest), new)


@cpp_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_past_2_to_the_31(dtype):
    """Two rows 2^31 elements apart: the row's offset does not fit 32 bits."""
    rows, labels = torch.randn(2, 999).to(dtype), torch.tensor([5, 998])
    far = untouched((1 << 31) + 999, dtype).as_strided((2, 999), (1 << 31, 1))
    far.copy_(rows)
    stats = [torch.zeros(4, 2) for _ in range(2)]
    for each, logits in zip(stats, (far, rows), strict=True):
        each[0] = -torch.inf
        torch.ops.trialign.logprob_update_(each, logits, labels, 1.0, 0)
    assert torch.equal(*stats)
    grads = [torch.ops.trialign.logprob_backward(x, labels, stats[1], torch.ones(2), None, 1.0, 0) for x in (far, rows)]
    assert torch.equal(*grads)
