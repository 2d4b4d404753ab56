"""Pipeline schedules as data: pure functions that give a rank its actions, and the transfers that any of them needs.

`simulate` proves a schedule free of deadlock; `run_schedule` executes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from .stage import chunk_rank


class Action(NamedTuple):
    """Something that a rank does with one micro-batch in one of its chunks.

    Attributes:
        kind: "F" forward, "B" backward; or the backward's two parts (https://arxiv.org/abs/2401.10241), "I" of the
            inputs and, at any time after it, "W" of the weights.
        chunk: its index in the whole pipeline.
    """

    kind: Literal["F", "B", "I", "W"]
    chunk: int
    micro_batch: int


Schedule = Callable[[int, int, int], list[Action]]
"""(rank along pp, ranks of pp, micro-batches) -> the actions of the rank, in order"""


def forward_only(rank: int, ranks: int, count: int) -> list[Action]:
    """Every micro-batch forward, for scoring."""
    return [Action("F", rank, i) for i in range(count)]


def one_f_one_b(rank: int, ranks: int, count: int) -> list[Action]:
    """1F1B (PipeDream-flush, https://arxiv.org/abs/2104.04473 section 2.2).

    `min(ranks - 1 - rank, count)` forwards to fill the pipe, then forward and backward in turn, then the backwards
    left over: at most `min(ranks - rank, count)` micro-batches are alive on a rank.
    """
    warm_up = min(ranks - 1 - rank, count)
    actions = forward_only(rank, ranks, warm_up)
    for i in range(count - warm_up):
        actions += [Action("F", rank, warm_up + i), Action("B", rank, i)]
    return actions + [Action("B", rank, i) for i in range(count - warm_up, count)]


class Message(NamedTuple):
    """A micro-batch's activations ("F") or their gradients ("B") on the way into a chunk."""

    kind: Literal["F", "B"]
    chunk: int
    micro_batch: int


class Transfer(NamedTuple):
    """A message between two ranks of pp."""

    message: Message
    source: int
    target: int


def received(action: Action, chunks: int) -> Message | None:
    """The message without which an action cannot begin, in a pipeline of so many chunks."""
    if action.kind == "F":
        return Message("F", *action[1:]) if action.chunk > 0 else None
    return Message("B", *action[1:]) if action.kind != "W" and action.chunk < chunks - 1 else None


def sent(action: Action, chunks: int) -> Message | None:
    """The message that an action ends with."""
    if action.kind == "F":
        return Message("F", action.chunk + 1, action.micro_batch) if action.chunk < chunks - 1 else None
    return Message("B", action.chunk - 1, action.micro_batch) if action.kind != "W" and action.chunk > 0 else None


def before(action: Action) -> set[Action]:
    """Actions of the same rank of which one must come first."""
    kinds = {"F": "", "B": "F", "I": "F", "W": "I"}[action.kind]
    return {action._replace(kind=kind) for kind in kinds}  # pyright: ignore[reportArgumentType]


def count_chunks(schedules: Sequence[Sequence[Action]]) -> int:
    """Chunks of the whole pipeline."""
    return 1 + max((action.chunk for actions in schedules for action in actions), default=-1)


def transfers(schedules: Sequence[Sequence[Action]]) -> list[list[list[Transfer]]]:
    """The transfers around each rank's actions: entry i happens before action i, the last one after all of them.

    All ranks' actions are gone through in rounds, one action a rank where it is not waiting. A message goes into the
    entry behind the action that the round had it sent by, and on its receiver behind the action of that same round. So
    one order, that of the rounds, holds for all messages on all ranks: posted in this order they match without tags
    (NCCL has none), and the earliest one that is not through is posted on both sides, hence nothing waits forever.

    Raises:
        ValueError: the actions wait for each other.
    """
    ranks, chunks = len(schedules), count_chunks(schedules)
    batches: list[list[list[Transfer]]] = [[[] for _ in range(len(actions) + 1)] for actions in schedules]
    place, done = [0] * ranks, set[Action | Message]()
    while left := [rank for rank in range(ranks) if place[rank] < len(schedules[rank])]:
        round_ = []
        for rank in left:
            action = schedules[rank][place[rank]]
            message = received(action, chunks)
            if (message is None or message in done) and before(action) <= done:
                round_.append((rank, action))
        if not round_:
            waiting = ", ".join(f"rank {rank} with {tuple(schedules[rank][place[rank]])}" for rank in left)
            raise ValueError(f"the schedule never ends: {waiting}")
        for rank, action in round_:
            place[rank] += 1
            done.add(action)
        for rank, action in round_:
            message = sent(action, chunks)
            if message is not None:
                done.add(message)
                target = chunk_rank(message.chunk, ranks)
                if target != rank:
                    for end in (rank, target):
                        batches[end][place[end]].append(Transfer(message, rank, target))
    return batches
