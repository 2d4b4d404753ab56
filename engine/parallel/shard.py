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
"""Rows that a shard is a multiple of where possible: a tile of a GPU's matrix units, and a block of NF4."""


@dataclass(frozen=True)
class Split:
    """A length divided over the ranks of an axis: rank r holds [bounds[r], bounds[r + 1]), which may be empty."""

    axis: Axis
    bounds: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.bounds[-1]

    @property
    def start(self) -> int:
        """Where this rank's part begins."""
        return self.bounds[self.axis.rank]

    @property
    def size(self) -> int:
        """Length of this rank's part."""
        return self.sizes[self.axis.rank]

    @property
    def sizes(self) -> list[int]:
        """Lengths on all ranks."""
        return [stop - start for start, stop in pairwise(self.bounds)]

    def times(self, width: int) -> Split:
        """The same split, of units that are each `width` long."""
        return Split(self.axis, tuple(bound * width for bound in self.bounds))


def split(size: int, axis: Axis) -> Split:
    """Splits `size` equally where the axis divides it. Otherwise parts differ by at most one tile, or by one where
    there is less than a tile a rank; a rank gets nothing only where `size` is below the number of ranks."""
    unit = 1 if size % axis.size == 0 or size < TILE * axis.size else TILE
    units = -(-size // unit)
    return Split(axis, tuple(min(rank * units // axis.size * unit, size) for rank in range(axis.size + 1)))


@dataclass(frozen=True)
class Piece:
    """A rectangle of one whole tensor. A fused parameter stacks several pieces along dim 0.

    `part` names the tensor within a fused parameter, and is "" for an unfused one.
    """

    part: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """Description of a parameter on this rank.

    Attributes:
        axis: the mesh axis it is sharded along; None where it is replicated over tp.
        duplicate: a tied copy (the head on the last pipeline stage) of another rank's tensor, counted and saved there.
        adapter: belongs to an adapter (lora.py), not to the model.
        experts: its pieces are held at one place of ep only: replicated over edp, not over all of dp.
    """

    pieces: tuple[Piece, ...]
    axis: str | None = None
    duplicate: bool = False
    adapter: bool = False
    experts: bool = False


def full_piece(shape: tuple[int, ...], part: str = "") -> Piece:
    """The whole of a tensor as one piece."""
    return Piece(part, shape, (0,) * len(shape), shape)


def shard_along(at: Split, dim: int, shape: tuple[int, ...], part: str = "") -> Piece:
    """This rank's piece of a tensor of `shape` that is split along `dim`."""
    assert shape[dim] == at.total, f"dim {dim} of {shape} does not have the split's length {at.total}"
    offset = tuple(at.start if d == dim else 0 for d in range(len(shape)))
    return Piece(part, shape, offset, tuple(at.size if d == dim else n for d, n in enumerate(shape)))


def replicated(*shape: int) -> Shard:
    """A parameter that every rank of tp holds whole."""
    return Shard((full_piece(shape),))


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
    """Splits the run [start, stop) of a row-major piece into rectangles of the whole tensor.

    Args:
        piece_shape: [n] or [rows, cols] of the piece.
        piece_offset: where the piece begins in the whole tensor.

    Returns:
        (offset in the whole tensor, shape, index of its first number in the flattened piece), at most three.
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
    """The shard description that every parameter of trialign carries."""
    shard = getattr(parameter, "shard", None)
    assert isinstance(shard, Shard), "a parameter without a shard description"
    return shard


class Sink(Protocol):
    """Target that a piece's numbers are copied into: a view of a parameter, or storage that quantizes them."""

    def copy_(self, source: Tensor, /) -> object: ...


class Store(Protocol):
    """Storage of a parameter that is on the meta device."""

    def sink(self, piece: int) -> Sink: ...


def set_store(parameter: nn.Parameter, store: Store) -> None:
    """Makes `parameter`, which must be on the meta device, a placeholder of `store`."""
    assert parameter.is_meta
    parameter.store = store  # pyright: ignore[reportAttributeAccessIssue]


class Slot(NamedTuple):
    """Target of one rectangle of a whole tensor."""

    name: str  # of the parameter
    piece: Piece
    sink: Sink


def slots(model: nn.Module) -> Iterator[Slot]:
    """Every piece of every parameter."""
    for name, parameter in model.named_parameters():
        yield from (Slot(name, piece, sink) for piece, sink in sinks(parameter))


def sinks(parameter: nn.Parameter) -> Iterator[tuple[Piece, Sink]]:
    """Every non-empty piece of a parameter, with its sink of the piece's shape."""
    store: Store | None = getattr(parameter, "store", None)
    begin = 0
    for i, piece in enumerate(shard_of(parameter).pieces):
        if math.prod(piece.shape):
            yield piece, parameter.data[begin : begin + piece.shape[0]] if store is None else store.sink(i)
        begin += piece.shape[0]
