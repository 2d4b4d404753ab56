"""Cross-entropy: against torch's own, the law with smoothing and z-loss, vocabulary shards, ignored labels."""

import pytest
import torch
import torch.nn.functional as F
from law import check_law
from test_logprob import merge_of
from trialign.kernels.cross_entropy import cross_entropy, cross_entropy_ref


def draw(n, v, dtype=torch.float32):
    generator = torch.Generator().manual_seed(v)
    return (torch.randn(n, v, generator=generator) * 2).to(dtype), torch.randint(0, v, (n,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-4), (0.2, 1e-3)])
@pytest.mark.parametrize("n,v", [(1, 1), (7, 1003), (2, 49152), (1, 151936), (0, 9)])
def test_law(n, v, smoothing, z_loss, dtype):
    logits, labels = draw(n, v, dtype)
    numbers = (smoothing, z_loss, 0.8)
    check_law(
        lambda x: cross_entropy(x, labels, *numbers), lambda x: cross_entropy_ref(x, labels, *numbers), (logits,), (0,)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_equals_torch_with_ignored_labels(smoothing):
    logits, labels = draw(9, 50)
    labels[[0, 4]] = -100
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    ours = cross_entropy(leaves[0], labels, smoothing)
    theirs = F.cross_entropy(leaves[1], labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(out.sum(), leaf)[0] for out, leaf in zip((ours, theirs), leaves, strict=True)]
    torch.testing.assert_close(*grads)
    assert (grads[0][[0, 4]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 1e-3), (0.0, 1e-2), (0.3, 0.0)])
@pytest.mark.parametrize("cuts", [[0, 500], [0, 1, 900]])
def test_vocabulary_shards_make_the_whole(cuts, smoothing, z_loss, dtype):
    logits, labels = draw(8, 1003, dtype)
    labels[:4] = torch.tensor([0, 1002, -100, 500])
    numbers, g = (smoothing, z_loss, 0.8), torch.randn(8)
    logits.requires_grad_()
    whole = cross_entropy(logits, labels, *numbers)
    (grad,) = torch.autograd.grad(whole, logits, g.to(whole.dtype))
    parts = [logits[:, a:b].detach().requires_grad_() for a, b in zip(cuts, [*cuts[1:], 1003], strict=True)]
    met: list[torch.Tensor] = []
    for part, start in zip(parts, cuts, strict=True):
        cross_entropy(part, labels, *numbers, merge=lambda s: met.append(s) or s, vocab_start=start)
    everything, tolerance = merge_of(met), {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float64: 1e-12}[dtype]
    grads = []
    for part, start in zip(parts, cuts, strict=True):
        loss = cross_entropy(part, labels, *numbers, merge=lambda _: everything, vocab_start=start)
        torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-5)
        grads.append(torch.autograd.grad(loss, part, g.to(loss.dtype))[0])
    torch.testing.assert_close(torch.cat(grads, 1), grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_law_with_huge_logits(size):
    logits, labels = draw(5, 3000)
    check_law(
        lambda x: cross_entropy(x, labels, 0.1, 1e-4),
        lambda x: cross_entropy_ref(x, labels, 0.1, 1e-4),
        (logits + size,),
        (0,),
    )


def test_a_padded_vocabulary_weighs_nothing():
    logits, labels = draw(4, 70)
    labels[:] = torch.tensor([0, 9, 60, 69])
    logits[:, 10:60] = -torch.inf
    leaves = [x.requires_grad_() for x in (logits.clone(), logits[:, [*range(10), *range(60, 70)]].clone())]
    loss = cross_entropy(leaves[0], labels, z_loss=1e-2)
    packed = cross_entropy(leaves[1], torch.tensor([0, 9, 10, 19]), z_loss=1e-2)
    torch.testing.assert_close(loss, packed)
    grads = [torch.autograd.grad(out.sum(), leaf)[0] for out, leaf in zip((loss, packed), leaves, strict=True)]
    torch.testing.assert_close(grads[0][:, [*range(10), *range(60, 70)]], grads[1])
    assert grads[0][:, 10:60].abs().max() < 1e-30
    logits[1, 3] = torch.nan
    assert cross_entropy(logits, labels).isnan().tolist() == [False, True, False, False]


def test_gradcheck():
    logits, labels = draw(4, 7, torch.float64)
    labels[1] = -100
    for fn in (cross_entropy, cross_entropy_ref):
        assert torch.autograd.gradcheck(lambda x, f=fn: f(x, labels, 0.1, 0.01, 1.3), (logits.requires_grad_(),))


REFUSED = [((1.0,), r"\[0, 1\), got 1.0"), ((0.0, -1.0), "negative, got -1.0"), ((0.0, 0.0, 0.0), "positive, got 0.0")]


@pytest.mark.parametrize("numbers, message", REFUSED)
def test_refusals(numbers, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(*draw(1, 2), *numbers)


def test_meta_run():
    labels = torch.zeros(3, dtype=torch.long, device="meta")
    assert cross_entropy(torch.empty(3, 9, device="meta"), labels, 0.1).shape == (3,)
