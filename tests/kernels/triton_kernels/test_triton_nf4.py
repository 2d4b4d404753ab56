"""The Triton NF4 products under the law: codes are unpacked in registers."""

import pytest
import torch
from law import assert_law
from trialign.kernels.nf4 import dequantize_nf4, nf4_linear_backward_triton, nf4_linear_triton, quantize_nf4
from triton_case import DEVICE, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, n, k", [(5, 24, 128), (70, 70, 64)])
def test_law(dtype, m, n, k):
    torch.manual_seed(0)
    codes, absmax = quantize_nf4(torch.randn(n, k, device=DEVICE))
    x, grad = torch.randn(m, k, device=DEVICE).to(dtype), torch.randn(m, n, device=DEVICE).to(dtype)
    eager, exact = (dequantize_nf4(codes, absmax, t) for t in (dtype, torch.float64))
    assert_law(nf4_linear_triton(x, codes, absmax), x @ eager.t(), x.double() @ exact.t(), "y")
    assert_law(nf4_linear_backward_triton(grad, codes, absmax), grad @ eager, grad.double() @ exact, "dx")
