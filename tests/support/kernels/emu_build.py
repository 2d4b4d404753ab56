"""Build of the CUDA C++ kernels for the CPU (emu/cuda_emu.h), optionally with a sanitizer or a planted fault."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or ""
# All but the probe, which is a launch and little else.
KERNELS = sorted(path for path in (ROOT / "csrc" / "cuda").glob("*.cu") if path.stem != "probe_kernel")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-w", f"-I{ROOT / 'tests' / 'kernels' / 'emu'}"]
# Optimizing takes longer than it saves under ASan; ThreadSanitizer misses a planted race without it.
ASAN = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
TSAN = ["-fsanitize=thread"]


def compile_kernel(
    source: Path, target: Path, flags: list[str], edits: dict[str, tuple[str, str]] | None = None
) -> Path:
    """One .cu (or tests/kernels/emu/driver.cpp) as an object; `edits` {file name: (old, new)} plants a fault."""
    if edits:
        folder = target.parent / target.stem
        (folder / "cuda").mkdir(parents=True)
        for original in (ROOT / "csrc" / "common.cuh", source):
            text, (old, new) = original.read_text(), edits.get(original.name, ("", ""))
            assert old in text, f"the planted fault no longer fits {original.name}"
            copy = folder / ("cuda" if original == source else "") / original.name
            copy.write_text(text.replace(old, new, 1) if old else text)
            source = copy if original == source else source
    subprocess.run([COMPILER, *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
    return target


def compile_all(folder: Path, flags: list[str]) -> dict[str, Path]:
    """{name: object} of every kernel and the driver, two at a time."""
    sources = [*KERNELS, ROOT / "tests" / "kernels" / "emu" / "driver.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = pool.map(lambda source: compile_kernel(source, folder / f"{source.stem}.o", flags), sources)
    return {source.stem: target for source, target in zip(sources, objects, strict=True)}


def link(objects: dict[str, Path], target: Path, flags: list[str]) -> Path:
    """The driver, or a shared library of the kernels alone where the target ends in .so."""
    shared = target.suffix == ".so"
    parts = [str(path) for name, path in objects.items() if not (shared and name == "driver")]
    subprocess.run([COMPILER, *flags, *(["-shared"] if shared else []), *parts, "-o", str(target)], check=True)
    return target
