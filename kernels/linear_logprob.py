"""Log-probability and entropy straight from hidden states: head matmul and softmax by chunks of the vocabulary.

logits = hidden weight^T is never whole: forward keeps (m, s, t, y) of kernels/logprob.py, backward computes each chunk
again, turns it into d logits in place, and sums d hidden = sum_c dlogits_c weight_c in fp32;
d weight_c = dlogits_c^T hidden.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .logprob import Merge, add_piece_, finish, logprob_ref, merged, piece_gradient_

CHUNK_ELEMENTS = 1 << 22
"""Logits held at a time: what a last-level cache takes in bf16."""


def linear_logprob_ref(hidden, weight, labels, scale=1.0):
    """The whole logits, then `logprob_ref`. Shapes as in `linear_logprob`."""
    return logprob_ref(hidden @ weight.T, labels, scale)


def _chunks(rows: int, vocab: int) -> list[tuple[int, int]]:
    size = max(1024, CHUNK_ELEMENTS // max(rows, 1) // 256 * 256)
    return [(start, min(start + size, vocab)) for start in range(0, vocab, size)]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, scale, merge, vocab_start):
        rows = hidden.shape[0]
        stats = hidden.new_zeros(4, rows, dtype=torch.promote_types(hidden.dtype, torch.float32))
        stats[0] = -torch.inf
        chunks = _chunks(rows, weight.shape[0])
        work = _workspace(hidden, chunks)
        for start, end in chunks:
            logits = _logits(hidden, weight[start:end], work)
            stats = add_piece_(stats, logits, labels, scale, vocab_start + start)
        stats = merged(stats, merge)
        ctx.save_for_backward(hidden, weight, labels, stats)
        ctx.scale, ctx.vocab_start = scale, vocab_start
        ctx.set_materialize_grads(False)
        return finish(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, labels, stats = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=stats.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        chunks = _chunks(hidden.shape[0], weight.shape[0])
        work = _workspace(hidden, chunks)
        for start, end in chunks:
            logits = _logits(hidden, weight[start:end], work)
            logits = piece_gradient_(
                logits, labels, stats, grad_logprob, grad_entropy, ctx.scale, ctx.vocab_start + start
            )
            if grad_hidden is not None:
                grad_hidden += logits @ weight[start:end]
            if grad_weight is not None:
                torch.mm(logits.T, hidden, out=grad_weight[start:end])
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


def _workspace(hidden: torch.Tensor, chunks: list[tuple[int, int]]) -> torch.Tensor:
    """Room for one chunk's logits, used again by every chunk."""
    return hidden.new_empty(hidden.shape[0] * max((end - start for start, end in chunks), default=0))


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
    caller sums them). ValueError for a scale that is not positive.
    """
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return _LinearLogprob.apply(hidden.contiguous(), weight, labels.contiguous(), scale, merge, vocab_start)
