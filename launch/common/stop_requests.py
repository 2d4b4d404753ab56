"""Requests to stop: SIGINT, SIGTERM, SIGUSR1, the end of the launcher, a file STOP in the run's folder.

While a step is at hand (`held`) a request waits for the next safe point, where a checkpoint is written; everywhere else
there is nothing to save, and it ends the process at once. A second signal does so always. docs/runs.md has it as users
see it.
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

if TYPE_CHECKING:
    from .watchdog import Watchdog

GO_ON = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LAUNCHER_ENDED = signal.SIGUSR2  # the kernel sends it when torchrun's agent ends
END = signal.SIGURG  # from our thread to the main one; ignored by default, so a stray one does no harm
ONE_REQUEST = 1.0  # seconds: a scheduler signals all processes, and the agent passes it on to its ranks once more
NOTED = 0.5  # seconds in which the main rank notes a stop, before another's end has the launcher end it
UNWIND = 5.0  # seconds that the main thread gets to leave, which it does not where it waits within a library


class Stopping:
    """Hears requests in a thread of its own, for the main one may wait within a library. A context manager.

    Args:
        folder: the run's, where STOP is looked for and STOPPED is written.
        main: this is the rank that prints.

    Attributes:
        asked: what asked to stop; "" while nothing has.
        failed: the run ends by an error that is told already; what asks to stop then is the launcher, which clears up.
        watchdog: takes requests to the other ranks; None where there are none.
    """

    def __init__(self, folder: Path, main: bool):
        self.folder, self.main = folder, main
        self.asked, self._asked_at, self._by_signal = "", 0.0, False
        self.failed, self._held, self._left = False, False, False
        self._code: int | None = None
        self._timers: list[threading.Timer] = []
        self.watchdog: Watchdog | None = None
        self._launched = "TORCHELASTIC_RUN_ID" in os.environ

    def __enter__(self) -> Stopping:
        self._stopped_before()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        # Python's own handlers run in the main thread alone, when that comes to it: only the number goes to ours.
        self._handlers = {number: signal.signal(number, _nothing) for number in (*SIGNALS, LAUNCHER_ENDED)}
        self._handlers[END] = signal.signal(END, self._leave)
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._lost
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if self._launched:
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
        """Since something asked to stop; 0 while nothing has."""
        return time.monotonic() - self._asked_at if self.asked else 0.0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within, requests wait for a safe point."""
        self._held = True
        yield  # an error ends the run anyway, and what asks to stop then must not hide it
        self._held = False
        if self.asked:
            self.leave(self.asked)

    def look(self) -> None:
        """Asks to stop where the file STOP is there."""
        if self.main and not self.asked and (self.folder / "STOP").exists():
            self.ask("the file STOP")

    def ask(self, what: str) -> None:
        """A request, from any thread; the first one counts."""
        if not self.asked:
            self._asked_at = time.monotonic()
            self.asked = what  # last: others look at it first
            # In a thread of its own: the store may be slow to answer, and a second signal is to be heard meanwhile.
            threading.Thread(target=self._asked, args=(self._held,), daemon=True).start()

    def leave(self, what: str) -> NoReturn:
        """Ends this process, whose work is saved, so that the same command goes on with it."""
        self.asked = self.asked or what
        self._note()
        sys.exit(GO_ON)

    def end(self, code: int, unwind: float = UNWIND) -> None:
        """Ends this process from any thread: its main thread leaves by SystemExit, unless it has no more time to."""
        self._code = code
        self._later(unwind, os._exit, code)
        self._end_main()

    def _asked(self, held: bool) -> None:
        """What follows from a request: where nothing is at hand, the end."""
        # The launcher ends us too where another rank has died; the dead do not hear, and that was no request.
        # Before they have met nothing tells the two apart: then no file says that the run was stopped.
        real = self.watchdog is None or self.watchdog.all_hear(self.asked)
        known = self.watchdog is not None or int(os.environ.get("WORLD_SIZE", "1")) == 1
        if held and real and self.main:
            print(f"{self.asked}: the run stops at its next safe point", file=sys.stderr, flush=True)
        if not held and real and known:
            self._note()
            time.sleep(0.0 if self.main else NOTED)
        if not held:
            self.end(GO_ON if real else 1)

    def _leave(self, *_: Any) -> None:
        """In the main thread: once, so that what is cleaned up meanwhile is not disturbed."""
        if self._code is not None and not self._left:
            self._left = True
            raise SystemExit(self._code)

    def _lost(self, what: Any) -> None:
        """Leaves again where the first time was within a finalizer or a callback, of which Python drops exceptions."""
        if self._left and isinstance(what.exc_value, SystemExit):
            self._left = False
            self._later(0.02, self._end_main)  # not within this hook, which is such a callback too
        else:
            self._unraisable(what)

    def _later(self, seconds: float, work: Callable[..., Any], *given: Any) -> None:
        self._timers.append(threading.Timer(seconds, work, given))
        self._timers[-1].daemon = True
        self._timers[-1].start()

    def _end_main(self) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, END)

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._read], [], [], 1.0)
            for number in os.read(self._read, 64) if ready else b"":
                if not number:
                    return
                self._hear(number)
            self.look()

    def _hear(self, number: int) -> None:
        if number == LAUNCHER_ENDED:
            # An agent that passed a signal on waits for us, unless it got another one. SIGUSR1 it does not know: it
            # dies of it where a scheduler sends it to all processes.
            if self._by_signal and self.asked != "SIGUSR1":
                self.end(128 + signal.SIGTERM, unwind=1.0)
            self.ask("the end of torchrun's agent")
        elif number in SIGNALS:
            if self.failed:
                self.end(1)
            elif not self._by_signal:
                self._by_signal = True
                self.ask(signal.Signals(number).name)
            elif not self._launched or self.seconds > ONE_REQUEST:
                self.end(128 + number, unwind=1.0)

    def _note(self) -> None:
        """Says that the run was stopped, in the file STOPPED and in a line."""
        if self.main:
            with contextlib.suppress(OSError):
                (self.folder / "STOP").unlink(missing_ok=True)
                fact = {"by": self.asked, "during": HEARTBEAT.phase, "time": round(time.time(), 3)}
                (self.folder / "STOPPED").write_text(json.dumps(fact) + "\n", encoding="utf-8")
            print(f"stopped by {self.asked} during {HEARTBEAT.phase}: exit code {GO_ON}", file=sys.stderr, flush=True)

    def _stopped_before(self) -> None:
        """Takes away what the last stop noted; but torchrun's restarts do not undo a stop."""
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        stopped = self.folder / "STOPPED"
        if restarts and stopped.exists():
            sys.exit(GO_ON)
        if self.main:
            stopped.unlink(missing_ok=True)


def _nothing(*_: Any) -> None:
    """A signal's handler, without which Python writes no number for our thread."""
