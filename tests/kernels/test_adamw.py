"""AdamW against float64 and against torch.optim.AdamW; the gradient stays, the copy-out is the rounded master."""

import pytest
import torch
from accuracy import assert_all_accurate
from implementations import DTYPES, by_mode, device  # noqa: F401 (a fixture)
from trialign.kernels.adamw import adamw_, adamw_ref_

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def buffers(n):
    """Master weights, both moments, gradient."""
    return torch.randn(n), 0.1 * torch.randn(n), torch.rand(n), torch.randn(n)


@pytest.mark.parametrize("n", by_mode([1, 15, 16, 17, 70001], [2500]))
@pytest.mark.parametrize("out", [None, *DTYPES])
@pytest.mark.parametrize("step", [1, 1000])
def test_error_against_float64(n, out, step):
    actual = buffers(n)
    eager, exact, grad = [t.clone() for t in actual], [t.double() for t in actual], actual[3].clone()
    param = None if out is None else torch.empty(n, dtype=out)
    adamw_(*actual, param, **HYPER, step=step, grad_scale=0.37)
    for copies in (eager, exact):
        adamw_ref_(*copies, None, **HYPER, step=step, grad_scale=0.37)
    assert_all_accurate(actual[:3], eager, exact)
    assert torch.equal(actual[3], grad)
    assert param is None or torch.equal(param, actual[0].to(param.dtype))


def test_steps_equal_torch_optim():
    master = torch.randn(1000)
    expected = torch.nn.Parameter(master.double())
    optimizer = torch.optim.AdamW([expected], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    exp_avg, exp_avg_sq = torch.zeros(1000), torch.zeros(1000)
    for step in range(1, 21):
        grad = torch.randn(1000)
        expected.grad = grad.double() * 0.5
        optimizer.step()
        adamw_(master, exp_avg, exp_avg_sq, grad, None, **HYPER, step=step, grad_scale=0.5)
    assert (master - expected.detach()).abs().max() < 1e-5
