"""AdamW over flat buckets, sharded over the data axis (ZeRO-1, https://arxiv.org/abs/1910.02054).

Each bucket holds whole parameters back to back. Gradients are summed over micro-batches in fp32, reduce-scattered
bucket by bucket while the last backward still runs, clipped by the norm over the whole mesh, applied to this rank's
share of the fp32 masters, and the new weights are gathered back. One DP rank is the
same code with shares that are everything. Experts' buckets do all this over edp: the other DP ranks of their ep group
hold other experts, and have sent their tokens' gradients here already.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...kernels.adamw import adamw_
from ..mesh import Axis, Mesh
from ..parallel.collectives import all_gather_shards, all_reduce, reduce_scatter, wait
from ..parallel.shard import Piece, Slot, shard_of
from ..storage.checkpoint import Entry, flat_rectangles

BUCKET_ELEMENTS = 25_000_000
REFINED_ELEMENTS = 1 << 24  # masters that are read again at once
ALIGNMENT = 64  # elements: every rank's share begins on a cache line in fp32 and bf16


class _Bucket:
    """Some parameters of one kind, flat: weights in the compute dtype, gradients and this rank's share in fp32."""

    def __init__(
        self,
        named: list[tuple[str, nn.Parameter]],
        axis: Axis,
        device: torch.device,
        *,
        counted: bool,
        decayed: bool,
        ema: bool,
    ):
        self.named, self.axis, self.counted, self.decayed = named, axis, counted, decayed
        used = sum(p.numel() for _, p in named)
        unit = axis.size * ALIGNMENT
        size = max(-(-used // unit), 1) * unit  # never empty, as a rank's share of a small vocabulary may be
        dtype = named[0][1].dtype
        self.weights = torch.zeros(size, dtype=dtype, device=device)
        self.grads = torch.zeros(size, dtype=torch.float32, device=device)
        self.starts: list[int] = []
        self.fresh: set[nn.Parameter] = set()  # parameters whose gradient of this step has not arrived yet
        self.reduction: dist.Work | None = None
        self.reduced, self.waiting = False, len(named)  # waiting: gradients still to come in the last backward
        start = 0
        for _, p in named:
            view = self.weights[start : start + p.numel()].view(p.shape)
            view.copy_(p.data)
            p.data = view
            self.starts.append(start)
            start += p.numel()
        share = size // axis.size
        self.mine = slice(axis.rank * share, (axis.rank + 1) * share)
        mine = self.weights[self.mine]
        # Under fp32 compute the weights are their own masters.
        self.states = {"master": mine if dtype == torch.float32 else mine.float()}
        self.states |= {"exp_avg": torch.zeros_like(self.states["master"])}
        self.states |= {"exp_avg_sq": torch.zeros_like(self.states["master"])}
        if ema:
            self.states["ema"] = self.states["master"].clone()

    def grad_views(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for (_, p), start in zip(self.named, self.starts, strict=True):
            yield p, self.grads[start : start + p.numel()].view(p.shape)

    def start_reduction(self) -> None:
        for p, view in self.grad_views():
            if p in self.fresh:  # the loss did not reach it
                view.zero_()
        self.reduction = reduce_scatter(self.grads[self.mine], self.grads, self.axis)
        self.reduced = True

    def gather_weights(self) -> None:
        """Weights of all DP ranks from their masters' shares."""
        mine = self.weights[self.mine]
        if mine.dtype != torch.float32:
            mine.copy_(self.states["master"])
        all_gather_shards(self.weights, mine, self.axis)


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
    """AdamW (https://arxiv.org/abs/1711.05101) with clipping over the mesh, for one model on one mesh.

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
        self.mesh, self.name = mesh, name
        self.tied = tied if tied is not None and tied.requires_grad else None
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.max_grad_norm, self.ema_decay = max_grad_norm, ema_decay
        self.steps = 0
        self._last_backward = False
        kinds: dict[tuple[bool, bool, bool, bool], list[list[tuple[str, nn.Parameter]]]] = {}
        # Gradients arrive from the last layer to the first: buckets fill in that order.
        for name, p in reversed([(name, p) for name, p in model.named_parameters() if p.requires_grad]):
            shard = shard_of(p)
            counted = not shard.duplicate and (shard.axis is not None or mesh.tp.rank == 0)
            buckets = kinds.setdefault((counted, p.dim() > 1, shard.experts, p is tied), [[]])
            if buckets[-1] and sum(q.numel() for _, q in buckets[-1]) + p.numel() > BUCKET_ELEMENTS:
                buckets.append([])
            buckets[-1].append((name, p))
        self.buckets = [
            _Bucket(
                named,
                mesh.edp if experts else mesh.dp_cp,
                mesh.device,
                counted=counted,
                decayed=decayed,
                ema=ema_decay > 0,
            )
            for (counted, decayed, experts, _), lists in kinds.items()
            for named in lists
        ]
        self._places = {p: (bucket, view) for bucket in self.buckets for p, view in bucket.grad_views()}
        # A parameter holds its hook where Python's collector does not look: a hook that held the optimizer would keep
        # both, and the mesh's groups with their threads, until the process ends.
        owner = weakref.ref(self)

        def hook(p: nn.Parameter) -> None:
            if (optimizer := owner()) is not None:
                optimizer._accumulate(p)

        for p in self._places:
            p.register_post_accumulate_grad_hook(hook)
        self.zero_grad()

    def _accumulate(self, p: nn.Parameter) -> None:
        bucket, view = self._places[p]
        assert p.grad is not None and not bucket.reduced, "a backward after the gradients were reduced"
        if p in bucket.fresh:
            view.copy_(p.grad)
            bucket.fresh.discard(p)
        else:
            view.add_(p.grad)
        p.grad = None
        if self._last_backward:
            bucket.waiting -= 1
            if not bucket.waiting and all(q is not self.tied for _, q in bucket.named):
                bucket.start_reduction()

    def zero_grad(self) -> None:
        """Forgets the gradients: the next backward of each parameter overwrites its own."""
        self._last_backward = False
        for bucket in self.buckets:
            bucket.fresh = {p for _, p in bucket.named}
            bucket.waiting, bucket.reduced, bucket.reduction = len(bucket.named), False, None

    def expect_last_backward(self) -> None:
        """From now on a bucket is reduced over its DP ranks as soon as all its gradients have arrived."""
        self._last_backward = True

    def _finish_reduction(self) -> None:
        if self.tied is not None:
            view = next(view for b in self.buckets for p, view in b.grad_views() if p is self.tied)
            all_reduce(view, self.mesh.embedding)
        for bucket in self.buckets:
            if not bucket.reduced:
                bucket.start_reduction()
        for bucket in self.buckets:
            if bucket.reduction is not None:
                wait(bucket.reduction, bucket.axis)

    def step(self, lr: float, poison: Tensor | None = None) -> float:
        """Reduces what is not reduced yet, clips, updates and gathers the weights. Collective over the mesh.

        Args:
            poison: 0-d; NaN where this rank has met what is not finite: no rank makes the step then.

        Returns:
            the L2 norm of the whole gradient before clipping.

        Raises:
            FloatingPointError: on every rank: the norm is not finite, or a rank's poison. Weights and optimizer state
                are as before; `zero_grad` forgets the gradients.
        """
        self._finish_reduction()
        squares = torch.zeros(1, dtype=torch.float64, device=self.mesh.device)
        if poison is not None:
            squares += poison
        for bucket in self.buckets:
            if bucket.counted:
                # Line by line: a sum over all of a large bucket in fp32 is off by 1e-3, otherwise in each layout.
                lines = bucket.grads[bucket.mine].view(-1, ALIGNMENT)
                squares += torch.linalg.vector_norm(lines, dim=1).double().square().sum()
        norm = math.sqrt(all_reduce(squares, self.mesh.world).item())
        if not math.isfinite(norm):
            what = "the gradient norm" if poison is None else "the loss or the gradient norm"
            raise FloatingPointError(f"{self.name}: {what} of optimizer step {self.steps + 1} is {norm}")
        scale = min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm > 0 else 1.0
        self.steps += 1
        for bucket in self.buckets:
            state, mine = bucket.states, bucket.weights[bucket.mine]
            adamw_(
                state["master"],
                state["exp_avg"],
                state["exp_avg_sq"],
                bucket.grads[bucket.mine],
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
        for bucket, name, piece, share in self._rectangles():
            whole = hf_name(name, piece.part)
            for kind, state in bucket.states.items():
                view = state[share].view(piece.shape)
                yield Entry(f"{role}/{kind}/{whole}", piece.global_shape, piece.offset, view, bucket.counted)

    def refine(self, fill: Callable[[Sequence[Slot]], None]) -> None:
        """Gives masters the digits of what narrower weights were rounded from; averages begin from them.

        Args:
            fill: copies numbers into slots as it did into the model's, in whatever dtype it has them. A slot holds at
                most REFINED_ELEMENTS numbers, or one row.
        """
        slots = []
        for bucket, name, piece, share in self._rectangles():
            if bucket.weights.dtype == torch.float32:  # the weights are the masters
                continue
            master = bucket.states["master"][share].view(piece.shape)
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
        found = []
        for bucket, name, piece, share in self._rectangles():
            states = {"grad": bucket.grads[bucket.mine]} if kind == "grad" else bucket.states
            for own in states if not kind else [kind]:
                if not states[own][share].isfinite().all():
                    found.append(f"{own} of {name}{'#' * bool(piece.part)}{piece.part}")
        return list(dict.fromkeys(found))

    def _rectangles(self) -> Iterator[tuple[_Bucket, str, Piece, slice]]:
        """This rank's share of every state: (bucket, parameter's name, rectangle, its place in the share)."""
        for bucket in self.buckets:
            for (name, p), start in zip(bucket.named, bucket.starts, strict=True):
                for piece in shard_of(p).pieces:
                    stop = start + math.prod(piece.shape)
                    low, high = max(start, bucket.mine.start), min(stop, bucket.mine.stop)
                    if low < high:
                        for offset, shape, at in flat_rectangles(piece.shape, piece.offset, low - start, high - start):
                            begin = start + at - bucket.mine.start
                            rectangle = replace(piece, offset=offset, shape=shape)
                            yield bucket, name, rectangle, slice(begin, begin + math.prod(shape))
                    start = stop

    def loaded(self, steps: int) -> None:
        """After a checkpoint filled the entries: takes over the step count and makes the weights from the masters."""
        self.steps = steps
        for bucket in self.buckets:
            bucket.gather_weights()
