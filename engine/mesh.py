"""Device mesh: a grid of ranks with one process group per axis, built once a role.

Ranks are laid out as [pp, dp, cp, tp] with tp fastest, so that tensor parallelism stays inside a node and pipeline
stages, which communicate least, are farthest apart. Expert parallelism (GShard, https://arxiv.org/abs/2006.16668)
splits dp x cp into [edp, ep], ep fastest: the ranks of one ep group hold different experts and exchange tokens, the
ranks of one edp group hold the same experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

Line = tuple[int, ...]  # global ranks, ascending
Groups = tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]  # of tensors, of Python objects
OBJECT_AXES = ("dp", "pp", "ep")  # besides the world, the axes that Python objects are gathered over


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, seen from one rank.

    Attributes:
        ranks: global ranks along the axis, in axis order.
        group: of tensors on the mesh's device; None where size is 1: a collective over it returns its input.
        host: of Python objects, always gloo: `group` itself where that is gloo, else None but on `OBJECT_AXES`.
    """

    name: str
    size: int
    rank: int
    ranks: Line
    group: dist.ProcessGroup | None
    host: dist.ProcessGroup | None


@dataclass(frozen=True)
class Mesh:
    """All axes, seen from one rank of the job. On a rank outside the mesh every axis but `world` has size 1.

    Attributes:
        world: all ranks of the job, including those outside this mesh.
        ranks: global ranks of this mesh, the same on every rank of the job.
        dp_cp: ranks with the same weights and other samples (dp) or other tokens of a sample (cp): gradients,
            statistics and per-token numbers are summed over it.
        ep, edp: the inner and the outer part of `dp_cp`.
        embedding: the first and last pipeline stage, which share tied weights.
    """

    world: Axis
    ranks: tuple[int, ...]
    dp: Axis
    pp: Axis
    cp: Axis
    dp_cp: Axis
    ep: Axis
    edp: Axis
    tp: Axis
    embedding: Axis
    device: torch.device

    @property
    def is_member(self) -> bool:
        """False on a rank outside the mesh, which holds no part of the model."""
        return self.world.rank in self.ranks

    @property
    def is_main(self) -> bool:
        """True on the one rank of the job that prints and writes shared files."""
        return self.world.rank == 0

    def __str__(self) -> str:
        ep = f" ep={self.ep.size}" if self.ep.size > 1 else ""
        return f"dp={self.dp.size}{ep} pp={self.pp.size} tp={self.tp.size} on {self.device.type}"


def check_layout(world: int, *, tp: int, pp: int, dp: int | None = None, cp: int = 1, ep: int = 1) -> int:
    """Size of the dp axis for `world` ranks.

    Raises:
        ValueError: a size below 1, cp above 1, tp x pp (x dp) is not the world size, or ep does not divide dp.
    """
    for name, size in (("tp", tp), ("pp", pp), ("dp", 1 if dp is None else dp), ("cp", cp), ("ep", ep)):
        if size < 1:
            raise ValueError(f"parallel.{name}={size}: must be at least 1")
    if cp > 1:
        raise ValueError(f"parallel.cp={cp}: must be 1; context parallelism is not implemented")
    if dp is None:
        if world % (tp * pp):
            raise ValueError(f"world size {world} does not divide by tp x pp = {tp} x {pp} = {tp * pp}")
        dp = world // (tp * pp)
    elif tp * pp * dp != world:
        raise ValueError(f"world size {world} is not tp x pp x dp = {tp} x {pp} x {dp} = {tp * pp * dp}")
    if dp % ep:
        allowed = ", ".join(str(n) for n in range(1, dp + 1) if dp % n == 0)
        raise ValueError(f"parallel.ep={ep}: must divide dp={dp}; allowed: {allowed}")
    return dp


def mesh_as(
    rank: int, *, tp: int = 1, pp: int = 1, dp: int = 1, ep: int = 1, device: torch.device | str = "cpu"
) -> Mesh:
    """The mesh of tp x pp x dp seen from `rank`, without process groups: models can be built on it, but not run.

    Raises:
        ValueError: a size below 1, or ep does not divide dp.
    """
    world = tp * pp * dp
    check_layout(world, tp=tp, pp=pp, dp=dp, ep=ep)
    job = Axis("world", world, rank, tuple(range(world)), None, None)
    return _build(job, job.ranks, lambda *_: (None, None), tp=tp, pp=pp, dp=dp, cp=1, ep=ep, device=device)


