"""Rotary embedding against float64: both layouts, in place in slices of a fused projection, gradients."""

import pytest
import torch
from accuracy import check_accuracy
from implementations import DTYPES, by_mode, device  # noqa: F401 (a fixture)
from trialign.kernels.rope import rope_, rope_ref


def angles(n: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(n)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "n, heads, d", by_mode([(1, 1, 2), (5, 3, 22), (70, 12, 64), (3, 2, 128), (0, 4, 16)], [(3, 9, 64), (2, 1, 6)])
)
def test_error_against_float64(n, heads, d, interleaved, dtype):
    fn = lambda x: rope_(x.clone(), *angles(n, d // 2), interleaved)  # noqa: E731
    ref = lambda x: rope_ref(x, *angles(n, d // 2), interleaved)  # noqa: E731
    check_accuracy(fn, ref, (torch.randn(n, heads, d).to(dtype),), (0,))


def test_slice_of_a_fused_projection_is_rotated_in_place():
    cos, sin = angles(6, 8)
    fused = torch.randn(6, 5, 16)
    copy = fused.clone()
    turned = rope_(fused[:, 1:4], cos, sin)
    assert turned.data_ptr() == fused[:, 1:4].data_ptr()
    torch.testing.assert_close(fused[:, 1:4], rope_ref(copy[:, 1:4], cos, sin))
    assert torch.equal(fused[:, ::4], copy[:, ::4])  # neighbors are untouched
    strided = copy.transpose(1, 2).contiguous().transpose(1, 2)
    rope_(strided, cos, sin)
    torch.testing.assert_close(strided, rope_ref(copy, cos, sin))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_through_a_partly_rotated_projection(interleaved):
    cos, sin = angles(6, 8)
    weight, x, scale = torch.randn(80, 7), torch.randn(6, 7), torch.randn(6, 5, 16)

    def loss(turn, weight, x):
        fused = (x @ weight.T).view(6, 5, 16)
        return (torch.cat((turn(fused[:, :-1], cos, sin, interleaved), fused[:, -1:]), 1) ** 2 * scale).sum()

    leaves = [t.requires_grad_() for t in (weight, x)]
    actual = torch.autograd.grad(loss(rope_, *leaves), leaves)
    exact = [t.detach().double().requires_grad_() for t in (weight, x)]
    for a, b in zip(actual, torch.autograd.grad(loss(rope_ref, *exact), exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


def test_leaves_that_require_a_gradient_are_refused():
    with pytest.raises(RuntimeError, match="leaf"):
        rope_(torch.randn(4, 3, 16, requires_grad=True), *angles(4, 8))
