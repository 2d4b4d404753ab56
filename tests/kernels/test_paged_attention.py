"""The paged cache: decode attention under the law, writes to the right rows, nothing read that is not there."""

import pytest
import torch
from law import assert_law
from trialign.kernels.attention import packed_attention
from trialign.kernels.dispatch import has_op
from trialign.kernels.paged_attention import paged_attention, paged_attention_ref, write_kv, write_kv_ref

needs_extension = pytest.mark.skipif(not has_op("paged_attention"), reason="trialign._C is not usable")


def cache(lengths, heads, kv_heads, d, block, dtype, seed=0):
    """A query a sequence and a cache whose unused rows hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    width = max(-(-n // block) for n in lengths)
    blocks = len(lengths) * width + 2
    tables = torch.randperm(blocks, generator=generator)[: len(lengths) * width].view(-1, width).int()
    k_cache, v_cache = (torch.full((blocks, block, kv_heads, d), torch.nan, dtype=dtype) for _ in range(2))
    for row, n in zip(tables.tolist(), lengths, strict=True):
        for p in range(n):
            for c in (k_cache, v_cache):
                c[row[p // block], p % block] = torch.randn(kv_heads, d, generator=generator).to(dtype)
    q = torch.randn(len(lengths), heads, d, generator=generator).to(dtype)
    return q, k_cache, v_cache, tables, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "alibi, window", [(False, None), (True, None), (False, 1), (False, 16), (True, 17), (False, 99)]
)
@pytest.mark.parametrize(
    "lengths, heads, kv_heads, d, block",
    [
        ([1, 15, 16, 17, 100], 6, 2, 64, 16),
        ([9], 4, 4, 20, 4),
        ([33, 2, 7], 5, 1, 80, 16),
        ([1, 1], 9, 3, 64, 16),
        ([70, 8, 64], 7, 1, 128, 8),
        ([3], 2, 2, 8, 1),
    ],
)
def test_law(dtype, alibi, window, lengths, heads, kv_heads, d, block):
    q, k_cache, v_cache, tables, n = cache(lengths, heads, kv_heads, d, block, dtype)
    slopes = 2.0 ** -torch.arange(1.0, heads + 1) if alibi else None
    args = (tables, n, d**-0.5, slopes, window)
    exact = paged_attention_ref(q.double(), k_cache.double(), v_cache.double(), *args)
    eager = paged_attention_ref(q, k_cache, v_cache, *args)
    assert_law(paged_attention(q, k_cache, v_cache, *args), eager, exact)


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_is_the_last_row_of_packed_attention(dtype, window):
    """Writes a document token by token through the table and reads each position back by attention."""
    torch.manual_seed(0)
    total, block = 21, 4
    q, k, v = (torch.randn(total, h, 32).to(dtype) for h in (4, 2, 2))
    whole = packed_attention(q, k, v, torch.tensor([0, total]), total, 0.3, window=window)
    k_cache, v_cache = (torch.full((8, block, 2, 32), torch.nan, dtype=dtype) for _ in range(2))
    table = torch.tensor([[5, 0, 7, 2, 3, 6]], dtype=torch.int32)
    for p in range(total):
        slot = table[0, p // block].long()[None] * block + p % block
        write_kv(k[p : p + 1], v[p : p + 1], k_cache, v_cache, slot)
        length = torch.tensor([p + 1], dtype=torch.int32)
        out = paged_attention(q[p : p + 1], k_cache, v_cache, table, length, 0.3, window=window)
        assert torch.allclose(out[0].float(), whole[p].float(), atol=2e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_kv(dtype):
    torch.manual_seed(0)
    qkv = torch.randn(6, 8, 16).to(dtype)
    _, k, v = qkv.split((4, 2, 2), 1)  # slices: rows are not contiguous
    slots = torch.tensor([0, 17, 3, 31, 8, 9])
    ours, right = ([torch.zeros(8, 4, 2, 16, dtype=dtype) for _ in range(2)] for _ in range(2))
    write_kv(k, v, *ours, slots)
    write_kv_ref(k, v, *right, slots)
    for got, expected in zip(ours, right, strict=True):
        assert torch.equal(got, expected) and torch.equal(got.view(32, 2, 16)[slots], k if expected is right[0] else v)
    write_kv(k[:0], v[:0], *ours, slots[:0])
    assert torch.equal(ours[0], right[0])


def test_nan_in_a_sequence_stays_in_it():
    q, k_cache, v_cache, tables, n = cache([20, 6], 2, 1, 8, 4, torch.float32)
    k_cache[int(tables[0, 1]), 2] = torch.nan
    assert paged_attention(q, k_cache, v_cache, tables, n, 0.3).isnan().any(2).any(1).tolist() == [True, False]


def test_rows_before_the_window_are_not_read():
    q, k_cache, v_cache, tables, n = cache([20, 6], 2, 1, 8, 4, torch.float32)
    right = paged_attention_ref(q, k_cache, v_cache, tables, n, 0.3, None, 5)
    for c in (k_cache, v_cache):  # positions 0 to 14 of the first sequence, 0 of the second
        c[tables[0, :3].long()] = torch.nan
        c[int(tables[0, 3]), :3] = torch.nan
        c[int(tables[1, 0]), :1] = torch.nan
    for attend in (paged_attention, paged_attention_ref):
        torch.testing.assert_close(attend(q, k_cache, v_cache, tables, n, 0.3, None, 5), right)


@needs_extension
def test_a_bad_table_length_or_slot_is_refused_before_memory_is_touched():
    q, k_cache, v_cache, tables, n = cache([5, 6], 2, 2, 8, 4, torch.float32)
    with pytest.raises(RuntimeError, match="sequence 1 has length 9, its table holds 1 to 8"):
        paged_attention(q, k_cache, v_cache, tables, torch.tensor([5, 9], dtype=torch.int32), 1.0)
    with pytest.raises(RuntimeError, match="sequence 0 has length 0"):
        paged_attention(q, k_cache, v_cache, tables, torch.tensor([0, 2], dtype=torch.int32), 1.0)
    with pytest.raises(ValueError, match="a window of 0 keys"):
        paged_attention(q, k_cache, v_cache, tables, n, 1.0, None, 0)
    tables[1, 1] = 6
    with pytest.raises(RuntimeError, match="sequence 1 names block 6, the cache has 6"):
        paged_attention(q, k_cache, v_cache, tables, n, 1.0)
    with pytest.raises(RuntimeError, match="slot 24 of row 1"):
        write_kv(q, q, k_cache, v_cache, torch.tensor([1, 24]))


@needs_extension
def test_opcheck():
    q, k_cache, v_cache, tables, n = cache([5, 6], 4, 2, 8, 4, torch.bfloat16)
    ops = torch.ops.trialign
    torch.library.opcheck(ops.paged_attention.default, (q, k_cache, v_cache, tables, n, 1.0, None, None))
    torch.library.opcheck(ops.paged_attention.default, (q, k_cache, v_cache, tables, n, 1.0, torch.rand(4), 3))
    torch.library.opcheck(ops.write_kv.default, (q[:, :2], q[:, 2:], k_cache, v_cache, torch.tensor([3, 9])))
