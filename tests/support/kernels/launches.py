"""Every Triton kernel of the package with its launch table (the SPECS of each kernels/*.py), and the comparison of
interpreted launches with these tables, which tests/kernels/aot compiles ahead of time."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import trialign.kernels
from trialign.kernels.backends.triton_runtime import Spec

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def specs() -> Iterator[tuple[str, Spec]]:
    """("module.kernel", its Spec), sorted by module."""
    for stem in sorted({path.stem for folder in trialign.kernels.__path__ for path in Path(folder).glob("*.py")}):
        module = importlib.import_module(f"trialign.kernels.{stem}")
        for name, spec in getattr(module, "SPECS", {}).items():
            yield f"{stem}.{name}", spec


def variants(spec: Spec) -> Iterator[tuple[Spec, dict[str, dict]]]:
    """(spec, {architecture: config}) of every config, then of the fp32 configs, with a spec whose tensors are fp32."""
    for configs in zip(*(spec.on(arch) for arch in ARCHITECTURES), strict=True):
        yield spec, dict(zip(ARCHITECTURES, configs, strict=True))
    for config in spec.fp32_configs or ():
        yield of_type(spec, "fp32"), dict.fromkeys(ARCHITECTURES, config)


def of_type(spec: Spec, kind: str) -> Spec:
    """The same kernel, its bf16 tensors of another type."""
    signature = {name: written.replace("bf16", kind) for name, written in spec.signature.items()}
    return dataclasses.replace(spec, signature=signature)


def other_types(spec: Spec) -> Iterator[tuple[str, Spec, dict[str, dict]]]:
    """("fp16" or "fp32", spec, {architecture: config}) of the last, largest config: these types ship in it too."""
    if "*bf16" in spec.signature.values():
        *_, (_, configs) = variants(dataclasses.replace(spec, fp32_configs=None))
        for kind in ("fp16",) if spec.fp32_configs else ("fp16", "fp32"):
            yield kind, of_type(spec, kind), configs


def values(config: dict) -> list[str]:
    """A config's compile-time values, warps (w) and stages (s)."""
    constants = [(k, v) for k, v in config.items() if not k.startswith("num_")]
    shown = [f"{k}={v:d}" if isinstance(v, int) else f"{k}={v}" for k, v in constants]
    return [*shown, f"w{config['num_warps']}", f"s{config['num_stages']}"]


def label(configs: dict[str, dict]) -> str:
    """A row's configs in a table: the first architecture's, then what others have in its place."""
    first, *others = ARCHITECTURES
    base = values(configs[first])
    changes = {arch: [v for v in values(configs[arch]) if v not in base] for arch in others}
    return "; ".join([", ".join(base), *(f"{arch}: {', '.join(change)}" for arch, change in changes.items() if change)])


KERNELS = {spec.kernel.fn: (name, spec) for name, spec in specs() if hasattr(spec.kernel, "fn")}
TYPES = {"*fp32": torch.float32, "*i64": torch.int64, "*i32": torch.int32, "*u8": torch.uint8}
Values = frozenset[tuple[str, object]]


def bound(config: dict, spec: Spec) -> Values:
    """The compile-time values of a config or a launch that are not free, with its warps and stages."""
    return frozenset((k, v) for k, v in config.items() if k not in spec.free and k not in spec.signature)


def table(spec: Spec, wide: bool, arch: str) -> Iterable[dict]:
    """The configs that may be launched on an architecture; wide: with tensors of fp32."""
    return spec.fp32_configs if wide and spec.fp32_configs is not None else spec.on(arch)


def is_wide(spec: Spec, arguments: dict) -> bool:
    """True if a launch's tensors of a variable dtype ('*bf16' in the table) are fp32."""
    tensors = [arguments[name] for name, kind in spec.signature.items() if kind == "*bf16"]
    return all(tensor is None or tensor.dtype == torch.float32 for tensor in tensors)


def fits(given: object, kind: str) -> bool:
    """True if an argument has its type of `Spec.signature`: "*bf16" stands for every dtype of the kernel, None for a
    tensor that is not read."""
    if kind.startswith("*"):
        return given is None or isinstance(given, torch.Tensor) and given.dtype == TYPES.get(kind, given.dtype)
    return type(given) is {"u1": bool, "fp32": float}.get(kind, int)


def check(kernel: Callable, arguments: dict, arch: str = "sm_80") -> None:
    """Raises ValueError for a launch of a kernel of the package with types or values that its table does not have."""
    if kernel not in KERNELS:
        return
    name, spec = KERNELS[kernel]
    for argument, kind in spec.signature.items():
        given = arguments[argument]
        if not fits(given, kind):
            actual = given.dtype if isinstance(given, torch.Tensor) else repr(given)
            raise ValueError(f"{name} is launched with {argument} = {actual}, where SPECS has {kind}")
    values = bound(arguments, spec)
    if values not in {bound(config, spec) for config in table(spec, is_wide(spec, arguments), arch)}:
        raise ValueError(f"{name} is launched with values that SPECS does not have: {sorted(values)}")
