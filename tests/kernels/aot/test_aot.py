"""Every Triton kernel, in every config of its table, compiled for every architecture: no spills, shared memory that
fits, matrix units in use where there is a dot, no 32-bit overflow in addresses of tensors past 2^31 elements."""

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process without TRITON_INTERPRET", allow_module_level=True)

import aot_compile
import triton
from aot_compile import SASS, SHARED_LIMIT, compile_kernel, cuobjdump
from index_range import DIM, overflows
from launches import ARCHITECTURES, label, other_types, specs, variants
from planted import planted
from trialign.kernels import logprob, ppo_loss, swiglu

CASES = [
    pytest.param(name, spec, configs[arch], arch, id=f"{name}-{number}-{arch}")
    for name, spec in specs()
    for number, (spec, configs) in [*enumerate(variants(spec)), *((kind, rest) for kind, *rest in other_types(spec))]
    for arch in ARCHITECTURES
]
# Tighter bounds than any size: lengths of grid axes, and sizes whose product is one row of a tensor.
BOUNDS = {
    # Blocks of one document; heads are an axis of the grid, a program's are some of them.
    "flash_attention": {"x": DIM // 128, "y": 1 << 12, "heads": 1 << 12, "share": 1 << 12},
    "grouped_matmul.outer": {"x": DIM // 32},  # blocks of one row
    "moe": {"x": DIM // 32},  # blocks of tokens
    "paged_attention.decode": {"z": 8},  # splits of one sequence
    "rope": {"y": 1 << 9, "heads": 1 << 12, "half": 1 << 12, "head_stride": 1 << 15},
}


def bounds(name: str) -> dict[str, int]:
    return next((bound for start, bound in BOUNDS.items() if name.startswith(start)), {})


def test_triton_version_is_the_requested_one():
    assert triton.__version__ == os.environ.get("TRIALIGN_EXPECT_TRITON", triton.__version__)


@pytest.mark.parametrize("name, spec, config, arch", CASES)
def test_compiles_clean(name, spec, config, arch):
    report = compile_kernel(spec, config, arch)
    assert report.spilled == 0, f"{report.spilled} spilled at {report.registers} registers"
    assert report.shared <= SHARED_LIMIT[arch], f"{report.shared} bytes of shared memory"
    if spec.dot and {"*bf16", "*fp16"} & {*spec.signature.values()}:  # NVIDIA's matrix units have no full fp32
        assert report.matrix, "no matrix instruction"
    assert not overflows(report.ttir, bounds(name))


@pytest.mark.parametrize("place", [0, 1])  # head dims to 64, to 128
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_attention_on_hopper_multiplies_by_warp_groups_and_pipelines(kernel, place):
    """No product falls back to the older unit; q and do, or k and v, are copied while others are multiplied."""
    spec = dict(specs())[f"flash_attention.{kernel}"]
    report = compile_kernel(spec, spec.on("sm_90")[place], "sm_90")
    assert report.matrices == {"wgmma.mma_async"} and report.pipelined
    assert compile_kernel(spec, spec.on("sm_80")[place], "sm_80").pipelined


def test_docs_list_every_kernel_and_config():
    page = (Path(__file__).resolve().parents[3] / "docs" / "kernels.md").read_text()
    rows = re.findall(r"^\| (\w+\.\w+) \| (?:fp32: )?([^|]*=[^|]*) \| [\d /]+", page, re.M)
    assert sorted(rows) == sorted((name, label(configs)) for name, spec in specs() for _, configs in variants(spec)), (
        "docs/kernels.md is out of date: make kernel-report ARGS=--write"
    )


GREEDY = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 2}  # more registers than two warps have


@pytest.mark.parametrize("arch", SASS)
def test_cubin_figures_equal_those_of_cuobjdump(arch, monkeypatch):
    """Registers and stack as in cuobjdump, matrix instructions in the machine code."""
    cubins = []
    monkeypatch.setattr(aot_compile, "usage", lambda cubin, read=aot_compile.usage: cubins.append(cubin) or read(cubin))
    spec = dict(specs())["grouped_matmul.outer"]
    for config in (spec.configs[0], spec.configs[0] | GREEDY):
        report = compile_kernel(spec, config, arch)
        listing = cuobjdump(cubins[-1], "-res-usage")
        figures = [int(re.search(rf"{name}:(\d+)", listing)[1]) for name in ("REG", "STACK")]
        assert [report.registers, report.spilled] == figures
    assert report.spilled > 0
    assert re.search(SASS[arch], cuobjdump(cubins[0], "-sass"))


@pytest.mark.parametrize(
    "module, kernel, old, new",
    [
        (swiglu, "forward", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
        (ppo_loss, "kl", "tl.program_id(0).to(tl.int64) * BLOCK", "tl.program_id(0) * BLOCK"),
        (logprob, "gradient", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
    ],
)
def test_32_bit_indices_are_detected(module, kernel, old, new, tmp_path, monkeypatch):
    for here, faults in ((module, False), (planted(module, old, new, tmp_path, monkeypatch), True)):
        spec = here.SPECS[kernel]
        found = overflows(compile_kernel(spec, spec.configs[0], "gfx942").ttir, {})
        assert bool(found) == faults, found
