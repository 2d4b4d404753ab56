"""The Triton kernels of attention.py: FlashAttention-2 (Dao 2023, arXiv:2307.08691) over packed documents.

A block of queries and one of keys that see each other wholly run unmasked, hidden ones are left out, and only those on
the diagonal, at the window's edge and at a document's end are masked.

Backward makes five products of each such pair: the scores and dP again, dv += P^T do, dk += dS^T q, dq += dS k. A
program holds dk and dv of a block of keys in registers and adds its part of dq, in fp32, to memory that is its own: a
document's blocks of keys are dealt out to `splits` programs, and a last kernel adds up their parts of dq in order
(FlashAttention's deterministic mode). No atomics, no waits between programs, the same numbers in every run on the same
kind of GPU. Memory beside the gradients: `_plan`.
"""

# The kernels' types are those of Triton's language.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import torch

from .backends.triton_runtime import Spec, architecture, cdiv, jit, multiprocessors, power_of_2, precision, tl

LOG2E = None if tl is None else tl.constexpr(1.4426950408889634)


@jit
def _unit(DOT: tl.constexpr):
    """Scores are logarithms to base 2, whose power is one instruction; in fp32 natural ones, since rounding ALiBi's
    lifts in another base would cost more than plain torch's error."""
    return 1.0 if DOT == "ieee" else LOG2E


@jit
def _power(x, DOT: tl.constexpr):
    return tl.exp(x) if DOT == "ieee" else tl.exp2(x)