def build_mesh(
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int | None = None,
    cp: int = 1,
    ep: int = 1,
    ranks: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Mesh:
    """Builds the mesh of the job (the initialized default group, or one process), or of some of its ranks.

    Collective over the whole job, whatever `ranks` are: every rank must make the same calls in the same order. On a
    rank outside the mesh (`is_member` is False) a model has no layers, a pass runs nothing, and an optimizer and a
    checkpoint have no entries; `collectives.from_mesh` and `object_from_mesh` bring results there.

    All groups have the timeout of the default group. Where that is NCCL, an axis' groups are split from it, and each
    axis of `OBJECT_AXES` has a gloo group too: an object that waits for a slow rank must not hold up the device.

    Args:
        dp: size of the dp axis; None for the ranks that tp x pp leave.
        cp: ranks that share the tokens of one sample; must be 1.
        ep: number of DP ranks that share one set of experts.
        ranks: global ranks of the mesh, ascending, as process groups sort them; None for all.

    Raises:
        ValueError: the sizes do not multiply to the number of ranks; ranks not ascending, or not in the job.
    """
    initialized = dist.is_initialized()
    size, rank = (dist.get_world_size(), dist.get_rank()) if initialized else (1, 0)
    chosen = tuple(range(size) if ranks is None else ranks)
    if sorted(set(chosen)) != list(chosen) or not set(chosen) <= set(range(size)):
        raise ValueError(f"ranks={list(chosen)}: must be ascending and below the world size {size}")
    dp = check_layout(len(chosen), tp=tp, pp=pp, dp=dp, cp=cp, ep=ep)
    everyone, job = tuple(range(size)), dist.group.WORLD
    world = Axis("world", size, rank, everyone, None, None)
    if job is None or size == 1:
        return _build(world, chosen, lambda *_: (None, None), tp=tp, pp=pp, dp=dp, cp=cp, ep=ep, device=device)
    timeout, gloo = job._get_backend(torch.device(device)).options._timeout, dist.get_backend() == "gloo"
    world = replace(world, group=job, host=job if gloo else _new_group([everyone], timeout, "gloo"))

    def new_groups(name: str, lines: list[Line]) -> Groups:
        if gloo or job.bound_device_id is None:  # NCCL splits groups that are bound to a device
            group = _new_group(lines, timeout)
        else:
            group = dist.split_group(split_ranks=[list(line) for line in lines], timeout=timeout)
        host = _new_group(lines, timeout, "gloo") if not gloo and name in OBJECT_AXES else None
        return group, group if gloo else host

    return _build(world, chosen, new_groups, tp=tp, pp=pp, dp=dp, cp=cp, ep=ep, device=device)


def _new_group(lines: list[Line], timeout: timedelta, backend: str | None = None) -> dist.ProcessGroup | None:
    """Creates a group of each line; this rank's, None where it is in none. Collective over the job."""
    own, job = None, dist.group.WORLD
    assert job is not None
    # With a bound device torch splits the NCCL group too, in the ranks outside the new group alone: they would wait for
    # those inside (pytorch#145376).
    device, job.bound_device_id = job.bound_device_id, None
    try:
        for line in lines:
            group = dist.new_group(list(line), backend=backend, timeout=timeout)
            own = own if isinstance(group, int) else group  # a number on ranks outside the group
    finally:
        job.bound_device_id = device
    return own


def _build(
    world: Axis,
    ranks: tuple[int, ...],
    new_groups: Callable[[str, list[Line]], Groups],
    *,
    tp: int,
    pp: int,
    dp: int,
    cp: int,
    ep: int,
    device: torch.device | str,
) -> Mesh:
    grid = torch.tensor(ranks).view(pp, dp, cp, tp)
    experts = grid.view(pp, dp * cp // ep, ep, tp)

    def lines(dim: int, grid: torch.Tensor = grid) -> list[Line]:
        return [tuple(line) for line in grid.movedim(dim, -1).reshape(-1, grid.shape[dim]).tolist()]

    def axis(name: str, lines: list[Line]) -> Axis:
        """Creates the groups of all lines, on every rank of the job; keeps those with this rank."""
        groups = new_groups(name, lines) if len(lines[0]) > 1 else (None, None)
        own = next((line for line in lines if world.rank in line), None)
        if own is None:
            return Axis(name, 1, 0, (world.rank,), None, None)
        return Axis(name, len(own), own.index(world.rank), own, *groups)

    data = axis("dp", lines(1))
    ends = [tuple(dict.fromkeys((line[0], line[-1]))) for line in lines(0)]
    return Mesh(
        world=world,
        ranks=ranks,
        dp=data,
        pp=axis("pp", lines(0)),
        cp=axis("cp", lines(2)),
        dp_cp=replace(data, name="dp_cp"),  # the same groups while cp is 1
        ep=axis("ep", lines(2, experts)),
        edp=axis("edp", lines(1, experts)) if ep > 1 else replace(data, name="edp"),
        tp=axis("tp", lines(3)),
        embedding=axis("embedding", ends),
        device=torch.device(device),
    )
