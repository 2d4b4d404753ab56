"""Failures under a launcher: told once, by one rank, which also writes torchrun's error file; the others end."""

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
    """Ends this rank of an error: in a line where users can cause it, else with a traceback. The first rank tells.

    Args:
        watchdog: None where there are no other ranks, or they have not met yet.
        alike: every rank has this very error.
    """
    if watchdog is not None and HEARTBEAT.broken and isinstance(error, RuntimeError):
        known = watchdog.lost()
        if not known:
            wait()
        error = ConnectionError(f"{known}\nin {HEARTBEAT.broken}: {error}")
    if not (is_main() if alike else watchdog is None or watchdog.first()):
        wait()
    try:
        raise error
    except Exception:  # the handler writes the traceback of what is handled
        get_error_handler().record_exception(error)
    if isinstance(error, ValueError | OSError | ArithmeticError):
        sys.exit(f"error: {error}")
    traceback.print_exception(error)
    sys.exit(1)


def leave_together(message: str, main: bool) -> NoReturn:
    """Ends every rank of what all of them know; the main one tells it."""
    if not main:
        wait()
    try:
        raise RuntimeError(message)
    except RuntimeError as error:
        get_error_handler().record_exception(error)
    sys.exit(message)


def wait() -> NoReturn:
    """Ends a rank that has nothing to tell, after the one that has.

    A launcher ends all ranks as soon as one has left, and takes the first that left for the cause.
    """
    time.sleep(WAIT)
    sys.exit(1)
