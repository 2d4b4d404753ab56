"""Rotary embedding: the law, both layouts, in place in slices of a fused projection, inverse by the gradient."""

import pytest
import torch
from law import check_law
from trialign.kernels.dispatch import has_op
from trialign.kernels.rope import rope_, rope_ref


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
    check_law(
        lambda x: rope_(x.clone(), cos, sin, interleaved), lambda x: rope_ref(x, cos, sin, interleaved), (x,), (0,)
    )


def test_against_complex_numbers():
    """Turning is multiplication by e^(i angle): an independent float64 truth."""
    n, heads, d = 9, 2, 12
    cos, sin = angles(n, d // 2)
    turn = torch.complex(cos.double(), sin.double())[:, None]
    x = torch.randn(n, heads, d)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn
    torch.testing.assert_close(
        rope_(x.clone(), cos, sin, True).double(), torch.view_as_real(pairs).flatten(-2), rtol=0, atol=1e-6
    )
    half = torch.complex(x[..., : d // 2].double(), x[..., d // 2 :].double()) * turn
    torch.testing.assert_close(rope_(x, cos, sin).double(), torch.cat((half.real, half.imag), -1), rtol=0, atol=1e-6)


def test_a_slice_of_a_fused_projection_turns_in_place_and_nothing_beside_it():
    cos, sin = angles(6, 8)
    fused = torch.randn(6, 5, 16)
    copy = fused.clone()
    turned = rope_(fused[:, 1:4], cos, sin)
    assert turned.data_ptr() == fused[:, 1:4].data_ptr()
    torch.testing.assert_close(fused[:, 1:4], rope_ref(copy[:, 1:4], cos, sin))
    assert torch.equal(fused[:, ::4], copy[:, ::4])
    apart = copy.transpose(1, 2).contiguous().transpose(1, 2)  # a head's entries do not lie side by side
    rope_(apart, cos, sin)
    torch.testing.assert_close(apart, rope_ref(copy, cos, sin))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_a_fused_projection_of_which_a_part_turned(interleaved):
    cos, sin = angles(6, 8)
    weight, x = (torch.randn(*shape, dtype=torch.float64) for shape in ((80, 7), (6, 7)))
    scale = torch.randn(6, 5, 16, dtype=torch.float64)

    def loss(weight, x, turn):
        fused = (x @ weight.T).view(6, 5, 16)
        qk, v = fused[:, :-1], fused[:, -1:]
        return (torch.cat((turn(qk), v), 1) ** 2 * scale.to(x.dtype)).sum()

    leaves = [t.float().requires_grad_() for t in (weight, x)]
    got = torch.autograd.grad(loss(*leaves, lambda t: rope_(t, cos, sin, interleaved)), leaves)
    exact = [t.float().double().requires_grad_() for t in (weight, x)]
    wanted = torch.autograd.grad(loss(*exact, lambda t: rope_ref(t, cos, sin, interleaved)), exact)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


def test_norms_are_kept_and_the_gradient_turns_back_and_spares_its_source():
    cos, sin = angles(7, 16)
    x = torch.randn(7, 3, 32, requires_grad=True)
    y = rope_(x.clone(), cos, sin)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    upstream = y.detach().clone()
    (back,) = torch.autograd.grad(y, x, upstream)  # the gradient of a rotation is its inverse
    torch.testing.assert_close(back, x)
    assert torch.equal(upstream, y)


def test_gradcheck_of_the_reference():
    cos, sin = (t.double() for t in angles(4, 3))
    x = torch.randn(4, 2, 6).double().requires_grad_()
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(lambda x, i=interleaved: rope_ref(x, cos, sin, i), (x,))


@pytest.mark.skipif(not has_op("rope_"), reason="trialign._C is not built")
@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck(interleaved):
    cos, sin = angles(4, 8)
    torch.library.opcheck(torch.ops.trialign.rope_, (torch.randn(4, 3, 16), cos, sin, interleaved, False))
    torch.library.opcheck(torch.ops.trialign.rope_, (torch.randn(4, 5, 16)[:, 1:3], cos, sin, interleaved, True))


def test_wrong_sizes_and_leaves_are_refused():
    cos, sin = angles(4, 8)
    with pytest.raises(ValueError, match=r"cos \[4, 8\] and sin \[4, 8\] do not fit x \[5, 3, 16\]"):
        rope_(torch.randn(5, 3, 16), cos, sin)
    with pytest.raises(RuntimeError, match="leaf"):
        rope_(torch.randn(4, 3, 16, requires_grad=True), cos, sin)
    assert rope_(torch.randn(4, 3, 16, device="meta"), cos.to("meta"), sin.to("meta")).shape == (4, 3, 16)
