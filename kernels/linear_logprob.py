"""Log-probability and entropy straight from hidden states: head matmul and softmax by pieces of the vocabulary.

The whole logits = hidden weight^T never exist. Forward keeps (m, s, t, y) of kernels/logprob.py; backward computes a
chunk of the logits again, as d logits, and multiplies it:
d hidden = sum_c dlogits_c weight_c (in fp32),   d weight_c = dlogits_c^T hidden
On the CPU each chunk is a matmul and a pass of the logprob kernels over it. On CUDA a tile of logits lives in registers
only: forward splits the vocabulary over programs and joins their statistics in a fixed order, backward writes
d logits at once. d weight_c is then a plain matmul of the vendor's library; d hidden is one that accumulates.
"""

# The kernels' types are those of Triton's language.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from itertools import pairwise

import torch
from torch.autograd.function import once_differentiable

from .backends.triton_runtime import Spec, cdiv, jit, precision, tl, uses_triton, vendor
from .dispatch import COMPILED_DTYPES
from .logprob import Merge, add_piece_, check_rows, finish, logprob_ref, merge_shards, piece_gradient_

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits held at a time: on the CPU what fits the second-level cache, on a GPU enough for matmuls at full speed."""
TILE = 64


def linear_logprob_ref(hidden, weight, labels, scale=1.0):
    """The whole logits, then `logprob_ref`. Shapes as in `linear_logprob`."""
    return logprob_ref(hidden @ weight.T, labels, scale)


@jit
def _logits_tile(
    hidden_ptr, weight_ptr, rows, columns, n, v, h,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """hidden[rows] weight[columns]^T [BLOCK_M, BLOCK_N] fp32."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, h, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(hidden_ptr + rows[:, None] * h + k[None, :], (rows < n)[:, None] & (k < h)[None, :], 0.0)
        b = tl.load(weight_ptr + columns[:, None] * h + k[None, :], (columns < v)[:, None] & (k < h)[None, :], 0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=DOT)
    return acc


