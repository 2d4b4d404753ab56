"""The stage: one rank's part of a pipeline, as a list of chunks of layers. The mesh knows ranks, the stage layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..mesh import Mesh


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers that one rank runs as a whole.

    Attributes:
        index: its place in the whole pipeline: 0 has the embedding, the last one the final norm and the head.
        layers: numbers in the whole model.
    """

    index: int
    layers: range
    has_embedding: bool
    has_head: bool


@dataclass(frozen=True)
class Stage:
    """The chunks that one rank holds, first to last: one, several when interleaved, none on a rank outside the mesh."""

    chunks: tuple[Chunk, ...]

    @property
    def layers(self) -> list[int]:
        """Numbers of all layers here."""
        return [layer for chunk in self.chunks for layer in chunk.layers]

    @property
    def has_embedding(self) -> bool:
        return any(chunk.has_embedding for chunk in self.chunks)

    @property
    def has_head(self) -> bool:
        return any(chunk.has_head for chunk in self.chunks)


def chunk_rank(chunk: int, ranks: int) -> int:
    """Place along pp of the rank that holds a chunk: chunks go round the ranks (https://arxiv.org/abs/2104.04473)."""
    return chunk % ranks


def split_layers(num_layers: int, ranks: int, sizes: Sequence[int] = (), chunks: int = 1) -> list[range]:
    """Layers of every chunk of a pipeline, in the order of the model.

    Without `sizes` chunks differ by one layer at most. The larger ones come right before the last: the last has the
    head beside its layers, which costs as much as several of them, and the first ranks keep the most micro-batches
    alive, so a layer is dearest there.

    Args:
        ranks: of pp.
        sizes: layers of each chunk, where they are given.
        chunks: on every rank.

    Raises:
        ValueError: fewer layers than chunks; sizes that are not one a chunk, below 1, or do not add up.
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
