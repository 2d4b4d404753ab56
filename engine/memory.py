"""Memory by holder (parameters, gradients, optimizer, cache), and the report of an allocation that failed."""

from __future__ import annotations

import errno
import re
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

Holder = Literal["parameters", "gradients", "optimizer", "cache", "activations"]
HOLDERS: tuple[Holder, ...] = ("parameters", "gradients", "optimizer", "cache")  # "activations" is the rest
Owner = TypeVar("Owner")

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
REQUESTS = (
    re.compile(r"Tried to allocate (?P<number>[\d.]+) (?P<unit>bytes|KiB|MiB|GiB)"),  # torch's CUDA allocator
    re.compile(r"you tried to allocate (?P<number>\d+) (?P<unit>bytes)"),  # torch's CPU allocator
)
FAILURES = re.compile(r"can't allocate memory|bad_alloc|out of memory|ALLOC_FAILED")


class Usage(NamedTuple):
    """Bytes on a device."""

    used: int  # by this process
    free: int  # for this process
    total: int


def is_allocation_failure(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated, on a device or on the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and FAILURES.search(str(error)) is not None


def requested_bytes(error: BaseException) -> int | None:
    """Bytes that a failed allocation asked for; None where the error does not say."""
    for pattern in REQUESTS:
        if found := pattern.search(str(error)):
            return int(float(found["number"]) * UNITS[found["unit"]])
    return None


@contextmanager
def allocating(holder: Holder) -> Iterator[None]:
    """Names what is allocated within the block in the report of a failure; without a block it is activations."""
    try:
        yield
    except Exception as error:
        if is_allocation_failure(error):
            error.holder = holder  # pyright: ignore[reportAttributeAccessIssue]
        raise


class MemoryHolders:
    """Tensors on this rank's device by holder, asked for when an allocation fails.

    Attributes:
        options: (phase, holder) -> options with their values that lower what it holds, "" for none.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.options: Callable[[str, Holder], str] = lambda phase, holder: ""
        self._owners: list[tuple[weakref.ref[Any], Callable[[Any], Mapping[Holder, Iterable[Tensor]]]]] = []

    def add(self, owner: Owner, tensors: Callable[[Owner], Mapping[Holder, Iterable[Tensor]]]) -> None:
        """Adds an object's tensors for as long as it exists; `tensors` must not refer to it."""
        self._owners = [known for known in self._owners if known[0]() is not None]
        self._owners.append((weakref.ref(owner), tensors))

    def held(self) -> dict[Holder, int]:
        """Bytes by holder. Memory that several tensors share is counted once, for the first holder."""
        tensors: dict[Holder, list[Tensor]] = {holder: [] for holder in HOLDERS}
        for reference, own in self._owners:
            if (owner := reference()) is not None:
                for holder, given in own(owner).items():
                    tensors[holder] += given
        seen: set[int] = set()
        held: dict[Holder, int] = {}
        for holder, given in tensors.items():
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in given if x.numel()}
            held[holder] = sum(size for pointer, size in storages.items() if pointer not in seen)
            seen |= storages.keys()
        return held

    @contextmanager
    def explained(self, phase_of: Callable[[BaseException], str]) -> Iterator[None]:
        """Adds `report` as a note to an error within the block that says that memory could not be allocated; once,
        in the innermost block.

        Args:
            phase_of: the phase that an error was raised in.
        """
        try:
            yield
        except Exception as error:
            if is_allocation_failure(error) and not hasattr(error, "explained"):
                error.explained = True  # pyright: ignore[reportAttributeAccessIssue]
                error.add_note(self.report(error, phase_of(error)))
            raise

    def report(self, error: BaseException, phase: str) -> str:
        """Phase, what was asked for, what holds the memory, and the options that lower it."""
        usage, held = usage_of(self.device), self.held()
        held["activations"] = max(0, usage.used - sum(held.values()))
        asking: Holder = getattr(error, "holder", "activations")
        asked = requested_bytes(error)
        size = "an unknown size" if asked is None else gibibytes(asked)
        shares = ", ".join(f"{holder} {gibibytes(size)}" for holder, size in held.items())
        lines = [
            f"out of memory in phase {phase}: asked for {size} of {asking}; {self.device} has {gibibytes(usage.free)}"
            f" free of {gibibytes(usage.total)}",
            f"held: {shares} (with temporary buffers and all that torch does not count)",
        ]
        largest = sorted(held, key=lambda holder: held[holder], reverse=True)
        for holder in dict.fromkeys((asking, *largest)):
            if options := self.options(phase, holder):
                lines.append(f"{holder} would be lowered by {options}")
            if len(lines) == 4:
                break
        return "\n".join(lines)


def gibibytes(size: int) -> str:
    """A size in GiB with two digits after the point, or in MiB below 0.1 GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def free_memory(device: torch.device, ranks: int) -> int:
    """Bytes that this rank may allocate on the device; on a CPU its part of what the system calls available.

    Args:
        ranks: that share the CPU's memory.
    """
    free = usage_of(device).free
    return free if device.type == "cuda" else free // ranks


def usage_of(device: torch.device) -> Usage:
    """Use of a device by this process: CUDA tensors, or the pages of the process on a CPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return Usage(used, free + reserved - used, total)
    if not sys.platform.startswith("linux"):
        return Usage(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0)  # bytes on macOS
    lines = [line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()]
    sizes = {words[0]: int(words[1]) * 1024 for words in lines}
    pages = [
        int(word) * resource.getpagesize() for word in Path("/proc/self/statm").read_text(encoding="ascii").split()
    ]
    free, total = sizes["MemAvailable:"], sizes["MemTotal:"]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]  # ulimit -v
    if limit != resource.RLIM_INFINITY:
        free, total = min(free, max(0, limit - pages[0])), min(total, limit)
    return Usage(pages[1], free, total)
