"""A watchdog thread on every rank that names the rank all others wait for.

Every rank writes its heartbeat into the job's store: phase, collectives begun, the main thread's Python stack. One
without progress for run.timeout reads the others' heartbeats and names the late ranks: those without a new heartbeat,
or not waiting as the others do. The same store passes requests to stop to all ranks, and has a failure reported once.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from trialign.engine.heartbeat import HEARTBEAT

from .signals import StopSignals

FRAMES = 12  # innermost frames of a stack that are shown
TICK = 0.2  # seconds between looks at the store
CONFIRM = 3.0  # seconds in which every living rank confirms a request
WAIT = 10.0  # seconds in which a launcher ends the ranks that have nothing to report
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
        self.interval = min(5.0, max(0.2, timeout / 10))
        self._beat, self._closed = 0, threading.Event()
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
        """Whether this rank is the first to report a failure; without the store, whether it is the main one."""
        try:
            self.signals.failed = True
            with self._lock:
                return self.store.add("reported", 1) == 1
        except RuntimeError:
            return self.rank == 0

    def lost(self) -> str:
        """The report on a failed collective, whose peer has ended; "" where another rank has reported."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not self.signals.reason:
            if self._exists("reported"):
                return ""
            time.sleep(0.2)
        if self.signals.reason:  # the launcher ends this rank, and reports which one failed
            return ""
        return self._report(self._late() or self._beats(), "a rank has ended, or cannot be reached")

    def broadcast(self, reason: str) -> bool:
        """Passes a request to stop on; whether all ranks have confirmed it in time."""
        deadline = time.monotonic() + CONFIRM
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
        moved, count, published = time.monotonic(), -1, 0.0
        while not self._closed.is_set():
            changed = HEARTBEAT.phase_changed.wait(TICK)
            HEARTBEAT.phase_changed.clear()
            now = time.monotonic()
            if HEARTBEAT.collectives != count:
                moved, count = now, HEARTBEAT.collectives
            try:
                self._listen()
                if changed or now - published > self.interval:
                    self._publish()
                    published = now
                waits = HEARTBEAT.waits_in or not self.waits_show
                if waits and now - moved > self.timeout and (late := self._late()):
                    self._end(late, now - moved)
            except RuntimeError:  # the store has ended, with the launcher or at the run's end
                return

    def _listen(self) -> None:
        """Receives requests to stop from other ranks, and whether a failure is reported."""
        if not self.signals.reason and self._exists("stop"):
            with self._lock:
                reason = self.store.get("stop").decode()
            self.signals.request(reason)
        if not self.signals.failed and self._exists("reported"):
            self.signals.failed = True
            timer = threading.Timer(WAIT, self.signals.end, (1,))  # where no launcher ends this rank before
            timer.daemon = True
            timer.start()

    def _publish(self) -> None:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        self._beat += 1
        beat = {
            "beat": self._beat,
            "phase": HEARTBEAT.phase,
            "collectives": HEARTBEAT.collectives,
            "waits_in": HEARTBEAT.waits_in,
            "stack": "".join(traceback.format_stack(frame)[-FRAMES:]) if frame else "",
        }
        with self._lock:
            self.store.set(f"beat/{self.rank}", json.dumps(beat))

    def _late(self) -> Beats:
        """The ranks that the others wait for; none where there is progress."""
        before, count = self._beats(), HEARTBEAT.collectives
        deadline = time.monotonic() + 4 * self.interval
        while time.monotonic() < deadline:
            time.sleep(self.interval)
            self._publish()  # the other ranks read this one's heartbeat too
        after = self._beats()
        if HEARTBEAT.collectives != count:
            return {}
        silent = {rank: beat for rank, beat in after.items() if beat.get("beat") == before[rank].get("beat")}
        for beat in silent.values():
            beat["silent"] = True
        if silent:
            return silent
        busy = {rank: beat for rank, beat in after.items() if not beat["waits_in"]} if self.waits_show else {}
        fewest = min(beat["collectives"] for beat in after.values())
        return busy or {rank: beat for rank, beat in after.items() if beat["collectives"] == fewest}

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
        """Reports late ranks, unless another rank has, and ends this one, whose main thread cannot continue."""
        waited = f"for {HEARTBEAT.waits_in or 'a collective'} for {seconds:.0f} s"
        headline = f"rank {self.rank} has waited {waited} in phase {HEARTBEAT.phase} (run.timeout)"
        if self.first():
            try:
                raise TimeoutError(self._report(late, headline))
            except TimeoutError as error:
                get_error_handler().record_exception(error)
                print(f"error: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        time.sleep(WAIT)
        os._exit(1)

    def _exists(self, key: str) -> bool:
        with self._lock:
            return self.store.check([key])
