"""Every Triton kernel, in every config that ships, compiled for every architecture: no spills, shared memory that fits,
matrix units in use where there is a dot."""

import os
import re

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process without TRITON_INTERPRET", allow_module_level=True)

from aot_compile import MATRIX_UNIT, SHARED_LIMIT, TARGETS, compile_kernel
from kernel_table import configs, specs

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


def test_a_spill_is_seen():
    """Four warps cannot hold a 128 x 128 backward of attention: the check must be able to fail."""
    spec = dict(specs())["attention.dkv"]
    greedy = spec.configs[0] | {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 4}
    assert compile_kernel(spec, greedy, "sm_80").spilled > 0
