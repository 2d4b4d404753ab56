"""RMSNorm against float64, alone and with the residual added first: odd sizes, magnitudes, NaN."""

import pytest
import torch
from accuracy import FLOOR, check_accuracy
from implementations import DTYPES, by_mode, device  # noqa: F401 (a fixture)
from trialign.kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref

EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
# The last: rows too long for the Triton kernel of the gradient.
@pytest.mark.parametrize(
    "n, h", [*by_mode([(1, 1), (65, 576), (130, 577), (2, 4096)], [(18, 576)]), (3, 7), (0, 64), (2, 8200)]
)
def test_error_against_float64(n, h, dtype):
    torch.manual_seed(n * 1000 + h)
    x, residual, weight = torch.randn(n, h).to(dtype), torch.randn(n, h).to(dtype), torch.randn(h).to(dtype)
    check_accuracy(lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm_ref(x, w, EPS), (x, weight), (0, 1))
    fn, ref = (lambda x, r, w, f=f: f(x, r, w, EPS) for f in (add_rms_norm, add_rms_norm_ref))
    check_accuracy(fn, ref, (x, residual, weight), (0, 1, 2))


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e4])
def test_error_at_other_magnitudes(size):
    """Below the root of eps the norm no longer divides the magnitude out; squares of 1e-30 vanish."""
    x, weight = torch.randn(9, 577) * size, torch.randn(577)
    check_accuracy(lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm_ref(x, w, EPS), (x, weight), (0, 1))
    x = torch.tensor([0.0, 1e15])[:, None].expand(2, 40)
    torch.testing.assert_close(rms_norm(x, torch.ones(40), EPS), torch.tensor([0.0, 1.0])[:, None].expand(2, 40))


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_of_two_outputs(output):
    x, residual, weight = torch.randn(5, 33), torch.randn(5, 33), torch.randn(33)
    fn, ref = (lambda *t, f=f: f(*t, EPS)[output] for f in (add_rms_norm, add_rms_norm_ref))
    check_accuracy(fn, ref, (x, residual, weight), (0, 1), FLOOR[torch.float32])


def test_nan_stays_in_its_row():
    x = torch.randn(3, 40).bfloat16()
    x[1, 5] = torch.nan
    y = rms_norm(x, torch.ones(40).bfloat16(), EPS)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_result_is_independent_of_thread_count():
    x, weight = torch.randn(by_mode(300, 40), 96), torch.randn(96)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            leaf = weight.clone().requires_grad_()
            results.append(torch.autograd.grad(rms_norm(x, leaf, EPS).square().sum(), leaf)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
