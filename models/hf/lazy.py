"""Lazy tensors, read and converted in blocks of rows, so that no large tensor is in memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

_BLOCK = 1 << 20  # elements


def blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of rows that cover a tensor, about a million elements each."""
    step = max(_BLOCK // math.prod(shape[1:]), 1)
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose rows are computed when indexed by a slice, in any dtype."""

    shape: tuple[int, ...]
    read: Callable[[slice], Tensor]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.read(rows)


T = TypeVar("T", bound=Tensor | LazyTensor, covariant=True)


class LazyState(Mapping[str, T]):
    """Tensors by name, read on access and not cached."""

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
