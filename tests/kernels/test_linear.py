"""The product of few rows: as accurate as torch's, the same number for any number of rows, threads and strides."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from trialign.kernels.dispatch import has_op
from trialign.kernels.linear import ROWS, linear

SIZES = [(1, 1), (7, 5), (96, 33), (960, 576), (64, 1536), (3, 0), (0, 8)]


def operands(rows, out_size, in_size):
    torch.manual_seed(rows)
    return torch.randn(rows, in_size).bfloat16(), torch.randn(out_size, in_size).bfloat16()


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8, 9, 31, 33, ROWS, ROWS + 1])
@pytest.mark.parametrize("out_size, in_size", SIZES)
def test_error_against_float64(rows, out_size, in_size):
    x, weight = operands(rows, out_size, in_size)
    with torch.no_grad():
        actual = linear(x, weight, frozen=True)
    assert_accurate(actual, F.linear(x, weight), x.double() @ weight.double().T)


@pytest.mark.skipif(not has_op("linear_rows"), reason="trialign._C is not built")
@pytest.mark.parametrize("out_size, in_size", SIZES)
def test_a_row_does_not_depend_on_the_others_or_on_threads(out_size, in_size):
    """70 rows pass a block of rows; 960 outputs are several pieces."""
    x, weight = operands(70, out_size, in_size)
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            alone = torch.cat([linear(row, weight, frozen=True) for row in x.split(1)])
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                for rows in (2, 3, 4, 7, 8, 9, 70):
                    assert torch.equal(linear(x[:rows], weight, frozen=True), alone[:rows])
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_slices_and_batch_dims():
    x, weight = operands(12, 40, 96)
    expected = linear(x[:, 32:64].contiguous(), weight[8:24, 32:64].contiguous(), frozen=True)
    assert torch.equal(linear(x[:, 32:64], weight[8:24, 32:64], frozen=True), expected)
    assert torch.equal(linear(x[:, 32:64].view(3, 4, 32), weight[8:24, 32:64], frozen=True), expected.view(3, 4, -1))
    assert linear(x[0, 32:64], weight[8:24, 32:64], frozen=True).shape == (16,)


@pytest.mark.skipif(not has_op("linear_rows"), reason="trialign._C is not built")
def test_refused_operands():
    x, weight = operands(2, 4, 8)
    with pytest.raises(RuntimeError, match=r"weight is \[4, 8\], must be \[4, 6\]"):
        torch.ops.trialign.linear_rows(x[:, :6], weight)
    with pytest.raises(RuntimeError, match="bfloat16"):
        torch.ops.trialign.linear_rows(x.float(), weight)
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.trialign.linear_rows(x, torch.randn(8, 4).bfloat16().T)
    with pytest.raises(AssertionError, match="no gradient"):
        linear(x, weight, frozen=True)


def test_fp32_is_torchs():
    x, weight = (t.float() for t in operands(3, 16, 24))
    with torch.no_grad():
        assert torch.equal(linear(x, weight, frozen=True), F.linear(x, weight))
