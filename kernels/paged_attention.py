"""Decoding over a paged key/value cache: one query a sequence, keys and values in blocks named by a table.

Position p of sequence i lives in row p % block of block block_tables[i, p // block]; its slot is number * block + row.
    S_j = scale * q . k_j + slope * (j - (length - 1)),   o = sum_j softmax_j(S) v_j,   first <= j < length
where first is 0, or length - window with a sliding window.
"""

# The kernels' types are those of Triton's language.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import torch

from .attention import check_heads, token_rows
from .backends.triton_runtime import Spec, cdiv, jit, multiprocessors, power_of_2, precision, tl
from .dispatch import choose, register


def write_kv_ref(k, v, k_cache, v_cache, slots) -> None:
    """Puts row i of k and v into slot slots[i]. Shapes as in `write_kv`."""
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slots, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slots, v)


def paged_attention_ref(q, k_cache, v_cache, block_tables, lengths, scale, alibi_slopes=None, window=None):
    """Gathers every sequence's blocks and applies the formula in fp32 (fp64 stays). Shapes as in `paged_attention`."""
    batch, heads, d = q.shape
    block, kv = k_cache.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    span = int(lengths.max()) if batch else 0
    table = block_tables[:, : -(-span // block)].long()
    position = torch.arange(table.shape[1] * block, device=q.device)
    hidden = position[None] >= lengths[:, None]  # [b, span]
    if window is not None:
        hidden = hidden | (position[None] + window < lengths[:, None])
    key, value = (cache[table].flatten(1, 2).to(wide) for cache in (k_cache, v_cache))  # [b, span, kv, d]
    # Masked rows may hold anything, NaN included: 0 * NaN must not reach the sum.
    value = value.masked_fill(hidden[:, :, None, None], 0)
    query = q.to(wide).unflatten(1, (kv, heads // kv))  # [b, kv, group, d]
    scores = torch.einsum("bkgd,bskd->bkgs", query, key) * scale
    if alibi_slopes is not None:
        distance = (position[None] - (lengths[:, None] - 1)).to(wide)
        scores = scores + alibi_slopes.to(wide).view(1, kv, heads // kv, 1) * distance[:, None, None]
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bkgs,bskd->bkgd", weights, value).flatten(1, 2).to(q.dtype)


@jit
def _write_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, k_stride, v_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """One token's keys and values into its slot."""
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    slot, real = tl.load(slots_ptr + token), column < WIDTH
    tl.store(k_cache_ptr + slot * WIDTH + column, tl.load(k_ptr + token * k_stride + column, mask=real), mask=real)
    tl.store(v_cache_ptr + slot * WIDTH + column, tl.load(v_ptr + token * v_stride + column, mask=real), mask=real)


@jit
def _decode_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, tables_ptr, lengths_ptr, slopes_ptr, part_ptr, peaks_ptr, totals_ptr,
    scale, q_stride, table_stride, kv_heads, window, alibi,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, LEAST: tl.constexpr, SPLITS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One split of a sequence's keys for up to ROWS query heads of one key/value head: sum, maximum, total."""
    sequence, chunk, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    chunks = tl.cdiv(GROUP, ROWS)
    kv_head = chunk // chunks
    length = tl.load(lengths_ptr + sequence)
    first = tl.maximum(length - window, 0)
    length_of_split = tl.maximum(tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK_N) * BLOCK_N, LEAST)
    begin, end = first + split * length_of_split, tl.minimum(length, first + (split + 1) * length_of_split)
    # tl.dot takes at least 16 rows, a group is often smaller; larger ones are cut into chunks.
    row, columns = chunk % chunks * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + row
    if begin >= end:  # a shorter sequence than the table has room for
        place = (sequence * kv_heads * GROUP + head) * SPLITS + split
        tl.store(peaks_ptr + place, float("-inf"), mask=row < GROUP)
        return
    real = (row[:, None] < GROUP) & (columns[None, :] < D)
    q = tl.load(q_ptr + sequence * q_stride + head[:, None] * D + columns[None, :], mask=real, other=0.0)
    # Without ALiBi the slopes are 0: memory reads, not one multiplication a score, decide the time.
    slope = tl.load(slopes_ptr + head, mask=alibi & (row < GROUP), other=0.0)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for n in range(begin, end, BLOCK_N):
        position = n + tl.arange(0, BLOCK_N)
        there = position < length
        page = tl.load(tables_ptr + sequence * table_stride + position // PAGE, mask=there, other=0).to(tl.int64)
        offset = ((page * PAGE + position % PAGE) * kv_heads + kv_head)[:, None] * D + columns[None, :]
        mask = there[:, None] & (columns[None, :] < D)
        k = tl.load(k_cache_ptr + offset, mask=mask, other=0.0)
        v = tl.load(v_cache_ptr + offset, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=DOT) * scale
        scores += slope[:, None] * (position - (length - 1)).to(tl.float32)[None, :]
        scores = tl.where(there[None, :], scores, float("-inf"))
        risen = tl.maximum(peak, tl.max(scores, 1))  # finite: every block holds at least one key
        weights = tl.exp(scores - risen[:, None])
        shrink = tl.exp(peak - risen)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=DOT)
        peak = risen
    place = (sequence * kv_heads * GROUP + head) * SPLITS + split
    tl.store(part_ptr + place[:, None] * D + columns[None, :], acc, mask=real)
    tl.store(peaks_ptr + place, peak, mask=row < GROUP)
    tl.store(totals_ptr + place, total, mask=row < GROUP)


@jit
def _combine_kernel(
    part_ptr, peaks_ptr, totals_ptr, out_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr
):
    """The splits of one query head into its output. Splits without keys have maximum -inf and nothing else."""
    head, split, columns = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    peaks = tl.load(peaks_ptr + head * SPLITS + split)
    weights, has = tl.exp(peaks - tl.max(peaks, 0)), peaks != float("-inf")
    total = tl.sum(weights * tl.load(totals_ptr + head * SPLITS + split, mask=has, other=0.0), 0)
    place = (head * SPLITS + split)[:, None] * D + columns[None, :]
    part = tl.load(part_ptr + place, mask=has[:, None] & (columns[None, :] < D), other=0.0)
    out = tl.sum(part * weights[:, None], 0) / total
    tl.store(out_ptr + head * D + columns, out.to(out_ptr.dtype.element_ty), mask=columns < D)


_WIDTHS, MAX_HEAD_DIM = (1024, 4096, 16384), 256


def _write_constants(width: int) -> dict:
    block = next((block for block in _WIDTHS if block >= width), 0)
    if not block:
        raise ValueError(f"{width} numbers of keys a token: the Triton kernel writes up to {_WIDTHS[-1]}")
    return {"WIDTH": width, "BLOCK": block, "num_warps": 4, "num_stages": 1}


def write_kv_triton(k, v, k_cache, v_cache, slots) -> None:
    """torch.ops.trialign.write_kv on a GPU."""
    width = k.shape[1] * k.shape[2]
    if len(k):
        _write_kernel[(len(k),)](k, v, k_cache, v_cache, slots, k.stride(0), v.stride(0), **_write_constants(width))


def _decode_constants(group: int, d: int, page: int, dtype: torch.dtype) -> dict:
    block_d, fp32 = power_of_2(d, 64), dtype == torch.float32
    if block_d > MAX_HEAD_DIM:
        raise ValueError(f"head_dim {d}: the Triton decode kernel takes up to {MAX_HEAD_DIM}")
    return {
        "GROUP": group, "ROWS": 16, "D": d, "BLOCK_D": block_d, "PAGE": page, "LEAST": LEAST,
        "BLOCK_N": 16 if fp32 and block_d > 128 else 32, "DOT": precision(dtype),
        "num_warps": 8 if fp32 and block_d > 64 else 4,  # fp32 spills at 4 under Triton 3.7
        "num_stages": 2,
    }  # fmt: skip


def _combine_constants(d: int, splits: int) -> dict:
    return {
        "D": d,
        "BLOCK_D": power_of_2(d, 64),
        "SPLITS": splits,
        "num_warps": 2 if splits < 16 else 8,
        "num_stages": 1,
    }


LEAST = 256
"""Keys that a split has at least, where its sequence has them: below, joining costs more than it brings."""
LONGEST = 4096
"""Keys that a split has at most: one long sequence among short ones must not run alone at the end."""
MAX_SPLITS = 64


def splits_of(programs: int, span: int, multiprocessors: int) -> int:
    """Splits of each sequence's keys, a power of two, for `programs` programs without any and at most `span` keys.

    Enough for four programs a multiprocessor, and for no split beyond LONGEST. It depends on sizes that the host knows
    (the rows of a padded step, the width of its table) and on no length, so that a captured graph fits every step.
    """
    wanted = max(cdiv(4 * multiprocessors, programs), cdiv(span, LONGEST))
    return min(power_of_2(min(wanted, cdiv(span, LEAST)), 1), MAX_SPLITS)


def paged_attention_triton(q, k_cache, v_cache, block_tables, lengths, scale, alibi_slopes, window):
    """torch.ops.trialign.paged_attention on a GPU."""
    batch, heads, d = q.shape
    page, kv_heads = k_cache.shape[1:3]
    constants = _decode_constants(heads // kv_heads, d, page, q.dtype)
    alibi = alibi_slopes is not None
    span = block_tables.shape[1] * page
    reach = span if window is None else min(window, span)  # an argument of 32 bits
    chunks = kv_heads * cdiv(heads // kv_heads, constants["ROWS"])
    splits = splits_of(max(batch * chunks, 1), reach, multiprocessors(q.device))
    part = q.new_empty(batch, heads, splits, d, dtype=torch.float32)
    peaks, totals = (q.new_empty(batch, heads, splits, dtype=torch.float32) for _ in range(2))
    out = q.new_empty(q.shape)
    if batch:
        _decode_kernel[(batch, chunks, splits)](
            q, k_cache, v_cache, block_tables, lengths, alibi_slopes if alibi else peaks, part, peaks, totals, scale,
            q.stride(0), block_tables.stride(0), kv_heads, reach, alibi, SPLITS=splits, **constants,
        )  # fmt: skip
        _combine_kernel[(batch * heads,)](part, peaks, totals, out, **_combine_constants(d, splits))
    return out


_HEAD_DIMS, _SPLITS = (64, 128, 256), (1, 2, 4, 8, 16, 32, MAX_SPLITS)


def _decode_configs(dtype: torch.dtype) -> tuple[dict, ...]:
    return tuple(_decode_constants(8, d, 16, dtype) | {"SPLITS": MAX_SPLITS} for d in _HEAD_DIMS)


SPECS = {
    "write": Spec(
        _write_kernel,
        dict.fromkeys(("k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr"), "*bf16")
        | {"slots_ptr": "*i64", "k_stride": "i64", "v_stride": "i64"},
        tuple(map(_write_constants, _WIDTHS)),
        free=("WIDTH",),
    ),
    "decode": Spec(
        _decode_kernel,
        dict.fromkeys(("q_ptr", "k_cache_ptr", "v_cache_ptr"), "*bf16")
        | dict.fromkeys(("slopes_ptr", "part_ptr", "peaks_ptr", "totals_ptr"), "*fp32")
        | {"tables_ptr": "*i32", "lengths_ptr": "*i32", "scale": "fp32"}
        | {"q_stride": "i64", "table_stride": "i64", "kv_heads": "i32", "window": "i32", "alibi": "u1"},
        _decode_configs(torch.bfloat16),
        fp32_configs=_decode_configs(torch.float32),
        free=("GROUP", "D", "PAGE", "LEAST", "SPLITS"),
        dot=True,
        unaligned=("kv_heads", "table_stride", "window"),
    ),
    "combine": Spec(
        _combine_kernel,
        {"part_ptr": "*fp32", "peaks_ptr": "*fp32", "totals_ptr": "*fp32", "out_ptr": "*bf16"},
        tuple(_combine_constants(d, splits) for d in _HEAD_DIMS for splits in _SPLITS),
        free=("D",),
    ),
}


def write_kv(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor):
    """Writes k and v [n, kv, d] into the caches [blocks, block, kv, d] at slots [n] int64, in place.

    ValueError where the shapes do not fit each other, or for a cache that is not contiguous.
    """
    _check_caches(k_cache, v_cache)
    if k.shape != v.shape or k.shape[1:] != k_cache.shape[2:] or slots.shape != k.shape[:1]:
        shapes = f"k {list(k.shape)}, v {list(v.shape)} and slots {list(slots.shape)}"
        raise ValueError(f"{shapes} do not fit the caches {list(k_cache.shape)}")
    if choose("write_kv", k) != "reference":
        torch.ops.trialign.write_kv(token_rows(k), token_rows(v), k_cache, v_cache, slots.contiguous())
    else:
        write_kv_ref(k, v, k_cache, v_cache, slots)


def _check_caches(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    if k_cache.shape != v_cache.shape or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(
            f"caches {list(k_cache.shape)} of strides {k_cache.stride()} and {list(v_cache.shape)} of strides "
            f"{v_cache.stride()}: must be contiguous and of one shape"
        )


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    alibi_slopes: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of one query a sequence over its cached keys and values.

    q [b, heads, d], caches [blocks, block, kv, d], block_tables [b, max_blocks] int32, lengths [b] int32 (>= 1, the
    token just written included), alibi_slopes [heads] fp32, window the number of keys seen (the last ones). Entries of
    block_tables past a sequence's length must still be valid block numbers. Returns [b, heads, d]. ValueError where the
    shapes do not fit each other, for a cache that is not contiguous, or for a window below 1.
    """
    _check_caches(k_cache, v_cache)
    check_heads(q, k_cache.shape[2], k_cache.shape[3], alibi_slopes, window)
    if lengths.shape != q.shape[:1] or block_tables.shape[:1] != q.shape[:1]:
        given = f"{list(lengths.shape)} lengths and block tables {list(block_tables.shape)}"
        raise ValueError(f"{given} for {q.shape[0]} queries: one of each a query")
    if choose("paged_attention", q) != "reference":
        tables = block_tables if block_tables.stride(1) == 1 else block_tables.contiguous()
        slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
        return torch.ops.trialign.paged_attention(
            token_rows(q), k_cache, v_cache, tables, lengths.contiguous(), scale, slopes, window
        )
    return paged_attention_ref(q, k_cache, v_cache, block_tables, lengths, scale, alibi_slopes, window)


register("write_kv", lambda k, v, k_cache, v_cache, slots: None, triton=write_kv_triton)
register(
    "paged_attention",
    lambda q, k_cache, v_cache, block_tables, lengths, scale, alibi_slopes, window: q.new_empty(q.shape),
    triton=paged_attention_triton,
)
