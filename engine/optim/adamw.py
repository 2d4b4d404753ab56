"""AdamW (https://arxiv.org/abs/1711.05101) on this rank's share of every bucket, with clipping over the mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...kernels.adamw import adamw_
from ..mesh import Mesh
from ..parallel.collectives import all_gather_shards
from ..parallel.data import DataParallel
from ..parallel.shard import Entry, Slot

REFINED_ELEMENTS = 1 << 24  # masters that are read again at once


class _Digits:
    """Takes the digits of numbers beyond those of the weights into the masters that were made of the weights.

    A master that the numbers do not round to stays: its weight has been changed since.
    """

    def __init__(self, master: Tensor, dtype: torch.dtype):
        self.master, self.dtype = master, dtype

    def copy_(self, source: Tensor) -> None:
        numbers = source.to(self.master.device, torch.float32)
        same = numbers.to(self.dtype) == self.master.to(self.dtype)
        self.master.copy_(torch.where(same, numbers, self.master))


class ShardedAdamW:
    """AdamW for one model on one mesh.

    Args:
        model: its parameters that require gradients move into flat buckets; each must carry a shard description.
        tied: the parameter shared with the other end of the pipeline (its gradients are summed), or None.
        weight_decay: applied to matrices only; norm weights and biases are not decayed.
        max_grad_norm: global L2 norm the gradient is clipped to; 0 turns clipping off.
        ema_decay: keeps an exponential moving average of the masters when above 0.
        name: of the model, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        *,
        tied: nn.Parameter | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        ema_decay: float = 0.0,
        name: str = "model",
    ):
        self.data, self.name = DataParallel(model, mesh, tied), name
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.max_grad_norm, self.ema_decay = max_grad_norm, ema_decay
        self.steps = 0
        self.buckets = self.data.buckets
        for bucket in self.buckets:
            master = bucket.states["master"]
            bucket.states |= {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
            if ema_decay > 0:
                bucket.states["ema"] = master.clone()

    def zero_grad(self) -> None:
        """Forgets the gradients: the next backward of each parameter overwrites its own."""
        self.data.zero_grad()

    def expect_last_backward(self) -> None:
        """From now on a bucket is reduced over its DP ranks as soon as all its gradients have arrived."""
        self.data.expect_last_backward()

    def step(self, lr: float, poison: Tensor | None = None) -> float:
        """Reduces what is not reduced yet, clips, updates and gathers the weights. Collective over the job.

        Args:
            poison: 0-d; NaN where this rank has met what is not finite: no rank makes the step then.

        Returns:
            the L2 norm of the whole gradient before clipping, on ranks outside the mesh too.

        Raises:
            FloatingPointError: on every rank: the norm is not finite, or a rank's poison. Weights and optimizer state
                are as before; `zero_grad` forgets the gradients.
        """
        self.data.finish_reduction()
        norm = self.data.gradient_norm(poison)
        if not math.isfinite(norm):
            culprit = "the gradient norm" if poison is None else "the loss or the gradient norm"
            raise FloatingPointError(f"{self.name}: {culprit} of optimizer step {self.steps + 1} is {norm}")
        scale = min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm > 0 else 1.0
        self.steps += 1
        for bucket in self.buckets:
            state, mine = bucket.states, bucket.weights[bucket.local]
            adamw_(
                state["master"],
                state["exp_avg"],
                state["exp_avg_sq"],
                bucket.grads[bucket.local],
                None if mine.dtype == torch.float32 else mine,
                lr,
                *self.betas,
                self.eps,
                self.weight_decay if bucket.decayed else 0.0,
                self.steps,
                scale,
            )
            if "ema" in state:
                state["ema"].lerp_(state["master"], 1 - self.ema_decay)
            all_gather_shards(bucket.weights, mine, bucket.axis)
        self.zero_grad()
        return norm

    def entries(self, role: str, hf_name: Callable[[str, str], str]) -> Iterator[Entry]:
        """This rank's share of masters and moments as rectangles of whole tensors, named `role/kind/hf name`.

        Args:
            hf_name: (parameter name, part) -> the whole tensor's name.
        """
        for bucket, name, piece, place in self.data.rectangles():
            whole = hf_name(name, piece.part)
            for kind, state in bucket.states.items():
                view = state[place].view(piece.shape)
                yield Entry(f"{role}/{kind}/{whole}", piece.global_shape, piece.offset, view, bucket.counted)

    def refine_masters(self, fill: Callable[[Sequence[Slot]], None]) -> None:
        """Gives masters the digits of what narrower weights were rounded from; averages begin from them.

        Args:
            fill: copies numbers into slots as it did into the model's, in whatever dtype it has them. A slot holds at
                most REFINED_ELEMENTS numbers, or one row.
        """
        slots = []
        for bucket, name, piece, place in self.data.rectangles():
            if bucket.weights.dtype == torch.float32:  # the weights are the masters
                continue
            master = bucket.states["master"][place].view(piece.shape)
            step = max(1, REFINED_ELEMENTS // math.prod(piece.shape[1:]))
            for begin in range(0, piece.shape[0], step):
                rows = master[begin : begin + step]
                offset = (piece.offset[0] + begin, *piece.offset[1:])
                part = replace(piece, offset=offset, shape=tuple(rows.shape))
                slots.append(Slot(name, part, _Digits(rows, bucket.weights.dtype)))
        fill(slots)
        for bucket in self.buckets:
            if "ema" in bucket.states:
                bucket.states["ema"].copy_(bucket.states["master"])

    def not_finite(self, kind: str = "") -> list[str]:
        """Names (kind, parameter and part) of this rank's states that are not all finite.

        Args:
            kind: of the states: "master", "exp_avg", ... or "grad", the reduced gradient; "": all but that.
        """
        return self.data.not_finite(kind)

    def restore(self, steps: int) -> None:
        """After a checkpoint filled the entries: takes over the step count and makes the weights from the masters."""
        self.steps = steps
        for bucket in self.buckets:
            bucket.gather_weights()
