"""NF4: the table of the paper, nearest codes, the product and its gradient against float64."""

import pytest
import torch
from accuracy import FLOOR, assert_accurate, check_accuracy
from implementations import DTYPES, FAULT, INTERPRET, device, interpreted_only  # noqa: F401 (a fixture)
from planted import planted
from trialign.kernels import nf4
from trialign.kernels.nf4 import (
    NF4,
    TABLE,
    dequantize_nf4,
    nf4_linear,
    nf4_linear_ref,
    nf4_unpack,
    nf4_unpack_ref,
    pack_nf4,
    quantize_nf4,
)


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


def stacked(n: int, k: int) -> NF4:
    """The first and the last rows of two weights on one another, with groups and offsets of their own."""
    a, b = pack_nf4(torch.randn(n, k)), pack_nf4(torch.randn(n + 300, k) * 3 + 0.1)
    skip = 256 * len(a.groups)  # the second weight's groups begin after the first one's
    rows = NF4(*(torch.cat(pair) for pair in zip(a, b._replace(first=b.first + skip), strict=True)))
    kept = torch.cat((torch.arange(n // 2), torch.arange(2 * n + 300 - (n - n // 2), 2 * n + 300)))
    return NF4(*(t if t is rows.groups else t[kept] for t in rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k", [(24, 192), (33, 64), (40, 1024)])
def test_unpacked_equals_the_formula(n, k, dtype):
    weight = stacked(n, k)
    actual, expected = nf4_unpack(weight, dtype), nf4_unpack_ref(weight, dtype)
    assert actual.shape == weight.shape and len(weight.offsets.unique()) == 2
    torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)  # a GPU fuses the addition


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, n, k", [((1,), 24, 192), ((5,), 24, 128), ((2, 3), 24, 192), ((70,), 70, 64)])
def test_error_against_float64(dtype, shape, n, k):
    weight = stacked(n, k)
    fn, ref = (lambda x, f=f: f(x, weight) for f in (nf4_linear, nf4_linear_ref))
    check_accuracy(fn, ref, (torch.randn(*shape, k).to(dtype),), (0,), FLOOR[dtype])
    assert nf4_linear(torch.zeros(0, k), weight).shape == (0, n)


def gemv_error(rows: int, n: int, k: int, dtype: torch.dtype, weight: NF4, module=nf4) -> None:
    x = torch.randn(rows, k).to(dtype)
    with torch.no_grad():
        actual = module.nf4_gemv_triton(x, weight) if INTERPRET else nf4_linear(x, weight)
    eager, exact = nf4_linear_ref(x, weight), nf4_linear_ref(x.double(), weight)
    assert_accurate(actual, eager, exact, floor=FLOOR[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, n, k", [(1, 24, 192), (3, 33, 64), (8, 40, 1088), (16, 64, 256), (17, 24, 128)])
def test_error_of_a_few_rows_without_a_gradient(rows, n, k, dtype):
    """As in decoding, where the packed weight is read once; one row more than the kernel takes is a matmul."""
    if not (INTERPRET and rows > nf4.GEMV_ROWS):
        gemv_error(rows, n, k, dtype, stacked(n, k))


def test_a_weight_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"x \[2, 128\] does not fit a weight of \[24, 192\]"):
        nf4_linear(torch.zeros(2, 128), stacked(24, 192))


FAULTS = {  # what is wrong, in the unpacking that both kernels share, and how it shows
    "groups of the first weight": ("tl.load(first_ptr + rows, mask=real, other=0) + blocks", "number", AssertionError),
    "a missing mask": ("codes_ptr + place, mask=real, other=0", "codes_ptr + place", FAULT),
    "halves exchanged": ("(packed >> 4)", "(packed & 15)", AssertionError),
}


@interpreted_only
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name, tmp_path, monkeypatch):
    old, new, error = FAULTS[name]
    faulty = planted(nf4, old, new, tmp_path, monkeypatch)
    with pytest.raises(error):
        gemv_error(3, 33, 192, torch.float32, stacked(33, 192), faulty)
