"""Every Triton kernel, in every config that ships, compiled for every architecture: no spills, shared memory that fits,
matrix units in use where there is a dot, and addresses that hold for tensors past 2^31 elements."""

import os
import re

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process without TRITON_INTERPRET", allow_module_level=True)

import aot_compile
import triton
from aot_compile import SASS, SHARED_LIMIT, compile_kernel, cuobjdump
from index_range import DIM, overflows
from kernel_table import ARCHITECTURES, other_types, specs, variants
from planted import planted
from trialign.kernels import linear_logprob, ppo_loss, swiglu

CASES = [
    pytest.param(name, spec, configs[arch], arch, id=f"{name}-{number}-{arch}")
    for name, spec in specs()
    for number, (spec, configs) in [*enumerate(variants(spec)), *((kind, rest) for kind, *rest in other_types(spec))]
    for arch in ARCHITECTURES
]
# Better bounds than any size at all: what a grid's axis counts, and sizes whose product is one row of a tensor.
BOUNDS = {
    "attention": {"x": DIM // 32},  # blocks of one document
    "grouped_matmul.outer": {"x": DIM // 32},  # blocks of one row
    "moe": {"x": DIM // 32},  # blocks of tokens
    "paged_attention.decode": {"z": 8},  # shares of one sequence
    "rope": {"y": 1 << 9, "heads": 1 << 12, "half": 1 << 12, "head_stride": 1 << 15},
}


def bounds(name: str) -> dict[str, int]:
    return next((bound for start, bound in BOUNDS.items() if name.startswith(start)), {})


def test_this_is_the_triton_that_was_asked_for():
    assert triton.__version__ == os.environ.get("TRIALIGN_EXPECT_TRITON", triton.__version__)


@pytest.mark.parametrize("name, spec, config, arch", CASES)
def test_compiles_clean(name, spec, config, arch):
    report = compile_kernel(spec, config, arch)
    assert report.spilled == 0, f"{report.spilled} spilled at {report.registers} registers"
    assert report.shared <= SHARED_LIMIT[arch], f"{report.shared} bytes of shared memory"
    if spec.dot and {"*bf16", "*fp16"} & set(
        spec.signature.values()
    ):  # NVIDIA has no matrix units for products in fp32 proper
        assert report.matrix, "no matrix instruction"
    assert not overflows(report.ttir, bounds(name))


GREEDY = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 2}  # more than two warps can hold


def test_a_spill_is_seen():
    spec = dict(specs())["nf4.forward"]
    assert compile_kernel(spec, spec.configs[0] | GREEDY, "sm_80").spilled > 0


@pytest.mark.parametrize("arch", SASS)
def test_the_cubin_holds_what_is_read_of_it(arch, monkeypatch):
    """Registers and stack as cuobjdump says, matrix instructions in the machine code."""
    met = []
    monkeypatch.setattr(aot_compile, "usage", lambda cubin, read=aot_compile.usage: met.append(cubin) or read(cubin))
    spec = dict(specs())["nf4.forward"]
    for config in (spec.configs[0], spec.configs[0] | GREEDY):
        report = compile_kernel(spec, config, arch)
        said = cuobjdump(met[-1], "-res-usage")
        figures = [int(re.search(rf"{what}:(\d+)", said)[1]) for what in ("REG", "STACK")]
        assert [report.registers, report.spilled] == figures
    assert report.spilled > 0
    assert re.search(SASS[arch], cuobjdump(met[0], "-sass"))


@pytest.mark.parametrize(
    "module, kernel, old, new",
    [
        (swiglu, "forward", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
        (ppo_loss, "kl", "tl.program_id(0).to(tl.int64) * BLOCK", "tl.program_id(0) * BLOCK"),
        (linear_logprob, "gradient", "rows = tl.program_id(0).to(tl.int64)", "rows = tl.program_id(0)"),
        (linear_logprob, "accumulate", "tl.arange(0, BLOCK_K).to(tl.int64)", "tl.arange(0, BLOCK_K)"),
    ],
)
def test_an_index_of_32_bits_is_seen(module, kernel, old, new, tmp_path, monkeypatch):
    for here, faults in ((module, False), (planted(module, old, new, tmp_path, monkeypatch), True)):
        spec = here.SPECS[kernel]
        found = overflows(compile_kernel(spec, spec.configs[0], "gfx942").ttir, {})
        assert bool(found) == faults, found
