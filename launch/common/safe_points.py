"""Where a run of steps may stop: between two steps, and within one until its update has begun.

A step that is dropped leaves the state of the step before: until the update no weight has changed, and what else had
(places in the data, statistics of rewards) was noted when the step began.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from trialign.engine.generation.embedded import Interrupted
from trialign.engine.heartbeat import HEARTBEAT
from trialign.engine.mesh import Mesh
from trialign.engine.parallel.collectives import all_reduce

from .stop_requests import Stopping

UPDATE = "update"  # the phase in which weights change


class SafePoints:
    """Stops a run where all its ranks can.

    Args:
        grace: seconds after a request in which a step may still end; one that will not is dropped.
        state: gives what a checkpoint holds beside learners, as JSON has it.
        save: writes a checkpoint with such a state, unless there is one of this step already. Collective.
    """

    def __init__(
        self,
        stopping: Stopping,
        mesh: Mesh,
        grace: float,
        state: Callable[[], Mapping[str, Any]],
        save: Callable[[Mapping[str, Any]], None],
    ):
        self.stopping, self.mesh, self.grace, self.state, self.save = stopping, mesh, grace, state, save
        self.changed = True  # weights or the state, since the step before
        self.before, self.began, self.seconds = "{}", 0.0, 0.0

    def step(self) -> None:
        """Notes the state before a step."""
        self.before = json.dumps(self.state())
        self.changed, self.began = False, time.monotonic()

    def after_step(self) -> None:
        """Stops where any rank was asked to, with what the step made. Collective."""
        self.seconds, self.changed = time.monotonic() - self.began, True
        asked, _ = self._agreed()
        if asked:
            self._stop(self.state())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of a step, before which a step is dropped that takes too long. Collective."""
        if not self.changed:
            asked, too_long = self._agreed()
            if asked and too_long:
                self._stop(json.loads(self.before))
        self.changed |= name == UPDATE
        with HEARTBEAT.at(name):
            try:
                yield
            except Interrupted:
                self._stop(json.loads(self.before))

    def too_long(self) -> bool:
        """Whether this rank was asked to stop and the step at hand, if it takes as long as the last one, will not end
        in the grace."""
        if not self.stopping.asked or self.changed:
            return False
        left = self.seconds - (time.monotonic() - self.began)
        return self.stopping.seconds + max(0.0, left) > self.grace

    def _agreed(self) -> tuple[bool, bool]:
        """(asked to stop, too long), as it is on any rank."""
        self.stopping.look()
        mine = torch.tensor([bool(self.stopping.asked), self.too_long()], dtype=torch.int32, device=self.mesh.device)
        asked, too_long = all_reduce(mine, self.mesh.world, "max").tolist()
        return bool(asked), bool(too_long)

    def _stop(self, state: Mapping[str, Any]) -> NoReturn:
        self.save(state)
        self.stopping.leave("a request to another rank")
