"""What this process is at: its phase, the collective it waits in, how many it has begun. A watchdog reads it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Heartbeat:
    """One for the whole process, for a process has one main thread whose progress is asked for.

    Attributes:
        phase: what the main thread is at, as messages name it.
        collectives: how many were begun: a number that stands still is a process that makes no progress, or one that
            works by itself.
        waits_in: the collective that has not returned yet; "" outside. On CUDA they return at once.
        moved: is set when the phase changes.
        broken: the collective that failed, as it does when another rank ends; "" while none has.
    """

    def __init__(self) -> None:
        self.phase, self.collectives, self.waits_in = "loading", 0, ""
        self.broken, self.moved = "", threading.Event()

    @contextmanager
    def at(self, phase: str) -> Iterator[None]:
        """Names the phase within."""
        before, self.phase = self.phase, phase
        self.moved.set()
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Counts a collective, and names it until it returns."""
        self.collectives += 1
        self.waits_in = name
        try:
            yield
        except RuntimeError:
            self.broken = name
            raise
        finally:
            self.waits_in = ""


HEARTBEAT = Heartbeat()
