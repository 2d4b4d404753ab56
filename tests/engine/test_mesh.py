"""Axes and process groups of a mesh, refused sizes, and errors that reach all ranks."""

import re
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from harness import run_ranks
from trialign.engine.mesh import OBJECT_AXES, Axis, build_mesh, check_layout, mesh_as
from trialign.engine.parallel.collectives import (
    all_reduce,
    broadcast_object,
    gather_objects,
    gather_objects_on_first,
    run_on_all_ranks,
    run_on_first_rank,
)

AXES = ("dp", "pp", "cp", "dp_cp", "ep", "edp", "tp", "embedding")


def test_axes_of_a_layout():
    """tp is fastest and pp slowest; ep and edp are split from dp."""
    mesh = mesh_as(11, tp=2, pp=2, dp=4, ep=2)  # at pp 1, dp 1, tp 1
    assert {name: getattr(mesh, name).ranks for name in AXES} == {
        "tp": (10, 11),
        "dp": (9, 11, 13, 15),
        "dp_cp": (9, 11, 13, 15),
        "ep": (9, 11),
        "edp": (11, 15),
        "pp": (3, 11),
        "embedding": (3, 11),
        "cp": (11,),
    }
    assert [axis.rank for axis in (mesh.world, mesh.tp, mesh.dp, mesh.ep, mesh.edp, mesh.pp)] == [11, 1, 1, 1, 0, 1]
    assert mesh_as(1, pp=3).embedding.size == 1
    assert str(mesh) == "dp=4 ep=2 pp=2 tp=2 on cpu"


@pytest.mark.parametrize(
    ("world", "sizes", "named"),
    [
        (6, {"tp": 2, "pp": 2}, "6"),
        (8, {"tp": 2, "pp": 1, "dp": 2}, "8"),
        (4, {"tp": 1, "pp": 0}, "parallel.pp=0"),
        (4, {"tp": 1, "pp": 1, "cp": 2}, "parallel.cp=2"),
        (8, {"tp": 2, "pp": 1, "ep": 3}, r"parallel\.ep=3: .* dp=4; allowed: 1, 2, 4"),
    ],
)
def test_impossible_sizes_are_refused(world, sizes, named):
    assert check_layout(8, tp=2, pp=1, ep=4) == 4
    with pytest.raises(ValueError, match=named):
        check_layout(world, **sizes)
    for ranks in ([0, 0], [1], [-1], [1, 0]):
        with pytest.raises(ValueError, match="ranks="):
            build_mesh(ranks=ranks)


def failing(rank: int, world: int, error: type[Exception], failed: tuple[int, ...]) -> tuple[type, str]:
    def work() -> int:
        if rank in failed:
            raise error(f"of {rank}")
        return rank

    axis = build_mesh(dp=world).world
    assert run_on_all_ranks(lambda: rank, axis) == rank
    with pytest.raises(Exception) as caught:
        run_on_all_ranks(work, axis, "step: ")
    return caught.type, str(caught.value)


@pytest.mark.parametrize(
    ("error", "failed", "expected"),
    [
        (FileNotFoundError, (0, 1), [(OSError, "step: of 0")] * 2),
        (UnicodeError, (1,), [(ValueError, "step: rank 1: of 1")] * 2),
        (KeyError, (1,), [(RuntimeError, "step: rank 1: KeyError: 'of 1'"), (KeyError, "'of 1'")]),
    ],
)
def test_error_of_one_rank_is_raised_on_all(error, failed, expected):
    assert run_ranks(failing, 2, error, failed) == expected


def collective(rank: int, axis: Axis) -> None:
    """Asserts the results of collectives over an axis, of tensors and of objects."""
    assert all_reduce(torch.tensor([rank]), axis).item() == sum(axis.ranks)
    assert gather_objects({"rank": rank}, axis) == [{"rank": other} for other in axis.ranks]
    assert gather_objects_on_first(rank, axis) == (list(axis.ranks) if axis.rank == 0 else [])
    assert broadcast_object(rank, axis, axis.size - 1) == axis.ranks[-1]
    assert run_on_first_rank(lambda: rank, axis) == axis.ranks[0]


def timeout_of(group: Any) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout


def groups_of_gloo(rank: int, world: int, timeout: float) -> int:
    mesh = build_mesh(tp=2, pp=2)
    for name in AXES:
        axis = getattr(mesh, name)
        assert axis.host is axis.group
        if axis.size > 1:
            assert timeout_of(axis.group) == timedelta(seconds=timeout), name
            collective(rank, axis)
    return len(dist.distributed_c10d._world.pg_names)


def test_groups_have_the_timeout_of_the_job_and_carry_objects():
    """A group each of the world, pp, tp and the embedding, and none besides."""
    assert run_ranks(groups_of_gloo, 4, 41.0, timeout=41.0) == [4] * 4


def groups_of_nccl(rank: int, world: int, timeout: float) -> list[list[list[int]]]:
    """A mesh as on CUDA: torch's checks pass a default group that says nccl and has a device; gloo carries it all."""
    job: Any = dist.group.WORLD
    job.bound_device_id = torch.device("cuda", 0)  # torch splits a group that has one whenever it creates another
    new_group, split = dist.new_group, []

    def split_group(*, split_ranks: list[list[int]], timeout: timedelta) -> Any:
        split.append(split_ranks)
        device, job.bound_device_id = job.bound_device_id, None
        created = [new_group(line, backend="gloo", timeout=timeout) for line in split_ranks]
        job.bound_device_id = device
        return next(group for line, group in zip(split_ranks, created, strict=True) if rank in line)

    dist.get_backend, dist.split_group = lambda *_: "nccl", split_group
    mesh = build_mesh(tp=2, dp=2)
    assert job.bound_device_id == torch.device("cuda", 0)
    job.bound_device_id = None
    for axis in (mesh.world, mesh.dp, mesh.tp):
        assert (axis.host is not None) == (axis.name in ("world", *OBJECT_AXES)) and axis.host is not axis.group
        assert all_reduce(torch.tensor([rank]), axis).item() == sum(axis.ranks)
        for group in (axis.group, axis.host) if axis.host is not None else ():
            assert timeout_of(group) == timedelta(seconds=timeout), axis.name
    collective(rank, mesh.world)
    collective(rank, mesh.dp)
    return split


def test_groups_of_nccl_are_split_at_once_and_objects_have_gloo_groups():
    split = run_ranks(groups_of_nccl, 4, 43.0, timeout=43.0, fresh=True)
    assert split == [[[[0, 2], [1, 3]], [[0, 1], [2, 3]]]] * 4  # dp, tp


def test_python_objects_and_groups_have_one_place():
    """torch's object collectives would go through NCCL, and groups have its timeout of 10 minutes, elsewhere."""
    banned = {"engine/parallel/collectives.py": r"dist\.\w+_object", "engine/mesh.py": r"\b(new|split)_(sub)?group"}
    sources = [
        path for folder in ("engine", "models", "algorithms", "launch") for path in (ROOT / folder).rglob("*.py")
    ]
    for home, pattern in banned.items():
        found = {str(path.relative_to(ROOT)) for path in sources if re.search(pattern, path.read_text())}
        assert found == {home}
