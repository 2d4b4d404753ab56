"""Cross-entropy with label smoothing (Szegedy et al. 2016) and z-loss (Chowdhery et al. 2022), by the logprob kernels.

z = scale * logits,   lse = log sum_k e^z_k
L = -(1 - e) (z_label - lse) - e / v sum_k (z_k - lse) + c lse^2
d logits_k = scale * g ((1 + 2 c lse) p_k - (1 - e) 1[k = label] - e / v)
Of shards of the vocabulary the statistics (m, s, t, y) are merged, and with them sum_k z_k and v.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .logprob import Merge, check_rows, merged, piece_gradient, piece_stats


def cross_entropy_ref(logits, labels, label_smoothing=0.0, z_loss=0.0, scale=1.0, ignore_index=-100):
    """The formula in plain torch. Shapes as in `cross_entropy`."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    lse = z.logsumexp(-1)
    at_label = z.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    loss = -(1 - label_smoothing) * (at_label - lse) + z_loss * lse.square()
    if label_smoothing:
        loss = loss - label_smoothing * (z.mean(-1) - lse)
    return torch.where(labels == ignore_index, 0, loss)


def _statistics(logits, labels, scale, merge, vocab_start):
    """Of the whole vocabulary: stats [4, n], the sum of each row's z [n], and the number of columns [1]."""
    stats = piece_stats(logits, labels, scale, vocab_start)
    total = logits.sum(-1, dtype=stats.dtype) * scale
    size = torch.full_like(stats[:, :1], logits.shape[1])  # [4, 1]
    if merge is None:
        return stats, total, size[0]
    # A merge adds up the fourth row: there the sums and the size travel along with the labels' logits.
    more = torch.cat((stats[:3], total[None]))
    one = torch.cat((torch.zeros_like(size[:1]), torch.ones_like(size[:1]), torch.zeros_like(size[:1]), size[:1]))
    n = len(labels)
    whole = merged(torch.cat((stats, more, one), 1), merge)
    return whole[:, :n].contiguous(), whole[3, n : 2 * n], whole[3, 2 * n :]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, label_smoothing, z_loss, scale, ignore_index, merge, vocab_start):
        if label_smoothing:
            stats, total, size = _statistics(logits, labels, scale, merge, vocab_start)
        else:
            stats, total, size = merged(piece_stats(logits, labels, scale, vocab_start), merge), None, None
        m, s, _, y = stats
        lse = m + s.log()
        loss = -(1 - label_smoothing) * (y - m - s.log()) + z_loss * lse.square()
        if total is not None and size is not None:
            loss = loss - label_smoothing * (total / size - lse)
        ctx.save_for_backward(logits, labels, stats, size)
        ctx.numbers = label_smoothing, z_loss, scale, ignore_index, vocab_start
        return torch.where(labels == ignore_index, 0, loss)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, labels, stats, size = ctx.saved_tensors
        label_smoothing, z_loss, scale, ignore_index, vocab_start = ctx.numbers
        n, v = logits.shape
        g = torch.where(labels == ignore_index, 0, grad)
        m, s, _, y = stats
        pull = 1 + 2 * z_loss * (m + s.log())
        # scale g pull (p - 1[k = label])
        out = piece_gradient(logits, labels, stats, -g * pull, None, scale, vocab_start)
        even = label_smoothing / size if label_smoothing else torch.zeros_like(g)
        if label_smoothing:
            out -= (scale * g * even)[:, None]
        if v and (label_smoothing or z_loss):
            # The label's own entry again, in fp32: there the terms cancel, which corrections of rounded numbers miss.
            at_label = scale * g * (pull * (y - m - s.log()).exp() - (1 - label_smoothing) - even)
            local, row = labels - vocab_start, torch.arange(n, device=labels.device)
            place = row, local.clamp(0, v - 1)
            here = (local >= 0) & (local < v)
            out.index_put_(place, torch.where(here, at_label.to(out.dtype), out[place]))
        return out, *(None,) * 7


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scale: float = 1.0,
    ignore_index: int = -100,
    merge: Merge | None = None,
    vocab_start: int = 0,
) -> torch.Tensor:
    """Per-token loss [n] fp32 of logits [n, v] against labels [n] int64; 0 where the label is `ignore_index`.

    Differentiable in the logits. With `merge` (as in `logprob`), logits are one shard of the vocabulary that starts at
    `vocab_start`, labels stay global, and the gradient is that of this shard's logits. Without it every label but
    `ignore_index` must lie in [0, v). ValueError for label_smoothing outside [0, 1), a negative z_loss, a scale that is
    not positive, or labels that are not one a row.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    if z_loss < 0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    check_rows(logits, labels, scale)
    return _CrossEntropy.apply(logits, labels, label_smoothing, z_loss, scale, ignore_index, merge, vocab_start)
