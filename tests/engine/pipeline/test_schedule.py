"""Simulated pipeline schedules: no deadlock, the expected live micro-batches and bubble; layers of stages."""

from typing import Any

import pytest
from schedules import gpipe, interleaved, split_backward
from trialign.engine.mesh import build_mesh, mesh_as
from trialign.engine.pipeline.schedule import Action, forward_only, one_f_one_b
from trialign.engine.pipeline.simulate import simulate
from trialign.engine.pipeline.stage import split_layers, stage_of


@pytest.mark.parametrize("ranks", range(1, 9, 2))
def test_schedules_have_their_bubble_and_live_micro_batches(ranks):
    for count in range(1, 20):
        schedules = [one_f_one_b(rank, ranks, count) for rank in range(ranks)]
        for rank, actions in enumerate(schedules):
            assert sorted(actions) == [Action(kind, rank, i) for kind in ("B", "F") for i in range(count)]
        found = simulate(schedules)
        assert found.live == [min(ranks - rank, count) for rank in range(ranks)]
        assert found.bubble == pytest.approx((ranks - 1) / (count + ranks - 1))
        simulate([forward_only(rank, ranks, count) for rank in range(ranks)])
    count = 2 * ranks
    whole, chunked, split = (
        simulate([schedule(rank, ranks, count) for rank in range(ranks)])
        for schedule in (gpipe, interleaved, split_backward)
    )
    assert whole == ([count] * ranks, pytest.approx((ranks - 1) / (count + ranks - 1)))
    assert chunked.bubble == pytest.approx((ranks - 1) / (2 * count + ranks - 1)), "two chunks halve it"
    assert split.bubble < whole.bubble or ranks == 1


def test_deadlock_is_detected():
    def actions(chunk: int, kinds: Any) -> list[Action]:
        return [Action(kind, chunk, 0) for kind in kinds]

    for kinds in ("BF", "FWI", "F"):  # a gradient before it is sent, backwards out of order, no backward
        with pytest.raises(ValueError, match="deadlocks"):
            simulate([actions(0, "FB"), actions(1, kinds), actions(2, "FB")])


@pytest.mark.parametrize(
    ("layers", "ranks", "chunks", "sizes"),
    [(8, 3, 1, [3, 3, 2]), (6, 4, 1, [1, 2, 2, 1]), (30, 4, 1, [7, 8, 8, 7]), (5, 2, 2, [1, 1, 2, 1])],
)
def test_layers_of_stages(layers, ranks, chunks, sizes):
    """They differ by one at most, and the last has the fewest."""
    found = split_layers(layers, ranks, chunks=chunks)
    assert [len(one) for one in found] == sizes
    assert [layer for one in found for layer in one] == list(range(layers))


def test_chunks_of_ranks():
    held = [stage_of(mesh_as(rank, pp=2), 7, (1, 3, 2, 1), chunks=2) for rank in range(2)]
    assert [stage.layers for stage in held] == [[0, 4, 5], [1, 2, 3, 6]]
    assert [[(c.index, c.has_embedding, c.has_head) for c in stage.chunks] for stage in held] == [
        [(0, True, False), (2, False, False)],
        [(1, False, False), (3, False, True)],
    ]
    alone = stage_of(build_mesh(), 3)
    assert (alone.layers, alone.has_embedding, alone.has_head) == ([0, 1, 2], True, True)


def test_impossible_sizes_are_refused():
    for sizes in ((2, 3), (4,), (0, 4)):
        with pytest.raises(ValueError, match=r"parallel.pp_layers=\["):
            split_layers(4, 2, sizes)
    with pytest.raises(ValueError, match="pp=5"):
        split_layers(4, 5)
