"""Corrections and checks for Triton's interpreter (TRITON_INTERPRET=1). Call `install()` once, before the first launch.

Corrects the interpreter: bf16 arithmetic, reductions and tl.dot (stock computes on the raw bit patterns, silently),
rounding of fp32 to bf16 (stock truncates), the dtype of comparisons (block and scalar masks combined) and of flags.
Checks every launch: each live lane's address lies inside a tensor passed to it; no address is stored to by two lanes or
two programs, or stored by one program and loaded by another; grid axes 1 and 2 stay below CUDA's limit. Programs run in
shuffled order, so a result that depends on their order changes from run to run. `Monitor.watch` sees every launch.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
NONE, SEVERAL = -1, -2


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """The values of raw bf16 bit patterns."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Raw bf16 bit patterns, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def _widened(handle):
    return Handle(bf16_to_f32(handle.data), tl.float32) if _is_bf16(handle) else handle


class Traffic(NamedTuple):
    """Bytes a launch loaded and stored (lanes of one load at the same address count once), and the bytes with each
    address loaded once and stored once."""

    loaded: int
    stored: int
    once: int


class Storage:
    """One tensor of the launch: its address range, which program loaded and stored at each address, and how much."""

    def __init__(self, tensor):
        storage = tensor.untyped_storage()
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.stored = np.full(self.size, NONE, np.int32)
        self.loaded = np.full(self.size, NONE, np.int32)
        self.element = 0  # bytes
        self.moved = {"load": 0, "store": 0, "atomic": 0}


