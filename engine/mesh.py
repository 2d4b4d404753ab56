"""The mesh: the grid of ranks, cut into axes. Built once, passed in; nothing else makes process groups.

Ranks are laid out as [pp, dp, cp, tp] with tp fastest, so tensor parallelism stays inside a node and pipeline stages,
which talk least, are farthest apart. Expert parallelism (ep) folds from dp: its groups are slices of the data axis.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def neighbour(self, step: int) -> int:
        """Global rank of the neighbour `step` places on (wraps around)."""
        return self.ranks[(self.rank + step) % self.size]


@dataclass(frozen=True)
class Mesh:
    """All axes as one rank sees them. `embedding` joins the first and last pipeline stage, which share tied weights."""

    world: Axis
    dp: Axis
    pp: Axis
    cp: Axis
    ep: Axis
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
        return f"dp={self.dp.size} pp={self.pp.size} tp={self.tp.size} on {self.device.type}"


def check_layout(world: int, *, tp: int, pp: int, dp: int | None = None) -> int:
    """Size of the data axis for `world` ranks.

    Raises:
        ValueError: a size below 1, or tp x pp (x dp) does not make up the world.
    """
    for name, size in (("tp", tp), ("pp", pp), ("dp", 1 if dp is None else dp)):
        if size < 1:
            raise ValueError(f"parallel.{name}={size}: must be at least 1")
    if dp is None:
        if world % (tp * pp):
            raise ValueError(f"world size {world} does not divide by tp x pp = {tp} x {pp} = {tp * pp}")
        return world // (tp * pp)
    if tp * pp * dp != world:
        raise ValueError(f"world size {world} is not tp x pp x dp = {tp} x {pp} x {dp} = {tp * pp * dp}")
    return dp


def build_mesh(*, tp: int = 1, pp: int = 1, dp: int | None = None, device: torch.device | str = "cpu") -> Mesh:
    """Cuts the world (the initialised default group, or one process) into axes. Collective: every rank must call it.

    Args:
        dp: size of the data axis; None takes what tp x pp leaves.

    Raises:
        ValueError: the sizes do not make up the world.
    """
    initialised = dist.is_initialized()
    world, rank = (dist.get_world_size(), dist.get_rank()) if initialised else (1, 0)
    dp = check_layout(world, tp=tp, pp=pp, dp=dp)
    grid = torch.arange(world).view(pp, dp, 1, tp)

    def axis(name: str, lines: list[list[int]]) -> Axis:
        """Every rank makes every group in the same order; it keeps the one it lies in."""
        mine = Axis(name, 1, 0, (rank,), None)
        for ranks in lines:
            group = dist.new_group(ranks) if len(ranks) > 1 else None
            if rank in ranks:
                assert not isinstance(group, int), "a rank outside its own group"
                mine = Axis(name, len(ranks), ranks.index(rank), tuple(ranks), group)
        return mine

    def along(dim: int) -> list[list[int]]:
        return grid.movedim(dim, -1).reshape(-1, grid.shape[dim]).tolist()

    ends = [sorted({line[0], line[-1]}) for line in along(0)]
    return Mesh(
        world=Axis("world", world, rank, tuple(range(world)), dist.group.WORLD if world > 1 else None),
        dp=axis("dp", along(1)),
        pp=axis("pp", along(0)),
        cp=axis("cp", along(2)),
        ep=axis("ep", [[r] for r in range(world)]),
        tp=axis("tp", along(3)),
        embedding=axis("embedding", ends),
        device=torch.device(device),
    )
