"""The Triton AdamW step under the law."""

import pytest
import torch
from law import assert_law
from trialign.kernels.adamw import adamw_ref_, adamw_triton
from triton_case import DEVICE, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize("out", [None, torch.bfloat16, torch.float32])
def test_law(out):
    torch.manual_seed(0)
    n, hyper = 2500, (3e-3, 0.9, 0.95, 1e-8, 0.1, 7, 0.37)
    ours = [torch.randn(n, device=DEVICE), torch.randn(n, device=DEVICE), torch.rand(n, device=DEVICE)]
    grad = torch.randn(n, device=DEVICE)
    eager, exact = [t.clone() for t in ours], [t.double() for t in ours]
    param = None if out is None else torch.empty(n, dtype=out, device=DEVICE)
    adamw_triton(*ours, grad, param, *hyper)
    adamw_ref_(*eager, grad, None, *hyper)
    adamw_ref_(*exact, grad.double(), None, *hyper)
    for name, got, plain, right in zip(("master", "exp_avg", "exp_avg_sq"), ours, eager, exact, strict=True):
        assert_law(got, plain, right, name)
    if param is not None:
        assert torch.equal(param, ours[0].to(param.dtype))
