"""Log-probability and entropy from logits: the law, extreme logits, vocabulary shards, fake tensors."""

import pytest
import torch
from big import untouched
from law import check_law
from trialign.kernels.dispatch import has_op
from trialign.kernels.logprob import gradient_ref, logprob, logprob_ref, stats_ref

LEAST = torch.finfo(torch.float32).min  # the mask of many programs


def merge_of(pieces: list[torch.Tensor]) -> torch.Tensor:
    """What the engine's all-reduce makes of the shards' (max, sum, sum of exp * logit, label): written out by hand."""
    top = torch.stack([piece[0] for piece in pieces]).amax(0)
    factors = [(piece[0] - top).exp() for piece in pieces]
    sums = [sum(piece[row] * factor for piece, factor in zip(pieces, factors, strict=True)) for row in (1, 2)]
    return torch.stack((top, *map(torch.as_tensor, sums), torch.stack([piece[3] for piece in pieces]).sum(0)))


def shards(logits, labels, scale, cuts):
    """`logprob` of every vocabulary shard with the whole's statistics: (shards, their outputs)."""
    ends = [*cuts[1:], logits.shape[1]]
    parts = [logits[:, a:b].detach().requires_grad_() for a, b in zip(cuts, ends, strict=True)]
    met: list[torch.Tensor] = []

    def note(stats):
        met.append(stats)
        return stats

    for part, start in zip(parts, cuts, strict=True):
        logprob(part, labels, scale, merge=note, vocab_start=start)
    whole = merge_of(met)
    outputs = []
    for part, start in zip(parts, cuts, strict=True):
        outputs.append(logprob(part, labels, scale, merge=lambda _: whole, vocab_start=start))
    return parts, outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("n,v", [(1, 1), (3, 2), (7, 1000), (2, 4099), (3, 49152), (1, 151936), (0, 50)])
