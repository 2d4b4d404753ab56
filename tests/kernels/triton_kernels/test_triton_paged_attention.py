"""The Triton kernels of the paged cache: decode attention under the law, whole and split, and the write."""

import pytest
import torch
from law import assert_law
from trialign.kernels import paged_attention as module
from trialign.kernels.paged_attention import paged_attention_ref, paged_attention_triton, write_kv_ref, write_kv_triton
from triton_case import DEVICE, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("lengths, heads, kv_heads, d, page", [([1, 70], 3, 1, 20, 4), ([130], 18, 1, 16, 16)])
def test_law(dtype, splits, lengths, heads, kv_heads, d, page, monkeypatch):
    monkeypatch.setattr(module, "SPLITS", splits)
    torch.manual_seed(0)
    width = max(-(-n // page) for n in lengths)
    blocks = len(lengths) * width
    tables = torch.randperm(blocks).view(len(lengths), width).int()
    k_cache, v_cache = (torch.full((blocks, page, kv_heads, d), torch.nan, dtype=dtype) for _ in range(2))
    for row, n in zip(tables.tolist(), lengths, strict=True):
        for p in range(n):
            k_cache[row[p // page], p % page] = torch.randn(kv_heads, d).to(dtype)
            v_cache[row[p // page], p % page] = torch.randn(kv_heads, d).to(dtype)
    q = torch.randn(len(lengths), heads, d).to(dtype)
    q, k_cache, v_cache, tables = (t.to(DEVICE) for t in (q, k_cache, v_cache, tables))
    n = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    falling = 2.0 ** -torch.arange(1.0, heads + 1, device=DEVICE)
    for slopes, window in ((None, None), (falling, None), (None, 33), (falling, 1), (None, 500), (None, 2**40)):
        args = (tables, n, 0.3, slopes, window)
        exact = paged_attention_ref(q.double(), k_cache.double(), v_cache.double(), *args)
        eager = paged_attention_ref(q, k_cache, v_cache, *args)
        got = paged_attention_triton(q, k_cache, v_cache, *args)
        assert_law(got, eager, exact, f"alibi {slopes is not None}, window {window}")


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_scores(size):
    """Scores of 1e4 that differ by little, and shares of the keys that weigh nothing beside others."""
    torch.manual_seed(0)
    q, k_cache, v_cache = (torch.randn(*shape, device=DEVICE) for shape in ((1, 2, 16), (9, 16, 1, 16), (9, 16, 1, 16)))
    k_cache[..., 0], q[..., 0] = size, 1.0
    k_cache[4, :, :, 0] *= 1.01
    tables = torch.arange(9, dtype=torch.int32, device=DEVICE)[None]
    args = (tables, torch.tensor([140], dtype=torch.int32, device=DEVICE), 1.0, None, None)
    exact = paged_attention_ref(q.double(), k_cache.double(), v_cache.double(), *args)
    eager, got = paged_attention_ref(q, k_cache, v_cache, *args), paged_attention_triton(q, k_cache, v_cache, *args)
    assert_law(got, eager, exact)


def test_no_sequence():
    q, caches = torch.empty(0, 2, 16, device=DEVICE), [torch.zeros(1, 4, 1, 16, device=DEVICE)] * 2
    tables, n = (torch.empty(*shape, dtype=torch.int32, device=DEVICE) for shape in ((0, 1), (0,)))
    assert paged_attention_triton(q, *caches, tables, n, 1.0, None, None).shape == (0, 2, 16)


def test_write_kv():
    qkv = torch.randn(5, 4, 20, device=DEVICE)
    k, v = qkv.split((2, 2), 1)
    slots = torch.tensor([0, 7, 3, 11, 8], device=DEVICE)
    ours, right = ([torch.zeros(3, 4, 2, 20, device=DEVICE) for _ in range(2)] for _ in range(2))
    write_kv_triton(k, v, *ours, slots)
    write_kv_ref(k, v, *right, slots)
    assert torch.equal(ours[0], right[0]) and torch.equal(ours[1], right[1])
