"""Data parallelism with sharded masters and optimizer states (ZeRO-1, https://arxiv.org/abs/1910.02054).

Parameters lie back to back in flat buckets. Gradients are accumulated over micro-batches in fp32 and reduce-scattered
over dp x cp, bucket by bucket while the last backward runs; an optimizer updates this rank's shard of the fp32 masters,
and the new weights are all-gathered. Buckets of experts do so over edp: the other DP ranks of an ep group hold other
experts, and the gradients of their tokens have arrived here through the all-to-all.

Gradients exist from an update's first backward until its optimizer step: a rollout, and the update of another model,
have their memory. Their buffers always have the same sizes, so an allocator finds the blocks it had.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..memory import allocating
from ..mesh import Axis, Mesh
from .collectives import all_gather_shards, all_reduce, reduce_scatter, wait
from .shard import Piece, flat_rectangles, shard_of

BUCKET_ELEMENTS = 25_000_000
ALIGNMENT = 64  # elements: every rank's shard begins on a cache line in fp32 and bf16

Named = tuple[str, nn.Parameter]


class Bucket:
    """Parameters of one kind in a flat buffer.

    Attributes:
        weights: [size] in the compute dtype; the parameters are views of it.
        local: this rank's shard of weights and gradients.
        states: fp32, of this rank's shard: "master", and an optimizer's moments.
        counted: whether this rank, of those that hold the same numbers, counts them in norms and saves them.
        decayed: whether weight decay applies: to matrices only.
    """

    def __init__(self, named: list[Named], axis: Axis, device: torch.device, *, counted: bool, decayed: bool):
        self.named, self.axis, self.counted, self.decayed = named, axis, counted, decayed
        used = sum(p.numel() for _, p in named)
        unit = axis.size * ALIGNMENT
        size = max(-(-used // unit), 1) * unit  # at least one unit: a rank's shard of a small vocabulary may be empty
        dtype = named[0][1].dtype
        self.weights = torch.zeros(size, dtype=dtype, device=device)
        self._grads: Tensor | None = None
        self._used = used
        self.starts: list[int] = []
        self.fresh: set[nn.Parameter] = set()  # parameters without a gradient in this step yet
        self.reduction: dist.Work | None = None
        self.gathering: dist.Work | None = None
        self.reduced, self.waiting = False, len(named)  # waiting: gradients to come in the last backward
        start = 0
        for _, p in named:
            view = self.weights[start : start + p.numel()].view(p.shape)
            view.copy_(p.data)
            p.data = view
            self.starts.append(start)
            start += p.numel()
        length = size // axis.size
        self.local = slice(axis.rank * length, (axis.rank + 1) * length)
        weights = self.weights[self.local]
        # Under fp32 compute the weights are their own masters.
        self.states = {"master": weights if dtype == torch.float32 else weights.float()}

    @property
    def grads(self) -> Tensor:
        """[size] fp32, allocated at the first use; this rank's shard holds the sum over the axis once reduced."""
        if self._grads is None:
            with allocating("gradients"):
                self._grads = torch.empty(len(self.weights), dtype=torch.float32, device=self.weights.device)
            self._grads[self._used :].zero_()  # the first gradient of a parameter overwrites the rest
        return self._grads

    @property
    def grad_bytes(self) -> int:
        """Bytes that the gradients hold now."""
        return 0 if self._grads is None else self._grads.nbytes

    def grad_of(self, index: int) -> Tensor:
        """View of the gradient of a parameter."""
        p, start = self.named[index][1], self.starts[index]
        return self.grads[start : start + p.numel()].view(p.shape)

    def zero_grad(self) -> None:
        """Discards the gradients: the next backward overwrites them."""
        self.fresh = {p for _, p in self.named}
        self.waiting, self.reduced, self.reduction = len(self.named), False, None

    def free_grads(self) -> None:
        """Frees the gradients, which `zero_grad` has discarded."""
        assert len(self.fresh) == len(self.named), "gradients of an unfinished step"
        self._grads = None

    def start_reduction(self) -> None:
        """Starts summing the gradients over the axis."""
        for i, (_, p) in enumerate(self.named):
            if p in self.fresh:  # the loss does not depend on it
                self.grad_of(i).zero_()
        self.reduction = reduce_scatter(self.grads[self.local], self.grads, self.axis)
        self.reduced = True

    def round_masters(self) -> None:
        """Sets this rank's shard of the weights from its masters."""
        weights = self.weights[self.local]
        if weights.dtype != torch.float32:
            weights.copy_(self.states["master"])

    def start_gather(self) -> None:
        """Starts filling the weights from the shards of all ranks."""
        self.gathering = all_gather_shards(self.weights, self.weights[self.local], self.axis)

    def rectangles(self) -> Iterator[tuple[str, Piece, slice]]:
        """Contents of this rank's shard: (parameter name, rectangle of a whole tensor, its range in the shard)."""
        for (name, p), start in zip(self.named, self.starts, strict=True):
            for piece in shard_of(p).pieces:
                stop = start + math.prod(piece.shape)
                low, high = max(start, self.local.start), min(stop, self.local.stop)
                if low < high:
                    for offset, shape, at in flat_rectangles(piece.shape, piece.offset, low - start, high - start):
                        begin = start + at - self.local.start
                        yield name, replace(piece, offset=offset, shape=shape), slice(begin, begin + math.prod(shape))
                start = stop


