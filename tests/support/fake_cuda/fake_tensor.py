"""Tensors that say they are on cuda:N, over real numbers on the CPU, and CUDA's rules for them.

A dispatch mode sees every op below autograd. It refuses what CUDA refuses (tensors of two devices in one op, CPU
tensors in a collective of NCCL), counts what CUDA would do (`LEDGER`), and computes on the CPU, with our C++ kernels
where the GPU has Triton's.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from fake_ledger import LEDGER, Block, where
from fake_ops import ON_CPU
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATES = {"empty", "empty_strided", "new_empty", "empty_like", "new_empty_strided", "_efficientzerotensor"}
FREE = ALLOCATES | {"_unsafe_view", "is_pinned", "lift_fresh", "set_", "resize_", "record_stream"}
"""Ops without a kernel, beside views."""
WAITS = {
    "nonzero",
    "masked_select",
    "bincount",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "equal",
    "multinomial",
    "allclose",
}
"""Ops whose CUDA implementation reads a number back, for the size of its result or to check its input."""
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_unsafe_index_put", "_index_put_impl_"}
NO_CPU_SCALARS = {"cat", "stack", "mm", "bmm", "addmm", "gather", "scatter", "scatter_", "index_select", "embedding"}


class State:
    """Of the one fake device that this process may use."""

    device = torch.device("cuda", 0)
    capture: Any = None  # fake_graphs.Capture, while a graph is captured
    allowed: Callable[[Any], tuple[str, set[str]]] = staticmethod(lambda group: ("nccl", {"cuda"}))
    pinned: dict[int, Any] = {}  # address of pinned host memory -> its storage, which is never freed
    serial = 0  # copies that the host has not waited for, so far
    arriving: list[tuple[int, Tensor, Tensor]] = []  # (serial, pinned tensor, what it will hold)
    leaving: list[tuple[int, Tensor, Tensor]] = []  # (serial, pinned tensor, what it must still hold)


class DeviceTensor(Tensor):
    """A tensor on the fake device. `inner`: its numbers; `block`: its memory."""

    inner: Tensor
    block: Block

    @staticmethod
    def __new__(cls, inner: Tensor, block: Block, device: torch.device) -> "DeviceTensor":
        assert type(inner) is Tensor, type(inner)
        sizes = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        self = Tensor._make_wrapper_subclass(cls, inner.shape, **sizes, device=device)  # pyright: ignore
        self.inner, self.block = inner, block
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        wait("print")
        return f"{self.inner!r} on {self.device}"

    def tolist(self) -> Any:
        wait("tolist")
        return self.inner.detach().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: "DeviceTensor") -> None:
        assert (other.shape, other.dtype, other.device) == (self.shape, self.dtype, self.device)
        self.inner, self.block = other.inner, other.block


class Mode(TorchDispatchMode):
    """Sends every op through `dispatch`, also those that make tensors."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else every process would import the whole compiler at its first op

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class _Op(NamedTuple):
    full: str  # with namespace and overload
    name: str
    space: str
    view: bool
    written: tuple[tuple[int, str], ...]  # place and name of arguments that are written


@functools.cache
def _describe(func: Any) -> _Op:
    schema = func._schema
    space, name = schema.name.split("::")
    aliases = [returned.alias_info for returned in schema.returns]
    view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
    arguments = enumerate(schema.arguments)
    written = tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return _Op(str(func), name, space, view, written)


def tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


def bare(value: Any) -> Any:
    """`value` with the numbers instead of the tensors of the device."""
    if isinstance(value, DeviceTensor):
        return value.inner
    if isinstance(value, list | tuple):
        return type(value)(map(bare, value))
    return value


def refuse(op: _Op, reason: str) -> None:
    raise RuntimeError(f"{reason} ({op.space}::{op.name} at {where()})")


def wait(kind: str) -> None:
    """The host waits until the device has done all."""
    LEDGER.sync(kind)
    _not_captured(kind)
    deliver(State.serial)


def _not_captured(kind: str) -> None:
    if State.capture is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {kind} at {where()}")


def deliver(serial: int) -> None:
    """Ends the copies between pinned memory and device up to this one."""
    for number, tensor, value in State.arriving:
        if number <= serial:
            tensor.copy_(value)
    for number, tensor, value in State.leaving:
        if number <= serial and not torch.equal(tensor, value):
            raise RuntimeError(f"pinned memory was written while it was copied to the device (noticed at {where()})")
    State.arriving = [copy for copy in State.arriving if copy[0] > serial]
    State.leaving = [copy for copy in State.leaving if copy[0] > serial]


