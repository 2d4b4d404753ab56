"""Layouts of ranks, and the assertion that each computes the numbers of one process."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from harness import run_ranks
from tiny import assemble
from torch import Tensor
from trialign.algorithms.roles.learner import Learner
from trialign.engine.mesh import Mesh, build_mesh
from trialign.models.lora import trained_name


class Layout(NamedTuple):
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    def mesh(self) -> Mesh:
        """The mesh of this layout on the ranks of the running process group."""
        return build_mesh(**self._asdict())

    def __str__(self) -> str:
        return "-".join(f"{axis}{size}" for axis, size in self._asdict().items() if size > 1) or "one process"


ALONE = Layout()
TWO_RANKS = (Layout(tp=2), Layout(pp=2), Layout(dp=2))
FOUR_RANKS = (Layout(tp=2, pp=2), Layout(tp=2, dp=2), Layout(pp=2, dp=2))


def whole_states(**learners: Learner) -> dict[str, Tensor]:
    """Whole masters, moments and gradients of the last step, if any, on every rank: `role/kind/weight`. Collective."""
    states: dict[str, Tensor] = {}
    for role, learner in learners.items():
        optimizer, model = learner.optimizer, learner.model
        for bucket in optimizer.buckets:
            if bucket.grad_bytes:
                bucket.states["grad"] = bucket.grads[bucket.local]
        entries = optimizer.entries(role, partial(trained_name, config=model.config, head=model.kind))
        states |= assemble(entries, learner.mesh.world)
        for bucket in optimizer.buckets:
            bucket.states.pop("grad", None)
    return states


def assert_close(got: Any, expected: Any, tolerance: float = 1e-5, name: str = "") -> None:
    """Compares numbers within the relative tolerance, tensors within that of their largest element, containers by item.
    Numbers have an absolute one too, a fifth of it: implicit rewards are small differences of sums of tens of nats."""
    if isinstance(expected, Mapping):
        assert got.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_close(got[key], value, tolerance, f"{name}/{key}")
    elif isinstance(expected, tuple | list):
        assert len(got) == len(expected), name
        for i, value in enumerate(expected):
            assert_close(got[i], value, tolerance, f"{name}[{i}]")
    elif isinstance(expected, Tensor):
        largest = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * largest, msg=name)
    elif expected is None or isinstance(expected, str):
        assert got == expected, name
    else:
        assert got == pytest.approx(expected, rel=tolerance, abs=tolerance / 5, nan_ok=True), name


def assert_layouts_agree(
    step: Callable[..., Any], layouts: Iterable[Layout], *args: Any, tolerance: float = 1e-5, expected: Any = None
) -> Any:
    """Asserts that `step(rank, world, layout, *args)`, a function at the top level of a test file, returns on all ranks
    of each layout what one process returns: `expected`, if the test has it already. Returns that."""
    expected = step(0, 1, ALONE, *args) if expected is None else expected
    for layout in layouts:
        for rank, got in enumerate(run_ranks(step, layout.world, layout, *args, timeout=120)):
            assert_close(got, expected, tolerance, f"{layout}, rank {rank}: ")
    return expected
