"""Rotary embedding: the law, both layouts, slices of a fused projection, inverse by the gradient."""

import pytest
import torch
from law import check_law
from trialign.kernels.dispatch import has_op
from trialign.kernels.rope import rope, rope_ref


def angles(n: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(n)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("n,heads,d", [(1, 1, 2), (5, 3, 22), (70, 12, 64), (3, 2, 128), (0, 4, 16)])
def test_law(n, heads, d, interleaved, dtype):
    torch.manual_seed(d)
    cos, sin = angles(n, d // 2)
    x = torch.randn(n, heads, d).to(dtype)
    check_law(lambda x: rope(x, cos, sin, interleaved), lambda x: rope_ref(x, cos, sin, interleaved), (x,), (0,))


def test_against_complex_numbers():
    """Turning is multiplication by e^(i angle): an independent float64 truth."""
    n, heads, d = 9, 2, 12
    cos, sin = angles(n, d // 2)
    turn = torch.complex(cos.double(), sin.double())[:, None]
    x = torch.randn(n, heads, d)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn
    torch.testing.assert_close(
        rope(x, cos, sin, True).double(), torch.view_as_real(pairs).flatten(-2), rtol=0, atol=1e-6
    )
    half = torch.complex(x[..., : d // 2].double(), x[..., d // 2 :].double()) * turn
    torch.testing.assert_close(rope(x, cos, sin).double(), torch.cat((half.real, half.imag), -1), rtol=0, atol=1e-6)


def test_a_slice_of_a_fused_projection_is_read_in_place_and_left_alone():
    cos, sin = angles(6, 8)
    fused = torch.randn(6, 5, 16)
    copy = fused.clone()
    torch.testing.assert_close(rope(fused[:, 1:4], cos, sin), rope_ref(fused[:, 1:4], cos, sin))
    turned = rope(fused.transpose(1, 2)[:, :16].transpose(1, 2), cos, sin)
    torch.testing.assert_close(turned, rope_ref(fused, cos, sin))
    assert torch.equal(fused, copy)


def test_norms_are_kept_and_the_gradient_turns_back():
    cos, sin = angles(7, 16)
    x = torch.randn(7, 3, 32, requires_grad=True)
    y = rope(x, cos, sin)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    (back,) = torch.autograd.grad(y, x, y)  # the gradient of a rotation is its inverse
    torch.testing.assert_close(back, x)


def test_gradcheck_of_the_reference():
    cos, sin = (t.double() for t in angles(4, 3))
    x = torch.randn(4, 2, 6).double().requires_grad_()
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(lambda x, i=interleaved: rope_ref(x, cos, sin, i), (x,))


@pytest.mark.skipif(not has_op("rope"), reason="trialign._C is not built")
@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck(interleaved):
    cos, sin = angles(4, 8)
    x = torch.randn(4, 3, 16, requires_grad=True)
    torch.library.opcheck(torch.ops.trialign.rope, (x, cos, sin, interleaved, False))
    torch.library.opcheck(torch.ops.trialign.rope, (torch.randn(4, 5, 16)[:, 1:3], cos, sin, interleaved, True))


def test_wrong_sizes_are_refused():
    cos, sin = angles(4, 8)
    with pytest.raises(RuntimeError):
        rope(torch.randn(5, 3, 16), cos, sin)
    assert rope(torch.randn(4, 3, 16, device="meta"), cos.to("meta"), sin.to("meta")).shape == (4, 3, 16)
