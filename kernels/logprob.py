"""Log-probability of one label per row and entropy of the row, in one pass over the logits, whole or cut in shards.

z = scale * logits,   m = max z,   s = sum_k e^(z_k - m),   t = sum_k e^(z_k - m) (z_k - m),   y = z_label
logprob = (y - m) - log s,   entropy H = log s - t / s
d logits_k = scale * (g (1[k = label] - p_k) - g_H p_k (log p_k + H)),   p_k = e^(z_k - m - log s)
(m, s, t, y) of pieces of the vocabulary merge into those of the whole, so no piece ever needs the others' logits. Sums
are relative to m: with logits of 1e4 an absolute log-sum-exp would cost 3 digits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from .dispatch import choose, register

Merge = Callable[[torch.Tensor], torch.Tensor]
"""stats [4, n] (max, sum of exp, sum of exp * logit, label logit or 0) of one vocabulary shard -> of all shards."""


def logprob_ref(logits, labels, scale=1.0):
    """The textbook way, differentiable by torch itself; whole vocabulary only. Shapes as in `logprob`."""
    logp = (logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale).log_softmax(-1)  # [n, v]
    entropy = -torch.where(logp > -torch.inf, logp.exp() * logp, 0).sum(-1)
    return logp.gather(1, labels[:, None])[:, 0], entropy


def stats_ref(logits, labels, scale, vocab_start):
    """(m, s, t, y) [4, n] of one piece of the vocabulary."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    m = z.amax(-1)
    d = z - m.clamp(min=torch.finfo(m.dtype).min)[:, None]  # a row of -inf only: s = 0, not NaN
    p = d.exp()
    local = labels - vocab_start
    inside = (local >= 0) & (local < logits.shape[1])
    y = torch.where(inside, z.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0], 0)
    return torch.stack((m, p.sum(-1), torch.where(p == 0, 0, p * d).sum(-1), y))


def gradient_ref(logits, labels, stats, grad_logprob, grad_entropy, scale, vocab_start):
    """d logits [n, v] of one piece of the vocabulary, from the merged stats. A grad that is None is 0."""
    z = logits.to(stats.dtype) * scale
    m, s, t, _ = stats[:, :, None]  # [n, 1] each
    logp = z - m - s.log()
    g = torch.zeros_like(m) if grad_logprob is None else grad_logprob[:, None]
    factor = -g if grad_entropy is None else -g - grad_entropy[:, None] * (logp + s.log() - t / s)
    out = torch.where(logp == -torch.inf, 0, logp.exp() * factor)
    local = labels - vocab_start
    row = ((local >= 0) & (local < logits.shape[1])).nonzero()[:, 0]
    out[row, local[row]] += g[row, 0]
    return (out * scale).to(logits.dtype)


def join(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The stats [4, n] of two pieces of the vocabulary together."""
    m = torch.maximum(a[0], b[0])
    parts = []
    for piece in (a, b):
        drop = torch.where(piece[1] == 0, 0, piece[0] - m)  # an empty piece has m = -inf
        factor = torch.where(piece[1] == 0, 0, drop.exp())
        parts.append((piece[1] * factor, (piece[2] + drop * piece[1]) * factor))
    return torch.stack((m, parts[0][0] + parts[1][0], parts[0][1] + parts[1][1], a[3] + b[3]))


def merged(stats: torch.Tensor, merge: Merge | None) -> torch.Tensor:
    """The stats of all vocabulary shards. `merge` speaks of sums of exp * logit, so t is made absolute on the way."""
    if merge is None:
        return stats
    m, s, t, y = stats
    m, s, t, y = merge(torch.stack((m, s, torch.where(s == 0, 0, t + m * s), y)))
    return torch.stack((m, s, t - m * s, y)).contiguous()


def finish(stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprob, entropy) [n] out of the stats of the whole vocabulary."""
    m, s, t, y = stats
    log_s = s.log()
    return y - m - log_s, log_s - t / s


register(
    "logprob_stats",
    lambda logits, labels, scale, vocab_start: logits.new_empty(4, logits.shape[0], dtype=torch.float32),
)
register("logprob_update_", lambda *_: None)
register("logprob_backward", lambda logits, *_: logits.new_empty(logits.shape))
register("logprob_backward_", lambda *_: None)


def piece_stats(logits: torch.Tensor, labels: torch.Tensor, scale: float, vocab_start: int) -> torch.Tensor:
    """`stats_ref` by the fastest implementation."""
    if choose("logprob_stats", logits) == "reference":
        return stats_ref(logits, labels, scale, vocab_start)
    return torch.ops.trialign.logprob_stats(logits.contiguous(), labels.contiguous(), scale, vocab_start)


def add_piece_(
    stats: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, scale: float, vocab_start: int
) -> torch.Tensor:
    """The stats joined with those of one more piece of the vocabulary; `stats` itself is given up."""
    if choose("logprob_update_", logits) == "reference":
        return join(stats, stats_ref(logits, labels, scale, vocab_start))
    torch.ops.trialign.logprob_update_(stats, logits, labels, scale, vocab_start)
    return stats


def piece_gradient(logits, labels, stats, grad_logprob, grad_entropy, scale, vocab_start) -> torch.Tensor:
    """`gradient_ref` by the fastest implementation."""
    if choose("logprob_backward", logits) == "reference":
        return gradient_ref(logits, labels, stats, grad_logprob, grad_entropy, scale, vocab_start)
    grads = _contiguous(grad_logprob), _contiguous(grad_entropy)
    return torch.ops.trialign.logprob_backward(
        logits.contiguous(), labels.contiguous(), stats.contiguous(), *grads, scale, vocab_start
    )


def piece_gradient_(logits, labels, stats, grad_logprob, grad_entropy, scale, vocab_start) -> torch.Tensor:
    """`piece_gradient` that may overwrite the logits, which must be contiguous."""
    if choose("logprob_backward_", logits) == "reference":
        return gradient_ref(logits, labels, stats, grad_logprob, grad_entropy, scale, vocab_start)
    grads = _contiguous(grad_logprob), _contiguous(grad_entropy)
    torch.ops.trialign.logprob_backward_(logits, labels, stats, *grads, scale, vocab_start)
    return logits


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, scale, merge, vocab_start):
        stats = merged(piece_stats(logits, labels, scale, vocab_start), merge)
        ctx.save_for_backward(logits, labels, stats)
        ctx.scale, ctx.vocab_start = scale, vocab_start
        ctx.set_materialize_grads(False)
        return finish(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        logits, labels, stats = ctx.saved_tensors
        return piece_gradient(logits, labels, stats, *grads, ctx.scale, ctx.vocab_start), None, None, None, None


def logprob(
    logits: torch.Tensor,
    labels: torch.Tensor,
    scale: float = 1.0,
    merge: Merge | None = None,
    vocab_start: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprob [n], entropy [n]), fp32, of the softmax of scale * logits; both differentiable in the logits.

    logits [n, v], labels [n] int64. With `merge`, logits are one shard of the vocabulary that starts at `vocab_start`,
    labels stay global, and the gradient is that of this shard's logits. Without it every label must lie in [0, v).
    ValueError for a scale that is not positive.
    """
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return _Logprob.apply(logits, labels, scale, merge, vocab_start)