@jit
def _tile(ptr, token, stride, real, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[ROWS, BLOCK_D]: D numbers of each token from `token` (64 bits) on, of those that are `real` where MASKED."""
    columns = tl.arange(0, BLOCK_D)
    places = ptr + (token + tl.arange(0, ROWS))[:, None] * stride + columns[None, :]
    if MASKED:
        tile = tl.load(places, mask=real[:, None] & (columns[None, :] < D), other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(places, mask=columns[None, :] < D, other=0.0)
    else:
        tile = tl.load(places)
    return tile


@jit
def _bounds(bounds_ptr, document):
    """(start, length) of a document."""
    start = tl.load(bounds_ptr + document)
    return start, (tl.load(bounds_ptr + document + 1) - start).to(tl.int32)


@jit
def _lift(slope, positions, anchor):
    """slope * (position - anchor). Row i's scores plus its lift are scale * q_i . k_j plus the lift of key j.

    So ALiBi is one addition of a row vector to the scores. The anchor is the block's first row, so that a lift's
    rounding error is below 2^-24 * slope * BLOCK_M for all rows, however long the document.
    """
    return slope * (positions - anchor).to(tl.float32)


@jit
def _visible(rows, keys, length, window):
    """Whether row i sees key j: 0 <= i - j < window, and the key exists. rows and keys broadcast."""
    distance = (rows - keys).to(tl.uint32, bitcast=True)  # a negative difference is a huge unsigned one
    return (distance < window) & (keys < length)


@jit
def _attend(
    q, k_ptr, v_ptr, start, n, rows, length, anchor, slope, scale, window, k_stride, v_stride, acc, peak, total,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over one more block of keys."""
    keys = n + tl.arange(0, BLOCK_N)
    k = _tile(k_ptr, start + n, k_stride, keys < length, BLOCK_N, D, BLOCK_D, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision=DOT) * scale + _lift(slope, keys, anchor)[None, :]
    if MASKED:
        scores = tl.where(_visible(rows[:, None], keys[None, :], length, window), scores, float("-inf"))
    risen = tl.maximum(peak, tl.max(scores, 1))
    level = risen
    if MASKED:
        level = tl.where(risen == float("-inf"), 0.0, risen)  # a window can mask a whole block for a row
    weights = _power(scores - level[:, None], DOT)
    shrink = _power(peak - level, DOT)
    total = total * shrink + tl.sum(weights, 1)
    v = _tile(v_ptr, start + n, v_stride, keys < length, BLOCK_N, D, BLOCK_D, MASKED)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=DOT)
    return acc, risen, total


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, stats_ptr, bounds_ptr, slopes_ptr, alibi, scale, window, q_stride, k_stride, v_stride,
    heads,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head of one document; online softmax over the blocks of keys."""
    block, head, document = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, length = _bounds(bounds_ptr, document)
    anchor = block * BLOCK_M
    if anchor >= length:
        return
    rows = anchor + tl.arange(0, BLOCK_M)
    q = _tile(q_ptr + head * D, start + anchor, q_stride, rows < length, BLOCK_M, D, BLOCK_D, True)
    k_ptr += (head // GROUP) * D
    v_ptr += (head // GROUP) * D
    slope, scale = tl.load(slopes_ptr + head, alibi, 0.0) * _unit(DOT), scale * _unit(DOT)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Keys [whole, diagonal) are seen by all rows; masked are the blocks before, from `first`, and after, to `last`.
    first = tl.maximum(anchor - window + 1, 0) // BLOCK_N * BLOCK_N
    diagonal, last = (anchor + 1) // BLOCK_N * BLOCK_N, tl.minimum(length, anchor + BLOCK_M)
    whole = tl.minimum(tl.cdiv(tl.maximum(anchor + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N, diagonal)
    for n in range(whole, diagonal, BLOCK_N):
        acc, peak, total = _attend(
            q, k_ptr, v_ptr, start, n, rows, length, anchor, slope, scale, window, k_stride, v_stride, acc, peak,
            total, D, BLOCK_D, BLOCK_N, DOT, False,
        )  # fmt: skip
    before = (whole - first) // BLOCK_N
    for i in range(0, before + tl.cdiv(last - diagonal, BLOCK_N)):
        n = tl.where(i < before, first, diagonal - before * BLOCK_N) + i * BLOCK_N
        acc, peak, total = _attend(
            q, k_ptr, v_ptr, start, n, rows, length, anchor, slope, scale, window, k_stride, v_stride, acc, peak,
            total, D, BLOCK_D, BLOCK_N, DOT, True,
        )  # fmt: skip
    inverse = 1.0 / tl.where(rows < length, total, 1.0)  # rows past the document may have no visible key
    token, columns = (start + rows) * heads + head, tl.arange(0, BLOCK_D)
    tl.store(
        out_ptr + token[:, None] * D + columns[None, :],
        (acc * inverse[:, None]).to(out_ptr.dtype.element_ty),
        mask=(rows[:, None] < length) & (columns[None, :] < D),
    )
    tl.store(stats_ptr + token * 2, peak - _lift(slope, rows, anchor), mask=rows < length)
    tl.store(stats_ptr + token * 2 + 1, inverse, mask=rows < length)


@jit
def _block_place(start, document, block, BLOCK_M: tl.constexpr):
    """Number of a document's block of queries among those of all documents, in what backward keeps of every block."""
    return start // BLOCK_M + document + block


