"""SwiGLU against float64, saturated gates, NaN."""

import pytest
import torch
from accuracy import check_accuracy
from implementations import DTYPES, by_mode, device  # noqa: F401 (a fixture)
from trialign.kernels.swiglu import swiglu, swiglu_ref


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("n, f", [(1, 1), (5, 77), (by_mode(33, 2), 1536), (0, 8)])
def test_error_against_float64(n, f, spread, dtype):
    check_accuracy(swiglu, swiglu_ref, ((torch.randn(n, 2 * f) * spread).to(dtype),), (0,))


def test_saturated_gates_and_nan():
    gate_up = torch.tensor([[1e4, -1e4, torch.nan, 0.0, 2.0, 3.0, 4.0, 5.0]], requires_grad=True)
    y = swiglu(gate_up)
    assert y[0].tolist()[:2] == pytest.approx([2e4, 0.0]) and y[0, 2].isnan() and y[0, 3] == 0
    (grad,) = torch.autograd.grad(y.nan_to_num(0).sum(), gate_up)
    assert grad[0, [0, 1, 4, 5]].tolist() == pytest.approx([2.0, 0.0, 1e4, 0.0])
