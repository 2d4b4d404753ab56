"""Packed attention: the law, forward and backward, in C++ and by torch's fused attention; documents stay apart."""

import pytest
import torch
from law import assert_law
from trialign.kernels.attention import packed_attention, packed_attention_ref, sdpa_attention
from trialign.kernels.dispatch import has_op

OPTIONS = {
    "plain": {},
    "alibi": {"alibi_slopes": True},
    "window": {"window": 3},
    "both": {"alibi_slopes": True, "window": 70},
}


def compiled(q, k, v, cu_seqlens, scale, **options):
    if not has_op("attention"):
        pytest.skip("trialign._C is not usable")
    return packed_attention(q, k, v, cu_seqlens, q.shape[0], scale, **options)


def inputs(lengths, heads, kv_heads, d, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    q, k, v, grad = (
        torch.randn(total, h, d, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads, heads)
    )
    return q, k, v, grad, torch.tensor([0, *lengths]).cumsum(0)


def with_grads(function, q, k, v, grad):
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("implementation", [compiled, sdpa_attention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("lengths", [[5, 5, 5], [7, 1, 30, 29, 0, 3], [1], [131, 64, 65, 48, 49, 6]])
@pytest.mark.parametrize("heads, kv_heads, d", [(6, 2, 64), (3, 3, 20), (4, 1, 80)])
def test_law(implementation, dtype, option, lengths, heads, kv_heads, d):
    q, k, v, grad, cu = inputs(lengths, heads, kv_heads, d, dtype)
    options = dict(OPTIONS[option])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = 2.0 ** -torch.arange(1, heads + 1)
    scale = d**-0.5
    exact = with_grads(
        lambda q, k, v: packed_attention_ref(q, k, v, cu, max(lengths), scale, **options),
        *(t.double() for t in (q, k, v, grad)),
    )
    eager = with_grads(lambda q, k, v: packed_attention_ref(q, k, v, cu, max(lengths), scale, **options), q, k, v, grad)
    ours = with_grads(lambda q, k, v: implementation(q, k, v, cu, scale, **options), q, k, v, grad)
    for name, got, plain, right in zip(("out", "dq", "dk", "dv"), ours, eager, exact, strict=True):
        # torch's fused backward misses the law by itself where the softmax has one entry.
        torchs = {torch.float32: 4e-6, torch.bfloat16: 4e-3}[dtype]
        assert_law(got, plain, right, name, torchs if implementation is sdpa_attention else None)


def test_reference_gradients():
    q, k, v, _, cu = inputs([3, 1, 4], 4, 2, 3, torch.float64)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: packed_attention_ref(q, k, v, cu, 4, 0.5, slopes, 3), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_do_not_see_each_other(dtype):
    q, k, v, grad, cu = inputs([9, 17, 4], 2, 2, 32, dtype)
    whole = with_grads(lambda q, k, v: packed_attention(q, k, v, cu, 17, 0.2), q, k, v, grad)
    alone = with_grads(
        lambda q, k, v: packed_attention(q, k, v, torch.tensor([0, 17]), 17, 0.2), *(t[9:26] for t in (q, k, v, grad))
    )
    for got, right in zip(whole, alone, strict=True):
        assert torch.equal(got[9:26], right)


def test_slices_of_a_fused_projection_and_int32_bounds():
    torch.manual_seed(0)
    qkv = torch.randn(12, 8, 16)
    q, k, v = qkv.split((4, 2, 2), 1)
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    copies = [t.contiguous() for t in (q, k, v)]
    assert torch.equal(packed_attention(q, k, v, cu, 7, 0.25), packed_attention(*copies, cu, 7, 0.25))
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in copies]  # heads outermost in memory
    assert torch.equal(packed_attention(*turned, cu, 7, 0.25), packed_attention(*copies, cu, 7, 0.25))


def test_large_scores_stay_finite():
    q, k, v, grad, cu = inputs([40], 2, 1, 16, torch.float32)
    ours = with_grads(lambda q, k, v: packed_attention(q, k, v, cu, 40, 1.0), 100 * q, 100 * k, v, grad)
    exact = with_grads(
        lambda q, k, v: packed_attention_ref(q, k, v, cu, 40, 1.0), *(t.double() for t in (100 * q, 100 * k, v, grad))
    )
    assert all(t.isfinite().all() for t in ours)
    assert (ours[0] - exact[0]).abs().max() < 1e-2  # scores near 1e5 carry an fp32 error of 1e-2 themselves


def test_nan_is_neither_hidden_nor_handed_to_other_documents():
    q, k, v, grad, cu = inputs([6, 5], 2, 1, 16, torch.float32)
    k[3] = torch.nan
    out, *grads = with_grads(lambda q, k, v: packed_attention(q, k, v, cu, 6, 0.3), q, k, v, grad)
    assert out[3:6].isnan().all() and grads[0][3:6].isnan().all() and grads[1][:6].isnan().any()
    for t in (out, *grads):
        assert not t[6:].isnan().any()


def test_refusals():
    q, k, v, _, cu = inputs([4], 6, 4, 8, torch.float32)
    with pytest.raises(ValueError, match="6 query heads .* 4 key/value heads"):
        packed_attention(q, k, v, cu, 4, 1.0)
    if has_op("attention"):
        q, k, v, _, _ = inputs([4], 4, 4, 8, torch.float32)
        with pytest.raises(RuntimeError, match="must lie within 0 and 4"):
            packed_attention(q, k, v, torch.tensor([0, 5]), 4, 1.0)
        with pytest.raises(RuntimeError, match="must run from 0 to 4"):
            packed_attention(q, k, v, torch.tensor([0, 3]), 4, 1.0)
        with pytest.raises(RuntimeError, match="document 0 has 4 tokens, allowed are 0 to 3"):
            packed_attention(q, k, v, torch.tensor([0, 4]), 3, 1.0)


@pytest.mark.skipif(not has_op("attention"), reason="trialign._C is not usable")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    q, k, v, _, cu = inputs([3, 4], 4, 2, 8, dtype)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.trialign.attention.default, (*leaves, cu, 4, 0.5, None, None))
    torch.library.opcheck(torch.ops.trialign.attention.default, (*leaves, cu, 4, 0.5, torch.rand(4), 2))
