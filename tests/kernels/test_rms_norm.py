"""RMSNorm: the law in both dtypes, odd sizes, the residual path, fake tensors."""

import pytest
import torch
from law import check_law
from trialign.kernels.dispatch import has_op
from trialign.kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref

EPS = 1e-5
SHAPES = [(1, 1), (3, 7), (65, 576), (130, 577), (2, 4096), (0, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n,h", SHAPES)
def test_law(n, h, dtype):
    torch.manual_seed(n * 1000 + h)
    x, weight = torch.randn(n, h).to(dtype), torch.randn(h).to(dtype)
    check_law(lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm_ref(x, w, EPS), (x, weight), (0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n,h", SHAPES)
def test_law_with_the_residual(n, h, dtype):
    torch.manual_seed(n * 1000 + h)
    inputs = torch.randn(n, h).to(dtype), torch.randn(n, h).to(dtype), torch.randn(h).to(dtype)
    check_law(
        lambda x, r, w: add_rms_norm(x, r, w, EPS), lambda x, r, w: add_rms_norm_ref(x, r, w, EPS), inputs, (0, 1, 2)
    )


def test_only_one_of_the_two_outputs_used():
    x, residual, weight = torch.randn(5, 33), torch.randn(5, 33), torch.randn(33)
    for output in (0, 1):
        grads = []
        for fn in (add_rms_norm, add_rms_norm_ref):
            leaf = x.clone().requires_grad_()
            grads.append(torch.autograd.grad(fn(leaf, residual, weight, EPS)[output].square().sum(), leaf)[0])
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_a_row_of_zeros_and_huge_values():
    x = torch.zeros(2, 40)
    x[1] = 1e15
    y = rms_norm(x, torch.ones(40), EPS)
    torch.testing.assert_close(y, torch.stack((torch.zeros(40), torch.ones(40))))


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e4])
def test_law_at_other_magnitudes(size):
    """Below the root of eps the norm no longer divides the magnitude out; squares of 1e-30 vanish."""
    torch.manual_seed(0)
    x, weight = torch.randn(9, 577) * size, torch.randn(577)
    check_law(lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm_ref(x, w, EPS), (x, weight), (0, 1))


def test_nan_stays():
    x = torch.randn(3, 40, dtype=torch.bfloat16)
    x[1, 5] = torch.nan
    assert rms_norm(x, torch.ones(40, dtype=torch.bfloat16), EPS)[1].isnan().all()
    assert rms_norm(x, torch.ones(40, dtype=torch.bfloat16), EPS)[[0, 2]].isfinite().all()


def test_strided_input_and_mixed_dtypes_fall_back_right():
    x = torch.randn(6, 50)[:, ::2]
    torch.testing.assert_close(rms_norm(x, torch.ones(25), EPS), rms_norm_ref(x, torch.ones(25), EPS))
    assert rms_norm(x.bfloat16(), torch.ones(25), EPS).dtype == torch.bfloat16


def test_gradcheck_of_the_reference():
    x, r, w = torch.randn(3, 5).double(), torch.randn(3, 5).double(), torch.randn(5).double()
    inputs = [t.requires_grad_() for t in (x, r, w)]
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm_ref(x, r, w, EPS), inputs)


def test_result_does_not_depend_on_threads():
    x, weight = torch.randn(300, 96), torch.randn(96)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            leaf = weight.clone().requires_grad_()
            results.append(torch.autograd.grad(rms_norm(x, leaf, EPS).square().sum(), leaf)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.skipif(not has_op("rms_norm"), reason="trialign._C is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, r, w = torch.randn(4, 9).to(dtype), torch.randn(4, 9).to(dtype), torch.randn(9).to(dtype)
    leaves = [t.requires_grad_() for t in (x, r, w)]
    torch.library.opcheck(torch.ops.trialign.rms_norm, (leaves[0], leaves[2], EPS))
    torch.library.opcheck(torch.ops.trialign.add_rms_norm, (*leaves, EPS))
    plain = [t.detach() for t in leaves]
    torch.library.opcheck(torch.ops.trialign.rms_norm_backward, (plain[1], plain[0], plain[2], torch.rand(4), None))
    torch.library.opcheck(torch.ops.trialign.rms_norm_backward, (plain[1], plain[0], plain[2], torch.rand(4), plain[1]))


def test_fake_and_meta_runs():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.randn(8, 16, requires_grad=True)
        normed, total = add_rms_norm(x, x, torch.randn(16), EPS)
        (normed.sum() + total.sum()).backward()
        assert x.grad is not None and x.grad.shape == (8, 16)
        big = torch.randn(1 << 20, 4096, requires_grad=True)  # 2^32 elements
        assert torch.autograd.grad(rms_norm(big, torch.randn(4096), EPS).sum(), big)[0].shape == big.shape
    assert rms_norm(torch.randn(8, 16, device="meta"), torch.randn(16, device="meta"), EPS).shape == (8, 16)
