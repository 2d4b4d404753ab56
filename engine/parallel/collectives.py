"""Collectives over one axis of the mesh, and the conjugate operators of tensor parallelism.

Over an axis of size 1 every function returns its input. Waits for other ranks are reported through `HEARTBEAT.waiting`,
for the watchdog. Tensors travel over an axis' `group`, Python objects over its `host`, on the CPU.

f and g are Megatron-LM's (https://arxiv.org/abs/1909.08053, section 3): f copies forward and all-reduces backward, g
the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import cause
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
        sizes: of all ranks' tensors along `dim`; None where they are equal.
    """
    if axis.size == 1:
        return tensor
    sizes = [tensor.shape[dim]] * axis.size if sizes is None else sizes
    if tensor.shape[dim] < max(sizes):  # the collective needs equal shapes
        shape = list(tensor.shape)
        shape[dim] = max(sizes)
        padded = tensor.new_zeros(shape)
        padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        tensor = padded
    gathered = tensor.new_empty((axis.size, *tensor.shape))
    with HEARTBEAT.waiting(f"all_gather over {axis.name}"):
        _all_gather_single(gathered.flatten(0, 1), tensor.contiguous(), group=axis.group)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(gathered, sizes, strict=True)], dim)


def all_gather_shards(whole: Tensor, shard: Tensor, axis: Axis) -> dist.Work | None:
    """Starts filling the flat `whole` [size * n] from every rank's `shard` [n], which may be a view of it.

    `wait` for the result. Returns None with one rank, where `shard` must be a view of `whole`.
    """
    if axis.size == 1:
        assert shard.data_ptr() == whole.data_ptr()
        return None
    # gloo copies the input after it has begun to write the output, so an aliased shard must be cloned.
    source = shard.clone() if shard.device.type == "cpu" else shard
    return _all_gather_single(whole, source, group=axis.group, async_op=True)


def reduce_scatter(shard: Tensor, whole: Tensor, axis: Axis) -> dist.Work | None:
    """Starts summing the flat `whole` [size * n] over the axis into this rank's `shard` [n]; `wait` for the result.

    Returns None with one rank, where `shard` must be a view of `whole`.
    """
    if axis.size == 1:
        assert shard.data_ptr() == whole.data_ptr()
        return None
    with HEARTBEAT.waiting(f"start of a reduce_scatter over {axis.name}"):  # NCCL's queue may be full
        return _reduce_scatter_single(shard, whole, group=axis.group, async_op=True)


def broadcast(tensor: Tensor, axis: Axis, src: int = 0) -> Tensor:
    """Overwrites `tensor` with that of rank `src` of the axis and returns it."""
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
        dist.all_gather_object(values, value, group=axis.host)
    return values


def gather_objects_on_first(value: Any, axis: Axis) -> list[Any]:
    """Every rank's picklable value, in axis order, on the axis' first rank; [] on the others."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size if axis.rank == 0 else []
    with HEARTBEAT.waiting(f"gather of objects over {axis.name}"):
        dist.gather_object(value, values or None, group=axis.host, group_dst=0)
    return values


def broadcast_object(value: Any, axis: Axis, src: int = 0) -> Any:
    """The picklable value of rank `src` of the axis, on every rank."""
    if axis.size == 1:
        return value
    values = [value]
    with HEARTBEAT.waiting(f"broadcast of an object over {axis.name}"):
        dist.broadcast_object_list(values, group=axis.host, group_src=src)
    return value if axis.rank == src else values[0]


def from_mesh(tensor: Tensor, mesh: Mesh) -> Tensor:
    """Copies a tensor that all ranks of a mesh hold to the ranks outside it, in place, and returns it.

    Collective over the job, unless the mesh has all ranks.
    """
    return tensor if len(mesh.ranks) == mesh.world.size else broadcast(tensor, mesh.world, mesh.ranks[0])


def object_from_mesh(value: Any, mesh: Mesh) -> Any:
    """A picklable value that all ranks of a mesh hold, on the ranks outside it too. Collective as `from_mesh` is."""
    return value if len(mesh.ranks) == mesh.world.size else broadcast_object(value, mesh.world, mesh.ranks[0])


def run_on_all_ranks(work: Callable[[], T], axis: Axis, prefix: str = "") -> T:
    """Runs `work`, which makes no collectives, on every rank and returns this rank's result. If it fails on any rank,
    every rank raises.

    Args:
        prefix: of the error's text.

    Raises:
        ValueError, OSError: as raised on the first rank that failed, with its number unless it is 0.
        RuntimeError: the first rank that failed raised another exception; that rank raises it unchanged.
    """
    failure: Exception | None = None
    reason: tuple[type[Exception], str] | None = None
    result: Any = None
    try:
        result = work()
    except Exception as error:  # raised again below, on every rank
        kind = next((kind for kind in (OSError, ValueError) if isinstance(error, kind)), RuntimeError)
        failure, reason = error, (kind, cause(error))
    for rank, found in enumerate(gather_objects(reason, axis)):
        if found is not None:
            if failure is not None and found[0] is RuntimeError:
                raise failure
            raise found[0](f"{prefix}{f'rank {rank}: ' if rank else ''}{found[1]}") from failure
    return result


def run_on_first_rank(work: Callable[[], T], axis: Axis, prefix: str = "") -> T:
    """Runs `work` on the axis' first rank and returns its picklable result on every rank; if it fails, every rank
    raises, as in `run_on_all_ranks`."""
    result: Any = run_on_all_ranks(lambda: work() if axis.rank == 0 else None, axis, prefix)
    return broadcast_object(result, axis)


def exchange(operations: list[dist.P2POp], axis: Axis) -> None:
    """Runs a batch of sends and receives along the axis and waits for its end."""
    if operations:
        with HEARTBEAT.waiting(f"send and receive over {axis.name}"):
            for work in dist.batch_isend_irecv(operations):
                work.wait()


def wait(work: dist.Work | None, name: str, axis: Axis) -> None:
    """Waits for a started collective over the axis, if there is one; `name` is for messages."""
    if work is not None:
        with HEARTBEAT.waiting(f"{name} over {axis.name}"):
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
        # Every rank has a gradient of the gathered tensor: the whole gradient is their sum.
        return all_reduce(grads[0].contiguous(), ctx.axis).narrow(-1, ctx.start, ctx.width), None, None


def gather_from_region(x: Tensor, axis: Axis, sizes: Sequence[int]) -> Tensor:
    """All-gather along the last dim (`sizes` of all ranks); backward this rank's slice of the all-reduced gradient."""
    return x if axis.size == 1 else _GatherFrom.apply(x, axis, sizes)


def copy_to_region(x: Tensor, axis: Axis) -> Tensor:
    """Megatron's f: identity forward, all-reduce of the gradient backward."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from_region(x: Tensor, axis: Axis) -> Tensor:
    """Megatron's g: all-reduce forward (in place), identity backward."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)