def test_law(n, v, scale, dtype):
    torch.manual_seed(v)
    logits, labels = (torch.randn(n, v) * 3).to(dtype), torch.randint(0, v, (n,))
    check_law(lambda x: logprob(x, labels, scale), lambda x: logprob_ref(x, labels, scale), (logits,), (0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_law_with_huge_logits(size, dtype):
    torch.manual_seed(0)
    logits = torch.randn(5, 3000)
    logits[:, :6] += 3  # a few rivals near the top, so that the entropy is not 0
    logits = (logits + torch.tensor([size, -size, size, 0.0, size])[:, None]).to(dtype)
    labels = torch.tensor([0, 5, 2999, 1, 3])
    check_law(lambda x: logprob(x, labels), lambda x: logprob_ref(x, labels), (logits,), (0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [2, 700, 5000])
def test_the_least_number_masks_as_minus_infinity_does(kept, dtype):
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
    truth = logits.detach().double().log_softmax(-1)
    torch.testing.assert_close(logp[:3].double(), truth.gather(1, labels[:, None])[:3, 0], rtol=1e-6, atol=1e-6)
    assert logp[3] == -torch.inf and logp[1] == 0 and entropy[1].abs() < 1e-30
    expected = -(truth.exp() * truth.nan_to_num(neginf=0)).sum(-1)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad((logp[:3].sum() + entropy.sum()), logits)
    assert grad.isfinite().all() and grad[:, 10:40].abs().max() < 1e-30


def test_nan_and_infinity_are_not_swallowed():
    logits = torch.randn(4, 5000)
    logits[0, 4000] = torch.nan
    logits[1] = torch.nan
    logits[2, 7] = torch.inf
    logp, entropy = logprob(logits, torch.zeros(4, dtype=torch.long))
    assert not logp[:3].isfinite().any() and not entropy[:3].isfinite().any()
    assert logp[3].isfinite() and entropy[3].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cuts", [[0, 500], [0, 1, 900]])
def test_vocabulary_shards_make_the_whole(cuts, dtype):
    torch.manual_seed(1)
    logits, labels = (torch.randn(9, 1003) * 2).to(dtype), torch.randint(0, 1003, (9,))
    labels[:2] = torch.tensor([0, 1002])
    logits.requires_grad_()
    whole = logprob(logits, labels, 0.8)
    upstream = torch.randn(2, 9, dtype=whole[0].dtype)
    (grad,) = torch.autograd.grad(whole, logits, list(upstream))
    parts, outputs = shards(logits, labels, 0.8, cuts)
    grads = [torch.autograd.grad(out, part, list(upstream))[0] for part, out in zip(parts, outputs, strict=True)]
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float64: 1e-12}[dtype]
    for logp, entropy in outputs:
        torch.testing.assert_close(logp, whole[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy, whole[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(grads, 1), grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mask", [-torch.inf, LEAST])
def test_a_shard_that_is_all_masked(mask):
    logits = torch.randn(3, 20)
    logits[:, 10:] = mask  # a padded vocabulary
    labels = torch.tensor([0, 3, 9])
    whole = logprob(logits, labels)
    assert all(out.isfinite().all() for out in whole)
    _, outputs = shards(logits, labels, 1.0, [0, 10])
    for out in outputs:
        torch.testing.assert_close(out, whole)


def test_only_one_output_used():
    logits, labels = torch.randn(6, 333), torch.randint(0, 333, (6,))
    for output in (0, 1):
        grads = []
        for fn in (logprob, logprob_ref):
            leaf = logits.clone().requires_grad_()
            grads.append(torch.autograd.grad(fn(leaf, labels)[output].sum(), leaf)[0])
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_gradcheck_of_the_formulas():
    logits, labels = torch.randn(4, 9).double().requires_grad_(), torch.tensor([0, 8, 3, 3])
    assert torch.autograd.gradcheck(lambda x: logprob(x, labels, 1.3), (logits,))
    assert torch.autograd.gradcheck(lambda x: logprob_ref(x, labels, 1.3), (logits,))


def test_strided_logits_and_the_input_is_left_alone():
    wide = torch.randn(5, 2, 64)
    labels = torch.randint(0, 64, (5,))
    copy, logits = wide.clone(), wide[:, 1].requires_grad_()
    logp, entropy = logprob(logits, labels)
    torch.testing.assert_close((logp, entropy), logprob_ref(logits, labels))
    (logp + entropy).sum().backward()
    assert torch.equal(wide, copy)


def test_scale_is_checked():
    with pytest.raises(ValueError, match="positive, got 0"):
        logprob(torch.randn(1, 2), torch.zeros(1, dtype=torch.long), 0.0)


@pytest.mark.skipif(not has_op("logprob_stats"), reason="trialign._C is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    ops = torch.ops.trialign
    logits, labels = torch.randn(4, 50).to(dtype), torch.tensor([0, 49, 7, 60])
    stats, g = stats_ref(logits, labels, 1.0, 5), torch.randn(4)
    torch.library.opcheck(ops.logprob_stats, (logits, labels, 0.5, 5))
    torch.library.opcheck(ops.logprob_update_, (stats.clone(), logits, labels, 0.5, 5))
    for grads in ((g, None), (None, g), (g, g)):
        torch.library.opcheck(ops.logprob_backward, (logits, labels, stats, *grads, 1.0, 5))
        torch.library.opcheck(ops.logprob_backward_, (logits.clone(), labels, stats, *grads, 1.0, 5))


@pytest.mark.skipif(not has_op("logprob_stats"), reason="trialign._C is not built")
def test_in_place_gradient_equals_the_fresh_one():
    """The label's own logit must be read before it is overwritten."""
    ops = torch.ops.trialign
    logits, labels, g = torch.randn(4, 1111), torch.tensor([0, 1110, 500, 2000]), torch.randn(2, 4)
    stats = ops.logprob_stats(logits, labels, 1.0, 0)
    fresh = ops.logprob_backward(logits, labels, stats, *g, 1.0, 0)
    torch.testing.assert_close(fresh, gradient_ref(logits, labels, stats, *g, 1.0, 0), rtol=1e-5, atol=1e-7)
    ops.logprob_backward_(logits, labels, stats, *g, 1.0, 0)
    assert torch.equal(fresh, logits)


def test_a_row_of_nothing_but_minus_infinity_is_nan_as_torchs_and_spoils_no_other():
    logits, labels = torch.randn(3, 4100), torch.tensor([1, 2, 3])
    logits[1] = -torch.inf
    ours, plain = logprob(logits, labels), logprob_ref(logits, labels)
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine[1].isnan() and theirs[[0, 2]].isfinite().all()
        torch.testing.assert_close(mine[[0, 2]], theirs[[0, 2]])


@pytest.mark.skipif(not has_op("logprob_update_"), reason="trialign._C is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_past_2_to_the_31(dtype):
    """Two rows 2^31 elements apart: the row's offset does not fit 32 bits."""
    rows, labels = torch.randn(2, 999).to(dtype), torch.tensor([5, 998])
    far = untouched((1 << 31) + 999, dtype).as_strided((2, 999), (1 << 31, 1))
    far.copy_(rows)
    stats = [torch.zeros(4, 2) for _ in range(2)]
    for mine, logits in zip(stats, (far, rows), strict=True):
        mine[0] = -torch.inf
        torch.ops.trialign.logprob_update_(mine, logits, labels, 1.0, 0)
    assert torch.equal(*stats)
    grads = [torch.ops.trialign.logprob_backward(x, labels, stats[1], torch.ones(2), None, 1.0, 0) for x in (far, rows)]
    assert torch.equal(*grads)


def test_fake_and_meta_runs():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        logits = torch.randn(8, 100_000, requires_grad=True)  # no memory behind it
        logp, entropy = logprob(logits, torch.zeros(8, dtype=torch.long))
        (logp.sum() + entropy.sum()).backward()
        assert logits.grad is not None and logits.grad.shape == (8, 100_000)
        big = torch.randn(20_000, 151_936, dtype=torch.bfloat16, requires_grad=True)  # 3e9 elements: past 2^31
        logp, entropy = logprob(big, torch.zeros(20_000, dtype=torch.long))
        assert torch.autograd.grad(logp.sum() + entropy.sum(), big)[0].shape == big.shape
    big = torch.empty(20_000, 151_936, device="meta")  # 3e9 elements: past 2^31
    assert logprob(big, torch.zeros(20_000, dtype=torch.long, device="meta"))[0].shape == (20_000,)
