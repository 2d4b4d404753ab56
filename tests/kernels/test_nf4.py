"""NF4: the table of the paper, nearest codes, the product and its gradient against float64."""

import pytest
import torch
from accuracy import FLOOR, check_accuracy
from implementations import DTYPES, device  # noqa: F401 (a fixture)
from trialign.kernels import nf4
from trialign.kernels.nf4 import TABLE, dequantize_nf4, nf4_linear, nf4_linear_ref, quantize_nf4


def test_codes_are_the_nearest_and_survive_a_round_trip():
    weight = torch.randn(6, 128)
    weight[2, :64] = 0
    codes, absmax = quantize_nf4(weight)
    assert codes.dtype == torch.uint8 and codes.shape == (6, 64) and absmax.shape == (6, 2)
    back = dequantize_nf4(codes, absmax, torch.float32)
    scaled = weight.view(6, 2, 64) / absmax.clamp_min(1e-30)[:, :, None]
    distance = (scaled[..., None] - torch.tensor(TABLE)).abs().amin(-1) * absmax[:, :, None]
    assert torch.allclose((back - weight).abs().view(6, 2, 64), distance, atol=1e-6)
    assert not back[2, :64].any()
    assert all(torch.equal(a, b) for a, b in zip(quantize_nf4(back), (codes, absmax), strict=True))


def test_codes_are_independent_of_the_chunk_size(monkeypatch):
    weight = torch.randn(100, 192)
    whole = quantize_nf4(weight)
    for chunk in (1, 1000, 19200):
        monkeypatch.setattr(nf4, "CHUNK", chunk)
        assert all(torch.equal(actual, expected) for actual, expected in zip(quantize_nf4(weight), whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, n, k", [((1,), 24, 192), ((5,), 24, 128), ((2, 3), 24, 192), ((70,), 70, 64)])
def test_error_against_float64(dtype, shape, n, k):
    codes, absmax = quantize_nf4(torch.randn(n, k))
    fn, ref = lambda x: nf4_linear(x, codes, lambda: absmax), lambda x: nf4_linear_ref(x, codes, absmax)
    check_accuracy(fn, ref, (torch.randn(*shape, k).to(dtype),), (0,), FLOOR[dtype])
    assert nf4_linear(torch.zeros(0, k), codes, lambda: absmax).shape == (0, n)