def is_pinned(tensor: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in State.pinned


def pin(tensor: Tensor) -> Tensor:
    """Marks a CPU tensor's memory as pinned. It is kept, so that no other tensor gets the address."""
    storage = tensor.untyped_storage()
    State.pinned[storage.data_ptr()] = storage
    return tensor


def dispatch(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs an op under CUDA's rules."""
    op = _describe(func)
    given = list(tensors((*args, *kwargs.values())))
    if op.space == "c10d":
        return _collective(op, func, args, kwargs, given)
    held = [tensor for tensor in given if isinstance(tensor, DeviceTensor)]
    to = kwargs.get("device")
    to = None if to is None else torch.device(to)
    if to is not None and to.type == "cuda" and to.index is None:
        to = State.device
    on_cuda = to is not None and to.type == "cuda"
    if op.name in ("_pin_memory", "is_pinned") and not held:
        return pin(args[0].clone()) if op.name == "_pin_memory" else is_pinned(args[0])
    if kwargs.get("pin_memory") and not on_cuda:
        return pin(func(*args, **{**kwargs, "pin_memory": False}))
    if not held and not on_cuda:
        return func(*args, **kwargs)
    if op.name == "_local_scalar_dense":
        wait("item")
        return func(args[0].inner)
    if op.name == "record_stream":
        return None
    if op.name == "_to_copy" and to is not None and bool(held) != on_cuda:
        return _copied(func, args[0], to, kwargs)
    if op.name == "copy_" and isinstance(args[0], DeviceTensor) != isinstance(args[1], DeviceTensor):
        return _copy_into(args[0], args[1], bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking")))
    device = held[0].device if held else to
    assert device is not None
    _check_devices(op, args, given, held, device)
    _count_waits(op, func, args, kwargs)
    if on_cuda:
        kwargs = {**kwargs, "device": "cpu"}
    kwargs.pop("pin_memory", None)
    plain, named = bare(args), {name: bare(value) for name, value in kwargs.items()}
    run: Any = ON_CPU.get(op.full, func)
    if State.capture is not None:
        State.capture.before(written_to(op, args, kwargs))
    out = run(*plain, **named)
    wrapped = _wrap(op, args, kwargs, given, out, device)
    made = list(tensors((wrapped,)))
    if not op.view and op.name not in FREE and not (made and all(tensor.numel() == 0 for tensor in made)):
        LEDGER.launch(f"{op.space}::{op.name}", (*args, *kwargs.values()) if LEDGER.trace is not None else ())
        if State.capture is not None:
            State.capture.add(run, plain, named, out)
    return wrapped


def written_to(op: _Op, args: tuple, kwargs: dict[str, Any]) -> list[DeviceTensor]:
    """The device's tensors among the arguments that the op writes."""
    values = [args[place] if place < len(args) else kwargs.get(name) for place, name in op.written]
    return [tensor for tensor in tensors(values) if isinstance(tensor, DeviceTensor)]


def _check_devices(op: _Op, args: tuple, given: list[Tensor], held: list[DeviceTensor], device: torch.device) -> None:
    scalars = op.space == "aten" and op.name not in NO_CPU_SCALARS
    for tensor in given:
        if isinstance(tensor, DeviceTensor):
            if tensor.device != device:
                refuse(op, f"Expected all tensors to be on the same device, but found {device} and {tensor.device}!")
        elif held and not (tensor.dim() == 0 and scalars):
            if op.name in INDEXING and isinstance(args[0], DeviceTensor) and tensor is not args[0]:
                if any(tensor is index for index in tensors(args[1])):
                    wait("index on the CPU")
                    continue
            refuse(op, f"Expected all tensors to be on the same device, but found {device} and {tensor.device}!")


def _count_waits(op: _Op, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    if op.name in WAITS:
        wait(op.name)
    elif op.name == "repeat_interleave" and kwargs.get("output_size") is None:
        wait(op.name)
    elif op.name in INDEXING and any(index.dtype in (torch.bool, torch.uint8) for index in tensors(args[1])):
        # With a number from the host CUDA fills by the mask; for anything else it must find the places.
        filled = op.name.startswith(("index_put", "_index_put")) and not isinstance(args[2], DeviceTensor)
        if not (filled and args[2].numel() == 1 and len(list(tensors(args[1]))) == 1):
            wait("index by a mask")


def _copied(func: Any, source: Tensor, to: torch.device, kwargs: dict[str, Any]) -> Tensor:
    """A new tensor on the other side."""
    options = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking", "pin_memory")}
    out = func(bare(source), **options)
    if to.type == "cuda":
        _leave(source, kwargs.get("non_blocking", False))
        out = out.clone() if out.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() else out
        return DeviceTensor(out, Block(LEDGER, out.untyped_storage().nbytes(), "aten::_to_copy"), to)
    if not kwargs.get("non_blocking"):
        wait("copy to the host")
        return out
    pinned = pin(torch.empty_like(out))  # as torch allocates it for such a copy
    _arrive(pinned, out)
    return pinned


def _copy_into(target: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
    if isinstance(target, DeviceTensor):
        _leave(source, non_blocking)
        if State.capture is not None:
            State.capture.before([target])
        target.inner.copy_(source)
    elif non_blocking and is_pinned(target):
        _arrive(target, source.inner.to(target.dtype).expand_as(target).clone())  # pyright: ignore
    else:
        wait("copy to the host")
        target.copy_(bare(source))
    return target


def _leave(source: Tensor, non_blocking: bool) -> None:
    """A copy from the host: it is waited for unless its memory is pinned and it may be late."""
    if source.numel() and not (non_blocking and is_pinned(source)):
        return wait("copy to the device")
    if source.numel():
        _not_captured("copy to the device")
        LEDGER.copy("copy to the device")
        State.serial += 1
        State.leaving.append((State.serial, source, source.clone()))


def _arrive(target: Tensor, value: Tensor) -> None:
    """A copy to pinned memory, which holds garbage until the host has waited for it."""
    _not_captured("copy to the host")
    LEDGER.copy("copy to the host")
    State.serial += 1
    target.fill_(torch.nan if target.is_floating_point() else torch.iinfo(target.dtype).min)
    State.arriving.append((State.serial, target, value))


def _wrap(op: _Op, args: tuple, kwargs: dict[str, Any], given: list[Tensor], out: Any, device: torch.device) -> Any:
    """The results as tensors of the device; of arguments that were written, the arguments."""
    held = [tensor for tensor in given if isinstance(tensor, DeviceTensor)]
    same = {id(tensor.inner): tensor for tensor in written_to(op, args, kwargs)}
    blocks = {tensor.inner.untyped_storage()._cdata: tensor.block for tensor in held}
    return _wrapped(out, same, blocks, f"{op.space}::{op.name}", device)


def _wrapped(value: Any, same: Mapping[int, Tensor], blocks: dict[int, Block], op: str, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        if id(value) in same:
            return same[id(value)]
        storage = value.untyped_storage()
        block = blocks.get(storage._cdata)
        if block is None:
            block = blocks[storage._cdata] = Block(LEDGER, storage.nbytes(), op)
        return DeviceTensor(value, block, device)
    if isinstance(value, list | tuple):
        return type(value)(_wrapped(item, same, blocks, op, device) for item in value)
    return value


def _collective(op: _Op, func: Any, args: tuple, kwargs: dict[str, Any], given: list[Tensor]) -> Any:
    """A collective, by gloo whatever the group's backend is called."""
    groups = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.ScriptObject)]
    backend, allowed = State.allowed(groups[0] if groups else None)
    kinds = {tensor.device.type for tensor in given}
    if op.name not in ("barrier", "monitored_barrier_") and (not kinds <= allowed or len(kinds) > 1):
        refuse(op, f"{' and '.join(sorted(kinds))} tensors in a collective of {backend}")
    if "cuda" not in kinds:
        return func(*args, **kwargs)
    for tensor in given:
        if tensor.device != State.device:
            refuse(op, f"tensor of {tensor.device} in a collective of the rank of {State.device}")
    LEDGER.launch(f"c10d::{op.name}", (*args, *kwargs.values()) if LEDGER.trace is not None else ())
    plain, named = bare(args), {name: bare(value) for name, value in kwargs.items()}
    run = func
    if op.name == "_allgather_base_":  # gloo writes the output before it has read an input that is a part of it
        run = lambda out, own, *rest, **more: func(out, own.clone(), *rest, **more)  # noqa: E731
    if State.capture is not None:
        State.capture.before([tensor for tensor in given if isinstance(tensor, DeviceTensor)])
        State.capture.add(run, plain, named, ())
    same = {id(tensor.inner): tensor for tensor in given if isinstance(tensor, DeviceTensor)}
    return _wrapped(run(*plain, **named), same, {}, "", State.device)
