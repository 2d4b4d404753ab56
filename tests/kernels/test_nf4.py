"""NF4: the table of the paper, nearest codes, the product under the law, forward and backward."""

import pytest
import torch
from law import assert_law
from trialign.kernels import nf4
from trialign.kernels.nf4 import TABLE, dequantize_nf4, nf4_linear, nf4_linear_ref, quantize_nf4


def test_the_table_is_the_normal_distributions_quantiles():
    """Appendix E of QLoRA: 8 quantiles above zero, 7 below, and zero, between 1 - 0.9677083 and 0.9677083."""
    offset = 0.9677083
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((above, torch.zeros(1, dtype=torch.float64), below)).sort().values
    assert torch.allclose(values / values.max(), torch.tensor(TABLE, dtype=torch.float64), atol=1e-6)


def test_codes_are_the_nearest_and_survive_a_round_trip():
    torch.manual_seed(0)
    weight = torch.randn(6, 128)
    weight[2, :64] = 0
    codes, absmax = quantize_nf4(weight)
    assert codes.dtype == torch.uint8 and codes.shape == (6, 64) and absmax.shape == (6, 2)
    back = dequantize_nf4(codes, absmax, torch.float32)
    scaled = weight.view(6, 2, 64) / absmax.clamp_min(1e-30)[:, :, None]
    distance = (scaled[..., None] - torch.tensor(TABLE)).abs().amin(-1) * absmax[:, :, None]
    assert torch.allclose((back - weight).abs().view(6, 2, 64), distance, atol=1e-6)
    assert torch.equal(back[2, :64], torch.zeros(64))
    again = quantize_nf4(back)
    assert torch.equal(again[0], codes) and torch.equal(again[1], absmax)


def test_codes_do_not_depend_on_how_many_rows_are_quantized_at_a_time(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(100, 192)
    whole = quantize_nf4(weight)
    for chunk in (1, 1000, 19200):
        monkeypatch.setattr(nf4, "CHUNK", chunk)
        assert all(torch.equal(got, expected) for got, expected in zip(quantize_nf4(weight), whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), (0,)])
def test_law(dtype, shape):
    torch.manual_seed(0)
    codes, absmax = quantize_nf4(torch.randn(24, 192))
    x, grad = torch.randn(*shape, 192).to(dtype), torch.randn(*shape, 24).to(dtype)
    leaf = x.clone().requires_grad_()
    y = nf4_linear(leaf, codes, absmax)
    (dx,) = torch.autograd.grad(y, leaf, grad)
    eager, exact = (dequantize_nf4(codes, absmax, t) for t in (dtype, torch.float64))
    assert_law(y.detach(), x @ eager.t(), x.double() @ exact.t(), "y")
    assert_law(dx, grad @ eager, grad.double() @ exact, "dx")


def test_gradcheck_of_the_reference():
    torch.manual_seed(0)
    codes, absmax = quantize_nf4(torch.randn(5, 64))
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: nf4_linear_ref(x, codes, absmax), x)


def test_opcheck():
    codes, absmax = quantize_nf4(torch.randn(8, 64))
    x = torch.randn(3, 64, requires_grad=True)
    torch.library.opcheck(torch.ops.trialign.nf4_linear.default, (x, codes, absmax))


def test_refusals():
    with pytest.raises(ValueError, match=r"multiple of 64 weights, got \[2, 65\]"):
        quantize_nf4(torch.zeros(2, 65))
    with pytest.raises(ValueError, match="not finite"):
        quantize_nf4(torch.full((1, 64), torch.inf))
    codes, absmax = quantize_nf4(torch.zeros(2, 64))
    with pytest.raises(ValueError, match=r"x \[3, 128\] does not fit codes \[2, 32\]"):
        nf4_linear(torch.zeros(3, 128), codes, absmax)
