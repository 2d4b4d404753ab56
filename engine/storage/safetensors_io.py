"""Streaming writer of safetensors files: one tensor at a time in host memory, hashed while it is written.

The library's save_file converts every tensor to bytes before it writes the first. The format: 8 bytes of header length,
a JSON header (name -> dtype, shape, byte range), then the numbers (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from ..heartbeat import HEARTBEAT
from ..transfer import HostCopy

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

PART = 64 << 20
"""Bytes of a copy from a device; of one size, so that its pinned memory is used again."""


def write_stream(
    path: Path, described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[Tensor]
) -> str:
    """Writes and fsyncs a file; each tensor is freed before the next is requested.

    SHA-256 can be checked with `sha256sum`, and runs at 1.7 GB/s a core on CPUs with instructions for it (since about
    2019), faster than a disk writes.

    Args:
        described: (dtype, shape) by name, in the order of `tensors`.
        tensors: each whole, or in consecutive blocks of rows.

    Returns:
        The file's SHA-256 in hex.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in described.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    total = 8 + len(head) + end

    # A second thread hashes while this one writes; both release the interpreter's lock.
    with open(path, "wb") as file, ThreadPoolExecutor(1) as hasher:
        for part in chain((len(head).to_bytes(8, "little"), head), chain.from_iterable(map(_numbers, tensors))):
            hashed = hasher.submit(digest.update, part)
            file.write(part)
            hashed.result()
            HEARTBEAT.tick()
            del part, hashed  # or the loop would hold one tensor while it requests the next
        assert file.tell() == total, f"{path}: {file.tell()} bytes written, {total} described"
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _numbers(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor; one on a device in parts through pinned memory, the next of which is copied meanwhile."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    if not flat.is_cuda:
        yield flat.numpy().data
        return
    copies: deque[HostCopy] = deque()
    for part in flat.split(PART):
        copies.append(HostCopy(part))
        if len(copies) > 1:
            yield copies.popleft().numpy().data
    yield copies.popleft().numpy().data


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes in hex."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    HEARTBEAT.tick()
    return digest
