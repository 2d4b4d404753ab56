"""Sums over the samples of a packed batch, and the token weights that aggregate per-token losses.

A loss is always sum_t w_t l_t. The weights depend only on the mask of the whole batch, so they are known before the
first micro-batch and the loss does not change with micro-batches, packing or layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token-mean", "token-sum", "sample-mean", "sample-sum", "constant", "sum-of-sample-means"]


@dataclass(frozen=True)
class Segments:
    """The counted tokens of a packed batch, and the sample of each token."""

    mask: Tensor  # [total] bool
    sample: Tensor  # [total] int64, ascending: the sample a token belongs to
    count: int  # samples, including those without a counted token

    @classmethod
    def of_lengths(cls, lengths: Tensor, mask: Tensor) -> Segments:
        """Samples of these lengths [samples] end to end; mask [total]."""
        sample = torch.arange(len(lengths), device=mask.device).repeat_interleave(lengths.to(mask.device))
        return cls(mask.bool(), sample, len(lengths))

    @property
    def sizes(self) -> Tensor:
        """[samples] int64: counted tokens of each sample."""
        return torch.zeros(self.count, dtype=torch.int64, device=self.mask.device).index_add_(
            0, self.sample, self.mask.long()
        )

    @property
    def filled(self) -> int:
        """Samples with a counted token; at least 1, since sums are divided by it."""
        return max(1, int((self.sizes > 0).sum()))

    def sums(self, x: Tensor) -> Tensor:
        """[total] -> [samples]: the sum over each sample's counted tokens. Differentiable."""
        return x.new_zeros(self.count).index_add(0, self.sample, torch.where(self.mask, x, 0))

    def means(self, x: Tensor) -> Tensor:
        """[total] -> [samples]: the mean over each sample's counted tokens, 0 where there are none. Differentiable."""
        return self.sums(x) / self.sizes.clamp(min=1)

    def broadcast(self, per_sample: Tensor) -> Tensor:
        """[samples] -> [total]: each sample's number on all its tokens. Differentiable."""
        return per_sample[self.sample]

    def last(self) -> Tensor:
        """[samples] int64: place of each sample's last counted token, -1 where there is none."""
        place = torch.arange(len(self.mask), device=self.mask.device)
        none = torch.full((self.count,), -1, device=self.mask.device)
        return none.scatter_reduce(0, self.sample, torch.where(self.mask, place, -1), "amax")


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
