"""Pipeline stages: the chunks of layers that each rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..mesh import Mesh


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers that one rank runs as a unit.

    Attributes:
        index: position in the whole pipeline: 0 has the embedding, the last one the final norm and the head.
        layers: indices in the whole model.
    """

    index: int
    layers: range
    has_embedding: bool
    has_head: bool


@dataclass(frozen=True)
class Stage:
    """The chunks of one rank in order: one, several when interleaved, none on a rank outside the mesh."""

    chunks: tuple[Chunk, ...]

    @property
    def layers(self) -> list[int]:
        """Indices of all layers of this rank."""
        return [layer for chunk in self.chunks for layer in chunk.layers]

    @property
    def has_embedding(self) -> bool:
        return any(chunk.has_embedding for chunk in self.chunks)

    @property
    def has_head(self) -> bool:
        return any(chunk.has_head for chunk in self.chunks)


def chunk_rank(chunk: int, ranks: int) -> int:
    """Rank along pp that holds a chunk: round-robin (https://arxiv.org/abs/2104.04473)."""
    return chunk % ranks


def split_layers(num_layers: int, ranks: int, sizes: Sequence[int] = (), chunks: int = 1) -> list[range]:
    """Layers of every chunk of a pipeline, in model order.

    Without `sizes` chunks differ by one layer at most, with the larger ones right before the last: the last has the
    head too, which costs as much as several layers, and the first ranks keep the most live micro-batches, so that a
    layer there takes the most memory.

    Args:
        ranks: size of pp.
        sizes: number of layers of each chunk; empty for the default.
        chunks: per rank.

    Raises:
        ValueError: fewer layers than chunks; sizes that are not one per chunk, below 1, or do not add up.
    """
    count = ranks * chunks
    if sizes:
        if len(sizes) != count or min(sizes) < 1 or sum(sizes) != num_layers:
            raise ValueError(
                f"parallel.pp_layers={list(sizes)}: must be {count} numbers of at least 1 (pp={ranks}) that add up to"
                f" num_layers={num_layers}"
            )
    elif not 1 <= count <= num_layers:
        raise ValueError(f"num_layers={num_layers} cannot be shared by pp={count}; allowed pp: 1 to {num_layers}")
    else:
        least, more = divmod(num_layers, count)
        sizes = [least + (count - 1 - more <= chunk < count - 1) for chunk in range(count)]
    return [range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]


def stage_of(mesh: Mesh, num_layers: int, sizes: Sequence[int] = (), chunks: int = 1) -> Stage:
    """This rank's chunks. Arguments and errors are those of `split_layers`."""
    layers = split_layers(num_layers, mesh.pp.size, sizes, chunks) if mesh.is_member else []
    last = len(layers) - 1
    held = (i for i in range(len(layers)) if chunk_rank(i, mesh.pp.size) == mesh.pp.rank)
    return Stage(tuple(Chunk(i, layers[i], i == 0, i == last) for i in held))
