"""The fake CUDA device: CUDA's rules, its counts, copies, captured graphs, and faults planted into the product."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fake_ledger import LEDGER
from plant import line_of, plant
from torch import Tensor
from torch.nn.functional import one_hot
from trialign.engine.generation.lane import Lane
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.collectives import all_gather, all_reduce
from trialign.engine.transfer import HostCopy, to_device


def ones(*shape: Any, **options: Any) -> Tensor:
    return torch.ones(*shape, device="cuda", **options)


MIXED: dict[str, Callable[[], object]] = {
    "add": lambda: ones(3) + torch.ones(3),
    "vector on the CPU": lambda: torch.ones(3) * ones(()),
    "product": lambda: ones(2, 2) @ torch.ones(2, 2),
    "cat": lambda: torch.cat((ones(3), torch.ones(3))),
    "scalar in a stack": lambda: torch.stack((ones(()), torch.ones(()))),
    "index of a CPU tensor": lambda: torch.ones(3)[ones(2, dtype=torch.int64)],
    "gather": lambda: ones(3).gather(0, torch.zeros(1, dtype=torch.int64)),
    "written result": lambda: torch.add(ones(3), 1, out=torch.ones(3)),
    "op of ours": lambda: torch.ops.trialign.rms_norm(ones(2, 8), torch.ones(8), 1e-5),
    "other device": lambda: ones(3) + torch.ones(3, device="cuda:1"),
}
ALLOWED: dict[str, Callable[[], object]] = {
    "number": lambda: ones(3) + 1,
    "scalar tensor": lambda: ones(3) * torch.ones(()),
    "where": lambda: torch.where(ones(3) > 0, torch.zeros(()), ones(3)),
}
WAITS: dict[str, Callable[[], object]] = {
    "item": lambda: ones(1).item(),
    "item ": lambda: bool(ones(()) > 0),
    " item": lambda: int(ones(())),
    "allclose": lambda: torch.allclose(ones(2), ones(2)),
    "tolist": lambda: ones(2).tolist(),
    "print": lambda: str(ones(2)),
    "copy to the host": lambda: ones(2).cpu(),
    "copy to the host ": lambda: torch.empty(2).copy_(ones(2)),
    " copy to the host": lambda: torch.empty(2).copy_(ones(2), non_blocking=True),
    "copy to the device": lambda: torch.tensor([1, 2], device="cuda"),
    "copy to the device ": lambda: torch.ones(2).to("cuda", non_blocking=True),
    " copy to the device": lambda: torch.ones(2).pin_memory().to("cuda"),
    "nonzero": lambda: ones(2).nonzero(),
    "masked_select": lambda: ones(2).masked_select(ones(2) > 0),
    "bincount": lambda: ones(2, dtype=torch.int64).bincount(),
    "_unique2": lambda: ones(2).unique(),
    "equal": lambda: torch.equal(ones(2), ones(2)),
    "repeat_interleave": lambda: torch.repeat_interleave(ones(2, dtype=torch.int64)),
    "index by a mask": lambda: ones(2)[ones(2) > 0],
    "index by a mask ": lambda: ones(2).__setitem__(ones(2) > 0, ones(2)),
    "index on the CPU": lambda: ones(2)[torch.tensor([1])],
    "synchronize": lambda: torch.cuda.synchronize(),
}
NO_WAIT: dict[str, Callable[[], object]] = {
    "pinned copy": lambda: torch.ones(2).pin_memory().to("cuda", non_blocking=True),
    "pinned result": lambda: torch.empty(2, pin_memory=True).copy_(ones(2), non_blocking=True),
    "filled by a mask": lambda: ones(2).__setitem__(ones(2) > 0, 3.0),
    "known size": lambda: torch.repeat_interleave(ones(2, dtype=torch.int64), output_size=2),
    "index": lambda: ones(2)[ones(2, dtype=torch.int64) - 1],
    "sorted": lambda: ones(2).sort(),
}


def outcomes(group: str) -> dict[str, str | list[str]]:
    """Outcome of each operation of a group: its error, or the kinds of its waits."""
    found: dict[str, str | list[str]] = {}
    for name, run in globals()[group].items():
        LEDGER.clear()
        try:
            run()
            found[name] = [kind for (_, kind, _), count in LEDGER.syncs.items() for _ in range(count)]
        except RuntimeError as error:
            found[name] = str(error)
    return found


def test_tensors_of_two_devices_are_refused(fake):
    for name, error in fake.call(outcomes, "MIXED")[0].items():
        assert "Expected all tensors to be on the same device, but found" in error, name
    assert not any(fake.call(outcomes, "ALLOWED")[0].values())


def test_waits_of_the_host_are_counted(fake):
    found = fake.call(outcomes, "WAITS")[0]
    assert found == {name: [name.strip()] for name in WAITS}
    assert not any(fake.call(outcomes, "NO_WAIT")[0].values())


def counted() -> tuple:
    """Launches of a small forward and backward, live bytes before, within and after, and allocations."""
    x = ones(4, 8, requires_grad=True)
    LEDGER.clear()
    before = LEDGER.live
    with LEDGER.recording() as allocations:
        y = x.view(8, 4).relu()
        within = LEDGER.live - before
        y.sum().backward()
        grad = x.grad
        del y
    launches = Counter({op: count for (_, op, _), count in LEDGER.launches.items()})
    assert grad is not None and grad.device == torch.device("cuda:0")
    return dict(launches), within, LEDGER.live - before, [(a.bytes, a.op) for a in allocations], grad.tolist()


def test_launches_and_allocations_are_counted(fake):
    ((launches, within, after, allocations, grad),) = fake.call(counted)
    assert launches == {"aten::relu": 1, "aten::sum": 1, "aten::ones_like": 1, "aten::threshold_backward": 1}
    assert within == 128 and after == 128  # the result; then the gradient
    assert allocations[0] == (128, "aten::relu") and sum(size for size, _ in allocations) == 128
    assert grad == [[1.0] * 8] * 4


def out_of_memory() -> tuple[str, int]:
    LEDGER.capacity = LEDGER.live + 1000
    try:
        ones(1000)
    except torch.OutOfMemoryError as error:
        free, _ = torch.cuda.mem_get_info()
        return str(error), free
    raise AssertionError("no error")


def test_memory_ends_at_the_capacity(fake):
    ((error, free),) = fake.call(out_of_memory)
    assert "CUDA out of memory" in error and "4000" in error and free == 1000


def late_copies() -> tuple:
    """Values of pinned memory before and after the event; the error where it is written too early."""
    host = torch.empty(2, dtype=torch.int64, pin_memory=True)
    host.copy_(ones(2, dtype=torch.int64), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    early = host.tolist()
    event.synchronize()
    late = host.tolist()
    moved = host.to("cuda", non_blocking=True)
    host.fill_(7)
    try:
        moved.tolist()
    except RuntimeError as error:
        return early, late, str(error)
    raise AssertionError("no error")


def test_pinned_memory_is_valid_after_the_event(fake):
    ((early, late, error),) = fake.call(late_copies)
    assert early != [1, 1] == late
    assert "pinned memory was written while it was copied" in error


def replayed() -> dict[str, Any]:
    """A captured step that counts in place, makes new memory, and has a number of the host within."""
    state, step = ones(2), 3.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.zeros(2, device="cuda") + state * step
        state += 1
    step = 5.0
    captured = state.tolist()
    graph.replay()
    first = out.tolist()
    state.fill_(10)
    LEDGER.clear()
    graph.replay()
    found = {"captured": captured, "first": first, "second": out.tolist(), "state": state.tolist(), "step": step}
    launches = [op for _, op, _ in LEDGER.launches]
    errors = []
    for run in (WAITS["item"], WAITS["copy to the device"], NO_WAIT["pinned copy"]):
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                run()
        except RuntimeError as error:
            errors.append(str(error))
    return found | {"launches": launches, "errors": errors}


def test_captured_graph_is_replayed_on_its_own_memory(fake):
    (found,) = fake.call(replayed)
    assert found["captured"] == [1, 1]  # nothing ran
    assert found["first"] == [3, 3] and found["second"] == [30, 30] and found["state"] == [11, 11]
    assert found["launches"] == ["graph"]
    assert len(found["errors"]) == 3 and all("not permitted when stream is capturing" in e for e in found["errors"])


def traced() -> tuple[bool, bool, bool]:
    """Whether two steps have one trace; and after a buffer moved; and with another number of the host."""
    buffers = [ones(2), ones(2)]

    def step(buffer: Tensor, number: float) -> list:
        with LEDGER.tracing() as trace:
            one_hot((buffer * number).long() % 2, 2).sum()
        return trace

    first, again = step(buffers[0], 2.0), step(buffers[0], 2.0)
    return first == again, first == step(buffers[1], 2.0), first == step(buffers[0], 3.0)


def test_traces_of_equal_steps_are_equal(fake):
    assert fake.call(traced) == [(True, False, False)]


def collective(fault: bool) -> tuple[list, str]:
    mesh = build_mesh(tp=2, device=torch.device("cuda", dist.get_rank()))
    if fault:
        plant(all_reduce, "dist.all_reduce(tensor", "dist.all_reduce(tensor.cpu()")
    error = ""
    try:
        error = str(all_reduce(ones(2), mesh.tp).tolist())
    except RuntimeError as refused:
        error = str(refused)
    return all_gather(ones(1), mesh.tp).tolist(), error


def test_cpu_tensor_in_a_collective_is_refused(fake):
    assert fake.call(collective, False, ranks=2) == [([1.0, 1.0], "[2.0, 2.0]")] * 2
    for gathered, error in fake.call(collective, True, ranks=2):
        line = line_of(all_reduce, "dist.all_reduce(")
        assert gathered == [1.0, 1.0] and f"cpu tensors in a collective of nccl (c10d::allreduce_ at {line})" in error


def lane_faults() -> list:
    """Waits of a lane with an index on the CPU and with a hidden item; the error of a tensor made on the CPU."""
    lane, tokens = Lane(4, 7, torch.device("cuda")), ones(2, dtype=torch.int64)
    LEDGER.clear()
    plant(Lane.advance, "self.last[: len(tokens)]", "self.last[torch.arange(len(tokens))]")
    lane.advance(tokens)
    plant(Lane.advance, "+= 1", "+= int(self.length[0] > 0)")
    lane.advance(tokens)
    waits = [(kind, line) for _, kind, line in LEDGER.syncs]
    plant(Lane.advance, "+= 1", "+= torch.ones(len(tokens), dtype=torch.int64)")
    try:
        lane.advance(tokens)
    except RuntimeError as error:
        return [*waits, str(error)]
    return waits


def test_planted_faults_are_reported_by_line(fake):
    ((*waits, error),) = fake.call(lane_faults)
    assigned, added = (line_of(Lane.advance, text) for text in ("self.last[", "+= 1"))
    assert waits == [("index on the CPU", assigned), ("item", added)]
    assert "found cuda:0 and cpu" in error and added in error


def copy_faults() -> tuple[list, list, list]:
    """Numbers copied to the host, the waits, and the numbers where the event is not waited for."""
    sent = to_device(np.array([1.0, 2.0]), torch.device("cuda"))
    LEDGER.clear()
    right = HostCopy(sent).numpy().tolist()
    waits = [kind for _, kind, _ in LEDGER.syncs]
    plant(HostCopy.numpy, "self._done.synchronize()", "pass")
    wrong = HostCopy(sent).numpy().tolist()
    return right, waits, wrong


def test_copy_that_is_read_too_early_has_garbage(fake):
    ((right, waits, wrong),) = fake.call(copy_faults)
    assert right == [1.0, 2.0] and waits == ["event"] and wrong != right
