"""Data parallelism: parameters in flat buckets, of which every rank of dp x cp holds a share of masters and optimizer
states (ZeRO-1, https://arxiv.org/abs/1910.02054).

Each bucket holds whole parameters back to back. Gradients are summed over micro-batches in fp32 and reduce-scattered
bucket by bucket while the last backward still runs; an optimizer updates this rank's share of the fp32 masters, and the
new weights are gathered back. One rank is the same code with shares that are everything. Experts' buckets do all this
over edp: the other DP ranks of their ep group hold other experts, and have sent their tokens' gradients here already.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..mesh import Axis, Mesh
from .collectives import all_gather_shards, all_reduce, reduce_scatter, wait
from .shard import Piece, flat_rectangles, shard_of

BUCKET_ELEMENTS = 25_000_000
ALIGNMENT = 64  # elements: every rank's share begins on a cache line in fp32 and bf16

Named = tuple[str, nn.Parameter]


class Bucket:
    """Parameters of one kind, flat.

    Attributes:
        weights: [size] in the compute dtype; the parameters are views of it.
        grads: [size] fp32; this rank's share holds the sum over the axis once reduced.
        mine: this rank's share of both.
        states: fp32, of this rank's share: "master", and what an optimizer keeps beside.
        counted: whether this rank is the one that counts its share in norms, and saves it.
        decayed: whether the parameters are matrices, to which weight decay applies.
    """

    def __init__(self, named: list[Named], axis: Axis, device: torch.device, *, counted: bool, decayed: bool):
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
        self.local = slice(axis.rank * share, (axis.rank + 1) * share)
        mine = self.weights[self.local]
        # Under fp32 compute the weights are their own masters.
        self.states = {"master": mine if dtype == torch.float32 else mine.float()}

    def grad_views(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every parameter with the place of its gradient."""
        for (_, p), start in zip(self.named, self.starts, strict=True):
            yield p, self.grads[start : start + p.numel()].view(p.shape)

    def zero_grad(self) -> None:
        """Forgets the gradients: the next backward of each parameter overwrites its own."""
        self.fresh = {p for _, p in self.named}
        self.waiting, self.reduced, self.reduction = len(self.named), False, None

    def start_reduction(self) -> None:
        """Starts summing the gradients over the axis."""
        for p, view in self.grad_views():
            if p in self.fresh:  # the loss did not reach it
                view.zero_()
        self.reduction = reduce_scatter(self.grads[self.local], self.grads, self.axis)
        self.reduced = True

    def gather_weights(self) -> None:
        """Weights of all ranks from their masters' shares."""
        mine = self.weights[self.local]
        if mine.dtype != torch.float32:
            mine.copy_(self.states["master"])
        all_gather_shards(self.weights, mine, self.axis)

    def rectangles(self) -> Iterator[tuple[str, Piece, slice]]:
        """This rank's share of every state: (parameter's name, rectangle of a whole tensor, its place in the share)."""
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
    """The trained parameters of one model on one mesh, in buckets, and their gradients.

    Args:
        model: its parameters that require gradients move into the buckets; each must carry a shard description.
        tied: the parameter shared with the other end of the pipeline (its gradients are summed), or None.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, tied: nn.Parameter | None = None):
        self.mesh = mesh
        self.tied = tied if tied is not None and tied.requires_grad else None
        self._last_backward = False
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
        self._places = {p: (bucket, view) for bucket in self.buckets for p, view in bucket.grad_views()}
        # A parameter holds its hook where Python's collector does not look: a hook that held this object would keep
        # both, and the mesh's groups with their threads, until the process ends.
        owner = weakref.ref(self)

        def hook(p: nn.Parameter) -> None:
            if (data := owner()) is not None:
                data._accumulate(p)

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
        """Forgets the gradients."""
        self._last_backward = False
        for bucket in self.buckets:
            bucket.zero_grad()

    def expect_last_backward(self) -> None:
        """From now on a bucket is reduced as soon as all its gradients have arrived."""
        self._last_backward = True

    def finish_reduction(self) -> None:
        """Reduces what is not reduced yet, and waits until all is. Collective over the mesh."""
        if self.tied is not None:
            view = next(view for b in self.buckets for p, view in b.grad_views() if p is self.tied)
            all_reduce(view, self.mesh.embedding)
        for bucket in self.buckets:
            if not bucket.reduced:
                bucket.start_reduction()
        for bucket in self.buckets:
            if bucket.reduction is not None:
                wait(bucket.reduction, bucket.axis)

    def gradient_norm(self, poison: Tensor | None = None) -> float:
        """L2 norm of the whole reduced gradient. Collective over the job: ranks outside the mesh get it too.

        Args:
            poison: 0-d, added to this rank's part: NaN makes the norm NaN on every rank.
        """
        squares = torch.zeros(1, dtype=torch.float64, device=self.mesh.device)
        if poison is not None:
            squares += poison
        for bucket in self.buckets:
            if bucket.counted:
                # Line by line: a sum over all of a large bucket in fp32 is off by 1e-3, otherwise in each layout.
                lines = bucket.grads[bucket.local].view(-1, ALIGNMENT)
                squares += torch.linalg.vector_norm(lines, dim=1).double().square().sum()
        return math.sqrt(all_reduce(squares, self.mesh.world).item())

    def rectangles(self) -> Iterator[tuple[Bucket, str, Piece, slice]]:
        """Every bucket's `rectangles`, each with its bucket."""
        for bucket in self.buckets:
            for name, piece, place in bucket.rectangles():
                yield bucket, name, piece, place

    def not_finite(self, kind: str = "") -> list[str]:
        """Names (kind, parameter and part) of this rank's states that are not all finite.

        Args:
            kind: of the states: "master", "exp_avg", ... or "grad", the reduced gradient; "": all but that.
        """
        found = []
        for bucket, name, piece, place in self.rectangles():
            states = bucket.states | {"grad": bucket.grads[bucket.local]}
            for own in [kind] if kind else bucket.states:
                if not states[own][place].isfinite().all():
                    found.append(f"{own} of {name}{'#' * bool(piece.part)}{piece.part}")
        return list(dict.fromkeys(found))
