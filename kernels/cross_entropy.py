"""Cross-entropy with label smoothing (Szegedy et al. 2016) and z-loss (Chowdhery et al. 2022), by the logprob kernels.

z = scale * logits,   lse = log sum_k e^z_k
L = -(1 - e) (z_label - lse) - e / v sum_k (z_k - lse) + c lse^2
d logits_k = scale * g ((1 + 2 c lse) p_k - (1 - e) 1[k = label] - e / v)
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .logprob import piece_gradient, piece_stats


def cross_entropy_ref(logits, labels, label_smoothing=0.0, z_loss=0.0, scale=1.0, ignore_index=-100):
    """The formula in plain torch. Shapes as in `cross_entropy`."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    lse = z.logsumexp(-1)
    at_label = z.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    loss = -(1 - label_smoothing) * (at_label - lse) + z_loss * lse.square()
    if label_smoothing:
        loss = loss - label_smoothing * (z.mean(-1) - lse)
    return torch.where(labels == ignore_index, 0, loss)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, label_smoothing, z_loss, scale, ignore_index):
        stats = piece_stats(logits, labels, scale, 0)
        m, s, _, y = stats
        lse = m + s.log()
        loss = -(1 - label_smoothing) * (y - m - s.log()) + z_loss * lse.square()
        if label_smoothing:
            mean = logits.mean(-1, dtype=stats.dtype) * scale
            loss = loss - label_smoothing * (mean - lse)
        ctx.save_for_backward(logits, labels, stats)
        ctx.numbers = label_smoothing, z_loss, scale, ignore_index
        return torch.where(labels == ignore_index, 0, loss)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, labels, stats = ctx.saved_tensors
        label_smoothing, z_loss, scale, ignore_index = ctx.numbers
        n, v = logits.shape
        g = torch.where(labels == ignore_index, 0, grad)
        m, s, _, y = stats
        pull = 1 + 2 * z_loss * (m + s.log())
        out = piece_gradient(logits, labels, stats, -g * pull, None, scale, 0)  # scale g pull (p - 1[k = label])
        if label_smoothing:
            out -= (g * (label_smoothing / v * scale))[:, None]
        if label_smoothing or z_loss:
            # The label's own entry again, in fp32: there the terms cancel, which corrections of rounded numbers miss.
            at_label = pull * (y - m - s.log()).exp() - (1 - label_smoothing) - label_smoothing / v
            row = torch.arange(n, device=labels.device)
            out.index_put_((row, labels.clamp(0, v - 1)), (scale * g * at_label).to(out.dtype))
        return out, None, None, None, None, None


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scale: float = 1.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Per-token loss [n] fp32 of logits [n, v] against labels [n] int64; 0 where the label is `ignore_index`.

    Differentiable in the logits; every other label must lie in [0, v). ValueError for label_smoothing outside [0, 1), a
    negative z_loss, or a scale that is not positive.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    if z_loss < 0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return _CrossEntropy.apply(logits, labels, label_smoothing, z_loss, scale, ignore_index)
