"""AdamW (https://arxiv.org/abs/1711.05101) on this rank's shard of every bucket, with clipping over the mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...kernels.adamw import adamw_
from ..memory import Holder, allocating
from ..mesh import Mesh
from ..parallel.data import DataParallel
from ..parallel.shard import Entry, Slot

REFINED_ELEMENTS = 1 << 24  # masters that `refine_masters` reads at once


class _MasterSink:
    """Copies numbers into masters in full precision, except where a master's weight is no longer the rounded number
    (it was changed after it was read)."""

    def __init__(self, master: Tensor, dtype: torch.dtype):
        self.master, self.dtype = master, dtype

    def copy_(self, source: Tensor) -> None:
        numbers = source.to(self.master.device, torch.float32)
        same = numbers.to(self.dtype) == self.master.to(self.dtype)
        self.master.copy_(torch.where(same, numbers, self.master))


class ShardedAdamW:
    """AdamW for one model on one mesh.

    Args:
        model, tied: see DataParallel.
        weight_decay: of matrices only, not of norm weights and biases.
        max_grad_norm: global L2 norm that the gradient is clipped to; 0 turns clipping off.
        ema_decay: of an exponential moving average of the masters; 0 for none.
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
            with allocating("optimizer"):
                bucket.states |= {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
                if ema_decay > 0:
                    bucket.states["ema"] = master.clone()

    def zero_grad(self) -> None:
        """Discards the gradients: the next backward overwrites them."""
        self.data.zero_grad()

    def step(self, lr: float, poison: Tensor | None = None) -> float:
        """Reduces and clips the gradients, updates the masters and gathers the weights. Collective over the job.

        Args:
            poison: 0-d; NaN where this rank has met a number that is not finite, so that no rank steps.

        Returns:
            The L2 norm of the whole gradient before clipping, on ranks outside the mesh too.

        Raises:
            FloatingPointError: on every rank, where the norm or a rank's poison is not finite. Weights and optimizer
                states are unchanged; call `zero_grad` to go on.
        """
        self.data.finish_reduction()
        norm = self.data.gradient_norm(poison)
        if not math.isfinite(norm):
            cause = "the gradient norm" if poison is None else "the loss or the gradient norm"
            raise FloatingPointError(f"{self.name}: {cause} of optimizer step {self.steps + 1} is {norm}")
        scale = min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm > 0 else 1.0
        self.steps += 1
        for bucket in self.buckets:
            state, weights = bucket.states, bucket.weights[bucket.local]
            adamw_(
                state["master"],
                state["exp_avg"],
                state["exp_avg_sq"],
                bucket.grads[bucket.local],
                None if weights.dtype == torch.float32 else weights,
                lr,
                *self.betas,
                self.eps,
                self.weight_decay if bucket.decayed else 0.0,
                self.steps,
                scale,
            )
            if "ema" in state:
                state["ema"].lerp_(state["master"], 1 - self.ema_decay)
            bucket.start_gather()  # meanwhile the next bucket's masters are updated
        self.data.finish_gather()
        self.zero_grad()
        return norm

    def memory(self) -> dict[Holder, list[Tensor]]:
        """Tensors by what they hold, for the report of a failed allocation."""
        states = [state for bucket in self.buckets for state in bucket.states.values()]
        return {
            "parameters": [bucket.weights for bucket in self.buckets],
            "gradients": [bucket.grads for bucket in self.buckets if bucket.grad_bytes],
            "optimizer": states,
        }

    def entries(self, role: str, hf_name: Callable[[str, str], str]) -> Iterator[Entry]:
        """This rank's masters and moments as rectangles of whole tensors, named `role/kind/hf name`.

        Args:
            hf_name: (parameter name, part) -> the whole tensor's name.
        """
        for bucket, name, piece, at in self.data.rectangles():
            whole = hf_name(name, piece.part)
            for kind, state in bucket.states.items():
                view = state[at].view(piece.shape)
                yield Entry(f"{role}/{kind}/{whole}", piece.global_shape, piece.offset, view, bucket.counted)

    def refine_masters(self, fill: Callable[[Sequence[Slot]], None]) -> None:
        """Reads the masters of rounded weights again in full precision; moving averages start from them.

        Args:
            fill: copies the model's numbers into slots, in the dtype of their source. A slot holds at most
                REFINED_ELEMENTS numbers, or one row.
        """
        slots = []
        for bucket, name, piece, at in self.data.rectangles():
            if bucket.weights.dtype == torch.float32:  # the weights are the masters
                continue
            master = bucket.states["master"][at].view(piece.shape)
            step = max(1, REFINED_ELEMENTS // math.prod(piece.shape[1:]))
            for begin in range(0, piece.shape[0], step):
                rows = master[begin : begin + step]
                offset = (piece.offset[0] + begin, *piece.offset[1:])
                part = replace(piece, offset=offset, shape=tuple(rows.shape))
                slots.append(Slot(name, part, _MasterSink(rows, bucket.weights.dtype)))
        fill(slots)
        for bucket in self.buckets:
            if "ema" in bucket.states:
                bucket.states["ema"].copy_(bucket.states["master"])

    def restore(self, steps: int) -> None:
        """Sets the step count and rebuilds the weights, after a checkpoint has filled the entries."""
        self.steps = steps
        for bucket in self.buckets:
            bucket.round_masters()
            bucket.start_gather()
        self.data.finish_gather()
