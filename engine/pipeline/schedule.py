"""Pipeline schedules as data: pure functions from a rank to its actions, and the transfers these actions need.

`simulate` checks a schedule for deadlocks; `run_schedule` executes it. Learners run `one_f_one_b` (1F1B).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from .stage import chunk_rank


class Action(NamedTuple):
    """A forward or backward of one micro-batch through one chunk.

    Attributes:
        kind: "F" forward, "B" backward; or a backward's two parts (https://arxiv.org/abs/2401.10241), "I" of the
            inputs and, at any later time, "W" of the weights.
        chunk: index in the whole pipeline.
    """

    kind: Literal["F", "B", "I", "W"]
    chunk: int
    micro_batch: int


Schedule = Callable[[int, int, int], list[Action]]
"""(rank along pp, ranks of pp, number of micro-batches) -> the rank's actions, in order"""


def forward_only(rank: int, ranks: int, count: int) -> list[Action]:
    """Forwards of all micro-batches, for scoring."""
    return [Action("F", rank, i) for i in range(count)]


def one_f_one_b(rank: int, ranks: int, count: int) -> list[Action]:
    """1F1B (PipeDream-flush, https://arxiv.org/abs/2104.04473 section 2.2).

    `min(ranks - 1 - rank, count)` warm-up forwards, then forward and backward in turn, then the remaining backwards:
    at most `min(ranks - rank, count)` micro-batches are live on a rank.
    """
    warm_up = min(ranks - 1 - rank, count)
    actions = forward_only(rank, ranks, warm_up)
    for i in range(count - warm_up):
        actions += [Action("F", rank, warm_up + i), Action("B", rank, i)]
    return actions + [Action("B", rank, i) for i in range(count - warm_up, count)]


class Message(NamedTuple):
    """A micro-batch's activations ("F") or their gradients ("B"), as a chunk receives them."""

    kind: Literal["F", "B"]
    chunk: int
    micro_batch: int


class Transfer(NamedTuple):
    """A message between two ranks of pp."""

    message: Message
    source: int
    target: int


def received(action: Action, chunks: int) -> Message | None:
    """The message that an action needs, in a pipeline of `chunks` chunks."""
    if action.kind == "F":
        return Message("F", *action[1:]) if action.chunk > 0 else None
    return Message("B", *action[1:]) if action.kind != "W" and action.chunk < chunks - 1 else None


def sent(action: Action, chunks: int) -> Message | None:
    """The message that an action produces."""
    if action.kind == "F":
        return Message("F", action.chunk + 1, action.micro_batch) if action.chunk < chunks - 1 else None
    return Message("B", action.chunk - 1, action.micro_batch) if action.kind != "W" and action.chunk > 0 else None


def prerequisites(action: Action) -> set[Action]:
    """Actions of the same rank that must have run before."""
    kinds = {"F": "", "B": "F", "I": "F", "W": "I"}[action.kind]
    return {action._replace(kind=kind) for kind in kinds}  # pyright: ignore[reportArgumentType]


def count_chunks(schedules: Sequence[Sequence[Action]]) -> int:
    """Number of chunks of the whole pipeline."""
    return 1 + max((action.chunk for actions in schedules for action in actions), default=-1)


def transfers(schedules: Sequence[Sequence[Action]]) -> list[list[list[Transfer]]]:
    """Batches of transfers for each rank: batch i runs before action i, the last one after all actions.

    The actions are played in rounds, one a rank unless it waits for a message. A message goes into the batch after the
    action that produces it, and on the receiver into the batch after its action of the same round. The order of the
    rounds thus holds for all messages on all ranks: they match without tags (NCCL has none), and the earliest pending
    one is always posted on both sides, so there is no deadlock.

    Raises:
        ValueError: the actions wait for each other.
    """
    ranks, chunks = len(schedules), count_chunks(schedules)
    batches: list[list[list[Transfer]]] = [[[] for _ in range(len(actions) + 1)] for actions in schedules]
    position, done = [0] * ranks, set[Action | Message]()
    while unfinished := [rank for rank in range(ranks) if position[rank] < len(schedules[rank])]:
        round_ = []
        for rank in unfinished:
            action = schedules[rank][position[rank]]
            message = received(action, chunks)
            if (message is None or message in done) and prerequisites(action) <= done:
                round_.append((rank, action))
        if not round_:
            waiting = ", ".join(f"rank {rank} at {tuple(schedules[rank][position[rank]])}" for rank in unfinished)
            raise ValueError(f"the schedule deadlocks: {waiting}")
        for rank, action in round_:
            position[rank] += 1
            done.add(action)
        for rank, action in round_:
            message = sent(action, chunks)
            if message is not None:
                done.add(message)
                target = chunk_rank(message.chunk, ranks)
                if target != rank:
                    for end in (rank, target):
                        batches[end][position[end]].append(Transfer(message, rank, target))
    return batches
