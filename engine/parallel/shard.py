"""Shards: the rectangles of whole tensors that a parameter, an optimizer state or a checkpoint's file holds.

Every parameter carries its own description, so nothing matches on names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..mesh import Axis

TILE = 64
"""Rows that a share is a multiple of where it can be: a tile of a GPU's matrix units, and a block of NF4."""


@dataclass(frozen=True)
class Split:
    """A length that is cut over the ranks of an axis: rank r holds [bounds[r], bounds[r + 1]), none where they meet."""

    axis: Axis
    bounds: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.bounds[-1]

    @property
    def start(self) -> int:
        """Where this rank's share begins."""
        return self.bounds[self.axis.rank]

    @property
    def size(self) -> int:
        """This rank's share."""
        return self.sizes[self.axis.rank]

    @property
    def sizes(self) -> list[int]:
        """The shares of all ranks."""
        return [stop - start for start, stop in pairwise(self.bounds)]

    def times(self, width: int) -> Split:
        """The same cut of a length in which each one is `width` long."""
        return Split(self.axis, tuple(bound * width for bound in self.bounds))


def split(size: int, axis: Axis) -> Split:
    """Equal shares where the axis divides `size`. Where it does not, shares differ by one tile at most, or by one where
    there is less than a tile a rank; only a size below the number of ranks leaves ranks with nothing."""
    unit = 1 if size % axis.size == 0 or size < TILE * axis.size else TILE
    units = -(-size // unit)
    return Split(axis, tuple(min(rank * units // axis.size * unit, size) for rank in range(axis.size + 1)))


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
    `adapter`: not a weight of the model but of an adapter on one (engine/parallel/lora.py).
    `experts`: only this place of ep holds these pieces: DP ranks of one edp hold copies of it, not all of dp.
    """

    pieces: tuple[Piece, ...]
    axis: str | None = None
    duplicate: bool = False
    adapter: bool = False
    experts: bool = False


@dataclass(frozen=True)
class Entry:
    """One rectangle of a whole tensor named `role/kind/weight`, as one rank holds it.

    `tensor` is a view of `shape` [n] or [rows, cols] that a load fills in place; `owned` is true on the one rank that
    saves this rectangle.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor
    owned: bool


def flat_rectangles(
    piece_shape: tuple[int, ...], piece_offset: tuple[int, ...], start: int, stop: int
) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Cuts the run [start, stop) of a row-major piece into rectangles of the whole tensor.

    Args:
        piece_shape: [n] or [rows, cols] of the piece.
        piece_offset: where the piece begins in the whole tensor.

    Returns:
        (offset in the whole tensor, shape, place of its first number in the flattened piece), at most three.
    """
    if len(piece_shape) == 1:
        return [((piece_offset[0] + start,), (stop - start,), start)] if start < stop else []
    rectangles, at, cols = [], start, piece_shape[1]
    while at < stop:
        row, col = divmod(at, cols)
        whole_rows = (stop - at) // cols if col == 0 else 0
        shape = (whole_rows, cols) if whole_rows else (1, min(cols - col, stop - at))
        rectangles.append(((piece_offset[0] + row, piece_offset[1] + col), shape, at))
        at += math.prod(shape)
    return rectangles


def sharded_parameter(shard: Shard, *, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialized parameter that holds the shard's pieces, stacked along dim 0."""
    shape = (sum(piece.shape[0] for piece in shard.pieces), *shard.pieces[0].shape[1:])
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
    parameter.shard = shard  # pyright: ignore[reportAttributeAccessIssue]
    return parameter


def shard_of(parameter: nn.Parameter) -> Shard:
    """The shard description every parameter of trialign carries."""
    shard = getattr(parameter, "shard", None)
    assert isinstance(shard, Shard), "a parameter without a shard description"
    return shard


class Sink(Protocol):
    """What a weight's numbers can be copied into: a view of a parameter, or a place that keeps them quantized."""

    def copy_(self, source: Tensor, /) -> object: ...


class Store(Protocol):
    """Where the numbers of a parameter on the meta device are really kept."""

    def sink(self, piece: int) -> Sink: ...


def place(parameter: nn.Parameter, store: Store) -> None:
    """Says that `parameter`, which must be on the meta device, only stands for what `store` keeps."""
    assert parameter.is_meta
    parameter.store = store  # pyright: ignore[reportAttributeAccessIssue]


class Slot(NamedTuple):
    """Where the numbers of one rectangle of a whole tensor go."""

    name: str  # of the parameter
    piece: Piece
    sink: Sink


def slots(model: nn.Module) -> Iterator[Slot]:
    """Every piece of every parameter."""
    for name, parameter in model.named_parameters():
        yield from (Slot(name, piece, sink) for piece, sink in sinks(parameter))


def sinks(parameter: nn.Parameter) -> Iterator[tuple[Piece, Sink]]:
    """Every piece of a parameter that holds numbers, with what they go into, of the piece's shape."""
    store: Store | None = getattr(parameter, "store", None)
    begin = 0
    for i, piece in enumerate(shard_of(parameter).pieces):
        if math.prod(piece.shape):
            yield piece, parameter.data[begin : begin + piece.shape[0]] if store is None else store.sink(i)
        begin += piece.shape[0]
