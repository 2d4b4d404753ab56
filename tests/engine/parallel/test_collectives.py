"""Work that fails on some ranks fails on all."""

import pytest
from harness import run_ranks
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.collectives import run_on_all_ranks


def failing(rank: int, world: int, error: type[Exception], culprits: tuple[int, ...]) -> tuple[type, str]:
    def work() -> int:
        if rank in culprits:
            raise error(f"of {rank}")
        return rank

    axis = build_mesh(dp=world).world
    assert run_on_all_ranks(lambda: rank, axis) == rank
    with pytest.raises(Exception) as caught:
        run_on_all_ranks(work, axis, "step: ")
    return caught.type, str(caught.value)


@pytest.mark.parametrize(
    ("error", "culprits", "expected"),
    [
        (FileNotFoundError, (0, 1), [(OSError, "step: of 0")] * 2),
        (UnicodeError, (1,), [(ValueError, "step: rank 1: of 1")] * 2),
        (KeyError, (1,), [(RuntimeError, "step: rank 1: 'of 1'"), (KeyError, "'of 1'")]),
    ],
)
def test_every_rank_raises(error, culprits, expected):
    assert run_ranks(failing, 2, error, culprits) == expected