@jit
def _rows_kernel(
    grad_ptr, out_ptr, stats_ptr, level_ptr, delta_ptr, bounds_ptr, slopes_ptr, alibi, blocks, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Inputs of backward for each row of a block, [heads, blocks, BLOCK_M]: its level, the logarithm of the sum of its
    exponentials, lifted, and delta = rowsum(do * o). Rows past the document get infinity, so that their weights are 0.
    """
    block, head, document = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, length = _bounds(bounds_ptr, document)
    m = block * BLOCK_M
    if m >= length:
        return
    row = tl.arange(0, BLOCK_M)
    real, token = m + row < length, (start + m + row) * heads + head
    grad = _tile(grad_ptr + head * D, start + m, heads * D, real, BLOCK_M, D, BLOCK_D, True).to(tl.float32)
    out = _tile(out_ptr + head * D, start + m, heads * D, real, BLOCK_M, D, BLOCK_D, True).to(tl.float32)
    slope = tl.load(slopes_ptr + head, alibi, 0.0) * _unit(DOT)
    peak = tl.load(stats_ptr + token * 2, mask=real, other=float("inf"))
    inverse = tl.load(stats_ptr + token * 2 + 1, mask=real, other=1.0)
    place = (tl.cast(head, tl.int64) * blocks + _block_place(start, document, block, BLOCK_M)) * BLOCK_M + row
    log = tl.log(inverse) if DOT == "ieee" else tl.log2(inverse)
    tl.store(level_ptr + place, peak + _lift(slope, row, 0) - log)
    tl.store(delta_ptr + place, tl.sum(grad * out, 1))


@jit
def _five_products(
    k, v, q_ptr, grad_ptr, level_ptr, delta_ptr, part_ptr, start, m, n, seen, masked, length, slope, scale, window,
    q_stride, grad_stride, dk, dv,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TURNED: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """One block of queries for a block of keys: onto dk and dv, and onto the program's part of dq in memory.

    TURNED: scores lie as [keys, rows], which the products of dk and dv take as they are; else as [rows, keys].
    """
    row, keys = tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    real = m + row < length
    q = _tile(q_ptr, start + m, q_stride, real, BLOCK_M, D, BLOCK_D, True)
    grad = _tile(grad_ptr, start + m, grad_stride, real, BLOCK_M, D, BLOCK_D, True)
    lift = _lift(slope, keys, m)
    if TURNED:
        scores = tl.dot(k, tl.trans(q), input_precision=DOT) * (scale * _unit(DOT)) + lift[:, None]
        if masked:
            scores = tl.where(_visible((m + row)[None, :], keys[:, None], length, window), scores, float("-inf"))
        weights = _power(scores - tl.load(level_ptr + row)[None, :], DOT)
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=DOT)
        ds = weights * (tl.dot(v, tl.trans(grad), input_precision=DOT) - tl.load(delta_ptr + row)[None, :])
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=DOT)
        dq = tl.dot(tl.trans(k), ds, input_precision=DOT) * scale
    else:
        scores = tl.dot(q, tl.trans(k), input_precision=DOT) * (scale * _unit(DOT)) + lift[None, :]
        if masked:
            scores = tl.where(_visible((m + row)[:, None], keys[None, :], length, window), scores, float("-inf"))
        weights = _power(scores - tl.load(level_ptr + row)[:, None], DOT)
        dv = tl.dot(tl.trans(weights.to(grad.dtype)), grad, dv, input_precision=DOT)
        ds = weights * (tl.dot(grad, tl.trans(v), input_precision=DOT) - tl.load(delta_ptr + row)[:, None])
        ds = ds.to(q.dtype)
        dq = tl.trans(tl.dot(ds, k, input_precision=DOT)) * scale
        ds = tl.trans(ds)
    part_ptr += tl.arange(0, BLOCK_D)[:, None] * BLOCK_M + row[None, :]
    dq += tl.load(part_ptr, mask=seen, other=0.0)
    tl.store(part_ptr, dq)
    if not TURNED:
        dk = tl.dot(ds, q, dk, input_precision=DOT)
    return dk, dv


@jit
def _backward_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, level_ptr, delta_ptr, part_ptr, dk_ptr, dv_ptr, bounds_ptr, slopes_ptr,
    alibi, scale, window, q_stride, k_stride, v_stride, blocks, heads, share, splits,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TURNED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dk and dv of every `splits`-th block of keys by `share` query heads of one group, and their part of dq."""
    split, lane, document = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, length = _bounds(bounds_ptr, document)
    columns = tl.arange(0, BLOCK_D)
    k_ptr += lane * share // GROUP * D
    v_ptr += lane * share // GROUP * D
    for block in range(split, tl.cdiv(length, BLOCK_N), splits):
        n = block * BLOCK_N
        start, length = _bounds(bounds_ptr, document)  # again: held over the loops it would cost them registers
        keys = n + tl.arange(0, BLOCK_N)
        k = _tile(k_ptr, start + n, k_stride, keys < length, BLOCK_N, D, BLOCK_D, True)
        v = _tile(v_ptr, start + n, v_stride, keys < length, BLOCK_N, D, BLOCK_D, True)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        # Blocks of rows [first, last) see keys, [whole, edge) see them all.
        first, last = n // BLOCK_M, tl.cdiv(tl.minimum(length, n + BLOCK_N + window - 1), BLOCK_M)
        whole = tl.cdiv(n + BLOCK_N - 1, BLOCK_M)
        edge = tl.maximum(tl.minimum(n + window, length) // BLOCK_M, whole)
        for head in range(lane * share, (lane + 1) * share):
            start, length = _bounds(bounds_ptr, document)
            slope, wide = tl.load(slopes_ptr + head, alibi, 0.0) * _unit(DOT), tl.cast(head, tl.int64)
            q, grad = q_ptr + wide * D, grad_ptr + wide * D
            rows = wide * blocks + _block_place(start, document, 0, BLOCK_M)
            parts = rows + tl.cast(split, tl.int64) * heads * blocks
            for i in range(first, last):
                m = i * BLOCK_M
                seen = block - splits >= tl.maximum(m - window + 1, 0) // BLOCK_N  # an earlier block of this program's
                place, part = (rows + i) * BLOCK_M, (parts + i) * (BLOCK_M * BLOCK_D)
                dk, dv = _five_products(
                    k, v, q, grad, level_ptr + place, delta_ptr + place, part_ptr + part, start, m, n,
                    seen, (i < whole) | (i >= edge), length, slope, scale, window, q_stride, heads * D, dk, dv,
                    D, BLOCK_D, BLOCK_M, BLOCK_N, TURNED, DOT,
                )  # fmt: skip
        place = ((start + keys) * (heads // share) + lane)[:, None] * D + columns[None, :]
        there = (keys[:, None] < length) & (columns[None, :] < D)
        tl.store(dk_ptr + place, (dk * scale).to(dk_ptr.dtype.element_ty), mask=there)
        tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=there)
        tl.debug_barrier()  # the next block of keys adds to dq what other threads of this program have stored


@jit
def _join_kernel(
    part_ptr, dq_ptr, bounds_ptr, window, blocks, heads, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries: the parts of the splits that have one, in their order."""
    block, head, document = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, length = _bounds(bounds_ptr, document)
    m = block * BLOCK_M
    if m >= length:
        return
    row, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    first = tl.maximum(m - window + 1, 0) // BLOCK_N
    last = (tl.minimum(m + BLOCK_M, length) - 1) // BLOCK_N
    part_ptr += columns[:, None] * BLOCK_M + row[None, :]
    dq = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    for split in range(splits):
        has = first + (split - first % splits + splits) % splits <= last  # its first block of keys from `first` on
        place = (tl.cast(split, tl.int64) * heads + head) * blocks + _block_place(start, document, block, BLOCK_M)
        dq += tl.load(part_ptr + place * (BLOCK_M * BLOCK_D), mask=has, other=0.0)
    token = (start + m + row) * heads + head
    inside = (m + row < length)[:, None] & (columns < D)[None, :]
    dq = tl.trans(dq).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + token[:, None] * D + columns[None, :], dq, mask=inside)


DOCUMENTS = 65_520  # of one launch: a grid's last axis ends at 65,535; multiples of 16 keep the bounds aligned
PARTS = 1 << 30  # bytes that the parts of dq may take beyond the first


def _launches(cu_seqlens: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """(bounds, number of documents) of each launch: as many documents as a grid can hold."""
    total = len(cu_seqlens) - 1
    return [(cu_seqlens[first:], min(DOCUMENTS, total - first)) for first in range(0, total, DOCUMENTS)]


def _reach(window: int | None, max_seqlen: int) -> int:
    """The window as the kernels take it (added to positions, in 32 bits): at most max_seqlen, also without one."""
    return max_seqlen if window is None else min(window, max_seqlen)


# (BLOCK_M, BLOCK_N, num_warps, num_stages) up to head dims 64, 128, 256: the largest blocks that the ahead-of-time
# compilers fit into registers and shared memory. backward adds TURNED: Hopper's products take 64 or more rows a warp
# group, which are keys, and what is turned comes out of registers; the older unit's come in 16 rows, which are queries.
# fp32 has no matrix units: its products live in registers, and no block is small enough for head dims beyond 128.
_BLOCKS = {
    "forward": {
        "sm_80": ((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
        "sm_90": ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
        "sm_100": ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
        "gfx942": ((64, 32, 4, 2), (64, 32, 4, 1), (64, 16, 8, 1)),
    },
    "backward": {
        "sm_80": ((16, 128, 8, 3, True), (32, 64, 8, 2, False), (16, 32, 8, 1, False)),
        "sm_90": ((64, 128, 8, 2, True), (32, 128, 8, 2, True), (32, 64, 8, 1, False)),
        "sm_100": ((32, 64, 8, 2, True), (32, 128, 8, 2, False), (32, 64, 8, 1, False)),
        "gfx942": ((32, 32, 4, 1, False), (32, 32, 4, 1, False), (32, 16, 8, 1, False)),
    },
}
_FP32_BLOCKS = {
    "forward": ((32, 16, 8, 1), (16, 32, 8, 1)),
    "backward": ((16, 16, 8, 1, True), (16, 16, 8, 2, True)),
}
MAX_HEAD_DIM = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}


def _constants(kernel: str, d: int, group: int, dtype: torch.dtype, arch: str) -> dict:
    block_d = power_of_2(d, 64)
    assert block_d <= MAX_HEAD_DIM[dtype], f"head_dim {d}"
    blocks = _FP32_BLOCKS[kernel] if dtype == torch.float32 else _BLOCKS[kernel][arch]
    m, n, warps, stages, *turned = blocks[(block_d > 64) + (block_d > 128)]
    return {
        "GROUP": group, "D": d, "BLOCK_D": block_d, "BLOCK_M": m, "BLOCK_N": n,
        **dict.fromkeys(("TURNED",)[: len(turned)], *turned or (None,)),
        "DOT": precision(dtype), "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def _of_rows(constants: dict, *names: str) -> dict:
    """The constants of the kernels that run before and after the five products, over the same blocks of queries."""
    return {name: constants[name] for name in ("D", "BLOCK_D", "BLOCK_M", *names)} | {"num_warps": 4, "num_stages": 1}


def _slopes(alibi_slopes, like) -> tuple:
    """(slopes, True), or without ALiBi (any tensor, False): the kernels then read no slopes."""
    return (like, False) if alibi_slopes is None else (alibi_slopes, True)


def attention_triton(q, k, v, cu_seqlens, max_seqlen, scale, alibi_slopes, window):
    """(out, stats) as torch.ops.trialign.attention gives them, stats in `_unit`."""
    constants = _constants("forward", q.shape[2], q.shape[1] // k.shape[1], q.dtype, architecture(q.device))
    out = q.new_empty(q.shape)
    stats = q.new_empty(*q.shape[:2], 2, dtype=torch.float32)
    blocks = cdiv(max_seqlen, constants["BLOCK_M"])
    for bounds, documents in _launches(cu_seqlens) if blocks else ():
        _forward_kernel[(blocks, q.shape[1], documents)](
            q, k, v, out, stats, bounds, *_slopes(alibi_slopes, stats), scale, _reach(window, max_seqlen), q.stride(0),
            k.stride(0), v.stride(0), q.shape[1], **constants,
        )  # fmt: skip
    return out, stats


def _plan(heads: int, kv_heads: int, documents: int, key_blocks: int, part: int, programs: int) -> tuple[int, int]:
    """(query heads a program takes, splits of a document's blocks of keys), for `programs` programs if they can be had.

    One part of dq, `part` bytes, is 4 bytes a query, head and column (queries and columns rounded up to blocks); more
    splits take a part each, together at most PARTS. A program takes all query heads of a key/value head where there are
    documents enough; else one, and dk and dv are made for every query head, in fp32, and added up.
    """
    if documents * kv_heads >= programs:
        return heads // kv_heads, 1
    return 1, max(1, min(cdiv(programs, documents * heads), key_blocks, 1 + PARTS // part))


def attention_backward_triton(grad, q, k, v, out, stats, cu_seqlens, max_seqlen, scale, alibi_slopes, window):
    """(dq, dk, dv) as torch.ops.trialign.attention_backward gives them."""
    (total, heads, d), kv_heads, documents = q.shape, k.shape[1], len(cu_seqlens) - 1
    constants = _constants("backward", d, heads // kv_heads, q.dtype, architecture(q.device))
    m, n, width = (constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D"))
    blocks, slopes, reach = total // m + documents, _slopes(alibi_slopes, stats), _reach(window, max_seqlen)
    level, delta = stats.new_empty(2, heads, blocks, m)
    share, splits = _plan(
        heads,
        kv_heads,
        documents,
        cdiv(max_seqlen, n),
        max(level.numel() * width * 4, 1),
        2 * multiprocessors(q.device),
    )
    part = stats.new_empty(splits, heads, blocks, width, m)
    summed = heads // share > kv_heads
    wide = torch.float32 if summed else k.dtype
    dq, dk, dv = q.new_empty(q.shape), *(k.new_empty(total, heads // share, d, dtype=wide) for _ in range(2))
    for bounds, count in _launches(cu_seqlens) if max_seqlen else ():
        grid = (cdiv(max_seqlen, m), heads, count)
        _rows_kernel[grid](grad, out, stats, level, delta, bounds, *slopes, blocks, heads, **_of_rows(constants, "DOT"))
        _backward_kernel[(splits, heads // share, count)](
            grad, q, k, v, level, delta, part, dk, dv, bounds, *slopes, scale, reach, q.stride(0), k.stride(0),
            v.stride(0), blocks, heads, share, splits, **constants,
        )  # fmt: skip
        _join_kernel[grid](part, dq, bounds, reach, blocks, heads, splits, **_of_rows(constants, "BLOCK_N"))
    if summed:
        dk, dv = (t.view(total, kv_heads, -1, d).sum(2).to(k.dtype) for t in (dk, dv))
    return dq, dk, dv


def _spec(name: str, kernel, tensors: str, numbers: str, constants=lambda table: table) -> Spec:
    types = dict.fromkeys(("stats_ptr", "level_ptr", "delta_ptr", "part_ptr", "slopes_ptr"), "*fp32")
    types |= {"bounds_ptr": "*i64", "alibi": "u1", "scale": "fp32"}
    types |= dict.fromkeys(("q_stride", "k_stride", "v_stride"), "i64")
    counts = ("window", "heads", "blocks", "share", "splits")
    signature = {tensor: types.get(tensor, "*bf16") for tensor in tensors.split()}
    signature |= {number: types.get(number, "i32") for number in numbers.split()}
    configs = {
        arch: tuple(constants(_constants(name, d, 3, torch.bfloat16, arch)) for d in (64, 128, 256))
        for arch in _BLOCKS[name]
    }
    wide = tuple(constants(_constants(name, d, 3, torch.float32, "sm_80")) for d in (64, 128))
    unaligned = tuple(count for count in counts if count in signature)
    dot = "GROUP" in wide[0]
    hip = configs.pop("gfx942")
    return Spec(
        kernel, signature, configs["sm_80"], hip, wide, ("GROUP", "D"), dot=dot, unaligned=unaligned, sm_configs=configs
    )


SPECS = {
    "forward": _spec(
        "forward",
        _forward_kernel,
        "q_ptr k_ptr v_ptr out_ptr stats_ptr bounds_ptr slopes_ptr",
        "alibi scale window q_stride k_stride v_stride heads",
    ),
    "rows": _spec(
        "backward",
        _rows_kernel,
        "grad_ptr out_ptr stats_ptr level_ptr delta_ptr bounds_ptr slopes_ptr",
        "alibi blocks heads",
        lambda table: _of_rows(table, "DOT"),
    ),
    "backward": _spec(
        "backward",
        _backward_kernel,
        "grad_ptr q_ptr k_ptr v_ptr level_ptr delta_ptr part_ptr dk_ptr dv_ptr bounds_ptr slopes_ptr",
        "alibi scale window q_stride k_stride v_stride blocks heads share splits",
    ),
    "join": _spec(
        "backward",
        _join_kernel,
        "part_ptr dq_ptr bounds_ptr",
        "window blocks heads splits",
        lambda table: _of_rows(table, "BLOCK_N"),
    ),
}
