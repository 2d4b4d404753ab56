"""Further pipeline schedules, for tests of the simulator and the runner."""

from trialign.engine.pipeline.schedule import Action


def gpipe(rank: int, ranks: int, count: int) -> list[Action]:
    """All forwards, then all backwards (GPipe, https://arxiv.org/abs/1811.06965)."""
    return [Action(kind, rank, i) for kind in ("F", "B") for i in range(count)]


def interleaved(rank: int, ranks: int, count: int, chunks: int = 2) -> list[Action]:
    """Interleaved 1F1B (https://arxiv.org/abs/2104.04473, section 2.2): groups of `ranks` micro-batches pass a
    rank's chunks one after the other; `count` must be a multiple of `ranks`."""
    order = [(c, i) for first in range(0, count, ranks) for c in range(chunks) for i in range(first, first + ranks)]
    back = [(chunks - 1 - c, i) for c, i in order]
    warm_up = min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks, len(order))
    forwards = [Action("F", c * ranks + rank, i) for c, i in order]
    backwards = [Action("B", c * ranks + rank, i) for c, i in back]
    steady = [action for pair in zip(forwards[warm_up:], backwards, strict=False) for action in pair]
    return forwards[:warm_up] + steady + backwards[len(order) - warm_up :]


def split_backward(rank: int, ranks: int, count: int) -> list[Action]:
    """1F1B with all backwards of the weights after the last backward of the inputs: the simplest form of zero bubble
    (https://arxiv.org/abs/2401.10241)."""
    warm_up = min(ranks - 1 - rank, count)
    actions = [Action("F", rank, i) for i in range(warm_up)]
    for i in range(count - warm_up):
        actions += [Action("F", rank, warm_up + i), Action("I", rank, i)]
    actions += [Action("I", rank, i) for i in range(count - warm_up, count)]
    return actions + [Action("W", rank, i) for i in range(count)]
