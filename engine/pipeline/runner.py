"""Executes a pipeline schedule: moves activations and gradients between stages, runs forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..mesh import Mesh
from ..parallel.collectives import exchange
from .schedule import Action, Message, forward_only, messages, one_f_one_b

Forward = Callable[[int, Tensor | None], Tensor]
"""(micro-batch, hidden states from the previous stage or None on the first) -> what this stage makes of it."""


class _Transfers:
    """Buffers of one run of a schedule, and the batches of sends and receives between its actions."""

    def __init__(self, mesh: Mesh, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype):
        self.mesh, self.shapes, self.dtype = mesh, shapes, dtype
        self.outbox: dict[Action, Tensor] = {}
        self.inbox: dict[Action, Tensor] = {}

    def exchange(self, batch: list[Message]) -> None:
        pp, operations = self.mesh.pp, []
        for message in batch:
            action, peer = Action(message.kind, message.micro_batch), pp.ranks[message.peer]
            if message.direction == "send":
                operations.append(dist.P2POp(dist.isend, self.outbox[action], peer, pp.group))
            else:
                buffer = torch.empty(self.shapes[message.micro_batch], dtype=self.dtype, device=self.mesh.device)
                self.inbox[action] = buffer
                operations.append(dist.P2POp(dist.irecv, buffer, peer, pp.group))
        exchange(operations, pp)
        self.outbox.clear()


def run_forward(mesh: Mesh, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, forward: Forward) -> list[Tensor]:
    """Runs every micro-batch forward through all stages, without gradients.

    Args:
        shapes: of each micro-batch's hidden states between stages, [tokens, hidden].

    Returns:
        what `forward` gave on the last stage, one per micro-batch; an empty list on the other stages.
    """
    actions = forward_only(len(shapes))
    transfers = _Transfers(mesh, shapes, dtype)
    results = []
    with torch.no_grad():
        batches = messages(actions, mesh.pp.rank, mesh.pp.size)
        for action, batch in zip(actions, batches, strict=False):
            transfers.exchange(batch)
            made = forward(action.micro_batch, transfers.inbox.pop(action, None))
            if mesh.is_last_stage:
                results.append(made)
            else:
                transfers.outbox[action] = made.contiguous()
        transfers.exchange(batches[-1])
    return results


def run_forward_backward(
    mesh: Mesh,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    forward: Forward,
    before_last_backward: Callable[[], None] | None = None,
) -> None:
    """Runs every micro-batch forward and backward by 1F1B; gradients accumulate in the parameters.

    Args:
        forward: on the last stage it must return the micro-batch's scalar loss, already divided by the global count.
        before_last_backward: called once, when the next backward completes the gradients (they may be reduced from
            then on).
    """
    actions = one_f_one_b(mesh.pp.rank, mesh.pp.size, len(shapes))
    transfers = _Transfers(mesh, shapes, dtype)
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    batches = messages(actions, mesh.pp.rank, mesh.pp.size)
    for action, batch in zip(actions, batches, strict=False):
        transfers.exchange(batch)
        received = transfers.inbox.pop(action, None)
        i = action.micro_batch
        if action.kind == "F":
            if received is not None:
                inputs[i] = received.requires_grad_()
            outputs[i] = forward(i, received)
            if not mesh.is_last_stage:
                transfers.outbox[action] = outputs[i].detach().contiguous()
        else:
            if i == len(shapes) - 1 and before_last_backward is not None:
                before_last_backward()
            output = outputs.pop(i)
            if output.requires_grad:  # a first stage may hold nothing that is trained
                torch.autograd.backward(output, received)
            if i in inputs:
                gradient = inputs.pop(i).grad
                assert gradient is not None
                transfers.outbox[action] = gradient
    transfers.exchange(batches[-1])