class DataParallel:
    """Buckets of a model's trained parameters, and their gradients.

    Args:
        model: its parameters that require gradients move into the buckets; each must carry a shard description.
        tied: the parameter shared with the other end of the pipeline, whose gradients are summed; or None.

    Attributes:
        keeps_grads: whether the gradients' memory stays allocated between updates. On a CPU, where the page faults of a
            new buffer take several times as long as writing the gradients once.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, tied: nn.Parameter | None = None):
        self.mesh = mesh
        self.tied = tied if tied is not None and tied.requires_grad else None
        self.keeps_grads, self._last_backward = mesh.device.type == "cpu", False
        kinds: dict[tuple[bool, bool, bool, bool], list[list[Named]]] = {}
        # Gradients arrive from the last layer to the first: buckets fill in that order.
        for name, p in reversed([(name, p) for name, p in model.named_parameters() if p.requires_grad]):
            shard = shard_of(p)
            counted = not shard.duplicate and (shard.axis is not None or mesh.tp.rank == 0)
            lists = kinds.setdefault((counted, p.dim() > 1, shard.experts, p is tied), [[]])
            if lists[-1] and sum(q.numel() for _, q in lists[-1]) + p.numel() > BUCKET_ELEMENTS:
                lists.append([])
            lists[-1].append((name, p))
        self.buckets = [
            Bucket(named, mesh.edp if experts else mesh.dp_cp, mesh.device, counted=counted, decayed=decayed)
            for (counted, decayed, experts, _), lists in kinds.items()
            for named in lists
        ]
        self._places = {p: (bucket, i) for bucket in self.buckets for i, (_, p) in enumerate(bucket.named)}
        # Python's collector does not see a parameter's hooks: a hook that held this object would keep both, and the
        # mesh's groups with their threads, until the process ends.
        owner = weakref.ref(self)

        def hook(p: nn.Parameter) -> None:
            if (data := owner()) is not None:
                data._accumulate(p)

        for p in self._places:
            p.register_post_accumulate_grad_hook(hook)
        self.zero_grad()

    def _accumulate(self, p: nn.Parameter) -> None:
        bucket, i = self._places[p]
        assert p.grad is not None and not bucket.reduced, "a backward after the gradients were reduced"
        view = bucket.grad_of(i)
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
        """Discards the gradients, and frees their memory unless it is kept."""
        self._last_backward = False
        for bucket in self.buckets:
            bucket.zero_grad()
            if not self.keeps_grads:
                bucket.free_grads()

    def expect_last_backward(self) -> None:
        """From now on reduces each bucket as soon as all its gradients have arrived."""
        self._last_backward = True

    def finish_reduction(self) -> None:
        """Reduces the remaining buckets and waits for all. Collective over the mesh."""
        if self.tied is not None:
            bucket, i = self._places[self.tied]
            view = bucket.grad_of(i)
            if self.tied in bucket.fresh:  # without a gradient here; the other end may have one
                view.zero_()
                bucket.fresh.discard(self.tied)
            all_reduce(view, self.mesh.embedding)
        for bucket in self.buckets:
            if not bucket.reduced:
                bucket.start_reduction()
        for bucket in self.buckets:
            wait(bucket.reduction, "reduce_scatter", bucket.axis)

    def finish_gather(self) -> None:
        """Waits for the weights of all buckets. Collective over the mesh."""
        for bucket in self.buckets:
            wait(bucket.gathering, "all_gather", bucket.axis)
            bucket.gathering = None

    def gradient_norm(self, poison: Tensor | None = None) -> float:
        """L2 norm of the whole reduced gradient, on ranks outside the mesh too. Collective over the job.

        Args:
            poison: 0-d, added to this rank's part: a NaN makes the norm NaN on every rank.
        """
        squares = torch.zeros(1, dtype=torch.float64, device=self.mesh.device)
        if poison is not None:
            squares += poison
        for bucket in self.buckets:
            if bucket.counted:
                # Line by line: one fp32 sum over a large bucket is off by 1e-3, differently in each layout.
                lines = bucket.grads[bucket.local].view(-1, ALIGNMENT)
                squares += torch.linalg.vector_norm(lines, dim=1).double().square().sum()
        return math.sqrt(all_reduce(squares, self.mesh.world).item())

    def rectangles(self) -> Iterator[tuple[Bucket, str, Piece, slice]]:
        """Every bucket's `rectangles`, each with its bucket."""
        for bucket in self.buckets:
            for name, piece, at in bucket.rectangles():
                yield bucket, name, piece, at

    def not_finite(self, kind: str = "") -> list[str]:
        """Names ("KIND of PARAMETER#PART") of this rank's states with a number that is not finite.

        Args:
            kind: "master", "exp_avg", ... or "grad", the reduced gradient; "" for all states, but not the gradient.
        """
        found = []
        for bucket, name, piece, at in self.rectangles():
            for checked in [kind] if kind else bucket.states:
                state = bucket.grads[bucket.local] if checked == "grad" else bucket.states[checked]
                if not state[at].isfinite().all():
                    found.append(f"{checked} of {name}{'#' * bool(piece.part)}{piece.part}")
        return list(dict.fromkeys(found))
