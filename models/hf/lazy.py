"""Whole tensors that are never held whole: read and converted block by block, one tensor after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

_BLOCK = 1 << 20  # numbers of a large tensor that are converted at once


def blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Rows [start, stop) of a tensor of this shape, a few megabytes at a time."""
    step = max(_BLOCK // math.prod(shape[1:]), 1)
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


@dataclass(frozen=True)
class LazyTensor:
    """A whole tensor by its rows: indexing it by a slice computes these rows, in any dtype."""

    shape: tuple[int, ...]
    read: Callable[[slice], Tensor]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.read(rows)


T = TypeVar("T", bound=Tensor | LazyTensor, covariant=True)


class LazyState(Mapping[str, T]):
    """Whole tensors by name, each read when it is asked for and not kept."""

    def __init__(self, names: Iterable[str], read: Callable[[str], T]):
        self.names, self.read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> T:
        if name not in self.names:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
