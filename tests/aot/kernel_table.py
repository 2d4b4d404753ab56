"""Every Triton kernel of the package: those of each kernels/*.py that has a table SPECS, in every config that ships."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path

import trialign.kernels
from trialign.kernels._rt import Spec

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
    wide = {name: kind.replace("bf16", "fp32") for name, kind in spec.signature.items()}
    for config in spec.fp32_configs or ():
        yield dataclasses.replace(spec, signature=wide), dict.fromkeys(ARCHITECTURES, config)


def label(config: dict) -> str:
    """A config in a table: its compile-time values, warps (w) and stages (s)."""
    values = [f"{k}={v:d}" if isinstance(v, int) else f"{k}={v}" for k, v in config.items() if not k.startswith("num_")]
    return ", ".join([*values, f"w{config['num_warps']}", f"s{config['num_stages']}"])
