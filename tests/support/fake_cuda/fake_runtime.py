"""torch.cuda and torch.distributed of the fake device."""

from typing import Any

import torch
import torch.distributed as dist
from fake_graphs import CUDAGraph, Graph
from fake_ledger import LEDGER, where
from fake_tensor import State, deliver, wait
from torch.cuda import nccl
from torch.distributed import distributed_c10d

GROUPS: dict[str, str] = {}  # name of a process group -> the backend that was asked for
_real: dict[str, Any] = {}


class Stream:
    """One stream: what is enqueued has run."""

    device = property(lambda self: State.device)
    stream_id = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None: ...
    def wait_stream(self, other: "Stream") -> None: ...
    def wait_event(self, event: "Event") -> None: ...
    def record_event(self, event: "Event | None" = None) -> "Event":
        event = Event() if event is None else event
        event.record()
        return event

    def synchronize(self) -> None:
        wait("stream")

    def query(self) -> bool:
        return True


class Event:
    """Ends the copies that were enqueued before it was recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.serial = 0

    def record(self, stream: Stream | None = None) -> None:
        self.serial = State.serial

    def synchronize(self) -> None:
        LEDGER.sync("event")
        assert State.capture is None, "an event is waited for in a capture"
        deliver(self.serial)

    def query(self) -> bool:
        deliver(self.serial)
        return True

    def wait(self, stream: Stream | None = None) -> None: ...
    def elapsed_time(self, other: "Event") -> float:
        return 0.0


def _set_device(device: Any) -> None:
    device = torch.device(device) if not isinstance(device, int) else torch.device("cuda", device)
    assert device.index in (None, State.device.index), f"{device}: this rank has {State.device}"


def _memory_info(*_: Any) -> tuple[int, int]:
    return LEDGER.capacity - LEDGER.live, LEDGER.capacity


def _reset_peak(*_: Any) -> None:
    LEDGER.peak = LEDGER.live


def patch_cuda(count: int) -> None:
    """Replaces the functions of torch.cuda."""
    properties = type("Properties", (), {"multi_processor_count": 132, "major": 9, "minor": 0, "name": "fake"})
    properties.total_memory = LEDGER.capacity  # pyright: ignore
    same = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: State.device.index,
        "set_device": _set_device,
        "synchronize": lambda *_: wait("synchronize"),
        "get_device_name": lambda *_: "fake",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": _memory_info,
        "memory_allocated": lambda *_: LEDGER.live,
        "memory_reserved": lambda *_: LEDGER.live,
        "max_memory_allocated": lambda *_: LEDGER.peak,
        "reset_peak_memory_stats": _reset_peak,
        "empty_cache": lambda: None,
        "current_stream": Stream,
        "default_stream": Stream,
        "stream": lambda stream: stream,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": Graph,
        "is_current_stream_capturing": lambda: State.capture is not None,
        "manual_seed": lambda *_: None,
        "manual_seed_all": lambda *_: None,
        "_lazy_init": lambda *_: None,
    }
    for name, value in same.items():
        setattr(torch.cuda, name, value)
    torch.backends.cuda.is_flash_attention_available = lambda: True
    nccl.version = lambda *_: (2, 27, 0)  # of the text of its errors


def _group_backend(group: Any = None) -> str:
    group = dist.group.WORLD if group is None else group
    return GROUPS.get(group.group_name, "gloo")


def _allowed(boxed: Any) -> tuple[str, set[str]]:
    """The backend of a group and the devices whose tensors it takes."""
    name = _group_backend(dist.ProcessGroup.unbox(boxed))
    kinds = {part.split(":")[0] if ":" in part else {"nccl": "cuda"}.get(part, "cpu") for part in name.split(",")}
    return name, kinds


def _init(backend: str | None = None, **options: Any) -> None:
    options.pop("device_id", None)
    _real["init_process_group"]("gloo", **options)
    GROUPS[dist.group.WORLD.group_name] = backend or "cpu:gloo,cuda:nccl"  # pyright: ignore


def _new_group(ranks: Any = None, timeout: Any = None, backend: str | None = None, **options: Any) -> Any:
    options.pop("device_id", None)
    group = _real["new_group"](ranks, timeout, "gloo", **options)
    if not isinstance(group, int):
        GROUPS[group.group_name] = backend or _group_backend()
    return group


def _split_group(parent: Any = None, split_ranks: Any = None, timeout: Any = None, **_: Any) -> Any:
    """The group of those given lists of ranks that has this rank."""
    own = None
    for ranks in split_ranks:
        group = _new_group(ranks, timeout, _group_backend(parent))
        own = group if dist.get_rank() in ranks else own
    return own


def patch_distributed() -> None:
    """Replaces what makes process groups: they are gloo's, and remember the backend that was asked for."""
    for name in ("init_process_group", "new_group"):
        _real[name] = getattr(dist, name)
    replaced = {"init_process_group": _init, "new_group": _new_group, "split_group": _split_group}
    for name, value in (replaced | {"get_backend": _group_backend}).items():
        setattr(dist, name, value)
    distributed_c10d._get_object_coll_device = _object_device  # pyright: ignore
    State.allowed = staticmethod(_allowed)


def _object_device(group: Any = None) -> str:
    """Device of pickled objects on their way. NCCL would take them, through two copies and waits: refused."""
    if _group_backend(group) == "nccl":
        raise RuntimeError(f"Python objects in a collective of nccl (at {where()})")
    return "cpu"
