"""Cross-entropy: against torch's own, the law with smoothing and z-loss, ignored labels, refusals."""

import pytest
import torch
import torch.nn.functional as F
from law import check_law
from trialign.kernels.cross_entropy import cross_entropy, cross_entropy_ref


def draw(n, v, dtype=torch.float32):
    generator = torch.Generator().manual_seed(v)
    return (torch.randn(n, v, generator=generator) * 2).to(dtype), torch.randint(0, v, (n,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-4), (0.2, 1e-3)])
@pytest.mark.parametrize("n,v", [(1, 1), (7, 1003), (2, 49152), (0, 9)])
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
