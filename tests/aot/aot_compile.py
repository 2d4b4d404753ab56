"""Compiles Triton kernels for NVIDIA and AMD targets without a GPU or driver, and reads what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
MATRIX_UNIT = {"sm_80": r"\bHMMA", "sm_90": r"\b[HQ]G?MMA", "sm_100": r"\b(?:UTC\w*MMA|HMMA)", "gfx942": r"v_mfma"}


@dataclass(frozen=True)
class Report:
    """Registers a thread; bytes of stack or count of local accesses (0: nothing spilled); bytes of shared memory."""

    registers: int
    spilled: int
    shared: int
    assembly: str


def compile_kernel(spec, config: dict, arch: str) -> Report:
    """One config of a kernels._rt.Spec for one architecture, specialised as the launcher does for aligned arguments."""
    kernel, constants = spec.kernel, {k: v for k, v in config.items() if k not in ("num_warps", "num_stages")}
    unknown = set(kernel.arg_names) ^ (spec.signature.keys() | constants.keys())
    if unknown:
        raise ValueError(f"{kernel.__name__}: signature and config disagree with the kernel about {sorted(unknown)}")
    signature = {name: "constexpr" if name in constants else spec.signature[name] for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in spec.unaligned and signature[name][0] in "*i"
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, aligned)
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    built = triton.compile(source, target=TARGETS[arch], options=options)
    if arch.startswith("gfx"):
        text = built.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        # Scalar registers "spill" into lanes of vector registers; only vector spills reach memory.
        spilled = sum(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)))
        return Report(registers, spilled, built.metadata.shared, text)
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, text = (
            subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    spilled = stack or len(re.findall(r"\b(?:STL|LDL)\b", text))
    return Report(int(re.search(r"REG:(\d+)", usage)[1]), spilled, built.metadata.shared, text)