class Monitor:
    """The running launch's tensors. Tests of lock-protected stores may set `races = False`.

    watch(kernel, {name: argument, or option such as num_warps}) is called before every launch; execute = False skips
    the launch itself. done(kernel) is called after it; with `counting` set, `traffic` is then the launch's.
    """

    races = True
    execute = True
    counting = False
    watch: Callable[[Callable, dict], None] = staticmethod(lambda kernel, arguments: None)
    done: Callable[[Callable], None] = staticmethod(lambda kernel: None)
    storages: list[Storage] = []
    starts: list[int] = []

    @classmethod
    def begin(cls, tensors) -> None:
        unique = {t.untyped_storage().data_ptr(): t for t in tensors if t.untyped_storage().nbytes()}
        cls.storages = [Storage(unique[start]) for start in sorted(unique)]
        cls.starts = [s.start for s in cls.storages]

    @classmethod
    def access(cls, builder, pointer, mask, access: str) -> None:
        """Checks the live lanes of one load, store or atomic and records the programs that touched each address."""
        addresses = np.asarray(pointer.data).astype(np.int64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask.data), addresses.shape).astype(bool)]
        addresses = addresses.reshape(-1)
        size = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
        program = builder.grid_idx
        x, y, z = program
        me = (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z
        while addresses.size:
            place = bisect.bisect_right(cls.starts, int(addresses[0])) - 1
            storage = cls.storages[place] if place >= 0 else None
            offset = addresses - storage.start if storage else addresses
            here = (offset >= 0) & (offset + size <= storage.size) if storage else np.zeros(len(addresses), bool)
            if storage is None or not here[0]:
                raise IndexError(f"{access} of {size} bytes out of bounds in program {program}")
            if cls.counting:
                storage.element = size
                storage.moved[access] += size * len(np.unique(offset[here]))
            if cls.races:
                cls._trace(storage, offset[here], me, access, program)
            addresses = addresses[~here]

    @classmethod
    def traffic(cls) -> Traffic:
        """Traffic of the last launch, run with `counting` and `races` and free of atomics."""
        once = sum(s.element * int((touched != NONE).sum()) for s in cls.storages for touched in (s.loaded, s.stored))
        return Traffic(*(sum(s.moved[access] for s in cls.storages) for access in ("load", "store")), once)

    @staticmethod
    def _trace(storage: Storage, offset: np.ndarray, me: int, access: str, program) -> None:
        if access == "store":
            if len(np.unique(offset)) != len(offset):
                raise RuntimeError(f"two lanes of program {program} store to one address")
            for seen, verb in ((storage.stored[offset], "also stores to"), (storage.loaded[offset], "loads")):
                if ((seen != NONE) & (seen != me)).any():
                    raise RuntimeError(f"program {program} stores to an address that another one {verb}")
            storage.stored[offset] = me
        elif access == "load":
            writer = storage.stored[offset]
            if ((writer != NONE) & (writer != me)).any():
                raise RuntimeError(f"program {program} loads an address that another one stores to")
            seen = storage.loaded[offset]
            storage.loaded[offset] = np.where((seen == NONE) | (seen == me), me, SEVERAL)


def _correct_bf16() -> None:
    def wrap(name):
        plain = getattr(Builder, name)

        def op(self, *args):
            if not any(_is_bf16(a) for a in args):
                return plain(self, *args)
            result = plain(self, *map(_widened, args))
            is_float = result.data.dtype == np.float32
            return Handle(f32_to_bf16(result.data), tl.bfloat16) if is_float else result

        setattr(Builder, name, op)

    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_fabs", "create_rsqrt", "create_erf"):
        wrap(name)
    plain_dot, plain_convert, plain_cast = Builder.create_dot, interpreter._convert_float, Builder.cast_impl

    def dot(self, a, b, d, *rest):
        return plain_dot(self, _widened(a), _widened(b), d, *rest)

    def convert(x, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            return f32_to_bf16(x)
        if source == tl.bfloat16 and target == tl.float32:
            return bf16_to_f32(x).view(np.uint32)
        return plain_convert(x, source, target, mode)

    def cast(self, value, target):  # bf16 to and from integers and fp64 goes through fp32
        source, scalar = value.dtype.scalar, target.scalar
        if source == tl.bfloat16 and scalar not in (tl.float32, tl.bfloat16):
            return plain_cast(self, _widened(value), target)
        if scalar == tl.bfloat16 and source not in (tl.float32, tl.bfloat16):
            return plain_cast(self, plain_cast(self, value, tl.float32), target)
        return plain_cast(self, value, target)

    Builder.create_dot, interpreter._convert_float, Builder.cast_impl = dot, convert, cast
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(Builder, "create_" + name, cast)
    for kind in (interpreter.ReduceOps, interpreter.ScanOps):
        kind.apply_impl = _reduce_in_f32(kind.apply_impl)


def _reduce_in_f32(plain):
    def typed(tensor, scalar):
        return tensor.type.with_element_ty(scalar) if tensor.type.is_block() else scalar

    def apply_impl(self, inputs):
        narrow = [t.dtype.scalar == tl.bfloat16 for t in inputs]
        wide = [
            tl.core.tensor(_widened(t.handle), typed(t, tl.float32)) if n else t
            for t, n in zip(inputs, narrow, strict=True)
        ]
        outputs = plain(self, tuple(wide))
        outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
        for i, t in enumerate(outputs):
            if narrow[min(i, len(narrow) - 1)] and t.dtype.scalar == tl.float32:
                outputs[i] = tl.core.tensor(Handle(f32_to_bf16(t.handle.data), tl.bfloat16), typed(t, tl.bfloat16))
        return outputs

    return apply_impl


def _correct_comparisons() -> None:
    def wrap(name):
        plain = getattr(Builder, name)

        def compare(self, left, right):
            return Handle(np.asarray(plain(self, left, right).data, dtype=np.bool_), tl.int1)

        setattr(Builder, name, compare)

    for name in dir(Builder):
        if name.startswith(("create_icmp", "create_fcmp")):
            wrap(name)


def _correct_flags() -> None:
    """A launch's True or False is one bit; Triton 3.7 converts it to a 32-bit number, which it then refuses."""
    plain = interpreter._implicit_cvt

    def convert(arg):
        if isinstance(arg, bool):
            return tl.core.tensor(Handle(np.array([arg]), tl.int1), tl.int1)
        return plain(arg)

    interpreter._implicit_cvt = convert


def _watch_memory() -> None:
    def wrap(name, pointer, mask, access):
        plain = getattr(Builder, name)

        def op(self, *args, **named):
            Monitor.access(self, args[pointer], None if mask is None else args[mask], access)
            return plain(self, *args, **named)

        setattr(Builder, name, op)

    wrap("create_masked_load", 0, 1, "load")
    wrap("create_masked_store", 0, 2, "store")
    wrap("create_atomic_rmw", 1, 3, "atomic")
    wrap("create_atomic_cas", 0, None, "atomic")
    plain_init = interpreter.GridExecutor._init_args_hst

    def init(self, args, named):
        on_host, named_on_host = plain_init(self, args, named)
        Monitor.begin([t for t in [*on_host, *named_on_host.values()] if hasattr(t, "untyped_storage")])
        return on_host, named_on_host

    interpreter.GridExecutor._init_args_hst = init


def _report_launches() -> None:
    plain = interpreter.InterpretedFunction.run

    def run(self, *args, grid, warmup, **named):
        Monitor.watch(self.fn, dict(zip(self.arg_names, args, strict=False)) | named)
        if Monitor.execute:
            plain(self, *args, grid=grid, warmup=warmup, **named)
            Monitor.done(self.fn)

    interpreter.InterpretedFunction.run = run


def _shuffle_programs() -> None:
    plain_dim, plain_index = Builder.set_grid_dim, Builder.set_grid_idx

    def set_grid_dim(self, nx, ny, nz):
        if ny > 65535 or nz > 65535:
            raise ValueError(f"grid ({nx}, {ny}, {nz}): axes 1 and 2 stop at 65535 on CUDA")
        plain_dim(self, nx, ny, nz)

    def set_grid_idx(self, x, y, z):
        nx, ny, nz = self.grid_dim
        if (x, y, z) == (0, 0, 0):
            self.order = random.sample(range(nx * ny * nz), nx * ny * nz)
        place = self.order[(x * ny + y) * nz + z]
        plain_index(self, place // (ny * nz), place // nz % ny, place % nz)

    Builder.set_grid_dim, Builder.set_grid_idx = set_grid_dim, set_grid_idx


def install() -> None:
    """Puts the corrections and the checks into Triton's interpreter, for the rest of the process; once is enough."""
    if getattr(interpreter, "_trialign_shim", False):
        return
    _correct_bf16()
    _correct_comparisons()
    _correct_flags()
    _watch_memory()
    _shuffle_programs()
    _report_launches()
    interpreter._trialign_shim = True
