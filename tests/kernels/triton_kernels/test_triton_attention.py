"""The Triton kernels of packed attention against float64, forward and backward; documents of every awkward length."""

import pytest
import torch
from law import assert_law
from trialign.kernels import attention
from trialign.kernels.attention import attention_backward_triton, attention_triton, packed_attention_ref
from triton_case import DEVICE, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# A window of 2 reaches just one key, or one query, into the next block.
@pytest.mark.parametrize("alibi, window", [(False, None), (True, None), (False, 2), (True, 20)])
@pytest.mark.parametrize("lengths, heads, kv_heads, d", [([33, 1, 0, 20], 2, 1, 16), ([70], 3, 3, 20)])
def test_law(dtype, alibi, window, lengths, heads, kv_heads, d):
    torch.manual_seed(0)
    total, scale = sum(lengths), d**-0.5
    cu = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    q, k, v, grad = (torch.randn(total, h, d, device=DEVICE).to(dtype) for h in (heads, kv_heads, kv_heads, heads))
    # The last is negative and, but for fp32, whose law knows no lifts, steep: no row behind the document may overflow.
    steep = -0.5 if dtype == torch.float32 else -4.0
    slopes = torch.tensor([*(2.0**-i for i in range(1, heads)), steep], device=DEVICE) if alibi else None

    def reference(*tensors):
        *leaves, upstream = (t.clone().requires_grad_() for t in tensors)
        out = packed_attention_ref(*leaves, cu, max(lengths), scale, slopes, window)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    exact = reference(*(t.double() for t in (q, k, v, grad)))
    eager = reference(q, k, v, grad)
    out, stats = attention_triton(q, k, v, cu, max(lengths), scale, slopes, window)
    grads = attention_backward_triton(grad, q, k, v, out, stats, cu, max(lengths), scale, slopes, window)
    for name, got, plain, right in zip(("out", "dq", "dk", "dv"), (out, *grads), eager, exact, strict=True):
        assert_law(got, plain, right, name)


@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
def test_head_dims(d):
    """Each set of block sizes, at lengths just past them; in bf16, which takes the larger blocks."""
    torch.manual_seed(d)
    q, k, v, grad = (torch.randn(72, heads, d, device=DEVICE).bfloat16() for heads in (2, 1, 1, 2))
    cu = torch.tensor([0, 0, 1, 70, 72], device=DEVICE)

    def reference(*tensors):
        *leaves, upstream = (t.clone().requires_grad_() for t in tensors)
        out = packed_attention_ref(*leaves, cu, 69, d**-0.5)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    eager, exact = reference(q, k, v, grad), reference(*(t.double() for t in (q, k, v, grad)))
    out, stats = attention_triton(q, k, v, cu, 69, d**-0.5, None, None)
    grads = attention_backward_triton(grad, q, k, v, out, stats, cu, 69, d**-0.5, None, None)
    for name, got, plain, right in zip(("out", "dq", "dk", "dv"), (out, *grads), eager, exact, strict=True):
        assert_law(got, plain, right, name)


def test_a_window_beyond_every_document_and_more_documents_than_a_grid_holds(monkeypatch):
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(40, heads, 16, device=DEVICE) for heads in (2, 1, 1, 2))
    cu = torch.tensor([0, 3, 3, 8, 39, 40], device=DEVICE)

    def run(window):
        out, stats = attention_triton(q, k, v, cu, 31, 0.25, None, window)
        return out, *attention_backward_triton(grad, q, k, v, out, stats, cu, 31, 0.25, None, window)

    whole = run(None)
    monkeypatch.setattr(attention, "DOCUMENTS", 2)
    for window in (None, 2**31 - 1, 2**40):
        for got, right in zip(run(window), whole, strict=True):
            assert torch.equal(got, right)


def test_slices_of_a_fused_projection():
    torch.manual_seed(0)
    qkv = torch.randn(12, 4, 16, device=DEVICE)
    q, k, v = qkv.split((2, 1, 1), 1)
    cu = torch.tensor([0, 5, 12], device=DEVICE)
    sliced = attention_triton(q, k, v, cu, 7, 0.25, None, None)
    copied = attention_triton(q.contiguous(), k.contiguous(), v.contiguous(), cu, 7, 0.25, None, None)
    assert torch.equal(sliced[0], copied[0])


def test_nothing_to_do():
    empty = torch.empty(0, 2, 16, device=DEVICE)
    out, stats = attention_triton(
        empty, empty, empty, torch.zeros(1, dtype=torch.int64, device=DEVICE), 0, 1.0, None, None
    )
    assert out.shape == (0, 2, 16) and stats.shape == (0, 2, 2)
