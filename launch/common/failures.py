"""Exits after errors under a launcher: one rank reports and writes torchrun's error file, the others wait."""

from __future__ import annotations

import sys
import time
import traceback
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from trialign.engine.heartbeat import HEARTBEAT

from .env import is_main
from .watchdog import WAIT, Watchdog


def leave(error: Exception, watchdog: Watchdog | None = None, *, alike: bool = False) -> NoReturn:
    """Exits this rank after an error: with one line where users can cause it, else with a traceback. The first rank to
    fail reports.

    Args:
        watchdog: None where there are no other ranks, or they have not joined yet.
        alike: every rank has the same error.
    """
    if watchdog is not None and HEARTBEAT.failed_collective and isinstance(error, RuntimeError):
        report = watchdog.lost()
        if not report:
            wait()
        error = ConnectionError(f"{report}\nin {HEARTBEAT.failed_collective}: {error}")
    if not (is_main() if alike else watchdog is None or watchdog.first()):
        wait()
    try:
        raise error
    except Exception:  # the handler writes the traceback of the exception being handled
        get_error_handler().record_exception(error)
    if isinstance(error, ValueError | OSError | ArithmeticError):
        sys.exit(f"error: {error}")
    traceback.print_exception(error)
    sys.exit(1)


def leave_together(message: str, main: bool) -> NoReturn:
    """Exits every rank after an error that all of them have; the main one reports it."""
    if not main:
        wait()
    try:
        raise RuntimeError(message)
    except RuntimeError as error:
        get_error_handler().record_exception(error)
    sys.exit(message)


def wait() -> NoReturn:
    """Waits until the reporting rank has exited, then exits: the launcher blames the first rank that exits."""
    time.sleep(WAIT)
    sys.exit(1)
