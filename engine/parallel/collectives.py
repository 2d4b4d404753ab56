"""Collectives over one axis of the mesh, and the conjugate pairs that tensor parallelism is made of.

Every function returns its input where the axis has size 1, so callers never ask. Whatever waits for other ranks does so
within `HEARTBEAT.waiting`, for the watchdog. The pairs f and g follow Megatron-LM
(https://arxiv.org/abs/1909.08053, section 3): f copies forward and all-reduces backward, g the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..heartbeat import HEARTBEAT
from ..mesh import Axis, Mesh

T = TypeVar("T")
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# torch 2.13 renamed both; the old names warn.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(tensor: Tensor, axis: Axis, op: Literal["sum", "max", "min"] = "sum") -> Tensor:
    """Reduces in place over the axis and returns the same tensor."""
    if axis.size > 1:
        with HEARTBEAT.waiting(f"all_reduce over {axis.name}"):
            dist.all_reduce(tensor, _OPS[op], group=axis.group)
    return tensor


def all_gather(tensor: Tensor, axis: Axis, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    """Concatenates every rank's tensor (one dim at least) along `dim`, in axis order.

    Args:
        sizes: of all ranks' tensors along `dim`, where they are not of one shape.
    """
    if axis.size == 1:
        return tensor
    sizes = [tensor.shape[dim]] * axis.size if sizes is None else sizes
    if tensor.shape[dim] < max(sizes):  # what travels is of one shape
        shape = list(tensor.shape)
        shape[dim] = max(sizes)
        padded = tensor.new_zeros(shape)
        padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        tensor = padded
    gathered = tensor.new_empty((axis.size, *tensor.shape))
    with HEARTBEAT.waiting(f"all_gather over {axis.name}"):
        _all_gather_single(gathered.flatten(0, 1), tensor.contiguous(), group=axis.group)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(gathered, sizes, strict=True)], dim)


def all_gather_shards(whole: Tensor, shard: Tensor, axis: Axis) -> None:
    """Fills the flat `whole` [size * n] from every rank's `shard` [n], which may be a view of it."""
    if axis.size > 1:
        # gloo copies the input after it has begun to write the output: an aliased shard must be a copy there.
        source = shard.clone() if shard.device.type == "cpu" else shard
        with HEARTBEAT.waiting(f"all_gather over {axis.name}"):
            _all_gather_single(whole, source, group=axis.group)


def reduce_scatter(shard: Tensor, whole: Tensor, axis: Axis) -> dist.Work | None:
    """Starts summing the flat `whole` [size * n] over the axis into this rank's `shard` [n]; `wait` on the result.

    Returns None where there is nothing to wait for: with one rank `shard` is a view of `whole`.
    """
    if axis.size == 1:
        assert shard.data_ptr() == whole.data_ptr()
        return None
    return _reduce_scatter_single(shard, whole, group=axis.group, async_op=True)


def broadcast(tensor: Tensor, axis: Axis, src: int = 0) -> Tensor:
    """Overwrites `tensor` with that of the rank at place `src` of the axis and returns it."""
    if axis.size > 1:
        with HEARTBEAT.waiting(f"broadcast over {axis.name}"):
            dist.broadcast(tensor, axis.ranks[src], group=axis.group)
    return tensor


def gather_objects(value: Any, axis: Axis) -> list[Any]:
    """Every rank's picklable value, in axis order, on every rank."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    with HEARTBEAT.waiting(f"all_gather of objects over {axis.name}"):
        dist.all_gather_object(values, value, group=axis.group)
    return values


def from_mesh(tensor: Tensor, mesh: Mesh) -> Tensor:
    """Gives a tensor that all ranks of a mesh hold to ranks outside it, in place, and returns it.

    Collective over the job, except where the mesh has all of its ranks and there is nothing to do.
    """
    return tensor if len(mesh.ranks) == mesh.world.size else broadcast(tensor, mesh.world, mesh.ranks[0])


def object_from_mesh(value: Any, mesh: Mesh) -> Any:
    """A picklable value that all ranks of a mesh hold, on ranks outside it too. Collective as `from_mesh` is."""
    return value if len(mesh.ranks) == mesh.world.size else gather_objects(value, mesh.world)[mesh.ranks[0]]


def run_on_all_ranks(work: Callable[[], T], axis: Axis, prefix: str = "") -> T:
    """Runs `work` on every rank and returns this rank's result; where it fails on any, every rank raises.

    Args:
        work: reads, writes and builds; no collectives in it.
        prefix: of the error's text.

    Raises:
        ValueError, OSError: as it was raised on the first rank that failed, with the number of a rank that is not 0.
        RuntimeError: that rank raised anything else, which is raised there as it is.
    """
    failure: Exception | None = None
    reason: tuple[type[Exception], str] | None = None
    result: Any = None
    try:
        result = work()
    except Exception as error:  # not hidden: raised again below, once every rank knows
        kind = next((kind for kind in (OSError, ValueError) if isinstance(error, kind)), RuntimeError)
        failure, reason = error, (kind, str(error) or repr(error))
    for rank, found in enumerate(gather_objects(reason, axis)):
        if found is not None:
            if failure is not None and found[0] is RuntimeError:
                raise failure
            raise found[0](f"{prefix}{f'rank {rank}: ' if rank else ''}{found[1]}") from failure
    return result


def barrier(axis: Axis) -> None:
    """Waits until every rank of the axis is here."""
    if axis.size > 1:
        with HEARTBEAT.waiting(f"barrier over {axis.name}"):
            dist.barrier(group=axis.group)


def exchange(operations: list[dist.P2POp], axis: Axis) -> None:
    """Runs a batch of sends and receives along the axis, to its end."""
    if operations:
        with HEARTBEAT.waiting(f"send and receive over {axis.name}"):
            for work in dist.batch_isend_irecv(operations):
                work.wait()


def wait(work: dist.Work, axis: Axis) -> None:
    """Waits for a collective that was started."""
    with HEARTBEAT.waiting(f"reduce_scatter over {axis.name}"):
        work.wait()


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0].contiguous(), ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.mark_dirty(x)
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sizes: Sequence[int]) -> Tensor:
        ctx.axis, ctx.start, ctx.width = axis, sum(sizes[: axis.rank]), sizes[axis.rank]
        return all_gather(x, axis, -1, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # Each rank used the whole in its own way: the gradient is the sum over the ranks.
        return all_reduce(grads[0].contiguous(), ctx.axis).narrow(-1, ctx.start, ctx.width), None, None


def gather_from_region(x: Tensor, axis: Axis, sizes: Sequence[int]) -> Tensor:
    """All-gather of the last dim, `sizes` long on the ranks; backward this rank's slice of the summed gradient."""
    return x if axis.size == 1 else _GatherFrom.apply(x, axis, sizes)


def copy_to_region(x: Tensor, axis: Axis) -> Tensor:
    """Megatron's f: identity forward, all-reduce of the gradient backward."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from_region(x: Tensor, axis: Axis) -> Tensor:
    """Megatron's g: all-reduce forward (in place), identity backward."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)
