"""Log-probability and entropy straight from hidden states: head matmul and softmax by chunks of the vocabulary.

The whole logits = hidden weight^T never exist. Each chunk of them is a matmul of the vendor's library and a pass of the
logprob kernels (kernels/logprob.py) over it, which joins its (m, s, t, y) with those before. Backward computes a chunk
again, turns it into d logits in place, and multiplies that:
d hidden = sum_c dlogits_c weight_c (in fp32),   d weight_c = dlogits_c^T hidden
Memory: one chunk of CHUNK_ELEMENTS logits and the statistics [4, n], whatever the vocabulary; backward adds d hidden in
fp32. A logit is rounded to the model's dtype, as the sampler's logits are.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.autograd.function import once_differentiable

from .logprob import Merge, add_piece_, check_rows, finish, logprob_ref, merge_shards, piece_gradient_

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits held at a time: on the CPU what fits the second-level cache, on a GPU enough for matmuls at full speed."""
TILE = 64


def linear_logprob_ref(hidden, weight, labels, scale=1.0):
    """The whole logits, then `logprob_ref`. Shapes as in `linear_logprob`."""
    return logprob_ref(hidden @ weight.T, labels, scale)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, scale, merge, vocab_start):
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
        grad_logprob, grad_entropy = (None if g is None else g.contiguous() for g in grads)
        grad_hidden = torch.zeros_like(hidden, dtype=stats.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        chunks, work = _chunks(hidden, weight)
        for start, end in chunks:
            piece = weight[start:end]
            logits = _logits(hidden, piece, work)
            where = ctx.scale, ctx.vocab_start + start
            logits = piece_gradient_(logits, labels, stats, grad_logprob, grad_entropy, *where)
            if grad_hidden is not None:
                _add_product_(grad_hidden, logits, piece)
            if grad_weight is not None:
                torch.mm(logits.T, hidden, out=grad_weight[start:end])
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


def _add_product_(total: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor) -> None:
    """total [n, h] += grad [n, c] @ weight [c, h]; total is fp32 or wider.

    On a GPU no chunk's part is rounded. On the CPU torch has no product of halves with an fp32 result.
    """
    if total.is_cuda:
        torch.addmm(total, grad, weight, out_dtype=total.dtype, out=total)
    else:
        total += grad @ weight


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
