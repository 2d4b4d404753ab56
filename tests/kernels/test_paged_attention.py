"""The paged cache: decode attention against float64, writes to the right rows, nothing read outside a sequence."""

import pytest
import torch
from accuracy import assert_accurate
from implementations import DTYPES, by_mode, cpp_only, device  # noqa: F401 (a fixture)
from trialign.kernels import paged_attention as module
from trialign.kernels.attention import packed_attention
from trialign.kernels.paged_attention import paged_attention, paged_attention_ref, write_kv


def cache(lengths, heads, kv_heads, d, block, dtype):
    """A query a sequence, a cache whose unused rows hold NaN, block tables and lengths."""
    width = max(-(-n // block) for n in lengths)
    blocks = len(lengths) * width + 2
    tables = torch.randperm(blocks)[: len(lengths) * width].view(-1, width).int()
    k_cache, v_cache = (torch.full((blocks, block, kv_heads, d), torch.nan, dtype=dtype) for _ in range(2))
    for row, n in zip(tables, lengths, strict=True):
        slots = row.repeat_interleave(block)[:n].long() * block + torch.arange(n) % block
        for c in (k_cache, v_cache):
            c.view(-1, kv_heads, d)[slots] = torch.randn(n, kv_heads, d).to(dtype)
    return torch.randn(len(lengths), heads, d).to(dtype), k_cache, v_cache, tables, torch.tensor(lengths).int()


def check(q, k_cache, v_cache, *rest):
    exact = paged_attention_ref(q.double(), k_cache.double(), v_cache.double(), *rest)
    eager = paged_attention_ref(q, k_cache, v_cache, *rest)
    assert_accurate(paged_attention(q, k_cache, v_cache, *rest), eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", by_mode([8], [1, 8]))
@pytest.mark.parametrize(
    "alibi, window", [(False, None), (True, None), (True, 1), (False, 16), (True, 33), (False, 500), (False, 2**40)]
)
@pytest.mark.parametrize(
    "lengths, heads, kv_heads, d, block",
    by_mode(
        [([1, 15, 16, 17, 100], 6, 2, 64, 16), ([33, 2, 7], 5, 1, 80, 16), ([70, 8, 64], 7, 1, 128, 8)],
        [([1, 70], 3, 1, 20, 4), ([130], 18, 1, 16, 16)],
    )
    + [([9], 4, 4, 20, 4), ([3], 2, 2, 8, 1)],
)
def test_error_against_float64(dtype, splits, alibi, window, lengths, heads, kv_heads, d, block, monkeypatch):
    monkeypatch.setattr(module, "splits_of", lambda *_: splits)
    monkeypatch.setattr(module, "LEAST", 32)
    slopes = 2.0 ** -torch.arange(1.0, heads + 1) if alibi else None
    check(*cache(lengths, heads, kv_heads, d, block, dtype), d**-0.5, slopes, window)


@pytest.mark.parametrize(
    "batch, kv_heads, span, multiprocessors, splits",
    [
        (1, 8, 32768, 132, 64),  # a lone sequence fills the GPU
        (1, 8, 512, 132, 2),  # but no split has fewer keys than LEAST
        (32, 8, 4096, 132, 4),
        (256, 8, 4096, 132, 1),
        (256, 1, 4096, 132, 4),  # tensor parallelism leaves one head
        (256, 8, 32768, 132, 8),  # no split beyond LONGEST
        (256, 8, 32768, 108, 8),
    ],
)
def test_splits_by_multiprocessors_and_length(batch, kv_heads, span, multiprocessors, splits):
    assert module.splits_of(batch * kv_heads, span, multiprocessors) == splits


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_error_with_huge_scores(size):
    """Scores of 1e4 that differ by little, and keys whose weight vanishes beside others."""
    q, k_cache, v_cache = torch.randn(1, 2, 16), torch.randn(9, 16, 1, 16), torch.randn(9, 16, 1, 16)
    k_cache[..., 0], q[..., 0] = size, 1.0
    k_cache[4, :, :, 0] *= 1.01
    check(q, k_cache, v_cache, torch.arange(9).int()[None], torch.tensor([140]).int(), 1.0, None, None)


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_equals_packed_attention(dtype, window):
    """Writes a document token by token through the table and reads each position back by attention."""
    total, block = by_mode(21, 5), 4
    q, k, v = (torch.randn(total, h, 32).to(dtype) for h in (4, 2, 2))
    whole = packed_attention(q, k, v, torch.tensor([0, total]), total, 0.3, window=window)
    k_cache, v_cache = (torch.full((8, block, 2, 32), torch.nan, dtype=dtype) for _ in range(2))
    table = torch.tensor([[5, 0, 7, 2, 3, 6]], dtype=torch.int32)
    for p in range(total):
        slot = table[0, p // block].long()[None] * block + p % block
        write_kv(k[p : p + 1], v[p : p + 1], k_cache, v_cache, slot)
        write_kv(k[:0], v[:0], k_cache, v_cache, slot[:0])
        length = torch.tensor([p + 1], dtype=torch.int32)
        out = paged_attention(q[p : p + 1], k_cache, v_cache, table, length, 0.3, window=window)
        assert torch.allclose(out[0].float(), whole[p].float(), atol=2e-6 if dtype == torch.float32 else 2e-2)


def test_nan_stays_in_its_sequence():
    q, k_cache, v_cache, tables, n = cache([20, 6], 2, 1, 8, 4, torch.float32)
    k_cache[int(tables[0, 1]), 2] = torch.nan
    assert paged_attention(q, k_cache, v_cache, tables, n, 0.3).isnan().any(2).any(1).tolist() == [True, False]
    none = q[:0], k_cache, v_cache, tables[:0], n[:0]
    assert paged_attention(*none, 0.3).shape == (0, 2, 8)


def test_rows_before_the_window_are_not_read():
    q, k_cache, v_cache, tables, n = cache([20, 6], 2, 1, 8, 4, torch.float32)
    expected = paged_attention_ref(q, k_cache, v_cache, tables, n, 0.3, None, 5)
    for c in (k_cache, v_cache):  # positions 0 to 14 of the first sequence, 0 of the second
        c[tables[0, :3].long()] = torch.nan
        c[int(tables[0, 3]), :3] = torch.nan
        c[int(tables[1, 0]), :1] = torch.nan
    for attend in (paged_attention, paged_attention_ref):
        torch.testing.assert_close(attend(q, k_cache, v_cache, tables, n, 0.3, None, 5), expected)


@cpp_only
def test_invalid_tables_lengths_and_slots_are_refused():
    q, k_cache, v_cache, tables, n = cache([5, 6], 2, 2, 8, 4, torch.float32)
    for lengths, message in (([5, 9], "sequence 1 has length 9, .* 1 to 8"), ([0, 2], "sequence 0 has length 0")):
        with pytest.raises(RuntimeError, match=message):
            paged_attention(q, k_cache, v_cache, tables, torch.tensor(lengths, dtype=torch.int32), 1.0)
    tables[1, 1] = 6
    with pytest.raises(RuntimeError, match="sequence 1 .* block 6, the cache has 6"):
        paged_attention(q, k_cache, v_cache, tables, n, 1.0)
    with pytest.raises(RuntimeError, match="slot 24 of row 1"):
        write_kv(q, q, k_cache, v_cache, torch.tensor([1, 24]))
