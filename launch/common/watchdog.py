"""A watchdog thread on every rank that names the rank all others wait for.

Every rank writes its heartbeat into the job's store: phase, collectives begun, seconds without progress, the main
thread's Python stack. One without progress for run.timeout reads the others' heartbeats and names the late ranks: those
without a new heartbeat, or without progress either and not waiting as the others do. As long as the rank that the
others wait for makes progress, they wait. The same store passes requests to stop to all ranks, and has a failure
reported once.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from trialign.engine.errors import cause
from trialign.engine.heartbeat import HEARTBEAT

from .signals import StopSignals

FRAMES = 12  # innermost frames of a stack that are shown
TICK = 0.2  # seconds between looks at the store
WAIT = 5.0  # seconds in which a launcher ends the ranks that have nothing to report
REPORTED = 2.0  # seconds in which a rank that has failed reports it, before those that lost it do
STORE_LOST = "rank 0, whose process holds the job's store, has ended, or cannot be reached"
Beats = dict[int, dict[str, Any]]


class Watchdog:
    """Starts the watchdog thread.

    Args:
        store: the job's; the watchdog opens a connection of its own, which two threads use.
        timeout: seconds without progress.
        waits_show: a rank that waits in a collective stays in its call, as with gloo; NCCL's calls return at once.
    """

    def __init__(
        self, store: PrefixStore, rank: int, world: int, timeout: float, signals: StopSignals, *, waits_show: bool
    ):
        self.store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self.rank, self.world, self.timeout = rank, world, timeout
        self.signals, self.waits_show = signals, waits_show
        self.interval = min(1.0, max(0.2, timeout / 10))
        self._beat, self._alone, self._moved, self._closed = 0, 0, time.monotonic(), threading.Event()
        self._lock = threading.Lock()  # of the store's connection
        signals.watchdog = self
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        HEARTBEAT.phase_changed.set()
        self._thread.join(WAIT)  # it may wait for a store that does not respond

    def first(self) -> bool:
        """Whether this rank is the first to report a failure; without the store, whether it is the lowest alive."""
        try:
            self.signals.failed = True
            with self._lock:
                return self.store.add("reported", 1) == 1
        except RuntimeError:
            return self.rank == (0 if self.signals.launched else 1)

    def lost(self) -> str:
        """The report on a failed collective, whose peer has ended; "" where another rank has reported."""
        deadline = time.monotonic() + REPORTED
        try:
            while time.monotonic() < deadline and not self.signals.reason:
                if self._exists("reported"):
                    return ""
                time.sleep(TICK)
            if self.signals.reason:  # the launcher ends this rank, and reports which one failed
                return ""
            return self._report(self._late() or self._beats(), "a rank has ended, or cannot be reached")
        except RuntimeError:
            return "" if self.signals.launched else STORE_LOST

    def wait_for_main(self, name: str, work: Callable[[], None]) -> None:
        """Runs `work` on the main rank; the others wait for its end without a collective, as long as it makes progress:
        it may take longer than the process groups' timeout, and NCCL has nothing in flight meanwhile. Collective."""
        self._alone += 1
        key = f"alone/{self._alone}"
        if self.rank == 0:
            work()
            with self._lock:
                self.store.set(key, "")
            return
        with HEARTBEAT.waiting(f"{name} by rank 0"):
            while not self._exists(key):
                time.sleep(TICK)

    def broadcast(self, reason: str, seconds: float) -> bool:
        """Passes a request to stop on; whether all ranks have confirmed it in time."""
        deadline = time.monotonic() + seconds
        try:
            with self._lock:
                self.store.set("stop", reason)
                confirmed = self.store.add("confirmed", 1)
            while confirmed < self.world and time.monotonic() < deadline:
                time.sleep(TICK)
                with self._lock:
                    confirmed = self.store.add("confirmed", 0)
        except RuntimeError:  # the store has ended with the launcher, and with it the other ranks
            return True
        return confirmed >= self.world

    def _watch(self) -> None:
        progress, published = -1, 0.0
        try:
            while not self._closed.is_set():
                changed = HEARTBEAT.phase_changed.wait(TICK)
                HEARTBEAT.phase_changed.clear()
                now = time.monotonic()
                if HEARTBEAT.progress != progress:
                    self._moved, progress = now, HEARTBEAT.progress
                self._listen()
                if changed or now - published > self.interval:
                    self._publish()
                    published = now
                waits = HEARTBEAT.waits_in or not self.waits_show
                if waits and now - self._moved > self.timeout and (late := self._late()):
                    self._end(late, now - self._moved)
        except RuntimeError:  # the store has ended: at the run's end, with torchrun, which signals its ranks, or rank 0
            if not self.signals.launched and not self._closed.wait(WAIT):
                self._fail(ConnectionError(STORE_LOST))
        except BaseException as error:  # the ranks must not go on without a watchdog
            self._fail(error)

    def _listen(self) -> None:
        """Receives requests to stop from other ranks, and whether a failure is reported."""
        if not self.signals.reason and self._exists("stop"):
            with self._lock:
                reason = self.store.get("stop").decode()
            self.signals.request(reason)
        if not self.signals.failed and self._exists("reported"):
            self.signals.failed = True
            # A signal was the launcher's then; where none ends this rank, it ends itself.
            timer = threading.Timer(0 if self.signals.reason else WAIT, self.signals.end, (1,))
            timer.daemon = True
            timer.start()

    def _publish(self) -> None:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        self._beat += 1
        beat = {
            "beat": self._beat,
            "phase": HEARTBEAT.phase,
            "collectives": HEARTBEAT.collectives,
            "idle": time.monotonic() - self._moved,
            "waits_in": HEARTBEAT.waits_in,
            "stack": "".join(traceback.format_stack(frame)[-FRAMES:]) if frame else "",
        }
        with self._lock:
            self.store.set(f"beat/{self.rank}", json.dumps(beat))

    def _late(self) -> Beats:
        """The ranks that the others wait for; none where there is progress."""
        before, progress = self._beats(), HEARTBEAT.progress
        deadline = time.monotonic() + 4 * self.interval
        while time.monotonic() < deadline:
            time.sleep(self.interval)
            self._publish()  # the other ranks read this one's heartbeat too
        after = self._beats()
        if HEARTBEAT.progress != progress:
            return {}
        silent = {rank: beat for rank, beat in after.items() if beat.get("beat") == before[rank].get("beat")}
        for beat in silent.values():
            beat["silent"] = True
        if silent:
            return silent
        busy = {rank: beat for rank, beat in after.items() if not beat["waits_in"]} if self.waits_show else {}
        fewest = min(beat["collectives"] for beat in after.values())
        late = busy or {rank: beat for rank, beat in after.items() if beat["collectives"] == fewest}
        return {rank: beat for rank, beat in late.items() if beat["idle"] > self.timeout - self.interval}

    def _beats(self) -> Beats:
        """Every rank's last heartbeat; {} where there is none."""
        beats: Beats = {}
        with self._lock:
            for rank in range(self.world):
                name = f"beat/{rank}"
                beats[rank] = json.loads(self.store.get(name)) if self.store.check([name]) else {}
        return beats

    def _report(self, late: Beats, headline: str) -> str:
        lines = [headline]
        for rank, beat in sorted(late.items()):
            if not beat:
                lines.append(f"rank {rank} has not joined the run")
                continue
            life = ", without a sign of life" if beat.get("silent") else ""
            waits = f", in {beat['waits_in']}" if beat["waits_in"] else ""
            lines.append(
                f"late: rank {rank}, phase {beat['phase']}{waits}{life}; its Python stack was\n{beat['stack']}"
            )
        return "\n".join(lines)

    def _end(self, late: Beats, seconds: float) -> None:
        """Reports late ranks."""
        waited = f"for {HEARTBEAT.waits_in or 'a collective'} for {seconds:.0f} s"
        headline = f"rank {self.rank} has waited {waited} in phase {HEARTBEAT.phase} (run.timeout)"
        self._fail(TimeoutError(self._report(late, headline)))

    def _fail(self, error: BaseException) -> None:
        """Reports an error, unless another rank has, and ends this one, whose main thread cannot."""
        if self.first():
            try:
                raise error
            except BaseException:  # the handler writes the traceback of the exception being handled
                get_error_handler().record_exception(error)
            print(f"error: {cause(error)}", file=sys.stderr, flush=True)
            os._exit(1)
        time.sleep(WAIT)
        os._exit(1)

    def _exists(self, key: str) -> bool:
        with self._lock:
            return self.store.check([key])
