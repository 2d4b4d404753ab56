"""The mesh: the grid of ranks, cut into axes. Built once, passed in; nothing else makes process groups.

Ranks are laid out as [pp, dp, cp, tp] with tp fastest, so tensor parallelism stays inside a node and pipeline stages,
which talk least, are farthest apart. Expert parallelism (GShard, https://arxiv.org/abs/2006.16668) folds from dp: the
data axis is cut into [edp, ep], ep fastest. The ranks of one ep group hold different experts and pass their tokens to
each other; the ranks of one edp group hold the same experts.
"""

from __future__ import annotations

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
    """All axes as one rank sees them. `embedding` joins the first and last pipeline stage, which share tied weights;
    `ep` and `edp` are the inner and the outer part of `dp`."""

    world: Axis
    dp: Axis
    pp: Axis
    cp: Axis
    ep: Axis
    edp: Axis
    tp: Axis
    embedding: Axis
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes shared files."""
        return self.world.rank == 0

    def __str__(self) -> str:
        ep = f" ep={self.ep.size}" if self.ep.size > 1 else ""
        return f"dp={self.dp.size}{ep} pp={self.pp.size} tp={self.tp.size} on {self.device.type}"


def check_layout(world: int, *, tp: int, pp: int, dp: int | None = None, ep: int = 1) -> int:
    """Size of the data axis for `world` ranks.

    Raises:
        ValueError: a size below 1, tp x pp (x dp) does not make up the world, or ep does not divide dp.
    """
    for name, size in (("tp", tp), ("pp", pp), ("dp", 1 if dp is None else dp), ("ep", ep)):
        if size < 1:
            raise ValueError(f"parallel.{name}={size}: must be at least 1")
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


def mesh_as(rank: int, *, tp: int, pp: int, device: torch.device | str = "cpu") -> Mesh:
    """The mesh as `rank` of tp x pp sees it, without groups: enough to build a model and see its shards, not to run it.

    Raises:
        ValueError: a size below 1.
    """
    check_layout(tp * pp, tp=tp, pp=pp)
    pp_rank, tp_rank = divmod(rank, tp)

    def axis(name: str, size: int, place: int) -> Axis:
        return Axis(name, size, place, tuple(range(size)), None)

    return Mesh(
        world=axis("world", tp * pp, rank),
        dp=axis("dp", 1, 0),
        pp=axis("pp", pp, pp_rank),
        cp=axis("cp", 1, 0),
        ep=axis("ep", 1, 0),
        edp=axis("edp", 1, 0),
        tp=axis("tp", tp, tp_rank),
        embedding=axis("embedding", 2 if pp > 1 and pp_rank in (0, pp - 1) else 1, 0),
        device=torch.device(device),
    )


def build_mesh(
    *, tp: int = 1, pp: int = 1, dp: int | None = None, ep: int = 1, device: torch.device | str = "cpu"
) -> Mesh:
    """Cuts the world (the initialized default group, or one process) into axes. Collective: every rank must call it.

    Args:
        dp: size of the data axis; None takes what tp x pp leaves.
        ep: how many of the DP ranks share one set of experts.

    Raises:
        ValueError: the sizes do not make up the world.
    """
    initialized = dist.is_initialized()
    world, rank = (dist.get_world_size(), dist.get_rank()) if initialized else (1, 0)
    dp = check_layout(world, tp=tp, pp=pp, dp=dp, ep=ep)
    grid = torch.arange(world).view(pp, dp, 1, tp)
    experts = grid.view(pp, dp // ep, ep, tp)

    def axis(name: str, lines: list[list[int]]) -> Axis:
        """Every rank makes every group in the same order; it keeps the one it lies in."""
        mine = Axis(name, 1, 0, (rank,), None)
        for ranks in lines:
            group = dist.new_group(ranks) if len(ranks) > 1 else None
            if rank in ranks:
                assert not isinstance(group, int), "a rank outside its own group"
                mine = Axis(name, len(ranks), ranks.index(rank), tuple(ranks), group)
        return mine

    def along(dim: int, grid: torch.Tensor = grid) -> list[list[int]]:
        return grid.movedim(dim, -1).reshape(-1, grid.shape[dim]).tolist()

    ends = [sorted({line[0], line[-1]}) for line in along(0)]
    data = axis("dp", along(1))
    return Mesh(
        world=Axis("world", world, rank, tuple(range(world)), dist.group.WORLD if world > 1 else None),
        dp=data,
        pp=axis("pp", along(0)),
        cp=axis("cp", along(2)),
        ep=axis("ep", along(2, experts)),
        edp=axis("edp", along(1, experts)) if ep > 1 else replace(data, name="edp"),
        tp=axis("tp", along(3)),
        embedding=axis("embedding", ends),
        device=torch.device(device),
    )
