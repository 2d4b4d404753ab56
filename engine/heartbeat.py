"""Heartbeat of this process, for the watchdog: phase, current collective, and progress."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Heartbeat:
    """State of the main thread; one object a process.

    Attributes:
        phase: of the run, for messages.
        collectives: number of collectives started; constant while the process hangs or computes on its own.
        progress: number of collectives and of parts of work done (`tick`); constant while the process hangs.
        waits_in: name of the collective that has not returned yet; "" outside. On CUDA they return at once.
        phase_changed: set when the phase changes.
        failed_collective: name of the collective that failed, as happens when another rank exits; "" if none has.
    """

    def __init__(self) -> None:
        self.phase, self.collectives, self.progress, self.waits_in = "loading", 0, 0, ""
        self.failed_collective, self.phase_changed = "", threading.Event()
        self._failed, self._failed_in = 0, ""

    def phase_of(self, error: BaseException) -> str:
        """The innermost phase that an exception has left, or the current one."""
        return self._failed_in if self._failed == id(error) else self.phase

    @contextmanager
    def at(self, phase: str) -> Iterator[None]:
        """Sets the phase within the block."""
        before, self.phase = self.phase, phase
        self.phase_changed.set()
        try:
            yield
        except BaseException as error:
            if self._failed != id(error) and not isinstance(error, GeneratorExit):  # in the innermost phase
                self._failed, self._failed_in = id(error), phase
            raise
        finally:
            self.phase = before

    def tick(self) -> None:
        """Counts a part of work, such as a micro-batch, a decode step, a tensor written: the process does not hang."""
        self.progress += 1

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Counts a collective, and records its name until it returns."""
        self.collectives += 1
        self.progress += 1
        self.waits_in = name
        try:
            yield
        except RuntimeError:
            self.failed_collective = name
            raise
        finally:
            self.waits_in = ""


HEARTBEAT = Heartbeat()
