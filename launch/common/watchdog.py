"""A thread on every rank that says what the rank is at, and finds the rank that all wait for.

Every rank writes its heartbeat into the job's store: phase, collectives begun, the main thread's Python stack. One
whose collectives have stood still for run.timeout reads the others' and names those that are late: that show no sign of
life, or do not wait as the others do. By the same store a request to stop reaches all ranks, and a failure is told
once.
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

from .stop_requests import Stopping

FRAMES = 12  # innermost frames of a stack that are shown
TICK = 0.2  # seconds between looks at the store
HEARING = 3.0  # seconds in which every living rank has heard of a request
WAIT = 10.0  # seconds in which a launcher ends the ranks that have nothing to tell
Beats = dict[int, dict[str, Any]]


class Watchdog:
    """Watches from now on.

    Args:
        store: the job's; what is called from two threads needs a connection of its own, which this makes.
        timeout: seconds without progress.
        waits_show: a rank that waits in a collective stays in its call, as gloo has it. NCCL's calls return at once.
    """

    def __init__(
        self, store: PrefixStore, rank: int, world: int, timeout: float, stopping: Stopping, *, waits_show: bool
    ):
        self.store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self.rank, self.world, self.timeout = rank, world, timeout
        self.stopping, self.waits_show = stopping, waits_show
        self.interval = min(5.0, max(0.2, timeout / 10))
        self._beat, self._closed = 0, threading.Event()
        self._lock = threading.Lock()  # of the store's connection
        stopping.watchdog = self
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()
        HEARTBEAT.moved.set()
        self._thread.join(WAIT)  # it may wait for a store that does not answer

    def first(self) -> bool:
        """Whether this rank is the first to tell a failure; True too where the store cannot be asked and it is the main
        one."""
        try:
            self.stopping.failed = True
            with self._lock:
                return self.store.add("told", 1) == 1
        except RuntimeError:
            return self.rank == 0

    def lost(self) -> str:
        """What is known of the ranks that another rank's end leaves without an answer; "" where it is told already."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not self.stopping.asked:
            if self._there("told"):
                return ""
            time.sleep(0.2)
        if self.stopping.asked:  # the launcher ends us, and shows which rank it was
            return ""
        return self._report(self._late() or self._beats(), "a rank has ended, or cannot be reached")

    def all_hear(self, what: str) -> bool:
        """Passes a request to stop on; whether all ranks have heard of it in time."""
        deadline = time.monotonic() + HEARING
        try:
            with self._lock:
                self.store.set("stop", what)
                heard = self.store.add("heard", 1)
            while heard < self.world and time.monotonic() < deadline:
                time.sleep(TICK)
                with self._lock:
                    heard = self.store.add("heard", 0)
        except RuntimeError:  # the store has ended with the launcher: nobody is left to ask
            return True
        return heard >= self.world

    def _watch(self) -> None:
        moved, count, published = time.monotonic(), -1, 0.0
        while not self._closed.is_set():
            changed = HEARTBEAT.moved.wait(TICK)
            HEARTBEAT.moved.clear()
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
        """Requests to stop from the other ranks, and the news that a failure is told."""
        if not self.stopping.asked and self._there("stop"):
            with self._lock:
                what = self.store.get("stop").decode()
            self.stopping.ask(what)
        if not self.stopping.failed and self._there("told"):
            self.stopping.failed = True
            timer = threading.Timer(WAIT, self.stopping.end, (1,))  # where no launcher ends this rank before
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
            self._publish()  # the others look at ours
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
        """Every rank's last heartbeat; {} of one that never came."""
        beats: Beats = {}
        with self._lock:
            for rank in range(self.world):
                name = f"beat/{rank}"
                beats[rank] = json.loads(self.store.get(name)) if self.store.check([name]) else {}
        return beats

    def _report(self, late: Beats, what: str) -> str:
        lines = [what]
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
        """Tells which ranks are late, where nobody has, and ends this one, whose main thread waits in vain."""
        waited = HEARTBEAT.waits_in or "a collective"
        what = f"rank {self.rank} has waited for {waited} for {seconds:.0f} s in phase {HEARTBEAT.phase} (run.timeout)"
        if self.first():
            try:
                raise TimeoutError(self._report(late, what))
            except TimeoutError as error:
                get_error_handler().record_exception(error)
                print(f"error: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        time.sleep(WAIT)
        os._exit(1)

    def _there(self, key: str) -> bool:
        with self._lock:
            return self.store.check([key])