@jit
def _stats_kernel(
    hidden_ptr, weight_ptr, labels_ptr, part_ptr, n, v, h, vocab_start, scale,
    SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """(m, s, t, y) of BLOCK_M rows over one part of SHARE columns, into part [shares, 4, n]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    share = tl.program_id(1).to(tl.int64)
    label = tl.load(labels_ptr + rows, rows < n, 0) - vocab_start
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    s, t, y = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for first in range(share * SHARE, tl.minimum((share + 1) * SHARE, v), BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N).to(tl.int64)
        z = _logits_tile(hidden_ptr, weight_ptr, rows, columns, n, v, h, BLOCK_M, BLOCK_N, BLOCK_K, DOT) * scale
        z = tl.where((columns < v)[None, :], z, float("-inf"))
        new = tl.maximum(m, tl.max(z, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        drop = tl.where(s == 0.0, 0.0, m - base)  # before the first tile m is -inf
        factor = tl.exp(drop)
        d = z - base[:, None]
        p = tl.exp(d)
        t = t * factor + s * (drop * factor) + tl.sum(tl.where(p == 0.0, 0.0, p * d), 1)
        s = s * factor + tl.sum(p, 1)
        y += tl.sum(tl.where(columns[None, :] == label[:, None], z, 0.0), 1)
        m = new
    part_ptr += share * 4 * n + rows
    tl.store(part_ptr, m, rows < n)
    tl.store(part_ptr + n, s, rows < n)
    tl.store(part_ptr + 2 * n, t, rows < n)
    tl.store(part_ptr + 3 * n, y, rows < n)


@jit
def _join_kernel(part_ptr, stats_ptr, n, shares, BLOCK: tl.constexpr):
    """stats [4, n] from all parts, first to last: sums in a fixed order."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = rows < n
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    s, t, y = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    part_ptr += rows
    for _ in range(shares):
        m_next, s_next = tl.load(part_ptr, real, 0.0), tl.load(part_ptr + n, real, 0.0)
        t_next, y_next = tl.load(part_ptr + 2 * n, real, 0.0), tl.load(part_ptr + 3 * n, real, 0.0)
        new = tl.maximum(m, m_next)
        drop, drop_next = tl.where(s == 0.0, 0.0, m - new), tl.where(s_next == 0.0, 0.0, m_next - new)
        factor, factor_next = tl.exp(drop), tl.exp(drop_next)
        t = t * factor + s * (drop * factor) + t_next * factor_next + s_next * (drop_next * factor_next)
        s = s * factor + s_next * factor_next
        y += y_next
        m = new
        part_ptr += tl.full([], 4, tl.int64) * n
    stats_ptr += rows
    tl.store(stats_ptr, m, real)
    tl.store(stats_ptr + n, s, real)
    tl.store(stats_ptr + 2 * n, t, real)
    tl.store(stats_ptr + 3 * n, y, real)


@jit
def _gradient_kernel(
    hidden_ptr, weight_ptr, labels_ptr, stats_ptr, grad_logprob_ptr, grad_entropy_ptr, out_ptr, n, v, h, vocab_start,
    scale, of_logprob, of_entropy,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of d logits [n, v], from logits that are computed again; flags as in kernels/logprob.py."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = rows < n
    z = _logits_tile(hidden_ptr, weight_ptr, rows, columns, n, v, h, BLOCK_M, BLOCK_N, BLOCK_K, DOT)
    stats_ptr += rows
    total = tl.load(stats_ptr + n, real, 1.0)
    log_s = tl.log(total)
    entropy = log_s - tl.load(stats_ptr + 2 * n, real, 0.0) / total
    d = z * scale - tl.load(stats_ptr, real, 0.0)[:, None] - log_s[:, None]
    p = tl.exp(d)
    g = tl.load(grad_logprob_ptr + rows, real & of_logprob, 0.0)[:, None]
    pull = tl.load(grad_entropy_ptr + rows, real & of_entropy, 0.0)[:, None]
    local = tl.load(labels_ptr + rows, real, 0) - vocab_start
    common = tl.where(p == 0.0, 0.0, p * (g + pull * (d + entropy[:, None])))
    gradient = tl.where(columns[None, :] == local[:, None], g, 0.0) - common
    mask = real[:, None] & (columns < v)[None, :]
    tl.store(out_ptr + rows[:, None] * v + columns[None, :], (gradient * scale).to(out_ptr.dtype.element_ty), mask)


@jit
def _accumulate_kernel(
    grad_ptr, weight_ptr, total_ptr, n, v, h,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of total [n, h] += grad [n, v] weight [v, h]; total is fp32, so that no chunk's part is rounded."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, v, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
        a = tl.load(grad_ptr + rows[:, None] * v + k[None, :], (rows < n)[:, None] & (k < v)[None, :], 0.0)
        b = tl.load(weight_ptr + k[:, None] * h + columns[None, :], (k < v)[:, None] & (columns < h)[None, :], 0.0)
        acc = tl.dot(a, b, acc, input_precision=DOT)
    place = total_ptr + rows[:, None] * h + columns[None, :]
    mask = (rows < n)[:, None] & (columns < h)[None, :]
    tl.store(place, tl.load(place, mask, 0.0) + acc, mask)


SHARE = 2048  # vocabulary columns of a program: enough programs for a GPU from a few hundred rows on
_JOIN = {"BLOCK": 128, "num_warps": 4, "num_stages": 3}


def _blocks(dtype: torch.dtype, gpu: str) -> dict:
    """The largest tiles that the ahead-of-time compiler fits into registers on every architecture of the vendor."""
    if dtype == torch.float32:  # no matrix units: the products live in registers
        tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1}
    else:
        tile = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3 if gpu == "cuda" else 2}
    return tile | {"DOT": precision(dtype)}


@torch.library.custom_op("trialign::linear_logprob_stats", mutates_args=())
def linear_logprob_stats(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float, vocab_start: int
) -> torch.Tensor:
    """stats [4, n] of kernels/logprob.py of hidden [n, h] @ weight [v, h]^T, both packed."""
    (n, h), v, blocks = hidden.shape, weight.shape[0], _blocks(hidden.dtype, vendor())
    shares = max(cdiv(v, SHARE), 1)  # a rank may have no rows of a small vocabulary
    part, stats = hidden.new_empty(shares, 4, n, dtype=torch.float32), hidden.new_empty(4, n, dtype=torch.float32)
    if n:
        _stats_kernel[(cdiv(n, blocks["BLOCK_M"]), shares)](
            hidden, weight, labels, part, n, v, h, vocab_start, scale, SHARE=SHARE, **blocks
        )
        _join_kernel[(cdiv(n, _JOIN["BLOCK"]),)](part, stats, n, shares, **_JOIN)
    return stats


@torch.library.custom_op("trialign::linear_logprob_gradient_", mutates_args=("out",))
def linear_logprob_gradient_(
    out: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    stats: torch.Tensor,
    grad_logprob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    scale: float,
    vocab_start: int,
) -> None:
    """d logits of hidden [n, h] @ weight [v, h]^T, a piece of the vocabulary, into out [n, v]; all packed."""
    (n, h), v, blocks = hidden.shape, weight.shape[0], _blocks(hidden.dtype, vendor())
    if n:
        _gradient_kernel[(cdiv(n, blocks["BLOCK_M"]), cdiv(v, blocks["BLOCK_N"]))](
            hidden, weight, labels, stats, stats if grad_logprob is None else grad_logprob,
            stats if grad_entropy is None else grad_entropy, out, n, v, h, vocab_start, scale,
            grad_logprob is not None, grad_entropy is not None, **blocks,
        )  # fmt: skip


@torch.library.custom_op("trialign::add_product_", mutates_args=("total",))
def add_product_(total: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor) -> None:
    """total [n, h] fp32 += grad [n, v] @ weight [v, h]; all packed."""
    (n, v), h, blocks = grad.shape, weight.shape[1], _blocks(grad.dtype, vendor())
    if n:
        _accumulate_kernel[(cdiv(n, blocks["BLOCK_M"]), cdiv(h, blocks["BLOCK_N"]))](
            grad, weight, total, n, v, h, **blocks
        )


linear_logprob_stats.register_fake(lambda hidden, *_: hidden.new_empty(4, hidden.shape[0], dtype=torch.float32))
linear_logprob_gradient_.register_fake(lambda *_: None)
add_product_.register_fake(lambda *_: None)


_NUMBERS = dict.fromkeys(("n", "v", "h", "vocab_start"), "i32") | {"scale": "fp32"}
_POINTERS = {"hidden_ptr": "*bf16", "weight_ptr": "*bf16", "labels_ptr": "*i64"}
_CUDA, _HIP = (_blocks(torch.bfloat16, gpu) for gpu in ("cuda", "hip"))
_FP32 = _blocks(torch.float32, "cuda")
SPECS = {
    "stats": Spec(
        _stats_kernel, _POINTERS | {"part_ptr": "*fp32"} | _NUMBERS, (_CUDA | {"SHARE": SHARE},),
        (_HIP | {"SHARE": SHARE},), (_FP32 | {"SHARE": SHARE},), ("SHARE",), dot=True, unaligned=("n", "vocab_start"),
    ),
    "join": Spec(
        _join_kernel, {"part_ptr": "*fp32", "stats_ptr": "*fp32", "n": "i32", "shares": "i32"},
        (_JOIN,), unaligned=("n", "shares"),
    ),
    "gradient": Spec(
        _gradient_kernel,
        _POINTERS | dict.fromkeys(("stats_ptr", "grad_logprob_ptr", "grad_entropy_ptr"), "*fp32")
        | {"out_ptr": "*bf16"} | _NUMBERS | dict.fromkeys(("of_logprob", "of_entropy"), "u1"),
        (_CUDA,), (_HIP,), (_FP32,), dot=True, unaligned=("n", "vocab_start"),
    ),
    "accumulate": Spec(
        _accumulate_kernel,
        {"grad_ptr": "*bf16", "weight_ptr": "*bf16", "total_ptr": "*fp32"} | dict.fromkeys(("n", "v", "h"), "i32"),
        (_CUDA,), (_HIP,), (_FP32,), dot=True, unaligned=("n", "v"),
    ),
}  # fmt: skip


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, scale, merge, vocab_start):
        if _fused(hidden):
            stats = linear_logprob_stats(hidden, weight, labels, scale, vocab_start)
        else:
            stats = hidden.new_zeros(4, hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
            stats[0] = -torch.inf
            chunks, work = _chunks(hidden, weight)
            for start, end in chunks:
                logits = _logits(hidden, weight[start:end], work)
                stats = add_piece_(stats, logits, labels, scale, vocab_start + start)
        stats = merge_shards(stats, merge)
        ctx.save_for_backward(hidden, weight, labels, stats)
        ctx.scale, ctx.vocab_start = scale, vocab_start
        ctx.set_materialize_grads(False)
        return finish(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        hidden, weight, labels, stats = ctx.saved_tensors
        grads = [None if g is None else g.contiguous() for g in grads]
        grad_hidden = torch.zeros_like(hidden, dtype=stats.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        chunks, work = _chunks(hidden, weight)
        for start, end in chunks:
            piece = weight[start:end]
            where = ctx.scale, ctx.vocab_start + start
            if _fused(hidden):
                logits = work[: hidden.shape[0] * (end - start)].view(-1, end - start)
                linear_logprob_gradient_(logits, hidden, piece, labels, stats, *grads, *where)
            else:
                logits = piece_gradient_(_logits(hidden, piece, work), labels, stats, *grads, *where)
            if grad_hidden is not None and _fused(hidden):
                add_product_(grad_hidden, logits, piece)
            elif grad_hidden is not None:
                grad_hidden += logits @ piece
            if grad_weight is not None:
                torch.mm(logits.T, hidden, out=grad_weight[start:end])
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


def _fused(hidden: torch.Tensor) -> bool:
    """True where the Triton kernels above run."""
    return uses_triton(hidden) and hidden.dtype in COMPILED_DTYPES["cuda"]


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """Chunks of the vocabulary, and a buffer for one chunk's logits, reused by every chunk.

    On a GPU a product is slow where a row of logits is not a whole number of tiles long, as in a vocabulary of 49,153:
    the columns past the last tile are a chunk of their own.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    elements = CHUNK_ELEMENTS["cuda" if hidden.is_cuda else "cpu"]
    size = max(1024, elements // max(rows, 1) // 256 * 256)
    tiled = vocab // TILE * TILE if hidden.is_cuda else vocab
    bounds = [*range(0, tiled, size), tiled, *[vocab] * (vocab > tiled)]
    return list(pairwise(bounds)), hidden.new_empty(rows * min(size, vocab))


def _logits(hidden: torch.Tensor, weight: torch.Tensor, work: torch.Tensor) -> torch.Tensor:
    rows, columns = hidden.shape[0], weight.shape[0]
    return torch.mm(hidden, weight.T, out=work[: rows * columns].view(rows, columns))  # [n, chunk]


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: float = 1.0,
    merge: Merge | None = None,
    vocab_start: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logprob` of hidden [n, h] @ weight [v, h]^T without ever holding the logits [n, v].

    Returns (logprob [n], entropy [n]) fp32, both differentiable in hidden and weight. With `merge`, weight is one shard
    of the vocabulary that starts at `vocab_start`, labels stay global, and d hidden is this shard's part only (the
    caller sums them). ValueError for a scale that is not positive, or labels that are not one a row.
    """
    check_rows(hidden, labels, scale)
    return _LinearLogprob.apply(
        hidden.contiguous(), weight.contiguous(), labels.contiguous(), scale, merge, vocab_start
    )
