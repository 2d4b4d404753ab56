"""Safe points of a training step: a run may stop between steps, and within a step until its update begins.

A dropped step leaves the state of the step before: until the update no weight has changed, and all other state
(positions in the data, statistics of rewards) was copied when the step began.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from trialign.engine.generation.interface import Interrupted
from trialign.engine.heartbeat import HEARTBEAT
from trialign.engine.mesh import Mesh
from trialign.engine.parallel.collectives import all_reduce

from .signals import StopSignals

UPDATE = "update"  # the phase in which weights change


class SafePoints:
    """Stops a run at a point that all its ranks have reached.

    Args:
        grace: seconds after a request in which a step may still end; one that will take longer is dropped.
        state: gives the state that a checkpoint holds beside learners, as JSON.
        save: writes a checkpoint with such a state, unless there is one of this step already. Collective.
    """

    def __init__(
        self,
        signals: StopSignals,
        mesh: Mesh,
        grace: float,
        state: Callable[[], Mapping[str, Any]],
        save: Callable[[Mapping[str, Any]], None],
    ):
        self.signals, self.mesh, self.grace, self.state, self.save = signals, mesh, grace, state, save
        self.changed = True  # weights or the state, since the step before
        self.before, self.began, self.seconds = "{}", 0.0, 0.0

    def step(self) -> None:
        """Copies the state before a step."""
        self.before = json.dumps(self.state())
        self.changed, self.began = False, time.monotonic()

    def after_step(self) -> None:
        """Stops with the step's results where any rank was asked to. Collective."""
        self.seconds, self.changed = time.monotonic() - self.began, True
        requested, _ = self._on_any_rank()
        if requested:
            self._stop(self.state())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of a step; a step that takes too long is dropped before it. Collective."""
        if not self.changed:
            requested, too_long = self._on_any_rank()
            if requested and too_long:
                self._stop(json.loads(self.before))
        self.changed |= name == UPDATE
        with HEARTBEAT.at(name):
            try:
                yield
            except Interrupted:
                self._stop(json.loads(self.before))

    def too_long(self) -> bool:
        """Whether this rank was asked to stop and the step in progress, if it takes as long as the last one, will not
        end within the grace period."""
        if not self.signals.reason or self.changed:
            return False
        left = self.seconds - (time.monotonic() - self.began)
        return self.signals.seconds + max(0.0, left) > self.grace

    def _on_any_rank(self) -> tuple[bool, bool]:
        """(asked to stop, too long) on any rank."""
        self.signals.check_file()
        mine = torch.tensor([bool(self.signals.reason), self.too_long()], dtype=torch.int32, device=self.mesh.device)
        requested, too_long = all_reduce(mine, self.mesh.world, "max").tolist()
        return bool(requested), bool(too_long)

    def _stop(self, state: Mapping[str, Any]) -> NoReturn:
        self.save(state)
        self.signals.exit("a request to another rank")
