"""Every Triton kernel of the package: those of each kernels/*.py that has a table SPECS."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import trialign.kernels
from trialign.kernels._rt import Spec


def specs() -> Iterator[tuple[str, Spec]]:
    """("module.kernel", its Spec), sorted by module."""
    for stem in sorted({path.stem for folder in trialign.kernels.__path__ for path in Path(folder).glob("*.py")}):
        module = importlib.import_module(f"trialign.kernels.{stem}")
        for name, spec in getattr(module, "SPECS", {}).items():
            yield f"{stem}.{name}", spec


def configs(spec: Spec, arch: str) -> tuple[dict, ...]:
    """The configs that ship for an architecture."""
    return spec.hip_configs if arch.startswith("gfx") and spec.hip_configs is not None else spec.configs
