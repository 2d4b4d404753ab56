"""Pipeline schedules as data: what a stage does, in order. The runner executes any of them; the tests simulate them."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Action(NamedTuple):
    """Forward ("F") or backward ("B") of one micro-batch on this stage."""

    kind: Literal["F", "B"]
    micro_batch: int


def forward_only(count: int) -> list[Action]:
    """Every micro-batch forward, for scoring."""
    return [Action("F", i) for i in range(count)]


def one_f_one_b(stage: int, stages: int, count: int) -> list[Action]:
    """1F1B (PipeDream-flush, https://arxiv.org/abs/2104.04473 section 2.2).

    `min(stages - 1 - stage, count)` forwards to fill the pipe, then forward and backward in turn, then the backwards
    left over: at most `min(stages - stage, count)` micro-batches are alive on a stage.
    """
    warm_up = min(stages - 1 - stage, count)
    actions = forward_only(warm_up)
    for i in range(count - warm_up):
        actions += [Action("F", warm_up + i), Action("B", i)]
    return actions + [Action("B", i) for i in range(count - warm_up, count)]


class Message(NamedTuple):
    """One transfer of a micro-batch: activations go to the next stage ("F"), gradients to the previous one ("B")."""

    direction: Literal["send", "recv"]
    peer: int  # stage
    kind: Literal["F", "B"]
    micro_batch: int


def messages(actions: list[Action], stage: int, stages: int) -> list[list[Message]]:
    """The transfers around each action: entry i happens before action i, the last one after all of them.

    What one action makes is sent together with the receipt of what the next one needs. Posted as one batch they match
    by order (NCCL knows no tags), and neighbors that send to each other at the same time cannot wait for each other.
    """

    def needs(action: Action) -> list[Message]:
        peer = stage - 1 if action.kind == "F" else stage + 1
        return [Message("recv", peer, *action)] if 0 <= peer < stages else []

    def makes(action: Action) -> list[Message]:
        peer = stage + 1 if action.kind == "F" else stage - 1
        return [Message("send", peer, *action)] if 0 <= peer < stages else []

    before = [needs(action) for action in actions] + [[]]
    after = [[]] + [makes(action) for action in actions]
    return [sent + received for sent, received in zip(after, before, strict=True)]
