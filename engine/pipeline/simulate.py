"""Simulation of a pipeline schedule: checks for deadlocks, and computes its bubble and live micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .schedule import Action, Message, Transfer, count_chunks, received, sent, transfers

COSTS = {"F": 1, "B": 2, "I": 1, "W": 1}
"""Time of an action in forwards of a chunk. A backward has two matrix products for each of the forward; "W" is costed
without the repeated backward of the inputs that the runner makes."""


class Simulation(NamedTuple):
    """Figures of a schedule.

    Attributes:
        live: each rank's peak of live micro-batches (times chunks): forward has run, backward has not finished.
        bubble: idle fraction of all ranks' time, from the first action to the last.
    """

    live: list[int]
    bubble: float


def simulate(schedules: Sequence[Sequence[Action]]) -> Simulation:
    """Runs all ranks' actions against each other.

    Raises:
        ValueError: a deadlock, or a message that would be received in place of another.
    """
    _run_transfers(transfers(schedules))
    return Simulation([_peak(actions) for actions in schedules], _bubble(schedules))


def _run_transfers(plans: list[list[list[Transfer]]]) -> None:
    """Runs every transfer as a rendezvous: a batch is posted whole and completes before the next action; the messages
    of one rank to another match in order, as on NCCL."""
    position = [0] * len(plans)
    pending = [list(plan[0]) for plan in plans]
    while any(position[rank] < len(plan) for rank, plan in enumerate(plans)):
        progress = False
        for rank in range(len(plans)):
            for transfer in [t for t in pending[rank] if t.source == rank]:
                first, posted = (
                    next((t for t in pending[end] if (t.source, t.target) == (rank, transfer.target)), None)
                    for end in (rank, transfer.target)
                )
                if first == transfer and posted is not None:
                    if posted != transfer:
                        raise ValueError(f"{transfer} would be received as {posted}")
                    pending[rank].remove(transfer)
                    pending[transfer.target].remove(transfer)
                    progress = True
        for rank, plan in enumerate(plans):
            if position[rank] < len(plan) and not pending[rank]:
                position[rank] += 1
                pending[rank] = list(plan[position[rank]]) if position[rank] < len(plan) else []
                progress = True
        if not progress:
            raise ValueError(f"ranks wait for each other: {pending}")


def _peak(actions: Sequence[Action]) -> int:
    live = peak = 0
    for action in actions:
        live += {"F": 1, "I": 0}.get(action.kind, -1)
        peak = max(peak, live)
    return peak


def _bubble(schedules: Sequence[Sequence[Action]]) -> float:
    """Idle fraction where messages take no time and an action starts once its rank is free and its message there."""
    chunks, clock, position = count_chunks(schedules), [0] * len(schedules), [0] * len(schedules)
    arrived: dict[Message | None, int] = {None: 0}
    while any(position[rank] < len(actions) for rank, actions in enumerate(schedules)):
        for rank, actions in enumerate(schedules):
            while position[rank] < len(actions) and received(actions[position[rank]], chunks) in arrived:
                action = actions[position[rank]]
                clock[rank] = max(clock[rank], arrived[received(action, chunks)]) + COSTS[action.kind]
                message = sent(action, chunks)
                if message is not None:
                    arrived[message] = clock[rank]
                position[rank] += 1
    busy = sum(COSTS[action.kind] for actions in schedules for action in actions)
    return 1 - busy / (max(clock) * len(schedules)) if busy else 0.0
