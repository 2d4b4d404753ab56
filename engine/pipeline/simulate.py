"""Simulation of a pipeline schedule: the proof that it ends, its bubble, and the micro-batches that it keeps alive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .schedule import Action, Message, Transfer, count_chunks, received, sent, transfers

COSTS = {"F": 1, "B": 2, "I": 1, "W": 1}
"""Time of an action, in forwards of a chunk: a backward has two products of matrices for one of the forward."""


class Simulation(NamedTuple):
    """A schedule's figures.

    Attributes:
        live: each rank's peak of micro-batches (in chunks) that were run forward and not yet all the way backward.
        bubble: part of all ranks' time, from the first action to the last, that nothing is done in.
    """

    live: list[int]
    bubble: float


def simulate(schedules: Sequence[Sequence[Action]]) -> Simulation:
    """Runs all ranks' actions against each other.

    Raises:
        ValueError: ranks wait for each other, or a message would be taken for another one.
    """
    _meet(transfers(schedules))
    return Simulation([_peak(actions) for actions in schedules], _bubble(schedules))


def _meet(plans: list[list[list[Transfer]]]) -> None:
    """Every transfer as a rendezvous: a batch is posted whole and complete before the next action; the messages of one
    rank to another match in order, as on NCCL."""
    place = [0] * len(plans)
    pending = [list(plan[0]) for plan in plans]
    while any(place[rank] < len(plan) for rank, plan in enumerate(plans)):
        moved = False
        for rank in range(len(plans)):
            for transfer in [t for t in pending[rank] if t.source == rank]:
                first, theirs = (
                    next((t for t in pending[end] if (t.source, t.target) == (rank, transfer.target)), None)
                    for end in (rank, transfer.target)
                )
                if first == transfer and theirs is not None:
                    if theirs != transfer:
                        raise ValueError(f"{transfer} would be taken for {theirs}")
                    pending[rank].remove(transfer)
                    pending[transfer.target].remove(transfer)
                    moved = True
        for rank, plan in enumerate(plans):
            if place[rank] < len(plan) and not pending[rank]:
                place[rank] += 1
                pending[rank] = list(plan[place[rank]]) if place[rank] < len(plan) else []
                moved = True
        if not moved:
            raise ValueError(f"ranks wait for each other: {pending}")


def _peak(actions: Sequence[Action]) -> int:
    live = peak = 0
    for action in actions:
        live += {"F": 1, "I": 0}.get(action.kind, -1)
        peak = max(peak, live)
    return peak


def _bubble(schedules: Sequence[Sequence[Action]]) -> float:
    """Where messages take no time, and an action begins as soon as its rank and its message are there."""
    chunks, clock, place = count_chunks(schedules), [0] * len(schedules), [0] * len(schedules)
    arrived: dict[Message | None, int] = {None: 0}
    while any(place[rank] < len(actions) for rank, actions in enumerate(schedules)):
        for rank, actions in enumerate(schedules):
            while place[rank] < len(actions) and received(actions[place[rank]], chunks) in arrived:
                action = actions[place[rank]]
                clock[rank] = max(clock[rank], arrived[received(action, chunks)]) + COSTS[action.kind]
                message = sent(action, chunks)
                if message is not None:
                    arrived[message] = clock[rank]
                place[rank] += 1
    busy = sum(COSTS[action.kind] for actions in schedules for action in actions)
    return 1 - busy / (max(clock) * len(schedules)) if busy else 0.0
