"""What part of the whole model a parameter holds: said by the parameter itself, so nothing matches on names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Piece:
    """A rectangle of one whole tensor. A fused parameter stacks several pieces along dim 0.

    `part` names the tensor within a fused parameter ("q", "k", "v", "gate", "up"); it is "" for an unfused one.
    """

    part: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """`axis`: the mesh axis the parameter is cut along, None where every rank of tp holds it whole.

    `duplicate`: a tied copy (the head on the last pipeline stage) of another rank's tensor, counted and saved there.
    """

    pieces: tuple[Piece, ...]
    axis: str | None = None
    duplicate: bool = False


def shard_of(parameter: nn.Parameter) -> Shard:
    """The shard description every parameter of trialign carries."""
    shard = getattr(parameter, "shard", None)
    assert isinstance(shard, Shard), "a parameter without a shard description"
    return shard
