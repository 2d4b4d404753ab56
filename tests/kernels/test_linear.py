"""The product by a packed weight: as accurate as the plain one, for any number of rows."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from trialign.kernels.linear import linear, pack


@pytest.mark.parametrize("rows", [0, 1, 3, 32, 200])
@pytest.mark.parametrize("out_size, in_size", [(1, 1), (7, 5), (96, 33), (960, 576), (64, 1536)])
def test_packed_error_against_float64(rows, out_size, in_size):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, in_size).bfloat16(), torch.randn(out_size, in_size).bfloat16()
    with torch.no_grad():
        actual = linear(x, weight, pack(weight))
    assert_accurate(actual, F.linear(x, weight), x.double() @ weight.double().T)


@pytest.mark.skipif(pack(torch.zeros(8, 8).bfloat16()) is None, reason="this processor has no bf16 in oneDNN")
def test_packed_weight_is_a_copy_without_a_gradient():
    weight = torch.ones(8, 8, dtype=torch.bfloat16)
    packed, x = pack(weight), torch.ones(1, 8, dtype=torch.bfloat16)
    weight.zero_()
    with torch.no_grad():
        assert torch.equal(linear(x, weight, packed), torch.full((1, 8), 8.0))
    with pytest.raises(AssertionError, match="no gradient"):
        linear(x, weight, packed)
