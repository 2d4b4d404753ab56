"""AdamW against float64 and against torch.optim.AdamW; the gradient stays, the copy-out is the rounded master."""

import pytest
import torch
from law import assert_law
from trialign.kernels.adamw import adamw_, adamw_ref_
from trialign.kernels.dispatch import has_op

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def buffers(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    master, exp_avg, grad = (torch.randn(n, generator=generator) for _ in range(3))
    return master, 0.1 * exp_avg, torch.rand(n, generator=generator), grad


@pytest.mark.parametrize("n", [1, 15, 16, 17, 70001])
@pytest.mark.parametrize("out", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("step", [1, 1000])
def test_law(n, out, step):
    ours = buffers(n)
    eager = [t.clone() for t in ours]
    exact = [t.double() for t in ours]
    grad = ours[3].clone()
    param = None if out is None else torch.empty(n, dtype=out)
    adamw_(*ours, param, **HYPER, step=step, grad_scale=0.37)
    adamw_ref_(*eager, None, **HYPER, step=step, grad_scale=0.37)
    adamw_ref_(*exact, None, **HYPER, step=step, grad_scale=0.37)
    for name, got, plain, right in zip(("master", "exp_avg", "exp_avg_sq"), ours, eager, exact, strict=False):
        assert_law(got, plain, right, name)
    assert torch.equal(ours[3], grad)
    if param is not None:
        assert torch.equal(param, ours[0].to(param.dtype))


def test_follows_torch_optim():
    master, _, _, _ = buffers(1000)
    theirs = torch.nn.Parameter(master.double())
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    exp_avg, exp_avg_sq = torch.zeros(1000), torch.zeros(1000)
    for step in range(1, 21):
        grad = buffers(1000, step)[3]
        theirs.grad = grad.double() * 0.5
        optimizer.step()
        adamw_(master, exp_avg, exp_avg_sq, grad, None, **HYPER, step=step, grad_scale=0.5)
    assert (master - theirs.detach()).abs().max() < 1e-5


def test_the_result_does_not_depend_on_how_the_buffer_is_cut():
    whole, cut = buffers(70001), [t.clone() for t in buffers(70001)]
    adamw_(*whole, None, **HYPER, step=3)
    for begin, end in ((0, 13), (13, 40000), (40000, 70001)):
        adamw_(*(t[begin:end] for t in cut), None, **HYPER, step=3)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


@pytest.mark.skipif(not has_op("adamw"), reason="trialign._C is not usable")
def test_opcheck():
    master, exp_avg, exp_avg_sq, grad = buffers(33)
    for out in (None, torch.empty(33, dtype=torch.bfloat16)):
        args = (master, exp_avg, exp_avg_sq, grad, out, *HYPER.values(), 2, 1.0)
        torch.library.opcheck(torch.ops.trialign.adamw.default, args)
