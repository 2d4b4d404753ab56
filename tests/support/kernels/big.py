"""Tensors of more than 2^31 elements, for tests of index arithmetic: address space, memory only where it is used."""

import mmap

import torch


def untouched(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """[elements] of zeros that are not written yet."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)
