"""Compilation of Triton kernels for NVIDIA and AMD without a GPU or driver: registers, spills, matrix instructions."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass

import triton
from launches import ARCHITECTURES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    arch: GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    for arch in ARCHITECTURES
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# In the compiler's last text form: disassembling to SASS takes longer than all of the compiling.
MATRIX_UNIT = {
    "sm_80": r"\bmma\.sync",
    "sm_90": r"\bwgmma\.mma_async|\bmma\.sync",
    "sm_100": r"\btcgen05\.mma|\bmma\.sync",
    "gfx942": r"\bv_mfma",
}
SASS = {"sm_80": r"\bHMMA", "sm_90": r"\b[HQ]G?MMA", "sm_100": r"\b(?:UTC\w*MMA|HMMA)"}


@dataclass(frozen=True)
class Report:
    """Registers a thread; bytes of stack (0: nothing spilled); bytes of shared memory; the first matrix instruction,
    and all; whether loads are copied into shared memory ahead of their use."""

    registers: int
    spilled: int
    shared: int
    matrix: str
    matrices: frozenset[str]
    pipelined: bool
    ttir: str


def compile_kernel(spec, config: dict, arch: str) -> Report:
    """One config of a Spec for one architecture, specialized as the launcher does for aligned arguments."""
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
    else:
        registers, spilled = usage(built.asm["cubin"])
        text = built.asm["ptx"]
    found = re.findall(MATRIX_UNIT[arch], text)
    pipelined = "cp.async.c" in text
    first, ttir = next(iter(found), ""), built.asm["ttir"]
    return Report(registers, spilled, built.metadata.shared, first, frozenset(found), pipelined, ttir)


def usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack, where spills go) in a cubin's ELF records .nv.info: cuobjdump would take long."""
    (headers,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQII", cubin, headers + i * size) for i in range(count)]
    table = sections[names][4]
    found: dict[int, int] = {}
    for name, _, _, _, offset, length, _, _ in sections:
        if cubin[table + name : cubin.index(0, table + name)] != b".nv.info":
            continue
        place, end = offset, offset + length
        while place < end:
            form, attribute, value = struct.unpack_from("<BBH", cubin, place)
            place += 4
            if form == 4:  # `value` bytes follow: a symbol's number and a figure
                if attribute in (STACK, REGISTERS):
                    found[attribute] = max(found.get(attribute, 0), struct.unpack_from("<II", cubin, place)[1])
                place += value
    return found[REGISTERS], found[STACK]


STACK, REGISTERS = 0x11, 0x2F


def cuobjdump(cubin: bytes, what: str) -> str:
    """The output of Triton's own cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
