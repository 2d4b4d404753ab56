"""Pipeline runner: executes the actions of a schedule and exchanges activations and gradients between ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from ..mesh import Mesh
from ..parallel.collectives import exchange
from .schedule import Action, Message, Schedule, Transfer, count_chunks, received, sent, transfers
from .stage import Chunk, Stage, chunk_rank

Forward = Callable[[Chunk, int, Tensor | None], Tensor]
"""(chunk, micro-batch, hidden states of the previous chunk or None for the first) -> the chunk's output"""


def run_schedule(
    schedule: Schedule,
    stage: Stage,
    mesh: Mesh,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    forward: Forward,
    before_last_backward: Callable[[], None] | None = None,
) -> list[Tensor]:
    """Runs every micro-batch through the pipeline. Gradients accumulate in the parameters; under a schedule of
    forwards only, nothing is kept for a backward. A rank without chunks does nothing.

    A backward of the weights ("W") repeats that of the inputs ("I"), so a split backward costs time that its schedule
    does not count.

    Args:
        shapes: of each micro-batch's hidden states between chunks, [tokens, hidden].
        forward: returns for the last chunk the micro-batch's scalar loss, divided by the global count; or any tensor
            where there is no backward.
        before_last_backward: called once, before the action that completes the gradients: from then on they may be
            reduced as they arrive.

    Returns:
        `forward`'s outputs of the last chunk, detached, by micro-batch; an empty list on ranks without it.
    """
    pp, count = mesh.pp, len(shapes)
    schedules = [schedule(rank, pp.size, count) for rank in range(pp.size)] if stage.chunks else [[]]
    actions, batches = schedules[pp.rank], transfers(schedules)[pp.rank]
    last = max((i for i, action in enumerate(actions) if action.kind in "BW"), default=-1)
    run = _Run(stage, mesh, shapes, dtype, forward, count_chunks(schedules))
    with nullcontext() if last >= 0 else torch.no_grad():
        for i, action in enumerate(actions):
            run.exchange(batches[i])
            if i == last and before_last_backward is not None:
                before_last_backward()
            run.act(action)
        run.exchange(batches[-1])
    return [run.results[i] for i in sorted(run.results)]


class _Run:
    """One run of a schedule on one rank: messages in flight, and tensors kept for backwards."""

    def __init__(
        self,
        stage: Stage,
        mesh: Mesh,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        forward: Forward,
        chunks: int,
    ):
        self.mesh, self.shapes, self.dtype, self.forward, self.chunks = mesh, shapes, dtype, forward, chunks
        self.held = {chunk.index: chunk for chunk in stage.chunks}
        self.outbox: dict[Message, Tensor] = {}
        self.inbox: dict[Message | None, Tensor] = {}
        # By (chunk, micro-batch): the input, the output, and the output's gradient between "I" and "W".
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.gradients: dict[tuple[int, int], Tensor | None] = {}
        self.results: dict[int, Tensor] = {}

    def exchange(self, batch: Sequence[Transfer]) -> None:
        """Runs a batch of transfers and waits for its end."""
        pp, operations = self.mesh.pp, []
        for message, source, target in batch:
            if source == pp.rank:
                operations.append(dist.P2POp(dist.isend, self.outbox[message], pp.ranks[target], pp.group))
            else:
                buffer = torch.empty(self.shapes[message.micro_batch], dtype=self.dtype, device=self.mesh.device)
                self.inbox[message] = buffer
                operations.append(dist.P2POp(dist.irecv, buffer, pp.ranks[source], pp.group))
        exchange(operations, pp)
        self.outbox.clear()

    def act(self, action: Action) -> None:
        """Runs one action, whose message has arrived."""
        key, x = (action.chunk, action.micro_batch), self.inbox.pop(received(action, self.chunks), None)
        if action.kind == "F":
            self.send(action, self.run_forward(key, x))
        elif action.kind == "B":
            output = self.outputs.pop(key)
            if output.requires_grad:  # false where all parameters of the first chunks are frozen
                torch.autograd.backward(output, x)
            if key in self.inputs:
                self.send(action, self.inputs.pop(key).grad)
        elif action.kind == "I":
            self.gradients[key] = x
            if key in self.inputs:
                output = self.outputs[key]
                (gradient,) = torch.autograd.grad(output, self.inputs[key], x, retain_graph=True)
                self.send(action, gradient)
        else:
            output, gradient = self.outputs.pop(key), self.gradients.pop(key)
            self.inputs.pop(key, None)
            if output.requires_grad:
                torch.autograd.backward(output, gradient)

    def run_forward(self, key: tuple[int, int], x: Tensor | None) -> Tensor:
        """The output of a chunk, detached; where gradients are enabled, input and output are kept for the backward."""
        index, micro_batch = key
        if x is not None and torch.is_grad_enabled():
            self.inputs[key] = x.requires_grad_()
        output = self.forward(self.held[index], micro_batch, x)
        if torch.is_grad_enabled():
            self.outputs[key] = output
        if index == self.chunks - 1:
            self.results[micro_batch] = output.detach()
        return output.detach()

    def send(self, action: Action, tensor: Tensor | None) -> None:
        """Queues a tensor for the next exchange, or for this rank's own next chunk."""
        message = sent(action, self.chunks)
        if message is not None:
            assert tensor is not None
            box = self.inbox if chunk_rank(message.chunk, self.mesh.pp.size) == self.mesh.pp.rank else self.outbox
            box[message] = tensor.contiguous()
