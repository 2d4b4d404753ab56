"""Exits after errors: one rank reports rank, phase and cause, and writes torchrun's error file; the others wait."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from trialign.engine.errors import cause
from trialign.engine.heartbeat import HEARTBEAT

from .env import is_main, world_size
from .signals import Exit, StopSignals
from .watchdog import WAIT

UNWIND = 5.0  # seconds for files and processes to be closed after an error; a library may wait for other ranks


@contextmanager
def reported(signals: StopSignals) -> Iterator[None]:
    """Reports whatever the block raises, and raises Exit; a SystemExit or KeyboardInterrupt of some function too, which
    would leave the other ranks waiting."""
    try:
        yield
    except Exit:
        raise
    except BaseException as error:
        leave(error, signals)


@contextmanager
def ended() -> Iterator[None]:
    """Ends the process where the block raises Exit and Python's own way out might not: after an error with other ranks,
    whose collectives are left, and on CUDA, where work may be left."""
    try:
        yield
    except Exit as end:
        if not (end.failed and world_size() > 1 or torch.cuda.is_initialized()):
            raise
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


def leave(error: BaseException, signals: StopSignals | None = None, *, alike: bool = False) -> NoReturn:
    """Raises Exit after an error is reported: in one line where users can cause it, else with a traceback. The first
    rank to fail reports.

    Args:
        signals: of the run; None where it has not begun.
        alike: every rank has the same error.
    """
    watchdog, phase = None if signals is None else signals.watchdog, HEARTBEAT.phase_of(error)
    if watchdog is not None and HEARTBEAT.failed_collective and isinstance(error, RuntimeError):
        report = watchdog.lost()
        if not report and signals is not None and signals.reason:  # the launcher ends this rank
            raise Exit(1, failed=True)
        if not report:
            wait()
        error = ConnectionError(f"{report}\nin {HEARTBEAT.failed_collective}: {error}")
    if not (is_main() if alike else watchdog is None or watchdog.first()):
        wait()
    try:
        raise error
    except BaseException:  # the handler writes the traceback of the exception being handled
        get_error_handler().record_exception(error)
    ordinary = isinstance(error, ValueError | OSError | ArithmeticError)
    if not ordinary:
        traceback.print_exception(error)
    place = "" if alike or (ordinary and watchdog is None) else f"phase {phase}: "
    place = f"rank {os.environ.get('RANK', '0')}, {place}" if watchdog is not None else place
    _exit(f"error: {place}{cause(error, notes=ordinary)}")  # else they are in the traceback


def leave_together(message: str, main: bool) -> NoReturn:
    """Raises Exit on every rank after an error that all of them have; the main one reports it."""
    if not main:
        wait()
    try:
        raise RuntimeError(message)
    except RuntimeError as error:
        get_error_handler().record_exception(error)
    _exit(message)


def _exit(message: str) -> NoReturn:
    if world_size() == 1:
        raise Exit(message, failed=True)
    print(message, file=sys.stderr, flush=True)
    timer = threading.Timer(UNWIND, os._exit, (1,))
    timer.daemon = True
    timer.start()
    raise Exit(1, failed=True)


def wait() -> NoReturn:
    """Waits until the reporting rank has exited, then raises Exit: the launcher blames the first rank that exits."""
    time.sleep(WAIT)
    raise Exit(1, failed=True)
