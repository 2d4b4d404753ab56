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

from .backends.triton_runtime import Spec, cdiv, jit, tl
from .dispatch import choose, register

Merge = Callable[[torch.Tensor], torch.Tensor]
"""stats [4, n] (max, sum of exp, sum of exp * logit, label logit or 0) of one vocabulary shard -> of all shards."""


def logprob_ref(logits, labels, scale=1.0):
    """log_softmax, differentiable by torch; whole vocabulary only. Shapes as in `logprob`."""
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
    inside = (local >= 0) & (local < logits.shape[1])
    out.scatter_add_(1, local.clamp(0, logits.shape[1] - 1)[:, None], torch.where(inside[:, None], g, 0))
    return (out * scale).to(logits.dtype)


def join(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The stats [4, n] of two pieces of the vocabulary together.

    t + drop * s, rescaled, in an order that does not overflow for logits masked by the least finite number: the drop
    from them to others is that number too, and its factor 0.
    """
    m = torch.maximum(a[0], b[0])
    parts = []
    for piece in (a, b):
        drop = torch.where(piece[1] == 0, 0, piece[0] - m)  # an empty piece has m = -inf
        factor = torch.where(piece[1] == 0, 0, drop.exp())
        parts.append((piece[1] * factor, piece[2] * factor + piece[1] * (drop * factor)))
    return torch.stack((m, parts[0][0] + parts[1][0], parts[0][1] + parts[1][1], a[3] + b[3]))


def merge_shards(stats: torch.Tensor, merge: Merge | None) -> torch.Tensor:
    """The stats of all vocabulary shards. `merge` takes sums of exp * logit, so t is converted before and after."""
    if merge is None:
        return stats
    m, s, t, y = stats
    limit = torch.finfo(t.dtype).max  # a shard masked by the least finite number overflows; its weight is 0
    m, s, t, y = merge(torch.stack((m, s, torch.where(s == 0, 0, t + m * s).clamp(-limit, limit), y)))
    return torch.stack((m, s, t - m * s, y)).contiguous()


def finish(stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprob, entropy) [n] out of the stats of the whole vocabulary."""
    m, s, t, y = stats
    log_s = s.log()
    return y - m - log_s, log_s - t / s


@jit
def _update(stats, logits, labels, n, v, stride, vocab_start, scale, BLOCK: tl.constexpr):
    """One row a program, a block at a time: its stats joined with those in `stats`."""
    row = tl.program_id(0).to(tl.int64)
    m, s, t = tl.load(stats + row), tl.load(stats + n + row), tl.load(stats + 2 * n + row)
    for start in range(0, v, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * stride + column, column < v, -float("inf")).to(tl.float32) * scale
        new = tl.maximum(m, tl.max(z, 0))
        base = tl.where(new == -float("inf"), 0.0, new)
        drop = tl.where(s == 0.0, 0.0, m - base)  # before the first block m is -inf
        factor = tl.exp(drop)
        d = z - base
        p = tl.exp(d)
        t = t * factor + s * (drop * factor) + tl.sum(tl.where(p == 0.0, 0.0, p * d), 0)
        s = s * factor + tl.sum(p, 0)
        m = new
    tl.store(stats + row, m)
    tl.store(stats + n + row, s)
    tl.store(stats + 2 * n + row, t)
    local = tl.load(labels + row) - vocab_start
    inside = (local >= 0) & (local < v)
    label = tl.load(logits + row * stride + local, inside, 0.0).to(tl.float32) * scale
    tl.store(stats + 3 * n + row, tl.load(stats + 3 * n + row) + label)


@jit
def _gradient(
    logits, out, labels, stats, grad_logprob, grad_entropy, n, v, stride, vocab_start, scale, of_logprob, of_entropy,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program handles one block of one row; out may be logits: an element is read by the program that writes it.

    An output without a gradient (of_logprob, of_entropy False) has gradient 0.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m, s, t = tl.load(stats + row), tl.load(stats + n + row), tl.load(stats + 2 * n + row)
    log_s = tl.log(s)
    d = tl.load(logits + row * stride + column, column < v, 0.0).to(tl.float32) * scale - m - log_s
    p = tl.exp(d)
    g, pull = tl.load(grad_logprob + row, of_logprob, 0.0), tl.load(grad_entropy + row, of_entropy, 0.0)
    local = tl.load(labels + row) - vocab_start
    common = tl.where(p == 0.0, 0.0, p * (g + pull * (d + log_s - t / s)))
    gradient = tl.where(column == local, g, 0.0) - common
    tl.store(out + row * v + column, gradient * scale, column < v)


def logprob_update_triton_(stats, logits, labels, scale, vocab_start):
    """Joins the logits' stats into `stats` by Triton; arguments as those of torch.ops.trialign.logprob_update_."""
    n, v = logits.shape
    if n:
        _update[(n,)](stats, logits, labels, n, v, logits.stride(0), vocab_start, scale, **_CONFIG)


def logprob_stats_triton(logits, labels, scale, vocab_start):
    """stats [4, n] by Triton; arguments as those of torch.ops.trialign.logprob_stats."""
    stats = logits.new_zeros(4, logits.shape[0], dtype=torch.float32)
    stats[0] = -torch.inf
    logprob_update_triton_(stats, logits, labels, scale, vocab_start)
    return stats


def _launch_gradient(out, logits, labels, stats, grad_logprob, grad_entropy, scale, vocab_start):
    n, v = logits.shape
    if logits.numel():
        _gradient[(n, cdiv(v, _CONFIG["BLOCK"]))](
            logits, out, labels, stats,
            stats if grad_logprob is None else grad_logprob, stats if grad_entropy is None else grad_entropy,
            n, v, logits.stride(0), vocab_start, scale, grad_logprob is not None, grad_entropy is not None, **_CONFIG,
        )  # fmt: skip


def logprob_backward_triton(logits, *rest):
    """d logits by Triton; arguments as those of torch.ops.trialign.logprob_backward."""
    out = logits.new_empty(logits.shape)
    _launch_gradient(out, logits, *rest)
    return out


def logprob_backward_triton_(logits, *rest):
    """d logits, in place of the logits, by Triton; arguments as those of torch.ops.trialign.logprob_backward_."""
    _launch_gradient(logits, logits, *rest)


_CONFIG = {"BLOCK": 4096, "num_warps": 8, "num_stages": 3}
_NUMBERS = {**dict.fromkeys(("n", "v", "stride", "vocab_start"), "i32"), "scale": "fp32"}
SPECS = {
    "update": Spec(
        _update, {"stats": "*fp32", "logits": "*bf16", "labels": "*i64"} | _NUMBERS, (_CONFIG,),
        unaligned=("n", "vocab_start"),
    ),
    "gradient": Spec(
        _gradient,
        {"logits": "*bf16", "out": "*bf16", "labels": "*i64", **_NUMBERS, "of_logprob": "u1", "of_entropy": "u1"}
        | dict.fromkeys(("stats", "grad_logprob", "grad_entropy"), "*fp32"),
        (_CONFIG,), unaligned=("n", "vocab_start"),
    ),
}  # fmt: skip


register(
    "logprob_stats",
    lambda logits, labels, scale, vocab_start: logits.new_empty(4, logits.shape[0], dtype=torch.float32),
    triton=logprob_stats_triton,
)
register("logprob_update_", lambda *_: None, triton=logprob_update_triton_)
register("logprob_backward", lambda logits, *_: logits.new_empty(logits.shape), triton=logprob_backward_triton)
register("logprob_backward_", lambda *_: None, triton=logprob_backward_triton_)


def piece_stats(logits: torch.Tensor, labels: torch.Tensor, scale: float, vocab_start: int) -> torch.Tensor:
    """`stats_ref` by the fastest implementation."""
    if choose("logprob_stats", logits) == "reference":
        return stats_ref(logits, labels, scale, vocab_start)
    return torch.ops.trialign.logprob_stats(logits.contiguous(), labels.contiguous(), scale, vocab_start)


def add_piece_(
    stats: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, scale: float, vocab_start: int
) -> torch.Tensor:
    """The stats joined with those of one more piece of the vocabulary; `stats` itself may be overwritten."""
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
        stats = merge_shards(piece_stats(logits, labels, scale, vocab_start), merge)
        ctx.save_for_backward(logits, labels, stats)
        ctx.scale, ctx.vocab_start = scale, vocab_start
        ctx.set_materialize_grads(False)
        return finish(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        logits, labels, stats = ctx.saved_tensors
        grad = piece_gradient(logits, labels, stats, grad_logprob, grad_entropy, ctx.scale, ctx.vocab_start)
        return grad, None, None, None, None


def check_rows(rows: torch.Tensor, labels: torch.Tensor, scale: float) -> None:
    """ValueError where labels are not one a row, or the scale is not positive."""
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if labels.shape != rows.shape[:1]:
        raise ValueError(f"labels {list(labels.shape)} for {rows.shape[0]} rows: must be one a row")


def logprob(
    logits: torch.Tensor, labels: torch.Tensor, scale: float = 1.0, merge: Merge | None = None, vocab_start: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprob [n], entropy [n]), fp32, of the softmax of scale * logits; both differentiable in the logits.

    logits [n, v], labels [n] int64. With `merge`, logits are one shard of the vocabulary that starts at `vocab_start`,
    labels stay global, and the gradient is that of this shard's logits. Without it every label must lie in [0, v).
    ValueError for a scale that is not positive, or labels that are not one a row.
    """
    check_rows(logits, labels, scale)
    return _Logprob.apply(logits, labels, scale, merge, vocab_start)
