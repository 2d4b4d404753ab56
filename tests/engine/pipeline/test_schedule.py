"""Pipeline schedules, simulated: every transfer a rendezvous, every batch of them complete before the next action."""

import itertools

import pytest
from trialign.engine.pipeline.schedule import Action, Message, forward_only, messages, one_f_one_b


def simulate(schedules: list[list[Action]]) -> list[int]:
    """Runs all stages against each other; returns each stage's peak of live micro-batches.

    A batch of transfers is posted whole and ends when each of its messages has met its counterpart in the peer's
    posted batch, as on NCCL; messages of one direction between two stages match in order.
    """
    stages = len(schedules)
    plans = [messages(actions, stage, stages) for stage, actions in enumerate(schedules)]
    place = [0] * stages  # which batch each stage has posted
    pending = [list(plan[0]) for plan in plans]
    live, peak, finished = [0] * stages, [0] * stages, [False] * stages
    while not all(finished):
        moved = False
        for stage in range(stages):
            for message in list(pending[stage]):
                if message.direction == "send":
                    counterpart = Message("recv", stage, message.kind, message.micro_batch)
                    theirs = [m for m in pending[message.peer] if m.direction == "recv" and m.peer == stage]
                    mine = [m for m in pending[stage] if m.direction == "send" and m.peer == message.peer]
                    if theirs and mine[0] == message:
                        assert theirs[0] == counterpart, f"{message} of stage {stage} would match {theirs[0]}"
                        pending[stage].remove(message)
                        pending[message.peer].remove(counterpart)
                        moved = True
        for stage in range(stages):
            if finished[stage] or pending[stage]:
                continue
            moved = True
            if place[stage] == len(schedules[stage]):
                finished[stage] = True
                continue
            live[stage] += 1 if schedules[stage][place[stage]].kind == "F" else -1
            peak[stage] = max(peak[stage], live[stage])
            place[stage] += 1
            pending[stage] = list(plans[stage][place[stage]])
        assert moved, f"deadlock: stages wait for {pending}"
    return peak


@pytest.mark.parametrize("stages", range(1, 9))
def test_1f1b_ends_and_holds_no_more_than_it_must(stages):
    for count in range(1, 20):
        schedules = [one_f_one_b(stage, stages, count) for stage in range(stages)]
        for actions in schedules:
            kinds = itertools.groupby(sorted(actions), key=lambda action: action.kind)
            assert {kind: [a.micro_batch for a in group] for kind, group in kinds} == {
                "B": list(range(count)),
                "F": list(range(count)),
            }
        assert simulate(schedules) == [min(stages - stage, count) for stage in range(stages)]


@pytest.mark.parametrize("stages", range(1, 9))
def test_forward_only_ends(stages):
    for count in range(1, 12):
        simulate([forward_only(count)] * stages)


def test_the_simulator_sees_a_deadlock():
    """Stage 1 asks for gradients before it has sent on what they are gradients of."""
    first = [Action("F", 0), Action("B", 0)]
    second = [Action("B", 0), Action("F", 0)]
    with pytest.raises(AssertionError, match="deadlock|would match"):
        simulate([first, second, first])
