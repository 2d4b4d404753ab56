"""SwiGLU: the law in both dtypes, saturated gates, fake tensors."""

import pytest
import torch
from law import check_law
from trialign.kernels.dispatch import has_op
from trialign.kernels.swiglu import swiglu, swiglu_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("n,f", [(1, 1), (5, 77), (33, 1536), (0, 8)])
def test_law(n, f, spread, dtype):
    torch.manual_seed(f)
    check_law(swiglu, swiglu_ref, ((torch.randn(n, 2 * f) * spread).to(dtype),), (0,))


def test_saturated_gates_and_nan():
    gate_up = torch.tensor([[1e4, -1e4, torch.nan, 0.0, 2.0, 3.0, 4.0, 5.0]], requires_grad=True)
    y = swiglu(gate_up)
    assert y[0].tolist()[:2] == pytest.approx([2e4, 0.0]) and y[0, 2].isnan() and y[0, 3] == 0
    y.nan_to_num(0).sum().backward()
    assert gate_up.grad is not None and gate_up.grad[0, [0, 1, 4, 5]].tolist() == pytest.approx([2.0, 0.0, 1e4, 0.0])


def test_gradcheck_of_the_reference():
    assert torch.autograd.gradcheck(swiglu_ref, (torch.randn(3, 8).double().requires_grad_(),))


@pytest.mark.skipif(not has_op("swiglu"), reason="trialign._C is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    gate_up = torch.randn(4, 18).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.trialign.swiglu, (gate_up,))
    torch.library.opcheck(torch.ops.trialign.swiglu_backward, (torch.randn(4, 9).to(dtype), gate_up.detach()))


def test_meta_run():
    assert swiglu(torch.randn(3, 8, device="meta")).shape == (3, 4)
