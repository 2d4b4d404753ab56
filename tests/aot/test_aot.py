"""Every Triton kernel, in every config that ships, compiled for every architecture: no spills, shared memory that fits,
matrix units in use where there is a dot. Every kernels/*.py that has a table SPECS takes part."""

import importlib
import os
import re
from pathlib import Path

import pytest
import trialign.kernels

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process without TRITON_INTERPRET", allow_module_level=True)

from aot_compile import MATRIX_UNIT, SHARED_LIMIT, TARGETS, compile_kernel


def specs():
    """(module.name, spec) of every kernel of the package."""
    for stem in sorted({path.stem for folder in trialign.kernels.__path__ for path in Path(folder).glob("*.py")}):
        module = importlib.import_module(f"trialign.kernels.{stem}")
        for name, spec in getattr(module, "SPECS", {}).items():
            yield f"{stem}.{name}", spec


def configs(spec, arch):
    return spec.hip_configs if arch.startswith("gfx") and spec.hip_configs is not None else spec.configs


CASES = [
    pytest.param(spec, config, arch, id=f"{name}-{number}-{arch}")
    for name, spec in specs()
    for arch in TARGETS
    for number, config in enumerate(configs(spec, arch))
]


@pytest.mark.parametrize("spec, config, arch", CASES)
def test_compiles_clean(spec, config, arch):
    report = compile_kernel(spec, config, arch)
    assert report.spilled == 0, f"{report.spilled} spilled at {report.registers} registers"
    assert report.shared <= SHARED_LIMIT[arch], f"{report.shared} bytes of shared memory"
    if spec.dot:
        assert re.search(MATRIX_UNIT[arch], report.assembly), "no matrix instruction"
