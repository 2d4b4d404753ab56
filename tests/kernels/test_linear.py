"""The packed product equals the plain one to bf16's own rounding, for any number of rows."""

import pytest
import torch
import torch.nn.functional as F
from law import assert_law
from trialign.kernels.linear import linear, pack


def packable() -> bool:
    return pack(torch.zeros(8, 8, dtype=torch.bfloat16)) is not None


@pytest.mark.parametrize("rows", [0, 1, 3, 32, 200])
@pytest.mark.parametrize("out_size, in_size", [(1, 1), (7, 5), (96, 33), (960, 576), (64, 1536)])
def test_packed_is_as_exact_as_plain(rows, out_size, in_size):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, in_size, generator=generator).bfloat16()
    weight = torch.randn(out_size, in_size, generator=generator).bfloat16()
    exact = x.double() @ weight.double().T
    with torch.no_grad():
        packed = pack(weight)
        got = linear(x, weight, packed)
    assert_law(got, F.linear(x, weight), exact)


def test_nothing_is_packed_where_it_does_not_help():
    assert pack(torch.zeros(8, 8)) is None
    assert pack(torch.zeros(8, 8, dtype=torch.float16)) is None
    assert pack(torch.zeros(8, 8, dtype=torch.bfloat16, device="meta")) is None
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    assert torch.equal(linear(x, weight, pack(weight)), F.linear(x, weight))


@pytest.mark.skipif(not packable(), reason="this processor has no bf16 in oneDNN")
def test_a_packed_weight_refuses_a_gradient():
    weight = torch.randn(8, 8, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="no gradient"):
        linear(torch.randn(2, 8, dtype=torch.bfloat16), weight, pack(weight))


@pytest.mark.skipif(not packable(), reason="this processor has no bf16 in oneDNN")
def test_a_packed_copy_does_not_follow_the_weight():
    weight = torch.ones(8, 8, dtype=torch.bfloat16)
    packed = pack(weight)
    weight.zero_()
    with torch.no_grad():
        assert torch.equal(linear(torch.ones(1, 8, dtype=torch.bfloat16), weight, packed), torch.full((1, 8), 8.0))
