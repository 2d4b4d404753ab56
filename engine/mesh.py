"""The mesh: a grid of ranks, cut into axes. Built once a role, passed in; nothing else makes process groups.

Ranks are laid out as [pp, dp, cp, tp] with tp fastest, so tensor parallelism stays inside a node and pipeline stages,
which talk least, are farthest apart. Expert parallelism (GShard, https://arxiv.org/abs/2006.16668) folds from dp x cp:
that axis is cut into [edp, ep], ep fastest. The ranks of one ep group hold different experts and pass their tokens to
each other; the ranks of one edp group hold the same experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as one rank sees it. `ranks` are the global ranks along it, in axis order."""

    name: str
    size: int
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None  # None where size is 1: a collective over it returns its input

    def neighbor(self, step: int) -> int:
        """Global rank of the neighbor `step` places on (wraps around)."""
        return self.ranks[(self.rank + step) % self.size]


@dataclass(frozen=True)
class Mesh:
    """All axes as one rank of the job sees them. On a rank outside the mesh every axis but `world` has size 1.

    Attributes:
        world: all ranks of the job, those outside this mesh too.
        ranks: global ranks of this mesh, alike on every rank of the job.
        dp_cp: the ranks that hold the same weights, and see other samples (dp) or other tokens of a sample (cp):
            gradients, statistics and per-token numbers are summed over it.
        ep, edp: the inner and the outer part of `dp_cp`.
        embedding: joins the first and last pipeline stage, which share tied weights.
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
        """False on a rank of the job that this mesh leaves out: it holds no part of the model."""
        return self.world.rank in self.ranks

    @property
    def is_main(self) -> bool:
        """True on the one rank of the job that prints and writes shared files."""
        return self.world.rank == 0

    def __str__(self) -> str:
        ep = f" ep={self.ep.size}" if self.ep.size > 1 else ""
        return f"dp={self.dp.size}{ep} pp={self.pp.size} tp={self.tp.size} on {self.device.type}"


def check_layout(world: int, *, tp: int, pp: int, dp: int | None = None, cp: int = 1, ep: int = 1) -> int:
    """Size of the data axis for `world` ranks.

    Raises:
        ValueError: a size below 1, cp above 1, tp x pp (x dp) does not make up the world, or ep does not divide dp.
    """
    for name, size in (("tp", tp), ("pp", pp), ("dp", 1 if dp is None else dp), ("cp", cp), ("ep", ep)):
        if size < 1:
            raise ValueError(f"parallel.{name}={size}: must be at least 1")
    if cp > 1:
        raise ValueError(f"parallel.cp={cp}: must be 1, attention over ranks that share a sample is not implemented")
    if dp is None:
        if world % (tp * pp):
            raise ValueError(f"world size {world} does not divide by tp x pp = {tp} x {pp} = {tp * pp}")
        dp = world // (tp * pp)
    elif tp * pp * dp != world:
        raise ValueError(f"world size {world} is not tp x pp x dp = {tp} x {pp} x {dp} = {tp * pp * dp}")
    if dp % ep:
        allowed = ", ".join(str(n) for n in range(1, dp + 1) if dp % n == 0)
        raise ValueError(f"parallel.ep={ep}: experts are spread over data-parallel ranks, dp={dp}; allowed: {allowed}")
    return dp


def mesh_as(
    rank: int, *, tp: int = 1, pp: int = 1, dp: int = 1, ep: int = 1, device: torch.device | str = "cpu"
) -> Mesh:
    """The mesh of tp x pp x dp as `rank` sees it, without groups: enough to build a model and see its shards, not to
    run it.

    Raises:
        ValueError: a size below 1, or ep does not divide dp.
    """
    world = tp * pp * dp
    check_layout(world, tp=tp, pp=pp, dp=dp, ep=ep)
    job = Axis("world", world, rank, tuple(range(world)), None)
    return _cut(job, job.ranks, lambda _: None, tp=tp, pp=pp, dp=dp, cp=1, ep=ep, device=device)


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
    """Cuts ranks of the job (the initialized default group, or one process) into axes.

    Collective over the whole job, whatever `ranks` are: every rank must call it with the same arguments, in the same
    order. A rank outside gets a mesh that `is_member` is False of: a decoder built on it holds no layers, a pass runs
    nothing, an optimizer has no parameters, and a checkpoint no entries of it. `collectives.from_mesh` and
    `collectives.object_from_mesh` give such ranks what a pass computed.

    Args:
        dp: size of the data axis; None takes what tp x pp leaves.
        cp: ranks that share the tokens of one sample; 1 until attention runs over them.
        ep: how many of the DP ranks share one set of experts.
        ranks: global ranks of the mesh, in the order of the layout; None takes all.

    Raises:
        ValueError: the sizes do not make up the ranks; ranks that the job does not have, or one twice.
    """
    initialized = dist.is_initialized()
    size, rank = (dist.get_world_size(), dist.get_rank()) if initialized else (1, 0)
    world = Axis("world", size, rank, tuple(range(size)), dist.group.WORLD if size > 1 else None)
    chosen = world.ranks if ranks is None else tuple(ranks)
    if len(set(chosen)) != len(chosen) or not set(chosen) <= set(world.ranks):
        raise ValueError(f"ranks={list(chosen)}: must be different ranks below the world size {size}")
    dp = check_layout(len(chosen), tp=tp, pp=pp, dp=dp, cp=cp, ep=ep)

    def new_group(line: tuple[int, ...]) -> dist.ProcessGroup | None:
        group = dist.new_group(list(line)) if len(line) > 1 else None
        return None if isinstance(group, int) else group  # a number on ranks that are not in it

    return _cut(world, chosen, new_group, tp=tp, pp=pp, dp=dp, cp=cp, ep=ep, device=device)


def _cut(
    world: Axis,
    ranks: tuple[int, ...],
    new_group: Callable[[tuple[int, ...]], dist.ProcessGroup | None],
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

    def lines(dim: int, grid: torch.Tensor = grid) -> list[tuple[int, ...]]:
        return [tuple(line) for line in grid.movedim(dim, -1).reshape(-1, grid.shape[dim]).tolist()]

    def axis(name: str, lines: list[tuple[int, ...]]) -> Axis:
        """Every rank of the job makes every group in the same order; it keeps the one it lies in."""
        own = Axis(name, 1, 0, (world.rank,), None)
        for line in lines:
            group = new_group(line)
            if world.rank in line:
                own = Axis(name, len(line), line.index(world.rank), line, group)
        return own

    data = axis("dp", lines(1))
    ends = [tuple(dict.fromkeys((line[0], line[-1]))) for line in lines(0)]
    return Mesh(
        world=world,
        ranks=ranks,
        dp=data,
        pp=axis("pp", lines(0)),
        cp=axis("cp", lines(2)),
        dp_cp=replace(data, name="dp_cp"),  # one and the same while cp is 1: no second set of groups
        ep=axis("ep", lines(2, experts)),
        edp=axis("edp", lines(1, experts)) if ep > 1 else replace(data, name="edp"),
        tp=axis("tp", lines(3)),
        embedding=axis("embedding", ends),
        device=torch.device(device),
    )
