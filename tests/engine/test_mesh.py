"""Axes of a mesh, refused sizes, and errors that reach all ranks."""

import pytest
from harness import run_ranks
from trialign.engine.mesh import build_mesh, check_layout, mesh_as
from trialign.engine.parallel.collectives import run_on_all_ranks

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
    for ranks in ([0, 0], [1], [-1]):
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
        (KeyError, (1,), [(RuntimeError, "step: rank 1: 'of 1'"), (KeyError, "'of 1'")]),
    ],
)
def test_error_of_one_rank_is_raised_on_all(error, failed, expected):
    assert run_ranks(failing, 2, error, failed) == expected
