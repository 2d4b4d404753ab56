"""Sums over the samples of a packed batch, and the token weights that aggregate per-token losses.

A loss is always sum_t w_t l_t. The weights depend only on the mask of the whole batch, so they are known before the
first micro-batch and the loss does not change with micro-batches, packing or layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Aggregation = Literal["token-mean", "token-sum", "sample-mean", "sample-sum", "constant", "sum-of-sample-means"]


class _Sums(torch.autograd.Function):
    """x [total] -> [samples]: the sum over x[offsets[i]:offsets[i + 1]], in one order on every device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, sample: Tensor) -> Tensor:
        ctx.save_for_backward(sample)
        return _segment_sums(x, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (sample,) = ctx.saved_tensors
        return grads[0][sample], None, None


class _Broadcast(torch.autograd.Function):
    """x [samples] -> [total]: x[sample], whose gradient is summed in one order on every device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, sample: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        return x[sample]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (offsets,) = ctx.saved_tensors
        return _segment_sums(grads[0], offsets), None, None


def _segment_sums(x: Tensor, offsets: Tensor) -> Tensor:
    """On the CPU from the first token to the last; on CUDA by cub::DeviceSegmentedReduce, which gives the same bits on
    every run. `index_add` and `scatter_add` would add there in the order in which their atomics arrive."""
    return torch.segment_reduce(x.contiguous(), "sum", offsets=offsets, unsafe=True)  # its checks wait for the device


@dataclass(frozen=True)
class Segments:
    """The counted tokens of a packed batch, and the sample of each token."""

    mask: Tensor  # [total] bool
    offsets: Tensor  # [samples + 1] int64, from 0 to total: sample i is tokens offsets[i]:offsets[i + 1]

    @classmethod
    def of_lengths(cls, lengths: Tensor, mask: Tensor) -> Segments:
        """Samples of these lengths [samples] end to end; mask [total]."""
        return cls(mask.bool(), F.pad(lengths.cumsum(0), (1, 0)).to(mask.device))

    @property
    def count(self) -> int:
        """Samples, including those without a counted token."""
        return len(self.offsets) - 1

    @cached_property
    def sample(self) -> Tensor:
        """[total] int64, ascending: the sample a token belongs to."""
        return torch.bucketize(torch.arange(len(self.mask), device=self.mask.device), self.offsets[1:], right=True)

    @cached_property
    def sizes(self) -> Tensor:
        """[samples] int64: counted tokens of each sample."""
        return F.pad(self.mask.cumsum(0), (1, 0))[self.offsets].diff()

    @property
    def filled(self) -> int:
        """Samples with a counted token; at least 1, since sums are divided by it."""
        return max(1, int((self.sizes > 0).sum()))

    def sums(self, x: Tensor) -> Tensor:
        """[total] -> [samples]: the sum over each sample's counted tokens. Differentiable."""
        return _Sums.apply(torch.where(self.mask, x, 0), self.offsets, self.sample)

    def means(self, x: Tensor) -> Tensor:
        """[total] -> [samples]: the mean over each sample's counted tokens, 0 where there are none. Differentiable."""
        return self.sums(x) / self.sizes.clamp(min=1)

    def broadcast(self, per_sample: Tensor) -> Tensor:
        """[samples] -> [total]: each sample's number on all its tokens. Differentiable."""
        return _Broadcast.apply(per_sample, self.offsets, self.sample)

    def last(self) -> Tensor:
        """[samples] int64: place of each sample's last counted token, -1 where there is none."""
        place = torch.arange(len(self.mask), device=self.mask.device)
        before = F.pad(torch.where(self.mask, place, -1).cummax(0).values, (1, 0), value=-1)[self.offsets[1:]]
        return torch.where(before >= self.offsets[:-1], before, -1)


def token_weights(
    segments: Segments,
    how: Aggregation,
    *,
    constant: float = 1.0,
    dtype: torch.dtype = torch.float32,
    mean_eps: float = 0.0,
) -> Tensor:
    """w_t [total], 0 outside the mask, of the loss sum_t w_t l_t.

    With N counted tokens, S samples that have some, n_s counted tokens of sample s:
    token-mean 1/N; token-sum 1; sample-mean 1/(S n_s), a mean over samples of token means; sample-sum 1/S; constant
    1/(count * `constant`), Dr. GRPO's fixed length (https://arxiv.org/abs/2503.20783); sum-of-sample-means 1/n_s.

    Args:
        constant: length of a sample under "constant".
        mean_eps: added to n_s in the token means, as some trainers do.
    """
    sizes = segments.sizes.to(dtype)  # [samples]
    filled = (sizes > 0).sum().clamp(min=1).to(sizes)
    per_token = 1 / segments.broadcast(sizes + mean_eps).clamp(min=1e-30)
    weights = {
        "token-mean": lambda: torch.ones_like(per_token) / sizes.sum().clamp(min=1),
        "token-sum": lambda: torch.ones_like(per_token),
        "sample-mean": lambda: per_token / filled,
        "sample-sum": lambda: torch.ones_like(per_token) / filled,
        "constant": lambda: torch.full_like(per_token, 1 / (segments.count * constant)),
        "sum-of-sample-means": lambda: per_token,
    }
    return torch.where(segments.mask, weights[how](), 0)
