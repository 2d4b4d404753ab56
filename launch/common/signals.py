"""Requests to stop: SIGINT, SIGTERM, SIGUSR1, the end of the launcher, a file STOP in the run's folder.

Within steps (`held`) a request waits for the next safe point, where a checkpoint is written; everywhere else there is
nothing to save, and it ends the process at once. A second signal always does. docs/runs.md describes it for users.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trialign.algorithms.rewards.worker import signal_at_end_of_parent
from trialign.engine.heartbeat import HEARTBEAT
from trialign.engine.storage.atomic import write_text

if TYPE_CHECKING:
    from .watchdog import Watchdog

EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LAUNCHER_ENDED = signal.SIGUSR2  # the kernel sends it when torchrun's agent ends
END = signal.SIGURG  # from the signal thread to the main one; ignored by default, so a stray one does no harm
ONE_REQUEST = 1.0  # seconds: a scheduler signals all processes, and the agent passes it on to its ranks again
NOTED = 0.5  # seconds for the main rank to write STOPPED before the launcher ends it
CONFIRM = 3.0  # seconds in which every living rank confirms a request; twice as many within steps
UNWIND = 5.0  # seconds for the main thread to exit; it cannot while it waits in a library


class Exit(SystemExit):
    """An exit that is decided and reported, unlike a SystemExit that some function raises.

    Args:
        code: of the process, or the message that is printed.
        failed: after an error, which the other ranks may not have met.
    """

    def __init__(self, code: int | str, *, failed: bool = False):
        super().__init__(code)
        self.failed = failed


class StopSignals:
    """Receives requests in a thread of its own, as the main thread may wait in a library. A context manager.

    Args:
        folder: the run's, where STOP is looked for and STOPPED is written.
        main: this is the rank that prints.

    Attributes:
        reason: of the first request to stop; "" while there is none.
        failed: the run ends by an error that is reported already; a signal is then the launcher's, which cleans up.
        watchdog: passes requests on to the other ranks; None where there are none.
        launched: by torchrun, which ends the other ranks where one ends, and holds the job's store.
    """

    def __init__(self, folder: Path, main: bool):
        self.folder, self.main = folder, main
        self.reason, self._requested_at, self._by_signal = "", 0.0, False
        self.failed, self._held, self._left = False, False, False
        self._code: int | None = None
        self._timers: list[threading.Timer] = []
        self.watchdog: Watchdog | None = None
        self.launched = "TORCHELASTIC_RUN_ID" in os.environ

    def __enter__(self) -> StopSignals:
        self._check_stopped_before()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        # Python runs handlers late, in the main thread alone; the wakeup pipe brings the number to this thread at once.
        self._handlers = {number: signal.signal(number, _nothing) for number in (*SIGNALS, LAUNCHER_ENDED)}
        self._handlers[END] = signal.signal(END, self._exit_main)
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._exit_again
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if self.launched:
            signal_at_end_of_parent(LAUNCHER_ENDED)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._timers:
            timer.cancel()
        signal.set_wakeup_fd(self._wakeup)
        sys.unraisablehook = self._unraisable
        os.write(self._write, b"\0")
        self._thread.join()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)

    @property
    def seconds(self) -> float:
        """Seconds since the first request; 0 while there is none."""
        return time.monotonic() - self._requested_at if self.reason else 0.0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within, requests wait for a safe point."""
        self._held = True
        yield  # an error ends the run anyway, and a request to stop then must not hide it
        self._held = False
        if self.reason:
            self.exit(self.reason)

    def check_file(self) -> None:
        """Requests a stop where the file STOP exists."""
        if self.main and not self.reason and (self.folder / "STOP").exists():
            self.request("the file STOP")

    def request(self, reason: str) -> None:
        """Takes a request, from any thread; the first one counts."""
        if not self.reason:
            self._requested_at = time.monotonic()
            self.reason = reason  # last: others look at it first
            # In a thread of its own: the store may be slow to respond, and a second signal must be received meanwhile.
            threading.Thread(target=self._handle_request, args=(self._held,), daemon=True).start()

    def exit(self, reason: str) -> NoReturn:
        """Exits after the work is saved, so that the same command resumes it."""
        self.reason = self.reason or reason
        self._write_stopped()
        raise Exit(EXIT_RESUMABLE)

    def end(self, code: int, unwind: float = UNWIND) -> None:
        """Ends this process from any thread: its main thread leaves by Exit, or is killed after `unwind` s."""
        self._code = code
        self._later(unwind, os._exit, code)
        self._signal_main()

    def _handle_request(self, held: bool) -> None:
        """Ends the process outside of steps; within them the next safe point does."""
        # The launcher also ends this rank where another has died: that is no request, and a dead rank does not confirm.
        # Before the ranks have joined nothing distinguishes the two: then no STOPPED is written.
        real = self.watchdog is None or self.watchdog.broadcast(self.reason, CONFIRM * (1 + held))
        distinct = self.watchdog is not None or int(os.environ.get("WORLD_SIZE", "1")) == 1
        if held and real and self.main:
            print(f"{self.reason}: the run stops at its next safe point", file=sys.stderr, flush=True)
        if not held and real and distinct:
            self._write_stopped()
            time.sleep(0.0 if self.main else NOTED)
        if not held or not real:
            self.end(EXIT_RESUMABLE if real else 1)

    def _exit_main(self, *_: Any) -> None:
        """Raises SystemExit in the main thread: once, so that cleanup is not disturbed."""
        if self._code is not None and not self._left:
            self._left = True
            raise Exit(self._code, failed=self._code == 1)

    def _exit_again(self, unraisable: Any) -> None:
        """Exits again where the first Exit was within a finalizer or a callback, where Python drops it."""
        if self._left and isinstance(unraisable.exc_value, SystemExit):
            self._left = False
            self._later(0.02, self._signal_main)  # not within this hook, which is such a callback too
        else:
            self._unraisable(unraisable)

    def _later(self, seconds: float, work: Callable[..., Any], *given: Any) -> None:
        self._timers.append(threading.Timer(seconds, work, given))
        self._timers[-1].daemon = True
        self._timers[-1].start()

    def _signal_main(self) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, END)

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._read], [], [], 1.0)
            for number in os.read(self._read, 64) if ready else b"":
                if not number:
                    return
                self._receive(number)
            self.check_file()

    def _receive(self, number: int) -> None:
        if number == LAUNCHER_ENDED:
            # An agent that passed a signal on waits for its ranks, unless it got another one. SIGUSR1 from a scheduler
            # kills the agent, which has no handler for it.
            if self._by_signal and self.reason != "SIGUSR1":
                self.end(128 + signal.SIGTERM, unwind=1.0)
            self.request("the end of torchrun's agent")
        elif number in SIGNALS:
            if self.failed:
                self.end(1)
            elif not self._by_signal:
                self._by_signal = True
                self.request(signal.Signals(number).name)
            elif not self.launched or self.seconds > ONE_REQUEST:
                self.end(128 + number, unwind=1.0)

    def _write_stopped(self) -> None:
        """Writes the file STOPPED and prints a line."""
        if self.main:
            with contextlib.suppress(OSError):
                (self.folder / "STOP").unlink(missing_ok=True)
                fact = {"by": self.reason, "during": HEARTBEAT.phase, "time": round(time.time(), 3)}
                write_text(self.folder / "STOPPED", json.dumps(fact) + "\n")
            print(
                f"stopped by {self.reason} during {HEARTBEAT.phase}: exit code {EXIT_RESUMABLE}",
                file=sys.stderr,
                flush=True,
            )

    def _check_stopped_before(self) -> None:
        """Deletes the last STOPPED; but torchrun's restarts do not undo a stop."""
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        stopped = self.folder / "STOPPED"
        if restarts and stopped.exists():
            raise Exit(EXIT_RESUMABLE)
        if self.main:
            stopped.unlink(missing_ok=True)


def _nothing(*_: Any) -> None:
    """A signal handler: Python writes numbers to the wakeup pipe only for signals that have one."""
