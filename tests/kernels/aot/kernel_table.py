"""Every Triton kernel of the package with its launch table: the SPECS of each kernels/*.py."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path

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
    for nvidia, amd in zip(spec.configs, spec.hip_configs or spec.configs, strict=True):
        yield spec, {arch: amd if arch.startswith("gfx") else nvidia for arch in ARCHITECTURES}
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


def label(config: dict) -> str:
    """A config in a table: its compile-time values, warps (w) and stages (s)."""
    values = [f"{k}={v:d}" if isinstance(v, int) else f"{k}={v}" for k, v in config.items() if not k.startswith("num_")]
    return ", ".join([*values, f"w{config['num_warps']}", f"s{config['num_stages']}"])
